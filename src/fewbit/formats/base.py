"""The interface of a format: names and layout of the tensors that store a quantized weight. It changes no values.

A checkpoint in a Hugging Face folder consists of safetensors files and the `quantization_config` in config.json. It
stores each weight as a few tensors named `<module>.<suffix>`.

    lay_out:  weight (QTensor)       ->  suffix -> tensor
    read:     suffix -> tensor       ->  weight (QTensor)
    specs:    shape, scheme          ->  suffix -> shape and dtype, without data
    find:     headers of all files   ->  module -> suffix -> shape and dtype
    find_fused: the same             ->  fused parameter -> ending -> shape and dtype
    describe: headers of one weight  ->  scheme, shape
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

from fewbit import registry
from fewbit.errors import FormatError, PlanError
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import PartSpec, QTensor, Scheme

Shape = tuple[int, int]


@dataclass(frozen=True)
class Stored:
    """A weight to be stored: its module, its shape [N, K] and its scheme."""

    module: str
    shape: Shape
    scheme: Scheme


class Format(ABC):
    """A file format for quantized weights. It has no state, so one instance can handle any number of files."""

    name: ClassVar[str]
    quant_method: ClassVar[str]  # the format's name in the quantization_config
    # The file suffix of a format that stores the whole model in one file, embeddings and head quantized too. "": a
    # folder.
    suffix: ClassVar[str] = ""
    # Whether no plan writes the format. Models that are loaded from it are saved in it again.
    read_only: ClassVar[bool] = False
    readers: ClassVar[str] = ""  # other software that reads such files, for the documentation
    held: ClassVar[tuple[str, ...]] = ()  # the schemes in files of a format that no plan writes
    # Suffixes of small tensors that `describe` reads, because they hold what headers do not, such as the shape.
    metadata_suffixes: ClassVar[tuple[str, ...]] = ()
    # Suffixes of tensors that have no meaning for fewbit, such as scales of activations. Saving a model keeps them.
    carried_suffixes: ClassVar[tuple[str, ...]] = ()
    # Whether the config must name every module that keeps a weight matrix, exactly. Else it names linears, and no name
    # that is the start or end of a quantized one, because some readers match such parts.
    ignores_all: ClassVar[bool] = False
    # Whether readers take a packed output head, which `with_head` declares. Embeddings stay as they are.
    packs_head: ClassVar[bool] = False
    # The values of keys that a config lacks, where transformers' config class has other defaults.
    absent: ClassVar[Mapping[str, Any]] = {}
    # Variants of the layout that hold the same weights: name -> the keys of the config that choose it.
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    # Keys of the config of files with permuted columns (act-order). None: the format has no place for an order.
    permuted: ClassVar[Mapping[str, Any] | None] = None

    @abstractmethod
    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        """None if a weight of this shape and scheme can be stored, else the reason why not."""

    def why_not_moved(self, shape: Shape, scheme: Scheme) -> str | None:
        """As `why_not`, for a weight that `convert` moves from another file. It may also allow what no plan writes."""
        return self.why_not(shape, scheme)

    def with_activations(self, activations: str | None) -> Format:
        """This format for files that declare how a server rounds activations ("dynamic"). PlanError if it cannot."""
        if activations is None:
            return self
        raise PlanError(
            f"{self.name} files cannot declare that servers round activations",
            "Use the format compressed-tensors, or a plan without activations.",
        )

    def measures_inputs(self, scheme: Scheme) -> bool:
        """Whether a weight needs scales of its inputs beside it (`scales_of_inputs`), which calibration measures."""
        return False

    def scales_of_inputs(self, scheme: Scheme, largest: float) -> dict[str, Tensor]:
        """Suffix -> tensor of the scales of a linear's inputs. largest: the largest magnitude of an input; 0: none."""
        return {}

    def suited(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """The variant of `scheme` for a model of this dtype; by default `scheme` itself."""
        return scheme

    def why_not_together(self, weights: Sequence[Stored], kept: Sequence[str] = ()) -> str | None:
        """None if one checkpoint can store all these weights, else the reason. By default all need the same scheme.

        kept: modules that stay unquantized.
        """
        schemes = sorted({str(weight.scheme) for weight in weights})
        return f"{self.name} files store one scheme for all tensors, not {', '.join(schemes)}" if schemes[1:] else None

    @abstractmethod
    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        """Suffix -> shape and dtype of each tensor that stores a weight of this shape and scheme."""

    @abstractmethod
    def lay_out(self, weight: QTensor, config: Mapping[str, Any], module: str = "") -> dict[str, Tensor]:
        """Suffix -> tensor, with the shapes and dtypes of `specs`, in the variant of the format that `config` names.

        module: the weight's module in the checkpoint, for configs with settings for each module.
        """

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        """The weight stored in the tensors (suffix -> tensor) of `module`. FormatError if they do not fit together."""

    @abstractmethod
    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint with these weights.

        weights, skipped: with the names of modules in the checkpoint. dtype: that of the original weights, and so of
        activations; bfloat16 by default.
        """

    def with_head(self, config: Mapping[str, Any], head: str) -> dict[str, Any]:
        """`config`, of a checkpoint whose output head is packed, as readers need it. head: its module there."""
        return dict(config)

    @abstractmethod
    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, metadata: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        """Scheme and shape [N, K] of the weight of `module`.

        tensors: suffix -> header. metadata: suffix -> data, of the tensors in `metadata_suffixes`. FormatError that
        names the tensor if they contradict each other.
        """

    def variant(self, config: Mapping[str, Any]) -> str:
        """The variant of the layout that `config` names; "" for a format with only one."""
        return ""

    def as_stored(
        self, scheme: Scheme, shape: Shape, tensors: Mapping[str, Any], config: Mapping[str, Any], module: str
    ) -> tuple[Scheme, bool]:
        """The scheme of a weight as its data decides, and whether its columns are permuted (act-order).

        scheme: that of the headers, from `describe`. tensors: suffix -> lazy handle; `handle[...]` is the data. It
        reads small tensors only, never the codes.
        """
        return scheme, False

    def scheme(self, config: Mapping[str, Any]) -> Scheme | None:
        """The scheme that `config` requests for quantization at load time. None if the format does not support that."""
        return None

    def activations(self, names: Mapping[str, PartSpec]) -> dict[str, PartSpec]:
        """Module -> spec of the scales by which the outputs of an activation function are divided (AutoAWQ).

        names: the name and header of each tensor of the checkpoint.
        """
        return {}

    def why_unpacked(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> str | None:
        """None if the format reads every quantized weight of a checkpoint, else the reason why it is decoded instead.

        names: the name and header of each tensor.
        """
        return None

    @abstractmethod
    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        """Module -> suffix -> spec, for every quantized weight of a checkpoint. It reads headers only.

        names: the name and header of each tensor. FormatError if the config is invalid or a weight lacks a tensor.
        Weights of `find_fused` are not in it, nor those that a layout decodes beside the format
        (`Layout.beside_format`).
        """

    def find_fused(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        """Fused parameter -> ending -> spec, for tensors that hold the quantized weights of all experts of a layer.

        A tensor is named `<parameter><ending>`, and has the dimensions [experts, rows, ...]. The rows are the outputs
        of the experts' linears, in the order in which transformers' fused parameter has them. `describe`, `read`,
        `specs` and `lay_out` take the tensors of one expert, or of some of its rows; the ending is the suffix. A layout
        (`formats/layouts`) of the same `quant_method` decodes the whole parameter. FormatError as in `find`.
        """
        return {}

    def describe_fused(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], fused: str
    ) -> tuple[int, Scheme, Shape]:
        """The number of experts of a fused parameter of `find_fused`, and scheme and shape [N, K] of each weight."""
        one = {ending: PartSpec(spec.shape[1:], spec.dtype) for ending, spec in tensors.items()}
        return next(iter(tensors.values())).shape[0], *self.describe(one, config, fused, {})


_rounded: ContextVar[list[tuple[str, int]] | None] = ContextVar("fewbit_rounded_scales", default=None)


def scales_were_rounded(name: str, count: int) -> None:
    """Warn that `count` scales of the tensor `name` changed, at once or at the end of `one_warning`."""
    together = _rounded.get()
    if together is None:
        _warn_of_rounded([(name, count)])
    else:
        together.append((name, count))


@contextmanager
def one_warning() -> Iterator[None]:
    """Inside this context, rounded scales of all tensors give one warning, when it ends."""
    found: list[tuple[str, int]] = []
    token = _rounded.set(found)
    try:
        yield
    finally:
        _rounded.reset(token)
    if found:
        _warn_of_rounded(found)


def _warn_of_rounded(found: Sequence[tuple[str, int]]) -> None:
    name, most = max(found, key=lambda each: each[1])
    tensors = f" in {len(found)} tensors; {name} has most of them ({most})" if found[1:] else f" in {name}"
    warnings.warn(
        f"{sum(count for _, count in found)} scales were rounded, as float16 cannot hold them exactly,{tensors}",
        stacklevel=3,
    )


def by_quant_method(name: str) -> Format | None:
    """The format with this `quant_method` in a quantization_config; None if fewbit has none."""
    return next((cls() for cls in registry.entries("formats").values() if cls.quant_method == name), None)


def storing(scheme: Scheme) -> list[str]:
    """Names of the formats in which a plan can store weights of `scheme`, if the shape is right."""
    shape = large(scheme)
    return [name for name, format in registry.entries("formats").items() if format().why_not(shape, scheme) is None]


def large(scheme: Scheme) -> Shape:
    """A shape that is a multiple of everything that schemes and formats need."""
    return 4096, 4096 * max(1, scheme.group)


def for_module(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """`config` with the overrides for one module.

    gptqmodel's `dynamic` maps regular expressions to overrides; the first that matches the module applies.
    """
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise FormatError(f"dynamic in the quantization config is {dynamic!r}; an object of patterns expected")
    for pattern, overrides in dynamic.items():
        try:
            match = re.match(pattern.removeprefix("-:").removeprefix("+:"), module)
        except re.error as error:
            raise FormatError(
                f"dynamic in the quantization config: {pattern!r} is not a regular expression: {error}"
            ) from None
        if match and pattern.startswith("-:"):
            return config
        if match:
            if not isinstance(overrides, Mapping):
                raise FormatError(
                    f"dynamic in the quantization config: {pattern!r} has {overrides!r}; an object expected"
                )
            return {**config, **{key: value for key, value in overrides.items() if value is not None}}
    return config


def called(dtype: torch.dtype) -> str:
    """The name of a type without its module: float8_e4m3fn."""
    return str(dtype).removeprefix("torch.")


def wrong(name: str, found: PartSpec, expected: str) -> FormatError:
    """The error for a tensor of a wrong dtype or shape."""
    return FormatError(f"{name} is {called(found.dtype)} {list(found.shape)}; {expected} expected")


def missing(name: str, needed_by: str) -> FormatError:
    """The error for a tensor that is not in the checkpoint."""
    return FormatError(f"{name} is missing; {needed_by} needs it")


def of_all_rows(values: Tensor, what: str) -> Tensor:
    """The entry [...] that all rows of `values` [N, ...] have. FormatError if they differ.

    what: the beginning of the error, such as "fp8 files have one scale".
    """
    if not bool((values == values[0]).all()):
        raise FormatError(f"{what} for a weight, but its rows have several")
    return values[0].clone()


def stored_order(group_of: Tensor | None, k: int, groups: int, name: str) -> Tensor | None:
    """The permutation [K] that sorts the columns by group. None if they are sorted already.

    group_of: the group of each of the `k` columns, the tensor `name` of a file. FormatError if it is out of range, or
    if the groups differ in size.
    """
    if group_of is None:
        return None
    sound = int(group_of.min()) >= 0 and int(group_of.max()) < groups
    if not sound or not (torch.bincount(group_of.long(), minlength=groups) == k // groups).all():
        raise FormatError(f"{name} does not put {k // groups} columns in each of {groups} groups")
    if (group_of.diff() >= 0).all():
        return None
    return torch.argsort(group_of.long(), stable=True)
