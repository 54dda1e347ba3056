"""Memory of this process as the operating system reports it. On systems other than Linux, from `resource`."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_MAPS = Path("/proc/self/smaps")  # proc(5): the mappings of this process with their resident bytes


@dataclass(frozen=True)
class Memory:
    """Memory of a process in bytes.

    `anonymous`: resident and not backed by a file. `mapped`: resident pages of mapped files. `peak`: the largest
    resident size so far.
    """

    anonymous: int
    mapped: int
    peak: int

    @property
    def resident(self) -> int:
        return self.anonymous + self.mapped


@dataclass(frozen=True)
class AtRest:
    """Bytes of a loaded model's tensors.

    `whole`: all tensors, tied ones counted once. `parameters`: the tensors of `model.parameters()`. `buffers`: the
    others, by the last part of their names, largest first.
    """

    whole: int
    parameters: int
    buffers: dict[str, int]


def at_rest(model: Any) -> AtRest:
    """The bytes of a model's tensors as they are in memory; packed weights count as packed."""
    seen: set[tuple[int, int]] = set()

    def new(tensor: torch.Tensor) -> int:
        place = (tensor.data_ptr(), tensor.nbytes)
        if place in seen and place[0]:
            return 0
        seen.add(place)
        return tensor.nbytes

    own = sum(new(tensor) for parameter in model.parameters() for tensor in _inside(parameter))
    buffers: Counter[str] = Counter()
    for name, buffer in model.named_buffers():
        last = name.rpartition(".")[2]
        # What a kernel keeps beside the codes has numbers for names.
        buffers["scales" if last.startswith("kept_") else last] += sum(map(new, _inside(buffer)))
    told = {name: nbytes for name, nbytes in buffers.most_common() if nbytes}
    return AtRest(own + sum(told.values()), sum(p.nbytes for p in model.parameters()), told)


def _inside(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the data of this one: itself, but for PyTorch's traceable wrappers, such as torchao's."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inside(getattr(tensor, name))


def touch(model: Any) -> None:
    """Have every page of a model's tensors in memory: of a file that is mapped they come when they are read."""
    for tensor in (held for each in [*model.parameters(), *model.buffers()] for held in _inside(each)):
        if tensor.device.type == "cpu" and tensor.nbytes and tensor.is_contiguous():
            tensor.detach().view(-1).view(torch.uint8)[::512].sum()


def kept(files: Iterable[Path]) -> int:
    """Resident bytes of this process: its anonymous memory plus the pages of these mapped files. 0 if not available.

    Library code is not counted, because it is loaded whenever it first runs. Freed memory is returned to the system
    before counting.
    """
    if not _MAPS.exists():
        return 0
    gc.collect()
    with suppress(AttributeError):  # C libraries other than glibc have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    return pages(files) + now().anonymous


def pages(files: Iterable[Path]) -> int:
    """Resident bytes of these mapped files in this process. 0 if not available."""
    wanted, total, counts = {str(file.resolve()) for file in files}, 0, False
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines() if _MAPS.exists() else []:
        key, *rest = line.split()
        if not key.endswith(":"):  # the header line of a mapping: addresses, permissions, offset, device, inode, path
            counts = line.split(maxsplit=5)[5:] in [[path] for path in wanted]
        elif counts and key == "Rss:":
            total += int(rest[0]) * 1024
    return total


def forget_peak() -> None:
    """Reset `peak` and `on_gpus`, where the system supports it."""
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    if torch.cuda.is_initialized():  # resetting the peak before initialization is an error
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)


def in_use_on_gpus() -> int:
    """Bytes in use on all CUDA devices according to the driver, including contexts and torch's cached memory."""
    return sum(total - free for free, total in map(torch.cuda.mem_get_info, range(torch.cuda.device_count())))


def on_gpus() -> int:
    """Peak bytes allocated by torch, summed over all CUDA devices; 0 without any."""
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def now() -> Memory:
    """The current memory of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Memory(anonymous=peak, mapped=0, peak=peak)
    fields = dict(
        line.split(":", 1) for line in status.read_text(encoding="utf-8", errors="replace").splitlines() if ":" in line
    )
    size = {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmHWM")}
    return Memory(anonymous=size["RssAnon"], mapped=size["RssFile"], peak=size["VmHWM"])
