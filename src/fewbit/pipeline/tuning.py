"""End-to-end tuning of a packed model: its floats, and its codes if wanted, are trained on the divergence from the
original.

    minimize the mean over tokens of KL(p ‖ q) = sum p (log p - log q)

p is the original's distribution of the next token, q that of the packed model, over the whole vocabulary, in float32.
The floats of packed weights are trained (`nn/tuned.py`), and if wanted their codes too, through the rounding
(`nn/moved.py`). Gains of norms and existing biases are trained as well, v = v0 + u e with u the mean of |v0|, and with
a pull-back of 1e-3 sum e². A tenth of the windows is held out. It decides when to stop and which state is kept
(`descent.py`).

Related: the second phase of EfficientQAT (https://arxiv.org/abs/2407.11062) trains the scales end to end, on the text
in place of the original's distribution.

Memory: the packed model, 16 bytes for each trained number, 24 for each trained code, and the activations of a pass. If
those of all blocks may take more than a quarter of the free memory, each block is computed again in the backward pass,
and only one block's are kept. The original's logits are computed once and mapped from a file if they take at most
`_CACHED` bytes. Otherwise the original stays in memory too, and computes them for each pass.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewbit.errors import NumericsError, PlanError
from fewbit.models.blocks import find_blocks
from fewbit.models.separated import SeparateExperts
from fewbit.nn.experts import ExpertSlice
from fewbit.nn.fused import packed_linears
from fewbit.nn.layers import QEmbedding, QLinear
from fewbit.nn.moved import MovedWeight, stackable
from fewbit.nn.tuned import TunedEmbedding, TunedLinear, TunedWeight
from fewbit.nn.tuned_experts import TunedExperts, TunedSlice, replace_experts
from fewbit.pipeline.descent import Descent, Objective, Tell, descend
from fewbit.pipeline.optimization import Optimization
from fewbit.pipeline.replacing import Files
from fewbit.pipeline.training_step import TrainingStep
from fewbit.schemes.base import QTensor
from fewbit.system.machine import free_memory
from fewbit.units import size

_HELD_OUT = 10  # a tenth of the windows is held out
_CACHED = 4 << 30  # bytes of logits
_ROWS = 256  # rows of logits that are converted to probabilities at a time
_AT_ONCE = {"cpu": 1024}  # tokens in a forward pass, at least one window; on a GPU more, so that launches cost little
_KEPT = 0.25  # share of the free memory that activations may take
_PULL = 1e-3
_UNIT = 10.0  # codes for a step of 1
_BYTES = 24  # for each trained code: its position, gradient, two moments, best position, and value
LOGITS = "logits"  # the file of logits


@dataclass(frozen=True)
class Windows:
    """Windows of token ids [n, length]; the last `held_out` are not trained on. seed: of the order in training."""

    tokens: Tensor
    held_out: int
    seed: int

    @classmethod
    def of(cls, tokens: Tensor, name: str, seed: int) -> Windows:
        if len(tokens) < 2:
            raise PlanError(
                f"{name} has {len(tokens)} window of {tokens.shape[1]} tokens; tuning needs one to train on and "
                "one to measure on",
                "Give a longer text, or a smaller `length`.",
            )
        return cls(tokens, max(1, len(tokens) // _HELD_OUT), seed)

    @property
    def trained(self) -> int:
        return len(self.tokens) - self.held_out

    @property
    def held(self) -> range:
        """The numbers of the held-out windows."""
        return range(self.trained, len(self.tokens))

    def order(self, wanted: Optimization) -> list[list[int]]:
        """The windows of each step. All are used once before one is used again."""
        count = min(self.trained, max(1, -(-wanted.batch // self.tokens.shape[1])))
        generator, left, steps = torch.Generator().manual_seed(self.seed), list[int](), list[list[int]]()
        for _ in range(wanted.steps):
            if len(left) < count:
                left += torch.randperm(self.trained, generator=generator, dtype=torch.int64, device="cpu").tolist()
            steps.append(left[:count])
            left = left[count:]
        return steps


class Original:
    """The original's logits [windows, length, vocabulary], computed once if they fit, else for each request."""

    def __init__(self, load: Callable[[], Any], tokens: Tensor, folder: Path) -> None:
        model: Any = load().requires_grad_(False)
        self.tokens, self.model, self.device = tokens, model, model.device
        first = self.computed(tokens[:1])
        shape = (*tokens.shape, first.shape[-1])
        size = first.numel() * len(tokens)
        self.mapped: Tensor | None = None
        if size * first.element_size() <= min(_CACHED, shutil.disk_usage(folder).free // 2):
            place = str(folder / LOGITS)
            self.mapped = torch.from_file(place, shared=True, size=size, dtype=first.dtype, device="cpu").view(shape)
            for which in batches(range(len(tokens)), tokens.shape[1], self.device):
                self.mapped[which] = self.computed(tokens[which]).cpu()
            self.model = None

    def logits(self, which: Sequence[int]) -> Tensor:
        """The logits of some windows, [windows, length, vocabulary]."""
        if self.mapped is not None:
            return self.mapped[list(which)].to(self.device)
        return self.computed(self.tokens[list(which)])

    def computed(self, tokens: Tensor) -> Tensor:
        """The logits of windows of token ids, by the original."""
        with torch.no_grad():
            return logits_of(self.model, tokens)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """The logits [windows, length, vocabulary] of windows of token ids."""
    logits: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits


def batches(which: Sequence[int], length: int, device: torch.device) -> Iterator[list[int]]:
    """The windows of each forward pass."""
    count = at_once(length, device)
    for start in range(0, len(which), count):
        yield list(which[start : start + count])


def at_once(length: int, device: torch.device) -> int:
    """The number of windows in a forward pass."""
    return max(1, _AT_ONCE.get(device.type, 4096) // length)


class _KL(torch.autograd.Function):
    """Sum over rows of KL(p ‖ q), float64. Its gradient by the logits of q is q - p."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, original: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows in range(0, len(logits), _ROWS):
            some = slice(rows, rows + _ROWS)
            log_p, log_q = (x[some].float().log_softmax(-1) for x in (original, logits))
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum(-1).double().sum()
            if gradient is not None:
                gradient[some] = log_q.exp_().sub_(p)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.mul_(grads[0].to(ctx.gradient.dtype)), None


def divergence(model: Any, original: Original, which: Sequence[int]) -> float:
    """The mean KL divergence over all tokens of some windows."""
    total, length = 0.0, original.tokens.shape[1]
    with torch.no_grad():
        for some in batches(which, length, original.device):
            total += float(_sum(model, original.tokens[some], original.logits(some)))
    return total / (len(which) * length)


def _sum(model: Any, tokens: Tensor, target: Tensor) -> Tensor:
    """The divergence from the distributions `target` [windows, length, vocabulary], summed over tokens."""
    logits = logits_of(model, tokens)
    out: Tensor = _KL.apply(logits.flatten(0, 1), target.to(logits.device).flatten(0, 1))  # type: ignore[no-untyped-call]
    return out


class Gain:
    """A gain of a norm, or a bias, that is trained. dtype: that in which its file stores it."""

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        self.parameter, self.dtype = parameter.requires_grad_(), dtype
        self.start = parameter.detach().float().clone()
        self.unit = float(self.start.abs().mean()) or 1.0
        self.delta = nn.Parameter(torch.zeros_like(self.start))

    def value(self) -> Tensor:
        """The trained value as its file stores it, float32."""
        return (self.start + self.unit * self.delta.detach()).to(self.dtype).float()

    @torch.no_grad()
    def push(self) -> None:
        """Put the trained value into the model."""
        self.parameter.copy_(self.value())

    def pull(self) -> None:
        """Move the gradient from the model's parameter to `delta`."""
        if self.parameter.grad is not None:
            self.delta.grad = self.parameter.grad.float() * self.unit + 2 * _PULL * self.delta.detach()
            self.parameter.grad = None


@dataclass
class Student:
    """A packed model whose floats are trained. weights, gains: by the names of their modules and parameters."""

    model: Any
    weights: dict[str, TunedWeight | TunedSlice]
    gains: dict[str, Gain]
    notes: list[str]

    @classmethod
    def of(cls, model: Any, files: Files, *, codes: bool = False) -> Student:
        """Replace the packed layers of `model` by layers that are trained. PlanError if there is nothing to train.

        codes: whether the codes of linears are trained too.
        """
        model.requires_grad_(False)
        if codes and (why := _no_room(model)):
            student = cls.of(model, files)
            return replace(student, notes=[*student.notes, why])
        weights, frozen = _tuned_layers(model, files, codes)
        gains = {
            name: Gain(parameter, files.dtype_of(name))
            for name, parameter in model.named_parameters()
            if parameter.dim() == 1 and parameter.is_floating_point() and _is_gain(name) and files.of_parameter(name)
        }
        if not weights and not gains:
            raise PlanError(f"{files.source.name} has nothing to train: " + "; ".join(frozen))
        notes = [f"{count} packed weights keep their scales: {reason}" for reason, count in frozen.items()]
        return cls(model, weights, gains, notes)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains. A number that several weights share appears once."""
        return [*self._of_weights, *(gain.delta for gain in self.gains.values())]

    @property
    def _of_weights(self) -> list[nn.Parameter]:
        found = [each for weight in self.weights.values() for each in weight.parameters_of]
        return list({id(each): each for each in found}.values())

    @property
    def moved(self) -> float | None:
        """The share of all trained codes that differ from those at the start; None if codes stay."""
        moved = [each for each in self.model.modules() if isinstance(each, MovedWeight) and each.grids is not None]
        if not moved:
            return None
        total = sum(each.first.numel() for each in moved)
        return sum(each.first.numel() * (each.share_moved or 0.0) for each in moved) / total

    def train(
        self, original: Original, windows: Windows, wanted: Optimization, tell: Tell, saved: Path | None
    ) -> Descent:
        """Train on the windows, and keep the state with the lowest divergence on the held-out ones."""
        order, length = windows.order(wanted), windows.tokens.shape[1]
        trained = [*self._of_weights, *(gain.parameter for gain in self.gains.values())]
        whole = len(order[0]) * length

        def mean(tokens: Tensor, target: Tensor | None) -> Tensor:
            logits = original.computed(tokens) if target is None else target
            return _sum(self.model, tokens, logits) / whole

        made: dict[int, TrainingStep] = {}  # by the number of windows

        def gradient(step: int) -> None:
            self._push()
            for some in batches(order[step], length, original.device):
                taken = made.setdefault(len(some), TrainingStep(mean, trained, original.device))
                loss = taken(windows.tokens[some], None if original.mapped is None else original.mapped[some])
                if not bool(torch.isfinite(loss)):
                    raise NumericsError(f"the loss is {float(loss)} in step {step + 1}", "Lower `learning_rate`.")
            for gain in self.gains.values():
                gain.pull()

        def measured() -> float:
            self._push()
            return divergence(self.model, original, windows.held)

        with _checkpointed(self.model, at_once(length, original.device) * length):
            done = descend(Objective(self.parameters, gradient, measured), wanted, tell, saved)
        self._push()
        return done

    def _push(self) -> None:
        for gain in self.gains.values():
            gain.push()

    def changes(self, files: Files) -> Mapping[str, Tensor]:
        """Name in the files -> the trained tensor. Those of large weights are made when they are read."""
        made: dict[str, Callable[[], Tensor]] = {}
        for module, weight in self.weights.items():
            made |= files.changes(module, partial(_on_cpu, weight))
        for name, gain in self.gains.items():
            key = files.of_parameter(name)
            assert key is not None
            made[key] = partial(files.to_file, name, gain.value().cpu())
        return Lazy(made)


class Lazy(Mapping[str, Tensor]):
    """Tensors that are made when they are read."""

    def __init__(self, made: Mapping[str, Callable[[], Tensor]]) -> None:
        self.made = made

    def __getitem__(self, name: str) -> Tensor:
        return self.made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


def _on_cpu(weight: TunedWeight | TunedSlice) -> QTensor:
    return weight.tuned().map(lambda part: part.cpu())


def _no_room(model: Any) -> str | None:
    """Why the codes of a model cannot be trained in the memory that is free; None if they can."""
    layers = packed_linears(model).values()
    needed = _BYTES * sum(layer.in_features * layer.out_features for layer in layers)
    free = free_memory(model.device)
    if free is None or needed <= free:
        return None
    return f"codes stay: training them takes {size(needed)} of memory, and {size(free)} are free"


def _is_gain(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def _tuned_layers(model: Any, files: Files, codes: bool) -> tuple[dict[str, TunedWeight | TunedSlice], Counter[str]]:
    """Replace packed layers; the trained weights by their modules, and why others are not trained."""
    layers: dict[str, QLinear | QEmbedding] = dict(packed_linears(model))
    layers |= {name: module for name, module in model.named_modules() if isinstance(module, QEmbedding)}
    ties = {
        second.removesuffix(".weight"): first.removesuffix(".weight")
        for second, first in (getattr(model, "all_tied_weights_keys", None) or {}).items()
    }
    found, frozen, checked = dict[str, TunedWeight | TunedSlice](), Counter[str](), dict[tuple[str, Any], str | None]()
    together: dict[tuple[str, int, str], TunedWeight] = {}
    stacks = _tuned_experts(model, layers, files, checked) if codes else {}
    for name in sorted(layers, key=lambda name: name in ties):  # the owner of a tied weight comes first
        layer, owner = layers[name], ties.get(name, name)
        if owner != name and isinstance(tied := found.get(owner), TunedWeight):
            _replace(model, name, layer, tied)
            continue
        if reason := _why_not(name, layer, files, checked):
            frozen[reason] += 1
            continue
        if isinstance(layer, ExpertSlice) and (stack := stacks.get(id(layer.product))) is not None:
            found[name] = TunedSlice(layer, stack)
            continue
        weight, narrow = layer.qtensor(), files.stored_type(name)
        moves = codes and isinstance(layer, QLinear) and weight.permutation is None and owner not in ties.values()
        tuned = MovedWeight(weight, None, narrow, unit=_UNIT) if moves else TunedWeight(weight, narrow)
        key = (name.rpartition(".")[0], tuned.weight.shape[1], str(tuned.weight.codec))
        tuned.share(together.setdefault(key, tuned))
        _replace(model, name, layer, tuned)
        found[name] = tuned
    if elsewhere := files.weights.keys() - layers.keys() - ties.keys():
        frozen["fewbit does not load them packed"] += len(elsewhere)
    return found, frozen


def _tuned_experts(
    model: nn.Module,
    layers: Mapping[str, QLinear | QEmbedding],
    files: Files,
    checked: dict[tuple[str, Any], str | None],
) -> dict[int, TunedExperts]:
    """Replace stacked experts, in layers that multiply all at once and can train all. By the `id` of their product."""
    stacks: dict[int, dict[str, ExpertSlice]] = {}
    for name, layer in layers.items():
        if isinstance(layer, ExpertSlice):
            stacks.setdefault(id(layer.product), {})[name] = layer
    found: dict[int, TunedExperts] = {}
    for module in model.modules():
        # If one stack could not be trained as a whole, experts would run one by one, and each would decode all others.
        products = module.products() if isinstance(module, SeparateExperts) else []
        own = [stacks[id(product)] for product in products]
        types = [{files.stored_type(name) for name in slices} for slices in own]
        if (
            all(len(each) == 1 for each in types)
            and all(stackable(next(iter(slices.values())).qtensor()) for slices in own)
            and not any(_why_not(name, each, files, checked) for slices in own for name, each in slices.items())
        ):
            for product, slices, (narrow,) in zip(products, own, types, strict=True):
                found[id(product)] = replace_experts(list(slices.values()), narrow, _UNIT)
    return found


def _why_not(
    name: str, layer: QLinear | QEmbedding, files: Files, checked: dict[tuple[str, Any], str | None]
) -> str | None:
    """Why the floats of a layer are not trained. checked: what is known of each kind of weight."""
    codec = layer.codec
    assert codec is not None
    if isinstance(codec.trainable, str):
        return f"{codec}: {codec.trainable}"
    if name not in files.weights:
        return "the files do not store them one by one"
    key = str(codec), files.stored_type(name)
    if key not in checked:
        checked[key] = files.why_not(name)
    return checked[key]


def _replace(model: nn.Module, name: str, layer: QLinear | QEmbedding, tuned: TunedWeight) -> None:
    parent, _, leaf = name.rpartition(".")
    new = TunedEmbedding(layer, tuned) if isinstance(layer, QEmbedding) else TunedLinear(layer, tuned)
    setattr(model.get_submodule(parent), leaf, new)


@contextmanager
def _checkpointed(model: Any, tokens: int) -> Iterator[None]:
    """Inside this context, the blocks of a model are computed again in the backward pass, if that saves much memory."""
    blocks = [model.get_submodule(name) for name in find_blocks(model)]
    # About twice what its linears read and write.
    widths = [m.in_features + m.out_features for b in blocks for m in b.modules() if isinstance(m, nn.Linear)]
    if 2 * tokens * sum(widths) * model.dtype.itemsize <= _KEPT * (free_memory(model.device) or 0):
        yield
        return

    def recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    for block in blocks:
        block.forward = partial(recomputed, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
