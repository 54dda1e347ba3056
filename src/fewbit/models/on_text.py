"""Finds the part of a model that runs on token ids alone: the whole model, or the language model inside of it.

Some models need an image or sound in each forward pass, such as BLIP-2. Their language model runs without, so it is
calibrated on text by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbit.errors import PlanError
from fewbit.models import classes
from fewbit.models.blocks import embedding_of
from fewbit.models.calls import NO_CALIBRATION, SHELLS, BlockCall, first_line


class Host(Protocol):
    """A model on the meta device whose weights are loaded on request: `Skeleton`."""

    model: PreTrainedModel
    blocks: list[str]
    device: torch.device

    def materialized(self, prefix: str | None) -> AbstractContextManager[nn.Module]: ...

    def head(self) -> AbstractContextManager[None]: ...

    @property
    def on_text(self) -> OnText: ...


class OnText(NamedTuple):
    """part: the module that runs on text, "" for the whole model, None without one. why_not_whole: why the whole model
    does not, as the rest of a sentence that begins with its class; empty if it does."""

    part: str | None
    why_not_whole: str = ""


class _Reached(Exception):
    """The first block has its input."""


def found(skeleton: Host) -> OnText:
    """The largest part of the model that runs on token ids alone and contains the blocks and the token embedding.

    PlanError if the forward pass of the whole model fails after the output head, where no input makes a difference.
    """
    config = skeleton.model.config
    if not config.sub_configs and not getattr(config, "is_encoder_decoder", False):  # it has no towers
        return OnText("")
    why = ""
    with skeleton.materialized(None), torch.no_grad():
        for name, part in _parts(skeleton):
            reason = _why_not(skeleton, part)
            if reason is None and name:
                reason = _why_not_block(skeleton, part)
            if reason is None:
                return OnText(name, why)
            why = why or f"does not run on text alone: {reason}"
    return OnText(None, why)


def inputs(part: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The arguments of a forward pass over token ids. A decoder with an encoder gets the same ids as the encoder."""
    known = inspect.signature(type(part).forward).parameters
    return {name: ids for name in ("input_ids", "decoder_input_ids") if name in known or name == "input_ids"}


@contextmanager
def ending(skeleton: Host) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Inside this context, everything outside the blocks has its weights.

    Yields a function that returns logits [windows, tokens, V] for token ids [windows, tokens] and the output of the
    last block, with gradients. It raises PlanError if the model does not run so.
    """
    part = skeleton.model.get_submodule(skeleton.on_text.part or "")
    blocks: list[Any] = [skeleton.model.get_submodule(block) for block in skeleton.blocks]
    shells = list(SHELLS)

    def logits(tokens: Tensor, states: Tensor) -> Tensor:
        first: Exception | None = None
        for shell in tuple(shells):
            for block in blocks:
                block.forward = lambda *args, shell=shell, **kwargs: shell(states)
            try:
                output = part(**inputs(part, tokens.to(skeleton.device)), use_cache=False)
                shells[:] = [shell]
                computed: Tensor = output["logits"] if "logits" in output else output[0]
                return computed
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the model's code may fail on the wrong form of return value
                first = first or error
            finally:
                for block in blocks:
                    del block.forward
        assert first is not None
        kind = type(skeleton.model).__name__
        raise PlanError(f"{kind} does not run without its blocks: {first_line(first)}", NO_CALIBRATION)

    with skeleton.materialized(None), skeleton.head():
        yield logits


def _two(part: nn.Module, device: torch.device) -> dict[str, Tensor]:
    return inputs(part, torch.zeros(1, 2, dtype=torch.int64, device=device))


def check(model: PreTrainedModel) -> None:
    """PlanError unless the loaded `model` runs on token ids alone. Only a model with towers is run, on one token."""
    reason = ""
    if getattr(model.config, "is_encoder_decoder", False):
        raise PlanError(
            f"{type(model).__name__} is an encoder-decoder model, and does not continue a text",
            "Load it with fewbit.load(...) or transformers, and call its method generate().",
        )
    if needed := classes.needed(model):
        reason = f"each forward pass needs {', '.join(needed)}"
    elif model.config.sub_configs:
        try:
            with torch.inference_mode():
                model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model's code can raise anything
            reason = first_line(error)
    if reason:
        raise PlanError(f"{type(model).__name__} does not run on text alone: {reason}")


def _parts(skeleton: Host) -> Iterator[tuple[str, PreTrainedModel]]:
    """The models inside of the model that contain the blocks and the token embedding, the largest first.

    If the model does not say which module its token embedding is, those with blocks that take token ids.
    """
    embedding = embedding_of(skeleton.model)
    for name, module in skeleton.model.named_modules():
        inside = skeleton.blocks[0].startswith(f"{name}.") and (
            "input_ids" in inspect.signature(type(module).forward).parameters
            if embedding is None
            else any(inner is embedding for inner in module.modules())
        )
        if isinstance(module, PreTrainedModel) and (inside or not name):
            yield name, module


def _why_not(skeleton: Host, part: PreTrainedModel) -> str | None:
    """Why token ids alone do not reach the first block; None if they do. Blocks and head are replaced meanwhile."""
    if needed := classes.needed(part):
        return f"each forward pass needs {', '.join(needed)}"
    blocks: list[Any] = [skeleton.model.get_submodule(name) for name in skeleton.blocks]
    head: Any = skeleton.model.get_output_embeddings()
    reached = ended = False

    def computed(x: Tensor) -> Tensor:
        nonlocal ended
        ended = True
        return x.new_zeros(*x.shape[:-1], head.weight.shape[0])

    for shell in SHELLS:

        def passed(*args: Any, shell: Any = shell, **kwargs: Any) -> Any:
            nonlocal reached
            reached = True
            if not args or not isinstance(args[0], Tensor):
                raise _Reached
            return shell(args[0])

        replaced = [*blocks, *([head] if hasattr(head, "weight") else [])]
        for module in replaced:
            module.forward = computed if module is head else passed
        try:
            part(**_two(part, skeleton.device), use_cache=False)
            return None
        except (_Reached, torch.OutOfMemoryError):
            return None
        except Exception as error:  # the model's code can raise anything
            if not reached:
                return first_line(error)
            if ended and part is skeleton.model:
                raise PlanError(f"{type(part).__name__} does not run in transformers: {first_line(error)}") from None
        finally:
            for module in replaced:
                del module.forward
    return None  # its blocks return something else


def _why_not_block(skeleton: Host, part: PreTrainedModel) -> str | None:
    """Why the first block does not run on what `part` gives it; None if it does."""
    name, given = skeleton.blocks[0], list[tuple[tuple[Any, ...], dict[str, Any]]]()
    block: Any = skeleton.model.get_submodule(name)

    def record(*args: Any, **kwargs: Any) -> Any:
        given.append((args, kwargs))
        raise _Reached

    block.forward = record
    try:
        part(**_two(part, skeleton.device), use_cache=False)
    except _Reached:
        pass
    finally:
        del block.forward
    (args, kwargs) = given[0]
    try:
        with skeleton.materialized(name) as module:
            BlockCall(args[1:], kwargs).run(module, args[0])
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # the model's code can raise anything
        return first_line(error)
    return None
