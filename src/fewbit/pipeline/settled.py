"""A plan resolved for one model, and the checks that run before quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from typing import Any

from torch import Tensor

from fewbit.errors import NumericsError, PlanError
from fewbit.formats.base import Shape
from fewbit.models import blocks, heads, stored
from fewbit.models.gguf import header as gguf_header
from fewbit.models.gguf import kinds
from fewbit.models.gguf import names as gguf_names
from fewbit.models.skeleton import Skeleton
from fewbit.names import in_short
from fewbit.plans import mixtures
from fewbit.plans import plan as plans
from fewbit.plans.plan import Assignment, Resolved
from fewbit.plans.rules import names_head
from fewbit.schemes.base import chunk_rows
from fewbit.stats import Need

_PAGES = 1 << 30  # bytes of files that are read before their pages are dropped
_LOWEST_SHARE = 0.5  # of the parameters in blocks
_SAVES = 0.98  # of the source's bits per weight; quantizing to fewer bits saves something


@dataclass(frozen=True)
class Settled:
    """A plan resolved for one model: the model, and the scheme and method of each weight.

    variant: keys of the quantization config that differ from those that the format writes by default. exact: no value
    may change, not even of a weight that stays unquantized. fused: module -> the fused parameter whose tensors hold
    its weight in the output, in formats that store all experts of a layer together.
    """

    skeleton: Skeleton
    resolved: Resolved
    variant: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False
    fused: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, skeleton: Skeleton, plan: plans.Plan) -> Settled:
        """Resolve `plan` for the model's shapes. PlanError if the plan does not fit them."""
        shapes: dict[str, Shape] = {n: s for block in skeleton.blocks for n, s in skeleton.linears(block).items()}
        format, whole, own, head = plans.format_of(plan), None, skeleton, skeleton.head_name
        if format.suffix:
            whole, head = model_of(skeleton), ""
            shapes |= skeleton.outside()
        elif head and format.packs_head and names_head(plan.rules, head, shapes):
            own = heads.untied(skeleton)
            shapes[head] = own.outside()[head]
        else:
            head = ""
        modules = [name for name, _ in skeleton.model.named_modules()]
        modules += [name.rpartition(".")[0] for name in skeleton.without_place.values()]  # such as MTP blocks
        tied = {second.rpartition(".")[0]: first.rpartition(".")[0] for second, first in own.tied.items()}
        resolved = plans.resolve(plan, shapes, whole, skeleton.dtype_of_source, modules, tied, head)
        return cls(own if head in resolved.assignments else skeleton, resolved)

    @property
    def packed_head(self) -> str:
        """The output head if it is packed in a folder, where only a rule that names it packs it; else ""."""
        head = self.skeleton.head_name
        return head if head in self.resolved.assignments and not self.resolved.format.suffix else ""

    @cached_property
    def stored_as(self) -> dict[str, str]:
        """Module -> its name in the output, of each quantized weight."""
        return stored.modules(self.skeleton, self.resolved.assignments)

    def part(self, module: str, suffix: str) -> str:
        """The name in the model of a tensor that stores the weight of `module` in the output."""
        return f"{self.fused[module]}{suffix}" if module in self.fused else f"{module}.{suffix}"

    @cached_property
    def outside(self) -> list[Assignment]:
        """Quantized weights outside the blocks: embeddings and head of a GGUF file, and the head of a folder whose plan
        names it."""
        blocks = tuple(f"{block}." for block in self.skeleton.blocks)
        return [a for a in self.resolved.assignments.values() if not a.module.startswith(blocks)]

    @property
    def share(self) -> float:
        """Share of the blocks' parameters that the plan quantizes."""
        besides = {a.module for a in self.outside}
        quantized = sum(a.shape[0] * a.shape[1] for a in self.resolved.assignments.values() if a.module not in besides)
        return quantized / self.skeleton.parameters_in_blocks()

    @cached_property
    def need(self) -> Need:
        """The most detailed input statistic that a method of the plan needs. None are measured outside the blocks."""
        besides = {a.module for a in self.outside}
        inside = (a.need for a in self.resolved.assignments.values() if a.module not in besides)
        return max(inside, default=Need.NOTHING)

    def on_the_source(self) -> list[str]:
        """Notes on a source whose head is tied and gets a weight of its own, and on one that is already quantized."""
        packing, assignments, notes = self.skeleton.packing, self.resolved.assignments.values(), list[str]()
        if self.skeleton.untied:
            own = self.resolved.assignments[self.packed_head]
            nbytes = sum(spec.nbytes for spec in self.resolved.format.specs(own.shape, own.scheme).values())
            notes.append(
                f"{own.module} is tied to the embedding, which stays in 16 bits: it becomes a weight of its own, of "
                f"{nbytes:,} bytes, and config.json says that they are not tied"
            )
        if packing is None:
            return notes
        notes.append(
            f"the source is already quantized ({packing.said}); errors are measured against its dequantized weights"
        )
        count = sum(a.shape[0] * a.shape[1] for a in assignments)
        bits = 8 * sum(a.scheme.nbytes(a.shape) for a in assignments) / count
        packed = stored.quantized_modules(self.skeleton)
        plain = sum(a.shape[0] * a.shape[1] for a in assignments if a.module not in packed)
        before = (packing.bits * (count - plain) + 8 * packing.dtype.itemsize * plain) / count
        if bits >= _SAVES * before:
            notes.append(
                f"the plan takes {bits:.4g} bits per weight with scales. The source's files take {before:.4g}, "
                "with all that they store for these weights: quantizing it again adds error and saves nothing"
            )
        return notes if packing.left_out is None else [*notes, packing.left_out]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The quantization_config of config.json, empty if nothing is quantized. It names every other linear."""
        quantized = self.resolved.assignments
        if not quantized:
            return {}
        skipped = stored.skipped(self.skeleton, quantized)
        for key, spec in self.skeleton.carried(quantized).items():
            name = key.removesuffix(".weight")
            # Some readers match a name as a prefix or suffix of other names.
            alike = any(module.startswith(name) or module.endswith(name) for module in quantized)
            if len(spec.shape) == 2 and name != key and (not alike or self.resolved.format.ignores_all):
                skipped.append(name)
        if self.resolved.format.ignores_all:
            skipped = list(dict.fromkeys([*skipped, *stored.matrices(self.skeleton, quantized)]))
        own = [replace(a, module=self.stored_as[module]) for module, a in quantized.items()]
        config = self.resolved.format.config(own, skipped, self.skeleton.dtype_of_source)
        if self.packed_head:
            config = self.resolved.format.with_head(config, self.stored_as[self.packed_head])
        return {**config, **self.variant}

    def check(self) -> None:
        """Run all checks that need no quantization. PlanError; NumericsError that names a tensor with NaN or Inf."""
        self.check_plan()
        self._check_values()
        self.skeleton.check_text(calibrates=self.need > Need.NOTHING)

    def check_plan(self) -> None:
        """PlanError unless the model can be quantized, and the plan quantizes enough of it."""
        if reason := self.skeleton.why_not():
            raise PlanError(reason)
        if self.share < _LOWEST_SHARE:
            why = [*self.resolved.notes, f"not quantized: {in_short(self.resolved.kept) or 'no linears'}"]
            raise PlanError(
                f"only {self.share:.0%} of the parameters in the model's blocks would be quantized:\n  "
                + "\n  ".join(why),
                f"At least {_LOWEST_SHARE:.0%} is required. Another scheme or format may fit more of them.",
            )

    def _check_values(self) -> None:
        """NumericsError if a tensor of the checkpoint has NaN or Inf."""
        checkpoint, read = self.skeleton.checkpoint, 0
        for key, _, spec in self.skeleton.passed_through():
            if not finite(checkpoint.get(key)):
                raise NumericsError(
                    f"{checkpoint.called(key)} has NaN or Inf",
                    f"The checkpoint {self.skeleton.source.folder} is damaged.",
                )
            if (read := read + spec.nbytes) > _PAGES:
                checkpoint.drop_pages()
                read = 0
        checkpoint.drop_pages()


def finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf. `aminmax` passes NaN on, and is 100 times as fast as `isfinite`."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    rows = tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)
    parts = (rows[part] for part in chunk_rows(*rows.shape))
    # PyTorch has no aminmax for 8-bit floats.
    ends = (end for part in parts for end in (part.float() if part.element_size() == 1 else part).aminmax())
    return all(isfinite(end) for end in ends)


def model_of(skeleton: Skeleton) -> mixtures.Model:
    """What a GGUF plan needs to know of the model. PlanError if llama.cpp has no name for one of its weights."""
    config = skeleton.config
    if blocks.towers(skeleton.model):
        kind = type(skeleton.model).__name__
        what = "an encoder" if getattr(config, "is_encoder_decoder", False) else "a vision or audio tower"
        raise PlanError(
            f"{kind} has {what}, and a GGUF file holds a language model alone",
            gguf_header.OTHER,
        )
    routes = gguf_names.routes(config)
    arch = gguf_names.architecture(config)
    outside = skeleton.outside()
    linears = [name for block in skeleton.blocks for name in skeleton.linears(block)]
    if unknown := [name for name in [*linears, *outside] if f"{name}.weight" not in routes]:
        raise PlanError(
            f"GGUF has no name for {unknown[0]} of a model of type {config.model_type!r}",
            gguf_header.OTHER,
        )
    return mixtures.Model(
        arch=arch.name,
        layers=config.num_hidden_layers,
        gqa=kinds.shared_heads(config, arch),
        experts=getattr(config, arch.experts) if arch.experts else 0,
        tied=not any(routes[f"{name}.weight"].name == "output.weight" for name in outside),
        names={name: routes[f"{name}.weight"].names[0].removesuffix(".weight") for name in [*linears, *outside]},
        transposed=frozenset(
            name for name in linears if (split := routes[f"{name}.weight"].split) is not None and not split.by_rows
        ),
        orders={name: order for name in linears if (order := routes[f"{name}.weight"].column_order) is not None},
    )
