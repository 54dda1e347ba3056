"""On an NVIDIA GPU: columns swept by the fused kernel are those of the definition, statistics those of exact sums."""

from __future__ import annotations

import pytest
import torch

from fewbit.schemes.base import parse
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
