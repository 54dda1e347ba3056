"""A tokenizer as the metadata of a GGUF file, and back.

    tokenizer.ggml.model        "gpt2": byte-level BPE            "llama", "gemma4": SentencePiece
    tokenizer.ggml.tokens       pieces; added tokens as the text they stand for
    tokenizer.ggml.token_type   1 normal, 2 unknown, 3 control (special), 4 user-defined (added), 5 unused, 6 a byte
    tokenizer.ggml.merges       "a b", best first                 "gemma4" only
    tokenizer.ggml.scores       -                                 "llama" only; the best pair is merged first
    tokenizer.ggml.pre          how text is split before merging, by a name that llama.cpp knows
    tokenizer.ggml.add_space_prefix                               whether a space is put before a text
    tokenizer.ggml.*_token_id, .add_bos_token, .add_eos_token
    tokenizer.chat_template, .chat_template.NAME, tokenizer.chat_templates (the names)
    fewbit.tokenizer            JSON of settings that llama.cpp has no key for and does not need: the padding side ...

llama.cpp splits text with built-in code; a file only stores the name of the method. So fewbit identifies a tokenizer by
its pattern, and raises an error if llama.cpp has no name for this pattern. For SentencePiece models, transformers
stores merges instead of scores. The score of a piece is then minus the rank of its first merge, which gives the same
order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.containers.gguf_strings import Strings
from fewbit.models.gguf.metadata import damaged
from fewbit.models.gguf.patterns import (
    BOS_FIRST,
    GPT2,
    NAMED_PHI3,
    NEVER_RSTRIP,
    NORMALIZED,
    PATTERNS,
    STEPS_OF,
    VISIBLE,
    WHOLE_WORDS_FIRST,
)
from fewbit.system import heap

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"

_SETTINGS = "fewbit.tokenizer"
_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"


class Keys(NamedTuple):
    """The keys of a file before it is written."""

    path: Path
    metadata: Mapping[str, Any]


def to_metadata(tokenizer: Any, vocabulary: int, ends: Sequence[int] = ()) -> dict[str, Any]:
    """Keys and values for a tokenizer of transformers. PlanError if llama.cpp has no such tokenizer.

    vocabulary: rows of the embedding, at least the number of tokens. ends: all token ids that end a text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PlanError(f"{type(tokenizer).__name__} is not a fast tokenizer: a GGUF file can only store fast ones")
    made = json.loads(backend.to_str())
    model, added = made["model"], {each["id"]: each for each in made["added_tokens"]}
    if model["type"] != "BPE":
        raise PlanError(f"a tokenizer of kind {model['type']} cannot be written to a GGUF file; BPE can")
    pieces = {i: piece for piece, i in model["vocab"].items()} | {i: each["content"] for i, each in added.items()}
    if (last := max(pieces)) >= vocabulary:
        raise PlanError(f"the tokenizer has a token {last}, but the model's embedding has {vocabulary} rows")
    sentencepiece = bool(model.get("byte_fallback"))
    special = {each["content"] for each in added.values() if each["special"]}
    visible = VISIBLE if special >= VISIBLE else frozenset()
    hidden, tokens, types = special - visible, [], []
    for i in range(vocabulary):
        piece = pieces.get(i)
        if piece is None:
            kind = UNUSED
        elif i in added:
            kind = CONTROL if piece in hidden else USER_DEFINED
        elif sentencepiece and len(piece) == 6 and piece.startswith("<0x"):
            kind = BYTE
        else:
            kind = NORMAL
        if sentencepiece and piece is not None and piece == model.get("unk_token"):
            kind = UNKNOWN
        if kind == USER_DEFINED and sentencepiece:
            piece = pieces[i].replace(SPACE, " ")
        tokens.append(f"[PAD{i}]" if piece is None else piece)
        types.append(kind)
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    found: dict[str, Any] = {"tokens": tokens, "token_type": np.array(types, np.int32)}
    if sentencepiece:
        found |= {"model": "llama", "pre": "default", "scores": _scores(tokens, merges)}
        found["add_space_prefix"] = _space_first(made)
    else:
        found |= {"model": "gpt2", "pre": _pattern_name(made), "merges": merges}
        found["add_space_prefix"] = False
    found |= _ids_of(tokenizer, ends)
    found |= _affixes(tokenizer)
    keys = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    settings = _settings(tokenizer, made if sentencepiece else {}) | ({"visible_special": True} if visible else {})
    if settings:
        keys[_SETTINGS] = json.dumps(settings)
    return keys | _chat_templates(getattr(tokenizer, "chat_template", None))


