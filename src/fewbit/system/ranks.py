"""The processes that share one run, as `torchrun` starts them: who they are, and what they tell one another.

Within `joined` a *rank* is one of `size` processes, each on a device of its own, that all do the same in the same order
and part the work: `part` of some windows, some of the jobs that `owners` shares out. Elsewhere there is one rank, and
each of these functions gives back what it was given: a run in one process is the case of one rank.

Numbers go over NCCL between GPUs and gloo between CPUs, everything else over gloo. A rank that fails says so in the
store where they met before it goes; one that dies closes its connections, which ends what the others wait for.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

from fewbit.errors import FewbitError, PeerError, PlanError
from fewbit.lazy import Tensor, torch
from fewbit.lazy import distributed as dist

T = TypeVar("T")
_PATIENCE = timedelta(days=2)  # for one that works alone; one that died is noticed by its closed connections
_FAILED = "failed"


@dataclass(frozen=True)
class _World:
    rank: int
    size: int
    store: Any  # torch.distributed.Store, where torch was built with it


_world: _World | None = None
_runs = itertools.count()  # so that what one run left in the store is not taken for another's


def launched() -> int:
    """How many processes `torchrun` started; 1 where it did not start this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torch need not be imported to know
        return 1
    return int(os.environ["WORLD_SIZE"]) if dist.is_available() and dist.is_torchelastic_launched() else 1


def silent() -> bool:
    """Whether this process was started with others and another of them speaks for all."""
    return launched() > 1 and os.environ["RANK"] != "0"


def rank() -> int:
    """Which of the ranks this process is."""
    return _world.rank if _world else 0


def size() -> int:
    """How many ranks there are."""
    return _world.size if _world else 1


def first() -> bool:
    """Whether this is the rank that writes."""
    return rank() == 0


@contextmanager
def joined(device: str | None) -> Iterator[str | None]:
    """Within, all processes that `torchrun` started work as one; gives the device of this one.

    PlanError if there are not so many GPUs, or the program uses torch.distributed itself. PeerError, in place of what a
    rank raised, in those that did not fail first.
    """
    global _world
    if launched() == 1 or _world is not None:
        yield device
        return
    if dist.is_initialized():
        raise PlanError(
            "torch.distributed is in use by this program", "Quantize before init_process_group, or in another program."
        )
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    met, number, count = next(iter(rendezvous("env://", timeout=_PATIENCE)))
    store = PrefixStore(f"fewbit-{next(_runs)}", met)
    gpu = device != "cpu" and torch.cuda.is_available()
    try:
        device = _own(device) if gpu else device
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_PATIENCE)
        _world = _World(number, count, store)
        yield device
    except BaseException as error:
        if _failed_before(store) and isinstance(error, FewbitError):
            raise PeerError(f"another process of this run failed before: {error.message}", reported=True) from None
        raise
    else:
        dist.destroy_process_group()
    finally:
        _world = None
        if dist.is_initialized() and not gpu:  # with NCCL it would wait for the others; torchrun ends them
            dist.destroy_process_group()


def _failed_before(store: Any) -> bool:
    """Whether another rank has said that it failed; from now on this one has."""
    try:
        return bool(store.add(_FAILED, 1) > 1)
    except RuntimeError:  # who kept the store is gone
        return False


def _own(device: str | None) -> str:
    """The GPU of this process, of those of its machine."""
    local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device not in (None, "cuda"):
        raise PlanError(f"--device {device} names one device for {launched()} processes", "Use cuda, cpu, or neither.")
    if local >= here:
        raise PlanError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes were started on a machine with {here} GPUs",
            f"Start torchrun with --nproc-per-node {here}, or use --device cpu.",
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


@contextmanager
def _with_others() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo has no class of its own for a connection that was closed
        raise PeerError(
            "another process of this run has ended, or cannot be reached",
            f"PyTorch says: {str(error).partition(chr(10))[0][:200]}\nThe same command goes on where this one stopped.",
        ) from error


# --- sharing out -----------------------------------------------------------------------------------------------------


def part(count: int) -> range:
    """Those of `count` things in a row that are this rank's; earlier ranks have the earlier ones."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


def owners(costs: Sequence[float]) -> list[int]:
    """The rank that does each of some jobs: the dearest first, each by who has least to do."""
    load, found = [0.0] * size(), [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        found[job] = min(range(size()), key=load.__getitem__)
        load[found[job]] += costs[job]
    return found


# --- telling one another ---------------------------------------------------------------------------------------------


def add_up(values: Tensor) -> Tensor:
    """`values`, in place, become the sum of all ranks'."""
    if _world:
        with _with_others():
            dist.all_reduce(values)
    return values


def hand_out(values: Tensor, owner: int) -> None:
    """`values`, in place, become those that `owner` has."""
    if _world:
        with _with_others():
            sent = values.contiguous()
            dist.broadcast(sent, owner)
            if sent.data_ptr() != values.data_ptr():
                values.copy_(sent)


def gathered(value: T) -> list[T]:
    """What every rank has, in the order of ranks. Tensors in it must lie on the CPU."""
    if not _world:
        return [value]
    found: list[T | None] = [None] * size()
    with _with_others():
        dist.all_gather_object(found, value)
    return cast(list[T], found)


def to_first(value: T) -> list[T]:
    """In the first rank what every rank has, in the others nothing."""
    if not _world:
        return [value]
    found: list[T | None] = [None] * size()
    with _with_others():
        dist.gather_object(value, found if first() else None, dst=0)
    return cast(list[T], found) if first() else []


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes; in the others it is not called."""
    if not _world:
        return make()
    held = [make() if first() else None]
    with _with_others():
        dist.broadcast_object_list(held, src=0)
    return cast(T, held[0])


def agreed(value: T) -> T:
    """The first rank's `value`: of what all computed and may differ in its last digits, where it decides something."""
    return from_first(lambda: value)
