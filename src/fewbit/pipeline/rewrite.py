"""Rewrites a block to an equivalent one that quantizes better, by folding in the scales that a method (AWQ) chooses.

Each fold is checked in float32, with norms and biases already rounded to the dtype of their files: every token's output
must stay within a relative distance of 1e-4. For a fold inside of one expert it is the output of the layer's experts,
else that of the block. Otherwise the fold is undone, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.methods.base import Fold
from fewbit.models.experts import ExpertInput, inputs_of, only_of
from fewbit.models.linears import weight_of
from fewbit.models.skeleton import BlockCall, Skeleton, states_of
from fewbit.models.topology import Link, find_links
from fewbit.pipeline import token_weights
from fewbit.pipeline.capture import Block
from fewbit.plans.plan import Assignment
from fewbit.stats import Need, Stats
from fewbit.system import ranks

_TOKENS = 2048  # number of calibration tokens for the search of scales and the check of folds
_CLOSE = 1e-4


@dataclass
class Rewritten:
    """The result of rewriting a block.

    `tensors`: changed tensors that are not quantized (norms, biases), by model name, in the dtype of the file.
    `scales`: the folded scales, as in `Scales.values`. `notes`: linear -> notes for the user.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


def rewrite(block: Block, assignments: Mapping[str, Assignment]) -> Rewritten:
    """Rewrite the materialized `block` in place, for those of its linears whose methods choose scales."""
    done = Rewritten()
    asking = {name for name, assignment in assignments.items() if assignment.method.rewrites}
    if not asking:
        return done
    skeleton, module = block.skeleton, block.module
    with _in_float32(module), torch.no_grad():
        batches = [(_to_float32(call), states.float()) for call, states in _some(block)]
        served: set[str] = set()
        passes = _Passes(block, batches)
        for link in _links(skeleton, module, batches[0]):
            source, readers = f"{block.name}.{link.source}", tuple(f"{block.name}.{name}" for name in link.readers)
            if not asking.intersection(readers):
                continue
            served.update(readers)
            methods = {assignments[name].method for name in readers if name in asking}
            if (
                not asking.issuperset(readers)
                or len(methods) > 1
                or (link.offset is None and source not in assignments)
            ):
                why = f"not scaled: {link.source} and the linears that read it are not all quantized by one method"
                _note(done, asking.intersection(readers), why)
                continue
            fold = BlockFold(skeleton, block.name, link, passes.of(source, readers))
            if not fold.reached:
                _note(done, asking.intersection(readers), "not scaled: no finite calibration input reached this linear")
                continue
            scales = methods.pop().rewrite(fold, {name: assignments[name].scheme for name in readers})
            if scales is None:
                continue
            passes.forget(source)
            if (apart := ranks.agreed(fold.apply(scales))) <= _CLOSE:
                done.tensors |= fold.changed()
                done.scales |= fold.folded(scales)
            else:
                fold.undo()
                where = "block's" if fold.passes[0].norms is None else "experts'"
                why = f"not scaled: folding into {link.source} would change the {where} output by {apart:.1e}"
                _note(done, readers, why)
        _note(done, asking - served, "not scaled: no norm or linear before it can take the scales of its input")
    return done


def _some(block: Block) -> list[tuple[BlockCall, Tensor]]:
    """Some of the block's calls on all ranks, about `_TOKENS` tokens together. Every rank gets the same ones."""
    tokens = ranks.all_gather([states[..., 0].numel() for states in block.hidden])
    count = sum(len(own) for own in tokens)
    stride = max(1, min(round(sum(map(sum, tokens)) / _TOKENS), count))
    before = sum(len(own) for own in tokens[: ranks.rank()])
    own = [(c, s) for i, (c, s) in enumerate(zip(block.calls, block.hidden, strict=True), before) if i % stride == 0]
    if ranks.size() == 1:
        return own
    device = block.skeleton.device
    sent = [(_mapped(call, _to("cpu")), states.cpu()) for call, states in own]
    return [(_mapped(c, _to(device)), s.to(device)) for each in ranks.all_gather(sent) for c, s in each]


def _to(device: torch.device | str) -> Callable[[Any], Any]:
    return lambda value: value.to(device) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Pass:
    """A forward pass of a block, or of one of its experts, over a batch.

    states: the hidden states at the block's input. norms: the norm of each token's output, to which a change of the
    output is relative; None: that of the output of `run`.
    """

    run: Callable[[], Tensor]
    states: Tensor
    norms: Tensor | None = None


