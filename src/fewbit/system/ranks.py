"""One run in several processes, as `torchrun` starts them: ranks, work sharing and communication.

Inside `joined`, a *rank* is one of `size` processes, each with its own device. All ranks run the same code in the same
order and share the work: `part` splits a range of windows, `owners` assigns jobs. Outside `joined` the world size is 1
and the communication functions return their input, so a single process needs no separate code path.

Tensors on GPUs use NCCL; tensors on CPUs and Python objects use gloo. A rank that fails records this in the rendezvous
store before it exits. A rank that crashes closes its connections, so the calls of ranks that wait for it fail.
"""

from __future__ import annotations

import atexit
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

from fewbit.checks import Device
from fewbit.errors import FewbitError, PeerError, PlanError
from fewbit.lazy import Tensor, torch
from fewbit.lazy import distributed as dist

T = TypeVar("T")
# Long, because one rank may work alone for hours. A rank that died is detected by its closed connections, not by this.
_TIMEOUT = timedelta(days=2)
_FAILED, _HERE = "failed", "here"
_PATIENCE = 5.0  # seconds; a process that was killed records nothing
_START = timedelta(minutes=5)  # how much later another process may start to run; importing PyTorch can take a minute

SHARED = ("quantize", "imatrix", "evaluate", "finetune")  # verbs, and commands, whose work all processes share
EACH = ("load", "generate", "inspect", "estimate", "recommend", "preview")  # verbs that any process may call by itself


@dataclass(frozen=True)
class _World:
    rank: int
    size: int
    device: Device


_world: _World | None = None
_runs = itertools.count()  # numbers the runs, so that the store's keys of an earlier run are not taken for this one's
_joins = 0  # how often this process has joined the others
_told: BaseException | None = None  # the last error that this process told the others before it joined them
_alone: ContextVar[bool] = ContextVar("alone", default=False)  # inside `one_process`


def launched() -> int:
    """How many processes `torchrun` started; 1 where it did not start this one, and inside `one_process`."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or _alone.get():  # torch need not be imported to know
        return 1
    return int(os.environ["WORLD_SIZE"]) if dist.is_available() and dist.is_torchelastic_launched() else 1


def silent() -> bool:
    """Whether this process prints nothing, because rank 0 of a `torchrun` launch prints for all."""
    return launched() > 1 and os.environ["RANK"] != "0"


def watched() -> bool:
    """Whether an agent of `torchrun` watches this process. It ends all processes as soon as it sees that one failed."""
    return "TORCHELASTIC_USE_AGENT_STORE" in os.environ


def rank() -> int:
    """The rank of this process, from 0."""
    return _world.rank if _world else 0


def size() -> int:
    """The world size: how many ranks there are."""
    return _world.size if _world else 1


def first() -> bool:
    """Whether this is rank 0, the only one that writes files."""
    return rank() == 0


@contextmanager
def one_process(verb: str) -> Iterator[None]:
    """Run a verb that does not share its work. Rank 0 may call it and computes alone; PlanError in the others."""
    if (count := launched()) > 1 and os.environ["RANK"] != "0":
        raise PlanError(
            f"{verb} runs in one process, and this is process {os.environ['RANK']} of {count}",
            "Call it only where the variable RANK is 0, or without torchrun.",
        )
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def joined(device: Device) -> Iterator[Device]:
    """Join all processes that `torchrun` started into one run. Yields the device of this process.

    PlanError if there are fewer GPUs than processes, or if the program already uses torch.distributed. If another rank
    failed first, PeerError replaces a `FewbitError` raised in this one.
    """
    global _world, _joins
    if launched() == 1 or _world is not None:
        yield device
        return
    _joins += 1
    if dist.is_initialized():
        raise PlanError(
            "this program already uses torch.distributed", "Quantize before init_process_group, or in another program."
        )
    store, number, count = _met(_TIMEOUT)
    device = None if device == "auto" else device
    gpu = device != "cpu" and torch.cuda.is_available()
    failed = False
    try:
        device = _own(device) if gpu else device
        _await_all(store, count)
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_TIMEOUT)
        _world = _World(number, count, device)
        yield device
    except BaseException as error:
        failed = True
        if _failed_before(store) and isinstance(error, FewbitError):
            raise PeerError(f"another process of this run failed before: {error.message}", reported=True) from None
        raise
    else:
        dist.destroy_process_group()
    finally:
        _world = None
        if dist.is_initialized() and not gpu:  # with NCCL this would wait for the other ranks; torchrun ends them
            dist.destroy_process_group()
        if failed and number == 0:
            _await_the_others(store, count)


@contextmanager
def telling() -> Iterator[None]:
    """Around what ranks do before they join, such as checks of arguments: one that fails there tells the others.

    They would wait for it in `joined`. If another rank failed first, PeerError replaces the error.
    """
    global _told
    joins = _joins
    try:
        yield
    except Exception as error:
        if launched() == 1 or _world is not None or _joins != joins or isinstance(error, PeerError) or error is _told:
            raise
        _told = error
        try:
            store, number, count = _met(_START)
            told_before = _failed_before(store)
            if number == 0:
                _await_the_others(store, count)
        except (RuntimeError, OSError):  # the others cannot be reached
            raise error from None
        if told_before and (isinstance(error, FewbitError) or hasattr(error, "format_message")):
            raise PeerError(f"another process of this run failed before: {error}", reported=True) from None
        raise


def _met(timeout: timedelta) -> tuple[Any, int, int]:
    """The store of this run, which all ranks share, the rank of this process, and how many there are."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    met, number, count = next(iter(rendezvous("env://", timeout=timeout)))
    return PrefixStore(f"fewbit-{next(_runs)}", met), number, count


