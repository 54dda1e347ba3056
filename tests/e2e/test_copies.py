"""A model that one thread generates with is copied and pickled by another as if nobody used it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit as fb
from fewbit.models.decoding import compiled_blocks
from fewbit.models.decoding.caches import CACHE, reserved
from fewbit.models.decoding.stand_in import PLACE, StandIn
from fewbit.system import native

pytestmark = pytest.mark.usefixtures("rounded_activations")
HOW = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
COPIED = pytest.mark.parametrize("copied", HOW.values(), ids=HOW)
IDS = torch.arange(3, 8)[None]


def written(model: Any) -> list[int]:
    given: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    out: Tensor = model.generate(IDS, attention_mask=torch.ones_like(IDS), **given)
    return list(map(int, out[0]))


def as_on_a_gpu(model: Any, static: bool) -> None:
    """Let a fused model use a static cache."""
    if static:
        model.generate.__self__.static = True


def names(model: Any) -> dict[str, set[str]]:
    """The attributes of each module."""
    return {name: set(vars(module)) for name, module in model.named_modules()}


@contextmanager
def paused(model: Any, calls: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside this context, another thread generates, and waits in the output head in call `calls` of the model."""
    reached, go, seen = Event(), Event(), list[int]()
    own = type(model.lm_head).forward

    def waits(self: Any, x: Tensor) -> Tensor:
        seen.append(0)
        if len(seen) == calls:
            reached.set()
            assert go.wait(60)
        out: Tensor = own(self, x)
        return out

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(type(model.lm_head), "forward", waits)
        text = pool.submit(written, model)
        try:
            assert reached.wait(60)
            yield
        finally:
            go.set()
            text.result()


@COPIED
@pytest.mark.parametrize("kind", ["plain", "fused", "static"])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_model_is_copied_amid_a_call(
    copied: Callable[[Any], Any], kind: str, calls: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fb.load(llama, dtype=torch.float32, fuse=None if kind == "plain" else 48)
    as_on_a_gpu(model, kind == "static")
    before, wanted = names(model), written(model)
    with paused(model, calls, monkeypatch):
        if calls == 3 and (kind == "static" or not isinstance(native.available(), str)):
            assert names(model) != before  # something stands in
        made = copied(model)
        assert names(made) == before
    assert names(model) == before
    as_on_a_gpu(made, kind == "static")
    assert written(made) == written(model) == wanted
    assert compiled_blocks.computed(made) == compiled_blocks.computed(model)


def parts_of(value: Any, seen: set[int]) -> Iterator[Any]:
    """Everything that can be reached from an object by attributes, items and bound methods."""
    if id(value) in seen or isinstance(value, Tensor | type):
        return
    seen.add(id(value))
    yield value
    inner = [getattr(value, "__self__", None), *getattr(value, "__dict__", {}).values()]
    if isinstance(value, dict):
        inner += value.values()
    elif isinstance(value, list | tuple | set):
        inner += value
    for each in inner:
        yield from parts_of(each, seen)


def test_a_copy_amid_a_call_reaches_nothing_of_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fb.load(llama, dtype=torch.float32, fuse=48)
    as_on_a_gpu(model, True)
    written(model)
    with paused(model, 3, monkeypatch):
        reached = parts_of(copy.deepcopy(model), set())
        assert not [each for each in reached if each is model or isinstance(each, StandIn)]


@torch.inference_mode()
def step(model: Any, cache: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS[:, :1], **{CACHE: cache}, use_cache=True).logits
    return out


@COPIED
def test_a_part_is_copied_by_the_thread_that_runs_it(copied: Callable[[Any], Any], llama: Path) -> None:
    model, made = fb.load(llama, dtype=torch.float32), list[Any]()

    def copies(*_: Any) -> None:
        made.append(copied(model.model.layers[1]))

    handle = model.model.norm.register_forward_pre_hook(copies)
    cache = reserved(model, 8)
    step(model, cache)
    handle.remove()
    assert len(made) > 0
    assert all(PLACE not in vars(each) and "forward" not in vars(each) for each in made)


def linear() -> nn.Linear:
    return nn.Linear(2, 2, bias=False).requires_grad_(False)


@pytest.mark.parametrize("given", [False, True])
def test_hooks_run_around_a_stand_in_as_around_a_module(given: bool) -> None:
    """Each hook changes what it gets; one that always runs also runs after an error."""
    outs, notes = list[Tensor](), list[list[Any]]()
    for stands in (False, True):
        torch.manual_seed(0)
        module, seen = linear(), list[Any]()
        own = module.forward

        def before(_: Any, args: Any, kwargs: Any = None, seen: list[Any] = seen) -> Any:
            seen.append("before")
            return (args[0] + 1,) if kwargs is None else ((args[0] + 1,), kwargs)

        def after(_: Any, args: Any, *rest: Any, seen: list[Any] = seen) -> Any:
            seen.append(("after", len(rest), None if rest[-1] is None else rest[-1].shape))
            return None if rest[-1] is None else rest[-1] * 2

        module.register_forward_pre_hook(before, with_kwargs=given)
        module.register_forward_pre_hook(lambda _, args: args[0] * 3)
        module.register_forward_hook(after, with_kwargs=given, always_call=True)
        module.register_forward_hook(lambda *_: None)
        other = StandIn(module, own)
        if stands:
            other.put()
            assert other.serves()
        with torch.no_grad():
            outs.append(module(torch.ones(1, 2)))
            with pytest.raises(RuntimeError):
                module(torch.ones(1, 3))
        other.take_away()
        assert PLACE not in vars(module)
        notes.append(seen)
    assert torch.equal(*outs)
    assert notes[0] == notes[1]
    assert ("after", 1 + given, None) in notes[1]


def test_a_stand_in_leaves_what_others_put_in_its_place() -> None:
    module = linear()
    one, two = (StandIn(module, lambda x, by=by: x * by) for by in (2, 3))
    x = torch.ones(1, 2)
    with torch.no_grad():
        plain = module(x)
        one.put()
        two.put()
        two.take_away()
        assert torch.equal(module(x), 2 * x)
        module.forward = lambda x: x * 5  # type: ignore[method-assign,assignment]
        assert torch.equal(module(x), 5 * x)
        assert not one.serves()
        del module.forward
        with torch.enable_grad():
            assert torch.equal(module(x), plain)
        one.take_away()
        assert torch.equal(module(x), plain)
