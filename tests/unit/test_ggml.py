"""Block types of ggml: bytes that come back, scales that are solved, and GPTQ on grids of scales in two steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.errors import PlanError
from fewbit.methods import gptq
from fewbit.methods.base import Method, make
from fewbit.schemes.base import Scheme, parse
from fewbit.schemes.ggml import codec, grids
from fewbit.schemes.ggml.digits import DIGITS
from fewbit.schemes.ggml.grids import BlockGrids
from fewbit.schemes.ggml.layout import LAYOUTS, NONLINEAR
from fewbit.schemes.ggml.scheme import GGML
from fewbit.schemes.ggml.search import half
from fewbit.schemes.ggml.table import BLOCK_TYPES
from fewbit.schemes.ggml.vectors import VECTORS
from fewbit.stats import Stats
from tests.contract.cases import inputs, is_sentence, ordinary, stats_of
from tests.unit.test_gptq import check_definition, check_refinement

names = pytest.mark.parametrize("name", LAYOUTS)


def finite_bytes(name: str, n: int, blocks: int) -> Tensor:
    """Rows of random bytes, but for d and dmin, which are fp16 below 2."""
    kind = LAYOUTS[name]
    rows = torch.randint(256, (n * blocks, kind.nbytes), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for start in (kind.d, kind.dmin):
        if start >= 0:
            rows[:, start + 1] &= 0xBF
    return rows.view(n, -1)


def check_bytes_come_back(name: str) -> None:
    """All bits of a block mean something, and are where they were after reading and writing."""
    rows = finite_bytes(name, 5, 3)
    codes, found = grids.unpack(name, rows)
    assert torch.equal(grids.pack(codes, found), rows)


@names
def test_bytes_come_back(name: str) -> None:
    check_bytes_come_back(name)


@names
def test_no_block_means_no_byte(name: str) -> None:
    shape = (0, LAYOUTS[name].columns)
    values = codec(name).dequantize({"blocks": torch.zeros(0, LAYOUTS[name].nbytes).byte()}, shape, torch.float32)
    assert tuple(values.shape) == shape


def test_each_type_has_a_codec_and_a_writable_one_a_scheme() -> None:
    for name, kind in BLOCK_TYPES.items():
        assert str(codec(name)) == name
        assert isinstance(codec(name), Scheme) == (name in {*LAYOUTS, *VECTORS, *DIGITS})
        assert codec(name).why_not((3, kind.columns * 2)) is None
        reason = codec(name).why_not((3, kind.columns + 16))
        assert is_sentence(reason)
        assert str(kind.columns + 16) in str(reason)
        assert codec(name).nbytes((3, 512)) == 3 * 512 // kind.columns * kind.nbytes
    assert codec("q4_k") == parse("q4_k") == GGML(256, "q4_k")
    with pytest.raises(KeyError):
        codec("q4_k_m")


def test_what_is_only_read_says_so() -> None:
    with pytest.raises(PlanError, match="read, not written"):
        parse("iq1_s")
    with pytest.raises(PlanError, match="q4_k"):
        parse("q4_km")


def test_half_keeps_what_is_not_zero() -> None:
    x = torch.tensor([0.0, 1e-30, -1e-30, 1e9, -0.1, 2.0**-25])
    assert half(x).tolist() == [0.0, 2.0**-24, -(2.0**-24), 65504.0, float(torch.tensor(-0.1).half()), 2.0**-24]
    assert torch.equal(half(x / 64, torch.tensor(64.0)) * 64, half(x))


def test_nonlinear_levels_are_the_nearest() -> None:
    """Also where they lie unevenly, under a scale of either sign."""
    levels = torch.tensor(NONLINEAR, dtype=torch.float32)
    x = torch.linspace(-150, 150, 64 * 32).view(64, 32)
    for d in (1.0, -0.5, 2.0**-20):
        found = BlockGrids("iq4_nl", torch.full((64, 1), d), None, None, None)
        best = (x.unsqueeze(-1) - d * levels).abs().amin(-1)
        assert torch.equal((found.decode(found.encode(x)) - x).abs(), best)


def check_solved(name: str) -> None:
    """Under H = diag(h) the blocks do not see one another: no d that a file can hold would be better for the codes."""
    scheme, k = parse(name), 2 * LAYOUTS[name].columns
    w, h = ordinary(6, k, dtype=torch.float64), torch.rand(k, generator=torch.Generator().manual_seed(1)).double() + 0.1
    found = scheme.fit(w, h.float())
    codes = found.encode(w)

    def error(of: BlockGrids) -> Tensor:
        missed: Tensor = ((of.decode(codes) - w).square() * h).unflatten(1, (2, -1))
        return missed.sum(2)

    assert isinstance(found, BlockGrids)
    again = grids.refit(w, codes, found, torch.diag(h), 0.0)
    least = error(again)
    assert (least <= error(found) * (1 + 1e-12)).all()
    for by in (1 + 2.0**-10, 1 - 2.0**-10):
        moved = BlockGrids(name, half(again.d * by), again.dmin, again.sc, again.m)
        assert (least <= error(moved) * (1 + 1e-12)).all()


@names
def test_a_refit_finds_the_best_scales(name: str) -> None:
    check_solved(name)


def check_last(name: str) -> None:
    """d of the last block is the best one for all the others as they now are, to half a unit of fp16."""
    w, hessian = ordinary(16, 768), stats_of(inputs(900, 768)).hessian
    scheme, columns = parse(name), LAYOUTS[name].columns
    found = scheme.fit(w)
    codes = found.encode(w)
    again = scheme.refit(w, codes, found, hessian)
    assert isinstance(again, BlockGrids)
    per_d = torch.zeros_like(w).double()
    per_d[:, -columns:] = (again.decode(codes).double() / again.d.repeat_interleave(columns, 1))[:, -columns:]
    pull = (w - again.decode(codes)).double() @ hessian.double()
    step = (pull * per_d).sum(1) / ((per_d @ hessian.double()) * per_d).sum(1)
    assert (step.abs() <= 1.01 * (again.d[:, -1].abs() * 2.0**-11).clamp(min=2.0**-25)).all()


@pytest.mark.parametrize("name", ["q4_0", "q3_k", "q6_k", "iq4_xs"])
def test_a_refit_heeds_the_blocks_before(name: str) -> None:
    check_last(name)


def check_descent(name: str) -> None:
    """Refits and sweeps never raise tr(E H Eᵀ), across blocks and sub-blocks."""
    check_refinement(name, 2 * LAYOUTS[name].columns if LAYOUTS[name].columns > 32 else 96, True)


@names
def test_no_refinement_raises_the_error(name: str) -> None:
    check_descent(name)


@pytest.mark.parametrize("name", ["q4_1", "iq4_nl", "iq4_xs"])
def test_gptq_is_its_definition(name: str) -> None:
    check_definition(name, LAYOUTS[name].columns if LAYOUTS[name].columns > 32 else 64, True, n=3)


def test_descent_ends_where_no_other_level_is_better() -> None:
    """On levels that lie unevenly, too: of all sixteen, for every weight, with all others held."""
    w, hessian = ordinary(8, 64), stats_of(inputs(300, 64)).hessian
    scheme, order = parse("iq4_nl"), torch.arange(64)
    found = scheme.fit(w, hessian.diagonal())
    codes = found.encode(w)
    for _ in range(30):
        codes, _ = gptq.descend(w, codes, found, hessian, order, run=1)
    error = found.decode(codes) - w
    base = ((error @ hessian) * error).sum(1)
    for column in range(64):
        for code in range(16):
            other = codes.clone()
            other[:, column] = code
            error = found.decode(other) - w
            assert (((error @ hessian) * error).sum(1) >= base * (1 - 1e-4)).all()


@names
def test_the_best_of_what_can_be_searched_is_better_than_a_range(name: str) -> None:
    w = ordinary(16, 512)
    codes, found = parse(name).nearest(w)
    plain = parse(name).fit(w)
    searched, spanned = ((of.decode(of.encode(w)) - w).square().sum(1) for of in (found, plain))
    assert (searched < spanned).all()
    assert float((searched / spanned).mean()) < 0.95
    assert torch.equal(codes, found.encode(w))


@names
def test_what_lies_on_a_grid_stays(name: str) -> None:
    """Weights that were quantized and expanded come back; of k-quants with many sub-scales, nearly all blocks."""
    w = torch.randn(32, 512, generator=torch.Generator().manual_seed(0)) / 50
    codes, found = parse(name).nearest(w)
    values = found.decode(codes)
    codes, again = parse(name).nearest(values)
    assert float((again.decode(codes) - values).norm()) <= 0.05 * float((values - w).norm())
    if name not in ("q4_k", "q5_k", "q6_k"):
        assert torch.equal(again.decode(codes), values)


@names
def test_chunks_of_rows_make_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = ordinary(9, 512), torch.rand(512, generator=torch.Generator().manual_seed(0))
    scheme = parse(name)
    whole, plain = scheme.fit(w, h).encode(w), scheme.nearest(w)[0]
    monkeypatch.setattr("fewbit.schemes.ggml.scheme._CHUNK", {"cpu": 1024})
    assert torch.equal(scheme.fit(w, h).encode(w), whole)
    assert torch.equal(scheme.nearest(w)[0], plain)


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, Tensor], dict[str, Stats]]:
    """Two weights of the embedded model, and what reaches them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(fewbit.__file__).parent / "data"
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float32)
    text = (folder / "texts" / "tiny-calibration.txt").read_text(encoding="utf-8")[:20_000]
    ids = AutoTokenizer.from_pretrained(folder / "tiny")(text, return_tensors="pt").input_ids[:, : 4 * 256]
    block = model.model.layers[3]
    linears = {"q_proj": block.self_attn.q_proj, "down_proj": block.mlp.down_proj}
    measured = {}
    for name, linear in linears.items():
        measured[name] = Stats(linear.in_features, make("gptq").needs)
        linear.register_forward_pre_hook(lambda _, args, name=name: measured[name].add(args[0]))
    with torch.no_grad():
        model(ids.view(-1, 256))
    return {name: linear.weight.detach() for name, linear in linears.items()}, measured


@pytest.mark.parametrize(("name", "most"), [("q2_k", 0.65), ("q3_k", 0.65), ("q4_k", 0.7), ("iq4_xs", 0.65)])
def test_gptq_pays_on_real_weights(name: str, most: float, trained: tuple[dict[str, Tensor], dict[str, Stats]]) -> None:
    """Its error is clearly below that of importance alone, and that below rounding."""
    weights, measured = trained
    for linear, w in weights.items():
        hessian = measured[linear].hessian.double()

        def error(method: Method, w: Tensor = w, hessian: Tensor = hessian, linear: str = linear) -> float:
            missed = (method.quantize(w, parse(name), measured[linear]).weight.dequantize() - w).double()
            return float(((missed @ hessian) * missed).sum())

        nearest, weighed, fed_back = error(Method()), error(make("imatrix")), error(make("gptq"))
        assert weighed < 0.95 * nearest
        assert fed_back < most * nearest
        assert fed_back < 0.85 * weighed
