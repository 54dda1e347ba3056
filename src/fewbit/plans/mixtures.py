"""The mixtures of llama.cpp: a file type such as Q4_K_M is a set of rules that choose a scheme for each tensor.

Weights that matter most for their size get more bits: the attention values (v), the MLP's down projection (both in the
first and last eighth of the layers and in every third layer between), and the output head (the token embeddings if the
two are tied). If the blocks of a scheme do not divide a tensor's rows, a fallback scheme with smaller blocks is used.
The rules and the file type numbers are those of `llama-quant.cpp` and `llama.h` of llama.cpp, as in llama-cpp-python
0.3.36. They know 8 experts as those of Mixtral, whose small keys and values get 8 bits. Experts and shared experts are
MLPs as any other.

>>> model = Model("llama", layers=8, gqa=2, tied=True)
>>> tensors = {f"blk.{i}.attn_v": (64, 256) for i in range(8)} | {"token_embd": (4096, 256)}
>>> schemes("q4_k_m", tensors, model)["token_embd"]
'q6_k'
>>> [schemes("q4_k_m", tensors, model)[f"blk.{i}.attn_v"] for i in range(4)]
['q6_k', 'q4_k', 'q4_k', 'q6_k']
>>> schemes("q4_k_m", {"blk.0.ffn_up": (1536, 576)}, model)
{'blk.0.ffn_up': 'q5_0'}
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fewbit.lazy import Tensor

PREFIX = "mixture:"  # marks a mixture where a plan has a scheme; q6_k, for example, names both a scheme and a mixture

Shape = tuple[int, int]


@dataclass(frozen=True)
class Model:
    """What the rules need to know of a model.

    `gqa`: query heads per key-value head of the first layer, 0 if it has no attention. `tied`: whether the embeddings
    are also the output head. `names`: module -> name of its weight in a GGUF file, without `.weight`. `orders`: module
    -> the column of its weight that each column of the file is, int64 [K], where these differ. `transposed`: modules
    whose rows are no rows of a file. `experts`: those of a layer.
    """

    arch: str  # GGUF's name of the architecture
    layers: int
    gqa: int
    tied: bool
    names: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, Tensor] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    experts: int = 0

    def in_block(self, module: str) -> bool:
        """Whether a module is in a block. The others are the embeddings and the head."""
        return self.names[module].startswith("blk.")


@dataclass(frozen=True)
class Mixture:
    """`base`: the scheme of tensors without a special rule. `file_type`: the number in the file's metadata."""

    base: str
    file_type: int


MIXTURES = {
    "q2_k": Mixture("q2_k", 10),
    "q3_k_s": Mixture("q3_k", 11),
    "q3_k_m": Mixture("q3_k", 12),
    "q3_k_l": Mixture("q3_k", 13),
    "q4_0": Mixture("q4_0", 2),
    "q4_k_s": Mixture("q4_k", 14),
    "q4_k_m": Mixture("q4_k", 15),
    "q5_k_s": Mixture("q5_k", 16),
    "q5_k_m": Mixture("q5_k", 17),
    "q6_k": Mixture("q6_k", 18),
    "q8_0": Mixture("q8_0", 7),
    "iq2_xxs": Mixture("iq2_xxs", 19),
    "iq2_xs": Mixture("iq2_xs", 20),
    "iq2_s": Mixture("iq2_xs", 28),
    "iq2_m": Mixture("iq2_s", 29),
    "iq3_xxs": Mixture("iq3_xxs", 23),
    "iq3_xs": Mixture("iq3_s", 22),
    "iq3_s": Mixture("iq3_s", 26),
    "iq3_m": Mixture("iq3_s", 27),
    "iq4_nl": Mixture("iq4_nl", 25),
    "iq4_xs": Mixture("iq4_xs", 30),
    "mxfp4_moe": Mixture("q8_0", 38),
    "tq1_0": Mixture("tq1_0", 36),
    "tq2_0": Mixture("tq2_0", 37),
    "q1_0": Mixture("q1_0", 40),
    "q2_0": Mixture("q2_0", 41),
}
_EXPERTS = {"mxfp4_moe": "mxfp4"}  # mixture -> the scheme of its experts; all else has the base

# The file type of a file with one scheme throughout: that of the mixture which is closest to the pure scheme.
_PLAIN = {"q4_1": 3, "q5_0": 8, "q5_1": 9, "mxfp4": 38}
_PLAIN |= {m.base: m.file_type for m in reversed(MIXTURES.values())}
_PLAIN |= {name: m.file_type for name, m in MIXTURES.items() if name == m.base}

