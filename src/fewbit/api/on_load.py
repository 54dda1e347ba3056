"""Quantize while a model loads: `GPTQConfig` or `AwqConfig` on a model that is not quantized.

The pipeline of `fewbit quantize` quantizes the checkpoint block by block into a folder. `models.plugin` then makes
transformers load that folder instead of the checkpoint. So the model is never in memory in 16 bits, and a run that was
killed resumes where it stopped.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError, PlanError
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.models.plugin.modules import FEW
from fewbit.models.plugin.options import Request
from fewbit.models.skeleton import Skeleton, load_tokenizer, tokenizer_at
from fewbit.models.source import locate
from fewbit.pipeline import blocks, write_folder
from fewbit.pipeline import run as pipeline_run
from fewbit.pipeline.capture import Inputs, tokens_at_once
from fewbit.pipeline.job import Job, skeleton_of, too_small
from fewbit.report import progress
from fewbit.system import ambient, machine, publish
from fewbit.texts import sources, windows
from fewbit.texts.calibration import Calibration

_STRICT = "FEWBIT_STRICT_DATASET"  # environment variable: an unavailable text is an error
_TAKES = "A config takes dataset='c4', 'c4-new' or 'wikitext2', or a list of texts: dataset=[...]."
_NAMES = {"c4-new": "c4"}  # they differ only in their evaluation text


@ambient.defaults()
def quantized(
    folder: Path, request: Request, out: Path, *, device: str | None, trust_remote_code: bool, verbose: bool
) -> Callable[[], None]:
    """Quantize `folder` into the empty folder `out`. The returned function deletes the run's saved blocks.

    A warning says what was changed to make the request fit the model. PlanError, before any work, if it cannot fit.
    """
    skeleton = skeleton_of(locate(folder), machine.device(device), trust_remote_code)
    _check(request, skeleton)  # in the words of the request, before the plan's rules
    job = Job.of(skeleton, request.plan)
    size = job.preview().output_bytes
    publish.check_space({out: 2 * size}, "Free some space, or set FEWBIT_CACHE to a folder on another disk.")
    at_once = tokens_at_once(job.settled.skeleton, job.settled.resolved.assignments.values())
    inputs = Inputs(_tokens(request, job), stages=request.stages, least=request.batch, tokens_at_once=at_once)
    for note in (*job.notes, *_left(job)):
        warnings.warn(f"{request.plan.name}: {note}", stacklevel=2)
    versions = {**machine.versions(), "request": json.dumps([request.stages, request.batch])}
    known = pipeline_run.fingerprint(job.settled, inputs, versions)
    run = pipeline_run.Run(known, job.source.name, f"blocks quantized by {request.plan.name}")
    with run, progress.blocks(verbose) as tell:
        tensors = blocks.quantize_blocks(job.settled, inputs, run, tell)
        write_folder.write(out, job.settled, Checkpoint(run.files()))
    for note in too_small(tensors):
        warnings.warn(f"{request.plan.name}: {note}", stacklevel=2)
    return run.forget


def _check(request: Request, skeleton: Skeleton) -> None:
    """Raise PlanError if the request names something that the model does not have."""
    wrong = []
    where = skeleton.blocks[0].rpartition(".")[0]
    if request.blocks is not None and request.blocks != where:
        wrong.append(f"block_name_to_quantize={request.blocks!r}: the model's blocks are {where}")
    modules = {name for name, _ in skeleton.model.named_modules()}
    wrong += [
        f"module_name_preceding_first_block: the model has no {name!r}"
        for name in request.preceding
        if name not in modules
    ]
    linears = [name.removeprefix(f"{block}.") for block in skeleton.blocks for name in skeleton.linears(block)]
    wrong += [
        f"modules_in_block_to_quantize: no block has a linear {name!r}, but {', '.join(dict.fromkeys(linears))}"
        for stage in request.stages or ()
        for name in stage
        if name not in linears
    ]
    wrong += [
        f"modules_to_not_convert: no linear is called {name!r}"
        for name in request.left
        if not any(name in linear for linear in skeleton.all_linears())
    ]
    if wrong:
        raise PlanError("\n".join(wrong))


def _left(job: Job) -> list[str]:
    """At most one warning: how many weights in blocks the request leaves unquantized. Empty if they are few."""
    left: dict[str, int] = {}
    names = dict[str, None]()
    for block in job.settled.skeleton.blocks:
        for name, parameter in job.settled.skeleton.model.get_submodule(block).named_parameters():
            inner = name.removesuffix(".weight")
            if parameter.dim() > 1 and f"{block}.{inner}" not in job.settled.resolved.assignments:
                left[f"{block}.{inner}"] = parameter.numel()
                names[inner] = None
    count = sum(left.values())
    share = count / max(job.settled.skeleton.parameters_in_blocks(), 1)
    if share < FEW:
        return []
    shown = ", ".join([*names][:5]) + (" ..." if len(names) > 5 else "")
    kind = str(job.source.dtype).removeprefix("torch.")
    return [f"{count:,} parameters, {share:.0%} of those in the model's blocks, stay in {kind}: {shown}"]


def _tokens(request: Request, job: Job) -> Tensor:
    """Calibration tokens [samples, length]: all windows of a list of texts, the default number of a named text."""
    tokenizer = _tokenizer(request, job)
    context = job.source.context
    if request.length is not None and not 1 < request.length <= context:
        raise PlanError(f"model_seqlen={request.length}: the model's context is {context} tokens")
    if isinstance(request.dataset, str) or request.dataset is None:
        name = request.dataset or sources.own_source(job.source.config)
        text, samples = _named_text(_NAMES.get(name, name), sources.own_source(job.source.config)), Calibration.samples
    else:
        text, samples = sources.Text(f"the list of {len(request.dataset)} texts", tuple(request.dataset)), None
    stream = windows.within(windows.encode(text, tokenizer), job.source.rows, tokenizer, text.name)
    if not len(stream):
        raise PlanError(f"{text.name} has no tokens", "Give a text to calibrate on.")
    length = min(request.length or Calibration.length, context, len(stream))
    return windows.sample(stream, samples or len(stream) // length, length, Calibration.seed)


def _named_text(name: str, fallback: str) -> sources.Text:
    """The text called `name`. If it is unavailable, the text `fallback` after a warning; PlanError in strict mode."""
    try:
        return sources.load_text(name, "calibration")
    except sources.SourceUnavailable as error:
        strict = os.environ.get(_STRICT)
        if strict not in (None, "", "0"):
            raise PlanError(error.message, _TAKES) from None
        text = sources.load_text(fallback, "calibration")
        warnings.warn(
            f"{error.message}. Calibrating on {text.name} instead. For {name}: connect to the Hub"
            f"{'' if name == 'c4' else ', and pip install datasets'}; or give dataset=[...], a list of texts. "
            f"{_STRICT}=1 makes this an error",
            stacklevel=2,
        )
        return text
    except PlanError as error:
        raise PlanError(f"dataset={name!r}: {error.message}", _TAKES) from None


def _tokenizer(request: Request, job: Job) -> Any:
    given = request.tokenizer
    if given is not None and not isinstance(given, (str, Path)):
        return given
    try:
        return load_tokenizer(job.source) if given is None else tokenizer_at(given)
    except FewbitError as error:
        raise PlanError(f"{request.plan.name} needs a tokenizer: {error.message}", "Add tokenizer=tokenizer.") from None


def device_of(device_map: Any) -> str | None:
    """The device to quantize on: "cpu" if the whole model goes there, else None (the best device)."""
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    return "cpu" if all(str(place) in ("cpu", "disk") or place == torch.device("cpu") for place in places) else None