class _Passes:
    """The forward passes of a block over `batches` that a fold needs.

    A fold inside of one expert changes nothing else, and a layer may have hundreds of experts. So it runs this expert
    alone, on what the experts of the layer read when the whole block ran.
    """

    def __init__(self, block: Block, batches: list[tuple[BlockCall, Tensor]]) -> None:
        self.block, self.batches = block, batches
        self.inputs = inputs_of(block.name, block.module)
        self._of_experts: dict[str, list[tuple[Callable[[], Tensor], Tensor, Tensor]]] = {}

    def of(self, source: str, readers: Sequence[str]) -> list[Pass]:
        """The passes for a fold of the linear or norm `source` and the linears that read it."""
        ends = [self.inputs.get(name) for name in (source, *readers)]
        inside = {(each.path, each.expert) if each else None for each in ends}
        if len(inside) > 1 or ends[0] is None:
            return [Pass(partial(call.run, self.block.module, states), states) for call, states in self.batches]
        if (path := ends[0].path) not in self._of_experts:
            self._of_experts[path] = list(self._recorded(ends[0]))
        return [
            Pass(partial(self._run_expert, readers, run), states, norms)
            for run, states, norms in self._of_experts[path]
        ]

    def forget(self, source: str) -> None:
        """Note that a fold changes `source`: unless it is in an expert, the experts read something else from now on."""
        if source not in self.inputs:
            self._of_experts.clear()

    def _recorded(self, of: ExpertInput) -> Iterator[tuple[Callable[[], Tensor], Tensor, Tensor]]:
        """For each call of the experts' module, over all batches: the call, the block's input, the norms of outputs."""
        calls: list[tuple[Callable[[], Tensor], Tensor]] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            calls.append((partial(module, *args, **kwargs), output.norm(dim=-1)))

        handle = of.module.register_forward_hook(record, with_kwargs=True)
        try:
            for call, states in self.batches:
                call.run(self.block.module, states)
                yield from ((run, states, norms) for run, norms in calls)
                calls.clear()
        finally:
            handle.remove()

    def _run_expert(self, linears: Sequence[str], run: Callable[[], Tensor]) -> Tensor:
        with only_of(self.block.name, self.block.module, linears):
            return run()


