"""Conversion of a quantized model to another format without rounding: which weights get which scheme, and the tensors.

Each weight is read as a QTensor by its own format. Among its forms (`schemes/exact.py`) the target format chooses one
that it can store. Everything is decided before any work, from headers, zero points and scales; only where these do not
tell whether the values fit (`Form.checked`), the weights are read twice. Tensors are made when the output is written,
one weight at a time (`pipeline/converted.py`).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fewbit.errors import PlanError
from fewbit.formats.base import Format, Stored, large
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.formats.dense import Dense
from fewbit.methods.base import Method
from fewbit.models import stored
from fewbit.models.packing import Weight
from fewbit.models.skeleton import Skeleton
from fewbit.models.source import Source
from fewbit.names import in_short
from fewbit.pipeline import converted
from fewbit.pipeline.job import homeless, left_behind
from fewbit.pipeline.settled import Settled, model_of
from fewbit.plans.plan import Assignment, Plan, Resolved
from fewbit.plans.targets import Target, targets
from fewbit.schemes import exact
from fewbit.schemes.base import Codec, Scheme, parse
from fewbit.schemes.exact import Form

_DECODE = "`to=dense` decodes all weights."
_REQUANTIZE = "`requantize=True` with a `plan` quantizes them anew, which changes their values."
_SHOWN = 4  # reasons in an error


@dataclass(frozen=True)
class Conversion:
    """A conversion that is checked and ready. tensors: those of the quantized weights, made when they are read.

    decoded: the quantized weights that become ordinary tensors.
    """

    settled: Settled
    tensors: Checkpoint
    decoded: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def source_settings(self) -> dict[str, Any]:
        """What the source's config says of its quantization. The output's config may have no place for it."""
        return self.settled.skeleton.source.quantization or {}


def prepare(source: Source, target: Target, *, trust_remote_code: bool = False) -> Conversion:
    """Decide how each weight of `source` is stored in the target. PlanError, with the reasons, if one cannot be."""
    format = target.format
    if _rounds_activations(source.quantization or {}):
        with suppress(PlanError):  # `_notes` says if the format cannot declare it
            format = format.with_activations("dynamic")
    if source.gguf is not None and format.suffix:
        raise PlanError(f"{source.name} is a {format.suffix} file already")
    if source.quantization is None and not format.suffix:
        raise PlanError(
            f"{source.name} is not quantized, and a conversion quantizes nothing", "Use fewbit quantize with a plan."
        )
    skeleton = Skeleton(source, source.dtype, torch.device("cpu"), trust_remote_code=trust_remote_code)
    if isinstance(format, Dense):
        stored.fuse_experts(skeleton)
    inside = {name for block in skeleton.blocks for name in skeleton.linears(block)}
    if format.suffix:
        model_of(skeleton)  # PlanError if a GGUF file cannot store the model
        inside |= skeleton.outside().keys()
    inside |= {skeleton.head_name} if format.packs_head else set()
    weights = stored.weights(skeleton)
    wanted = {} if isinstance(format, Dense) else _convertible(skeleton, weights, inside)
    every = dict.fromkeys([*skeleton.all_linears(), *skeleton.outside()])

    def chosen() -> tuple[tuple[str, ...], dict[str, Form], bool]:
        kept = tuple(name for name in every if name not in wanted and f"{name}.weight" not in skeleton.tied)
        return kept, *_chosen(wanted, format, kept, skeleton.dtype_of_source)

    try:
        kept, forms, permuted = chosen()
    except PlanError:
        if format.suffix or wanted.pop(skeleton.head_name, None) is None:
            raise
        kept, forms, permuted = chosen()  # the head is decoded
    found = {module: Assignment(module, wanted[module].shape, form.scheme, Method()) for module, form in forms.items()}
    if not found and not format.suffix and not isinstance(format, Dense):
        raise PlanError(f"{source.name} has no quantized weights", "Use fewbit quantize with a plan.")
    resolved = Resolved(Plan(f"conversion to {format.name}", format.name, ()), format, found, kept, ())
    fused = converted.places(skeleton, format, found)
    plain = Settled(skeleton, resolved)
    known = source.quantization or {}
    same = known.get("quant_method") == format.quant_method and not format.suffix
    variant = {key: value for key, value in known.items() if key not in plain.config} if same else {}
    variant |= {**(format.permuted or {} if permuted else {}), **target.keys}
    settled = Settled(skeleton, resolved, variant, exact=True, fused={m: each.name for m, each in fused.items()})
    if same and format.variant(known) == format.variant(settled.config):
        shown = " ".join(filter(None, (format.name, format.variant(known))))
        raise PlanError(f"{source.name} is already stored as {shown}", _others(target))
    made = converted.tensors(settled, wanted, forms, fused)
    decoded = tuple(name for name in weights if name not in found)
    return Conversion(settled, made, decoded, tuple(_notes(settled, decoded)))


def _others(target: Target) -> str:
    others = [name for name, each in targets().items() if type(each.format) is type(target.format) and each.variant]
    return f"Variants of the layout: {', '.join(others)}." if others else "Give another `to`."


def _convertible(skeleton: Skeleton, weights: Mapping[str, Weight], inside: Container[str]) -> dict[str, Weight]:
    """The weights that the target can store at all. PlanError for a source of which some can only be decoded."""
    packing = skeleton.packing
    if packing is not None and packing.floats_only:
        modules = in_short(name.removesuffix(".weight") for name in packing.floats_only)
        raise PlanError(
            f"{skeleton.source.name}: fewbit reads the quantized weights of {modules} as floats only",
            f"{_DECODE} {_REQUANTIZE}",
        )
    split = {name.removesuffix(".weight") for name in skeleton.splits.values()}
    if found := [name for name in weights if name in split]:
        raise PlanError(
            f"transformers splits {found[0]} into several weights while loading, and fewbit cannot split it packed",
            f"{_DECODE} {_REQUANTIZE}",
        )
    return {name: weight for name, weight in weights.items() if name in inside}


def _chosen(
    weights: Mapping[str, Weight], format: Format, kept: Sequence[str], dtype: torch.dtype
) -> tuple[dict[str, Form], bool]:
    """The form of each weight that `format` stores, and whether one has permuted columns. PlanError if one has none.

    kept: the modules that stay unquantized. dtype: of the model.
    """

    def why_not(forms: Mapping[str, Form]) -> str | None:
        return format.why_not_together([Stored(m, weights[m].shape, form.scheme) for m, form in forms.items()], kept)

    found, refused, codecs, ordered = dict[str, Form](), dict[str, str](), dict[str, Codec](), False
    for module, weight in weights.items():
        codecs[module], permuted = weight.as_stored()
        ordered |= permuted
        if permuted and format.permuted is None:
            refused[module] = f"it has act-order (g_idx), and {format.name} files have no place for an order of columns"
            continue
        form, reason = _first(codecs[module], weight, format)
        if form is None:
            refused[module] = f"it is {codecs[module]}; {reason}"
        else:
            found[module] = form
    if refused:
        raise PlanError(_listed(refused, len(weights), format), f"{_DECODE} {_REQUANTIZE}")
    found = _suited(found, weights, codecs, format, dtype)
    if not found or (reason := why_not(found)) is None:
        return found, ordered
    every = [form.scheme for m, weight in weights.items() for form in exact.forms(codecs[m], weight.shape)]
    for scheme in dict.fromkeys(every):  # one that holds all of them
        alike = {m: form for m, weight in weights.items() if (form := _first(codecs[m], weight, format, scheme)[0])}
        if len(alike) == len(found) and why_not(alike) is None:
            return alike, ordered
    raise PlanError(f"the weights differ in scheme: {reason}", f"{_DECODE} {_REQUANTIZE}")


def _suited(
    forms: dict[str, Form],
    weights: Mapping[str, Weight],
    codecs: Mapping[str, Codec],
    format: Format,
    dtype: torch.dtype,
) -> dict[str, Form]:
    """The forms in the variant of their schemes for a model of this dtype, if that holds the values of all weights."""
    found = dict(forms)
    for module, form in forms.items():
        if (scheme := format.suited(form.scheme, dtype)) != form.scheme:
            better, _ = _first(codecs[module], weights[module], format, scheme)
            if better is None:
                return forms
            found[module] = better
    return found


def _first(
    codec: Codec, weight: Weight, format: Format, scheme: Scheme | None = None
) -> tuple[Form | None, str | None]:
    """The first form of a weight that `format` stores, or why there is none. scheme: the only scheme allowed."""
    wrong, unfit, foreign = list[str](), list[str](), list[str]()
    for form in exact.forms(codec, weight.shape):
        if scheme is not None and form.scheme != scheme:
            continue
        if (reason := format.why_not_moved(weight.shape, form.scheme)) is not None:
            # A scheme of a family that the format stores says more: its width or group does not fit.
            (unfit if _stores(type(format), type(form.scheme)) else foreign).append(reason)
        elif form.checked and isinstance(moved := form.of(weight.read()), str):
            wrong.append(f"{form.scheme} does not hold it: {moved}")
        else:
            return form, None
    near = exact.misses(codec, weight.shape)
    wrong += [
        f"{form.scheme} does not hold it: {form.why_not}"
        for form in near
        if format.why_not_moved(weight.shape, form.scheme) is None
    ]
    return None, "; ".join(wrong[:2]) or next(iter((*unfit, *foreign)), "fewbit can only decode it")


@cache
def _stores(format: type[Format], kind: type[Scheme]) -> bool:
    """Whether the format stores some scheme of this family."""
    schemes = map(parse, kind.examples)
    return any(format().why_not_moved(large(scheme), scheme) is None for scheme in schemes)


def _listed(refused: Mapping[str, str], of: int, format: Format) -> str:
    """The error for weights that cannot be stored, alike ones in one line."""
    by_reason: dict[str, list[str]] = {}
    for module, reason in refused.items():
        by_reason.setdefault(reason, []).append(module)
    lines = [f"{_some(modules)}: {reason}" for reason, modules in [*by_reason.items()][:_SHOWN]]
    more = f"\n  and {len(by_reason) - _SHOWN} other reasons" if len(by_reason) > _SHOWN else ""
    return f"{len(refused)} of {of} weights do not fit {format.name} exactly:\n  " + "\n  ".join(lines) + more


def _some(modules: Sequence[str]) -> str:
    """The first of the modules, and how many more there are."""
    return modules[0] + (f" and {len(modules) - 1} more" if len(modules) > 1 else "")


def _notes(settled: Settled, decoded: Sequence[str]) -> Iterator[str]:
    """What does not stay packed, what stays as it was, and what the output leaves out."""
    skeleton, format = settled.skeleton, settled.resolved.format
    dtype = str(skeleton.dtype_of_source).removeprefix("torch.")
    if isinstance(format, Dense) and skeleton.packing is not None and skeleton.packing.parameters:
        yield f"all quantized weights ({skeleton.packing.said}) are decoded and rounded to {dtype}"
    elif decoded:
        head = ", and with a quantized head if its scheme fits" if format.packs_head else " only"
        yield (
            f"decoded and rounded to {dtype}: {in_short(decoded)}; fewbit writes {format.name} files with quantized "
            f"linears of blocks{head}"
        )
    if skeleton.packing is None:
        yield "the source is not quantized: its weights are unchanged"
    elif not isinstance(format, Dense) and (plain := [name for name in settled.resolved.kept if name not in decoded]):
        yield f"not quantized in the source, and unchanged: {in_short(plain)}"
    if rounded := _rounded(settled):
        yield rounded
    yield from _on_activations(settled)
    carried = {} if format.suffix else skeleton.carried(settled.resolved.assignments)
    specs = skeleton.checkpoint.specs
    lost = {key: specs[key] for key in skeleton.without_place if key not in carried}
    yield from homeless(type(skeleton.model).__name__, carried, lost)
    yield from left_behind(skeleton.source, single_file=bool(format.suffix))


def _rounded(settled: Settled) -> str | None:
    """A note if servers round the scales, which the output holds exactly."""
    format, dtype = settled.resolved.format, settled.skeleton.dtype_of_source
    schemes = {a.scheme for a in settled.resolved.assignments.values()}
    if all(format.suited(scheme, dtype) == scheme for scheme in schemes):
        return None
    called = str(dtype).removeprefix("torch.")
    return f"the scales are exact in the files, but servers load those of {format.name} files in the model's {called}"


def _rounds_activations(config: Mapping[str, Any]) -> bool:
    """Whether a quantization config declares that servers round activations, in compressed-tensors or fp8 files."""
    groups = config.get("config_groups")
    every = groups.values() if isinstance(groups, Mapping) else ()
    return any(isinstance(each, Mapping) and each.get("input_activations") for each in every) or (
        config.get("activation_scheme") is not None
    )


def _on_activations(settled: Settled) -> Iterator[str]:
    """What an output does not say of activations that its source says, or the reverse."""
    source, format = settled.skeleton.source, settled.resolved.format
    known, packing = source.quantization or {}, settled.skeleton.packing
    if packing is None:
        return
    if packing.left_out is not None:
        yield packing.left_out
    if isinstance(format, Dense):
        return
    before, after = _rounds_activations(known), _rounds_activations(settled.config)
    if before != after:
        yield (
            f"{'the source' if before else f'a {format.name} file'} declares that servers round activations too, and "
            f"{'the output' if before else 'the source'} does not"
        )
