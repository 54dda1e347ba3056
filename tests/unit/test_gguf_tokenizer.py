"""Tokenizers as keys of a GGUF file: what the keys hold is read back, and what they do not hold is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from fewbit.errors import FormatError, PlanError
from fewbit.models.gguf.patterns import VISIBLE
from fewbit.models.gguf.tokenizer import USER_DEFINED, Keys, to_metadata, to_tokenizer
from fewbit.models.gguf.tokenizer_check import check
from fewbit.models.gguf.tokenizer_source import named
from tests import gguf_files, models

Change = Callable[[dict[str, Any]], None]
TEXTS = ("Hello the model", "  the group<|tool|> of<|tool|>", "", " the", "<s>the</s> a")


def tokenizer(change: Change | None = None, **settings: Any) -> Any:
    """The byte-level tokenizer of the tests, with two more tokens, changed as JSON."""
    base: Any = models.tokenizer()
    base.add_tokens([AddedToken("<|tool|>", special=True), AddedToken("<think>", special=False, normalized=False)])
    made = json.loads(base.backend_tokenizer.to_str())
    if change is not None:
        change(made)
    make: Any = PreTrainedTokenizerFast
    named = {name: getattr(base, name) for name in ("bos_token", "eos_token", "pad_token")}
    return make(tokenizer_object=Tokenizer.from_str(json.dumps(made)), **(named | settings))


def keys(original: Any, name: str = "model") -> dict[str, Any]:
    return {"general.name": name, **to_metadata(original, len(original) + 3)}


def read(metadata: dict[str, Any], **changes: Any) -> Any:
    return to_tokenizer(Keys(Path("m.gguf"), metadata), **changes)


def normalized(*steps: Any) -> Change:
    def change(made: dict[str, Any]) -> None:
        made["normalizer"] = json.loads(_with(normalizers.Sequence(list(steps))).to_str())["normalizer"]

    return change


def _with(normalizer: Any) -> Tokenizer:
    from tokenizers import models as token_models

    made = Tokenizer(token_models.BPE())
    made.normalizer = normalizer
    return made


SPLIT: dict[str, list[str]] = {  # as in the models' tokenizer.json; "digits" is a step Digits
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
    "deepseek-coder": [
        "[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        "digits",
    ],
    "kimi-k2": [  # of its tokenization_kimi.py
        r"[\p{Han}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


@pytest.mark.parametrize("name", SPLIT)
def test_ways_to_split_have_names(name: str) -> None:
    def change(made: dict[str, Any]) -> None:
        steps: list[dict[str, Any]] = [
            {"type": "Digits", "individual_digits": True}
            if each == "digits"
            else {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
            for each in SPLIT[name]
        ]
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, last]}

    original = tokenizer(change)
    metadata = keys(original)
    assert metadata["tokenizer.ggml.pre"] == name
    check(original, metadata)


@pytest.mark.parametrize("name", ["llama-bpe", "falcon3", "pixtral", "lfm2", "tekken", "gpt-2", "qwen2", "deepseek-v3"])
def test_whether_a_text_starts_with_bos_by_default(name: str) -> None:
    metadata = keys(tokenizer()) | {"tokenizer.ggml.pre": name}
    del metadata["tokenizer.ggml.add_bos_token"]
    starts = name in ("llama-bpe", "falcon3", "pixtral", "lfm2", "tekken")
    found = read(metadata)
    assert (found("the")["input_ids"][0] == found.bos_token_id) == starts


def flagged(**flags: bool) -> Change:
    def change(made: dict[str, Any]) -> None:
        (token,) = (each for each in made["added_tokens"] if each["content"] == "<|tool|>")
        token.update(flags)

    return change


def around(*single: str) -> Change:
    """A template: names of tokens, and A for the text."""

    def change(made: dict[str, Any]) -> None:
        ids = {each["content"]: each["id"] for each in made["added_tokens"]}
        steps = [
            {"Sequence": {"id": "A", "type_id": 0}} if each == "A" else {"SpecialToken": {"id": each, "type_id": 0}}
            for each in single
        ]
        made["post_processor"] = {
            "type": "TemplateProcessing",
            "single": steps,
            "pair": [],
            "special_tokens": {
                each: {"id": each, "ids": [ids[each]], "tokens": [each]} for each in single if each != "A"
            },
        }

    return change


def put(part: str, key: str, value: Any) -> Change:
    return lambda made: made[part].update({key: value})


BOS, EOS, PAD = "<s>", "</s>", "<pad>"
REFUSED: dict[str, tuple[Change, str]] = {
    "lowercase": (normalized(normalizers.Lowercase()), "normalizes text .Lowercase"),
    "strip accents": (normalized(normalizers.NFD(), normalizers.StripAccents()), "NFD, StripAccents"),
    "nfkc": (normalized(normalizers.NFKC()), "NFKC"),
    "replace": (normalized(normalizers.Replace("a", "b")), "Replace"),
    "regex": (normalized(normalizers.Replace(Regex(" +"), " ")), "Replace"),
    "prepend": (normalized(normalizers.Prepend("x")), "Prepend"),
    "strip": (normalized(normalizers.Strip()), "Strip"),
    "bos twice": (around(BOS, BOS, "A"), "adds tokens around a text"),
    "pad before": (around(PAD, "A"), "adds tokens around a text"),
    "eos before": (around(EOS, "A"), "adds tokens around a text"),
    "bos after": (around("A", BOS), "adds tokens around a text"),
    "tool between": (around(BOS, "<|tool|>", "A"), "adds tokens around a text"),
    "lstrip": (flagged(lstrip=True), "the spaces before them .lstrip: <|tool|>"),
    "rstrip": (flagged(rstrip=True), "the spaces after them .rstrip: <|tool|>"),
    "single word": (flagged(single_word=True), "whole words .single_word: <|tool|>"),
    "dropout": (put("model", "dropout", 0.1), "at random"),
    "end of word": (put("model", "end_of_word_suffix", "</w>"), "the ends of words"),
    "decoder": (lambda made: made.update(decoder={"type": "Fuse"}), "decoded as"),
    "whole words": (put("model", "ignore_merges", True), "has the tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_key_holds_is_refused(case: str) -> None:
    change, said = REFUSED[case]

    def changed(made: dict[str, Any]) -> None:
        if case == "whole words":  # one that no merge makes
            made["model"]["vocab"]["zqj"] = len(made["model"]["vocab"]) + len(made["added_tokens"])
        change(made)

    original = tokenizer(changed)
    with pytest.raises(PlanError, match=said.replace("|", r"\|")) as error:
        check(original, keys(original))
    assert "makes a folder" in str(error.value.hint)


HELD: dict[str, Change | None] = {
    "plain": None,
    "bos": around(BOS, "A"),
    "bos and eos": around(BOS, "A", EOS),
    "eos": around("A", EOS),
    "nfc": normalized(normalizers.NFC()),
}


@pytest.mark.parametrize("case", HELD)
def test_what_the_keys_hold_is_read_back(case: str) -> None:
    original = tokenizer(HELD[case])
    metadata = keys(original)
    check(original, metadata)
    again = read(metadata)
    for text in (*TEXTS, "e\u0301 u\u0308"):
        assert again(text)["input_ids"] == original(text)["input_ids"]


def test_nfc_is_told_by_the_name_of_the_pattern() -> None:
    assert keys(tokenizer())["tokenizer.ggml.pre"] == "gpt-2"
    assert keys(tokenizer(normalized(normalizers.NFC())))["tokenizer.ggml.pre"] == "mpt"


@pytest.mark.parametrize("name", ["Phi-3-mini-4k-instruct", "my-phi3"])
def test_llama_cpp_knows_the_tokens_of_phi3_by_name(name: str) -> None:
    def strips(made: dict[str, Any]) -> None:
        for each in made["added_tokens"]:
            each["rstrip"] = each["content"] not in ("<unk>", "<s>", "<|endoftext|>")

    original = tokenizer(strips)
    check(original, keys(original, name))
    assert read(keys(original, name))("a<think>  b")["input_ids"] == original("a<think>  b")["input_ids"]
    with pytest.raises(PlanError, match="rstrip"):
        check(original, keys(original, "model"))
    with pytest.raises(PlanError, match="because of the model's name"):
        check(tokenizer(), keys(tokenizer(), name))


def test_the_files_name_says_what_added_tokens_do() -> None:
    def strips(made: dict[str, Any]) -> None:
        for each in made["added_tokens"]:
            each["rstrip"] = each["content"] not in ("<unk>", "<s>", "<|endoftext|>")

    taking, plain = tokenizer(strips), tokenizer()
    assert (named(taking, "my-phi3"), named(taking, "tuned")) == ("my-phi3", "tuned (phi-3)")
    assert (named(plain, "Phi-3-tuned"), named(plain, "tuned")) == ("phi 3-tuned", "tuned")
    for original, name in ((taking, "tuned"), (plain, "Phi-3-tuned")):
        metadata = keys(original, named(original, name))
        check(original, metadata)
        assert read(metadata)("a<think>  b")["input_ids"] == original("a<think>  b")["input_ids"]


@pytest.mark.parametrize("kind", ["gpt-4o", "llama-bpe", "gpt2"])
def test_text_is_split_as_tokenizer_json_says(kind: str, tmp_path: Path) -> None:
    """transformers builds a GPT2Tokenizer with GPT-2's pattern, and drops the one in tokenizer.json."""
    folder = gguf_files.with_tokenizer(tmp_path / "m", kind)
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stored, "tokenizer_class": "GPT2Tokenizer"}), encoding="utf-8")
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    head = gguf_files.header_of(folder)
    assert head.metadata["tokenizer.ggml.pre"] == {"gpt2": "gpt-2"}.get(kind, kind)
    again = read(head.metadata)
    for text in gguf_files.AWKWARD:
        assert again(text, add_special_tokens=False)["input_ids"] == raw.encode(text, add_special_tokens=False).ids
    assert any("as tokenizer.json says" in note for note in head.notes) == (kind != "gpt2")


