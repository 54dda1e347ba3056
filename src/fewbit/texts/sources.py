"""Loads texts for calibration, evaluation and training from files, the Hub, or the texts that come with fewbit.

A text is a sequence of documents. `fewbit.texts.windows` turns it into one stream of token ids and cuts that into
windows of `length` tokens that do not overlap. Calibration draws windows with a random seed; evaluation takes the first
ones in order.
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import os
import platform
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from fewbit import checks
from fewbit.errors import FormatError, PlanError
from fewbit.registry import unknown
from fewbit.system.files import parse_json, read_text

Message: TypeAlias = dict[str, str]
Part: TypeAlias = Literal["calibration", "evaluation"]

SELF = "self"  # of `tune`: texts that the original writes by itself
SOURCES = ("c4", "pydoc", "tiny", "wikitext2")
EMBEDDED = Path(__file__).parents[1] / "data" / "texts"
_HERE = "Use 'pydoc', which is always available, or the path of a .txt, .jsonl or .json file."
_FORMS = (
    'A document is a JSON string, {"text": ...}, {"messages": [{"role": ..., "content": ...}, ...]}, '
    '{"prompt": ..., "completion": ...} or {"instruction": ..., "input": ..., "output": ...}.'
)
# Roles of the ShareGPT layout, {"from": "human", "value": ...}, and their usual names.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_HUB_SECONDS = 4.0
_C4 = "allenai/c4"
_C4_FILES = {
    "calibration": "en/c4-train.00000-of-01024.json.gz",
    "evaluation": "en/c4-validation.00000-of-00008.json.gz",
}
_C4_DOCUMENTS = {"calibration": 4000, "evaluation": 1100}  # 1100: as in GPTQ's evaluation, enough for 256 x 2048 tokens


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion, both plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Instruction:
    """A question and its answer, and an optional system prompt."""

    question: str
    answer: str
    system: str = ""

    def shown(self, tokenizer: Tokenizer) -> tuple[Message, ...] | Completion:
        """A chat if the tokenizer has a chat template, else a completion in the layout of Stanford Alpaca."""
        if tokenizer.chat_template:
            turns = ("system", self.system), ("user", self.question), ("assistant", self.answer)
            return tuple({"role": role, "content": content} for role, content in turns if role != "system" or content)
        above = f"{self.system}\n\n" if self.system else ""
        return Completion(f"{above}### Instruction:\n{self.question}\n\n### Response:\n", self.answer)


Document: TypeAlias = str | tuple[Message, ...] | Completion | Instruction


class SourceUnavailable(PlanError):
    """A text of the Hub cannot be loaded: there is no connection, or a package that it needs is missing."""


@dataclass(frozen=True)
class Text:
    """A name and documents: plain texts, chats (messages with role and content), completions or instructions.

    places: for error messages, the file and line of each document, if known.
    """

    name: str
    documents: tuple[Document, ...]
    places: tuple[str, ...] = ()

    def place(self, index: int) -> str:
        """The document's position, for error messages."""
        return self.places[index] if self.places else f"{self.name}, document {index + 1}"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that fewbit's texts use."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def chat_template(self) -> Any: ...
    def __call__(
        self, text: list[str], *, add_special_tokens: bool, return_attention_mask: bool, verbose: bool
    ) -> Mapping[str, Any]: ...
    def apply_chat_template(
        self, conversation: list[Message], *, tokenize: Literal[False], add_generation_prompt: bool
    ) -> Any: ...


def checked(name: str, value: Any) -> str | tuple[str, ...]:
    """A check of a text argument: the name of a text, the path of a file, which must exist, or a list of texts."""
    if isinstance(value, (str, os.PathLike)):
        given = str(checks.path(name, value))
        if given not in SOURCES:
            _check_file(given)
        return given
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not all(isinstance(each, str) for each in value):
        raise checks.invalid(name, value, "the name of a text, a .txt, .jsonl or .json file, or a list of texts")
    if not any(each.strip() for each in value):
        raise checks.invalid(name, value, "at least one text that is not empty")
    return tuple(value)


def checked_or_self(name: str, value: Any) -> str | tuple[str, ...]:
    """A check of a text to calibrate on: as `checked`, or "self"."""
    return SELF if value == SELF else checked(name, value)


