"""Run the decoder blocks of a model on a CPU by one call of the CPU library each (`fewbit.kernels.cpu.block`).

A block is recognized by its parts: RMS norms, packed q, k, v and output, rotary positions, packed gate, up and down. It
is not looked up by the name of a model. Of a block with experts, or with another MLP, the library computes the half up
to the end of attention. When the model first reads a cache of keys and values, the output of each block is compared
with that of its own code, for a token after a few. The modules stay as they are, and run as before for what the library
does not take: gradients, hooks, adapters, other caches, and blocks that are not recognized.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace as changed
from threading import RLock, local
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fewbit.errors import KernelError
from fewbit.kernels.cpu.block import Block, Cached, Wiring
from fewbit.models import blocks
from fewbit.models.decoding import pages
from fewbit.models.decoding.block_parts import ATTENTION, MLP, ROUNDING, Unlike, child, norm_names, wirings
from fewbit.models.decoding.caches import CACHE, InPlaceLayer, ReservedLayer, in_place, reserved
from fewbit.nn.layers import Packed
from fewbit.system import native

_SAME = {torch.float32: 5e-3, torch.bfloat16: 5e-2}  # relative distance of what a block adds to its input
_PROMPT = 12  # tokens before the one that is compared
_MOST = 64  # rows of a call: for long prompts, PyTorch is as fast
_KNOWN = {"attention_mask", "position_ids", "position_embeddings", "use_cache", "cache_position", CACHE}

Forward = Callable[..., Any]


def use(model: Any) -> None:
    """Let the library compute the blocks of a model on a CPU, where it can. Another call looks at the blocks anew."""
    remove(model)
    if model.device.type == "cpu" and model.dtype in _SAME and not isinstance(native.available(), str):
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
    found, reasons = _found(model)
    own = {name: found[module].__self__ for name in names if (module := model.get_submodule(name)) in found}  # type: ignore[attr-defined]
    halves = [name for name, each in own.items() if each.rest is not None]
    return [name for name in own if name not in halves], halves, reasons


class _Hooks:
    """Replaces the forward of blocks while a model runs. Before and after, the modules are as they were.

    found: the blocks that the library computes; None before the test.
    """

    def __init__(self) -> None:
        self.found: dict[Any, Forward] | None = None
        self.running = 0  # calls of the model, in all threads
        self.lock, self.calls = RLock(), local()

    def __reduce__(self) -> Any:
        return (_Hooks, ())  # a copy of the model finds its own

    def before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        taken = vars(self.calls).setdefault("taken", [])
        taken.append(False)
        cache = kwargs.get(CACHE, kwargs.get("past_key_values"))
        layers = cache.layers if isinstance(cache, DynamicCache) else None
        if torch.is_grad_enabled() or not (layers or pages.is_paged(cache)):
            return
        with self.lock:
            if self.found is None:
                self.found = {}  # the test runs the model
                self.found, _ = _found(model)
            if not self.found:
                return
            if layers:
                layers[:] = [in_place(layer) for layer in layers]
            else:
                pages.begin(cache, kwargs)
            if self.running == 0:
                for module, forward in self.found.items():
                    vars(module).setdefault("forward", forward)
            self.running += 1
            taken[-1] = True

    def after(self, model: Any, args: Any, out: Any) -> None:
        if torch.compiler.is_compiling() or not self.calls.taken.pop():
            return
        with self.lock:
            self.running -= 1
            if self.running == 0:
                for module, forward in (self.found or {}).items():
                    if vars(module).get("forward") == forward:
                        del vars(module)["forward"]


def _found(model: Any) -> tuple[dict[Any, Forward], dict[str, str]]:
    """The blocks that the library computes, and their forwards; why not other blocks, or the half of a block."""
    ways, reasons = dict[str, list[Wiring]](), dict[str, str]()
    for name in blocks.find_blocks(model):
        module = model.get_submodule(name)
        try:
            if "forward" in vars(module):
                raise Unlike("its forward has been replaced")
            ways[name], half = wirings(module, model.dtype)
            if half:
                reasons[name] = half
        except Unlike as reason:
            reasons[name] = str(reason)
    if isinstance(native.library(), str) or not ways:
        return {}, reasons
    seen = _observed(model, list(ways))
    found, turns = dict[Any, Forward](), _Turns()
    for name in ways:
        if isinstance(seen[name], str):
            reasons[name] = str(seen[name])
            continue
        x, kwargs, expected, layer = seen[name]
        module = model.get_submodule(name)
        angles = kwargs.get("position_embeddings")
        rotated = angles[0].shape[-1] if isinstance(angles, tuple) else 0
        for wiring in ways[name]:
            wiring = changed(wiring, rotated=min(wiring.rotated, rotated))
            own = _Replacement(module, wiring, model.dtype, turns)
            if _fits(own, x, kwargs, expected, layer):
                found[module] = own.forward
                break
        else:
            reasons[name] = "its parts are known, but another wiring computes its output"
    return found, reasons


# ---- the test ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _observed(model: Any, names: list[str]) -> dict[str, Any]:
    """For one token after a prompt: each block's input, arguments, output and cache, as the model itself has them; or
    why they are not of use."""
    seen: dict[str, Any] = dict.fromkeys(names, "it is not called in each step")
    cache: Any = reserved(model, _PROMPT + 1)
    handles = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            index = getattr(child(module, ATTENTION), "layer_idx", None)
            layer = cache.layers[index] if isinstance(index, int) and index < len(cache.layers) else None
            if len(args) != 1 or not isinstance(out, Tensor):
                seen[name] = "it is called with, or returns, more than one tensor"
            elif type(layer) is not ReservedLayer or not layer.is_initialized:
                seen[name] = "its cache is no plain list of keys and values"
            else:
                seen[name] = (args[0].clone(), kwargs, out.clone(), layer)

        return hook

    generator = torch.Generator("cpu").manual_seed(0)
    words = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(words, (1, _PROMPT + 1), generator=generator, dtype=torch.int64, device="cpu")
    given: dict[str, Any] = {CACHE: cache, "use_cache": True}
    try:
        model(input_ids=ids[:, :_PROMPT], **given)
        for name in names:
            handles.append(model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True))
        model(input_ids=ids[:, _PROMPT:], **given)
    except Exception as error:  # a model's own code can raise anything with a cache that it was not written for
        return dict.fromkeys(names, f"the model fails with a reserved cache ({error!r:.100})")
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.inference_mode()
def _fits(own: _Replacement, x: Tensor, kwargs: dict[str, Any], expected: Tensor, layer: ReservedLayer) -> bool:
    """Whether the library gives the block's own output, and writes the same key and value. The cache stays as it is."""
    before = [whole[..., _PROMPT, :].clone() for whole in layer.whole]
    layer.crop(-1)
    found = None
    with suppress(KernelError):  # the library rejects this wiring
        found = own.served(x, kwargs)
    written = [whole[..., _PROMPT, :].clone() for whole in layer.whole]
    for whole, states in zip(layer.whole, before, strict=True):
        whole[..., _PROMPT, :] = states
    if layer.end == _PROMPT:  # not served
        layer.update(*(states[..., None, :] for states in before))
    if found is None:
        return False
    start = x.float()
    pairs = [(found.float() - start, expected.float() - start, ROUNDING[x.dtype] * float(expected.float().norm()))]
    pairs += [(a.float(), b.float(), 0.0) for a, b in zip(written, before, strict=True)]
    return all(float((a - b).norm()) <= _SAME[x.dtype] * float(b.norm()) + slack for a, b, slack in pairs)


