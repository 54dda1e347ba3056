"""The native library's threads: OpenMP's while they have their cores, its own otherwise."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fewbit import registry
from fewbit.methods.base import Method
from fewbit.schemes.base import parse

TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
PARALLEL = ctypes.CFUNCTYPE(None, TASK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


@pytest.fixture
def use(library: ctypes.CDLL) -> Iterator[Callable[[object], None]]:
    """Gives the library another OpenMP runtime (a function), or none; afterwards it has its own again."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield library.fewbit_use_openmp
    torch.set_num_threads(before)
    library.fewbit_use_openmp(None)
    with contextlib.suppress(AttributeError, TypeError, OSError):  # as in `native.library`
        library.fewbit_use_openmp(ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p))


@pytest.fixture
def product() -> Callable[[Tensor], Tensor]:
    """The product of rows with a weight in 4 bits, which takes several threads."""
    scheme, kernel = parse("int4-g32"), registry.get("kernels", "cpu")()
    weight = Method().quantize(torch.randn(4096, 256, generator=torch.Generator().manual_seed(0)), scheme, None).weight
    prepared = kernel.prepare(scheme, weight.parts, weight.shape)
    return lambda x: kernel.linear(x, scheme, prepared, weight.shape)


def test_own_threads_give_the_same_result_each_time(
    use: Callable[[object], None], product: Callable[[Tensor], Tensor]
) -> None:
    """Also if several threads of the program compute at once, and after pauses in which they fell asleep."""
    inputs = [torch.randn(3, 256) for _ in range(4)]
    expected = [product(x) for x in inputs]
    use(None)

    def equal(number: int) -> bool:
        return all(torch.equal(product(inputs[number]), expected[number]) for _ in range(1000))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(equal, range(4)))
    for _ in range(100):
        time.sleep(0.001)
        assert torch.equal(product(inputs[0]), expected[0])


def test_own_threads_serve_while_those_of_openmp_are_late(
    use: Callable[[object], None], product: Callable[[Tensor], Tensor]
) -> None:
    calls: list[int] = []

    def late(task: Callable[[object], None], data: object, threads: int, flags: int) -> None:
        calls.append(threads)
        task(data)
        time.sleep(0.02)

    runtime = PARALLEL(late)
    x = torch.randn(3, 256)
    expected = product(x)
    time.sleep(0.6)  # on a busy machine, those of OpenMP may have been late already
    use(ctypes.cast(runtime, ctypes.c_void_p))
    for _ in range(50):
        before = len(calls)
        assert torch.equal(product(x), expected)
        if len(calls) == before:
            break
    else:
        pytest.fail("OpenMP's threads serve however late they are")
    assert len(calls) >= 2, "once may be chance"
    time.sleep(0.6)
    before = len(calls)
    assert torch.equal(product(x), expected)
    assert len(calls) == before + 1, "they are tried again"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_copy_of_the_process_computes_without_the_threads(
    use: Callable[[object], None], product: Callable[[Tensor], Tensor]
) -> None:
    """`fork` copies the calling thread only, so nothing may wait for the others."""
    use(None)
    x = torch.randn(3, 256)
    expected = product(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(product(x), expected) for _ in range(20)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
