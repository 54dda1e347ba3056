"""Recognize a decoder block by its parts, so that the CPU library can compute it: see `compiled_blocks`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace as changed
from itertools import groupby, product
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.kernels.cpu import block as library
from fewbit.kernels.cpu.block import Norm, Rows, Wiring
from fewbit.nn.fused import Slice
from fewbit.nn.layers import QLinear

ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative distance of equal results
_NORMS = (  # names of the norms before attention, after it, before the MLP, after it; the same twice: of one result
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("input_layernorm", None, "input_layernorm", None),
    ("input_layernorm", None, "pre_feedforward_layernorm", None),
    ("input_layernorm", None, "pre_ff_layernorm", None),
    ("ln_1", None, "ln_2", None),
    ("ln_attn", None, "ln_mlp", None),
    ("norm_1", None, "norm_2", None),
    ("operator_norm", None, "ffn_norm", None),
    ("attention_layernorm", None, "feedforward_layernorm", None),
    ("self_attn_layer_norm", None, "final_layer_norm", None),
)
_OF_HEADS = (("q_norm", "q_layernorm", "query_layernorm"), ("k_norm", "k_layernorm", "key_layernorm"))
ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_MLP = ("mlp", "feed_forward", "block_sparse_moe")
_QKV = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",))
_OUTPUT = (("o_proj",), ("dense",), ("out_proj",), ("c_proj",))
_GATED = (("gate_proj", "up_proj"), ("gate_up_proj",), ("w1", "w3"))
_PLAIN = (("fc1",), ("c_fc",), ("dense_h_to_4h",), ("up_proj",))
_DOWN = (("down_proj",), ("w2",), ("fc2",), ("c_proj",), ("dense_4h_to_h",))
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "kv_a_proj")


class Unlike(Exception):
    """Why a block is not recognized, in a few words."""


def child(module: Any, names: tuple[str, ...]) -> Any:
    """The first of these parts of a module that is there. None without."""
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)


def mlp_of(block: Any) -> Any:
    """The MLP of a block, which is the block itself where its products are among the block's own parts."""
    return block if hasattr(block, "fc1") else child(block, _MLP)


def norm_names(block: Any) -> tuple[str | None, ...]:
    """The names of the norms before attention, after it, before the MLP and after it. Empty if there are others."""
    there = {name for name, module in block.named_children() if _is_norm(module)}
    return next((each for each in _NORMS if {name for name in each if name} == there), ())


