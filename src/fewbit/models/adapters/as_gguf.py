"""A LoRA as a GGUF file, which llama.cpp adds to the file of its model, and back.

    PEFT                                       GGUF (T is the name of the weight there: blk.0.attn_q.weight)
    M.lora_A.weight [r, K]                     T.lora_a [r, K], columns in the file's order
    M.lora_B.weight [N, r]                     T.lora_b [N, r], rows in the file's order
    the same of each expert of a layer         T.lora_a [E, r, K], T.lora_b [E, N, r]
    M.lora_embedding_A [r, V], _B [H, r]       T.lora_a [V, r], T.lora_b [H, r]
    scale: alpha / r, or alpha / sqrt(r)       adapter.lora.alpha / r. Other scales are multiplied into B

Source: convert_lora_to_gguf.py and src/llama-adapter.cpp of llama.cpp, as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor
from torch.nn.functional import pad

from fewbit.checks import is_finite
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.formats.containers.safetensors import read_file, write_file
from fewbit.models import scales
from fewbit.models.adapters.lora import INITS
from fewbit.models.gguf.architectures import TYPES, of_config
from fewbit.models.gguf.names import Route, architecture, routes
from fewbit.models.gguf.pieces import Split, decoded
from fewbit.models.source import Source
from fewbit.names import ADAPTER, ADAPTER_WEIGHTS
from fewbit.system.files import write_json

KEY = re.compile(r"base_model\.model\.(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))")
_EMBEDDING = "token_embd.weight"
# Settings of PEFT that a GGUF adapter has no place for, and their values without effect.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "layer_replication": ([],),
    "alora_invocation_tokens": ([],),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "kasa_config": (),
    "init_lora_weights": INITS,
}


_FOLDED = (
    "the adapter was trained on a model with AWQ's scales. In llama.cpp, use it with a GGUF file that fewbit convert "
    "made of that model, not with a file of the original model. fewbit can use it with both"
)


@dataclass(frozen=True)
class _Pair:
    """The matrices of one weight: a [r, K] and b [N, r]. Of an embedding [V, H]: a [r, V] and b [H, r]."""

    a: Tensor
    b: Tensor
    embeds: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]


# --- writing ---


@dataclass(frozen=True)
class Made:
    """A GGUF file with an adapter. notes: limits of its use in llama.cpp, for the user."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, path: Path) -> None:
        entries = [Entry(name, "f32", tuple(tensor.shape)) for name, tensor in self.tensors.items()]
        with GgufWriter(path, self.metadata, entries) as writer:
            for name, tensor in self.tensors.items():
                writer.add(name, tensor)


