"""The interface of a method: it chooses the codes of a weight on a scheme's grids, from calibration statistics.

A method may first rewrite a block (decoder layer) into an equivalent one that loses less in rounding. It does so one
*fold* at a time. Methods compose: `awq+gptq` rewrites by AWQ, then chooses codes by GPTQ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from fewbit import registry
from fewbit.errors import PlanError
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import QTensor, Scheme
from fewbit.stats import Need, Stats


@dataclass
class Choice:
    """The result for one weight.

    `notes`: remarks for the user, such as a raised damping. `target`: the share of the error of its input that the
    weight corrects (`methods/targets.py`); None if it was not measured.
    """

    weight: QTensor
    notes: list[str] = field(default_factory=list)
    target: float | None = None


class Fold(ABC):
    """A place where a block can be scaled without changing its output.

    Some linears, the readers, read the same tensor of K columns. Their columns are multiplied by s [K]; whatever
    produces the tensor is divided by s.
    """

    readers: tuple[str, ...]  # names of the linears that read the tensor

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Reader -> weight [N, K], float32."""

    @abstractmethod
    def mean_abs(self) -> Tensor:
        """mean |x_j| of the readers' input, [K]. Columns that must share one scale share one value."""

    @abstractmethod
    def error(self, weights: Mapping[str, Tensor]) -> float:
        """Squared error in the output of the attention or MLP that contains the readers, computed with `weights`."""

    def errors(self, candidates: Sequence[Tensor], error: Callable[[Tensor], float]) -> list[float]:
        """`error` of each candidate for the scales. In a distributed run, a rank computes every `world_size`-th one."""
        return [error(scales) for scales in candidates]

    @abstractmethod
    def stats(self, scales: Tensor) -> Stats:
        """Statistics of the readers' input, Hessian included, as if its columns were divided by `scales` [K]."""

    @abstractmethod
    def stored(self, scales: Tensor) -> Tensor:
        """The feasible scales [K] nearest to these. They are 1 for columns that cannot be folded.

        A fold divides a norm's weight, which a file rounds to its own dtype; the scales follow from the rounded weight.
        """


