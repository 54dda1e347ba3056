"""A vision tower from a file of llama.cpp (mmproj), as part of a model of transformers.

    opened = towers.opened(path, "gemma3_text")     # FormatError if it is another kind of file, or of another model
    towers.to_config(text, opened, file)            # config.json of the whole model; text: that of the language model
    parts = towers.parts(config, opened.row)        # transformers' name -> `Part`, for every tensor of the tower
    parts[name].from_file(pieces, shape), parts[name].to_file(tensor)

The language model stays in a file of its own. `rows/towers.py` has the kinds of towers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.formats.containers.gguf import PLAIN, Entry, GgufFile
from fewbit.formats.containers.gguf_strings import Strings
from fewbit.models.gguf.metadata import Keys
from fewbit.models.gguf.names import Order, Route
from fewbit.models.gguf.pieces import decoded
from fewbit.models.gguf.rows.towers import ROWS
from fewbit.models.gguf.rows.unread_towers import NO_TEXT, UNREAD
from fewbit.models.gguf.tower import Tower
from fewbit.names import lacking

PROJECTORS = tuple(dict.fromkeys(row.projector for row in ROWS))
_ALONE = "Without `mmproj`, the language model runs on text."
_ACTIVATIONS = ("use_gelu", "use_silu")
_POSITIONS, _SIDE = "v.position_embd", 1024  # the most patches in a row of an image; published towers have up to 110
_SOUND = ("a.", "mm.a.")  # beginnings of the names of tensors of a tower for sound
_SWAPPED = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}


@dataclass(frozen=True)
class Opened:
    """A file with a vision tower, and the row that says what it is."""

    file: GgufFile
    keys: Keys
    row: Tower


def is_tower(file: GgufFile) -> bool:
    """Whether a file has towers instead of a language model."""
    kinds = (("general.type", "mmproj"), ("general.architecture", "clip"))
    return any(isinstance(found := file.metadata.get(key), str) and found == kind for key, kind in kinds)


def _rows(path: Path) -> tuple[Keys, list[Tower]]:
    """The keys of the file at `path`, and the rows that it may be of. FormatError if it has none that fewbit reads."""
    file = GgufFile(path)
    if not is_tower(file):
        kind = str(file.metadata.get("general.architecture"))[:80]
        raise FormatError(
            f"{path} is no vision tower (mmproj): its architecture is {kind!r}",
            "Give the language model as the model, and the file of the tower, usually named mmproj-..., as `mmproj`.",
        )
    keys = Keys(file, "clip")
    heard = keys.flag("has_audio_encoder", False)
    if not keys.flag("has_vision_encoder", False):
        has = "a tower for sound alone" if heard else "no tower for images"
        raise FormatError(f"{path} has {has}, and fewbit reads towers for images only", _ALONE)
    projector = keys.get("projector_type", keys.get("vision.projector_type"))
    rows = [row for row in ROWS if isinstance(projector, str) and row.projector == projector]
    if not rows:
        why = UNREAD.get(projector, "") if isinstance(projector, str) else ""
        raise FormatError(
            f"{path}: its projector is {str(projector)[:80]!r}, which fewbit does not read{why and f': {why}'}",
            f"fewbit reads {', '.join(PROJECTORS)}.{'' if why.startswith(NO_TEXT) else f' {_ALONE}'}",
        )
    rows = [row for row in rows if row.when in file.entries] or [row for row in rows if not row.when]
    if heard and not all(row.sound for row in rows):
        raise FormatError(
            f"{path} has a tower for sound beside that for images; with the projector {projector!r}, fewbit reads only "
            "files without one",
            _ALONE,
        )
    return keys, rows


def about(path: Path) -> str:
    """What the tower in the file at `path` is for, or why fewbit does not read it."""
    try:
        _, rows = _rows(path)
    except FormatError as error:
        return error.message.removeprefix(str(path)).removeprefix(":").strip()
    texts = sorted({text for row in rows for text in row.texts})
    classes = " or ".join(dict.fromkeys(row.cls for row in rows))
    return f"{rows[0].projector}, of {classes}, beside a language model of type {', '.join(texts)}"


def opened(path: Path, language: str) -> Opened:
    """The tower in the file at `path`. FormatError if it has none, another one than for images, or an unknown one.

    language: transformers' type of the language model. FormatError if a model of this type cannot have the tower.
    """
    keys, rows = _rows(path)
    file, projector = keys.file, rows[0].projector
    for row in rows:
        if language in row.texts:
            return Opened(file, keys, swapped(row) if row.swapped and _is_swapped(keys) else row)
    known = sorted({text for row in rows for text in row.texts})
    raise FormatError(
        f"{path}: its projector is {projector!r}, for language models of type {', '.join(known)}, and this one is of "
        f"type {language}",
        "Give the mmproj file that was made of the same model.",
    )


def swapped(row: Tower) -> Tower:
    """The row with the names of older files, in which the up and the down projection of MLPs are exchanged."""
    block = {theirs: _SWAPPED.get(ours, ours) if isinstance(ours, str) else ours for theirs, ours in row.block.items()}
    return replace(row, block=block)


def _is_swapped(keys: Keys) -> bool:
    """Whether the tensor named ffn_down reads the width of the encoder. llama.cpp decides so, too (clip.cpp)."""
    down = keys.file.entries.get("v.blk.0.ffn_down.weight")
    return down is not None and down.shape[-1] == keys.count("vision.embedding_length")


def to_config(text: Mapping[str, Any], tower: Opened, vocabulary: GgufFile) -> dict[str, Any]:
    """The content of config.json for a language model with a tower. FormatError if they do not belong together.

    text: the config of the language model. vocabulary: its file.
    """
    keys, row = tower.keys, tower.row
    name, axis = row.output
    if (width := keys.shape(name)[axis]) != text["hidden_size"]:
        raise FormatError(
            f"{keys.file.path} makes vectors of width {width}, and the language model in {vocabulary.path} has width "
            f"{text['hidden_size']}",
            "Give the mmproj file that was made of the same model.",
        )
    _check_sizes(tower)
    inner = {key: value for key, value in text.items() if key != "architectures"}
    inner["model_type"] = row.texts[text["model_type"]]
    if row.sections:
        inner["rope_parameters"] = {**inner["rope_parameters"], "mrope_section": _sections(text, row, vocabulary)}
    vision: dict[str, Any] = {"model_type": row.vision_type}
    vision |= {theirs: keys.count(f"vision.{ours}") for theirs, ours in row.sizes.items()}
    if row.epsilon:
        vision[row.epsilon] = keys.real("vision.attention.layer_norm_epsilon")
    if row.activation:
        vision[row.activation] = _activation(tower)
    config = {
        "architectures": [row.cls],
        "model_type": row.model_type,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": text["dtype"],
        **_token_ids(tower, vocabulary),
    }
    spoken = Keys(vocabulary, str(vocabulary.metadata["general.architecture"]))
    for entry, value in {**row.fixed, **row.further(keys), **row.both(keys, spoken)}.items():
        own, _, last = entry.rpartition(".")
        {"": config, "vision_config": vision, "text_config": inner}[own][last] = value
    return {**config, "text_config": inner, "vision_config": vision}


def _sections(text: Mapping[str, Any], row: Tower, vocabulary: GgufFile) -> list[int]:
    """How many pairs of the columns that RoPE turns have positions in time, in height and in width."""
    keys, key = Keys(vocabulary, str(vocabulary.metadata["general.architecture"])), "rope.dimension_sections"
    if keys.get(key) is None:
        raise FormatError(
            f"{vocabulary.path}: it has no {keys.prefix}.{key}, which a {row.cls} needs for images",
            f"Only the language model of a {row.cls} is read with this tower. {_ALONE}",
        )
    found = keys.wholes(key, 3)[:3]
    turned = int(text["head_dim"] * text["rope_parameters"].get("partial_rotary_factor", 1.0))
    if 2 * sum(found) != turned:
        raise keys.wrong(f"{keys.prefix}.{key} is {found}, which is not half of the {turned} columns that RoPE turns")
    return found


def _check_sizes(tower: Opened) -> None:
    """FormatError if the keys name other numbers of blocks or of positions than the file has tensors for."""
    keys, row, entries = tower.keys, tower.row, tower.file.entries
    blocks = {name.split(".")[2] for name in entries if name.startswith("v.blk.") and name.count(".") > 2}
    if (stated := keys.whole("vision.block_count")) != len(blocks):
        raise keys.wrong(f"clip.vision.block_count is {stated}, and it has tensors of {len(blocks)} blocks")
    if "attention.head_count" in row.sizes.values():
        keys.ratio("vision.embedding_length", "vision.attention.head_count")
    if "image_size" not in row.sizes:
        return
    if (side := keys.count("vision.image_size") // keys.count("vision.patch_size")) > _SIDE:
        raise keys.wrong(f"clip.vision.image_size is {side} patches; at most {_SIDE} are read")
    names = {name.removesuffix(".weight") for name in (*row.model.values(), *row.parameters.values())}
    if _POSITIONS not in names:
        return
    expected = side**2 + ("v.class_embd" in names)
    found = entries.get(f"{_POSITIONS}.weight")
    if found is not None and (rows := found.shape[-2] if len(found.shape) > 1 else 0) != expected:
        raise keys.wrong(
            f"clip.vision.image_size and patch_size are for {expected} positions, and {_POSITIONS}.weight has {rows}"
        )


def _activation(tower: Opened) -> str:
    """The name of the activation of the encoder's MLPs."""
    keys, named = tower.keys, tower.row.activations
    found = next((key for key in _ACTIVATIONS if keys.flag(key, False)), "")
    if found not in named:
        own = found.removeprefix("use_") or "quick_gelu"
        raise keys.wrong(f"its activation is {own}; that of a {tower.row.cls} is {' or '.join(named.values())}")
    return named[found]