# ---- the forward ---------------------------------------------------------------------------------------------------


class _Turns:
    """The cosine and sine of a step in float32, which blocks share."""

    def __init__(self) -> None:
        # The tensors that were converted last, their version, and the result.
        self.last: tuple[Any, Any, int, tuple[Tensor, Tensor] | None] = (None, None, 0, None)

    def of(self, given: Any, batch: int, tokens: int) -> tuple[Tensor, Tensor] | None:
        """None if they are no tensors [batch or 1, tokens, rotated]."""
        if not isinstance(given, tuple) or len(given) != 2:
            return None
        cosine, sine = given
        *known, turned = self.last
        if turned is None or known[0] is not cosine or known[1] is not sine or known[2] != _version(cosine):
            turned = (cosine.float().contiguous(), sine.float().contiguous())
            self.last = (cosine, sine, _version(cosine), turned)
        shape = turned[0].shape
        if turned[1].shape != shape or len(shape) != 3 or shape[1] != tokens or shape[0] not in (1, batch):
            return None
        return turned


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _Replacement:
    """A block's forward by the library, and by its own code for everything else."""

    def __init__(self, module: Any, wiring: Wiring, dtype: torch.dtype, turns: _Turns) -> None:
        self.plain: Forward = module.forward
        self.block, self.dtype = Block(wiring, dtype), dtype
        self.layer: int = child(module, ATTENTION).layer_idx
        self.shape, self.rotated = (wiring.shared, wiring.head), wiring.rotated
        self.turns = turns
        # The second half by the module's own parts, if the library computes the first half only.
        mlp = None if wiring.gated else child(module, MLP)
        before, after = (getattr(module, name) if name else None for name in norm_names(module)[2:])
        self.rest, self.residual = None if mlp is None else (before, mlp, after), wiring.residual
        apart = set() if mlp is None else set(mlp.modules())
        inner = [each for each in module.modules() if each is not module and each not in apart]
        packed = [each for each in inner if isinstance(each, Packed)]
        self.parts = [(m._modules, name, part) for m in (module, *inner) for name, part in m.named_children()]
        self.parts += [(each._parameters, "weight", each.held) for each in packed if "weight" in each._parameters]
        self.hooks = [hooks for each in inner for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self.owned = [vars(each) for each in inner]
        small = [p for each in inner if not isinstance(each, Packed) for p in each.parameters(recurse=False)]
        biases = [p for each in packed if isinstance(p := each._parameters.get("bias"), nn.Parameter)]
        self.trained = [(p, p._version) for p in (*small, *biases) if not p.is_inference()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], Tensor):
            out = self.served(args[0], kwargs)
            if out is not None:
                return out
        return self.plain(*args, **kwargs)

    def served(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The block's output; None, with nothing written, if the library does not take this call."""
        if torch.is_grad_enabled() or x.dim() != 3 or x.dtype != self.dtype or not x.is_contiguous():
            return None
        batch, tokens, _ = x.shape
        turned = self.turns.of(kwargs.get("position_embeddings"), batch, tokens)
        if turned is None or (self.rotated and turned[0].shape[-1] != self.rotated) or not self._unchanged():
            return None
        cache = kwargs.get(CACHE)
        found = pages.of_layer(cache, self.layer)
        known = _KNOWN if found is None else _KNOWN | pages.ARGUMENTS
        if any(name not in known and value is not None and value is not False for name, value in kwargs.items()):
            return None
        if found is not None:
            out = self.block(x, found, turned)
        else:
            layer = self._layer(cache, x)
            if layer is None or not layer.reserve(tokens):
                return None
            cached, mask = (
                Cached(layer.whole[0], layer.whole[1], layer.first(), layer.end),
                kwargs.get("attention_mask"),
            )
            if mask is not None:
                seen = (1, tokens, cached.end + tokens - cached.first)
                if mask.dim() != 4 or mask.shape[1:] != seen or len(mask) not in (1, batch):
                    return None
                mask = mask if mask.dtype in (torch.bool, torch.float32) else mask.float()
                mask = mask if mask.stride(-1) == 1 else mask.contiguous()
            out = self.block(x, cached, turned, mask)
            layer.advance(tokens)
        return out if self.rest is None else self._second_half(out)

    def _layer(self, cache: Any, x: Tensor) -> InPlaceLayer | None:
        """The layer of a cache that is written in place, for the texts of x. None if there is none."""
        layers = getattr(cache, "layers", None) or ()
        layer = layers[self.layer] if self.layer < len(layers) else None
        if not isinstance(layer, InPlaceLayer) or x.shape[0] * x.shape[1] > _MOST:
            return None
        if not layer.is_initialized:
            empty = x.new_empty(x.shape[0], self.shape[0], 0, self.shape[1])
            layer.lazy_initialization(empty, empty)
        return layer if len(layer.whole[0]) == x.shape[0] else None

    def _second_half(self, h: Tensor) -> Tensor:
        assert self.rest is not None
        before, mlp, after = self.rest
        y: Any = mlp(h if before is None else before(h))
        y = y[0] if isinstance(y, tuple) else y
        y = y if after is None else after(y)
        out: Tensor = h + (y if self.residual == 1 else y * self.residual)
        return out

    def _unchanged(self) -> bool:
        """Whether nobody has replaced, hooked or trained a part. Plain loops: this runs for each token."""
        for owner, name, part in self.parts:
            if owner.get(name) is not part:
                return False
        for hooks in self.hooks:
            if hooks:
                return False
        for own in self.owned:
            if "forward" in own:
                return False
        return all(weight._version == version for weight, version in self.trained)