def option(default: bool | int | float, help: str, optional: str = "") -> Any:
    """A dataclass field that is an option of a method: a flag of `fewbit quantize`, and a key of a plan's rule.

    optional: what None stands for. With it, None is the default, and a value has the type of `default`.
    """
    metadata = {"help": help, "type": type(default), "optional": optional}
    return field(default=None if optional else default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """An option, the methods that have it with this meaning, its default and its help.

    type: of its values. optional: what the default None stands for.
    """

    name: str
    methods: tuple[str, ...]
    default: bool | int | float | None
    help: str
    type: type
    optional: str

    @property
    def flag(self) -> str:
        """As on the command line."""
        flag = self.name.replace("_", "-")
        return f"--{flag} / --no-{flag}" if self.type is bool else f"--{flag}"

    @property
    def shown(self) -> str:
        """The default, as it would be written, or what it stands for."""
        if self.default is None:
            return self.optional
        return ("on" if self.default else "off") if isinstance(self.default, bool) else f"{self.default:g}"


@dataclass(frozen=True)
class Method(ABC):
    """A way to choose codes. Frozen: its fields are its options, each made by `option`."""

    needs: ClassVar[Need] = Need.NOTHING  # the least statistic that it gathers in calibration
    rewrites: ClassVar[bool] = False  # whether it implements `rewrite`

    def need(self, scheme: Scheme) -> Need:
        """The statistic to gather for a weight of this scheme: `needs` or more."""
        return self.needs

    def rewrite(self, fold: Fold, schemes: Mapping[str, Scheme]) -> Tensor | None:
        """The scales [K] for the columns of the fold's readers, as `fold.stored` returns them; None: do not scale.

        `schemes`: reader -> the scheme it will be quantized with. The pipeline scales the block and checks that its
        output stays the same, before it gathers statistics and before any code is chosen.
        """
        return None

    def quantize(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> Choice:
        """Choose codes for `w` [N, K] on grids of `scheme`. By default, round to nearest."""
        codes, grids = scheme.nearest(w)
        return Choice(QTensor(scheme, (w.shape[0], w.shape[1]), scheme.pack(codes, grids)))

    def quantize_alike(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Stats | None) -> list[Choice]:
        """`quantize` for several weights with the same input. A method may do the work that they share only once."""
        return [self.quantize(w, scheme, stats) for w, scheme in zip(weights, schemes, strict=True)]


@dataclass(frozen=True)
class Composed(Method):
    """Rewrite by the method `first`, then choose codes by the method `then`."""

    first: Method
    then: Method

    rewrites: ClassVar[bool] = True

    @property
    def needs(self) -> Need:  # type: ignore[override]
        return max(self.then.needs, Need.MEAN_ABS)  # the rewrite needs calibration inputs even if `then` needs none

    def need(self, scheme: Scheme) -> Need:
        return max(self.then.need(scheme), self.needs)

    def rewrite(self, fold: Fold, schemes: Mapping[str, Scheme]) -> Tensor | None:
        """The scales of `first`, if they also lower the error with codes chosen by `then`; else None.

        `first` searches its scales with its own rounding, and knows nothing of `then`.
        """
        scales = self.first.rewrite(fold, schemes)
        if scales is None:
            return scales

        def error(scales: Tensor) -> float:
            stats, values = fold.stats(scales), {}
            for name, w in fold.weights().items():
                values[name] = self.then.quantize(w * scales, schemes[name], stats).weight.dequantize().div_(scales)
            return fold.error(values)

        scaled, plain = fold.errors([scales, torch.ones_like(scales)], error)
        return scales if scaled < plain else None

    def quantize(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> Choice:
        return self.then.quantize(w, scheme, stats)

    def quantize_alike(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Stats | None) -> list[Choice]:
        return self.then.quantize_alike(weights, schemes, stats)


def make(name: str, options: Mapping[str, str] | None = None) -> Method:
    """The method `name`, or two methods as in `awq+gptq`, with options given as text.

    An option goes to each of the two methods that has it. PlanError for an unknown name, option or value.
    """
    names = name.split("+")
    classes = [registry.get("methods", part) for part in names]
    if len(classes) > 2 or not all(cls.rewrites for cls in classes[:-1]) or len(set(names)) < len(names):
        first = ", ".join(sorted(key for key, cls in registry.entries("methods").items() if cls.rewrites))
        raise PlanError(
            f"method {name!r} does not compose",
            f"The method before the + must be one that rewrites ({first}), as in awq+gptq.",
        )
    known = {f.name for cls in classes for f in fields(cls)}
    for key in options or {}:
        if key not in known:
            raise registry.unknown(f"option of method {name}", key, known or ["(it has none)"])
    methods = [_build(cls, options or {}) for cls in classes]
    return methods[0] if len(methods) == 1 else Composed(methods[0], methods[1])


def _build(cls: Any, options: Mapping[str, str]) -> Method:
    own = {f.name: f.metadata["type"] for f in fields(cls)}
    values = {key: _parse(text, own[key], key) for key, text in options.items() if key in own}
    method = cls(**values)
    assert isinstance(method, Method)
    return method


def options() -> list[Option]:
    """The options of all methods. Methods with an option of the same meaning and default share it."""
    found: dict[str, Option] = {}
    for method, cls in registry.entries("methods").items():
        for f in fields(cls):
            default: Any = f.default
            own = Option(f.name, (method,), default, **f.metadata)
            key = str(replace(own, methods=()))
            found[key] = replace(own, methods=(*found[key].methods, method)) if key in found else own
    return list(found.values())


def option_types() -> dict[str, type]:
    """Option -> its type, over all methods."""
    return {each.name: each.type for each in options()}


def name_of(method: Method) -> str:
    """The name from which `make` builds a method of this class."""
    if isinstance(method, Composed):
        return f"{name_of(method.first)}+{name_of(method.then)}"
    return next(name for name, cls in registry.entries("methods").items() if cls is type(method))


def _parse(text: str, kind: type, option: str) -> Any:
    """Parse the text of an option as a value of its type. PlanError that names the option if that fails."""
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            raise PlanError(f"`{option}`: {text!r} is neither true nor false")
        return text.lower() in ("true", "1", "yes", "on")
    try:
        return kind(text)
    except ValueError:
        raise PlanError(f"`{option}`: {text!r} is not a valid {kind.__name__}") from None


def in_compute_dtype(w: Tensor) -> Tensor:
    """`w` in the dtype for computation: float64 stays, other dtypes become float32. Read-only: may be `w` itself."""
    return w.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
