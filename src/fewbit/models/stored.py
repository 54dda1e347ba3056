"""The names of an output's tensors: those of the original, so that every reader of the original finds them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.models import experts
from fewbit.models.conversions import owner
from fewbit.models.packing import Weight
from fewbit.models.pieces import Piece
from fewbit.models.skeleton import Skeleton
from fewbit.schemes.base import PartSpec


def original(skeleton: Skeleton, key: str, name: str, suffix: str | None = None) -> str | None:
    """The checkpoint's name of the tensor with the model name `name`, which `Skeleton.passed_through` gives with `key`.

    suffix: of a part of a packed weight, in place of "weight". None if the checkpoint has no such tensor, because
    transformers computes it from others.
    """
    if skeleton.checkpoint.is_part(key) or (name in skeleton.merged and name != key):
        return None
    if suffix is None:
        return key
    return f"{key.removesuffix('.weight')}.{suffix}" if key.endswith(".weight") else None


def names(skeleton: Skeleton, originals: Mapping[str, str | None], packed: Container[str]) -> dict[str, str]:
    """Model name -> name in an output. originals: model name -> name in the checkpoint, or None.

    A tensor without original has the name that transformers' `save_pretrained` writes. So has one whose name in the
    checkpoint lacks only the base model's prefix, which some readers expect. All tensors of a module in `packed` have
    the same prefix: that of the model where `save_pretrained` would merge or split the weight, because it does not
    merge or split the scales.
    """
    marked = {name: torch.empty(0, dtype=torch.float32, device="cpu") for name, key in originals.items() if key != name}
    written = {id(tensor): name for name, tensor in revert_weight_conversion(skeleton.model, marked).items()}
    prefix, found = f"{skeleton.model.base_model_prefix}.", dict[str, str]()
    standards = {name: written.get(id(marked.get(name)), name) for name in originals}
    modules: dict[str, set[str]] = {}  # packed module -> the prefixes of its tensors in the output
    for name, standard in standards.items():
        if (module := owner(name)) in packed:
            modules.setdefault(module, set()).add(standard.removesuffix(name.removeprefix(module)))
    for name, key in originals.items():
        standard = standards[name] if len(modules.get(owner(name), ())) < 2 else name
        bare = key is not None and standard in (f"{prefix}{key}", key.removeprefix(prefix))
        found[name] = standard if key is None or (bare and name in marked) else key
    return found


def weights(skeleton: Skeleton) -> dict[str, Weight]:
    """The quantized weights that fewbit can keep packed, by the names of their modules in the model.

    A weight that the model class has no place for, or that transformers splits, has the name of the checkpoint.
    """
    found = skeleton.packing.weights if skeleton.packing is not None else {}
    return {skeleton.name_of.get(key, key).removesuffix(".weight"): weight for key, weight in found.items()}


def quantized_modules(skeleton: Skeleton) -> set[str]:
    """The modules of the model whose weights the source has quantized, kept packed or not."""
    packing, whole_of = skeleton.packing, skeleton.checkpoint.whole_of
    if packing is None:
        return set()
    found = {*packing.weights, *packing.fused, *packing.floats_only}
    return {name.removesuffix(".weight") for key, name in skeleton.name_of.items() if found & {key, whole_of(key)}}


def modules(skeleton: Skeleton, quantized: Iterable[str]) -> dict[str, str]:
    """Module -> its name in an output, of the modules `quantized`, whose weights are packed."""
    packed = {f"{module}.weight": module for module in quantized}
    originals = {
        f"{packed[name]}.{part}": original(skeleton, key, name, part)
        for key, name, _ in skeleton.passed_through(packed)
        if name in packed
        for part in ("weight", "scale")  # a weight that is merged or split by its name, and a part that is not
    }
    found = names(skeleton, originals, set(packed.values()))
    return {module: found.get(f"{module}.scale", module).removesuffix(".scale") for module in packed.values()}


def matrices(skeleton: Skeleton, quantized: Iterable[str]) -> list[str]:
    """The modules of an output, linear or not, that keep a weight matrix: routers, the head, no embeddings."""
    packed = {f"{module}.weight" for module in quantized}
    keys = {name: (key, spec) for key, name, spec in skeleton.passed_through(packed) if name not in packed}
    found = names(skeleton, {name: original(skeleton, key, name) for name, (key, _) in keys.items()}, ())
    embeddings = {n for n, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Embedding)}
    return [
        found[name].removesuffix(".weight")
        for name, (_, spec) in keys.items()
        if name.endswith(".weight") and len(spec.shape) == 2 and name.removesuffix(".weight") not in embeddings
    ]


def skipped(skeleton: Skeleton, quantized: Iterable[str]) -> list[str]:
    """The linears that are not among `quantized`, by their names in the model, and in the output if these differ."""
    packed, linears = set(quantized), skeleton.all_linears()
    found = dict.fromkeys(name for name in linears if name not in packed)
    keys = {name: key for key, name, _ in skeleton.passed_through({f"{module}.weight" for module in packed})}
    stored = names(skeleton, {n: original(skeleton, k, n) for n, k in keys.items() if n.endswith(".weight")}, packed)
    others = {n.removesuffix(".weight"): s.removesuffix(".weight") for n, s in stored.items()}
    names_of_packed = packed | {others.get(module, module) for module in packed}
    split = {key for name, key in skeleton.splits.items() if key in keys.values()}
    for other in (*(others.get(name, name) for name in found.copy()), *(key.removesuffix(".weight") for key in split)):
        # Some readers match a name as a prefix or suffix of other names.
        if not any(module.startswith(other) or module.endswith(other) for module in names_of_packed):
            found[other] = None
    return list(found)


def fuse_experts(skeleton: Skeleton, quantized: Container[str] = ()) -> None:
    """Let an output have the fused parameters of experts, where transformers cannot load those of single experts.

    quantized: modules whose weights are not meant, because the output has them quantized.
    """
    known = get_model_conversion_mapping(skeleton.model)
    if len(experts.unmerged(known)) < len(known):  # it merges them
        return
    checkpoint, keys = skeleton.checkpoint, {name: key for key, name in skeleton.name_of.items()}
    for path, module in skeleton.model.named_modules():
        for fused, shape in module.shapes.items() if isinstance(module, experts.SeparateExperts) else ():
            pieces = {
                f"{path}.{number}.{piece.leaf}.{piece.kind}": (piece, number)
                for piece in module.pieces
                if piece.fused == fused
                for number in range(module.count)
            }
            if any(name.endswith(".weight") and name.removesuffix(".weight") in quantized for name in pieces):
                continue
            own = {keys[name]: piece for name, piece in pieces.items()}
            for key in own:
                del skeleton.name_of[key]
            wholes = {checkpoint.whole_of(key) for key in own}
            if len(wholes) == 1 and not wholes & own.keys():  # the source has it
                skeleton.name_of[wholes.pop()] = f"{path}.{fused}"
                continue
            spec = PartSpec(tuple(shape), checkpoint.specs[next(iter(own))].dtype)
            checkpoint.add(f"{path}.{fused}", spec, _Fused(checkpoint, own, spec))
            skeleton.name_of[f"{path}.{fused}"] = f"{path}.{fused}"


@dataclass(frozen=True)
class _Fused:
    """A lazy handle of a fused parameter. parts: checkpoint name of a tensor of one expert -> its piece and number."""

    checkpoint: Checkpoint
    parts: Mapping[str, tuple[Piece, int]]
    spec: PartSpec

    def __getitem__(self, index: Any) -> torch.Tensor:
        whole = torch.zeros(self.spec.shape, dtype=self.spec.dtype, device="cpu")
        for key, (piece, number) in self.parts.items():
            piece.of(whole, number).copy_(self.checkpoint.get(key))
        return whole[index]

    def get_shape(self) -> list[int]:
        return list(self.spec.shape)
