"""Run the decoder blocks of a model on a CPU by one call of the CPU library each (`fewbit.kernels.cpu.block`).

A block is recognized by its parts: norms, packed products before and after attention and of the MLP, positions. It is
not looked up by the name of a model. Of a block with experts, or with another MLP, the library computes the half up to
the end of attention. When the model first reads a cache of keys and values, the output of each block is compared with
that of its own code, for a token after a few, at its own position and at the last ones of the context. The modules stay
as they are, and run as before for what the library does not take: gradients, hooks, adapters, other caches, and blocks
that are not recognized. Products with unquantized weights are replaced in the same way (`unquantized`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as changed
from inspect import signature
from threading import RLock, local
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fewbit.errors import KernelError
from fewbit.kernels.cpu.block import Wiring
from fewbit.models import blocks, parallel
from fewbit.models.decoding import pages
from fewbit.models.decoding.block_parts import ATTENTION, ROUNDING, Unlike, child, wirings
from fewbit.models.decoding.caches import CACHE, ReservedLayer, in_place, reserved
from fewbit.models.decoding.replacement import Replacement, Turns, named, names_of
from fewbit.models.decoding.stand_in import StandIn
from fewbit.models.decoding.steps import Steps
from fewbit.models.decoding.unquantized import Product, products
from fewbit.system import native

# Relative distance of what a block adds to its input. In 16 bits, the library and the block's own code round some
# activations to different integers: for SmolLM2 this makes a median of 0.7 % in float16 and 1.1 % in bfloat16, at most
# 1.1 and 4.3 %.
_SAME = {torch.float32: 5e-3, torch.float16: 3e-2, torch.bfloat16: 5e-2}
_CLOSE = 4  # up to so many times this distance, an activation may have been rounded otherwise
_TRIES = 3  # tokens that are tried then
_PROMPT = 12  # tokens before the one that is compared


def use(model: Any) -> None:
    """Let the library compute the blocks of a model on a CPU, where it can. Another call looks at the blocks anew."""
    remove(model)
    whole = not parallel.is_split(model)  # else ranks exchange numbers inside of blocks
    if whole and model.device.type == "cpu" and not isinstance(native.available(), str):
        hooks = _Hooks()
        model.register_forward_pre_hook(hooks.before, with_kwargs=True)
        model.register_forward_hook(hooks.after, always_call=True)


def remove(model: Any) -> None:
    """Undo `use`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if _own(hook)]:
            del hooks[key]


def has_other_hooks(model: Any) -> bool:
    """Whether a model has hooks besides those of `use`."""
    return not all(_own(hook) for hook in (*model._forward_pre_hooks.values(), *model._forward_hooks.values()))


def _own(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), _Hooks)


def computed(model: Any) -> list[str]:
    """The names of the blocks that the library computes, as far as a cache has been read."""
    found = [module for hook in model._forward_pre_hooks.values() if _own(hook) for module in hook.__self__.found or ()]
    return [name for name in blocks.find_blocks(model) if model.get_submodule(name) in found]


def split(model: Any) -> tuple[list[str], list[str], dict[str, str]]:
    """The blocks that the library computes whole, those of which it computes the half up to the end of attention, and
    why not the whole: a reason for each of all other blocks, and for each half."""
    names = blocks.find_blocks(model)
    if isinstance(reason := native.library(), str):
        return [], [], dict.fromkeys(names, reason)
    if model.device.type != "cpu" or model.dtype not in _SAME:
        return [], [], dict.fromkeys(names, f"the model is {str(model.dtype).removeprefix('torch.')} on {model.device}")
    hooks = next((hook.__self__ for hook in model._forward_pre_hooks.values() if _own(hook)), None) or _Hooks()
    found = hooks.look(model)
    own = {name: served for name in names if (served := found.get(model.get_submodule(name))) is not None}
    halves = [name for name, each in own.items() if each.rest is not None]
    return [name for name in own if name not in halves], halves, hooks.reasons


def whole(model: Any) -> list[Replacement] | None:
    """The model's blocks in order, if the library computes all of them, whole and at every position. None if not."""
    hooks = next((hook.__self__ for hook in model._forward_pre_hooks.values() if _own(hook)), None)
    return None if hooks is None else _whole(model, hooks.look(model))


def _whole(model: Any, found: dict[Any, Replacement]) -> list[Replacement] | None:
    names = blocks.find_blocks(model)
    served = [found.get(model.get_submodule(name)) for name in names]
    every = [each for each in served if each is not None and each.rest is None and each.before is None]
    return every if every and len(every) == len(names) else None


def unquantized(model: Any) -> dict[Any, Product]:
    """The linears with unquantized weights that the library computes while a model reads a cache, and by what."""
    hooks = next((hook.__self__ for hook in model._forward_pre_hooks.values() if _own(hook)), None)
    if hooks is None:
        return {}
    hooks.look(model)
    found: dict[Any, Product] = hooks.products
    return found


