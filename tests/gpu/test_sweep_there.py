"""On an NVIDIA GPU: columns swept by the fused kernel are those of the definition, statistics those of exact sums."""

from __future__ import annotations

import pytest
import torch

from fewbit.schemes.base import parse
from fewbit.stats import Need, Stats
from tests.contract.cases import ordinary
from tests.unit.test_sweep import DIFFERENT, SWEPT, shares

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.mark.parametrize("spec", SWEPT)
def test_the_fused_panel_is_the_definition_there(spec: str) -> None:
    pytest.importorskip("triton")
    assert max(found := shares("cuda", spec, SWEPT[spec])) <= DIFFERENT, found


def test_a_wide_weight_there() -> None:
    pytest.importorskip("triton")
    found = shares("cuda", "int4-g128-sym", 2048, 1024)
    print("share of codes that differ, 1024 x 2048:", found)
    assert max(found) <= DIFFERENT, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_statistics_there_are_exact_sums(dtype: torch.dtype) -> None:
    x = (torch.randn(4096, 256) @ torch.randn(256, 256)).to(dtype)
    weight = torch.rand(4096) + 0.1
    before = torch.backends.cuda.matmul.fp32_precision
    stats = Stats(256, Need.HESSIAN, "cuda")
    for part in range(4):
        rows = slice(part * 1024, (part + 1) * 1024)
        stats.add(x[rows].cuda(), weight[rows].cuda())
    exact = (x.double().T * weight.double()) @ x.double() / weight.double().sum()
    found = stats.hessian.double().cpu()
    # Factors of 11 bits where the activations had 8; float32 stays float32.
    assert float((found - exact).norm() / exact.norm()) < (1e-4 if dtype == torch.bfloat16 else 1e-6)
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("spec", ["nf4-b64-dq", "int4-g128", "q4_k"])
def test_larger_chunks_there_choose_the_same(spec: str) -> None:
    w, scheme = ordinary(512, 1024), parse(spec)
    importance = torch.rand(1024) + 0.1
    here, there = (scheme.fit(w.to(d), importance.to(d)) for d in ("cpu", "cuda"))
    near = scheme.nearest(w.cuda())[0].cpu() != scheme.nearest(w)[0]
    assert float(near.float().mean()) < 0.01
    lost = []
    for grids, device in ((here, "cpu"), (there, "cuda")):
        error = grids.decode(grids.encode(w.to(device))).cpu() - w
        lost.append(float((error.square() * importance).sum()))
    assert lost[1] == pytest.approx(lost[0], rel=1e-3)
