"""Recognize a decoder block by its parts, so that the CPU library can compute it: see `compiled_blocks`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace as changed
from typing import Any

import torch
from torch import nn

from fewbit.kernels.cpu import block as library
from fewbit.kernels.cpu.block import Norm, Rows, Wiring
from fewbit.nn.fused import Slice
from fewbit.nn.layers import QLinear

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # relative distance of equal results
NORMS = (  # names of the norms before attention, after it, before the MLP, after it
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)
ATTENTION = ("self_attn", "attention", "attn", "self_attention")
MLP = ("mlp", "feed_forward", "block_sparse_moe")
_QKV = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
_OUTPUT = (("o_proj",), ("dense",), ("out_proj",))
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "kv_a_proj")


class Unlike(Exception):
    """Why a block is not recognized, in a few words."""


def child(module: Any, names: tuple[str, ...]) -> Any:
    """The first of these parts of a module that is there. None without."""
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)


def norm_names(block: Any) -> tuple[str | None, ...]:
    """The names of the norms before attention, after it, before the MLP and after it. Empty if there are others."""
    there = {name for name, module in block.named_children() if name.endswith("norm")}
    return next((each for each in NORMS if {name for name in each if name} == there), ())


def wirings(block: Any, dtype: torch.dtype) -> tuple[list[Wiring], str]:
    """The ways in which the parts of a block may be wired, and why only up to the end of attention; empty: the whole.

    Without the second half, `gated` is empty and `down` None. Unlike if parts are missing, or there are others.
    """
    attention, mlp = child(block, ATTENTION), child(block, MLP)
    if attention is None or mlp is None:
        what = "no attention" if attention is None else "no MLP"
        raise Unlike(f"{what} of a known name among {_names(block)}")
    if found := [name for name in _LATENT if hasattr(attention, name)]:
        raise Unlike(f"latent attention ({', '.join(found)})")
    if getattr(attention, "sinks", None) is not None:
        raise Unlike("attention has sinks")
    if found := [name for name, module in block.named_children() if isinstance(module, nn.LayerNorm)]:
        raise Unlike(f"LayerNorm in place of RMSNorm ({', '.join(found)})")
    if not (names := norm_names(block)):
        raise Unlike(f"norms of other names or places among {_names(block)}")
    modules = {name: getattr(block, name) for name in names if name}
    own = {name: getattr(attention, name, None) for name in ("q_norm", "k_norm")}
    found_norms = {name: _norm(name, module, dtype) for name, module in (modules | own).items() if module is not None}
    norms = [found_norms.get(name) if name else None for name in (*names, *own)]
    qkv, output = _joined("attention", attention, _QKV), _joined("attention", attention, _OUTPUT)
    head = getattr(attention, "head_dim", None)
    if not isinstance(head, int):
        raise Unlike("attention does not say the size of a head")
    gated, down, activation, half = _mlp(mlp)
    heads = output[0].shape[1] // head
    shared = (sum(part.shape[0] for part in qkv) // head - heads) // 2
    if shared < 1:
        raise Unlike("q, k and v have other sizes")
    if others := _others(block, {id(p) for p in mlp.parameters()}):
        raise Unlike(f"weights besides packed products and norms: {', '.join(others)}")
    made = Wiring(
        qkv, output[0], gated, down, norms, heads, shared, head, head,
        scale=float(getattr(attention, "scaling", head**-0.5)),
        cap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        residual=float(getattr(block, "residual_multiplier", 1.0)),
        activation=activation, whole=norms[4] is not None and len(norms[4].weight) != head,
    )  # fmt: skip
    turned = [changed(made, pairs=pairs) for pairs in (library.HALVES, library.NEIGHBORS, library.IN_ORDER)]
    return [*turned, changed(made, rotated=0)], half


def _mlp(mlp: Any) -> tuple[list[Rows], Rows | None, int, str]:
    """Gate and up, down, and the kind of activation; no products if the MLP is of another kind, and why it is."""
    try:
        gated = _joined("MLP", mlp, (("gate_proj", "up_proj"), ("gate_up_proj",)))
        down = _joined("MLP", mlp, (("down_proj",),))[0]
    except Unlike as reason:
        return [], None, 0, f"attention only: {reason}"
    if others := _others(mlp):
        return [], None, 0, f"attention only: MLP with {', '.join(others)}"
    activation = _activation(named := child(mlp, ("act_fn", "activation_fn")))
    if activation is None:
        return [], None, 0, f"attention only: activation {type(named).__name__}"
    return gated, down, activation, ""


def _names(owner: nn.Module) -> str:
    return ", ".join(name for name, _ in owner.named_children())


def _others(owner: nn.Module, apart: Collection[int] = ()) -> list[str]:
    """The names of parameters of neither packed linears nor norms. apart: the ids of parameters that do not count."""
    known = [each for each in owner.modules() if isinstance(each, QLinear) or type(each).__name__.endswith("Norm")]
    counted = {id(p) for module in known for p in module.parameters()} | set(apart)
    return [name for name, p in owner.named_parameters() if id(p) not in counted]


def _joined(what: str, owner: Any, choices: tuple[tuple[str, ...], ...]) -> list[Rows]:
    """The packed weights of the first names that are all there; one weight if they are stacked. Unlike without."""
    for names in choices:
        linears = [getattr(owner, name, None) for name in names]
        if all(isinstance(linear, nn.Module) for linear in linears):
            return _rows(dict(zip(names, linears, strict=True)))
    raise Unlike(f"{what} of other products: {_names(owner)}")


def _rows(named: dict[str, Any]) -> list[Rows]:
    for name, linear in named.items():
        if not isinstance(linear, QLinear):
            raise Unlike(f"{name} is not packed ({type(linear).__name__})")
    linears = list(named.values())
    if isinstance(linears[0], Slice):
        product = linears[0].product
        if len(product.rows) != len(linears) or any(getattr(each, "product", None) is not product for each in linears):
            raise Unlike(f"{', '.join(named)} are fused with other products")
        biases = [each.bias for each in linears]
        bias = None
        if any(each is not None for each in biases):
            held = next(each for each in biases if each is not None)
            bias = torch.cat([held.new_zeros(n) if b is None else b for b, n in zip(biases, product.rows, strict=True)])
        parts = [(product.linear, bias)]
    else:
        parts = [(linear, linear.bias) for linear in linears]
    made = []
    for linear, bias in parts:
        if linear.kernel is None or linear.kernel.name != "cpu" or linear.compute is not None:
            raise Unlike(f"{', '.join(named)}: products of the kernel {linear.kernel and linear.kernel.name}, not cpu")
        order = linear._buffers["permutation"]
        made.append(Rows(linear.codec, linear.prepared, linear.shape, None if bias is None else bias.detach(), order))
    return made


def _norm(name: str, module: Any, dtype: torch.dtype) -> Norm:
    """The norm that gives the module's results, for a weight that is multiplied as it is, or with one added."""
    own = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = own.get("weight")
    if module._forward_hooks:
        raise Unlike(f"{name} has hooks")
    if weight is None or len(own) > 1 or weight.dim() != 1 or not isinstance(eps, float):
        raise Unlike(f"{name} is not an RMSNorm with one weight ({type(module).__name__})")
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, len(weight), generator=generator, dtype=torch.float32, device="cpu")
    x = (x * torch.tensor([[1.0], [1e-3]], dtype=torch.float32, device="cpu")).to(dtype)  # the second shows eps
    with torch.inference_mode():
        expected = module(x).float()
        plain = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        for each in (weight.detach().float(), 1 + weight.detach().float()):
            if float((plain * each - expected).norm()) <= ROUNDING[dtype] * 10 * float(expected.norm()):
                return Norm(each.clone(), eps)
    raise Unlike(f"{name} gives other results than an RMSNorm ({type(module).__name__})")


def _activation(module: Any) -> int | None:
    if module is None:
        return None
    x = torch.linspace(-4, 4, 65, dtype=torch.float32, device="cpu")
    known = {
        library.SILU: nn.functional.silu(x),
        library.TANH: nn.functional.gelu(x, approximate="tanh"),
        library.ERF: nn.functional.gelu(x),
    }
    with torch.inference_mode():
        found = module(x)
    return next((kind for kind, y in known.items() if torch.allclose(found, y, atol=1e-6, rtol=1e-5)), None)
