"""Block types of ggml against llama.cpp's own encoders, in the package llama-cpp-python: what we write loses no more.

Its shared library is called directly (`ggml_quantize_chunk`), the package itself is not imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import fewbit
from fewbit.schemes.base import parse
from fewbit.schemes.ggml.few import Few
from fewbit.schemes.ggml.iq import IQ
from fewbit.schemes.ggml.layout import LAYOUTS
from fewbit.schemes.ggml.scheme import GGML
from fewbit.schemes.ggml.search import fit
from fewbit.schemes.ggml.table import BLOCK_TYPES
from tests.contract.cases import ordinary, quantized

pytestmark = pytest.mark.interop
names = pytest.mark.parametrize("name", GGML.examples)
all_names = pytest.mark.parametrize("name", [*GGML.examples, *IQ.examples, *Few.examples])
few = pytest.mark.parametrize("name", Few.examples)


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    found = find_spec("llama_cpp")
    places = [] if found is None or found.origin is None else list(Path(found.origin).parent.glob("lib/*ggml-base.*"))
    if not places:
        pytest.skip("llama-cpp-python is not installed")
    library = ctypes.CDLL(str(min(places, key=lambda path: len(path.name))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return library


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    """Of the embedded model, and random ones: normal, and with heavy tails."""
    generator = torch.Generator().manual_seed(0)
    found = {"normal": torch.randn(128, 1024, generator=generator) / 50, "heavy": ordinary(128, 768)}
    with safe_open(Path(fewbit.__file__).parent / "data" / "tiny" / "model.safetensors", "pt") as file:
        for layer, linear in ((0, "self_attn.q_proj"), (3, "mlp.down_proj"), (6, "mlp.up_proj")):
            found[f"{layer} {linear}"] = file.get_tensor(f"model.layers.{layer}.{linear}.weight").float().contiguous()
    return found


def importance_of(w: Tensor) -> Tensor:
    """Mean squares as inputs have them: spread over an order of magnitude or two."""
    return torch.randn(w.shape[1], generator=torch.Generator().manual_seed(1)).exp()


def theirs(library: ctypes.CDLL, name: str, w: Tensor, importance: Tensor | None = None) -> Tensor:
    """The values of their encoder."""
    scheme, (n, k) = parse(name), w.shape
    blocks = torch.zeros(scheme.part_specs((n, k))["blocks"].shape, dtype=torch.uint8)
    told = None if importance is None else importance.data_ptr()
    wrote = library.ggml_quantize_chunk(BLOCK_TYPES[name].number, w.data_ptr(), blocks.data_ptr(), 0, n, k, told)
    assert wrote == blocks.numel()
    return scheme.dequantize({"blocks": blocks}, (n, k), torch.float32)


def compare(weights: dict[str, Tensor], error: Callable[[Tensor], tuple[float, float]], most: float) -> None:
    """Ours is below theirs, for each weight."""
    for name, w in weights.items():
        ours, theirs = error(w)
        assert ours <= most * theirs, name


@all_names
def test_with_an_importance_matrix(name: str, library: ctypes.CDLL, weights: dict[str, Tensor]) -> None:
    def error(w: Tensor) -> tuple[float, float]:
        importance = importance_of(w)
        grids = parse(name).fit(w, importance)
        both = grids.decode(grids.encode(w)), theirs(library, name, w, importance)
        ours, other = (float(((values - w).square() * importance).sum()) for values in both)
        return ours, other

    compare(weights, error, 0.995)


@names
def test_under_their_own_weights(name: str, library: ctypes.CDLL, weights: dict[str, Tensor]) -> None:
    """They multiply the importance by sqrt(mean w² + w²), or with the mean twice. So told, we lose less."""

    def error(w: Tensor) -> tuple[float, float]:
        importance, kind = importance_of(w), LAYOUTS[name]
        mean = (2 if name in ("q4_k", "q5_k") else 1) * w.square().mean(1, keepdim=True)
        told = importance * (mean + w.square()).sqrt()
        found = fit(kind, w.reshape(-1, kind.columns), told.reshape(-1, kind.columns))
        scheme = parse(name)
        assert isinstance(scheme, GGML)
        grids = scheme.grids(found, w)
        both = grids.decode(grids.encode(w)), theirs(library, name, w, importance)
        ours, other = (float(((values - w).square() * told).sum()) for values in both)
        return ours, other

    compare(weights, error, 1.0)


@few
def test_any_bytes_mean_the_same_there(name: str, library: ctypes.CDLL) -> None:
    (n, k), kind = (16, 1024), BLOCK_TYPES[name]
    blocks = torch.randint(256, (n, k // kind.columns * kind.nbytes), generator=torch.Generator().manual_seed(0))
    blocks, values = blocks.to(torch.uint8), torch.empty(n, k)
    decode = getattr(library, f"dequantize_row_{name}")
    decode.argtypes, decode.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    decode(blocks.data_ptr(), values.data_ptr(), n * k)
    found = parse(name).dequantize({"blocks": blocks}, (n, k), torch.float32)
    assert torch.equal(found.isnan(), values.isnan())
    assert torch.equal(found.nan_to_num(0.0), values.nan_to_num(0.0))
    codes, grids = parse(name).unpack({"blocks": blocks}, (n, k))
    assert torch.equal(grids.decode(codes).nan_to_num(0.0), values.nan_to_num(0.0))


@few
def test_weights_of_few_levels_give_the_bytes_of_theirs(name: str, library: ctypes.CDLL) -> None:
    low = -1 if name != "q1_0" else 0
    w = torch.randint(low, 2, (8, 1024), generator=torch.Generator().manual_seed(0)).float() / 32
    w = w if name != "q1_0" else 2 * w - 1 / 32
    blocks = torch.zeros(parse(name).part_specs((8, 1024))["blocks"].shape, dtype=torch.uint8)
    library.ggml_quantize_chunk(BLOCK_TYPES[name].number, w.data_ptr(), blocks.data_ptr(), 0, 8, 1024, None)
    grids = parse(name).fit(w)
    assert torch.equal(parse(name).pack(grids.encode(w), grids)["blocks"], blocks)
    assert torch.equal(parse(name).dequantize({"blocks": blocks}, (8, 1024), torch.float32), w)


# Theirs of iq2 end the process without. The scale of q1_0 has a closed form, which both use.
@pytest.mark.parametrize("name", [*GGML.examples, "q2_0", "tq1_0", "tq2_0", "iq3_xxs", "iq3_s"])
def test_without(name: str, library: ctypes.CDLL, weights: dict[str, Tensor]) -> None:
    def error(w: Tensor) -> tuple[float, float]:
        _, grids = parse(name).nearest(w)
        both = grids.decode(grids.encode(w)), theirs(library, name, w)
        ours, other = (float((values - w).square().sum()) for values in both)
        return ours, other

    compare(weights, error, 0.98)


@all_names
def test_they_accept_what_is_written(name: str, library: ctypes.CDLL, weights: dict[str, Tensor]) -> None:
    for w in weights.values():
        blocks = quantized(parse(name), w)["blocks"]
        assert library.ggml_validate_row_data(BLOCK_TYPES[name].number, blocks.data_ptr(), blocks.numel())