class BlockFold(Fold):
    """One link of a materialized block in float32. In `passes`, it records the outputs that its readers affect."""

    def __init__(self, skeleton: Skeleton, block: str, link: Link, passes: list[Pass]) -> None:
        self.readers = tuple(f"{block}.{name}" for name in link.readers)
        self.source = f"{block}.{link.source}"
        self.link, self.skeleton, self.passes = link, skeleton, passes
        self.module = skeleton.model.get_submodule(block)
        self.feeder = skeleton.model.get_submodule(self.source)
        scope = _scope(link)
        self.scope = self.module.get_submodule(scope)
        self.kept = {name: p.clone() for name, p in self._touched().items()}
        self._stats: Stats | None = None
        self._record()
        # An indexer returns which tokens to attend to. Its error shows only in the output of the attention around it.
        while scope and not all(output.is_floating_point() for output in self.outputs):
            scope = scope.rpartition(".")[0]
            self.scope = self.module.get_submodule(scope)
            self._record()

    def weights(self) -> dict[str, Tensor]:
        return {name: self.kept[f"{name}.weight"] for name in self.readers}

    def mean_abs(self) -> Tensor:
        return self._alike(self.size)

    def error(self, weights: Mapping[str, Tensor]) -> float:
        for name, weight in weights.items():
            self.skeleton.replace_weight(name, weight)
        error = 0.0
        for (args, kwargs), expected, finite, counts in zip(
            self.inputs, self.outputs, self.finite, self.counts, strict=True
        ):
            each = (states_of(self.scope(*args, **kwargs)) - expected).square_().sum(-1).flatten()
            error += float(each[finite] @ counts)
        for name in weights:
            self.skeleton.replace_weight(name, self.kept[f"{name}.weight"])
        return error

    def errors(self, candidates: Sequence[Tensor], error: Callable[[Tensor], float]) -> list[float]:
        own = {i: error(candidates[i]) for i in range(ranks.rank(), len(candidates), ranks.size())}
        every = {i: value for each in ranks.all_gather(own) for i, value in each.items()}
        return [every[i] for i in range(len(candidates))]

    def stats(self, scales: Tensor) -> Stats:
        if self._stats is None:
            self._stats = Stats(len(scales), Need.HESSIAN, scales.device)
            reader = self.skeleton.model.get_submodule(self.readers[0])
            for each in self.passes:
                with _reading(reader) as read:
                    each.run()
                for x in read:
                    counts = _counts(each.states, x[..., 0].numel())
                    self._stats.add(x, counts)
        return self._stats.divided(scales)

    def stored(self, scales: Tensor) -> Tensor:
        per_channel = self._per_channel(self._alike(scales.log())).exp()
        exact = per_channel
        # The file's dtype rounds the folded norm or bias. So the scale that takes effect is the ratio of its values
        # before and after; the columns of the readers are multiplied by that.
        name = "bias" if self.link.offset is None else "weight"
        if (before := self.kept.get(f"{self.source}.{name}")) is not None and before.dim() == 1:
            offset = self.link.offset or 0.0
            after = self._as_stored(name, (before + offset) / per_channel - offset)
            exact = torch.where(before + offset == 0, per_channel, (before + offset) / (after + offset))
            exact = torch.where(exact.isfinite() & (exact > 0), exact, 1.0)
        channel = self.link.channel.to(scales.device)
        return torch.where(channel >= 0, exact[channel.clamp(min=0)], 1.0)

    def apply(self, scales: Tensor) -> float:
        """Fold `scales` in. Returns the largest relative change of a token's output."""
        per_channel = self._per_channel(scales, outside=1.0)
        offset = self.link.offset
        for name in self.readers:
            self.skeleton.replace_weight(name, self.kept[f"{name}.weight"] * scales)
        if offset is None:
            weight = self.kept[f"{self.source}.weight"] / per_channel.unsqueeze(1)
            self.skeleton.replace_weight(self.source, weight)
        else:
            weight = (self.kept[f"{self.source}.weight"] + offset) / per_channel - offset
            self._touched()[f"{self.source}.weight"].copy_(self._as_stored("weight", weight))
        if (bias := self.kept.get(f"{self.source}.bias")) is not None:
            self._touched()[f"{self.source}.bias"].copy_(self._as_stored("bias", bias / per_channel))
        apart = 0.0
        for each, before in zip(self.passes, self.before, strict=True):
            norms = before.norm(dim=-1) if each.norms is None else each.norms
            moved = (each.run() - before).norm(dim=-1) / norms.clamp(min=1e-30)
            moved = moved[before.isfinite().all(-1)].nan_to_num(torch.inf)
            apart = max(apart, float(moved.max()) if moved.numel() else torch.inf)
        return apart

    def undo(self) -> None:
        """Restore the block's parameters."""
        for name, parameter in self._touched().items():
            parameter.copy_(self.kept[name])

    def changed(self) -> dict[str, Tensor]:
        """The changed tensors that are not quantized (norm, bias), by model name, in the dtype of the file."""
        names = [f"{self.source}.bias"] + ([f"{self.source}.weight"] if self.link.offset is not None else [])
        touched = self._touched()
        return {n: touched[n].to(self._dtype(n)).cpu() for n in names if n in touched}

    def folded(self, scales: Tensor) -> dict[str, Tensor]:
        """The factors by which `apply` multiplied columns and divided rows, as in `Scales.values`."""
        factors = {f"columns:{name}": scales for name in self.readers}
        factors[f"rows:{self.source}"] = self._per_channel(scales, outside=1.0)
        return {name: tensor.float().cpu().clone() for name, tensor in factors.items()}

    def _touched(self) -> dict[str, Tensor]:
        """The parameters that folding changes. Weights of linears are [N, K]."""
        own = {f"{name}.weight": self.skeleton.weight(name) for name in self.readers}
        own[f"{self.source}.weight"] = weight_of(self.feeder)
        if isinstance(bias := getattr(self.feeder, "bias", None), Tensor):
            own[f"{self.source}.bias"] = bias
        return own

    def _record(self) -> None:
        self.inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.outputs: list[Tensor] = []
        sizes, rows = list[Tensor](), list[int]()

        def serve(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.inputs.append((args, kwargs))
            self.outputs.append(states_of(output))

        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            x = x[x.isfinite().all(1)]
            rows.append(len(x))
            sizes.append(x.abs().sum(0))

        handles = [
            self.scope.register_forward_hook(serve, with_kwargs=True),
            self.skeleton.model.get_submodule(self.readers[0]).register_forward_pre_hook(read),
        ]
        self.before: list[Tensor] = []  # the outputs of the passes
        served: list[Tensor] = []  # for each output: the hidden states at the block's input
        try:
            for each in self.passes:
                self.before.append(each.run())
                served += [each.states] * (len(self.outputs) - len(served))  # none, if no token reaches a routed expert
        finally:
            for handle in handles:
                handle.remove()
        self.reached = sum(rows) > 0
        if self.reached:
            self.size = torch.stack(sizes).sum(0) / sum(rows)
        self.finite = [output.isfinite().all(-1).flatten() for output in self.outputs]
        self.counts = [_counts(states, len(finite))[finite] for states, finite in zip(served, self.finite, strict=True)]

    def _alike(self, values: Tensor) -> Tensor:
        """`values` [K], replaced by the mean over all columns that the same channel feeds. Other columns are kept."""
        channel = self.link.channel.to(values.device)
        return torch.where(channel >= 0, self._per_channel(values)[channel.clamp(min=0)], values)

    def _per_channel(self, values: Tensor, outside: float = 0.0) -> Tensor:
        """For each channel, the mean of `values` [K] over the columns that it feeds; `outside` if it feeds none."""
        channel, count = self.link.channel.to(values.device), len(self.kept[f"{self.source}.weight"])
        fed = channel >= 0
        total = torch.zeros(count, device=values.device, dtype=torch.float32).index_add_(
            0, channel[fed], values[fed].float()
        )
        times = torch.bincount(channel[fed], minlength=count)
        return torch.where(times > 0, total / times.clamp(min=1), outside)

    def _as_stored(self, leaf: str, values: Tensor) -> Tensor:
        return values.to(self._dtype(f"{self.source}.{leaf}")).float()

    def _dtype(self, name: str) -> torch.dtype:
        return self.skeleton.stored_dtype(name)


def _scope(link: Link) -> str:
    """The module whose output error is minimized: the innermost module that contains all readers.

    For a reader that is fed by the rows of a linear (o, down), it is the reader itself.
    """
    if link.offset is None:
        return link.readers[0]
    paths = [name.split(".")[:-1] for name in link.readers]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])