def _check_file(source: str) -> Path:
    """The path of a text. PlanError unless it is a file of a kind that is read."""
    path = Path(source)
    if not os.path.isfile(path):  # False, not an error, for a name that is too long
        shown = source if len(source) <= 80 else f"{source[:77]}..."
        if os.path.isdir(path):
            raise PlanError(f"the text {shown} is a folder", "Give a .txt, .jsonl or .json file.")
        error = unknown("text", shown, SOURCES)
        hint = f"{error.hint} Save a text itself as a .txt file; Python also takes a list of texts."
        raise PlanError(f"{error.message}, and there is no file at that path", hint)
    if path.suffix not in (".txt", ".jsonl", ".json"):
        kind = path.suffix or "a file without suffix"
        raise PlanError(f"{path}: a text must be a .txt, .jsonl or .json file, not {kind}", _HERE)
    return path


def load_text(source: str | os.PathLike[str] | Sequence[str] = "pydoc", part: Part = "calibration") -> Text:
    """The text that `source` names.

    `source` is one of

    - "pydoc", the reference manual that comes with Python;
    - "tiny", text that the embedded model was not trained on;
    - "wikitext2", which needs the optional package `datasets`, or "c4", both from the Hub;
    - the path of a .txt file, which is one document;
    - the path of a .jsonl file (one document in a line) or .json file (a list of documents, or one in a line). A
      document is a string, or an object with "messages", "conversations", "text", "prompt" and "completion", or
      "instruction";
    - a list of strings, each a document.

    The calibration part and the evaluation part of a named source have no text in common. For a file or a list, both
    parts are the same. PlanError if the text does not exist, cannot be loaded, or is empty. FormatError, with file and
    line, if a file is malformed.
    """
    if not isinstance(source, (str, os.PathLike)):
        text = Text(f"a list of {len(source)} texts", tuple(source))
    elif source == "pydoc":
        text = Text(f"pydoc {part} (Python {platform.python_version()})", _pydoc(part))
    elif source == "tiny":
        text = _from_file(EMBEDDED / f"tiny-{part}.txt", f"tiny {part}")
    elif source in SOURCES:
        text = Text(f"{source} {part}", _from_hub(source, part))
    else:
        text = _from_file(_check_file(str(source)), str(source))
    if not any(document.strip() if isinstance(document, str) else document for document in text.documents):
        raise PlanError(f"the text {text.name} is empty", _HERE)
    return text


def own_source(config: Mapping[str, Any]) -> str:
    """The default text for a model: "tiny" for the embedded model and models made from it, else "pydoc"."""
    return "tiny" if config.get("fewbit_text") == "tiny" else "pydoc"


