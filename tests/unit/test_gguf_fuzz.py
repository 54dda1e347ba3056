"""A real file changed anywhere: its keys, config and tokenizer are read, or refused with a FormatError."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_gguf import read_all, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbit.errors import FormatError


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return seeds(tmp_path_factory.mktemp("seed"))


def test_the_files_themselves_are_read(real: list[bytes], tmp_path: Path) -> None:
    for number, raw in enumerate(real):
        (tmp_path / f"{number}.gguf").write_bytes(raw)
        read_all(tmp_path / f"{number}.gguf")


# Numbers that lengths and ids are likely to be wrong by.
numbers = st.sampled_from([0, 1, 2, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1])
change = st.tuples(
    st.floats(0, 1), st.one_of(st.binary(min_size=1, max_size=8), numbers.map(lambda n: n.to_bytes(8, "little")))
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(kind=st.integers(0, 1), changes=st.lists(change, min_size=1, max_size=3), end=st.floats(0.01, 1.2))
def test_a_file_changed_anywhere_is_read_or_refused(
    kind: int, changes: list[tuple[float, bytes]], end: float, real: list[bytes], tmp_path: Path
) -> None:
    raw = real[kind]
    changed = bytearray(raw)
    for place, new in changes:
        at = int(place**2 * (len(raw) - 8))  # most are among the keys
        changed[at : at + len(new)] = new
    path = tmp_path / "m.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(changed[: int(len(raw) * end)])
    try:
        read_all(path)
    except FormatError:
        return
