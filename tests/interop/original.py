"""An unquantized model as a GGUF file of 32-bit numbers: what llama.cpp's quantizer starts from, and the reference."""

from __future__ import annotations

from pathlib import Path

import torch

from fewbit.formats.containers.gguf import GgufWriter
from fewbit.models.skeleton import Skeleton
from fewbit.models.source import locate
from fewbit.pipeline import write_gguf
from fewbit.pipeline.settled import Settled
from fewbit.plans.plan import Plan, Resolved, format_of
from tests import gguf_files

PLAN = Plan("f32", "gguf", ())


def write(model: str | Path, path: Path) -> None:
    """Every tensor of `model` as float32, exactly, in a file at `path`."""
    source = locate(model)
    skeleton = Skeleton(source, torch.float32, torch.device("cpu"))
    nothing = Resolved(PLAN, format_of(PLAN), {}, (), ())
    header = gguf_files.header_of(model)
    keys = write_gguf.metadata(header, nothing, {}) | {"general.file_type": 0}
    planned = write_gguf.planned(Settled(skeleton, nothing))
    entries = [each.entry._replace(type="f32") for each in planned]
    assert not header.extra
    with GgufWriter(path, keys, entries) as writer:
        for each, entry in zip(planned, entries, strict=True):
            tensor = header.routes[each.name].to_file(skeleton.checkpoint.get(each.key))
            writer.add(entry.name, tensor.float().contiguous())