_BLOCKS = dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4"), 32) | {"q2_0": 64, "q1_0": 128}
_FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}
_FALLBACK |= dict.fromkeys(("tq1_0", "tq2_0", "q2_0", "q1_0"), "q4_0")  # llama.cpp has none for q1_0, and stops
_FALLBACK |= dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), "iq4_nl")
# The mixtures that give the attention's output more bits in models of 8 experts.
_OUTPUT_OF_8 = {
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q4_k_s",
    "q4_k_m",
    "iq3_xxs",
    "iq3_xs",
    "iq3_s",
    "iq3_m",
    "iq4_nl",
    "iq4_xs",
}
_MIXTRAL = 8  # experts
_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")
# The mixtures of about two bits, and the scheme of those tensors that get more.
_TWO_BITS = {"iq2_xxs": "q2_k", "iq2_xs": "q2_k", "iq2_s": "iq3_s", "iq2_m": "iq3_s"}
# Mixture -> role -> scheme, the same in all layers.
_ROLES = {
    "q2_k": {"attn_output": "q3_k"},
    "q3_k_m": {"attn_output": "q4_k"},
    "q3_k_l": {"attn_output": "q5_k"},
    "iq2_xxs": {"token_embd": "q2_k"},
    "iq2_xs": {"token_embd": "q2_k"},
    "iq2_s": {"token_embd": "iq3_s", "attn_output": "iq3_s"},
    "iq2_m": {"token_embd": "iq3_s", "attn_output": "iq3_s"},
    "iq3_xxs": {"token_embd": "iq3_s", "attn_output": "iq3_s", "attn_q": "iq2_s", "attn_k": "iq2_s"},
    "iq3_xs": {"attn_q": "iq3_xxs", "attn_k": "iq3_xxs"},
    "iq3_m": {"attn_output": "q4_k"},
    **{mixture: {"token_embd": "q4_k"} for mixture in ("tq1_0", "tq2_0", "q2_0")},
}
# The rules of Falcon that differ: of the attention's output, and of the MLP's down projection. The latter's schemes are
# those of the first sixteenth of the layers, of those that get more bits, and of the others.
_FALCON = {mixture: _ROLES[mixture] for mixture in _TWO_BITS} | {"q3_k_l": {"attn_output": "q4_k"}}
_FALCON_DOWN = {
    "q3_k_m": ("q5_k", "q4_k", "q3_k"),
    "q3_k_l": ("q4_k", "q4_k", "q4_k"),
    "q4_k_s": ("q4_k", "q4_k", "q4_k"),
    "q4_k_m": ("q6_k", "q5_k", "q4_k"),
}


_SMALL = ("altup_", "laurel_")  # Gemma 3n's, which llama.cpp leaves in 16 bits


def file_type(plain: str) -> int:
    """The file type of a file with the scheme `plain` throughout; 1 (F16) if llama.cpp has no file type for it."""
    return _PLAIN.get(plain, 1)


def schemes(mixture: str, tensors: Mapping[str, Shape], model: Model, *, weighed: bool = True) -> dict[str, str | None]:
    """Tensor -> its scheme in `mixture`; None if it stays in 16 bits.

    These are tensors that are small, and those whose rows no scheme's blocks divide.

    `tensors`: all tensors that may be quantized, by their names in a GGUF file without `.weight`, with shapes [N, K].
    `weighed`: whether an importance matrix, or statistics that contain one, weights the errors.
    """
    found: dict[str, str | None] = {}
    seen = Counter[str]()  # how many of a role were seen so far: llama.cpp uses these counts as layer indices
    all_values = sum(_role(name) in _VALUES for name in tensors)
    for name in sorted(tensors, key=order):
        role, columns = _role(name), tensors[name][1]
        if role.startswith(_SMALL):
            found[name] = None
            continue
        if mixture in _EXPERTS:
            scheme = _EXPERTS[mixture] if role.endswith("_exps") else MIXTURES[mixture].base
        elif role == "output" or (role == "token_embd" and model.tied):
            scheme = "q8_0" if model.arch == "falcon" else _head(mixture, columns)
        elif role in _VALUES:
            scheme = _value(mixture, seen["values"], all_values, model, weighed)
            seen["values"] += 1
        elif (part := _mlp(role)) == "ffn_down":
            scheme = _down(mixture, _place(name, seen[part], model), seen[part], model, weighed)
        elif part and mixture == "iq3_xs" and _inner(_place(name, seen[part], model), model.layers):
            scheme = "iq3_xxs"
        elif model.experts == _MIXTRAL and role in ("attn_k", "attn_output"):
            scheme = _of_8(mixture, role)
        else:
            roles = _FALCON if model.arch == "falcon" and role == "attn_output" else _ROLES
            scheme = roles.get(mixture, {}).get(role, MIXTURES[mixture].base)
        seen[_mlp(role)] += 1
        found[name] = _fitting(scheme, columns)
    return {name: found[name] for name in tensors}


