"""Write docs/models.md from the tables of the tests, which quantize a tiny model of every type.

`python tools/models_table.py`. A test compares the page with what this writes.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
PLANS = ("gptq-4bit", "awq-4bit", "nf4", "int8")
_HEAD = """\
# Models

fewbit finds the linears of a model by itself; it has no list of architectures. The tests quantize a tiny random model
of every type that transformers {version} has, load it, and compare its outputs with transformers' own model with the
quantized weights. This page is made from the table of those tests.

- **Quantized**: every linear in the blocks, with each expert of a mixture of experts, also if a checkpoint stores the
  experts of a layer, or q, k and v, as one tensor.
- **In 16 bits**: embeddings, norms, convolutions, state space parameters, vision and audio towers, encoders. The output
  head, routers, gates of shared experts and decay rates of gated delta nets too, unless a rule of the plan names them.
- **calibrated**: `gptq-4bit` and `awq-4bit`. **other**: `nf4` and `int8`. Other plans of the same methods behave alike.
- Layers that share what an indexer of an earlier layer selects (`indexer_types` with "shared", as in GLM 5.2) cannot be
  calibrated yet, nor can models that run their blocks more than once. Plans without calibration work.
- **no**: `quantize` ends with an error that says why, and leaves no output.
- **GGUF**: also written and read as a GGUF file, with the conditions on [its page](gguf.md). No model with a tower is
  written; of some, [both files](gguf.md#vision-towers) are read.
"""
# The sentence for each reason in the tests' tables, which have patterns of error messages.
_SAYS = {
    "too large": "not tested: its smallest config is too large for a test",
    "PIL|timm": "not tested: its vision tower needs the package timm",
    "scipy": "not tested: its audio tower needs the package scipy",
    "shared_kv_states cannot be None": "drafts for another model, and does not run on text",
    "changes rwkv.blocks.0.attention.output.weight in its forward pass": "changes its weights before it runs",
    "blocks that share weights cannot be quantized yet": "its blocks share weights",
    r"runs model.layers.\d+ \d+ times": "runs its blocks more than once",
    r"runs model.L_module.layers.\d+ \d+ times": "runs its blocks more than once",
    "gives its blocks no hidden states": "its blocks take other inputs than hidden states",
    "does not run on text alone": "needs more than text in each forward pass, and so does its language model",
    "makes several tensors of": "transformers makes several tensors of several of the checkpoint",
    "the weights are of ShieldGemma2ForImageClassification": "is a classifier",
}
_UNTESTED = "not tested: the tests have no small config for it"


def page() -> str:
    """The whole page."""
    sys.path[:0] = [str(path) for path in (ROOT,) if str(path) not in sys.path]
    from transformers import __version__

    from fewbit.models.gguf.architectures import TYPES
    from tests import architectures, multimodal

    causal = {
        kind: {plan: reason for plan in PLANS if (reason := architectures.refusal(kind, plan))}
        for kind in architectures.TYPES
    }
    others = [kind for kind in multimodal.TYPES if kind not in causal]
    images = {kind: {plan: reason for plan in PLANS if (reason := multimodal.refusal(kind, plan))} for kind in others}
    return "\n".join(
        [
            _HEAD.format(version=__version__),
            "## Causal language models\n",
            *_table(causal, architectures.NOT_BUILT, gguf=TYPES),
            "\n## Models with vision or audio towers\n",
            "The language model is quantized, and calibrated on text.",
            "If a model needs an image or sound in each forward pass, its language model is calibrated by itself.",
            "Of models with an encoder and a decoder, such as Florence-2 and T5Gemma 2, the decoder is quantized.\n",
            *_table(images, multimodal.NOT_BUILT, multimodal.WITH_IMAGE),
            "",
        ]
    )


def _table(
    refused: Mapping[str, Mapping[str, str]],
    untested: Mapping[str, str],
    images: Collection[str] = (),
    gguf: Collection[str] = (),
) -> Iterable[str]:
    """The lines of a table. refused: for each type, plan -> reason. images: types that are tested with an image too.

    gguf: types of GGUF files; without any, the table has no column for them.
    """
    built = [kind for kind in refused if kind not in untested]
    counts = {plan: sum(plan not in refused[kind] for kind in built) for plan in PLANS}
    said = ", ".join(f"{counts[plan]} by `{plan}`" for plan in PLANS)
    yield f"{len(refused)} types, of which {len(built)} are tested. Quantized and right: {said}.\n"
    column = " GGUF |" if gguf else ""
    yield f"| type | calibrated | other |{column} |"
    yield "|---|---|---|" + "---|" * (2 if gguf else 1)
    for kind, reasons in refused.items():
        in_file = (" yes |" if kind in gguf else " no |") if gguf else ""
        if kind in untested:
            yield f"| `{kind}` | | |{in_file} {_SAYS.get(untested[kind], _UNTESTED)} |"
            continue
        calibrated, other = ("no" if plan in reasons else "yes" for plan in ("gptq-4bit", "nf4"))
        notes = [*dict.fromkeys(_SAYS[reason] for reason in reasons.values())]
        why = "; ".join([*notes, *(["tested with an image too"] if kind in images else [])])
        yield f"| `{kind}` | {calibrated} | {other} |{in_file} {why} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
