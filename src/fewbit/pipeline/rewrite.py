"""A block rewritten to an equal one that rounds better: a method's scales folded in where the topology allows it.

Each fold is checked: in float32, with what is stored (norms, biases) as it will be stored, every token's output must
agree with that before to 1e-4, or the fold is undone and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.methods.base import Fold
from fewbit.models.linears import weight_of
from fewbit.models.skeleton import BlockCall, Skeleton, states_of
from fewbit.models.topology import Link, find_links
from fewbit.pipeline.capture import Block
from fewbit.plans.plan import Assignment
from fewbit.stats import Need, Stats
from fewbit.system import ranks

_TOKENS = 2048  # of the calibration text, on which scales are searched and folds are checked
_CLOSE = 1e-4


@dataclass
class Rewritten:
    """`tensors`: what changed besides weights to be quantized, by model name, as it is to be stored. `scales`: what was
    folded, as in `Scales.values`. `notes`: linear -> what a user should know."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


def rewrite(block: Block, wanted: Mapping[str, Assignment]) -> Rewritten:
    """Rewrite the materialized `block` in place, as the methods of its linears ask."""
    done = Rewritten()
    asking = {name for name, assignment in wanted.items() if assignment.method.rewrites}
    if not asking:
        return done
    skeleton, module = block.skeleton, block.module
    with _in_float32(module), torch.no_grad():
        batches = [(_to_float32(call), states.float()) for call, states in _some(block)]
        served: set[str] = set()
        for link in _links(skeleton, module, batches[0]):
            source, readers = f"{block.name}.{link.source}", tuple(f"{block.name}.{name}" for name in link.readers)
            if not asking.intersection(readers):
                continue
            served.update(readers)
            methods = {wanted[name].method for name in readers if name in asking}
            if not asking.issuperset(readers) or len(methods) > 1 or (link.offset is None and source not in wanted):
                why = f"not scaled: {link.source} and what reads it are not all quantized alike"
                _note(done, asking.intersection(readers), why)
                continue
            fold = BlockFold(skeleton, block.name, link, batches)
            scales = methods.pop().rewrite(fold, {name: wanted[name].scheme for name in readers})
            if scales is None:
                continue
            if (apart := ranks.agreed(fold.apply(scales))) <= _CLOSE:
                done.tensors |= fold.changed()
                done.scales |= fold.folded(scales)
            else:
                fold.undo()
                why = f"not scaled: folding into {link.source} would change the block's output by {apart:.1e}"
                _note(done, readers, why)
        _note(done, asking - served, "not scaled: nothing was found that its input's scales could be folded into")
    return done


def _some(block: Block) -> list[tuple[BlockCall, Tensor]]:
    """About `_TOKENS` tokens of what calls the block in all ranks, the same for each of them."""
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


