"""Write docs/gguf.md from the rows of fewbit's GGUF architectures and the tests that compare them with llama.cpp.

`python tools/gguf_table.py`. A test compares the page with what this writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gguf.md"
_HEAD = """\
# Architectures of GGUF files

fewbit writes a GGUF file of these model types of transformers, and loads one with packed weights. The types of tensors
are those of the [plans](reference.md#plans) of the format `gguf`. In a plan or by `--scheme`, any
[scheme](reference.md#schemes) of the families `ggml`, `iq` and `few` works too.

For each of them, tests compare a tiny model with llama.cpp, as in llama-cpp-python 0.3.36:

- llama.cpp's converter makes the same tensors and keys of it.
- llama.cpp computes the same logits from fewbit's file in 32 bits, within 1e-5 in relative norm. 1e-3 where its GELU is
  a table of 16-bit numbers.

`quantize` refuses types that are not in the table, and models with a vision tower, before any work. For these, use a
plan that makes a folder.

- **only if**: what llama.cpp assumes. fewbit refuses models with other values before any work.
- `falcon_h1` multiplies activations by numbers of its config. Like llama.cpp's converter, `quantize` multiplies them
  into the weights, before it measures or quantizes anything. `convert` cannot, and adapters of such models are refused.
- `hrm_text` runs its blocks several times, so it cannot be calibrated. Give `--method rtn`, or an importance matrix
  (`--imatrix`) of llama.cpp.
- Gemma 3n and 4 are for checkpoints of the language model alone. The published checkpoints have towers, so they are
  refused. So is the published model of `sarvam_mla`: it has 32 layers and no latents of queries.
- A published file whose type is in no row is loaded by transformers, if it knows the architecture, without packed
  weights.

"""
_TOWERS = """\
fewbit reads these from a file of llama.cpp (mmproj) beside that of the language model
([how](howto/vision.md#from-gguf-files)), and writes none. For each, tests compare a tiny model: its tensors are those
of the file that llama.cpp's converter makes, and the logits for an image are the original's, within 1e-5 in relative
norm. Processors make the original's ids, pixels and masks of two images of different sizes; those of Pixtral,
Mistral 3, Llama 4, LFM2-VL, Kimi K2.5 and Gemma 4 12B (`gemma4uv`) need torchvision. Older files, in which the up and
the down projection of MLPs are exchanged, are read, too, and those of Llama 4 that have another name for a norm.

A file does not say whether it is from SmolVLM or Idefics 3. fewbit reads both as Idefics 3: for files of SmolVLM, the
logits and the output of the processor are the same as with SmolVLM's own classes.
A file of Gemma 4 does not say whether attention within an image is bidirectional or causal. As in llama.cpp, it is
causal in language models of width 1536 and 2560 (E2B and E4B).
The language model of LLaVA must have the token `<image>`, as conversions of the models in transformers have it; the
vocabulary of plain Vicuna does not. LLaVA 1.6, which cuts images into tiles, is refused.
MiniCPM-V 4.6 is read where 16 patches make one vector (`16x`), as published. Files of `4x` are refused.
Towers for sound are refused. Where Gemma 4 has one beside that for images, it is left out with a warning.

Tests also compare the vectors of an image with those of mtmd, llama.cpp's own library, in llama-cpp-python 0.3.36. They
are the same, within 1e-3, for Gemma 3, LightOnOCR, GLM-4.1V, GLM-4.5V, GLM-OCR, Kimi K2.5, MiniCPM-V 4.6 and Granite 4
Vision. For three others mtmd computes something else than transformers, and fewbit follows transformers:

- InternVL, LLaVA: mtmd puts the class token after the patches. The positions in the file have it first.
- LLaVA: mtmd also leaves out the last block of the file.
- Llama 4: mtmd does not find the norm before each MLP, as the converter gives it another name. It also lists the
  vectors of an image column by column; the model has them row by row.

| `clip.projector_type` | read as | language model | tokens that its vocabulary must have |
|---|---|---|---|"""
# What differs, transformers, llama.cpp, files of fewbit.
_TEXT = (
    ("what", "transformers", "llama.cpp", "files of fewbit"),
    ("---",) * 4,
    (
        "Unicode normalization (NFC) of tokenizers such as Qwen's",
        "normalizes",
        "does not",
        "read with it, as in the original",
    ),
    (
        "combining marks with the patterns `tekken`, `gpt-4o` and `kimi-k2`",
        "letters of a word",
        "split off",
        "read as in the original",
    ),
    (
        "words with capitals inside, with the pattern `kimi-k2`",
        "split before the capital",
        "kept whole",
        "read as in the original",
    ),
    (
        "the first space of SentencePiece",
        "none after a special token or before another space, by the tokenizer's settings",
        "always",
        "the key `fewbit.tokenizer` has the setting, for fewbit; a note when the file is written",
    ),
    (
        "added tokens that take the spaces after them (`rstrip`)",
        "by token",
        "all but three, if the model's name has phi-3 or phi3 in it",
        "the name in the file is changed where it would be wrong: `tuned (phi-3)`, or `phi 3-tuned`",
    ),
    ("added tokens with `lstrip` or `single_word`", "by token", "never", "not written"),
    (
        '`"tokenizer_class": "GPT2Tokenizer"` beside a tokenizer.json with another pattern',
        "GPT-2's pattern",
        "the pattern of tokenizer.json",
        "the pattern of tokenizer.json, and a note",
    ),
    (
        "no key `tokenizer.ggml.add_bos_token`",
        "",
        "by the name in `tokenizer.ggml.pre`",
        "read as by llama.cpp; written with the key",
    ),
)


def page() -> str:
    """The whole page."""
    sys.path[:0] = [str(path) for path in (ROOT,) if str(path) not in sys.path]
    from fewbit.models.gguf.architectures import MISSING, REFUSED, TYPES
    from fewbit.models.gguf.rows.towers import ROWS
    from fewbit.models.gguf.rows.unread_towers import UNREAD
    from tests import gguf_files, mmproj_files

    if mmproj_files.golden().keys() != mmproj_files.KINDS.keys():
        raise SystemExit("the golden values of vision towers are of other kinds than the tests")

    tested = {gguf_files.TYPE_OF.get(kind, kind) for kind in gguf_files.KINDS}
    golden = {gguf_files.TYPE_OF.get(kind, kind) for kind in gguf_files.golden()}
    rows = [(kind, row) for kind in sorted(TYPES) for row in TYPES[kind]]
    if unproved := [kind for kind in TYPES if kind not in golden & tested]:
        raise SystemExit(f"no test compares these with llama.cpp, and the page says so of all: {', '.join(unproved)}")
    lines = ["| type | in the file | only if |", "|---|---|---|"]
    lines += [f"| `{kind}` | {row.name} | {'; '.join(conditions(row))} |" for kind, row in rows]
    lines += [
        "",
        "## Types that llama.cpp computes differently",
        "",
        "fewbit writes no files of these types. A file that another program made is loaded by transformers.",
        "",
    ]
    lines += _reasons(REFUSED)
    lines += ["", "## Types that only llama.cpp writes", ""]
    lines += [
        "llama.cpp's converter and transformers have these types. fewbit does not write their files yet.",
        "",
    ]
    lines += _reasons(MISSING)
    lines += ["", "## Vision towers", "", _TOWERS]
    lines += dict.fromkeys(_tower(row) for row in ROWS)
    lines += ["", "### Towers that are not read", "", "The other projectors of llama.cpp.", ""]
    lines += _reasons(UNREAD, "`clip.projector_type`")
    lines += ["", "## Where transformers and llama.cpp treat text differently", ""]
    lines += ["|---|---|---|---|" if row[0] == "---" else f"| {' | '.join(row)} |" for row in _TEXT]
    return _HEAD + "\n".join(lines) + "\n"


def _tower(row: Any) -> str:
    """The line of a vision tower."""
    tokens = sorted({*row.tokens.values(), *row.named.values()} - {row.beyond})
    said = (", ".join(f"`{each}`" for each in found).replace("|", "\\|") for found in (row.texts, tokens))
    return f"| {row.projector} | `{row.cls}` | {' | '.join(said)} |"


def _reasons(types: Mapping[str, str], head: str = "type") -> list[str]:
    """A table of types and reasons."""
    return [f"| {head} | why |", "|---|---|", *(f"| `{kind}` | {why} |" for kind, why in sorted(types.items()))]


def conditions(row: Any) -> Iterator[str]:
    """What llama.cpp takes for granted of the models of a row."""
    from fewbit.models.gguf.architectures import TYPES  # `page` puts it on the path
    from fewbit.models.gguf.positions import windows

    if (first := TYPES[row.model_type][0]) is not row and not first.chosen and not first.unwoven:
        yield "only read: written as above"
    for key, value in row.chosen.items():
        yield f"`{key}` = {value}" if isinstance(value, int) else f"each of `{key}` is {', '.join(sorted(value))}"
    for key, value in row.required.items():
        yield f"`{key}` = {value}"
    for key, value in row.rope_required.items():
        yield f"`{key}` = {value} in `rope_parameters`"
    if row.square or row.keys.get("head_dim") == "":
        yield "heads as wide as the model"
    if not row.grouped:
        yield "as many key-value heads as heads"
    if row.tied:
        yield "a tied output head"
    if row.untied:
        yield "an output head of its own"
    if row.factors:
        yield "the same factor of a tied embedding and head"
    for key, other in row.equal.items():
        yield f"`{key}` = `{other}`"
    if row.cycles:
        length, high, low = row.cycles
        yield f"`num_hidden_layers` = `{length}` x `{high}` x (`{low}` + 1)"
    if row.twice:
        yield f"`{row.twice}` = 2 x `hidden_size`"
    if row.unturned:
        yield "`position_embedding_type` is not rope"
    if row.unrotated:
        yield f"one layer in {row.unrotated} has no RoPE"
    if row.experts_in:
        yield "experts in one layer of `interleave_moe_layer_step`"
    if row.no_head_norms:
        yield f"`use_qk_norm` = False with {row.no_head_norms} experts, True with others"
    if row.exact_ramp:
        yield "`truncate` = False with YaRN scaling; llama.cpp rounds the limits of its ramp, so its logits then differ"
    if "index_head_dim" in row.counts:
        yield "`index_head_dim` is a multiple of 64"
    if row.expanded:
        yield "`v_head_dim` = `hidden_size` / heads; latents of queries; scaled RoPE without `mscale_all_dim`"
    elif row.latent and not row.rope_required and not row.no_positions:
        yield "YaRN with `mscale` = `mscale_all_dim`"
    if row.lite:
        yield "`q_lora_rank` = None with 26 or 27 layers only"
    if row.regular:
        yield f"a sliding window in all layers but one in {row.period}"
    if row.unshared:
        yield f"`num_kv_shared_layers` leaves {row.unshared} layers with keys and values of their own"
    if row.unshared or "num_kv_shared_layers" in row.integers:
        yield "with `num_kv_shared_layers`, the two layers before these have a sliding window, then full attention"
    if row.sparse:
        yield f"`activation_sparsity_pattern` = 0.95 in the first {row.sparse} layers and 0 in others"
    if row.two_kinds:
        yield "layers with full attention and layers with a sliding window; `use_bidirectional_attention` is not all"
        if "hidden_size_per_layer_input" in row.integers:
            yield "`vocab_size_per_layer_input` = `vocab_size`, if layers have inputs of their own"
        yield "proportional RoPE with factor 1 in layers with full attention"
    if row.local_theta is not None:
        yield f"{windows(row)} in layers with a sliding window"
    if row.turned:
        yield "the layers with RoPE have one base, and at least one layer has RoPE"
    if row.some_window:
        yield "at least one layer with a sliding window"
    if row.one_theta:
        yield "one base of RoPE"
    if row.differs:
        yield row.differs
    if row.unwoven:
        yield "a GGUF file of the language model of GLM-4.1V, GLM-4.6V-Flash or GLM-OCR is the source"
    if row.windowed:
        yield f"sliding windows with {row.windowed} layers, none with others"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
