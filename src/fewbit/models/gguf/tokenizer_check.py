"""Check that a GGUF file can store a tokenizer: rebuild it from the file's keys, and compare it with the original.

First the parts are compared, so that an error can name the part that the format cannot store. Then both tokenizers
encode the same texts: many scripts, spaces, accents, digits, added tokens in text, and pieces of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbit.errors import FormatError, PlanError
from fewbit.models.gguf.tokenizer import SPACE, Keys, steps_of, to_tokenizer

TEXTS = (
    "Hello World, HELLO wOrLd",
    "two  spaces   and\ttabs\n\nnew lines\r\n end ",
    "café naïve Ünïcödé ÅÉÎ",
    "e\u0301 u\u0308 ﬁ Ａ ² Ⅷ ½",
    "日本語のテキスト 中文 한국어 العربية हिन्दी ไทย עברית Ελληνικά Кириллица",
    "1234567890 12,345.678 -7",
    "don't I'LL we've 'tis 'S",
    "def f(x):\n    return x**2\n\n\tif x != None: pass",
    "👍🏽 👩‍👩‍👧 \u00a0\u200b\u3000",
    "``quoted'' \"text\" -- a—b",
)
_PIECES, _TOKENS = 1000, 100  # how many pieces of the vocabulary, and added tokens, are tested


def check(tokenizer: Any, metadata: Mapping[str, Any]) -> str | None:
    """PlanError if a tokenizer that is rebuilt from the GGUF keys `metadata` treats texts differently.

    Returns a note if llama.cpp treats some texts with special tokens in another way.
    """
    try:
        rebuilt = to_tokenizer(Keys(Path("the GGUF file"), metadata))
        shown = json.loads(metadata.get("fewbit.tokenizer", "{}")).get("visible_special", False)
        kept = json.dumps({"visible_special": shown})
        elsewhere = to_tokenizer(Keys(Path("the GGUF file"), {**metadata, "fewbit.tokenizer": kept}))
    except FormatError as error:
        raise _refused([error.message]) from None
    if lost := _lost(tokenizer, rebuilt):
        raise _refused(lost)
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    added = dict.fromkeys(each["content"] for each in made["added_tokens"])  # looked up for each of 262,144 pieces
    pieces = _sample([piece for piece in made["model"]["vocab"] if piece not in added], _PIECES)
    plain = [*TEXTS, *(piece.replace(SPACE, " ").strip() or "a" for piece in pieces)]
    mixed = [
        text for each in _sample(list(added), _TOKENS) for text in (f"a {each} b", f"a{each}b", f"{each}\n  {each} A")
    ]
    # `elsewhere` is llama.cpp's reading of the keys. It also adds SentencePiece's first space after special tokens and
    # before another space, in every such file. So it is compared on texts without these.
    for other, texts in ((rebuilt, [*plain, " a", "", *mixed]), (elsewhere, plain)):
        if different := _first_difference(tokenizer, other, texts):
            raise _refused([different])
    if different := _first_difference(tokenizer, elsewhere, [*mixed, " a"]):
        return f"llama.cpp adds SentencePiece's first space also after special tokens and before spaces: {different}"
    return None


def _refused(reasons: Sequence[str]) -> PlanError:
    return PlanError(
        f"a GGUF file cannot store this tokenizer: {'; '.join(reasons)}",
        "Use a plan that makes a folder, such as gptq-4bit: a folder stores the tokenizer unchanged.",
    )


def _lost(tokenizer: Any, rebuilt: Any) -> list[str]:
    """Reasons why the rebuilt tokenizer differs: parts that it lacks, or has in addition."""
    ours, theirs = (json.loads(each.backend_tokenizer.to_str()) for each in (tokenizer, rebuilt))
    reasons = []
    before, after = (steps_of(each["normalizer"], "normalizers") for each in (ours, theirs))
    if lost := [step for step in before if step not in after]:
        reasons.append(f"it normalizes text ({_named(lost)})")
    elif besides := [step for step in after if step not in before]:
        reasons.append(f"llama.cpp's name for its pattern implies a normalizer that it lacks ({_named(besides)})")
    if ours["model"].get("byte_fallback"):
        steps = steps_of(ours["pre_tokenizer"], "pretokenizers")
        if splits := [step for step in steps if not _without_effect(step)]:
            reasons.append(f"it splits text before merging ({_named(splits)})")
    for key, what in (
        ("dropout", "it drops merges at random"),
        ("continuing_subword_prefix", "it marks the pieces inside a word"),
        ("end_of_word_suffix", "it marks the ends of words"),
    ):
        if value := ours["model"].get(key):
            reasons.append(f"{what} ({key} {value!r})")
    return reasons + _lost_flags(ours["added_tokens"], theirs["added_tokens"]) + _lost_affixes(tokenizer, rebuilt)


def _without_effect(step: Mapping[str, Any]) -> bool:
    """True for Metaspace, which the keys store, and for a split at spaces, which the normalizer has replaced before."""
    if step["type"] == "Metaspace":
        return bool(step.get("replacement") == SPACE)
    return bool(step["type"] == "Split" and step["pattern"] == {"String": " "})


def _lost_flags(ours: Iterable[Mapping[str, Any]], theirs: Iterable[Mapping[str, Any]]) -> list[str]:
    flags = {
        "lstrip": "take the spaces before them",
        "rstrip": "take the spaces after them",
        "single_word": "match only whole words",
        "special": "are special",
    }
    found, reasons = {each["id"]: each for each in theirs}, []
    if missing := [each["content"] for each in ours if each["id"] not in found]:
        reasons.append(f"the file would lack added tokens ({_some(missing)})")
    for flag, what in flags.items():
        pairs = [(each, found[each["id"]]) for each in ours if each["id"] in found]
        if lost := [a["content"] for a, b in pairs if a[flag] and not b[flag]]:
            reasons.append(f"tokens {what} ({flag}: {_some(lost)})")
        if besides := [a["content"] for a, b in pairs if b[flag] and not a[flag]]:
            why = " because of the model's name" if flag == "rstrip" else ""
            reasons.append(f"in the file, tokens {what}{why}, but not in the original ({flag}: {_some(besides)})")
    return reasons


def _lost_affixes(tokenizer: Any, rebuilt: Any) -> list[str]:
    """A reason if the tokenizer adds other tokens around a text than one at the start and one at the end."""
    found = []
    for each in (tokenizer, rebuilt):
        ids, bare = each("a")["input_ids"], each("a", add_special_tokens=False)["input_ids"]
        found.append(tokenizer.convert_ids_to_tokens(ids) if len(ids) != len(bare) or ids != bare else [])
    if found[0] == found[1]:
        return []
    return [f"it adds tokens around a text that no key describes ({' '.join(found[0]) or 'none'} for 'a')"]


def _first_difference(tokenizer: Any, other: Any, texts: Sequence[str]) -> str | None:
    batch = list(texts)
    ours, theirs = (each(batch, verbose=False)["input_ids"] for each in (tokenizer, other))
    for text, a, b in zip(batch, ours, theirs, strict=True):
        if a != b:
            return f"the text {text[:60]!r} has the tokens {_some(a)}, but with the file's keys {_some(b)}"
    for text, ids in zip(batch, ours, strict=True):
        for skip in (True, False):
            a, b = (each.backend_tokenizer.decode(ids, skip_special_tokens=skip) for each in (tokenizer, other))
            if a != b:
                return f"the tokens of {text[:60]!r} are decoded as {a[:60]!r}, but with the file's keys as {b[:60]!r}"
    return None


def _sample(all: Sequence[str], count: int) -> list[str]:
    return list(all[:: max(1, len(all) // count)])


def _named(steps: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(str(step["type"]) for step in steps))


def _some(values: Sequence[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:8])
    return f"{shown} ..." if len(values) > 8 else shown
