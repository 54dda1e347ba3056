"""Gives linears that a server computes as one matrix the same number where a scheme has one for a whole weight.

vLLM and SGLang stack q, k and v, gate and up, and the projections of other blocks that read one tensor. NVFP4's global
scale, or the only scale of an FP8 tensor, then has one place for all of them. Such linears belong to one module and
have the same number of columns. Not all linears for which this holds are stacked (o may have as many columns as q), but
sharing costs little: the values are floats, and their relative precision does not depend on the shared number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from fewbit.plans.plan import Assignment
from fewbit.schemes.base import Scheme


def agreed(assignments: Mapping[str, Assignment], weight: Callable[[str], Tensor]) -> dict[str, Assignment]:
    """`assignments` (linear -> assignment), with schemes that agree. weight: gives the weight of a linear."""
    together: dict[tuple[str, int, Scheme], list[str]] = {}
    for name, assignment in assignments.items():
        key = (name.rpartition(".")[0], assignment.shape[1], assignment.scheme)
        together.setdefault(key, []).append(name)
    found = dict(assignments)
    for (_, _, scheme), names in together.items():
        if len(names) > 1:
            shared = scheme.for_all(weight(name) for name in names)
            found |= {name: replace(assignments[name], scheme=shared) for name in names}
    return found
