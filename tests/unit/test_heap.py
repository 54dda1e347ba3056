"""What is done with goes back to the system, and nothing else does."""

import ctypes
import mmap
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewbit.formats.containers import gguf_split
from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.measure import memory
from fewbit.pipeline.settled import finite
from fewbit.system import heap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")

MIB = 1 << 20


def test_pages_that_were_read_go_and_what_is_kept_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    written = {name: torch.randint(0, 255, (8 * MIB,), dtype=torch.uint8) for name in "abc"}
    # Small ones lie between, each less than a page.
    written |= {f"{name}_": torch.arange(100, dtype=torch.int32) for name in "abc"}
    save_file(written, path)
    with safe_open(path, "pt") as file:
        mapped = {name: file.get_tensor(name) for name in written}
    for tensor in mapped.values():
        tensor.sum()
    before = memory.pages([path])

    with heap.trimmed() as done_with:
        done_with([mapped["a"], mapped["a_"]], [])
        done_with([mapped["b"]], [mapped["b"][5:10]])

    gone = before - memory.pages([path])
    assert 7 * MIB < gone < 9 * MIB
    for name, tensor in mapped.items():
        assert torch.equal(tensor, written[name])  # read again from the file


def test_a_checkpoint_with_an_empty_tensor_drops_its_pages(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(8 * MIB, dtype=torch.uint8), "empty": torch.zeros(0)}, path)
    checkpoint = Checkpoint([path])
    assert int(checkpoint.get("a").sum()) == 8 * MIB
    before = memory.pages([path])
    checkpoint.drop_pages()
    assert before - memory.pages([path]) > 7 * MIB


def test_a_split_file_releases_the_metadata_of_its_first_part(tmp_path: Path) -> None:
    """The first part has no tensor."""
    path = tmp_path / "m.gguf"
    with GgufWriter(path, {"k": "v" * 4 * MIB}, [Entry("t", "f32", (2 * MIB,))]) as writer:
        writer.add("t", torch.ones(2 * MIB))
    first, _ = gguf_split.split(path, 9 * MIB)
    file = GgufFile(first)
    before = memory.pages([first])
    file.release_headers()
    assert before - memory.pages([first]) > 3 * MIB


def test_memory_that_belongs_to_no_file_is_left_alone() -> None:
    x = torch.ones(8 * MIB, dtype=torch.uint8)
    with heap.trimmed() as done_with:
        done_with([x], [])
    assert int(x.sum()) == 8 * MIB


def at(address: int, size: int) -> torch.Tensor | None:
    """Memory of no file at this address, filled with ones. None if the address is in use."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_ssize_t
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
    made = libc.mmap(
        ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, ctypes.c_long(0)
    )
    if made != address:
        return None
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8).fill_(1)


@pytest.mark.parametrize("released", [True, False])
def test_the_addresses_of_a_closed_file_are_left_alone(released: bool, tmp_path: Path) -> None:
    """The system gives them to the next large tensor."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(8 * MIB, dtype=torch.uint8)}, path)
    with safe_open(path, "pt") as file:
        mapped = file.get_tensor("a")
    start = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    with heap.trimmed() as done_with:
        if released:
            done_with([mapped], [])
        del mapped, file
        other = at(start, 8 * MIB)
        if not released:
            assert other is not None
            done_with([other], [])
    assert other is None or int(other.sum()) == 8 * MIB


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "float8_e5m2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: str, bad: float) -> None:
    values = torch.randn(33, 65, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    assert finite(values)
    for place in (0, 1000, 33 * 65 - 1):
        damaged = values.float().flatten()
        damaged[place] = bad
        assert not finite(damaged.view(33, 65).to(values.dtype))
    assert finite(torch.zeros(0, 3))
    assert finite(torch.ones(3, dtype=torch.bool))
