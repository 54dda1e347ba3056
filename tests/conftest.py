"""What all tests share: caches of their own, and the demo model made once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fewbit.errors import PlanError
from fewbit.models import smollm2

with contextlib.suppress(ModuleNotFoundError):  # the environment with nothing but `fewbit[finetune]` has none
    import hypothesis

    # Its limits for one example and for making data are wall-clock times.
    hypothesis.settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the fixtures of each test: what it draws without a generator does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def kept_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder that outlives the session. It is there for the demo model, which takes seconds to make."""
    cache: pytest.Cache | None = getattr(request.config, "cache", None)
    place = cache.mkdir("fewbit") if cache is not None else tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWBIT_CACHE", str(place))
        yield place


@pytest.fixture(scope="session", autouse=True)
def exact_activations() -> Iterator[None]:
    """Models compute what they say: a kernel that rounds activations is tested by itself, against its own rule."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWBIT_ACTIVATIONS", "exact")
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small matrices gain little from more threads, and lose much to waiting where the machine has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """What is imported is no garbage: a full collection takes 1 ms without it, and 250 ms with it.

    transformers collects twice at the end of each engine, and the pipeline after each block.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest,
    kept_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An empty cache folder for this test alone, but for the demo model where it was made already."""
    if request.path.match("unit/test_smollm2.py"):  # which compare the folder itself, and set what else they need
        return kept_cache
    place = tmp_path_factory.mktemp("cache")
    if (kept_cache / smollm2.NAME).is_dir():
        (place / smollm2.NAME).symlink_to(kept_cache / smollm2.NAME)
    monkeypatch.setenv("FEWBIT_CACHE", str(place))
    return place


@pytest.fixture(scope="session")
def demo(kept_cache: Path) -> Path:
    """The folder of the demo model."""
    try:
        smollm2.gguf_file()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEWBIT_CACHE", str(kept_cache))
            return smollm2.folder()
    except PlanError as error:
        pytest.skip(str(error))
