"""What a method is: it chooses codes on a scheme's grids, given what calibration measured.

Before that it may rewrite the block to an equal one that rounds better, one *fold* at a time. Methods compose:
`awq+gptq` rewrites as awq does, and chooses codes as gptq does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from fewbit import registry
from fewbit.errors import PlanError
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import QTensor, Scheme
from fewbit.stats import Need, Stats


@dataclass
class Choice:
    """What a method chose for one weight, and what it had to do that a user should know of."""

    weight: QTensor
    notes: list[str] = field(default_factory=list)


class Fold(ABC):
    """Where a block can be scaled and stay the same: columns of some linears times s, what feeds them over s."""

    readers: tuple[str, ...]  # the linears, which read one tensor of K columns

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Reader -> its weight [N, K], float32."""

    @abstractmethod
    def mean_abs(self) -> Tensor:
        """mean |x_j| of what the readers read, [K]; one value for columns that must be scaled alike."""

    @abstractmethod
    def error(self, weights: Mapping[str, Tensor]) -> float:
        """Squared error of what the readers serve (their attention, their MLP), had they these weights."""

    def errors(self, candidates: Sequence[Tensor], error: Callable[[Tensor], float]) -> list[float]:
        """`error` of each of some scales; where several processes share a run, they share these too."""
        return [error(scales) for scales in candidates]

    @abstractmethod
    def stats(self, scales: Tensor) -> Stats:
        """What was measured of the readers' input, had its columns been divided by `scales`: up to the Hessian."""

    @abstractmethod
    def stored(self, scales: Tensor) -> Tensor:
        """The scales [K] nearest to these that can be had: 1 where nothing can be folded, the others as files round."""


def option(default: bool | int | float, help: str) -> Any:
    """A field of a method that is an option of it: a flag of `fewbit quantize`, and a key of a plan's rule."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Option:
    """What is known of an option: the methods that have it under this name with this meaning, its default, its help."""

    name: str
    methods: tuple[str, ...]
    default: bool | int | float
    help: str

    @property
    def flag(self) -> str:
        """As on the command line."""
        flag = self.name.replace("_", "-")
        return f"--{flag} / --no-{flag}" if isinstance(self.default, bool) else f"--{flag}"

    @property
    def shown(self) -> str:
        """The default, as it would be written."""
        return ("on" if self.default else "off") if isinstance(self.default, bool) else f"{self.default:g}"


@dataclass(frozen=True)
class Method(ABC):
    """A way to choose codes. Frozen: its fields are its options, each made by `option`."""

    needs: ClassVar[Need] = Need.NOTHING
    rewrites: ClassVar[bool] = False  # whether it has a `rewrite`

    def rewrite(self, fold: Fold, schemes: Mapping[str, Scheme]) -> Tensor | None:
        """Scales [K], as `fold.stored` gives them, for the columns of its readers; None: leave them as they are.

        `schemes` says what each reader will get. The block is scaled, and found equal, before any code is chosen and
        any statistic gathered.
        """
        return None

    def quantize(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> Choice:
        """Codes for `w` [N, K] on grids of `scheme`. By default each weight goes to its nearest value."""
        codes, grids = scheme.nearest(w)
        return Choice(QTensor(scheme, (w.shape[0], w.shape[1]), scheme.pack(codes, grids)))

    def quantize_alike(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Stats | None) -> list[Choice]:
        """`quantize` of each of some weights that read the same input: methods may share work among them."""
        return [self.quantize(w, scheme, stats) for w, scheme in zip(weights, schemes, strict=True)]


@dataclass(frozen=True)
class Composed(Method):
    """`first`'s rewrite, then `then`'s codes."""

    first: Method
    then: Method

    rewrites: ClassVar[bool] = True

    @property
    def needs(self) -> Need:  # type: ignore[override]
        return max(self.then.needs, Need.MEAN_ABS)  # whatever is rewritten, inputs must be there

    def rewrite(self, fold: Fold, schemes: Mapping[str, Scheme]) -> Tensor | None:
        """`first`'s scales where they also serve the codes that `then` chooses; it knows only those it would choose."""
        scales = self.first.rewrite(fold, schemes)
        if scales is None or self.then.needs > Need.HESSIAN:
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
    """The method `name`, or two as `awq+gptq`, with options given as text.

    An option goes to each of the two that has it. PlanError naming what it does not know or cannot read.
    """
    names = name.split("+")
    classes = [registry.get("methods", part) for part in names]
    if len(classes) > 2 or not all(cls.rewrites for cls in classes[:-1]) or len(set(names)) < len(names):
        first = ", ".join(sorted(key for key, cls in registry.entries("methods").items() if cls.rewrites))
        raise PlanError(
            f"method {name!r} does not compose", f"Before a + stands one that rewrites ({first}), as awq+gptq."
        )
    known = {f.name for cls in classes for f in fields(cls)}
    for key in options or {}:
        if key not in known:
            raise registry.unknown(f"option of method {name}", key, known or ["(it has none)"])
    made = [_made(cls, options or {}) for cls in classes]
    return made[0] if len(made) == 1 else Composed(made[0], made[1])


def _made(cls: Any, options: Mapping[str, str]) -> Method:
    own = {f.name: f.default for f in fields(cls)}
    read = {key: _read(text, own[key], f"--{key.replace('_', '-')}") for key, text in options.items() if key in own}
    made = cls(**read)
    assert isinstance(made, Method)
    return made


def options() -> list[Option]:
    """The options of all methods. Methods that mean the same by one, with the same default, share it."""
    found: dict[tuple[str, Any, str], list[str]] = {}
    for method, cls in registry.entries("methods").items():
        for f in fields(cls):
            found.setdefault((f.name, f.default, f.metadata["help"]), []).append(method)
    return [Option(name, tuple(methods), default, help) for (name, default, help), methods in found.items()]


def option_types() -> dict[str, type]:
    """Option -> its type, over all methods."""
    return {each.name: type(each.default) for each in options()}


def name_of(method: Method) -> str:
    """The name by which `make` gives a method of this kind."""
    if isinstance(method, Composed):
        return f"{name_of(method.first)}+{name_of(method.then)}"
    return next(name for name, cls in registry.entries("methods").items() if cls is type(method))


def _read(text: str, default: Any, flag: str) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            raise PlanError(f"{flag}: {text!r} is neither true nor false")
        return text.lower() in ("true", "1", "yes", "on")
    try:
        return type(default)(text)
    except ValueError:
        raise PlanError(f"{flag}: {text!r} is no {type(default).__name__}") from None


def working(w: Tensor) -> Tensor:
    """`w` in the type to compute in: float64 stays, all else becomes float32. Not to be written to: it may be `w`."""
    return w.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
