"""Which sizes of the NVIDIA kernels are used: built in, or measured on a card and kept in a file. No GPU is needed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.advise import doctor
from fewbit.errors import KernelError
from fewbit.kernels.nvidia import Nvidia, in_cuda, layout, ops, sizes, tuning
from fewbit.kernels.nvidia.in_cuda import Sizes
from fewbit.kernels.nvidia.layout import Recipe
from fewbit.schemes.base import parse
from fewbit.system import kept
from fewbit.system.cache import _spare, existing

GPU = torch.device("cuda", 0)
CARD = sizes.Card("NVIDIA Test 1", "9.0", 13000, "2.11.0", "0123456789abcdef")
VALUES: tuple[Sizes, ...] = ()  # of a range: the weight is dequantized


def recipe(spec: str) -> Recipe:
    how = layout.recipe(parse(spec), tuning.K)
    assert isinstance(how, Recipe)
    return how


INT4 = recipe("int4-g128")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with Hopper's numbers."""
    monkeypatch.setattr(sizes, "card", lambda device: CARD)
    monkeypatch.setattr(in_cuda, "hopper", lambda device: CARD.capability == "9.0")
    monkeypatch.setattr(in_cuda, "unusable", lambda device: None)
    monkeypatch.setattr(in_cuda, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(in_cuda, "_shared_room", lambda device: 227 << 10)
    sizes.tuned.cache_clear()
    ops.choose_again()


def built_in(scheme: str, n: int, m: int) -> Sizes | None:
    how = recipe(scheme)
    return sizes.fullest(sizes.within(sizes.built_in(how, True), m), n, how, GPU)


def clock(faster: Callable[[str, int, int, Sizes | None], float | None]) -> tuning.Clock:
    """100 µs for the built-in choice, 200 µs for all else but what `faster` gives a time."""

    def time(scheme: str, n: int, m: int, of: Sizes | None) -> float:
        given = faster(scheme, n, m, of)
        return given if given is not None else 100.0 if of == built_in(scheme, n, m) else 200.0

    return time


def tune(faster: Callable[[str, int, int, Sizes | None], float | None]) -> tuning.Measured:
    return tuning.tune(GPU, lambda done, total: None, clock(faster))


def kept_ranges() -> dict[str, dict[int, tuple[Sizes, ...]]]:
    own = sizes.tuned(GPU)
    assert isinstance(own, sizes.Tuned), own
    return {scheme: dict(ranges) for scheme, ranges in own.ranges.items()}


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("spec", sizes.MEASURED)
def test_built_in_sizes_are_among_those_measured(spec: str, hopper: bool) -> None:
    for end in sizes.ENDS:
        found = sizes.within(sizes.built_in(recipe(spec), hopper), end)
        assert set(found) <= set(sizes.candidates(end, hopper))
        assert found or sizes.dequantizes(end)
        assert len(found) <= sizes.MOST
    assert hopper == any(each.cluster for end in sizes.ENDS for each in sizes.candidates(end, hopper))


@pytest.mark.parametrize(
    ("scheme", "kinds"),
    [
        ("int4-g128", ("int4-g128-sym", "int3-g128", "int2-g64", "q4_0")),
        ("q4_k", ("q6_k", "q8_0", "int8-g128", "llm.int8", "fp8-row", "int4-g16", "int5-g128", "int6-g128")),
        ("nf4-b64", ("nf4-b64-dq", "fp4-b64", "iq4_xs")),
        ("mxfp4", ("nvfp4",)),
    ],
)
def test_weights_use_the_sizes_of_their_kind(scheme: str, kinds: tuple[str, ...]) -> None:
    assert {sizes.measured(recipe(spec)) for spec in (scheme, *kinds)} == {scheme}


@pytest.mark.parametrize(
    ("most", "specs"),
    [
        (2048, ["int4-g128", "int2-g64-sym", "int3-g128", "nvfp4", "mxfp4"]),
        (1024, ["nf4-b64", "nf4-b64-dq", "iq4_xs"]),
        (512, ["q4_k", "q6_k", "fp8-row", "int8-g128", "int5-g128", "int6-g128"]),
    ],
)
def test_from_how_many_rows_on_weights_are_dequantized(most: int, specs: list[str]) -> None:
    for spec, (hopper, end) in product(specs, ((True, most), (False, 256))):
        ranges = sizes.built_in(recipe(spec), hopper)
        assert sizes.within(ranges, end)
        assert not sizes.within(ranges, end + 1)


@pytest.mark.parametrize(
    ("spec", "n", "tall"),
    [("int4-g128", 1024, 128), ("q4_k", 4096, 128), ("q4_k", 8192, 256), ("nf4-b64", 28672, 256), ("q2_k", 28672, 128)],
)
def test_few_blocks_share_a_piece_of_a_weight(spec: str, n: int, tall: int) -> None:
    for m in (33, 64):
        own = built_in(spec, n, m)
        assert own is not None
        assert own.cluster
        assert 16 * own.of_w * own.warps == tall


def of_hopper(name: str, argument: str) -> Callable[[int, int, int], int]:
    """A function of `argument`, total and clusters, as `hopper.cu` has it."""
    text = Path(in_cuda.__file__).with_name("hopper.cu").read_text(encoding="utf-8")
    (found,) = re.findall(rf"const auto {name} = \[&\]\(int {argument}\) {{ return (.*); }};", text)
    found = found.replace("(int)", "").replace("(long)", "").replace("/", "//")
    made: Callable[[int, int, int], int] = eval(f"lambda {argument}, total, clusters: {found}")
    return made


@pytest.mark.parametrize("own", dict.fromkeys(each for _, several in sizes.HOPPER for each in several if each.cluster))
@pytest.mark.parametrize("multiprocessors", [1, 2, 16, 79, 114, 132])
def test_clusters_find_those_that_share_a_piece(
    own: Sizes, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of tiles. A run without tiles would be waited for, and a block outside the GPU too."""
    monkeypatch.setattr(in_cuda, "_multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(in_cuda, "_done", lambda device, count: None)
    rows, tall = 8 * own.of_x, 16 * own.of_w * own.warps
    start, owner = of_hopper("start", "block"), of_hopper("owner", "at")
    for m, n, tiles in product((1, 300, 2048), (16, 4099, 28672), (1, 3, 64)):
        (blocks, *others), (left, _) = in_cuda._split(torch.empty(m, 0, device="meta"), n, tiles, own)
        assert isinstance(left, torch.Tensor)
        clusters, total = blocks // own.cluster, -(-m // rows) * -(-n // (tall * own.cluster)) * tiles
        assert (blocks % own.cluster, others) == (0, [1, 1])
        assert blocks <= max(multiprocessors * own.resident, own.cluster)
        assert left.numel() == blocks * tall * rows
        starts = [start(cluster, total, clusters) for cluster in range(clusters + 1)]
        assert (starts[0], starts[-1]) == (0, total)
        assert all(begin < end for begin, end in pairwise(starts))
        owners = [cluster for cluster, (begin, end) in enumerate(pairwise(starts)) for _ in range(begin, end)]
        assert owners == [owner(at, total, clusters) for at in range(total)]


def test_nothing_changes_where_the_built_in_sizes_are_fastest() -> None:
    done = tune(lambda *given: None)
    assert (done.changed, done.ranges) == (0, 44)
    assert [(each.scheme, each.n) for each in done.times] == [(s, n) for s in sizes.MEASURED for n in tuning.N]
    assert all(each.before == each.after == (100.0,) * len(tuning.ROWS) for each in done.times)
    for scheme, ranges in kept_ranges().items():
        assert ranges == {end: sizes.within(sizes.built_in(recipe(scheme), True), end) for end in sizes.ENDS}


def test_a_range_gets_what_is_faster_there() -> None:
    wide, narrow, other = Sizes(8, 1, 32, 1, 1, 2), Sizes(8, 1, 24, 1, 1, 2), Sizes(8, 2, 16, 1, 1)

    def faster(scheme: str, n: int, m: int, of: Sizes | None) -> float | None:
        """The last two are more and less than what two measurements of one kernel may differ by."""
        if scheme == "int4-g128" and m == 512 and of == narrow:
            return 60.0
        if scheme == "int4-g128" and m == 128 and of is None:
            return 70.0
        if scheme == "mxfp4" and m == 64 and of == other:
            return 97.5
        return 99.0 if scheme == "nf4-b64" and m == 64 and of == other else None

    assert ops._chosen(500, 4096, 4096, INT4, GPU) == (ops.CUDA, *wide)
    done = tune(faster)
    assert ops._chosen(500, 4096, 4096, INT4, GPU) == (ops.CUDA, *narrow)  # what was chosen before is forgotten
    assert done.changed == 3
    found = kept_ranges()
    assert (found["int4-g128"][512], found["int4-g128"][128], found["mxfp4"][64]) == ((narrow,), VALUES, (other,))
    built_in = sizes.built_in(recipe("nf4-b64"), True)
    assert found["nf4-b64"] == {end: sizes.within(built_in, end) for end in sizes.ENDS}
    at = {m: i for i, m in enumerate(tuning.ROWS)}
    for each in done.times:
        if each.scheme == "int4-g128":
            assert (each.before[at[512]], each.after[at[512]], each.after[at[128]]) == (100.0, 60.0, 70.0)
    assert ops.choose(500, 4096, 4096, INT4, GPU) == (ops.CUDA, *narrow)
    assert ops.choose(100, 4096, 4096, INT4, GPU) == (ops.VALUES,)
    assert ops.choose(100, 4096, 4096, recipe("int3-g128"), GPU) == (ops.VALUES,)
    assert ops.choose(100, 4096, 4096, recipe("q4_k"), GPU)[0] == ops.CUDA
    assert ops.choose(100, 4096, 4096, recipe("mxfp4"), GPU)[0] == ops.CUDA
    assert ops.choose(2049, 4096, 4096, INT4, GPU) == (ops.VALUES,)


def test_no_shape_gets_slower_for_the_sake_of_another() -> None:
    other = Sizes(8, 2, 16, 1, 1)

    def faster(scheme: str, n: int, m: int, of: Sizes | None) -> float | None:
        return (103.0 if n == 4096 else 10.0) if m == 64 and of == other else None

    assert tune(faster).changed == 0


def test_several_sizes_are_kept_where_shapes_differ() -> None:
    """A weight of 28672 rows fills the GPU with any sizes, so the first are used; one of 4096 rows needs small ones."""
    large, small = Sizes(8, 2, 1, 2), Sizes(8, 1, 1, 2)

    def faster(scheme: str, n: int, m: int, of: Sizes | None) -> float | None:
        if scheme != "mxfp4" or m > 8:
            return None
        return 50.0 if of == (large if n == 28672 else small) else 200.0 if n != 6144 else 100.0

    tune(faster)
    several = kept_ranges()["mxfp4"][8]
    assert several[0] == large
    assert small in several
    how = recipe("mxfp4")
    assert ops.choose(1, 28672, 4096, how, GPU) == (ops.CUDA, *large)
    assert ops.choose(1, 4096, 4096, how, GPU) == (ops.CUDA, *small)


def test_what_fails_is_not_used_and_a_broken_card_is_an_error() -> None:
    narrow = Sizes(8, 1, 24, 1, 1, 2)

    def faster(scheme: str, n: int, m: int, of: Sizes | None) -> float | None:
        return (math.inf if n == 28672 else 1.0) if m == 512 and of == narrow else None

    assert tune(faster).changed == 0
    with pytest.raises(KernelError, match=r"int4-g128 and 64 rows of activations fails"):
        tune(lambda scheme, n, m, of: math.inf if m == 64 else None)


def test_the_file_is_used_by_later_processes_and_listed(own_cache: Path) -> None:
    assert sizes.tuned(GPU) is None
    done = tune(lambda scheme, n, m, of: 1.0 if of is None and m >= 64 else None)
    assert Path(done.path) == own_cache / "kernels" / "NVIDIA-Test-1.json" == existing(CARD.entry)
    first = kept_ranges()
    sizes.tuned.cache_clear()
    assert kept_ranges() == first
    assert first["int4-g128"][64] == VALUES
    (entry,) = [each for each in kept.entries() if each.kind == "kernels"]
    assert (entry.model, entry.path) == ("NVIDIA Test 1", Path(done.path))
    assert kept.delete(entry)
    sizes.tuned.cache_clear()
    assert sizes.tuned(GPU) is None
    assert not list((own_cache / "kernels").iterdir())


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"name": "NVIDIA-Test-1"}, "name"),
        ({"capability": "12.0"}, "capability"),
        ({"driver": 12080}, "driver"),
        ({"torch": "2.12.0", "kernels": "another"}, "torch and kernels"),
    ],
)
def test_a_file_of_something_else_is_not_used(changed: dict[str, Any], word: str, own_cache: Path) -> None:
    path = Path(tune(lambda *given: None).path)
    held = json.loads(path.read_text(encoding="utf-8"))
    held["card"] |= changed
    path.write_text(json.dumps(held), encoding="utf-8")
    sizes.tuned.cache_clear()
    assert sizes.tuned(GPU) == f"{path} is not used: it was measured with another {word}"
    assert ops.choose(64, 8192, 4096, INT4, GPU) == (ops.CUDA, 8, 2, 8, 1, 1, 1)


def _put(*keys: Any) -> Callable[[Any, Any], None]:
    def put(held: Any, value: Any) -> None:
        for key in keys[:-1]:
            held = held[key]
        held[keys[-1]] = value

    return put


RANGES = ("ranges", "int4-g128")
DAMAGED = {
    "a card that is none": (_put("card"), 7),
    "no date": (_put("made"), "yesterday"),
    "a number for a date": (_put("made"), 20261130),
    "no ranges": (_put("ranges"), []),
    "a scheme is missing": (_put("ranges"), {"int4-g128": []}),
    "ranges are missing": (_put(*RANGES), []),
    "ranges are no list": (_put(*RANGES), {"8": []}),
    "another number of rows": (_put(*RANGES, 0, 0), 9),
    "no sizes for few rows": (_put(*RANGES, 0, 1), []),
    "sizes that are a text": (_put(*RANGES, 0, 1), ["812200"]),
    "too few sizes": (_put(*RANGES, 0, 1, 0), [8, 2, 1]),
    "too many sizes": (_put(*RANGES, 0, 1, 0), [8, 2, 1, 2, 0, 0, 0]),
    "a fraction": (_put(*RANGES, 0, 1, 0), [8.0, 2, 1, 2, 0, 0]),
    "a truth": (_put(*RANGES, 0, 1, 0), [8, 2, True, 2, 0, 0]),
    "unknown sizes": (_put(*RANGES, 0, 1, 0), [8, 2, 1, 64, 0, 0]),
    "sizes of another range": (_put(*RANGES, 10, 1), [[8, 2, 1, 2, 0, 0]]),
    "more sizes than a range has": (_put(*RANGES, 0, 1), [[8, 2, 1, 2, 0, 0]] * 4),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_not_used_and_said(kind: str, own_cache: Path) -> None:
    path = Path(tune(lambda *given: None).path)
    held = json.loads(path.read_text(encoding="utf-8"))
    put, value = DAMAGED[kind]
    put(held, value)
    path.write_text(json.dumps(held), encoding="utf-8")
    assert str(sizes.read(path, CARD)).startswith(f"{path} is not used: it is damaged (")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\0", '{"card": "\\ud800"}'])
def test_a_file_that_is_not_json_is_not_used(text: str, own_cache: Path) -> None:
    path = own_cache / "a.json"
    path.write_text(text, encoding="utf-8")
    found = sizes.read(path, CARD)
    assert isinstance(found, str)
    assert "is damaged (" in found
    assert "\n" not in found
    assert "cannot be read" in str(sizes.read(own_cache, CARD))


def test_sizes_of_hopper_are_refused_on_other_cards() -> None:
    path = Path(tune(lambda *given: None).path)
    assert isinstance(sizes.read(path, CARD), sizes.Tuned)
    held = json.loads(path.read_text(encoding="utf-8"))
    held["card"]["capability"] = "8.9"
    path.write_text(json.dumps(held), encoding="utf-8")
    older = sizes.Card(CARD.name, "8.9", CARD.driver, CARD.torch, CARD.kernels)
    assert "unknown sizes for 64 rows" in str(sizes.read(path, older))


def test_a_cache_that_is_nowhere_is_not_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "none"))
    assert sizes.tuned(GPU) is None
    monkeypatch.delenv("FEWBIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "usual"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert existing("kernels/a.json") is None
    assert not list(tmp_path.iterdir())
    for folder in (_spare(), tmp_path / "usual" / "fewbit"):  # the second comes first
        (folder / "kernels").mkdir(parents=True)
        (folder / "kernels" / "a.json").touch()
        assert existing("kernels/a.json") == folder / "kernels" / "a.json"


def test_weights_to_measure_are_rotated_and_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "K", 256)
    monkeypatch.setattr(tuning, "N", (64, 96))
    monkeypatch.setattr(tuning, "COLD", 100_000)
    for spec in sizes.MEASURED:
        copies, exact = tuning._weights(spec, 96, torch.device("cpu"))
        restored = Nvidia().restore(parse(spec), copies[-1], (96, 256))
        whole = parse(spec).dequantize(restored, (96, 256), torch.float32)
        assert torch.equal(whole, exact.repeat(3, 1))
        assert len(copies) > 1
        nbytes = sum(tensor.nbytes for tensor in copies[0])
        assert 100_000 < len(copies) * nbytes <= 100_000 + nbytes


def test_doctor_says_what_is_tuned_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cards", lambda: {CARD.name: GPU})
    monkeypatch.setattr(tuning, "why_not", lambda device: None)

    def told() -> tuple[str | None, list[str]]:
        found = doctor.look()
        return found.tuned[CARD.name], [line for line in found.advice if line.startswith(CARD.name)]

    made, (line,) = told()
    assert made is None
    assert "fastest on an H200. `fewbit doctor --tune` measures this card" in line
    path = Path(tune(lambda *given: None).path)
    made, lines = told()
    assert str(made).startswith("20")
    assert not lines
    path.write_text("{", encoding="utf-8")
    sizes.tuned.cache_clear()
    made, (line,) = told()
    assert made is None
    assert f"{path} is not used: it is damaged" in line
    assert "`fewbit doctor --tune`" in line
    monkeypatch.setattr(tuning, "why_not", lambda device: "it is too old")
    assert doctor.look().tuned == {}
