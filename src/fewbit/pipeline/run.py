"""The saved results of one quantization: a file for each finished block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from torch import Tensor

from fewbit.errors import FormatError
from fewbit.formats.containers.safetensors import read_file, write_file
from fewbit.pipeline.block_tuning import BlockTuning
from fewbit.pipeline.capture import Inputs
from fewbit.pipeline.settled import Settled
from fewbit.system import kept, locks, ranks
from fewbit.system.cache import cache_folder, writing


@dataclass(frozen=True)
class TensorReport:
    """What happened to one weight.

    `error`: relative squared error of its outputs on the calibration inputs, with tokens weighted as in `gather`;
    without a Hessian, of the weight itself. `dropped`: number of input rows that were left out because they were not
    finite. `vanished`: number of groups of weights that became 0, because they are smaller than any scale that the
    scheme can store. `rows`: for an expert, the number of calibration tokens that it served; else None. `target`: the
    share of the error of its input that the weight corrects (`methods/targets.py`); None if it was not measured.
    `gain`: the share by which tuning lowered the error of its block's output on held-out windows, 0 if the block stayed
    as it was; None if it was not to be tuned. `moved`: the share of its codes that tuning changed. `error` is that
    before tuning.
    """

    module: str
    shape: tuple[int, int]
    scheme: str
    method: str
    nbytes: int
    error: float
    dropped: int = 0
    notes: list[str] = field(default_factory=list)
    vanished: int = 0
    rows: int | None = None
    target: float | None = None
    gain: float | None = None
    moved: float | None = None


class Run:
    """The saved results of one quantization: a folder in the cache with a file for each finished block.

    Only rank 0 reads and writes the folder, and broadcasts what it reads. The folder is locked: a second run with the
    same fingerprint uses another folder. Leaving the context releases the lock; `forget` deletes the folder.
    """

    def __init__(self, fingerprint: str, model: str, holds: str) -> None:
        """Take the folder of the run `fingerprint`. model, holds: as in `kept.label`."""
        self._held = locks.resumable(cache_folder() / "runs" / fingerprint) if ranks.first() else None
        self._folder = None if self._held is None else self._held.folder
        if self._folder is not None:
            kept.label(self._folder, model, holds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._held is not None:
            self._held.release() if self.files() else self._held.remove()
            self._held = None

    @property
    def folder(self) -> Path:
        assert self._held is not None
        return self._held.folder

    def save(self, index: int, tensors: Mapping[str, Tensor], reports: Sequence[TensorReport]) -> None:
        if not ranks.first():
            return
        with writing(self.folder):
            write_file(self.file(index), tensors, {"reports": json.dumps([asdict(report) for report in reports])})

    def load(self, index: int) -> tuple[dict[str, Tensor], list[TensorReport]] | None:
        return ranks.run_on_first(lambda: self._read(index))

    def _read(self, index: int) -> tuple[dict[str, Tensor], list[TensorReport]] | None:
        if not self.file(index).exists():
            return None
        try:
            tensors, metadata = read_file(self.file(index))
            reports = [TensorReport(**{**r, "shape": tuple(r["shape"])}) for r in json.loads(metadata["reports"])]
        except (FormatError, ValueError, KeyError, TypeError):  # damaged: the block is computed again
            self.file(index).unlink()
            return None
        return tensors, reports

    def file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def files(self) -> list[Path]:
        """The files of all finished blocks, in order."""
        return sorted(self.folder.glob("block-*.safetensors"))

    def forget(self) -> None:
        """Delete the saved blocks, unless another process has locked the folder meanwhile."""
        if self._folder is not None and self._held is None and self._folder.exists():
            self._held = locks.hold(self._folder)
        if self._held is not None:
            self._held.remove()
            self._held = None


def fingerprint(
    settled: Settled, inputs: Inputs, versions: Mapping[str, str], tuning: BlockTuning | None = None
) -> str:
    """A digest of everything that determines the result: weights, plan, calibration tokens, versions, dtype, device,
    and how blocks are tuned."""
    skeleton, resolved, tokens = settled.skeleton, settled.resolved, inputs.tokens
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in skeleton.source.files]
    plan = [(a.module, str(a.scheme), repr(a.method)) for a in resolved.assignments.values()]
    ordered = [a.module for a in resolved.assignments.values() if a.order is not None]
    digest = hashlib.sha256()
    config = skeleton.source.config
    layout = [resolved.format.name, resolved.plan.activations, *ordered]
    digest.update(json.dumps([files, config, plan, layout, dict(versions)], sort_keys=True).encode())
    digest.update(f"{skeleton.dtype} {skeleton.device.type} scales".encode())  # saved blocks include folded scales
    if tuning is not None:
        digest.update(f"{tuning} {inputs.at_once}".encode())
    if tokens is not None:
        digest.update(str(tuple(tokens.shape)).encode() + tokens.numpy().tobytes())
    for module, stats in sorted((inputs.importance or {}).items()):
        digest.update(module.encode() + stats.mean_square.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