def _pydoc(part: Part) -> tuple[str, ...]:
    """One document for each topic. Large topics contain whole small ones, so repeated paragraphs are dropped."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts: dict[Part, list[str]] = {"calibration": [], "evaluation": []}
    for topic in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        fresh: list[str] = []
        for paragraph in topics[topic].split("\n\n"):
            key = " ".join(paragraph.split())
            if key not in seen:
                fresh.append(paragraph)
                seen.add(key)
        if len(fresh) > 1:  # more than its title
            smaller = len("".join(parts["evaluation"])) * 2 < len("".join(parts["calibration"]))
            parts["evaluation" if smaller else "calibration"].append("\n\n".join(fresh).strip())
    return tuple(parts[part])


def _from_file(path: Path, name: str) -> Text:
    content = read_text(path)
    if path.suffix == ".txt":
        return Text(name, (content,))
    if path.suffix == ".json" and content.lstrip()[:1] == "[":  # other .json files hold one document in a line
        listed = parse_json(content, str(path))
        values = {f"{path}, document {number}": value for number, value in enumerate(listed, start=1)}
    else:
        lines = {f"{path}, line {i}": line for i, line in enumerate(content.split("\n"), start=1) if line.strip()}
        values = {where: parse_json(line, where, _FORMS) for where, line in lines.items()}
    return Text(name, tuple(_document(value, where) for where, value in values.items()), tuple(values))


def _document(value: Any, where: str) -> Document:
    if isinstance(value, list):
        value = {"messages": value}
    if isinstance(value, Mapping):
        system = value.get("system") or ""
        if not isinstance(system, str):
            raise FormatError(f"{where}: 'system' is not a string", _FORMS)
        if value.get("history"):
            raise FormatError(f"{where}: 'history' is not supported", "Give all turns of a chat as messages.")
        for key in ("messages", "conversations"):
            if key in value:
                if not isinstance(value[key], list) or not value[key]:
                    raise FormatError(f"{where}: {key!r} is not a list of messages", _FORMS)
                first = ({"role": "system", "content": system},) if system else ()
                return first + tuple(_message(message, where) for message in value[key])
        if "completion" in value:
            prompt, completion = value.get("prompt"), value["completion"]
            if not isinstance(prompt, str) or not isinstance(completion, str):
                raise FormatError(f"{where}: 'prompt' and 'completion' are not both strings", _FORMS)
            return Completion(prompt, completion)
        if "instruction" in value:
            parts = value["instruction"], value.get("input") or "", value.get("output", value.get("response"))
            if not all(isinstance(part, str) for part in parts):
                raise FormatError(f"{where}: 'instruction', 'input' and 'output' are not all strings", _FORMS)
            return Instruction("\n\n".join(filter(None, parts[:2])), parts[2], system)
        value = value.get("text")
    if not isinstance(value, str):
        raise FormatError(f"{where}: not a document", _FORMS)
    return value


def _message(value: object, where: str) -> Message:
    if isinstance(value, Mapping):
        role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    raise FormatError(f"{where}: a message needs a role and a content, both strings", _FORMS)


def _from_hub(source: str, part: Part) -> tuple[str, ...]:
    try:
        if not os.environ.get("HF_HUB_OFFLINE") and not _hub_answers():
            raise ConnectionError(
                f"the Hub did not answer within {_HUB_SECONDS} s (with HF_HUB_OFFLINE=1, cached data sets are used)"
            )
        try:
            datasets = importlib.import_module("datasets")
        except ImportError:
            if source == "c4":
                return _c4_of_hub(part)
            raise
        return _rows(datasets, source, part)
    except ImportError as error:
        raise SourceUnavailable(
            f"{source} needs the package datasets: {error}", f"pip install datasets. {_HERE}"
        ) from error
    except Exception as error:  # `datasets` and its dependencies raise many different types
        raise SourceUnavailable(f"cannot load {source}: {error}", _HERE) from error


def _rows(datasets: Any, source: str, part: Part) -> tuple[str, ...]:
    if source == "wikitext2":
        split = {"calibration": "train", "evaluation": "test"}[part]
        return tuple(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])
    split = {"calibration": "train", "evaluation": "validation"}[part]
    rows = datasets.load_dataset(_C4, data_files={split: _C4_FILES[part]}, split=split, streaming=True)
    return tuple(row["text"] for row in rows.take(_C4_DOCUMENTS[part]))


def _c4_of_hub(part: Part) -> tuple[str, ...]:
    """The first documents of a file of C4. Only that part of the file is downloaded."""
    if os.environ.get("HF_HUB_OFFLINE"):
        raise ConnectionError("HF_HUB_OFFLINE is set, and fewbit does not cache c4 without the package datasets")
    from huggingface_hub import HfFileSystem  # slow to import

    where = f"datasets/{_C4}/{_C4_FILES[part]}"
    hub = HfFileSystem(endpoint=_endpoint(), skip_instance_cache=True)
    with hub.open(where, "rb", block_size=0) as stream, gzip.open(stream, "rt", encoding="utf-8") as lines:
        rows = itertools.islice(lines, _C4_DOCUMENTS[part])
        return tuple(parse_json(line, f"{where}, line {i}")["text"] for i, line in enumerate(rows, 1))


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _hub_answers() -> bool:
    """Whether the Hub can be reached. Without this check, `datasets` would retry for 23 s before it fails."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(_endpoint(), method="HEAD"), timeout=_HUB_SECONDS):
                answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except (OSError, ValueError):
            answers.append(False)

    # In a thread, because the timeout does not limit the DNS lookup.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return answers == [True]
