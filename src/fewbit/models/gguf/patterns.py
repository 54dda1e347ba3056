"""What llama.cpp concludes from names: how byte-level tokenizers split text before merging, and defaults of tokens.

Source: src/llama-vocab.cpp of llama.cpp, as in llama-cpp-python 0.3.36, and the tokenizer.json files of the models.
"""

from __future__ import annotations

import re

# Steps -> llama.cpp's names for them. A step is a regular expression to split at, "digits" (split each digit off) or
# "gpt2" (split by GPT-2's pattern). Files get the first name.
GPT2 = "gpt2"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD, _SLASHES = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = (
    "A-Za-z"
    "\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-"
    "\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-"
    "\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134"
    "\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_CHINESE = "\u4e00-\u9fa5"
_EAST_ASIAN = f"[{_CHINESE}\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER_NO_HAN, _LOWER_NO_HAN = rf"{_UPPER[:-1]}&&[^\p{{Han}}]]", rf"{_LOWER[:-1]}&&[^\p{{Han}}]]"
_KIMI = (
    rf"[\p{{Han}}]+|{_LEAD}{_UPPER_NO_HAN}*{_LOWER_NO_HAN}+{_CONTRACTIONS}?"
    rf"|{_LEAD}{_UPPER_NO_HAN}+{_LOWER_NO_HAN}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST}"
)
PATTERNS: dict[tuple[str, ...], tuple[str, ...]] = {
    (GPT2,): ("gpt-2", "mpt", "olmo", "jais", "phi-2", "trillion", "granite-docling"),
    ("digits", GPT2): ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",): (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "dbrx",
        "smaug-bpe",
        "pixtral",
        "lfm2",
    ),
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",): ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"),
    (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): ("qwen35",),
    (rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHES}",): ("tekken",),
    (
        rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHES}",
    ): ("gpt-4o", "llama4"),
    (_KIMI,): ("kimi-k2",),
    (r"\p{N}{1,3}", f"[{_CHINESE}\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK): ("deepseek-v3", "hunyuan-dense"),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, "digits"): ("deepseek-coder",),
    (r"[\r\n]", rf"\s?[{_LETTERS}]+", rf"\s?[{_MARKS}]+", r"\s+$", _EAST_ASIAN, "digits"): ("deepseek-llm",),
    # llama.cpp's default for files without a name, such as those before 2024-05.
    (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"): ("default",),
}
STEPS_OF = {name: steps for steps, names in PATTERNS.items() for name in names}
# A whole word in the vocabulary becomes one token, even if no merges lead to it.
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken")
# Models that normalize text to NFC. llama.cpp does not do this.
NORMALIZED = ("qwen2", "deepseek-r1-qwen", "qwen35", "mpt", "olmo", "command-r")
# A file without the key `add_bos_token` adds the token at the start of a text.
BOS_FIRST = WHOLE_WORDS_FIRST
# Special tokens of Gemma 4. A vocabulary with all of them has them as user-defined, for llama.cpp's parser of chats
VISIBLE = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
# In models of such a name, added tokens take the spaces after them (rstrip), except for these.
NAMED_PHI3 = re.compile("phi-?3", re.IGNORECASE)
NEVER_RSTRIP = frozenset({"<unk>", "<s>", "<|endoftext|>"})