def made(folder: Path, lora: Mapping[str, Any], config: Any, base: Source) -> Made:
    """The file for the adapter in `folder`, with PEFT's config `lora`.

    base: its model, and config: transformers' config of it. If the model is a GGUF file, the adapter is of the file's
    architecture; llama.cpp compares them. PlanError if llama.cpp has no such adapters.
    """
    if reason := _why_not(lora) or _why_not_of(config):
        raise PlanError(f"{folder} cannot be a GGUF file: {reason}")
    alpha = float(lora.get("lora_alpha") or 1.0)
    known = scales.read_record(folder)
    stored = GgufFile(base.files[0]).metadata if base.gguf is not None else {}
    metadata: dict[str, Any] = {
        "general.architecture": stored.get("general.architecture", architecture(config).name),
        "general.type": "adapter",
        "general.name": folder.name,
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    if known is not None:
        metadata[scales.GGUF_RECORD] = json.dumps({"schema_version": 1, "scales": scales.to_record(known)})
        metadata |= scales.to_metadata(known)
    return Made(metadata, _stored(_pairs(folder, config.vocab_size), lora, config, alpha), (_FOLDED,) if known else ())


def _why_not(lora: Mapping[str, Any]) -> str | None:
    """Why llama.cpp has no adapters of this kind; None if it has."""
    if (kind := lora["peft_type"]) != "LORA":
        return f"llama.cpp knows LoRA only, not {kind}"
    for name, plain in _PLAIN.items():
        if (value := lora.get(name)) is not None and value not in plain:
            return f"llama.cpp has no LoRA with {name}={repr(value)[:80]}"
    return None


def _why_not_of(config: Any) -> str | None:
    """Why the adapters of a model and those of its GGUF file have other numbers; None if they have the same."""
    for key, factor in architecture(config).factors.items():
        if (found := getattr(config, key)) != factor.neutral:
            return f"the GGUF file of this model has {key} = {str(found)[:80]} multiplied into its weights"
    return None


def _pairs(folder: Path, rows: int) -> dict[str, _Pair]:
    """Module -> its matrices in float32. PlanError if the adapter has other tensors.

    PEFT saves an embedding or head of this many rows beside its LoRA. Training does not change it.
    """
    found: dict[str, dict[str, Tensor]] = {}
    embeddings = set[str]()
    for key, tensor in read_file(folder / ADAPTER_WEIGHTS)[0].items():
        if ".base_layer." in key and len(tensor) == rows:
            continue
        if (match := KEY.fullmatch(key)) is None or tensor.dim() != 2:
            raise PlanError(f"{folder} cannot be a GGUF file: llama.cpp has no place for {key} {list(tensor.shape)}")
        found.setdefault(match[1], {})[match[2] or match[3]] = tensor.float()
        embeddings |= {match[1]} if match[3] else set()
    for module, both in found.items():
        if len(both) != 2 or both["A"].shape[0] != both["B"].shape[1]:
            raise FormatError(f"{folder / ADAPTER_WEIGHTS}: lora_A and lora_B of {module} do not belong together")
    return {module: _Pair(both["A"], both["B"], module in embeddings) for module, both in found.items()}


def _stored(pairs: Mapping[str, _Pair], lora: Mapping[str, Any], config: Any, alpha: float) -> dict[str, Tensor]:
    """Name in the file -> tensor."""
    known, found = routes(config), dict[str, Tensor]()
    groups: dict[str, dict[int, tuple[str, _Pair]]] = {}
    for module, pair in pairs.items():
        route = known.get(f"{module}.weight")
        if route is None:
            raise PlanError(f"GGUF has no name for {module} of a model of type {config.model_type!r}")
        if reason := _why_not_there(route, config, pair.embeds):
            raise PlanError(f"the LoRA of {module} cannot be in a GGUF file: {reason}", "Train without this module.")
        groups.setdefault(route.name, {})[route.expert or 0] = (module, pair)
    for name, group in groups.items():
        module, first = next(iter(group.values()))
        route = known[f"{module}.weight"]
        if name == _EMBEDDING:
            made = _scaled(module, first, first.rank, lora, alpha)
            found |= {f"{name}.lora_a": made.a.T.contiguous(), f"{name}.lora_b": made.b}
        elif route.heights:
            found |= _of_stack(route, group, lora, alpha)
        elif route.expert is not None:
            found |= _of_experts(name, group, getattr(config, architecture(config).experts), lora, alpha)
        else:
            made = _scaled(module, first, first.rank, lora, alpha)
            found |= _of_file(route, made)
    return found


def _why_not_there(route: Route, config: Any, embeds: bool) -> str | None:
    """Why llama.cpp adds no LoRA to the weight of this name; None if it does. embeds: it is an embedding."""
    arch, name = architecture(config), re.sub(r"^blk\.\d+\.|\.weight$", "", route.name)
    tied = arch.tied or getattr(config, "tie_word_embeddings", False)
    if tied and name in ("token_embd", "output"):
        return "the model's output head is its embedding, and llama.cpp would use the LoRA in both or in neither"
    if embeds and route.name != _EMBEDDING:
        return f"{name} is not the embedding of tokens, and llama.cpp adds a LoRA to no other embedding"
    if route.squeezed or route.matrix or (route.split is not None and not _is_cut_by_rows(route)):
        return f"llama.cpp does not have {name} as a plain matrix"
    return f"llama.cpp ignores a LoRA of {name} in {arch.name}" if name in arch.without_lora else None


def _is_cut_by_rows(route: Route) -> bool:
    return route.split is not None and not any(each.by_head or each.transposed for each in route.split.shares)


def _scaled(module: str, pair: _Pair, rank: int, lora: Mapping[str, Any], alpha: float) -> _Pair:
    """The matrices with `rank` rows and columns, and b such that the scale is `alpha` / `rank`."""
    alphas = lora.get("alpha_pattern") or {}
    wanted = float(alphas.get(get_pattern_key(list(alphas), module), lora.get("lora_alpha") or 0.0))
    factor = wanted / (sqrt(pair.rank) if lora.get("use_rslora") else pair.rank) * rank / alpha
    more = rank - pair.rank
    return _Pair(pad(pair.a, (0, 0, 0, more)), pad(pair.b if factor == 1 else pair.b * factor, (0, more)))


def _of_experts(
    name: str, group: Mapping[int, tuple[str, _Pair]], experts: int, lora: Mapping[str, Any], alpha: float
) -> dict[str, Tensor]:
    """The two tensors of all experts of a layer. Experts without a LoRA get one of zeros."""
    rank = max(pair.rank for _, pair in group.values())
    made = {expert: _scaled(module, pair, rank, lora, alpha) for expert, (module, pair) in group.items()}
    first = next(iter(made.values()))
    none = _Pair(torch.zeros_like(first.a), torch.zeros_like(first.b))
    each = [made.get(expert, none) for expert in range(experts)]
    return {
        f"{name}.lora_a": torch.stack([pair.a for pair in each]),
        f"{name}.lora_b": torch.stack([pair.b for pair in each]),
    }


def _of_stack(
    route: Route, group: Mapping[int, tuple[str, _Pair]], lora: Mapping[str, Any], alpha: float
) -> dict[str, Tensor]:
    """The two tensors of a matrix that is several of the model. Each of these has own rows of a and columns of b."""
    rank = sum(pair.rank for _, pair in group.values())
    made = {place: _scaled(module, pair, rank, lora, alpha) for place, (module, pair) in group.items()}
    ranks = {place: pair.rank for place, (_, pair) in group.items()}
    a = torch.cat([made[place].a[:own] for place, own in ranks.items()])
    b, column = torch.zeros(sum(route.heights), rank, dtype=torch.float32, device="cpu"), 0
    for place, own in ranks.items():
        part = replace(route, expert=place).part_of(b)
        part[:, column : column + own] = made[place].b[:, :own]
        column += own
    return {f"{route.name}.lora_a": a, f"{route.name}.lora_b": b}


def _of_file(route: Route, pair: _Pair) -> dict[str, Tensor]:
    """The tensors of one weight: those of its pieces have the same a."""
    a = pair.a if route.column_order is None else pair.a[:, route.column_order]
    b = pair.b if route.rows is None else pair.b[route.rows]
    whole = [b] if route.split is None else route.split.cut(b)
    found = dict[str, Tensor]()
    for name, piece in zip(route.names, whole, strict=True):
        found |= {f"{name}.lora_a": a.contiguous(), f"{name}.lora_b": piece.contiguous()}
    return found


# --- reading ---


def opened(path: Path) -> GgufFile:
    """The file of an adapter. FormatError if it is damaged or holds anything else."""
    file = GgufFile(path)
    kind, of = file.metadata.get("general.type", "model"), file.metadata.get("adapter.type")
    if not isinstance(kind, str) or kind != "adapter":
        raise FormatError(f"{path} is no adapter: its general.type is {repr(kind)[:80]}", "Give a model as MODEL.")
    if not isinstance(of, str) or of != "lora" or not is_finite(file.metadata.get("adapter.lora.alpha")):
        raise FormatError(f"{path} is an adapter of type {repr(of)[:80]}, or it has no adapter.lora.alpha")
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise FormatError(f"{path} is an activated LoRA (aLoRA), which fewbit does not read")
    for name in _weights(file):
        _pair(file, name)
    return file


@contextmanager
def as_folder(path: Path, config: Any) -> Iterator[Path]:
    """A temporary folder with the adapter of a file, as PEFT stores it. config: transformers' config of the model.

    PlanError if the adapter is for another architecture, or for weights that the model does not have.
    """
    file = opened(path)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lora, tensors = _of_model(file, config)
        write_json(folder / ADAPTER, lora)
        write_file(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
        if (known := recorded(file)) is not None:
            scales.write_record(folder, known, "")
        yield folder


def recorded(file: GgufFile) -> scales.Scales | None:
    """The scales of the model that the adapter in a file was trained on; None if it does not record them."""
    return scales.of_metadata(file.metadata) if scales.GGUF_RECORD in file.metadata else None


def _weights(file: GgufFile) -> list[str]:
    """The names of the weights that the file has matrices for. FormatError if it has tensors of another kind."""
    found = dict[str, None]()
    for name in file.entries:
        base, dot, which = name.rpartition(".")
        if not dot or which not in ("lora_a", "lora_b"):
            raise FormatError(
                f"{file.path}: {name} is no matrix of a LoRA", "llama.cpp ignores such norms or refuses the file."
            )
        found[base] = None
    return list(found)


def _pair(file: GgufFile, name: str) -> tuple[Entry, Entry]:
    """The entries of both matrices of a weight. FormatError if they do not belong together."""
    a, b = (file.entries.get(f"{name}.lora_{which}") for which in "ab")
    if a is None or b is None:
        raise FormatError(f"{file.path}: {name} has only one of lora_a and lora_b")
    rank = a.shape[-1] if name == _EMBEDDING else a.shape[-2] if len(a.shape) > 1 else 0
    if len(a.shape) not in (2, 3) or a.shape[:-2] != b.shape[:-2] or b.shape[-1] != rank:
        raise FormatError(
            f"{file.path}: lora_a {list(a.shape)} and lora_b {list(b.shape)} of {name} do not belong together"
        )
    return a, b


def _of_model(file: GgufFile, config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config of an adapter, and its tensors."""
    arch, name = of_config(config), file.metadata.get("general.architecture")
    # A model of one type can be in files of several architectures
    rows = [] if arch is None else [row.name for row in TYPES[config.model_type] if row.chosen == arch.chosen]
    if not rows and config.get_text_config() is not config:
        raise PlanError(
            f"{file.path} is an adapter for a language model alone; this model, of type "
            f"{config.model_type!r}, is whole, with vision or sound",
            "Give the GGUF file of its language model, or the folder that this file was made of.",
        )
    if not isinstance(name, str) or name not in rows:
        raise PlanError(
            f"{file.path} is an adapter for models of llama.cpp's architecture {repr(name)[:80]}; this model, of type "
            f"{config.model_type!r}, is {' or '.join(map(repr, rows)) or 'in no GGUF file'}"
        )
    if reason := _why_not_of(config):
        raise PlanError(f"{file.path} is an adapter for another model: {reason}", "Use it with the GGUF file.")
    left, found, known = set(_weights(file)), dict[str, _Pair](), routes(config)
    for key, route in known.items():
        if not left.intersection(route.names):
            continue
        if missing := [each for each in route.names if f"{each}.lora_a" not in file.entries]:
            raise FormatError(f"{file.path}: it has {route.names}, which are one matrix, but not {missing[0]}")
        found[key.removesuffix(".weight")] = _of_route(file, route)
    if left := left.difference(each for route in known.values() for each in route.names):
        raise PlanError(f"{file.path} is an adapter for another model: this one has no {min(left)}")
    return _config_of(found, file.metadata["adapter.lora.alpha"]), _named(found)


def _of_route(file: GgufFile, route: Route) -> _Pair:
    """The matrices of a weight of the model, in its order."""
    shape = _pair(file, route.names[0])[0].shape
    if route.heights:
        return _of_stacked(file, route)
    if route.expert is not None and (len(shape) != 3 or route.expert >= shape[0]):
        raise FormatError(f"{file.path}: {route.name} has no matrices for expert {route.expert}")
    if route.expert is None and len(shape) != 2:
        raise FormatError(f"{file.path}: {route.name} has matrices of several experts, and the weight has none")
    every = [[_matrix(file, entry, route.expert) for entry in _pair(file, name)] for name in route.names]
    a, b = every[0]
    if route.expert is not None:
        return _Pair(a, b)
    if route.name == _EMBEDDING:
        return _Pair(a.T, b, embeds=True)
    if route.split is not None:
        if not _is_cut_by_rows(route) or any(not torch.equal(a, other) for other, _ in every):
            raise FormatError(f"{file.path}: the LoRAs of {', '.join(route.names)} are not those of one matrix")
        _check_pieces(file, route.split, [piece for _, piece in every])
        b = route.split.joined([piece for _, piece in every])
    _check_order(file, route.name, (a.shape[1], len(b)), (route.column_order, route.rows_back))
    a = a if route.column_order is None else a[:, route.column_order.argsort()]
    return _Pair(a, b if route.rows_back is None else b[route.rows_back])


def _check_order(
    file: GgufFile, name: str, found: tuple[int, int], orders: tuple[Tensor | None, Tensor | None]
) -> None:
    """PlanError unless columns and rows are as many as those that are put in order."""
    for count, order in zip(found, orders, strict=True):
        if order is not None and len(order) != count:
            raise _of_another(file, name, count, len(order))


def _check_pieces(file: GgufFile, split: Split, pieces: Sequence[Tensor]) -> None:
    """PlanError unless the pieces have the rows of those of the model."""
    for name, piece, shape in zip(split.names, pieces, split.shapes(pieces[0].shape[1]), strict=True):
        if len(piece) != shape[0]:
            raise _of_another(file, name, len(piece), shape[0])


def _of_another(file: GgufFile, name: str, found: int, wanted: int) -> PlanError:
    return PlanError(f"{file.path} is an adapter for another model: {name} has size {found} there, and {wanted} here")


def _of_stacked(file: GgufFile, route: Route) -> _Pair:
    """The same of one of several matrices that are one of the file."""
    a, b = (_matrix(file, entry, None) for entry in _pair(file, route.name))
    if a.dim() != 2 or len(b) != sum(route.heights):
        raise _of_another(file, route.name, len(b), sum(route.heights))
    return _Pair(a, route.part_of(b).clone())


def _matrix(file: GgufFile, entry: Entry, expert: int | None) -> Tensor:
    """A tensor of the file in float32, or the matrix that it has for one expert. No other expert is decoded."""
    stored = file.get(entry.name)
    if expert is not None:
        entry, stored = entry._replace(shape=entry.shape[1:]), stored[expert]
    return decoded(entry, stored, torch.float32)


def _config_of(pairs: Mapping[str, _Pair], alpha: float) -> dict[str, Any]:
    """PEFT's config. llama.cpp's scale is alpha / rank, and 1 if alpha is 0."""
    ranks = {module: pair.rank for module, pair in pairs.items()}
    most = max(ranks.values(), default=1)
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "r": most,
        "lora_alpha": alpha or most,
        "rank_pattern": others,
        "alpha_pattern": {} if alpha else others,
        "target_modules": list(pairs),
    }


def _named(pairs: Mapping[str, _Pair]) -> dict[str, Tensor]:
    """PEFT's names of the tensors."""
    found = dict[str, Tensor]()
    for module, pair in pairs.items():
        for which, matrix in (("A", pair.a), ("B", pair.b)):
            leaf = f"lora_embedding_{which}" if pair.embeds else f"lora_{which}.weight"
            found[f"base_model.model.{module}.{leaf}"] = matrix.contiguous()
    return found
