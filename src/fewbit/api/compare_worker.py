"""The worker processes of a comparison. Each does one task: quantize a model, or measure one.

`python -m fewbit.api.compare_worker` is their server (`system/processes.py`). They return plain data, in the keys of
`comparison.Row`. Memory and speed are those of the model as `fewbit.load` returns it. The loss is measured last, in
float32 on a CPU as in `fewbit evaluate`: it then shows the error of the weights, not that of rounded activations.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.api import quantize as api_quantize
from fewbit.formats.containers.safetensors import read_file, write_file
from fewbit.measure import comparison, memory, quality, speed
from fewbit.measure.comparison import Peak, Timing
from fewbit.models.decoding.generate import continue_text, prompt_ids
from fewbit.models.describe import describe
from fewbit.models.load import import_code, load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source, locate
from fewbit.nn import choose
from fewbit.plans import plan as plans
from fewbit.system import timing
from fewbit.system.cache import writing
from fewbit.system.processes import OnMessage, serve
from fewbit.texts import calibration

_MOST_RECORDED = 2 << 30  # bytes of the original's logits to keep on disk; if there are more, each row computes them


def quantize(task: Mapping[str, Any], on_message: OnMessage) -> dict[str, Any]:
    """Quantize `model` by `plan` into `out`."""
    before = memory.now().resident
    memory.forget_peak()
    done = api_quantize.quantize(
        task["model"],
        task["out"],
        plan=plans.Plan.from_json(task["plan"]),
        calibration=calibration.Calibration(**task["calibration"]),
        overwrite=True,
        device=task["device"],
        trust_remote_code=task["trust_remote_code"],
        progress=lambda step: on_message({"unit": "block", "done": step.done, "of": step.total}),
    )
    kinds = Counter(f"{t.scheme} by {t.method}" for t in done.tensors)
    few = Counter(note for t in done.tensors for note in t.notes)
    return {
        "what": ", ".join(f"{count} x {kind}" if len(kinds) > 1 else kind for kind, count in kinds.most_common()),
        "quantizing": asdict(comparison.Quantizing(done.seconds, _peak(before))),
        "errors": {t.module: t.error for t in done.tensors},
        "notes": [*done.notes, *(f"{note} ({count} tensor{'s' * (count != 1)})" for note, count in few.items())],
    }


def measure(task: Mapping[str, Any], on_message: OnMessage) -> dict[str, Any]:
    """Measure the quantized model `made`; if it is None, the original."""
    original = locate(task["model"])
    itself = task["made"] is None
    source = original if itself else locate(task["made"])
    device, trust = task["device"], task["trust_remote_code"]
    how = Loading(device, trust_remote_code=trust)
    windows = torch.tensor(task["windows"], dtype=torch.int64, device="cpu")
    tokenizer = load_tokenizer(original, trust_remote_code=trust)
    prompt = windows.flatten()[: task["prompt_tokens"]].unsqueeze(0)
    _read_through(source)
    memory.forget_peak()
    before, alone, elapsed = memory.now().resident, memory.kept([]), timing.timed()
    model = load_model(source, how, for_text=True)
    seconds = elapsed()
    memory.touch(model)
    weights, resident, loading = memory.at_rest(model), memory.kept(source.files) - alone, _peak(before)
    memory.forget_peak()
    on_message({"told": sorted(choose.told)})
    rates = (
        speed.prefill(model, prompt, _runs(on_message)),
        speed.decode(model, prompt, task["new_tokens"], _runs(on_message)),
    )
    sample = continue_text(model, tokenizer, prompt_ids(tokenizer, task["prompt"]), max_new_tokens=task["new_tokens"])
    generating = _peak(before)
    if device == "cpu" and (model.dtype != torch.float32 or not itself):  # packed kernels may round activations
        del model
        model = load_model(source, how.exact())
    told = _windows(on_message, len(windows))
    reference = _reference(task, original, model if source is original else None, windows, told)
    # For the original itself, use the recorded logits: they are already computed.
    found = quality.measure(reference[0] if source is original else model, reference[0], windows, told)
    assert found.kl is not None
    assert found.same_top is not None
    seen = describe(source)
    loss = {
        "perplexity": asdict(found.perplexity),
        "kl": asdict(found.kl.mean),
        "same_top": asdict(found.same_top),
        "drift": [float(e) for e in _drift(_states(model, windows), reference[1])],
    }
    return {
        "format": seen.format or "safetensors",
        **({"what": f"the original, {seen.format or str(source.dtype).removeprefix('torch.')}"} if itself else {}),
        "disk_bytes": sum(file.stat().st_size for file in source.files),
        "bits_per_weight": seen.bits_per_weight,
        "weights": asdict(
            comparison.Weights(weights.whole, weights.parameters, weights.buffers, seen.weights_bytes, resident)
        ),
        "loading": asdict(loading),
        "generating": asdict(generating),
        "speed": asdict(comparison.Speed(seconds, *map(Timing.of, rates))),
        "loss": loss,
        "sample": sample.text,
    }


def prepare(task: Mapping[str, Any]) -> None:
    """Import what every task needs, but compute nothing: computing starts threads, and then forking is not safe."""
    import_code(locate(task["model"]), trust_remote_code=task["trust_remote_code"])


def _peak(before: int) -> Peak:
    peak = memory.now().peak
    on_gpus = memory.on_gpus()
    return Peak(peak, max(0, peak - before), on_gpus, memory.in_use_on_gpus() if on_gpus else 0)


def _read_through(source: Source) -> None:
    """Read the files into the page cache, so that the first model to load is not timed slower than the others."""
    for file in source.files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(8 << 20):
                pass


def _runs(on_message: OnMessage) -> Callable[[int], None]:
    return lambda done: on_message({"unit": "run", "done": done})


def _windows(on_message: OnMessage, total: int) -> Callable[[int], None]:
    return lambda done: on_message({"unit": "window", "done": done, "of": total})


def _reference(
    task: Mapping[str, Any], source: Source, model: Any | None, windows: Tensor, told: Callable[[int], None]
) -> tuple[Any, Tensor]:
    """The original's logits on the windows, and its hidden states on the first window.

    Logits are computed once and stored in a file, which is memory-mapped for reading. If the file would be too large,
    the original itself is returned instead. model: the original, if it is loaded already.
    """

    def loaded() -> Any:
        loading = Loading(task["device"], trust_remote_code=task["trust_remote_code"])
        return model if model is not None else load_model(source, loading.exact(), for_text=True)

    config = source.config
    vocabulary = int(config.get("vocab_size") or 0)
    shape = (*windows.shape, vocabulary)
    if not 0 < 4 * prod(shape) <= _MOST_RECORDED:
        whole = loaded()
        return whole, _states(whole, windows)
    place, states = Path(task["reference"]), Path(task["reference"] + ".safetensors")
    if not (place.exists() and states.exists()):
        whole, made = loaded(), place.with_name(f".{place.name}.{secrets.token_hex(6)}")
        drifting = _states(whole, windows)
        try:
            with writing(place.parent):
                place.parent.mkdir(parents=True, exist_ok=True)
                write_file(states, {"states": drifting})
                _allocate(made, 4 * prod(shape))
            record = torch.from_file(str(made), shared=True, size=prod(shape), dtype=torch.float32).view(shape)
            with torch.inference_mode():
                for i, tokens in enumerate(windows):
                    record[i] = quality.logits_of(whole, tokens)
                    told(i + 1)
            made.rename(place)
        finally:
            made.unlink(missing_ok=True)
    record = torch.from_file(str(place), shared=False, size=prod(shape), dtype=torch.float32).view(shape)
    return quality.Recorded(record), read_file(states)[0]["states"]


def _allocate(path: Path, nbytes: int) -> None:
    """Make a file of zeros. OSError if the disk is full: later, writing to the mapped pages would end the process."""
    with path.open("wb") as file:
        file.truncate(nbytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)


def _states(model: Any, windows: Tensor) -> Tensor:
    """Each block's output hidden states on the first window, [blocks, length, width]; the last ones after the norm."""
    with torch.inference_mode():
        out = model(input_ids=windows[:1].to(model.device), use_cache=False, output_hidden_states=True)
    return torch.stack([states[0].float().cpu() for states in out.hidden_states[1:]])


def _drift(states: Tensor, original: Tensor) -> Tensor:
    return (states - original).square().sum((1, 2)) / original.square().sum((1, 2)).clamp(min=1e-30)


if __name__ == "__main__":
    serve({"quantize": quantize, "measure": measure}, prepare)