def _head(mixture: str, columns: int) -> str:
    base = MIXTURES[mixture].base
    if base == "q8_0" or columns % _block(base):
        return "q8_0"
    return "q5_k" if mixture in _TWO_BITS or mixture == "iq3_xxs" else "q6_k"


def _mlp(role: str) -> str:
    """The part of the MLP that a tensor is, be it of experts or shared experts; "" for other tensors."""
    return next((part for part in ("ffn_down", "ffn_gate", "ffn_up") if role.startswith(part)), "")


def _place(name: str, seen: int, model: Model) -> int:
    """The index of a tensor's layer as the rules have it: by its name, if there are experts, else by those seen."""
    return order(name)[0] if model.experts > 1 else seen


def _of_8(mixture: str, role: str) -> str:
    """The scheme of keys and of the attention's output in models of 8 experts."""
    if role == "attn_k":
        return "q4_k" if mixture in _TWO_BITS else "q8_0"
    return "q5_k" if mixture in _TWO_BITS or mixture in _OUTPUT_OF_8 else MIXTURES[mixture].base


def _value(mixture: str, i: int, count: int, model: Model, weighed: bool) -> str:
    scheme = MIXTURES[mixture].base
    shared = model.gqa >= 4  # many query heads share one value head: v is small and matters as much
    if mixture in _TWO_BITS:
        return "q4_k" if shared or model.experts >= _MIXTRAL // 2 else _TWO_BITS[mixture]
    if model.experts == _MIXTRAL:
        return "q8_0"
    if mixture == "q2_k":
        scheme = "q4_k" if shared else "q3_k"
    elif mixture == "iq3_m" or (mixture in ("iq3_xxs", "iq3_xs", "iq3_s") and shared):
        scheme = "q4_k"
    elif mixture == "iq3_xxs" and not weighed:
        scheme = "iq3_s"
    elif mixture == "q3_k_m":
        scheme = "q5_k" if i < 2 else "q4_k"
    elif mixture == "q3_k_l" or (mixture in ("iq4_nl", "iq4_xs") and shared) or (mixture == "q4_k_s" and i < 4):
        scheme = "q5_k"
    elif mixture in ("q4_k_m", "q5_k_m") and _more(i, count):
        scheme = "q6_k"
    if scheme in ("q3_k", "q4_k") and _is_70b(model):
        scheme = "q5_k"
    return scheme


def _down(mixture: str, i: int, seen: int, model: Model, weighed: bool) -> str:
    """The scheme of a down projection. i: its layer. seen: how many came before it."""
    layers = model.layers
    early = i < layers // 8
    if model.arch == "falcon" and mixture in _FALCON_DOWN:
        first, more, rest = _FALCON_DOWN[mixture]
        return first if i < layers // 16 else more if _more(i, layers) else rest
    if mixture in _TWO_BITS:
        return _TWO_BITS[mixture] if seen < layers // 8 else MIXTURES[mixture].base
    if mixture == "iq3_m" and (early or (model.experts == _MIXTRAL and _more(i, layers))):
        return "q4_k"
    if mixture == "iq3_xxs" and not weighed:
        return "q4_k" if early else "q3_k"
    if mixture == "q2_k":
        return "q3_k"
    if mixture == "q3_k_m":
        return "q5_k" if i < layers // 16 else "q4_k"
    if mixture == "q3_k_l" or (mixture == "q4_k_s" and early):
        return "q5_k"
    if mixture in ("q4_k_m", "q5_k_m") and _more(i, layers):
        return "q6_k"
    if mixture in ("iq4_nl", "iq4_xs") and early and not weighed:
        return "q5_k"
    if mixture == "q4_0" and early and weighed:
        return "q4_1"
    return MIXTURES[mixture].base


def _more(i: int, count: int) -> bool:
    """Whether layer `i` gets more bits: the first and last eighth of the layers, and every third between."""
    return not _inner(i, count) or (i - count // 8) % 3 == 2


def _inner(i: int, count: int) -> bool:
    """Whether layer `i` is in neither the first nor the last eighth."""
    return count // 8 <= i < 7 * count // 8


def _is_70b(model: Model) -> bool:
    return model.layers == 80 and (model.arch == "qwen2" or (model.arch == "llama" and model.gqa > 1))


def _fitting(scheme: str, columns: int) -> str | None:
    if columns % _block(scheme):
        scheme = _FALLBACK.get(scheme, scheme)
    return None if columns % _block(scheme) else scheme


def _block(scheme: str) -> int:
    return _BLOCKS.get(scheme, 256)


def _role(name: str) -> str:
    role = name.rpartition(".")[2]
    return "token_embd" if role == "per_layer_token_embd" else role


def order(name: str) -> tuple[int, str]:
    """A sort key for GGUF tensor names: layer by layer, in llama.cpp's order."""
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)