def to_tokenizer(file: GgufFile | Keys, **changes: Any) -> PreTrainedTokenizerFast:
    """The tokenizer that `file` describes. FormatError if it describes none, or an unsupported one.

    changes: arguments of the tokenizer's constructor; they override those of the file.
    """
    make: Any = PreTrainedTokenizerFast  # its constructor is not typed
    with heap.trimmed():
        backend, settings = _read(file)
        tokenizer = make(tokenizer_object=_Given(backend), **(settings | changes))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


class _Given:
    """transformers keeps a deep copy of the tokenizer that it is given: of this one, the tokenizer itself."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self.backend


def _read(file: GgufFile | Keys) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer's steps and vocabulary, and the arguments of transformers' constructor.

    The vocabulary is not part of the JSON: tokenizers would hold it in four forms at once.
    """
    vocabulary = _Vocabulary(file)
    steps, model = vocabulary.byte_level() if vocabulary.model == "gpt2" else vocabulary.sentencepiece()
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        **steps,
        "post_processor": vocabulary.affixes(),
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    rstrip = vocabulary.rstrip()
    added = [
        AddedToken(
            token := vocabulary.tokens[i],
            rstrip=i in rstrip,
            normalized=False,
            special=vocabulary.types[i] != USER_DEFINED or token in vocabulary.visible,
        )
        for i in vocabulary.added
    ]
    try:
        backend = Tokenizer.from_str(json.dumps(made))
        backend.model = BPE(vocabulary.index, **model)
        backend.add_tokens(added)
    except Exception as error:  # tokenizers raises nothing more specific
        raise vocabulary.wrong(f"its tokenizer cannot be built: {str(error)[:200]}") from None
    named = {name: vocabulary.tokens[i] for name, i in vocabulary.special.items()}
    return backend, {
        "clean_up_tokenization_spaces": False,
        "model_max_length": vocabulary.context,
        "chat_template": vocabulary.chat_template(),
        **named,
        **{key: value for key, value in vocabulary.settings.items() if key not in ("metaspace", "visible_special")},
    }