class _Hooks:
    """Replaces the forward of blocks and products while a model runs. Before and after, the modules are as they were.

    found: the blocks that the library computes; None before the test. products: the linears with unquantized weights
    that it computes. reasons: why not other blocks, see `split`.
    """

    def __init__(self) -> None:
        self.found: dict[Any, Replacement] | None = None
        self.products: dict[Any, Product] = {}
        self.steps: Steps | None = None
        self.reasons: dict[str, str] = {}
        self.running = 0  # calls of the model, in all threads
        self.lock, self.calls = RLock(), local()

    def __reduce__(self) -> Any:
        return (_Hooks, ())  # a copy of the model finds its own

    def look(self, model: Any) -> dict[Any, Replacement]:
        """The blocks that the library computes, tested at the first call."""
        with self.lock:
            if self.found is None:
                self.found = {}  # the test runs the model
                self.found, self.reasons = _found(model)
                self.steps = _steps(model, self.found)
                self.products = products(model)
            return self.found

    def stand_ins(self) -> list[StandIn]:
        """What computes the calls of modules instead of these."""
        made = [own.stand_in for own in (self.found or {}).values()] + [own.stand_in for own in self.products.values()]
        return made if self.steps is None else [*made, self.steps.stand_in]

    def before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        taken = self.settle()
        taken.append(False)
        cache = kwargs.get(CACHE, kwargs.get("past_key_values"))
        layers = cache.layers if isinstance(cache, DynamicCache) else None
        if torch.is_grad_enabled() or not (layers or pages.is_paged(cache)):
            return
        with self.lock:
            blocks = self.look(model)
            if not (blocks or self.products):
                return
            if blocks and layers:
                layers[:] = [in_place(layer) for layer in layers]
            elif blocks:
                pages.begin(cache, kwargs)
            if self.running == 0:
                for each in self.stand_ins():
                    each.put()
            self.running += 1
            taken[-1] = True

    def after(self, model: Any, args: Any, out: Any) -> None:
        if torch.compiler.is_compiling() or not self.calls.taken.pop():
            return
        with self.lock:
            self._ended(1)

    def settle(self) -> list[bool]:
        """End the calls of this thread that Ctrl-C ended: torch calls no hook then. The list of its calls."""
        taken: list[bool] = vars(self.calls).setdefault("taken", [])
        if any(taken):
            with self.lock:
                self._ended(sum(taken))
                taken.clear()
        return taken

    def _ended(self, calls: int) -> None:
        self.running -= calls
        if self.running == 0:
            for each in self.stand_ins():
                each.take_away()


def _steps(model: Any, found: dict[Any, Replacement]) -> Steps | None:
    """What replaces the decoder's forward for single tokens, if its parts are known."""
    blocks = _whole(model, found) if found else None
    with suppress(Exception):  # a decoder of another kind can raise anything
        return None if blocks is None else Steps(model, blocks)
    return None


def _found(model: Any) -> tuple[dict[Any, Replacement], dict[str, str]]:
    """The blocks that the library computes, and by what; why not other blocks, or the half of a block."""
    ways, halves, reasons = dict[str, list[Wiring]](), dict[str, str](), dict[str, str]()
    if model.dtype not in _SAME:
        return {}, reasons
    for name in blocks.find_blocks(model):
        module = model.get_submodule(name)
        try:
            if "forward" in vars(module):
                raise Unlike("its forward has been replaced")
            ways[name], halves[name] = wirings(module)
        except Unlike as reason:
            reasons[name] = str(reason)
    if isinstance(native.library(), str) or not ways:
        return {}, reasons
    found, finder, pending = dict[Any, Replacement](), _Finder(model.dtype), list(ways)
    for seed in range(_TRIES):
        seen, again = _observed(model, pending, seed), list[str]()
        for name in pending:
            if isinstance(cases := seen[name], str):
                reasons[name] = cases
                continue
            made, why, close = finder.found(model.get_submodule(name), ways[name], cases)
            if made is not None:
                found[model.get_submodule(name)] = made
            elif close:
                again.append(name)
            reasons[name] = why or halves[name]
        if not (pending := again):
            break
    return found, {name: why for name, why in reasons.items() if why}