def _await_all(store: Any, count: int) -> None:
    """Wait until all ranks are here. PeerError if one has failed instead."""
    store.add(_HERE, 1)
    while store.add(_HERE, 0) < count:
        if store.add(_FAILED, 0):
            raise PeerError("another process of this run failed before it joined this one", reported=True)
        time.sleep(0.02)


def connected(device: Device) -> str:
    """Join all processes that `torchrun` started, until this one ends. Returns the device of this process.

    Inside `joined`, or if the program uses torch.distributed already, its processes are the ranks. PlanError without
    torchrun, and as `joined`.
    """
    global _world
    if _world is None:
        if launched() == 1:
            raise PlanError(
                "`tensor_parallel` in one process", "Start the program by torchrun --nproc-per-node N, or leave it out."
            )
        gpu = device != "cpu" and torch.cuda.is_available()
        device = _own(None if device == "auto" else device) if gpu else "cpu"
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_TIMEOUT)
            if not gpu:  # NCCL would wait here for the CUDA graphs that have its calls
                atexit.register(dist.destroy_process_group)
        _world = _World(dist.get_rank(), dist.get_world_size(), device)
    return str(_world.device or "cpu")


def _await_the_others(store: Any, count: int) -> None:
    """Keep the store, which ends with this process, until the other ranks have recorded their failures."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and store.add(_FAILED, 0) < count:
        time.sleep(0.02)


def _failed_before(store: Any) -> bool:
    """Record that this rank failed. Whether another rank had recorded a failure before."""
    try:
        return bool(store.add(_FAILED, 1) > 1)
    except RuntimeError:  # the process that hosts the store is gone
        return False


def _own(device: Device) -> str:
    """The GPU of this process: the one with the index of its local rank."""
    local, started, here = int(os.environ["LOCAL_RANK"]), os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
    if device not in (None, "cuda"):
        raise PlanError(f"`device={device}` names one device for {launched()} processes", "Use cuda, cpu, or neither.")
    if int(started) > here:
        raise PlanError(
            f"{started} processes were started on a machine with {here} GPUs",
            f"Start torchrun with --nproc-per-node {here}, or use `device=cpu`.",
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


@contextmanager
def peer_errors(*, computes: bool = False) -> Iterator[None]:
    """Replace errors of communication by PeerError. computes: the block also computes; its other errors stay."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo raises plain RuntimeError for a closed connection
        if not _world or (computes and not re.search("gloo|NCCL", str(error))):
            raise
        raise PeerError(
            "another process of this run has ended, or cannot be reached",
            f"PyTorch says: {str(error).partition(chr(10))[0][:200]}\nRun the same command again to resume.",
        ) from error


# --- sharing work ----------------------------------------------------------------------------------------------------


def part(count: int) -> range:
    """The indices below `count` that belong to this rank: one contiguous range per rank, in rank order."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


def owners(costs: Sequence[float]) -> list[int]:
    """For each job the rank that runs it. Greedy: most expensive job first, each to the rank with the least load."""
    load, found = [0.0] * size(), [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        found[job] = min(range(size()), key=load.__getitem__)
        load[found[job]] += costs[job]
    return found


# --- communication ---------------------------------------------------------------------------------------------------


def all_reduce(values: Tensor) -> Tensor:
    """All-reduce: replace `values` in place by the sum over all ranks. Returns `values`."""
    if _world:
        with peer_errors():
            dist.all_reduce(values)
    return values


def broadcast(values: Tensor, owner: int) -> None:
    """Broadcast: replace `values` in place by those of rank `owner`."""
    if _world:
        with peer_errors():
            sent = values.contiguous()
            dist.broadcast(sent, owner)
            if sent.data_ptr() != values.data_ptr():
                values.copy_(sent)


def all_gather(value: T) -> list[T]:
    """All-gather: the `value` of every rank, in rank order. Tensors in it must be on the CPU."""
    if not _world:
        return [value]
    found: list[T | None] = [None] * size()
    with peer_errors():
        dist.all_gather_object(found, value)
    return cast(list[T], found)


def gather_to_first(value: T) -> list[T]:
    """Gather: on rank 0 the `value` of every rank, in rank order; on other ranks an empty list."""
    if not _world:
        return [value]
    found: list[T | None] = [None] * size()
    with peer_errors():
        dist.gather_object(value, found if first() else None, dst=0)
    return cast(list[T], found) if first() else []


def run_on_first(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 only and broadcast its result to all ranks."""
    if not _world:
        return make()
    held = [make() if first() else None]
    with peer_errors():
        dist.broadcast_object_list(held, src=0)
    return cast(T, held[0])


def agreed(value: T) -> T:
    """Rank 0's `value`, on every rank.

    Every rank computes the value, but its last digits may differ between ranks. Use this before the value decides
    something, so that all ranks decide alike.
    """
    return run_on_first(lambda: value)
