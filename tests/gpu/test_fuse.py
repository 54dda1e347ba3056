"""On a GPU a fused model's step is one CUDA graph, and writes the text that it wrote before."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit import api
from fewbit.models.decode import Decoder
from fewbit.plan import find
from tests import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LENGTH = 48


def greedy(model: Any, ids: Tensor, new: int = 24) -> list[list[int]]:
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None)
    return [[int(token) for token in row] for row in out]


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int4-g32"])
def test_the_text_is_the_same_token_for_token(family: str, scheme: str, tmp_path: Path) -> None:
    ids = torch.randint(3, models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1)).cuda()
    api.quantize(
        models.save(tmp_path / "original", family), tmp_path / "out", plan=find("rtn-4bit").changed(scheme=scheme)
    )
    plain = fewbit.load(tmp_path / "out", dtype=torch.float32, device="cuda")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "not fused")
        fused = fewbit.load(tmp_path / "out", dtype=torch.float32, device="cuda", fuse=LENGTH)
    decoder: Decoder = fused.generate.__self__
    for prompt in (ids, ids.flip(1), ids[:1]):
        assert greedy(fused, prompt) == greedy(plain, prompt)
        if decoder.static:
            assert decoder.graph is not None
            assert decoder.graph.graph is not None  # recorded, not given up
    assert decoder.static is not False or "opt" in family  # whose code takes no mask but its own in some versions


def test_a_step_that_waits_for_the_gpu_is_said_and_run(tmp_path: Path) -> None:
    ids = torch.randint(3, models.VOCAB, (1, 9), generator=torch.Generator().manual_seed(1)).cuda()
    api.quantize(models.save(tmp_path / "original", "llama"), tmp_path / "out", plan=find("int8"))
    plain = fewbit.load(tmp_path / "out", dtype=torch.float16, device="cuda", kernel="llm_int8")
    expected = greedy(plain, ids)
    fused = fewbit.load(tmp_path / "out", dtype=torch.float16, device="cuda", kernel="llm_int8", fuse=LENGTH)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph"):
        got = greedy(fused, ids)
    assert got == expected
    assert greedy(fused, ids) == expected  # and without a word the second time