class BlockFold(Fold):
    """One link of a materialized block in float32, with what its readers serve recorded on `batches`."""

    def __init__(self, skeleton: Skeleton, block: str, link: Link, batches: list[tuple[BlockCall, Tensor]]) -> None:
        self.readers = tuple(f"{block}.{name}" for name in link.readers)
        self.source = f"{block}.{link.source}"
        self.link, self.skeleton, self.batches = link, skeleton, batches
        self.module = skeleton.model.get_submodule(block)
        self.feeder = skeleton.model.get_submodule(self.source)
        self.scope = self.module.get_submodule(_scope(link))
        self.kept = {name: p.clone() for name, p in self._touched().items()}
        self._stats: Stats | None = None
        self._record()

    def weights(self) -> dict[str, Tensor]:
        return {name: self.kept[f"{name}.weight"] for name in self.readers}

    def mean_abs(self) -> Tensor:
        return self._alike(self.size)

    def error(self, weights: Mapping[str, Tensor]) -> float:
        for name, weight in weights.items():
            self.skeleton.replace_weight(name, weight)
        error = 0.0
        for (args, kwargs), wanted, sound, counts in zip(
            self.inputs, self.outputs, self.sound, self.counts, strict=True
        ):
            each = (states_of(self.scope(*args, **kwargs)) - wanted).square_().sum(-1).flatten()
            error += float(each[sound] @ counts)
        for name in weights:
            self.skeleton.replace_weight(name, self.kept[f"{name}.weight"])
        return error

    def errors(self, candidates: Sequence[Tensor], error: Callable[[Tensor], float]) -> list[float]:
        own = {i: error(candidates[i]) for i in range(ranks.rank(), len(candidates), ranks.size())}
        found = {i: value for each in ranks.all_gather(own) for i, value in each.items()}
        return [found[i] for i in range(len(candidates))]

    def stats(self, scales: Tensor) -> Stats:
        if self._stats is None:
            self._stats = Stats(len(scales), Need.HESSIAN, scales.device)
            reader = self.skeleton.model.get_submodule(self.readers[0])
            for call, states in self.batches:
                with _reading(reader) as read:
                    call.run(self.module, states)
                for x in read:
                    counts = _counts(states, x[..., 0].numel())
                    self._stats.add(x, counts)
        return self._stats.divided(scales)

    def stored(self, scales: Tensor) -> Tensor:
        per_channel = self._per_channel(self._alike(scales.log())).exp()
        got = per_channel
        # One stored tensor rounds; what it then divides by is the scale. A second one has to follow.
        name = "bias" if self.link.offset is None else "weight"
        if (before := self.kept.get(f"{self.source}.{name}")) is not None and before.dim() == 1:
            offset = self.link.offset or 0.0
            after = self._as_stored(name, (before + offset) / per_channel - offset)
            got = torch.where(before + offset == 0, per_channel, (before + offset) / (after + offset))
            got = torch.where(got.isfinite() & (got > 0), got, 1.0)
        channel = self.link.channel.to(scales.device)
        return torch.where(channel >= 0, got[channel.clamp(min=0)], 1.0)

    def apply(self, scales: Tensor) -> float:
        """Fold `scales`; the largest relative distance of a token's output from what it was."""
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
        for (call, states), before in zip(self.batches, self.block_outputs, strict=True):
            moved = (call.run(self.module, states) - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-30)
            moved = moved[before.isfinite().all(-1)].nan_to_num(torch.inf)
            apart = max(apart, float(moved.max()) if moved.numel() else torch.inf)
        return apart

    def undo(self) -> None:
        """The block as it was."""
        for name, parameter in self._touched().items():
            parameter.copy_(self.kept[name])

    def changed(self) -> dict[str, Tensor]:
        """What is stored beside the quantized weights and has changed, by model name, in the type of its file."""
        names = [f"{self.source}.bias"] + ([f"{self.source}.weight"] if self.link.offset is not None else [])
        touched = self._touched()
        return {n: touched[n].to(self._dtype(n)).cpu() for n in names if n in touched}

    def folded(self, scales: Tensor) -> dict[str, Tensor]:
        """What `apply` multiplied columns by and divided rows by, as in `Scales.values`."""
        found = {f"columns:{name}": scales for name in self.readers}
        found[f"rows:{self.source}"] = self._per_channel(scales, outside=1.0)
        return {name: tensor.float().cpu().clone() for name, tensor in found.items()}

    def _touched(self) -> dict[str, Tensor]:
        """The parameters that folding writes to; weights of linears as [N, K]."""
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
        try:
            self.block_outputs = [call.run(self.module, states) for call, states in self.batches]
        finally:
            for handle in handles:
                handle.remove()
        self.size = torch.stack(sizes).sum(0) / max(sum(rows), 1)
        self.sound = [wanted.isfinite().all(-1).flatten() for wanted in self.outputs]
        self.counts = [
            _counts(states, len(sound))[sound] for (_, states), sound in zip(self.batches, self.sound, strict=True)
        ]

    def _alike(self, values: Tensor) -> Tensor:
        """The mean over the columns that one channel feeds, [K]; those of no channel keep their own."""
        channel = self.link.channel.to(values.device)
        return torch.where(channel >= 0, self._per_channel(values)[channel.clamp(min=0)], values)

    def _per_channel(self, values: Tensor, outside: float = 0.0) -> Tensor:
        """The mean of `values` [K] over the columns that each channel feeds; `outside` where it feeds none."""
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
    """The module whose output counts: what holds all readers; for one that a norm feeds alone, what holds that one.

    For a reader fed by a linear's rows (o, down) it is the reader itself.
    """
    if link.offset is None:
        return link.readers[0]
    paths = [name.split(".")[:-1] for name in link.readers]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])


_known: dict[tuple[object, ...], list[Link]] = {}  # by what a block is made of: its twins need not be looked at again


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
    """The call and states of the first two sequences of a batch; the whole batch where that cannot be cut.

    Which arguments have a part for each sequence is tried: some have one for each head of each (Bloom), and what is
    first in the states need not be sequences (Gemma 3n). A cut is taken if the block's output is the same.
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
            found = smaller.run(module, states[:2])
        except (RuntimeError, ValueError, IndexError):  # sizes that do not fit
            continue
        if found.shape == whole.shape and (found - whole).norm() <= _CLOSE * whole.norm():
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
    """Within, the module's parameters are float32; after, what they were, with their new values."""
    before = {name: p.dtype for name, p in module.named_parameters()}
    module.float()
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(before[name])


@contextmanager
def _reading(reader: nn.Module) -> Iterator[list[Tensor]]:
    """What the module is given, within."""
    read: list[Tensor] = []
    handle = reader.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        yield read
    finally:
        handle.remove()


def _counts(states: Tensor, rows: int) -> Tensor:
    """How much each row counts: a token in proportion to the norm of what enters the block, as in statistics."""
    counts = states.norm(dim=-1).flatten()
    return counts if len(counts) == rows else torch.ones(rows, device=states.device, dtype=torch.float32)


def _note(done: Rewritten, linears: Iterable[str], text: str) -> None:
    for name in sorted(linears):
        done.notes.setdefault(name, []).append(text)
