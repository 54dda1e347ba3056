"""An importance matrix comes back as it was written, in either form, and a file that lies is refused by name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import imatrix
from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.formats.containers.imatrix import Importance

MATRIX = {
    "blk.1.ffn_up.weight": Importance(torch.tensor([0.5, 2.0, 0.0, 1e-6]), 1024),
    "blk.0.attn_q.weight": Importance(torch.tensor([1.0, 3.0]), 1024),
}


def written(path: Path) -> Path:
    imatrix.write(path, MATRIX, chunks=2, length=512, text="some text")
    return path


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_it_comes_back(suffix: str, tmp_path: Path) -> None:
    found = imatrix.read(written(tmp_path / f"m{suffix}"))
    assert sorted(found) == sorted(MATRIX)
    for name, (mean_square, rows) in MATRIX.items():
        torch.testing.assert_close(found[name].mean_square, mean_square, rtol=1e-6, atol=0)
        assert found[name].rows == (rows if suffix == ".gguf" else 2)


def test_the_newer_form_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    file = GgufFile(written(tmp_path / "m.gguf"))
    assert file.metadata["general.type"] == "imatrix"
    assert list(file.metadata["imatrix.datasets"]) == ["some text"]
    assert (file.metadata["imatrix.chunk_count"], file.metadata["imatrix.chunk_size"]) == (2, 512)
    assert list(file.entries) == [
        f"{name}.{what}" for name in sorted(MATRIX) for what in ("in_sum2", "counts")
    ]  # fmt: skip
    assert file.get("blk.0.attn_q.weight.in_sum2").tolist() == [1024.0, 3072.0]
    assert file.get("blk.0.attn_q.weight.counts").tolist() == [1024.0]


def test_the_older_form_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    imatrix.write(path, {"w": Importance(torch.tensor([0.5, 2.0]), 1000)}, chunks=2, length=512, text="text")
    assert path.read_bytes() == (
        struct.pack("<ii", 1, 1) + b"w" + struct.pack("<iiff", 2, 2, 1.0, 4.0) + struct.pack("<ii", 2, 4) + b"text"
    )


def test_the_end_of_the_older_form_may_be_missing(tmp_path: Path) -> None:
    path = written(tmp_path / "m.dat")
    path.write_bytes(path.read_bytes()[: -len("some text") - 8])
    assert sorted(imatrix.read(path)) == sorted(MATRIX)


def test_experts_without_tokens_count_as_all_alike(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    entries = [Entry("w.in_sum2", "f32", (2, 2)), Entry("w.counts", "f32", (2, 1))]
    with GgufWriter(path, {"general.type": "imatrix"}, entries) as writer:
        writer.add("w.in_sum2", torch.tensor([[4.0, 6.0], [0.0, 0.0]]))
        writer.add("w.counts", torch.tensor([[2.0], [0.0]]))
    assert imatrix.read(path)["w"].mean_square.tolist() == [2.0, 3.0, 1.0, 1.0]


@pytest.mark.parametrize("length", range(0, 118, 3))
def test_a_truncated_older_form(length: int, tmp_path: Path) -> None:
    path = written(tmp_path / "m.dat")
    whole = path.read_bytes()
    path.write_bytes(whole[: min(length, len(whole) - len("some text") - 9)])
    with pytest.raises(FormatError):
        imatrix.read(path)


@pytest.mark.parametrize(
    ("offset", "number", "words"),
    [
        (0, 0, "the number of entries"),
        (0, 1 << 30, "the number of entries"),
        (0, 3, "the number of values"),
        (4, 1 << 30, "the length of the name"),
        (4, -1, "the length of the name"),
        (4 + 4 + 19, -1, "the number of chunks"),
        (4 + 4 + 19 + 4, 1 << 30, "the number of values"),
        (4 + 4 + 19 + 4, 0, "the number of values"),
    ],
)
def test_an_older_form_that_lies(offset: int, number: int, words: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.dat")
    raw = bytearray(path.read_bytes())
    raw[offset : offset + 4] = struct.pack("<i", number)
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=words):
        imatrix.read(path)


def test_bytes_after_the_end(tmp_path: Path) -> None:
    path = written(tmp_path / "m.dat")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(FormatError, match="4 extra bytes after the last value"):
        imatrix.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_values_that_are_none(value: float, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    imatrix.write(path, {"w": Importance(torch.tensor([1.0, value]), 8)}, chunks=1, length=8, text="")
    with pytest.raises(FormatError, match="the importances of w"):
        imatrix.read(path)


def of(*entries: tuple[str, torch.Tensor], kind: Any = "imatrix") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        specs = [Entry(name, "f16" if t.dtype == torch.float16 else "f32", tuple(t.shape)) for name, t in entries]
        with GgufWriter(path, {"general.type": kind}, specs) as writer:
            for name, tensor in entries:
                writer.add(name, tensor)

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (of(("w.in_sum2", torch.ones(2))), "it has w.in_sum2, but not w.counts"),
        (of(("w.counts", torch.ones(1))), "it has w.counts, but not w.in_sum2"),
        (of(("w.in_sum2", torch.ones(2).half()), ("w.counts", torch.ones(1))), "w.in_sum2 has type f16"),
        (of(("w.in_sum2", torch.ones(2)), ("w.counts", torch.ones(1).half())), "w.counts has type f16"),
        (of(("w.in_sum2", torch.ones(3)), ("w.counts", torch.ones(2))), "3 values for 2 counts"),
        (of(("w.in_sum2", torch.ones(2)), ("w.counts", -torch.ones(1))), "w.counts is not a valid number of tokens"),
        (
            of(("w.in_sum2", torch.ones(2)), ("w.counts", torch.tensor([float("nan")]))),
            "w.counts is not a valid number",
        ),
        (of(("w", torch.ones(2))), "holds no importances"),
        (of(("w.in_sum2", torch.ones(2)), ("w.counts", torch.ones(1)), kind="model"), "not an importance matrix"),
        (of(("w.in_sum2", torch.ones(2)), kind=np.arange(2)), "not an importance matrix"),
    ],
)
def test_a_newer_form_that_lies(write: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match=words):
        imatrix.read(tmp_path / "m.gguf")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        imatrix.read(tmp_path / "none.gguf")


def test_names_of_files(tmp_path: Path) -> None:
    for good in ("m.gguf", "m.dat"):
        imatrix.check(tmp_path / good)
    with pytest.raises(PlanError, match=r"a \.gguf or \.dat file"):
        imatrix.check(tmp_path / "m.bin")