def sentencepiece(**settings: Any) -> Any:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "th", "the"]
    pieces += ["▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    make: Any = LlamaTokenizer
    return make(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, **settings)


@pytest.mark.parametrize("legacy", [True, False])
def test_the_first_space_of_sentencepiece_is_exact(legacy: bool) -> None:
    original = sentencepiece(legacy=legacy)
    metadata = keys(original)
    check(original, metadata)
    again = read(metadata)
    for text in ("the", " the", "<s>the", "the</s>the", "<s> the", ""):
        assert again(text)["input_ids"] == original(text)["input_ids"], text


def test_where_llama_cpp_adds_another_space_is_told() -> None:
    original = sentencepiece(legacy=False)
    note = check(original, keys(original))
    assert note is not None
    assert "first space also after special tokens" in note
    assert check(tokenizer(), keys(tokenizer())) is None


def test_settings_of_padding_are_read_back() -> None:
    original = tokenizer(padding_side="left", truncation_side="left", clean_up_tokenization_spaces=True)
    again = read(keys(original))
    assert (again.padding_side, again.truncation_side, again.clean_up_tokenization_spaces) == ("left", "left", True)
    assert "fewbit.tokenizer" not in keys(tokenizer())


@pytest.mark.parametrize("stored", ["[1]", "{", '{"padding_side": "up"}', '{"padding_side": []}', 3, "7"])
def test_bad_settings_are_a_format_error(stored: Any) -> None:
    with pytest.raises(FormatError, match=r"fewbit\.tokenizer"):
        read({**keys(tokenizer()), "fewbit.tokenizer": stored})


def test_several_chat_templates_are_read_back() -> None:
    templates = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    metadata = keys(tokenizer(chat_template=templates))
    assert metadata["tokenizer.chat_template"] == "{{ 1 }}"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert read(metadata).chat_template == templates
    assert read(keys(tokenizer(chat_template={"rag": "{{ 3 }}"}))).chat_template == {"rag": "{{ 3 }}"}
    del metadata["tokenizer.chat_template.tool_use"]
    with pytest.raises(FormatError, match=r"chat_template\.tool_use is missing"):
        read(metadata)


def test_tokens_that_llama_cpps_chat_parser_reads() -> None:
    """They are special, and a file has them as user-defined, as those of the converter."""
    original = tokenizer()
    original.add_tokens([AddedToken(each, special=True) for each in sorted(VISIBLE)])
    metadata = keys(original)
    types = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist(), strict=True))
    assert {types[each] for each in VISIBLE} == {USER_DEFINED}
    assert types["<|tool|>"] != USER_DEFINED
    assert check(original, metadata) is None
    ids = original("a<|tool_call>b")["input_ids"]
    assert read(metadata).decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)
