"""Generate up to a fixed length, with one static key-value cache and, on a GPU, one CUDA graph for each token.

The cache is allocated once, at its full length. On a CPU, attention reads only the filled part: the result is that of a
growing cache, without the copies to grow it. On a GPU, attention reads the whole cache with a mask. Then every step
reads and writes the same memory, so the whole step (hundreds of kernel launches) is recorded once and replayed.
The model's `generate` prepares everything. The loop in `loop.py` writes the tokens if it can, else transformers' loop.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from fewbit.errors import PlanError
from fewbit.models.decoding import compiled_blocks, operations
from fewbit.models.decoding.attention import grouped_queries
from fewbit.models.decoding.caches import CACHE, EMPTIED, reserved, static
from fewbit.models.decoding.exclusive import exclusive
from fewbit.models.decoding.graph import Compiled, Graph
from fewbit.models.decoding.loop import Loop, can_serve
from fewbit.models.decoding.stand_in import StandIn

_CLOSE = 0.05  # relative distance of logits at which they count as equal: in bfloat16, longer sums round differently
# Arguments of `generate` that bring or need another cache.
_OTHERS = (
    "cache",
    "past_key_values",
    "cache_params",
    "cache_implementation",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "inputs_embeds",
)


def checked_length(length: Any, context: int | None, shown: str) -> int:
    """The length of the cache in tokens. PlanError if it is no integer from 2 to `context`, the model's if it has one.

    shown: argument and value, as the message names them.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise PlanError(f"{shown} is no number of tokens", "Count prompt and answer together, such as 512.")
    if context is not None and length > context:
        raise PlanError(f"{shown} is beyond the model's context of {context} tokens")
    return length


def within(model: Any, length: int, *, compile: bool = False) -> None:
    """Make `model.generate` use a static cache of `length` tokens, prompt included, for greedy search and sampling.

    `generate` then raises PlanError if a text would become longer. Beam search, and calls with their own cache, work as
    before. compile: compile the step with PyTorch before it is recorded, unless fewbit's own operations serve all its
    blocks, which is faster; a warning then says so. Compiling takes long, for each batch size again.
    """
    compiled_blocks.remove(model)
    if operations.replace(model, whole=compile) and compile:
        compile = False
        warnings.warn(
            "this model is not compiled: fewbit's own operations serve all its blocks, and are faster", stacklevel=2
        )
    if not compile:
        compiled_blocks.use(model)
    model.generate = Decoder(model, length, compile=compile).generate


class Resume:
    """A reader of one text after another, each of which may begin as the one before, such as a conversation.

    most: tokens to which the cache may grow. kept: how many tokens of the last prompt were not read again.
    """

    def __init__(self, most: int) -> None:
        self.most, self.kept = most, 0


