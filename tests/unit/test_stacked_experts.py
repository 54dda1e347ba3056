"""Stacked experts compute what the packed linears of each expert do, and give these linears back."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from benchmarks import experts_gpu, gpu
from fewbit.errors import KernelError
from fewbit.kernels.base import Kernel
from fewbit.kernels.reference import Reference
from fewbit.models import experts
from fewbit.models.separated import SeparateBatchedExperts
from fewbit.models.stacking import pack
from fewbit.nn.experts import ExpertSlice, QExperts
from fewbit.nn.fused import packed_linears
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import QTensor, parse
from tests import architectures, models
from tests.contract.cases import quantized, same_bytes
from tests.unit.test_experts import LAYOUTS, fused_experts, routed

Choice = Callable[[str], str]


def packed(kind: str, spec: str | Choice = "int4-g32", *, permuted: bool = False, together: bool = True) -> Any:
    """A random model with packed experts: stacked, or each linear with its own weight."""
    model = fused_experts(kind)
    experts.separate(model)
    weights: dict[str, QTensor] = {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and experts.is_of_expert(f"{name}."):
            scheme = parse(spec if isinstance(spec, str) else spec(name))
            n, k = linear.weight.shape
            order = torch.randperm(k, generator=torch.Generator().manual_seed(len(name) + int(name.split(".")[-2])))
            parts = quantized(scheme, linear.weight.detach())
            weights[name] = QTensor(scheme, (n, k), parts, order if permuted else None)
            layer = QLinear(k, n, linear.bias, name)
            layer.placeholders = {"weight": "weight"}
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)

    def weight_of(name: str, layer: QLinear) -> QTensor:
        layer.placeholders = {}
        return weights[name]

    if together:
        pack(model, weight_of, lambda layers: None, torch.float32, None)
    else:
        for name, layer in packed_linears(model).items():
            layer.adopt(weight_of(name, layer), torch.float32)
    return model


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, experts.SeparateExperts)]


def given(module: Any, tokens: int = 30) -> tuple[Tensor, ...]:
    """Inputs of a layer; expert 0 gets many rows, expert 1 none."""
    if isinstance(module, SeparateBatchedExperts):
        return (torch.randn(module.count * tokens, 64, generator=torch.Generator().manual_seed(1)),)
    return routed(module, tokens)


@pytest.mark.parametrize("kind", [*LAYOUTS, "llama4_text"])
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("permuted", [False, True])
def test_stacked_experts_compute_what_each_does(kind: str, tokens: int, permuted: bool) -> None:
    together, apart = (packed(kind, permuted=permuted, together=each) for each in (True, False))
    assert any(isinstance(m, QExperts) for m in together.modules())
    for one, other in zip(layers(together), layers(apart), strict=True):
        assert one._stacks() is not None
        assert other._stacks() is None
        with torch.no_grad():
            torch.testing.assert_close(one(*given(one, tokens)), other(*given(other, tokens)))


def test_one_product_serves_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layers(packed("qwen3_moe"))[0]
    kernel, calls = type(module.get_submodule("0").up_proj.kernel), list[int]()
    grouped = kernel.grouped

    def counted(self: Kernel, x: Tensor, *rest: Any) -> Tensor:
        calls.append(len(x))
        return grouped(self, x, *rest)  # type: ignore[no-any-return]

    monkeypatch.setattr(kernel, "grouped", counted)
    with torch.no_grad():
        module(*routed(module, 3))
    assert calls == [6, 6]  # gate and up, then down


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("permuted", [False, True])
def test_gradients_are_those_of_each_expert(kind: str, permuted: bool) -> None:
    found = []
    for together in (True, False):
        module = layers(packed(kind, permuted=permuted, together=together))[0]
        hidden, *rest = given(module)
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in (hidden, *rest)]
        module(*leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves if leaf.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_linears_of_experts_are_still_there() -> None:
    together, apart = (packed("mixtral", permuted=True, together=each) for each in (True, False))
    own, theirs = packed_linears(together), packed_linears(apart)
    assert list(own) == list(theirs)
    for name, linear in own.items():
        assert isinstance(linear, ExpertSlice)
        a, b = linear.qtensor(), theirs[name].qtensor()
        assert same_bytes(a.parts, b.parts)
        assert a.codec == b.codec == linear.codec
        assert torch.equal(linear.weight.detach().clone(), theirs[name].weight.detach().clone())
        x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(linear(x), theirs[name](x))


def test_nothing_is_counted_twice() -> None:
    together, apart = (packed("mixtral", together=each) for each in (True, False))
    sizes = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (together, apart)]
    assert sizes[0] == sizes[1]
    counts = [sum(p.numel() for p in m.parameters()) for m in (together, apart)]
    assert counts[0] == counts[1]


def test_experts_that_read_the_same_tensor_are_told_apart() -> None:
    module = layers(packed("qwen3_moe"))[0]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    linears = [module.get_submodule(str(e)).gate_proj for e in range(4)]
    assert len({float(linear(x).sum()) for linear in linears}) == 4


def test_copies_casts_and_tokens_without_an_expert() -> None:
    model = packed("qwen3_moe")
    twin = copy.deepcopy(model).to(torch.bfloat16)
    module, copied = layers(model)[0], layers(twin)[0]
    hidden, chosen, weights = routed(module, 6)
    with torch.no_grad():
        want = module(hidden, chosen, weights)
        got = copied(hidden.bfloat16(), chosen, weights.bfloat16())
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() < 0.02 * want.norm()
        assert not module(hidden, torch.full((6, 2), module.count), weights).any()
        both = module(hidden, torch.tensor([[0, 4]] * 6), weights)
        torch.testing.assert_close(both, module.run(0, hidden) * weights[:, :1])


class Doubled(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) * 2
        return out


def test_a_wrapped_linear_and_a_hook_are_called() -> None:
    module = layers(packed("qwen3_moe"))[0]
    inputs, heard = routed(module, 6), list[int]()
    with torch.no_grad():
        plain = module(*inputs)
        third = module.get_submodule("3")
        third.down_proj = Doubled(third.down_proj)
        doubled = module(*inputs)
        third.down_proj = third.down_proj.base
        assert torch.equal(module(*inputs), plain)
        handle = third.up_proj.register_forward_hook(lambda m, x, y: heard.append(len(y)))
        module(*inputs)
        assert heard == [6]
        handle.remove()
        assert module._stacks() is not None
        only = [expert if expert == 3 else module.count for expert in inputs[1].flatten().tolist()]
        of_third = module(inputs[0], torch.tensor(only).view(6, 2), inputs[2])
    torch.testing.assert_close(doubled, plain + of_third)


def by_leaf(name: str) -> str:
    return "int4-g32" if "gate" in name else "int8-g32"


def test_gate_and_up_may_have_other_schemes() -> None:
    together, apart = (packed("qwen3_moe", by_leaf, together=each) for each in (True, False))
    for one, other in zip(layers(together), layers(apart), strict=True):
        assert [len(group) for group in one._stacks()] == [1, 1, 1]
        with torch.no_grad():
            torch.testing.assert_close(one(*given(one)), other(*given(other)))


def test_experts_of_mixed_schemes_are_said_to_be_slow() -> None:
    def mixed(name: str) -> str:
        return "int8-g32" if ".2." in name and "up" in name else "int4-g32"

    with pytest.warns(UserWarning, match=r"experts and those of 1 more layers .*slow: they differ in scheme: .*int8"):
        together = packed("qwen3_moe", mixed)
    apart = packed("qwen3_moe", mixed, together=False)
    for one, other in zip(layers(together), layers(apart), strict=True):
        assert one._stacks() is None
        with torch.no_grad():
            torch.testing.assert_close(one(*given(one)), other(*given(other)))


def test_scales_of_a_whole_weight_are_kept_for_each() -> None:
    together, apart = (packed("qwen3_moe", "nf4-b32-dq", together=each) for each in (True, False))
    for one, other in zip(layers(together), layers(apart), strict=True):
        assert [len(group) for group in one._stacks()] == [1, 1, 1]
        with torch.no_grad():
            torch.testing.assert_close(one(*given(one)), other(*given(other)))


@pytest.mark.parametrize("spec", ["nf4-b64-dq", "fp8-b128", "int4-g32"])
def test_the_benchmark_gives_each_expert_its_own_scales(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CUDA", torch.device("cpu"))
    layer, x = experts_gpu.Layer(spec, 4, 192, 64), torch.randn(2, 192, dtype=torch.bfloat16)
    for held in (layer.up, layer.down):  # 384 and 192 blocks of 64 each, not a multiple of 256
        assert held.of_expert(3).dequantize().shape == (held.rows, held.in_features)
    ends = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    y = layer.up(x, ends)
    for row, expert in enumerate((1, 3)):
        exact = x[row].float() @ layer.up.of_expert(expert).dequantize().T
        assert (y[row].float() - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("spec", ["nf4-b64-dq", "fp8-b128"])
def test_one_weight_of_all_experts_cannot_be_cut(spec: str) -> None:
    """Its offset, or a block of its scales, belongs to the rows of several experts."""
    scheme = parse(spec)
    weight = QTensor(scheme, (4 * 16, 64), quantized(scheme, torch.randn(4 * 16, 64)))
    with pytest.raises(KernelError, match="cannot be cut into the parts of 4 weights"):
        QExperts(4, 64, 16).adopt(weight, torch.float32)


def test_a_kernel_that_groups_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.nn import choose

    monkeypatch.setattr(choose, "_verdicts", {})
    name = packed("qwen3_moe").model.layers[0].mlp.experts.get_submodule("0").up_proj.kernel.name
    if name == "reference":
        pytest.skip("no other kernel supports this machine")
    monkeypatch.setattr(choose, "_verdicts", {})
    kernel = type(packed("qwen3_moe").model.layers[0].mlp.experts.get_submodule("0").up_proj.kernel)
    monkeypatch.setattr(choose, "_verdicts", {})
    grouped = kernel.grouped
    monkeypatch.setattr(kernel, "grouped", lambda self, *a: grouped(self, *a).roll(1, 0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = packed("qwen3_moe")
    assert any("differs from the reference" in str(w.message) for w in caught)
    assert not any(isinstance(m, QExperts) and m.kernel is not None and m.kernel.name == name for m in model.modules())


class Cut(Reference):
    """A kernel with a layout of its own."""

    def prepare(self, *args: Any) -> Any:
        return super().prepare(*args)


def test_a_layout_of_its_own_cannot_be_cut_by_default() -> None:
    scheme = parse("int4-g32")
    assert Kernel.why_not_grouped(Reference(), scheme, (4, 32, 64)) is None
    assert "cannot be cut" in str(Cut().why_not_grouped(scheme, (4, 32, 64)))


@pytest.mark.parametrize("plan", ["rtn-4bit", "nf4", "int8"])
def test_a_loaded_model_is_stacked_and_saved_as_it_was(plan: str, tmp_path: Path) -> None:
    fewbit.quantize(architectures.save(tmp_path / "model", "qwen3_moe"), tmp_path / "out", plan=plan, device="cpu")
    model = fewbit.load(tmp_path / "out", device="cpu", dtype="float32")
    assert all(module._stacks() is not None for module in layers(model))
    model.save_pretrained(tmp_path / "again")
    before, after = models.tensors_of(tmp_path / "out"), models.tensors_of(tmp_path / "again")
    assert same_bytes(before, after)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        for module in layers(model):
            module.state["groups"] = None
        torch.testing.assert_close(model(input_ids=ids).logits, logits)
        torch.testing.assert_close(model.dequantize()(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-3)


def test_the_module_can_be_imported_first() -> None:
    """It imports transformers, and that imports fewbit's quantizer, which uses the module."""
    subprocess.run([sys.executable, "-c", "import fewbit.models.stacking"], check=True)
