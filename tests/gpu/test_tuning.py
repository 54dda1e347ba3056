"""`fewbit doctor --tune` on a GPU: every size that it may choose computes the product, and what it chose is used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fewbit.advise import doctor
from fewbit.kernels.nvidia import Nvidia, in_cuda, layout, ops, sizes, tuning
from fewbit.kernels.nvidia.layout import Recipe
from fewbit.methods.base import Method
from fewbit.nn.choose import TOLERANCE
from fewbit.schemes.base import parse
from tests.contract.cases import ordinary

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Sizes that a test measures are not used in another one."""
    yield
    sizes.tuned.cache_clear()
    ops.choose_again()


@pytest.mark.parametrize("spec", [*sizes.MEASURED, "fp8-b128", "nvfp4", "int2-g64", "nf4-b64-dq"])
@pytest.mark.parametrize("end", sizes.ENDS)
def test_every_size_of_a_range_computes_the_product(end: int, spec: str) -> None:
    """Also where it reads the weight several times, for more rows of activations than it multiplies at once."""
    (n, k), scheme = (400, 1024), parse(spec)
    weight = Method().quantize(ordinary(n, k) + 0.02, scheme, None).weight.map(lambda t: t.cuda())
    w, prepared = weight.dequantize(), Nvidia().prepare(scheme, weight.parts, (n, k))
    how = layout.recipe(scheme, k)
    assert isinstance(how, Recipe)
    x = (torch.randn(end, k, device=GPU) + 0.5).bfloat16()
    exact = x.float() @ w.T
    for each in sizes.candidates(end, in_cuda.hopper(GPU)):
        config = (ops.CUDA, *in_cuda.fitting(each, how, GPU))
        for m in (end, end - 3):
            got = ops.linear(x[:m], prepared, how, n, config).float()
            assert (got - exact[:m]).norm() <= TOLERANCE[torch.bfloat16] * exact[:m].norm(), (each, m)


def test_a_card_is_measured_and_its_sizes_are_used(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(sizes, "MEASURED", ("int4-g128",))
    monkeypatch.setattr(tuning, "K", 1024)
    monkeypatch.setattr(tuning, "N", (1024, 4096))
    monkeypatch.setattr(tuning, "COLD", 10_000_000)
    assert doctor.look().tuned == dict.fromkeys(doctor._cards())
    told = list[tuple[int, int]]()
    done = tuning.tune(GPU, lambda at, total: told.append((at, total)))
    assert told == [(i, len(sizes.ENDS)) for i in range(len(sizes.ENDS) + 1)]
    assert Path(done.path).parent == own_cache / "kernels"
    for each in done.times:
        assert all(0 < after <= 1.03 * before < math.inf for before, after in zip(each.before, each.after, strict=True))
    sizes.tuned.cache_clear()  # as in another process
    own = sizes.tuned(GPU)
    assert isinstance(own, sizes.Tuned), own
    assert doctor.look().tuned[torch.cuda.get_device_name(GPU)] == own.made
    (n, k), scheme = (1024, 1024), parse("int4-g128")
    weight = Method().quantize(ordinary(n, k), scheme, None).weight.map(lambda t: t.cuda())
    w, prepared = weight.dequantize(), Nvidia().prepare(scheme, weight.parts, (n, k))
    how = layout.recipe(scheme, k)
    assert isinstance(how, Recipe)
    for m in (1, 12, 50, 100, 300, 1500, 3000):
        expected = sizes.fullest(sizes.within(own.ranges["int4-g128"], m), n, how, GPU)
        config = (ops.VALUES,) if expected is None else (ops.CUDA, *expected)
        assert ops.choose(m, n, k, how, GPU) == config
        x = torch.randn(m, k, device=GPU).bfloat16()
        got, exact = Nvidia().linear(x, scheme, prepared, (n, k)).float(), x.float() @ w.T
        assert (got - exact).norm() <= TOLERANCE[torch.bfloat16] * exact.norm(), m


@pytest.mark.parametrize("spec", sizes.MEASURED)
def test_all_sizes_of_the_built_in_table_can_be_timed(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "K", 1024)
    monkeypatch.setattr(tuning, "N", (1024, 2048))
    monkeypatch.setattr(tuning, "COLD", 1_000_000)
    clock, hopper = tuning._Clock(GPU), in_cuda.hopper(GPU)
    how = layout.recipe(parse(spec), 1024)
    assert isinstance(how, Recipe)
    for m in (1, 16, 64, 256, 2048):
        for each in (None, *sizes.candidates(m, hopper)):
            of = each and in_cuda.fitting(each, how, GPU)
            assert 0 < clock(spec, 2048, m, of) < 10_000, (m, of)


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "K", 1024)
    monkeypatch.setattr(tuning, "N", (1024,))
    clock, linear = tuning._Clock(GPU), ops.linear
    assert clock("int4-g128", 1024, 8, None) < math.inf
    monkeypatch.setattr(ops, "linear", lambda *given: 1.05 * linear(*given))
    assert clock("int4-g128", 1024, 8, None) == math.inf