class Decoder:
    """A model's `generate` with one static cache, which later calls use again."""

    def __init__(self, model: Any, length: int, *, compile: bool = False) -> None:
        self.model, self.length, self.compile = model, length, compile
        self.plain: Callable[..., Any] = model.generate
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which begins without a text: another thread may be writing one."""
        return {key: value for key, value in vars(self).items() if key in ("model", "length", "compile", "plain")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        """Nothing was generated yet."""
        self.cache: Any = None
        self.loop: Loop | None = None
        self.graph: StepGraph | None = None
        self.quick: Callable[..., Any] | None = None  # a step's forward, compiled or not
        self.room = self.length  # tokens of the cache, which a conversation may have made more than `length`
        self.used = 0
        self.first = True  # whether the next call of the model reads the prompt
        self.reader: Resume | None = None  # whose text the cache holds
        self.read: list[int] = []  # the tokens of this text whose keys and values are there
        self.kept = 0  # how many of them the text now begins with: these are not read again
        self.key: tuple[Any, ...] = ()
        self.static: bool | None = None  # whether the model works with a static cache; None before the test

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.GenerationMixin.generate`. A call from another thread waits: there is one cache.

        resume: a `Resume`, for a single text of token ids alone.
        """
        resume: Resume | None = kwargs.pop("resume", None)
        with exclusive(self.model):
            room, self.kept = self.room, 0
            try:
                return self._generate(resume, *args, **kwargs)
            except BaseException:
                if self.room != room:  # the larger cache may be what has no room
                    self.room, self.cache = room, None
                raise

    def _resumed(self, resume: Resume, ids: Tensor, new: int) -> None:
        """Note what the prompt [1, n] has in common with the reader's last text, after making room for all."""
        if (needed := ids.shape[1] + new) > self.room:
            self.room, self.cache = min(2 ** (needed - 1).bit_length(), resume.most), None
        elif self.reader is resume:
            pairs = zip(self.read, ids[0, :-1].tolist(), strict=False)  # at least one token is read
            self.kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _generate(self, resume: Resume | None, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or self.model.generation_config
        requested = {**vars(config), **{key: value for key, value in kwargs.items() if value is not None}}
        if (
            any(requested.get(key) is not None for key in _OTHERS)
            or (requested.get("num_beams") or 1) > 1
            or requested.get("use_cache") is False
            or not takes_a_cache(self.model)
        ):
            return self.plain(*args, **kwargs)
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if resume is not None:
            assert isinstance(ids, Tensor)
            self._resumed(resume, ids, requested["max_new_tokens"])
        prompt, most = ids.shape[1] if isinstance(ids, Tensor) else 1, self.room if resume else self.length
        self._check(prompt, requested.get("max_new_tokens"), requested.get("max_length"), most)
        self._renew(ids.shape[0] if isinstance(ids, Tensor) else 1, requested.get("num_return_sequences") or 1)
        self.reader, self.first, forward = None, True, self.model.forward
        given = {**kwargs, CACHE: self.cache, "disable_compile": True}
        if len(args) < 2 and isinstance(self.cache, StaticCache) and can_serve(self.model, requested):
            self.loop = self.loop or Loop(self._quick(forward), self.cache, self.room)
            given["custom_generate"] = self.loop.writer(kwargs.get("streamer"), self._empty)
        steps = StandIn(self.model, partial(self._step, forward)) if isinstance(self.cache, StaticCache) else None
        try:
            if steps is not None:
                steps.put()
            with grouped_queries():
                out = self.plain(*args, **given)
            if resume is not None:
                self.reader, self.read, resume.kept = resume, out[0, :-1].tolist(), self.kept  # the last was not fed
            return out
        finally:
            if steps is not None:
                steps.take_away()

    def _empty(self) -> None:
        self.cache.reset()
        self.used, self.kept, self.first = 0, 0, True

    def _quick(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        if self.quick is None:
            self.quick = Compiled(forward, self.cache) if self.compile else forward
        return self.quick

    def _check(self, prompt: int, new: int | None, total: int | None, most: int) -> None:
        reached = prompt + new if new is not None else total or prompt + 1
        if max(reached, prompt + 1) > most:
            raise PlanError(
                f"prompt ({prompt} tokens) and new tokens make {max(reached, prompt + 1)} tokens, "
                f"but the model was fused for {most}",
                "Fuse it for more tokens, or generate fewer.",
            )

    def _renew(self, batch: int, copies: int) -> None:
        """Empty the cache if it fits the batch size, mode, device, dtype and modules; else make a new one."""
        mode = torch.is_inference_mode_enabled()
        key = (batch * copies, mode, self.model.device, self.model.dtype, _wiring(self.model))
        if self.static is None:
            self.static = _on_one_gpu(self.model) and supports_static_cache(self.model, self.plain)
        if self.cache is not None and self.key == key and all(type(x) in EMPTIED for x in self.cache.layers):
            if self.kept:
                for layer in self.cache.layers:
                    layer.keep(self.kept)
            else:
                self.cache.reset()
        else:
            self.kept = 0
            self.cache = self.graph = self.loop = self.quick = None  # before the new cache takes memory
            made = static(self.model, self.room) if self.static else None
            self.cache, self.key = made or reserved(self.model, self.room), key
        self.used = self.kept

    def _step(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not any(value is self.cache for value in kwargs.values()):
            return forward(*args, **kwargs)  # another thread runs the model without `generate`
        ids = kwargs.get("input_ids")
        tokens = ids.shape[1] if isinstance(ids, Tensor) else 1
        first, self.first, self.used = self.first, False, self.used + tokens
        if self.used > self.room:
            raise PlanError(f"the text is longer than the {self.room} tokens that the model was fused for")
        if first or tokens != 1 or args or not isinstance(self.cache, StaticCache):
            return forward(*args, **kwargs)
        if self.graph is None:
            self.graph = StepGraph(self._quick(forward), self.model.device)
        return self.graph(kwargs)


def takes_a_cache(model: Any) -> bool:
    """Whether the model takes transformers' cache: MiniMax and xLSTM make one of their own, and GPT-1 has none."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    taken = [inspect.signature(each).parameters for each in (owner.forward, owner.prepare_inputs_for_generation)]
    return any(CACHE in each for each in taken) and bool(owner._supports_default_dynamic_cache())


def _on_one_gpu(model: Any) -> bool:
    """Whether a graph can hold a whole step: over several GPUs, each would need its own."""
    devices = {
        tensor.device for module in model.modules() for tensor in (*module.parameters(False), *module.buffers(False))
    }
    return len(devices) == 1 and model.device.type == "cuda"


def _wiring(model: Any) -> tuple[Any, ...]:
    """What a recorded step fixes besides tensors: the modules of the model, and their active adapters.

    The modules themselves, as another one may have the id of one that is gone.
    """
    held = [(module, vars(module)) for module in model.modules()]
    used = ("_active_adapter", "_disable_adapters", "merged_adapters")  # PEFT's layers
    return tuple((module, *(str(own[name]) for name in used if name in own)) for module, own in held)


def supports_static_cache(model: Any, generate: Callable[..., Any]) -> bool:
    """Whether the model gives the same logits with a static cache, tested on a few tokens. A warning if it does not."""
    logits, size = [], 8
    for cache in (reserved(model, size), static(model, size)):
        if cache is None:
            warnings.warn("no CUDA graph: this model's layers keep more than keys and values", stacklevel=2)
            return False
        ids = torch.arange(3, device=model.device, dtype=torch.int64)[None]
        options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
        options[CACHE] = cache
        try:
            done = generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=3,
                do_sample=False,
                disable_compile=True,
                **options,
            )
        except Exception as error:  # a model's own code can raise anything with a cache that it was not written for
            warnings.warn(f"no CUDA graph: this model fails with a static cache ({error!r:.200})", stacklevel=2)
            return False
        logits.append(torch.stack(done.logits).float())
    distance = float((logits[1] - logits[0]).norm() / logits[0].norm())
    if distance > _CLOSE:
        warnings.warn(f"no CUDA graph: a static cache changes this model's logits by {distance:.0%}", stacklevel=2)
    return distance <= _CLOSE


class StepGraph:
    """One decoding step with the inputs that transformers prepares, as a graph on copies of these inputs."""

    def __init__(self, forward: Callable[..., Any], device: torch.device) -> None:
        self.forward, self.device = forward, device
        self.graph: Graph | None = None
        self.inputs: list[Tensor] = []

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        if self.graph is None:
            copied = _copied(kwargs)
            self.inputs = _tensors(copied)
            self.graph = Graph(lambda: self.forward(**copied), self.device)
        given = _tensors(kwargs)
        if len(given) != len(self.inputs) or any(a.shape != b.shape for a, b in zip(given, self.inputs, strict=True)):
            return self.forward(**kwargs)
        for own, new in zip(self.inputs, given, strict=True):
            own.copy_(new)
        return self.graph()


def _tensors(value: Any) -> list[Tensor]:
    """The tensors among a call's arguments, in order, including those in dicts (one mask for each kind of layer)."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for inner in value.values() for tensor in _tensors(inner)] if type(value) is dict else []


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {key: _copied(inner) for key, inner in value.items()} if type(value) is dict else value
