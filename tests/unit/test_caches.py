"""Cache layers that are written in place behave as those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fewbit.errors import PlanError
from fewbit.models.decoding import caches
from fewbit.models.decoding.caches import InPlaceLayer, ReservedLayer, WindowLayer, in_place

WINDOW = 5
PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "growing": lambda: (InPlaceLayer(), DynamicLayer()),
    "window": lambda: (WindowLayer(WINDOW), DynamicSlidingWindowLayer(WINDOW)),
    "reserved": lambda: (ReservedLayer(64), DynamicLayer()),
}
ORDER = torch.tensor([1, 0])


def states(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values of two texts and three heads; values have another width."""
    made = torch.Generator().manual_seed(100 * tokens + seed)
    return torch.randn(2, 3, tokens, 4, generator=made), torch.randn(2, 3, tokens, 6, generator=made)


def same(ours: Any, theirs: Any) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)


def grow(ours: Any, theirs: Any, *parts: int) -> None:
    for i, tokens in enumerate(parts):
        for a, b in zip(ours.update(*states(tokens, i)), theirs.update(*states(tokens, i)), strict=True):
            assert torch.equal(a, b)
        same(ours, theirs)


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is allocated anew after a few tokens."""
    monkeypatch.setattr(caches, "_ROOM", 4)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("parts", [(1,) * 30, (9, 1, 1, 4, 1, 1), (3, 20, 1), (4, 1, 4, 1)])
def test_tokens_are_kept(kind: str, parts: tuple[int, ...]) -> None:
    grow(*PAIRS[kind](), *parts)


def test_a_reserved_layer_refuses_what_has_no_room() -> None:
    layer = ReservedLayer(4)
    layer.update(*states(3))
    with pytest.raises(PlanError, match=r"takes 5 positions in the cache .* was fused for 4"):
        layer.update(*states(2))
    layer.update(*states(1))
    assert layer.get_seq_length() == 4


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices"])
def test_texts_change_places(kind: str, change: str) -> None:
    ours, theirs = PAIRS[kind]()
    grow(ours, theirs, 3, 1)
    for layer in (ours, theirs):
        getattr(layer, change)(ORDER)
    same(ours, theirs)
    assert not torch.equal(ours.keys, ours.keys[ORDER])
    grow(ours, theirs, 1, 1, 1)


@pytest.mark.parametrize("kind", PAIRS)
def test_texts_are_repeated(kind: str) -> None:
    ours, theirs = PAIRS[kind]()
    grow(ours, theirs, 3, 4)
    for layer in (ours, theirs):
        layer.batch_repeat_interleave(2)
    same(ours, theirs)


@pytest.mark.parametrize("kind", PAIRS)
def test_the_last_tokens_are_removed(kind: str) -> None:
    ours, theirs = PAIRS[kind]()
    grow(ours, theirs, 3, 1)
    for layer in (ours, theirs):
        layer.crop(-2)
    same(ours, theirs)
    grow(ours, theirs, 1, 2)


def test_a_window_that_records_is_cropped() -> None:
    ours, theirs = PAIRS["window"]()
    for layer in (ours, theirs):
        layer.activate_past_recording()
    grow(ours, theirs, 4, 4)
    for crop in (-2, 0):
        ours.crop(crop), theirs.crop(crop)
        same(ours, theirs)
        grow(ours, theirs, 3)


def test_a_full_window_is_not_cropped() -> None:
    ours, theirs = PAIRS["window"]()
    grow(ours, theirs, 8)
    for layer in (ours, theirs):
        with pytest.raises(RuntimeError, match="does not track past states"):
            layer.crop(-1)


@pytest.mark.parametrize("kind", ["growing", "window"])
@pytest.mark.parametrize("parts", [(), (3,), (9, 1)])
def test_layers_of_transformers_are_taken_over(kind: str, parts: tuple[int, ...]) -> None:
    theirs, other = PAIRS[kind]()[1], PAIRS[kind]()[1]
    for each in (theirs, other):
        for i, tokens in enumerate(parts):
            each.update(*states(tokens, i))
    ours = in_place(other)
    assert type(ours) is type(PAIRS[kind]()[0])
    if parts:
        same(ours, theirs)
    grow(ours, theirs, 2, 1, 1)
    assert in_place(ours) is ours


@pytest.mark.parametrize("kind", PAIRS)
def test_after_a_reset_the_layer_is_empty(kind: str) -> None:
    ours, theirs = PAIRS[kind]()
    grow(ours, theirs, 3, 4)
    for layer in (ours, theirs):
        layer.reset()
    assert ours.get_seq_length() == 0
    grow(ours, theirs, 2, 1)


def test_tokens_are_added_after_inference_mode() -> None:
    ours, theirs = PAIRS["growing"]()
    with torch.inference_mode():
        grow(ours, theirs, 2)
    grow(ours, theirs, 1)


@pytest.mark.parametrize("kind", ["growing", "window"])
def test_gradients_pass_through(kind: str) -> None:
    found = []
    for layer in PAIRS[kind]():
        layer.update(*states(2))
        x = states(1)[0].requires_grad_()
        layer.update(x, states(1)[1])
        keys, _ = layer.update(*states(1, 1))
        (grad,) = torch.autograd.grad(keys.square().sum(), x)
        found.append(grad)
    assert torch.equal(*found)
    assert found[0].norm() > 0
