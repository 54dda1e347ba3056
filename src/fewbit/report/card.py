"""The model card of an output: README.md of a folder, and of a repository that holds a GGUF file.

All of it comes from the record of the output (`fewbit.json`, or the record in a GGUF file), so the card of a folder and
that of a file say the same. Its head has the metadata of the Hub: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fewbit import registry
from fewbit.formats.containers.safetensors import ORIGINAL_CARD
from fewbit.plans.plan import PRESETS
from fewbit.units import counted, share, size

_PLAN_BYTES = 6000  # a longer plan is only in the record
_UNKNOWN = "not recorded"  # the name of the plan of a source that fewbit has not made
_FOLDER = "MODEL"  # stands for the folder or file, while it is not in a repository
_LOCAL = re.compile(r"(?:\bfile://|(?<![\w.:/~])[~.]{0,2})(?:/[^\s/,;:'\"`()]+)*/([^\s/,;:'\"`()]+)")
_ABSOLUTE = re.compile(r"(?:file://)?(?:/|~\w*/)[^/\n]+(?:/+[^/\n]+)+/*")
_PART = re.compile(r" (calibration|evaluation)( \(.*\))?$")  # which part of a known text
_CLASSES = {"image-text-to-text": "AutoModelForImageTextToText", "audio-text-to-text": "AutoModelForImageTextToText"}
_PEERS = {"gptq": "gptqmodel", "awq": "gptqmodel", "bnb": "bitsandbytes", "compressed-tensors": "compressed-tensors"}


def portable(value: Any) -> Any:
    """A record, or a part of it, as it can be published: of each absolute path, only the last part is left.

    A path in a sentence ends at a space. A value of a key is a whole path, spaces included.
    """
    if isinstance(value, str):
        return _LOCAL.sub(r"\1", value)
    if isinstance(value, Mapping):
        return {key: portable(last_part(each)) for key, each in value.items()}
    return [portable(each) for each in value] if isinstance(value, (list, tuple)) else value


def last_part(value: Any) -> Any:
    """The last part of a text that is an absolute path of at least two parts, and anything else as it is."""
    if isinstance(value, str) and _ABSOLUTE.fullmatch(value):
        return value.rstrip("/").rpartition("/")[2]
    return value


def calibrated_on(calibrated: Mapping[str, Any]) -> str:
    return (
        f"{calibrated['samples']} x {calibrated['length']} tokens of {calibrated['text']}, "
        f"seed {calibrated['seed']}, digest {calibrated['digest'][:12]}"
    )


def tuned_on(done: Mapping[str, Any]) -> str:
    """How a model was tuned, from its record."""
    text = done["text"]
    more = ", codes too" if done.get("codes") else ""
    return (
        f"KL divergence from {done['reference']} {done['before']:.4g} before, {done['after']:.4g} after, on "
        f"{done['held_out_tokens']:,} held-out tokens of {text['text']}; {done['best_step']} steps{more}"
    )


def model_card(record: Mapping[str, Any], repo: str = "", file: str = "", chart: str = "") -> str:
    """The card of an output with this record, in Markdown.

    repo: the repository on the Hub that holds it; "": it is in a folder. file: the name of a GGUF file. chart: the name
    of an image that lies beside the card.
    """
    origin = record.get("base") or {}
    said = portable(record)
    paragraphs = [
        _head(said, origin, file),
        f"# {_title(said)}",
        _made_by(said),
        "\n".join(["| | |", "|---|---|", *_facts(said)]),
        *_notes(said),
        *_loss(said),
        *([f"![Quality and size beside those of other plans]({chart})"] if chart else []),
        "## How to load it",
        *_loading(said, origin, repo, file),
        "## How it was made",
        *_commands(said, file),
        _last(said, file),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _head(record: Mapping[str, Any], origin: Mapping[str, Any], file: str) -> str:
    """The metadata for the Hub."""
    from huggingface_hub import ModelCardData  # slow to import

    format, dense = _format(record), _format(record) == "dense"
    known = {key: origin[key] for key in ("license", "license_name", "license_link", "language") if origin.get(key)}
    if base := origin.get("model"):
        known |= {"base_model": base} | ({} if dense else {"base_model_relation": "quantized"})
    data = ModelCardData(
        library_name="gguf" if file or format == "gguf" else "transformers",
        pipeline_tag=origin.get("pipeline_tag"),
        tags=["fewbit", *(() if dense else ("quantized",)), format],
        **known,
    )
    return f"---\n{data.to_yaml()}\n---"


def _format(record: Mapping[str, Any]) -> str:
    """The name of the format, without the variant of its layout."""
    done = record.get("converted", {})
    return str(done.get("to") or record["plan"]["format"]).split(" ")[0]


def _title(record: Mapping[str, Any]) -> str:
    last = record.get("converted", record.get("tuned", {})).get("from") or record["model"]
    name = str(last).rstrip("/").rpartition("/")[2]
    if "converted" in record and record["converted"]["exact"]:
        return f"{name}, as {record['converted']['to']}"
    if "original" in record:
        return f"{name}, quantized, then changed"
    if record.get("tuned", {}).get("from") and not record["tensors"]:
        return f"{name}, tuned"
    return f"{name}, quantized"


def _made_by(record: Mapping[str, Any]) -> str:
    version, plan, lines = record["versions"]["fewbit"], record["plan"], list[str]()
    if "original" in record:
        made = f"plan `{plan['name']}`, format `{plan['format']}`" if plan["name"] != _UNKNOWN else plan["format"]
        return f"Saved from a model that fewbit {version} made ({made})."
    if plan["name"] != _UNKNOWN:
        lines.append(f"Made with fewbit {version}, plan `{plan['name']}`, format `{plan['format']}`.")
    if (done := record.get("converted")) and done["exact"]:
        lines.append(f"Converted by fewbit {version} from {done['from']}, with all codes and scales unchanged.")
    if done := record.get("tuned"):
        if done["from"]:
            said = f" from {done['from']}: scales, norms and biases were trained. All codes are unchanged."
        else:  # by `quantize`
            said = ": codes and scales block by block, then scales, norms and biases on the whole model's predictions."
        lines += [f"Tuned by fewbit {version}{said}", f"{tuned_on(done)}."]
    return "\n".join(lines)


def _facts(record: Mapping[str, Any]) -> Iterator[str]:
    """The rows of the table of what is in the files."""
    done = record.get("converted", {})
    if record["tensors"]:
        schemes = Counter(f"{t['scheme']} by {t['method']}" for t in record["tensors"])
    else:
        schemes = Counter(done.get("schemes", {}))
    yield from (f"| {count} tensor{'s' * (count != 1)} | {what} |" for what, count in schemes.items())
    if "bits_per_weight" in record:
        yield f"| bits per quantized weight | {record['bits_per_weight']:.3f} |"
    if "share" in record:
        yield f"| share of the blocks' parameters | {share(record['share'])} |"
    if source := record.get("source"):
        kinds = " and ".join(source["kinds"])
        yield (
            f"| source | already quantized ({kinds}, {share(source['share'])} of its parameters); "
            "errors are measured against its dequantized weights |"
        )
    if "output_bytes" in record:
        before = f"{size(record['original_bytes'])} before, " if "original_bytes" in record else ""
        yield f"| weights | {before}{size(record['output_bytes'])} now |"
    if record["calibration"]:
        yield f"| calibrated on | {calibrated_on(record['calibration'])} |"


def _notes(record: Mapping[str, Any]) -> list[str]:
    notes = record.get("notes", ())
    return ["\n".join(f"- {note}" for note in notes)] if notes else []


def _loss(record: Mapping[str, Any]) -> Iterator[str]:
    """The section on what was lost, as far as it was measured."""
    measured = [each for each in (record.get("converted", {}).get("loss"), record.get("evaluation")) if each]
    yield "## Loss"
    for loss in measured:
        against = f" against {loss['reference']}" if loss["reference"] else ""
        yield f"Measured{against} on {loss['tokens']:,} tokens of {loss['text']}, in windows of {loss['length']}:"
        yield "\n".join(["| | value | 95 % interval |", "|---|---|---|", *_quality(loss)])
        if tasks := loss.get("tasks"):
            yield "\n".join(["| task | value ± standard error | original |", "|---|---|---|", *map(_task, tasks)])
    if (sized := record.get("allocation")) and sized.get("measured") is not None:
        before = ", before it was tuned end to end" if record.get("tuned") else ""
        yield (
            f"KL divergence at this size, in nats per token: predicted {sized['kl']:.3g}, measured "
            f"{sized['measured']:.3g} on {sized['held_out']:,} held-out tokens of the calibration text{before}."
        )
    elif not measured:
        yield "It was not measured."


def _quality(loss: Mapping[str, Any]) -> Iterator[str]:
    intervals = loss["intervals"]
    if loss["kl"]:
        low, high = intervals["kl"]["mean"]
        yield f"| KL divergence, nats per token | {loss['kl']['mean']:.3g} | {low:.3g} ... {high:.3g} |"
        low, high = intervals["same_top"]
        yield f"| same top token | {share(loss['same_top'])} | {share(low)} ... {share(high)} |"
    for key, what in (("perplexity", "perplexity"), ("reference_perplexity", "perplexity of the original")):
        if loss[key] is not None:
            low, high = intervals[key]
            yield f"| {what} | {loss[key]:.4g} | {low:.4g} ... {high:.4g} |"


def score(value: float, stderr: float | None) -> str:
    """A score on a task, with its standard error."""
    return f"{value:.4g}" + ("" if stderr is None else f" ± {stderr:.2g}")


def _task(each: Mapping[str, Any]) -> str:
    before = "" if each["reference"] is None else score(each["reference"], each["reference_stderr"])
    tried = f"{counted(each['examples'], 'example')}, {counted(each['shots'], 'shot')}"
    return f"| {each['task']}, {each['name']}, {tried} | {score(each['value'], each['stderr'])} | {before} |"


def _loading(record: Mapping[str, Any], origin: Mapping[str, Any], repo: str, file: str) -> Iterator[str]:
    """How each reader of the format loads it."""
    formats = registry.entries("formats")
    format = _format(record)
    place = repo or (file or _FOLDER)
    if not repo and not file:
        yield f"`{_FOLDER}` is this folder, or its repository on the Hub."
    readers = formats[format].readers.split(", ") if format in formats else []
    model = _CLASSES.get(str(origin.get("pipeline_tag")), "AutoModelForCausalLM")
    folder, gguf = (repo or ".", f', gguf_file="{file}"') if file else (place, "")
    python = [
        "import fewbit  # pip install fewbit",
        f"from transformers import {model}, AutoTokenizer",
        "",
        f'model = {model}.from_pretrained("{folder}"{gguf})',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}"{gguf})',
    ]
    yield "fewbit keeps the weights packed, on a CPU and on a GPU:"
    yield _block("python", python)
    for reader in readers:
        if reader.startswith("transformers"):
            peer = f"With `{_PEERS[format]}` installed, " if format in _PEERS else ""
            yield f"{peer}transformers loads it without `import fewbit`{' too' if peer else ', in the same way'}."
        elif reader == "vLLM":
            yield _block("sh", [f"vllm serve {place}"])
        elif reader == "SGLang":
            yield _block("sh", [f"python -m sglang.launch_server --model-path {place}"])
        elif reader.startswith("llama.cpp"):
            where = f"-hf {repo} --hf-file {file}" if repo else f"-m {file or _FOLDER}"
            yield _block("sh", [f"llama-server {where}"])


def _commands(record: Mapping[str, Any], file: str) -> Iterator[str]:
    """The commands that made it, as far as the record has them, and the plan."""
    if "original" in record:
        yield "The model that it was saved from was made by:"
        record = record["original"]
    plan, lines = record["plan"], list[str]()
    out = file or "out"
    done, tuned = record.get("converted"), record.get("tuned")
    if plan["name"] != _UNKNOWN:
        lines.append(_quantize(record, out if done is None or not done["exact"] else "quantized"))
    if done is not None and done["exact"]:
        lines.append(_shell("fewbit convert", done["from"], "-o", out, "--to", done["to"].split(" ")[-1]))
    if tuned and tuned["from"]:
        codes = ("--codes",) if tuned.get("codes") else ()
        more = ("--reference", tuned["reference"], "-o", out)
        lines.append(_shell("fewbit tune", tuned["from"], *more, "--steps", tuned["steps_taken"], *codes))
    if lines:
        yield _block("sh", lines)
    if "rules" in plan:
        text = json.dumps(plan, indent=1)
        if len(text) <= _PLAN_BYTES:
            yield f"<details><summary>The plan</summary>\n\n{_block('json', [text])}\n\n</details>"


def _quantize(record: Mapping[str, Any], out: str) -> str:
    """The command that quantized it."""
    plan = record["plan"]
    preset = PRESETS.get(plan["name"])
    known = preset is not None and json.dumps(preset.to_json()) == json.dumps(plan)
    words: list[Any] = [record["model"], "-o", out, "--plan", plan["name"] if known else "fewbit.json"]
    if calibrated := record["calibration"]:
        words += ["--calibration", _PART.sub("", calibrated["text"]), "--samples", calibrated["samples"]]
        words += ["--length", calibrated["length"], "--seed", calibrated["seed"]]
    if record.get("effort", "fast") != "fast":
        words += ["--effort", record["effort"]]
    return _shell("fewbit quantize", *words)


def _last(record: Mapping[str, Any], file: str) -> str:
    where = f"The metadata of {file} has" if file else "`fewbit.json` has"
    what = "the record of the model that it was saved from" if "original" in record else "the whole record"
    lines = [f"{where} {what}: the plan, the versions, the error of each tensor and every fallback."]
    if not record.get("recorded", True):
        lines = ["It has no record of how it was made."]
    lines.append("The licence is that of the original model.")
    if ORIGINAL_CARD in record.get("files", ()):
        lines.append(f"The model card of the original is [{ORIGINAL_CARD}]({ORIGINAL_CARD}).")
    return "\n".join(lines)


def _shell(command: str, *words: Any) -> str:
    return " ".join([command, *(shlex.quote(str(word)) for word in words)])


def _block(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
