"""How much memory this process has taken, as the operating system counts it. Linux; elsewhere what `resource` tells."""

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


@dataclass(frozen=True)
class Memory:
    """Bytes. `anonymous`: resident and not backed by a file; `mapped`: resident pages of mapped files; `peak`: the most
    that was ever resident."""

    anonymous: int
    mapped: int
    peak: int

    @property
    def resident(self) -> int:
        return self.anonymous + self.mapped


@dataclass(frozen=True)
class AtRest:
    """Bytes of a loaded model's tensors, tied ones once: of all, of what `model.parameters()` has, and of the rest by
    the last part of their names, the largest first."""

    whole: int
    parameters: int
    buffers: dict[str, int]


def at_rest(model: Any) -> AtRest:
    """What the weights of a model take as they lie in memory, packed ones packed."""
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
    """Bytes that this process holds for itself and of these mapped files; not of libraries, whose code is read as it is
    first run. What was freed goes back to the system before. 0 where the system does not tell."""
    if not (maps := Path("/proc/self/smaps")).exists():
        return 0
    gc.collect()
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    wanted, total, counts = {str(file.resolve()) for file in files}, 0, False
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):  # a mapping: addresses, rights, offset, device, inode, path
            counts = line.split(maxsplit=5)[5:] in [[path] for path in wanted]
        elif counts and key == "Rss:":
            total += int(rest[0]) * 1024
    return total + now().anonymous


def forget_peak() -> None:
    """From now on `peak` and `on_gpus` count anew; where the system cannot, they go on."""
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    if torch.cuda.is_initialized():  # before, there is no peak, and resetting none is an error
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)


def in_use_on_gpus() -> int:
    """Bytes in use on all CUDA devices as their driver counts: contexts, and what torch keeps, included."""
    return sum(total - free for free, total in map(torch.cuda.mem_get_info, range(torch.cuda.device_count())))


def on_gpus() -> int:
    """The most bytes that torch ever held on all CUDA devices together; 0 where there are none."""
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def now() -> Memory:
    """What this process holds at this moment."""
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