class _Finder:
    """Finds the wiring of one block after the other. Most are wired like the one before."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.turns, self.last = dtype, Turns(), 0

    def found(self, module: Any, ways: list[Wiring], cases: list[_Case]) -> tuple[Replacement | None, str, bool]:
        """The replacement that gives the module's results; why there is none, or not for all positions; whether one is
        so close that the rounding of one activation may be the difference."""
        first, *far = cases
        angles = first.kwargs.get("position_embeddings")
        ways = list(_turned(ways, angles[0].shape[-1] if isinstance(angles, tuple) else 0))
        nearest = float("inf")
        for i in sorted(range(len(ways)), key=lambda each: each != self.last):
            own = Replacement(module, ways[i], self.dtype, self.turns, first.beside)
            nearest = min(nearest, off := _off(own, first))
            if off <= 1:
                self.last = i
                break
        else:
            return None, "its parts are known, but another wiring computes its output", nearest <= _CLOSE
        off_far = [_off(own, case) for case in far]
        equal = [case.position for case, off in zip(far, off_far, strict=True) if off <= 1]
        if not far or equal[:1] == [far[0].position]:
            return own, "", True
        if off_far[0] <= _CLOSE or not equal:
            return None, "what it computes depends on the position", min(off_far) <= _CLOSE
        own.before = equal[0] + 1
        return own, f"from token {own.before} on, what it computes depends on the position", True


def _turned(ways: list[Wiring], angles: int) -> Iterator[Wiring]:
    """The same with as many rotated values as there are angles, or two for each angle."""
    for way in ways:
        widths = [width for width in (angles, 2 * angles) if 0 < width <= way.head] if way.rotated else [0]
        yield from (changed(way, rotated=width) for width in widths)


# ---- the test ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """One call of a block: its input, arguments, output, what is beside the output, and what it wrote into its cache.

    position: of the token, if it is not the one after the others.
    """

    x: Tensor
    kwargs: dict[str, Any]
    out: Tensor
    beside: list[None] | None
    layer: ReservedLayer
    written: list[Tensor]
    position: int = 0


@torch.inference_mode()
def _observed(model: Any, names: list[str], seed: int) -> dict[str, Any]:
    """For one token after a prompt: each block's cases, as the model itself has them; or why there are none.

    The first case has the token's own position, and the others are far from it, the farthest first.
    """
    seen: dict[str, Any] = dict.fromkeys(names, "it is not called in each step")
    cache: Any = reserved(model, _PROMPT + 1)
    position = 0

    def noting(name: str, module: Any) -> StandIn:
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = module.forward(*args, **kwargs)
            index = getattr(child(module, ATTENTION), "layer_idx", None)
            layer = cache.layers[index] if isinstance(index, int) and index < len(cache.layers) else None
            given = named(names_of(module.forward), args, kwargs)
            first, *rest = out if isinstance(out, tuple) else (out,)
            x = args[0] if args else None
            if not (isinstance(x, Tensor) and isinstance(first, Tensor) and all(each is None for each in rest)):
                seen[name] = "it reads or returns more than one tensor"
            elif type(layer) is not ReservedLayer or not layer.is_initialized:
                seen[name] = "its cache is no plain list of keys and values"
            else:
                beside = [None for _ in rest] if isinstance(out, tuple) else None
                case = _Case(x.clone(), given, first.clone(), beside, layer, _last(layer), position)
                seen[name] = [*(seen[name] if isinstance(seen[name], list) else ()), case]
            return out

        return StandIn(module, forward)

    generator = torch.Generator("cpu").manual_seed(seed)
    words = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(words, (1, _PROMPT + 1), generator=generator, dtype=torch.int64, device="cpu")
    given: dict[str, Any] = {CACHE: cache, "use_cache": True}
    if "logits_to_keep" in signature(model.forward).parameters:  # those of all tokens can take more than a block
        given["logits_to_keep"] = 1
    noted = [noting(name, model.get_submodule(name)) for name in names]
    try:
        model(input_ids=ids[:, :_PROMPT], **given)
        for each in noted:
            each.put()
        for position in (0, *_far(model)):
            if position:  # instead of the token before; layers of other kinds keep what they have
                for layer in (each for each in cache.layers if type(each) is ReservedLayer):
                    layer.crop(-1)
                given["position_ids"] = torch.tensor([[position]], dtype=torch.int64, device="cpu")
            model(input_ids=ids[:, _PROMPT:], **given)
    except Exception as error:  # a model's own code can raise anything with a cache that it was not written for
        return dict.fromkeys(names, f"the model fails with a reserved cache ({error!r:.100})")
    finally:
        for each in noted:
            each.take_away()
    return seen


def _far(model: Any) -> list[int]:
    """The last position of the model's context, and the last before its positions were stretched, if they were."""
    if "position_ids" not in signature(model.forward).parameters:
        return []
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, "max_position_embeddings", None), *_originals(getattr(config, "rope_parameters", None))]
    return sorted({limit - 1 for limit in limits if isinstance(limit, int) and limit > _PROMPT + 1}, reverse=True)


def _originals(parameters: Any) -> Iterator[Any]:
    """The values of `original_max_position_embeddings`, for the kinds of layers."""
    for name, value in parameters.items() if isinstance(parameters, dict) else ():
        yield from [value] if name == "original_max_position_embeddings" else _originals(value)


def _last(layer: ReservedLayer) -> list[Tensor]:
    return [whole[..., _PROMPT, :].clone() for whole in layer.whole]


@torch.inference_mode()
def _off(own: Replacement, case: _Case) -> float:
    """How far the library is from the block's own output, key and value; at most 1 if they are the same."""
    if case.layer.end > _PROMPT:
        case.layer.crop(-1)
    found = None
    with suppress(KernelError):  # the library rejects this wiring
        found = own.served(case.x, case.kwargs)
    if found is None:
        return float("inf")
    start, end = case.x.float(), case.out.float()
    pairs = [(found.float() - start, end - start, ROUNDING[case.x.dtype] * float(end.norm()))]
    pairs += [(a.float(), b.float(), 1e-30) for a, b in zip(_last(case.layer), case.written, strict=True)]
    return max(float((a - b).norm()) / (_SAME[case.x.dtype] * float(b.norm()) + slack) for a, b, slack in pairs)