def _token_ids(tower: Opened, vocabulary: GgufFile) -> dict[str, int]:
    """The ids of the tokens that mark images. FormatError if the vocabulary lacks a token that the processor needs."""
    tokens = vocabulary.metadata.get("tokenizer.ggml.tokens")
    places = {token: i for i, token in enumerate(tokens if isinstance(tokens, Strings) else ())}
    for token in (*tower.row.tokens.values(), *tower.row.named.values()):
        if token not in places and token != tower.row.beyond:
            raise FormatError(
                f"{vocabulary.path}: its vocabulary has no token {token!r}, which a {tower.row.cls} needs for images",
                f"Only files of the language model whose vocabulary has it are read with this tower. {_ALONE}",
            )
    following = len(places)  # the id that the tokenizer gives to a token beyond its vocabulary
    return {entry: places.get(token, following) for entry, token in tower.row.tokens.items()}


@dataclass(frozen=True)
class Part:
    """A tensor of the model in the file: the names of its pieces, and its conversion.

    paired: the pieces are the convolutions over the first and the second image. Else their rows follow each other.
    exchanged: the first two dimensions are exchanged.
    share: the model's tensor is this one of so many equal parts of the rows of the file's.
    row: the shape of a row in the file, if it is another one than in the model.
    """

    names: tuple[str, ...]
    route: Route
    paired: bool = False
    exchanged: bool = False
    share: tuple[int, int] = (0, 1)
    row: tuple[int, ...] = ()

    def pieces(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shape of each piece of a tensor of this shape."""
        if self.paired:
            return [(*shape[:2], *shape[3:])] * len(self.names)
        if not shape:  # a number
            return [(1,)]
        if self.exchanged:
            return [(shape[1], shape[0], *shape[2:])]
        return [(shape[0] * self.share[1] // len(self.names), *(self.row or shape[1:]))] * len(self.names)

    def from_file(self, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The model's tensor of the file's."""
        whole = torch.stack(list(pieces), dim=2) if self.paired else torch.cat(list(pieces))
        whole = whole.flatten(1) if self.row else whole.transpose(0, 1) if self.exchanged else whole
        whole = whole.chunk(self.share[1])[self.share[0]]
        return self.route.from_file(whole).reshape(tuple(shape)).contiguous()

    def to_file(self, tensor: Tensor) -> list[Tensor]:
        """The file's tensors of the model's, or its share of the file's one."""
        whole = self.route.to_file(tensor)
        whole = whole.transpose(0, 1) if self.exchanged else whole
        found = whole.unbind(2) if self.paired else whole.reshape(whole.shape or (1,)).chunk(len(self.names))
        return [piece.reshape(-1, *self.row).contiguous() if self.row else piece.contiguous() for piece in found]


def _small(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without dimensions of size 1, which some converters leave out."""
    return tuple(size for size in shape if size != 1)


def parts(config: Any, row: Tower) -> dict[str, Part]:
    """transformers' name -> part, for every tensor that a tower of this config can have.

    config: transformers' config object of the whole model.
    """
    vision, found = config.vision_config, dict[str, Part]()
    same: Order = ((), ())
    halves = _halves(vision) if row.permuted else same
    directions = _directions(vision) if row.by_direction else same

    def pixels(name: str, leaf: str, part: Part) -> Part:
        entry, form = row.pixels_last.get(name, ("", ""))
        if not form or (leaf == "bias" and form != "vector"):
            return part
        side = getattr(vision, entry)
        turned = ((side, side, 3), (2, 0, 1))
        route = replace(part.route, order=turned) if form == "vector" else replace(part.route, columns=turned)
        return replace(part, route=route, row=(3, side, side) if form == "kernel" else ())

    def add(
        theirs: str,
        names: str | tuple[str, ...],
        place: str = "",
        share: tuple[int, int] = (0, 1),
        order: Order = ((), ()),
    ) -> None:
        each = (names,) if isinstance(names, str) else names
        for leaf in ("weight", "bias"):
            whole = tuple(f"{place}{name}.{leaf}" for name in each)
            shift = 1.0 if leaf == "weight" and each[0] in row.shifted else 0.0
            part = Part(whole, Route(whole[0], shift=shift, order=order), share=share)
            found[f"{theirs}.{leaf}"] = pixels(each[0], leaf, part)

    for theirs, ours in row.model.items():
        add(theirs, ours)
    for theirs, ours in row.parameters.items():
        found[theirs] = Part((ours,), Route(ours), exchanged=theirs in row.exchanged)
    for theirs, pair in row.pairs.items():
        found[theirs] = Part(pair, Route(pair[0]), paired=True)
    for layer in range(getattr(vision, "num_hidden_layers", 0)):
        for theirs, names in row.block.items():
            order = halves if names in ("attn_q", "attn_k") else same
            add(f"{row.layers}.{layer}.{theirs}", names, f"v.blk.{layer}.", order=order)
        for ours, several in row.joined.items():
            for count, theirs in enumerate(several):
                order, share = directions if count < 2 else same, (count, len(several))
                add(f"{row.layers}.{layer}.{theirs}", ours, f"v.blk.{layer}.", share, order)
        for theirs, ours in row.block_parameters.items():
            found[f"{row.layers}.{layer}.{theirs}"] = Part((whole := f"v.blk.{layer}.{ours}",), Route(whole))
    for count, where in enumerate(row.places(config)):
        for theirs, ours in row.projectors.items():
            add(f"{where}.{theirs}", ours, f"v.proj_blk.{count}.")
        for theirs, ours in row.projector_parameters.items():
            found[f"{where}.{theirs}"] = Part((whole := f"v.proj_blk.{count}.{ours}",), Route(whole))
    for theirs, ours in row.beside.items():
        for place, layer in enumerate(vision.deepstack_visual_indexes):
            add(theirs.replace("*", str(place)), ours, f"v.deepstack.{layer}.")
    return found


def _halves(vision: Any) -> Order:
    """The order of rows of q and k in llama.cpp, which turns neighbours together."""
    heads = vision.num_attention_heads
    return (heads, 2, vision.hidden_size // heads // 2), (0, 2, 1)


def _directions(vision: Any) -> Order:
    """The order of rows of q and k that RoPE turns in two directions: pairs of them alternate in the model.

    The model turns row i of a head with row i + half, and llama.cpp neighbours.
    """
    heads = vision.num_attention_heads
    return (heads, 2, vision.hidden_size // heads // 4, 2), (0, 3, 2, 1)


class Weights:
    """The tensors of a tower for a model. FormatError if the file lacks one, or has others than the model."""

    def __init__(self, tower: Opened, config: Any, expected: Mapping[str, Sequence[int]]) -> None:
        """expected: names and shapes of all tensors of the model outside the language model."""
        self.tower, self.file = tower, tower.file
        self.parts, self.shapes = dict[str, Part](), dict(expected)
        known, unused = parts(config, tower.row), tower.row.unused
        missing = []
        for name, shape in expected.items():
            if name.rpartition(".")[0] in unused:
                continue
            part = known.get(name)
            if part is None or any(each not in self.file.entries for each in part.names):
                missing.append(name if part is None else next(e for e in part.names if e not in self.file.entries))
                continue
            for each, own in zip(part.names, part.pieces(shape), strict=True):
                self._check(self.file.entries[each], own)
            self.parts[name] = part
        if missing:
            raise FormatError(f"{self.file.path}: {lacking(missing)}")
        used = {each for part in self.parts.values() for each in part.names}
        self.heard = {name for name in self.file.entries if name.startswith(_SOUND)} if tower.row.sound else set[str]()
        if others := sorted(self.file.entries.keys() - used - tower.row.extra - self.heard):
            raise FormatError(f"{self.file.path}: the tensor {others[0]} has no place in a {tower.row.cls}")

    def _check(self, entry: Entry, shape: Sequence[int]) -> None:
        if _small(entry.shape) != _small(shape):
            raise FormatError(
                f"{self.file.path}: {entry.name} has shape {list(entry.shape)}, the model expects {list(shape)}"
            )
        if entry.type in PLAIN and not entry.spec.dtype.is_floating_point:
            raise FormatError(f"{self.file.path}: {entry.name} has type {entry.type}, expected a float type")

    @property
    def quantized(self) -> list[str]:
        """The types of quantized tensors."""
        used = (self.file.entries[each] for part in self.parts.values() for each in part.names)
        return sorted({entry.type for entry in used if entry.type not in PLAIN})

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors by their names in the model, in `dtype`."""
        found = {}
        for name, shape in self.shapes.items():
            if (part := self.parts.get(name)) is None:  # a norm that is not used
                make = torch.ones if name.endswith(".weight") else torch.zeros
                found[name] = make(tuple(shape), dtype=dtype, device="cpu")
                continue
            entries = [self.file.entries[each] for each in part.names]
            pieces = zip(entries, part.pieces(shape), strict=True)
            stored = [decoded(entry, self.file.get(entry.name), torch.float32).reshape(own) for entry, own in pieces]
            found[name] = part.from_file(stored, shape).to(dtype)
            for entry in entries:
                self.file.release(entry.name)
        return found
