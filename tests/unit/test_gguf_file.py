"""GGUF files: what lies is refused at once and in little memory, what is sound is read as it was written."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import gguf_split
from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter, layout
from fewbit.formats.containers.gguf_strings import replace_strings

U8, U32, BOOL, STRING, ARRAY = 0, 4, 7, 8, 9
MOST = (1 << 64) - 1


def text(value: bytes | str, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: Iterable[int], kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    shape = list(shape)
    dimensions = len(shape) if count is None else count
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", dimensions, *shape, kind, offset)


def file(
    keys: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 0,
    magic: bytes = b"GGUF",
) -> bytes:
    keys, tensors = list(keys), list(tensors)
    count = counts or (len(tensors), len(keys))
    header = magic + struct.pack("<IQQ", version, *count) + b"".join([*keys, *tensors])
    return header + bytes(-len(header) % 32 if tensors else 0) + bytes(data)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "no magic": (b"GGML" + bytes(60), "does not begin with GGUF"),
    "magic only": (b"GGUF", "ends in the version"),
    "version 1": (file(version=1), "version 1"),
    "version 99": (file(version=99), "version 99"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "array of 2^63 - 1": (file([key("k", ARRAY, struct.pack("<IQ", U8, (1 << 63) - 1))]), "it ends in k"),
    "array of 2^64 - 1 words": (file([key("k", ARRAY, struct.pack("<IQ", U32, MOST))]), "it ends in k"),
    "array of 2^61 strings": (file([key("k", ARRAY, struct.pack("<IQ", STRING, 1 << 61))]), "strings, more than"),
    "array with a string past the end": (
        file([key("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("b", 2))]),
        "k: string 1 ends behind the file",
    ),
    "array of 2^63 booleans": (file([key("k", ARRAY, struct.pack("<IQ", BOOL, 1 << 63))]), "it ends in k"),
    "array of arrays": (file([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(64))]), "array of arrays"),
    "array of unknown": (file([key("k", ARRAY, struct.pack("<IQ", 13, 1) + bytes(64))]), "type 13"),
    "value of unknown type": (file([key("k", 13, bytes(8))]), "type 13"),
    "string of 2^64 - 1": (file([key("k", STRING, text("x", MOST))]), "it ends in k"),
    "string past the end": (file([key("k", STRING, text("x", 2))]), "it ends in k"),
    "name of a key of 2^40": (file([text("x", 1 << 40)], counts=(0, 1)), "bytes"),
    "no UTF-8": (file([key("k", STRING, text(b"\xff\xfe"))]), "not valid UTF-8"),
    "neither true nor false": (file([key("k", BOOL, b"\x02")]), "neither true nor false"),
    "2^64 - 1 keys": (file(counts=(0, MOST)), "do not fit into"),
    "2^64 - 1 tensors": (file(counts=(MOST, 0)), "do not fit into"),
    "2^40 tensors and keys": (file(counts=(1 << 40, 1 << 40)), "do not fit into"),
    "a key twice": (file([key("k", U8, b"\1"), key("k", U8, b"\1")]), "twice"),
    "alignment 0": (file([key("general.alignment", U32, bytes(4))]), "not a power of two"),
    "alignment 33": (file([key("general.alignment", U32, struct.pack("<I", 33))]), "not a power of two"),
    "alignment of a string": (file([key("general.alignment", STRING, text("32"))]), "not an integer"),
    "alignment 2^31": (
        file([key("general.alignment", U32, struct.pack("<I", 1 << 31))], [tensor("t", [8])], data=64),
        "would end at byte",
    ),
    "5 dimensions": (file(tensors=[tensor("t", [1] * 5)], data=64), "5 dimensions"),
    "2^32 - 1 dimensions": (file(tensors=[tensor("t", [1], count=(1 << 32) - 1)], data=64), "dimensions"),
    "no dimension": (file(tensors=[tensor("t", [])], data=64), "one to four dimensions"),
    "a dimension of 0": (file(tensors=[tensor("t", [8, 0])], data=64), "dimensions above 0"),
    "2^64 elements": (file(tensors=[tensor("t", [1 << 32, 1 << 32])], data=64), "bytes in a file of"),
    "2^64 + 8 elements": (file(tensors=[tensor("t", [(1 << 61) + 1, 8])], data=64), "bytes in a file of"),
    "2^66 bytes": (file(tensors=[tensor("t", [1 << 62, 4])], data=64), "bytes in a file of"),
    "type 4": (file(tensors=[tensor("t", [32], 4)], data=64), "unknown type 4"),
    "type 10^9": (file(tensors=[tensor("t", [32], 10**9)], data=64), "unknown type"),
    "columns in no blocks": (file(tensors=[tensor("t", [33], 2)], data=64), "not a multiple of 32"),
    "offset past the end": (file(tensors=[tensor("t", [8], offset=1 << 20)], data=64), "would end at byte"),
    "offset of 2^64 - 32": (file(tensors=[tensor("t", [8], offset=MOST - 31)], data=64), "would end at byte"),
    "offset not aligned": (file(tensors=[tensor("t", [8], offset=4)], data=64), "not a multiple of 32"),
    "a tensor cut off": (file(tensors=[tensor("t", [16])], data=32), "would end at byte"),
    "a tensor twice": (file(tensors=[tensor("t", [8]), tensor("t", [8], offset=32)], data=64), "twice"),
    "overlapping": (file(tensors=[tensor("a", [16]), tensor("b", [8], offset=32)], data=64), "overlap"),
    "one place for two": (file(tensors=[tensor("a", [8]), tensor("b", [8])], data=64), "overlap"),
    "no name": (file(tensors=[tensor("", [8])], data=64), "must have 1 to 63 bytes"),
    "a name of 100 bytes": (file(tensors=[tensor("t" * 100, [8])], data=64), "must have 1 to 63 bytes"),
    "split into 2^16": (file([key("split.count", U32, struct.pack("<I", 1 << 16))]), "its name does not"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_lies_is_refused_at_once_in_little_memory(name: str, tmp_path: Path) -> None:
    raw, said = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    try:
        with pytest.raises(FormatError, match=said) as refused:
            GgufFile(path)
    finally:
        sys.setprofile(None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert str(path) in str(refused.value)
    assert calls < 10_000  # it does not read as many items as the file says that there are
    assert peak < 2 << 20


def sound() -> bytes:
    """A small file with all kinds of values and tensors."""
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "flag": True,
        "whole": 7,
        "negative": -7,
        "large": 1 << 40,
        "real": 0.5,
        "strings": ["a", "", "ü"],
        "numbers": np.arange(5, dtype=np.int32),
        "reals": [0.5, 1.5],
        "flags": np.array([True, False]),
        "short": np.uint16(3),
    }
    entries = [Entry("token_embd.weight", "q8_0", (4, 64)), Entry("norm", "f32", (6,)), Entry("half", "bf16", (2, 3))]
    header, places, size = layout(metadata, entries)
    raw = bytearray(header + bytes(size - len(header)))
    raw[places["norm"] : places["norm"] + 24] = np.arange(6, dtype=np.float32).tobytes()
    return bytes(raw)


def test_a_vocabulary_is_decoded_when_it_is_used(tmp_path: Path) -> None:
    path, count = tmp_path / "m.gguf", 50_000
    with GgufWriter(path, {"k": [f"token {i}" for i in range(count)]}, []):
        pass
    tracemalloc.start()
    try:
        found = GgufFile(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10
    assert found.metadata["k"].tolist() == [f"token {i}" for i in range(count)]


def test_a_bad_string_of_an_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    array = struct.pack("<IQ", STRING, 2) + text("a") + text(b"\xff")
    path.write_bytes(file([key("tokenizer.k", ARRAY, array)]))
    found = GgufFile(path).metadata["tokenizer.k"]
    with pytest.raises(FormatError, match="k: string 1 is not valid UTF-8"):
        found.tolist()
    path.write_bytes(file([key("k", ARRAY, array)]))
    with pytest.raises(FormatError, match="k: string 1 is not valid UTF-8"):
        GgufFile(path)


def test_version_2_is_laid_out_alike(tmp_path: Path) -> None:
    raw = bytearray(sound())
    raw[4] = 2
    (tmp_path / "m.gguf").write_bytes(raw)
    assert GgufFile(tmp_path / "m.gguf").get("norm").tolist() == [0, 1, 2, 3, 4, 5]


def test_truncated_anywhere(tmp_path: Path) -> None:
    raw, path = sound(), tmp_path / "t.gguf"
    last = len(raw) - 32 + 12  # of what comes after the last tensor nothing is needed
    for end in range(last):
        path.write_bytes(raw[:end])
        with pytest.raises(FormatError):
            GgufFile(path)
    path.write_bytes(raw[:last])
    GgufFile(path)


_RAW = sound()


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(_RAW) - 9), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4
    ),
    end=st.integers(0, len(_RAW)),
)
def test_a_file_changed_anywhere_is_read_or_refused(changes: list[tuple[int, bytes]], end: int, tmp_path: Path) -> None:
    raw = bytearray(_RAW)
    for at, new in changes:
        raw[at : at + len(new)] = new
    path = tmp_path / "changed.gguf"
    path.write_bytes(raw[: end or None])
    try:
        found = GgufFile(path)
    except FormatError:
        return
    for name, entry in found.entries.items():
        assert found.get(name).nbytes == entry.spec.nbytes


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    metadata = {
        "a": 1,
        "b": -1,
        "c": 1 << 40,
        "d": True,
        "e": "ü",
        "f": 0.25,
        "g": ["x", ""],
        "h": np.array([1, -2], np.int8),
    }
    tensors = {
        "f": torch.randn(3, 5),
        "h": torch.randn(2, 4).half(),
        "q": torch.randint(0, 255, (4, 34), dtype=torch.uint8),
        "d": torch.randn(3).double(),
        "i": torch.arange(3, dtype=torch.int32),
    }
    kinds = {"f": "f32", "h": "f16", "q": "q8_0", "d": "f64", "i": "i32"}
    entries = [Entry(n, kinds[n], (4, 32) if n == "q" else tuple(t.shape)) for n, t in tensors.items()]
    with GgufWriter(path, metadata, entries) as writer:
        assert not path.exists()
        for name in reversed(tensors):  # in any order
            writer.add(name, tensors[name])
    found = GgufFile(path)
    arrays = {"g": ["x", ""], "h": [1, -2]}
    assert {key: found.metadata[key].tolist() for key in arrays} == arrays
    assert {**found.metadata, **arrays} == {**metadata, **arrays}
    assert list(found.entries.values()) == entries
    assert all(torch.equal(found.get(name), each) for name, each in tensors.items())
    assert path.stat().st_size == layout(metadata, entries)[2]
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]


def test_what_changes_a_weight_in_memory_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with GgufWriter(path, {}, [Entry("t", "f32", (4,))]) as writer:
        writer.add("t", torch.ones(4))
    GgufFile(path).get("t").zero_()
    assert GgufFile(path).get("t").tolist() == [1, 1, 1, 1]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path, entry = tmp_path / "m.gguf", Entry("t", "f32", (4,))
    with pytest.raises(KeyError), GgufWriter(path, {}, [entry]) as writer:
        writer.add("other", torch.ones(4))
    with pytest.raises(ValueError, match="never written"), GgufWriter(path, {}, [entry]):
        pass
    with pytest.raises(ValueError, match="expected PartSpec"), GgufWriter(path, {}, [entry]) as writer:
        writer.add("t", torch.ones(5))
    with pytest.raises(TypeError):
        GgufWriter(path, {"k": object()}, [entry])
    with pytest.raises(PlanError, match="not a multiple of"):
        GgufWriter(path, {}, [Entry("t", "q8_0", (4, 33))])
    assert not list(tmp_path.iterdir())


def split(folder: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda number, keys: keys) -> Path:
    for number in range(3):
        keys: dict[str, Any] = {"split.no": np.uint16(number), "split.count": np.uint16(3)}
        keys |= {"split.tensors.count": np.int32(3), **({"k": "v"} if number == 0 else {})}
        with GgufWriter(
            folder / f"m-{number + 1:05d}-of-00003.gguf", change(number, keys), [Entry(f"t{number}", "f32", (2,))]
        ) as writer:
            writer.add(f"t{number}", torch.full((2,), float(number)))
    return folder / "m-00001-of-00003.gguf"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_split_files_are_one_given_any_of_them(number: int, tmp_path: Path) -> None:
    first = split(tmp_path)
    found = GgufFile(tmp_path / f"m-{number:05d}-of-00003.gguf")
    assert found.path == first
    assert [found.get(f"t{number}").tolist() for number in range(3)] == [[0, 0], [1, 1], [2, 2]]
    assert found.metadata["k"] == "v"
    assert len(found.files) == 3


def test_split_files_that_do_not_fit(tmp_path: Path) -> None:
    first = split(tmp_path)
    first.rename(tmp_path / "first")
    with pytest.raises(FormatError, match=r"m-00001-of-00003\.gguf is missing"):
        GgufFile(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "first").rename(first)
    (tmp_path / "m-00002-of-00003.gguf").rename(tmp_path / "part.gguf")
    with pytest.raises(FormatError, match=r"part\.gguf says that it is a later part"):
        GgufFile(tmp_path / "part.gguf")
    (tmp_path / "part.gguf").rename(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "away")
    with pytest.raises(FormatError, match=r"00003-of-00003\.gguf is missing"):
        GgufFile(first)
    (tmp_path / "m-00002-of-00003.gguf").replace(tmp_path / "m-00003-of-00003.gguf")
    (tmp_path / "away").rename(tmp_path / "m-00002-of-00003.gguf")
    with pytest.raises(FormatError, match=r"split\.no must be 1"):
        GgufFile(first)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(FormatError, match="have 3 tensors"):
        GgufFile(split(other, lambda _, keys: {**keys, "split.tensors.count": np.int32(4)}))


def test_a_file_is_split_as_llama_cpp_does(tmp_path: Path) -> None:
    path, sizes = tmp_path / "m.gguf", (10, 10, 500, 10, 10, 10)
    entries = [Entry(f"t{i}", "f32", (size,)) for i, size in enumerate(sizes)]
    with GgufWriter(path, {"k": ["v" * 50]}, entries) as writer:
        for i, entry in enumerate(entries):
            writer.add(entry.name, torch.full(entry.shape, float(i)))
    whole = path.read_bytes()
    assert gguf_split.split(path, len(whole)) == [path]
    parts = gguf_split.split(path, 600)
    assert [part.name for part in parts] == [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted(tmp_path.iterdir()) == parts
    assert [part.stat().st_size <= 600 for part in parts] == [True, False, True]
    found = GgufFile(parts[1])
    assert (list(found.entries.values()), found.metadata["k"].tolist()) == (entries, ["v" * 50])
    assert all(found.get(f"t{i}").eq(i).all() for i in range(len(sizes)))
    # llama.cpp reads these keys as numbers of just these types, and other keys in the first file only
    for number, part in enumerate(parts):
        keys = {"split.no": (2, number), "split.count": (2, 3), "split.tensors.count": (5, 6)}
        data = part.read_bytes()
        for key, (kind, value) in keys.items():
            stored = value.to_bytes(2 if kind == 2 else 4, "little")
            assert key.encode() + kind.to_bytes(4, "little") + stored in data
        assert (b"v" * 50 in data) == (number == 0)


def test_the_first_part_may_have_no_tensors(tmp_path: Path) -> None:
    with GgufWriter(tmp_path / "m.gguf", {"k": "v" * 900}, [Entry("t", "f32", (200,))]) as writer:
        writer.add("t", torch.ones(200))
    parts = gguf_split.split(tmp_path / "m.gguf", 1200)
    assert all(part.stat().st_size <= 1200 for part in parts)
    assert GgufFile(parts[0]).get("t").sum() == 200


def test_a_string_is_replaced_at_its_place(tmp_path: Path) -> None:
    value = torch.arange(4, dtype=torch.float32, device="cpu")
    with GgufWriter(tmp_path / "a.gguf", {"a": "long value", "b": "long value"}, [Entry("x", "f32", (4,))]) as writer:
        writer.add("x", value)
    before = (tmp_path / "a.gguf").read_bytes()
    replace_strings(tmp_path / "a.gguf", {"b": ("long value", "é")})
    after = GgufFile(tmp_path / "a.gguf")
    assert (after.metadata["a"], after.metadata["b"]) == ("long value", "é" + 8 * " ")
    assert after.get("x").equal(value)
    assert len(before) == (tmp_path / "a.gguf").stat().st_size
    for old, new in (("other", ""), ("long value", "longer value")):
        with pytest.raises(FormatError, match="a does not have the value"):
            replace_strings(tmp_path / "a.gguf", {"a": (old, new)})