def wirings(block: Any) -> tuple[list[Wiring], str]:
    """The ways in which the parts of a block may be wired, and why only up to the end of attention; empty: the whole.

    Without the second half, `gated` is empty and `down` None. Unlike if parts are missing, or there are others.
    """
    attention, mlp = child(block, ATTENTION), mlp_of(block)
    if attention is None or mlp is None:
        what = "no attention" if attention is None else "no MLP"
        raise Unlike(f"{what} of a known name among {_names(block)}")
    if found := [name for name in _LATENT if hasattr(attention, name)]:
        raise Unlike(f"latent attention ({', '.join(found)})")
    if not (names := norm_names(block)):
        raise Unlike(f"norms of other names or places among {_names(block)}")
    if getattr(getattr(attention, "config", None), "clip_qkv", None) is not None:
        raise Unlike("attention clips q, k and v")
    used = set[int]()
    readers = _linears("attention", attention, _QKV, used)
    together = _joins(readers)
    qkv = _rows({**readers, **_linears("MLP", mlp, (*_GATED, *_PLAIN), used)} if together else readers)
    output = _rows(_linears("attention", attention, _OUTPUT, used))[0]
    head = child(attention, ("head_dim", "head_size"))
    if not isinstance(head, int):
        raise Unlike("attention does not say the size of a head")
    heads = output.shape[1] // head
    sizes = [each.out_features for each in readers.values()]
    shared = (sum(sizes) // head - heads) // 2
    if shared < 1 or heads % shared or (len(sizes) == 3 and sizes[0] != heads * head):
        raise Unlike(f"q, k and v of {sizes} rows, for {heads} heads of {head}")
    norms = [_norm(name, getattr(block, name), output.shape[0]) if name else None for name in names]
    for each in _OF_HEADS:
        module = child(attention, each)
        norms.append(None if module is None else _norm(each[0], module, head))
    sinks = getattr(attention, "sinks", None)
    if sinks is not None and sinks.numel() != heads:
        raise Unlike(f"attention has {sinks.numel()} sinks for {heads} heads")
    gated, down, activation, half = _mlp(mlp, used, whole=mlp is block or together)
    ups = sum(linear.out_features for linear in gated.values())
    apart = {id(sinks)} | ({id(p) for p in mlp.parameters()} if mlp is not block else set())
    if others := _others(block, used, apart):
        raise Unlike(f"weights besides the products and norms that are known: {', '.join(others)}")
    made = Wiring(
        qkv, output, [] if together else _rows(gated), down, norms, heads, shared, head, head,
        scale=float(child(attention, ("scaling", "inv_norm_factor")) or head**-0.5),
        cap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        residual=float(getattr(block, "residual_multiplier", 1.0)),
        activation=activation, whole=norms[4] is not None and len(norms[4].weight) != head,
        plain=down is not None and ups == down.shape[1], together=together,
        parallel=names[0] == names[2] is not None, sinks=None if sinks is None else sinks.detach(),
    )  # fmt: skip
    return list(_arranged(made)), half


def _arranged(made: Wiring) -> Iterator[Wiring]:
    """The same parts in each arrangement that their names leave open, the most frequent ones first."""
    layouts = (False,) if len(made.qkv) > 1 or made.shared == 1 or made.whole else (False, True)
    orders = (False,) if made.norms[4] is None else (False, True)
    places = (True,) if made.parallel else (False,) if made.norms[2] is None else (False, True)
    for parallel, late, mixed in product(places, orders, layouts):
        each = changed(made, parallel=parallel, late=late, mixed=mixed)
        for pairs in (library.HALVES, library.NEIGHBORS, library.IN_ORDER):
            yield changed(each, pairs=pairs)
        yield changed(each, rotated=0)


def _mlp(mlp: Any, used: set[int], whole: bool) -> tuple[dict[str, Any], Rows | None, int, str]:
    """Gate and up, or up alone; down; the kind of activation. No products if the MLP is of another kind, and why it is.

    whole: the MLP cannot be computed by its own code, as a part of its own: Unlike in place of a reason.
    """
    try:
        gated = _linears("MLP", mlp, (*_GATED, *_PLAIN), used)
        if not whole:
            _rows(gated)
        down = _rows(_linears("MLP", mlp, _DOWN, used))[0]
        if (width := sum(linear.out_features for linear in gated.values())) not in (down.shape[1], 2 * down.shape[1]):
            raise Unlike(f"MLP with {width} rows before and {down.shape[1]} columns after the activation")
        if others := _others(mlp, used):
            raise Unlike(f"MLP with {', '.join(others)}")
        return gated, down, _activation(child(mlp, ("act_fn", "activation_fn", "act"))), ""
    except Unlike as reason:
        if whole:
            raise
        return {}, None, 0, f"attention only: {reason}"


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _names(owner: nn.Module) -> str:
    return ", ".join(name for name, _ in owner.named_children())


def _others(owner: nn.Module, used: Collection[int], apart: Collection[int] = ()) -> list[str]:
    """The names of parameters of neither norms nor the modules `used`. apart: the ids of others that do not count."""
    known = [each for each in owner.modules() if id(each) in used or _is_norm(each)]
    counted = {id(p) for module in known for p in module.parameters()} | set(apart)
    return [name for name, p in owner.named_parameters() if id(p) not in counted]


def _linears(what: str, owner: Any, choices: tuple[tuple[str, ...], ...], used: set[int]) -> dict[str, Any]:
    """The linears of the first names that are all there. Unlike without. used: gets their ids."""
    for names in choices:
        linears = [getattr(owner, name, None) for name in names]
        if all(isinstance(linear, nn.Module) for linear in linears):
            used.update(map(id, linears))
            return dict(zip(names, linears, strict=True))
    raise Unlike(f"{what} of other products: {_names(owner)}")


def _joins(readers: dict[str, Any]) -> bool:
    """Whether these linears are fused with more that read the same tensor."""
    first = next(iter(readers.values()))
    return isinstance(first, Slice) and len(first.product.rows) > len(readers)


def _rows(named: dict[str, Any]) -> list[Rows]:
    """The packed weights of linears; one weight if they are stacked. Unlike if the library cannot use them."""
    if not named:
        return []
    for name, linear in named.items():
        if not isinstance(linear, QLinear):
            raise Unlike(f"{name} is not packed ({type(linear).__name__})")
    parts = []
    for stacked, those in groupby(named.values(), lambda linear: getattr(linear, "product", None)):
        linears = list(those)
        if stacked is None:
            parts += [(linear, linear.bias) for linear in linears]
        elif [each.index for each in linears] != list(range(len(stacked.rows))):
            raise Unlike(f"{', '.join(named)} are fused with other products")
        else:
            parts.append((stacked.linear, _biases(linears)))
    made = []
    for linear, bias in parts:
        if linear.kernel is None or linear.kernel.name != "cpu" or linear.compute is not None:
            raise Unlike(f"{', '.join(named)}: products of the kernel {linear.kernel and linear.kernel.name}, not cpu")
        order = linear._buffers["permutation"]
        made.append(Rows(linear.codec, linear.prepared, linear.shape, None if bias is None else bias.detach(), order))
    return made


def _biases(slices: Sequence[Slice]) -> Tensor | None:
    """The biases of all rows of a stacked weight; None if no slice has one."""
    if all(each.bias is None for each in slices):
        return None
    some = next(each.bias for each in slices if each.bias is not None)
    return torch.cat([some.new_zeros(each.out_features) if each.bias is None else each.bias for each in slices])


def _norm(name: str, module: Any, size: int) -> Norm:
    """The norm that gives the module's results: with or without the mean, with the weight as it is or one added to it.

    size: of a norm without weight. Both compute in float32: the weights of Gemma are so large that one more is less
    than the rounding of bfloat16.
    """
    own = dict(module.named_parameters())
    if module._forward_hooks:
        raise Unlike(f"{name} has hooks")
    if not own.keys() <= {"weight", "bias"} or any(each.dim() != 1 for each in own.values()):
        raise Unlike(f"{name} is no norm of one weight and bias ({type(module).__name__})")
    ones = torch.ones(size, dtype=torch.float32, device="cpu")
    weight, bias = own.get("weight", ones).detach().float(), own.get("bias")
    bias = None if bias is None else bias.detach().float()
    stated = child(module, ("variance_epsilon", "eps", "epsilon"))
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, len(weight), generator=generator, dtype=torch.float32, device="cpu") + 0.5
    x = x * torch.tensor([[1.0], [1e-3]], dtype=torch.float32, device="cpu")  # the second shows eps
    with torch.inference_mode():
        expected = deepcopy(module).float()(x)
        for centered, eps in product((False, True), (stated,) if isinstance(stated, float) else (1e-5, 1e-6)):
            plain = x.float() - (x.float().mean(-1, keepdim=True) if centered else 0)
            plain = plain * (plain.square().mean(-1, keepdim=True) + eps).rsqrt()
            for each in (weight, 1 + weight):
                found = plain * each if bias is None else plain * each + bias
                if float((found - expected).norm()) <= ROUNDING[torch.float32] * 10 * float(expected.norm()):
                    return Norm(each.clone(), eps, bias, centered)
    raise Unlike(f"{name} gives other results than a norm of its weight ({type(module).__name__})")


def _activation(module: Any) -> int:
    """The kind of an activation; of one that is no part of the MLP, the most frequent one. Unlike for others."""
    if module is None:
        return library.SILU
    x = torch.linspace(-4, 4, 65, dtype=torch.float32, device="cpu")
    known = {
        library.SILU: nn.functional.silu(x),
        library.TANH: nn.functional.gelu(x, approximate="tanh"),
        library.ERF: nn.functional.gelu(x),
        library.RELU: nn.functional.relu(x),
        library.RELU2: nn.functional.relu(x).square(),
        library.QUICK: x * torch.sigmoid(1.702 * x),
    }
    with torch.inference_mode():
        found = module(x)
    for kind, y in known.items():
        if torch.allclose(found, y, atol=1e-6, rtol=1e-5):
            return kind
    raise Unlike(f"activation {type(module).__name__}")
