"""llama.cpp's quantizer gives the tensors of a tiny model of every architecture the types that fewbit's plans give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbit.formats.containers.gguf import PLAIN, GgufFile
from fewbit.models.gguf import names
from fewbit.models.outline import Outline
from fewbit.models.source import locate
from fewbit.pipeline import write_gguf
from fewbit.pipeline.settled import Settled
from fewbit.plans.mixtures import MIXTURES
from fewbit.plans.plan import find
from tests import gguf_files
from tests.interop import llama_cpp as peer

pytestmark = [pytest.mark.interop, pytest.mark.skipif(bool(peer.missing()), reason=peer.missing() or "")]

# What llama.cpp quantizes and fewbit leaves in 16 bits: the halves of a matrix of latents, one of them transposed; what
# sets how fast a state decays.
IN_16_BITS = ("attn_k_b", "attn_v_b", "ssm_alpha", "ssm_beta", "ssm_ba")
# Widths that blocks of 256 divide, and 8 experts as Mixtral's
_WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
_EXPERTS: dict[str, Any] = {**_WIDE, "moe_intermediate_size": 256}
WIDE: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {**_EXPERTS, "num_key_value_heads": 1}),
    ("qwen3_moe", {**_EXPERTS, "num_experts": 8}),
    ("mixtral", {**_WIDE, "num_local_experts": 8}),
    ("mixtral", {**_WIDE, "num_local_experts": 8, "num_key_value_heads": 1}),
    ("deepseek_v2", {**_EXPERTS, "first_k_dense_replace": 2}),
    ("deepseek_v3", {**_EXPERTS, "first_k_dense_replace": 2}),
    ("glm4_moe", {**_EXPERTS, "first_k_dense_replace": 2}),
    ("sarvam_moe", {**_EXPERTS, "head_dim": 64, "num_key_value_heads": 1}),
]


def theirs(source: Path, out: Path, mixture: str) -> tuple[dict[str, str], bool]:
    """The types that llama.cpp gives, and whether it needed an importance matrix."""
    entries = GgufFile(source).entries.values()
    ones = {
        each.name: np.ones(each.shape[-1] * (each.shape[0] if len(each.shape) > 2 else 1), np.float32)
        for each in entries
    }
    for weighed in (False, True):
        try:
            peer.quantize(source, out, MIXTURES[mixture].file_type, ones if weighed else None)
        except RuntimeError:
            assert not weighed
            continue
        break
    return {name: entry.type for name, entry in GgufFile(out).entries.items()}, weighed


def ours(folder: Path, mixture: str, *, weighed: bool) -> dict[str, str]:
    """The types that fewbit's plan gives. All pieces of a matrix have the type of the first, which is here alone."""
    plan = find(mixture).changed(method="imatrix" if weighed else "rtn")
    settled = Settled.of(Outline(locate(folder)), plan)
    known = names.routes(settled.skeleton.config)
    return {known[each.name].names[0]: each.entry.type for each in write_gguf.planned(settled)}


def differs(name: str, wanted: str, found: str) -> bool:
    """Whether the type of a tensor is another. All that is not quantized is the same."""
    if found in PLAIN:
        return wanted not in PLAIN and not name.removesuffix(".weight").endswith(IN_16_BITS)
    return wanted != found


def compared(
    kind: str, changes: dict[str, Any], mixtures: Sequence[str], tmp_path: Path
) -> dict[tuple[str, str], tuple[str, str]]:
    """(mixture, tensor) -> the types of llama.cpp and of fewbit, where they differ."""
    folder = gguf_files.save(tmp_path / "m", kind, **changes)
    source = gguf_files.written(folder, tmp_path / "m.gguf", "f16")
    differing = {}
    for mixture in mixtures:
        wanted, weighed = theirs(source, tmp_path / "out.gguf", mixture)
        for name, found in ours(folder, mixture, weighed=weighed).items():
            if differs(name, wanted[name], found):
                differing[mixture, name] = (wanted[name], found)
    return differing


@pytest.mark.parametrize(("kind", "changes"), WIDE, ids=lambda case: case if isinstance(case, str) else None)
def test_experts_get_the_types_of_llama_cpp(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert not compared(
        kind, changes, ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "iq3_xs", "iq4_xs", "mxfp4_moe"), tmp_path
    )


# Heads of linear attention that are a block wide: the file has these in another order
_WIDTHS = ("linear_key_head_dim", "linear_value_head_dim")
_REORDERED = {kind: dict.fromkeys(_WIDTHS, 32) for kind in ("qwen3_5_text", "qwen3_5_moe_text")}
# Four query heads share a key-value head
_SHARED: list[tuple[str, dict[str, Any]]] = [
    (kind, {"num_key_value_heads": 1})
    for kind in ("jamba", "granitemoehybrid", "lfm2", "gemma3", "laguna", "mimo_v2_flash")
]
_SHARED += [("falcon", {"num_kv_heads": 1}), ("qwen3_5_text", {"num_key_value_heads": 1, **_REORDERED["qwen3_5_text"]})]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [*((kind, _REORDERED.get(kind, {})) for kind in gguf_files.KINDS), *_SHARED],
    ids=lambda case: case if isinstance(case, str) else None,
)
def test_every_architecture_gets_the_types_of_llama_cpp(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert not compared(kind, changes, ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "iq4_xs"), tmp_path)


@pytest.mark.parametrize("keys", [2, 4])
@pytest.mark.parametrize(("kind", "changes"), [("qwen3_5_text", _WIDE), ("qwen3_5_moe_text", _EXPERTS)])
def test_columns_in_another_order(kind: str, changes: dict[str, Any], keys: int, tmp_path: Path) -> None:
    """With fewer key heads than value heads, a file has the columns of ssm_out in another order."""
    heads = {"linear_num_key_heads": keys, "linear_num_value_heads": 4, **dict.fromkeys(_WIDTHS, 128)}
    mixtures = ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs", "iq3_m", "q4_0")
    assert not compared(kind, {**changes, "num_hidden_layers": 4, **heads}, mixtures, tmp_path)
