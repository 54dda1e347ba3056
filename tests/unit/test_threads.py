"""Work that runs in threads with one core each."""

from __future__ import annotations

import threading

import pytest
import torch

from fewbit.system import threads


@pytest.fixture(autouse=True)
def _three_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_each_thread_has_one_core_and_others_keep_theirs() -> None:
    if not threads._one_core():
        pytest.skip("threads cannot be limited here")
    meet = threading.Barrier(3)  # all three run at the same time

    def seen() -> tuple[int, int, int, bool]:
        meet.wait(60)
        return threading.get_ident(), torch.get_num_threads(), threads.entries(), torch.is_grad_enabled()

    found = threads.each([seen] * 3)
    assert len({one[0] for one in found}) == 3
    assert {one[1:] for one in found} == {(1, 1 << 16, False)}
    assert torch.get_num_threads() == 3
    assert threads.entries() < 32768
    assert torch.is_grad_enabled()


def test_results_keep_their_order_and_errors_come_out() -> None:
    assert threads.each([lambda i=i: i * i for i in range(20)]) == [i * i for i in range(20)]  # type: ignore[misc]
    assert threads.each([]) == []

    def fails() -> int:
        raise ValueError("of the second")

    with pytest.raises(ValueError, match="of the second"):
        threads.each([lambda: 1, fails, lambda: 3])