_known: dict[tuple[object, ...], list[Link]] = {}  # a cache: blocks with equal modules and shapes have equal links


def _links(skeleton: Skeleton, module: nn.Module, batch: tuple[BlockCall, Tensor]) -> list[Link]:
    kinds = tuple((name, type(m).__qualname__) for name, m in module.named_modules())
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    key = (type(skeleton.model).__qualname__, str(skeleton.config.to_dict()), kinds, shapes)
    if key not in _known:
        call, states = batch
        noise = torch.randn(
            states.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
        ).to(states.device)
        noise *= states[states.isfinite()].std().nan_to_num(1.0).clamp(min=1e-3)
        call, noise = _two_sequences(module, call, noise)
        _known[key] = find_links(module, lambda: call.run(module, noise))
    return _known[key]


def _two_sequences(module: nn.Module, call: BlockCall, states: Tensor) -> tuple[BlockCall, Tensor]:
    """The call and states of the first two sequences of a batch, or the whole batch if it cannot be cut.

    Which arguments to cut is found by trial: some have a row for each head of each sequence (Bloom), and the first
    dimension of the states need not be sequences (Gemma 3n). A cut is accepted if the block's output stays the same.
    """
    size = len(states)
    if size <= 2:
        return call, states
    whole = call.run(module, states)[:2]
    for parts in (False, True):

        def cut(value: Any, parts: bool = parts) -> Any:
            if not isinstance(value, Tensor) or not value.dim() or (len(value) != size and not parts):
                return value
            return value if len(value) % size else value[: 2 * (len(value) // size)]

        smaller = _mapped(call, cut)
        try:
            output = smaller.run(module, states[:2])
        except (RuntimeError, ValueError, IndexError):  # sizes that do not fit
            continue
        if output.shape == whole.shape and (output - whole).norm() <= _CLOSE * whole.norm():
            return smaller, states[:2]
    return call, states


def _mapped(call: BlockCall, change: Callable[[Any], Any]) -> BlockCall:
    def through(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(through(v) for v in value)
        if isinstance(value, dict):
            return {key: through(v) for key, v in value.items()}
        return change(value)

    return BlockCall(through(call.args), through(dict(call.kwargs)))


def _to_float32(call: BlockCall) -> BlockCall:
    return _mapped(call, lambda v: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v)


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """A context in which the module's parameters are float32. At its end they are cast back to their dtypes."""
    before = {name: p.dtype for name, p in module.named_parameters()}
    module.float()
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(before[name])


@contextmanager
def _reading(reader: nn.Module) -> Iterator[list[Tensor]]:
    """A context that records the inputs of `reader`."""
    read: list[Tensor] = []
    handle = reader.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        yield read
    finally:
        handle.remove()


def _counts(states: Tensor, rows: int) -> Tensor:
    """The weight of each row, as in `gather`; the same for all if the rows are no tokens."""
    counts = token_weights.of_tokens(states).flatten()
    return counts if len(counts) == rows else torch.ones(rows, device=states.device, dtype=torch.float32)


def _note(done: Rewritten, linears: Iterable[str], text: str) -> None:
    for name in sorted(linears):
        done.notes.setdefault(name, []).append(text)
