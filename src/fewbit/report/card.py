"""The model card: README.md of an output folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fewbit.formats.containers.safetensors import ORIGINAL_CARD
from fewbit.units import share, size


def calibrated_on(calibrated: Mapping[str, Any]) -> str:
    return (
        f"{calibrated['samples']} x {calibrated['length']} tokens of {calibrated['text']}, "
        f"seed {calibrated['seed']}, digest {calibrated['digest'][:12]}"
    )


def _source(source: Mapping[str, Any]) -> str:
    return (
        f"already quantized ({' and '.join(source['kinds'])}, {share(source['share'])} of its parameters); errors are "
        "measured against its dequantized weights"
    )


def _loss(loss: Mapping[str, Any]) -> str:
    """What a requantized model lost, from its record."""
    return (
        f"KL divergence {loss['kl']['mean']:.3g} and the same top token in {share(loss['same_top'])}, measured against "
        f"{loss['reference']} on {loss['tokens']:,} tokens of {loss['text']}"
    )


def tuned_on(done: Mapping[str, Any]) -> str:
    """How a model was tuned, from its record."""
    text = done["text"]
    return (
        f"KL divergence from {done['reference']} {done['before']:.4g} before, {done['after']:.4g} after, on "
        f"{done['held_out_tokens']:,} held-out tokens of {text['text']}; {done['best_step']} steps"
    )


def tuned_card(record: Mapping[str, Any]) -> str:
    """README.md of a folder that `tune` has made."""
    if record["tensors"]:
        return model_card(record)
    if "converted" in record:
        return conversion_card(record)
    done, original = record["tuned"], ORIGINAL_CARD in record.get("files", ())
    name = str(done["from"]).rstrip("/").rpartition("/")[2]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [quantized, fewbit]",
        "---",
        f"# {name}, tuned",
        "",
        *_tuning(record),
        *(f"- {note}" for note in record["notes"]),
        "",
        "`fewbit.json` records how the model was tuned.",
        "The licence is that of the original model.",
        *([f"The model card of the original is [{ORIGINAL_CARD}]({ORIGINAL_CARD})."] if original else []),
        "",
    ]
    return "\n".join(lines)


def _tuning(record: Mapping[str, Any]) -> list[str]:
    """The lines on tuning, if the model was tuned."""
    if "tuned" not in record:
        return []
    done = record["tuned"]
    made = f"Tuned by fewbit {record['versions']['fewbit']}"
    if done["from"]:
        said = f"{made} from {done['from']}: scales, norms and biases were trained. All codes are unchanged."
    else:  # by `quantize`
        said = (
            f"{made}: codes and scales block by block, then scales, norms and biases on the whole model's predictions."
        )
    return [
        said,
        f"{tuned_on(done)}.",
        "",
    ]


def conversion_card(record: Mapping[str, Any]) -> str:
    """README.md of a folder that `convert` has made."""
    done, original = record["converted"], ORIGINAL_CARD in record.get("files", ())
    name = str(done["from"]).rstrip("/").rpartition("/")[2]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [fewbit]",
        "---",
        f"# {name}, as {done['to']}",
        "",
        f"Converted by fewbit {record['versions']['fewbit']} from {done['from']}.",
        "",
        *_tuning(record),
        *(f"- {count} weights as {scheme}, codes and scales unchanged" for scheme, count in done["schemes"].items()),
        *(f"- {note}" for note in record["notes"]),
        "",
        "`fewbit.json` records the conversion and how the quantized model was made, if that is known.",
        "The licence is that of the original model.",
        *([f"The model card of the original is [{ORIGINAL_CARD}]({ORIGINAL_CARD})."] if original else []),
        "",
    ]
    return "\n".join(lines)


def model_card(record: Mapping[str, Any]) -> str:
    """README.md of an output folder."""
    plan, original = record["plan"], ORIGINAL_CARD in record.get("files", ())
    schemes = Counter(f"{t['scheme']} by {t['method']}" for t in record["tensors"])
    lines = [
        "---",
        "library_name: transformers",
        "tags: [quantized, fewbit]",
        *(
            [f"base_model: {record['model']}"]
            if record["model"].count("/") == 1 and record["model"][0] not in "./~"
            else []
        ),
        "---",
        f"# {record['model'].rstrip('/').rpartition('/')[2]}, quantized",
        "",
        f"Made with fewbit {record['versions']['fewbit']}, plan `{plan['name']}`, format `{plan['format']}`.",
        "",
        *_tuning(record),
        "| | |",
        "|---|---|",
        *(f"| {count} tensors | {what} |" for what, count in schemes.items()),
        f"| bits per quantized weight | {record['bits_per_weight']:.3f} |",
        f"| share of the blocks' parameters | {share(record['share'])} |",
        *([f"| source | {_source(record['source'])} |"] if record.get("source") else []),
        f"| weights | {size(record['original_bytes'])} before, {size(record['output_bytes'])} now |",
        *([f"| calibrated on | {calibrated_on(record['calibration'])} |"] if record["calibration"] else []),
        *([f"| loss | {_loss(loss)} |"] if (loss := record.get("converted", {}).get("loss")) else []),
        "",
        "`fewbit.json` records the plan, the versions, the error of each tensor and every fallback.",
        "Load it with `import fewbit` and `AutoModelForCausalLM.from_pretrained`, or another reader of the format.",
        "The licence is that of the original model.",
        *([f"The model card of the original is [{ORIGINAL_CARD}]({ORIGINAL_CARD})."] if original else []),
        "",
    ]
    return "\n".join(lines)