class _Vocabulary:
    """The tokenizer's keys, checked for types and lengths."""

    def __init__(self, file: GgufFile | Keys) -> None:
        self.file = file
        self.settings = self._stored_settings()
        self.visible = VISIBLE if self.settings.get("visible_special") else frozenset()  # special, and user-defined
        self.model = self._get("model")
        if self.model not in ("gpt2", "llama", "gemma4"):
            raise FormatError(
                f"{file.path}: its tokenizer is {str(self.model)[:40]!r}, which fewbit does not read",
                "fewbit reads gpt2 (byte-level BPE), llama and gemma4 (SentencePiece). Load the tokenizer from the"
                " folder of the original model.",
            )
        self.tokens: list[str] = self._strings("tokens")
        self.types = self._numbers("token_type", "iu", NORMAL)
        self.index: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            self.index.setdefault(token, i)
        self.added = [i for i, kind in enumerate(self.types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
        self.added = [i for i in self.added if self.tokens[i] and self.index[self.tokens[i]] == i]
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: self._id(key) for name, key in names.items()}
        self.special = {name: i for name, i in ids.items() if i is not None}
        context = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
        self.context = context if isinstance(context, int) and context > 0 else None

    def wrong(self, what: str) -> FormatError:
        return damaged(self.file.path, what)

    def rstrip(self) -> set[int]:
        """Tokens that also match the spaces after them. No key lists them: llama.cpp decides by the model's name."""
        if not NAMED_PHI3.search(str(self.file.metadata.get("general.name", ""))):
            return set()
        return {i for i in self.added if self.tokens[i] not in NEVER_RSTRIP}

    def chat_template(self) -> str | dict[str, str] | None:
        """One template, several as name -> template, or None."""
        default, names = self.file.metadata.get(_TEMPLATE), self.file.metadata.get(_TEMPLATES)
        found = {"default": default} if isinstance(default, str) else {}
        for name in names if isinstance(names, (list, Strings)) else []:
            template = self.file.metadata.get(f"{_TEMPLATE}.{name}")
            if not isinstance(template, str):
                raise self.wrong(f"{_TEMPLATES} names {name[:40]!r}, but {_TEMPLATE}.{name[:40]} is missing")
            found[name] = template
        return found if set(found) - {"default"} else found.get("default")

    def byte_level(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The steps as tokenizer.json has them, and arguments of `BPE`."""
        name = self._get("pre") or "default"
        if name not in STEPS_OF:
            known = ", ".join(sorted(STEPS_OF))
            raise FormatError(
                f"{self.file.path}: text is split by {str(name)[:40]!r}, which fewbit does not know",
                f"Known: {known}.",
            )
        pairs = self._pairs()
        steps: list[dict[str, Any]] = []
        whole: dict[str, Any] = {"add_prefix_space": False, "trim_offsets": True}
        for step in STEPS_OF[name]:
            if step == GPT2:
                continue
            if step == "digits":
                steps.append({"type": "Digits", "individual_digits": True})
            else:
                steps.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
        steps.append({"type": "ByteLevel", **whole, "use_regex": GPT2 in STEPS_OF[name]})
        made = {
            "normalizer": {"type": "NFC"} if name in NORMALIZED else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "decoder": {"type": "ByteLevel", **whole, "use_regex": True},
        }
        return made, {"merges": pairs, "ignore_merges": name in WHOLE_WORDS_FIRST}

    def _pairs(self) -> list[tuple[str, str]]:
        """The pairs that may be merged, best first."""
        pairs, tokens, index = [], self.tokens, self.index
        for merge in self._strings("merges", empty=True):
            left, _, right = merge.partition(" ")
            if " " in right or not (left in index and right in index and left + right in index):
                raise self.wrong(f"the merge {merge[:80]!r} does not join two tokens into a third")
            pairs.append((tokens[index[left]], tokens[index[right]]))  # the same objects, to save memory
        return pairs

    def sentencepiece(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The steps as tokenizer.json has them, and arguments of `BPE`."""
        scored = self.model == "llama"
        prefix = self._flag("add_space_prefix", scored)
        merges = _merges(self.tokens, self.types, self._numbers("scores", "f", 0.0)) if scored else self._pairs()
        unknown = self.special.get("unk_token")
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        steps = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
        scheme = self.settings.get("metaspace") if prefix else None
        spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        undone: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            undone.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        made = {
            "normalizer": {"type": "Sequence", "normalizers": [*steps, replaced]} if scheme is None else None,
            "pre_tokenizer": None if scheme is None else spaces,
            "decoder": {"type": "Sequence", "decoders": undone},
        }
        token = None if unknown is None else self.tokens[unknown]
        return made, {"merges": merges, "unk_token": token, "fuse_unk": True, "byte_fallback": True}

    def affixes(self) -> dict[str, Any]:
        """The post-processor that adds tokens before and after each text."""
        sequence = [{"Sequence": {"id": "A", "type_id": 0}}]
        before = after = None
        default = self.model != "gpt2" or self._get("pre") in BOS_FIRST
        if self._flag("add_bos_token", default):
            before = self.special.get("bos_token")
        if self._flag("add_eos_token", False):
            after = self.special.get("eos_token")
        if before is not None:
            sequence.insert(0, {"SpecialToken": {"id": self.tokens[before], "type_id": 0}})
        if after is not None:
            sequence.append({"SpecialToken": {"id": self.tokens[after], "type_id": 0}})
        second = json.loads(json.dumps(sequence).replace('"A"', '"B"'))
        special = {
            self.tokens[i]: {"id": self.tokens[i], "ids": [i], "tokens": [self.tokens[i]]}
            for i in (before, after)
            if i is not None
        }
        return {
            "type": "TemplateProcessing",
            "single": sequence,
            "pair": [*sequence, *second],
            "special_tokens": special,
        }

    def _stored_settings(self) -> dict[str, Any]:
        stored = self.file.metadata.get(_SETTINGS, "{}")
        try:
            found = json.loads(stored)
        except (TypeError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self.wrong(f"{_SETTINGS} is not a JSON object")
        known = {key: found[key] for key in _ALLOWED if key in found}
        for key, value in known.items():
            if value not in _ALLOWED[key]:
                raise self.wrong(f"{key} in {_SETTINGS} is {str(value)[:40]!r}")
        return known

    def _get(self, key: str) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}")

    def _strings(self, key: str, *, empty: bool = False) -> list[str]:
        found = self._get(key)
        found = found.tolist() if isinstance(found, Strings) else found
        if found is None and empty:
            return []
        if not isinstance(found, list) or not (found or empty):
            raise self.wrong(f"tokenizer.ggml.{key} is not a list of strings")
        return found

    def _numbers(self, key: str, kinds: str, default: float) -> list[Any]:
        """One number for each token; `default` for all if the key is missing."""
        found = self._get(key)
        if found is None:
            return [default] * len(self.tokens)
        if not isinstance(found, np.ndarray) or found.dtype.kind not in kinds or len(found) != len(self.tokens):
            raise self.wrong(f"tokenizer.ggml.{key} is not a list of {len(self.tokens)} numbers, one for each token")
        numbers: list[Any] = found.tolist()
        return numbers

    def _flag(self, key: str, default: bool) -> bool:
        found = self._get(key)
        if found is not None and not isinstance(found, bool):
            raise self.wrong(f"tokenizer.ggml.{key} is {str(found)[:40]}, neither true nor false")
        return default if found is None else found

    def _id(self, key: str) -> int | None:
        found = self._get(f"{key}_token_id")
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < len(self.tokens):
            raise self.wrong(f"tokenizer.ggml.{key}_token_id is {str(found)[:40]}, not one of {len(self.tokens)} ids")
        return found


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The pairs that SentencePiece may merge, best first. A pair has the score of the piece that it makes."""
    plain = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    found: list[int] = []
    for token, i in plain.items():
        for at in range(1, len(token)):
            if (second := plain.get(token[at:])) is not None and (first := plain.get(token[:at])) is not None:
                found += (i, first, second)
    joined, left, right = np.array(found, np.int32).reshape(-1, 3).T
    best = np.lexsort((right, left, joined, -np.asarray(scores)[joined]))
    return [(tokens[i], tokens[j]) for i, j in zip(left[best].tolist(), right[best].tolist(), strict=True)]


def _scores(tokens: Sequence[str], merges: Iterable[str]) -> np.ndarray[Any, Any]:
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", ""), rank)
    last = len(first)
    return np.array([-float(first.get(token, last)) for token in tokens], np.float32)


_SIDES = ("left", "right")
# Settings of the key fewbit.tokenizer -> values.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "metaspace": ("always", "first"),
    "visible_special": (True, False),
    "padding_side": _SIDES,
    "truncation_side": _SIDES,
    "clean_up_tokenization_spaces": (True, False),
}


def _settings(tokenizer: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the key `fewbit.tokenizer`: those that differ from the defaults."""
    found: dict[str, Any] = {}
    for key, default in (("padding_side", "right"), ("truncation_side", "right")):
        if (value := getattr(tokenizer, key, default)) != default:
            found[key] = value
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        found["clean_up_tokenization_spaces"] = True
    for step in steps_of(made.get("pre_tokenizer"), "pretokenizers"):
        # Metaspace adds no space to a text that starts with one; with "first", also none after a special token.
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            found["metaspace"] = step.get("prepend_scheme", "always")
    return found


def _chat_templates(template: Any) -> dict[str, Any]:
    if not isinstance(template, Mapping):
        return {_TEMPLATE: template} if template else {}
    others = {name: text for name, text in template.items() if name != "default"}
    keys: dict[str, Any] = {_TEMPLATE: template["default"]} if "default" in template else {}
    keys |= {_TEMPLATES: list(others)} if others else {}
    return keys | {f"{_TEMPLATE}.{name}": text for name, text in others.items()}


def _space_first(made: Mapping[str, Any]) -> bool:
    steps = [*steps_of(made["normalizer"], "normalizers"), *steps_of(made["pre_tokenizer"], "pretokenizers")]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _pattern_name(made: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text. PlanError if there is none."""
    found = []
    for step in steps_of(made["pre_tokenizer"], "pretokenizers"):
        pattern = step.get("pattern", {})
        if step["type"] == "Digits" and step["individual_digits"]:
            found.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in pattern:
            regex = pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n")  # some files have the characters
            found.append("digits" if regex in (r"\d", r"\p{N}") else regex)
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += [GPT2] if step["use_regex"] else []
        else:
            found.append(json.dumps(step))
    if tuple(found) not in PATTERNS:
        raise PlanError(
            "the tokenizer splits text in a way that llama.cpp has no name for: " + " then ".join(found),
            "llama.cpp would split text in another way than in the training of the model.",
        )
    names = PATTERNS[tuple(found)]
    nfc = [step["type"] for step in steps_of(made["normalizer"], "normalizers")] == ["NFC"]
    return next((name for name in names if (name in NORMALIZED) == nfc), names[0])


def steps_of(part: Mapping[str, Any] | None, members: str) -> list[Any]:
    """The steps of a part of a tokenizer, with sequences flattened."""
    if part is None:
        return []
    return [step for each in part[members] for step in steps_of(each, members)] if members in part else [part]


def _ids_of(tokenizer: Any, ends: Sequence[int]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {
        f"{ours}_token_id": i
        for ours, theirs in names.items()
        if isinstance(i := getattr(tokenizer, f"{theirs}_token_id", None), int)
    }
    others = [i for i in ends if i != found.get("eos_token_id")]
    return found | dict(zip(("eot_token_id", "eom_token_id"), others, strict=False))


def _affixes(tokenizer: Any) -> dict[str, bool]:
    """Whether the tokenizer adds a token before and after a text, tested on one text."""
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return {
        "add_bos_token": len(ids) > len(bare) and ids[0] == tokenizer.bos_token_id,
        "add_eos_token": len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id,
    }
