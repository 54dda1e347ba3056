"""Output heads that are tied to the embedding, and get a weight of their own."""

from __future__ import annotations

from copy import copy

from fewbit.errors import PlanError
from fewbit.models.skeleton import Skeleton


def untied(skeleton: Skeleton) -> Skeleton:
    """`skeleton` if its output head is not tied. Else a copy in which the head has a tensor of its own, with the values
    of the one that it is tied to. `skeleton` stays as it is.

    PlanError if other weights are tied too: config.json has one switch for all of them.
    """
    head = f"{skeleton.head_name}.weight"
    if head not in skeleton.tied:
        return skeleton
    if others := [name for name in skeleton.tied if name != head]:
        raise PlanError(
            f"{skeleton.head_name} has the weight of {skeleton.tied[head]}, and so has {others[0]}: config.json cannot "
            "say that only one of them is tied",
            "A GGUF file has one quantized weight for all of them.",
        )
    made, checkpoint = copy(skeleton), skeleton.checkpoint
    if head not in skeleton.name_of.values():
        key = skeleton.key_of(skeleton.tied[head])
        if skeleton.source.files:
            checkpoint.add_view(head, key, lambda whole: whole[...])
        else:  # an outline, which has shapes only
            checkpoint.specs[head] = checkpoint.specs[key]
        made.name_of = {**skeleton.name_of, head: head}
    made.tied, made.untied = {}, head
    return made
