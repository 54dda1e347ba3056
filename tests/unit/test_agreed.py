"""Linears that a server computes as one matrix get one global scale."""

from __future__ import annotations

import torch

from fewbit.methods.base import make
from fewbit.pipeline import agreed
from fewbit.plans.plan import Assignment
from fewbit.schemes.base import parse
from tests.contract.cases import ordinary, quantized

SHAPES = {
    "attn.q_proj": (64, 32),
    "attn.k_proj": (16, 32),
    "attn.o_proj": (32, 64),
    **{f"mlp.experts.{e}.{name}": (16, 32) for e in range(2) for name in ("gate_proj", "up_proj")},
    "mlp.experts.0.down_proj": (32, 16),
}
WEIGHTS = {name: ordinary(*shape, seed=i) * 10 ** (i % 3) for i, (name, shape) in enumerate(SHAPES.items())}
TOGETHER = [
    {"attn.q_proj", "attn.k_proj"},
    {"attn.o_proj"},
    {"mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"},
    {"mlp.experts.1.gate_proj", "mlp.experts.1.up_proj"},
    {"mlp.experts.0.down_proj"},
]


def assigned(spec: str) -> dict[str, Assignment]:
    return {name: Assignment(name, shape, parse(spec), make("rtn")) for name, shape in SHAPES.items()}


def test_linears_of_a_module_with_one_input_size_agree() -> None:
    found = agreed.agreed(assigned("nvfp4"), WEIGHTS.__getitem__)
    assert found == assigned("nvfp4")
    scales = {name: float(quantized(a.scheme, WEIGHTS[name])["global"][0, 0]) for name, a in found.items()}
    for names in TOGETHER:
        whole = torch.cat([WEIGHTS[name].flatten() for name in names])[None]
        assert {scales[name] for name in names} == {float(quantized(parse("nvfp4"), whole)["global"][0, 0])}
    assert len(set(scales.values())) > 2


def test_linears_with_different_schemes_need_not_agree() -> None:
    wanted = assigned("nvfp4") | {"attn.k_proj": Assignment("attn.k_proj", (16, 32), parse("int4-g32"), make("rtn"))}
    found = agreed.agreed(wanted, WEIGHTS.__getitem__)
    assert vars(found["attn.q_proj"].scheme)["span"] is None
    assert found["attn.k_proj"] is wanted["attn.k_proj"] or found["attn.k_proj"] == wanted["attn.k_proj"]


def test_weights_are_not_read_for_schemes_that_need_not_agree() -> None:
    def read(name: str) -> torch.Tensor:
        raise AssertionError(name)

    assert agreed.agreed(assigned("int4-g16"), read) == assigned("int4-g16")
    assert agreed.agreed(assigned("fp8-row"), read) == assigned("fp8-row")
