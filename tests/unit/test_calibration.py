"""Texts come whole or with an error that says what is wrong; tokens are one stream; windows never overlap."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fewbit.errors import FormatError, PlanError
from fewbit.texts import sources
from fewbit.texts.sources import Text, load_text
from fewbit.texts.windows import digest, encode, sample, windows

BOS = 256
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def byte_tokenizer(*, adds_bos: bool, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, and a context so short that every text is too long for it."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<s>": BOS}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", BOS)])
    make: Any = PreTrainedTokenizerFast  # whose constructor is not typed
    fast: PreTrainedTokenizerFast = make(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=8)
    fast.chat_template = template
    return fast


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def paragraphs(text: Text) -> set[str]:
    joined = "\n\n".join(document for document in text.documents if isinstance(document, str))
    return {" ".join(paragraph.split()) for paragraph in joined.split("\n\n")} - {""}


def test_pydoc_is_always_the_same_and_its_parts_are_disjoint() -> None:
    chosen, held_out = load_text(), load_text("pydoc", "evaluation")
    assert chosen == load_text("pydoc", "calibration")
    assert chosen.name != held_out.name
    assert not paragraphs(chosen) & paragraphs(held_out)
    sizes = [sum(len(str(document)) for document in text.documents) for text in (chosen, held_out)]
    assert 0.6 < sizes[0] / sum(sizes) < 0.75
    assert sizes[1] > 50_000


def test_a_txt_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    content = " \n = Title = \n\n<user>not a template\n"
    text = load_text(write(tmp_path / "a.txt", content))
    assert text.documents == (content,)
    tokenizer = byte_tokenizer(adds_bos=False, template=TEMPLATE)
    assert tokenizer.decode(encode(text, tokenizer)) == content


def test_a_jsonl_file_is_a_document_a_line(tmp_path: Path) -> None:
    lines = (
        '"bare"',
        '{"text": "named", "source": 1}',
        "",
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}',
        '{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}',
    )
    chat = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    assert load_text(write(tmp_path / "a.jsonl", "\n".join(lines))).documents == ("bare", "named", chat, chat)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("3", "not a document"),
        ('{"prompt": "x"}', "not a document"),
        ('{"text": ["x"]}', "not a document"),
        ('{"messages": []}', "'messages' is not a list"),
        ('{"messages": "x", "text": "x"}', "'messages' is not a list"),
        ('{"messages": [{"role": "user"}]}', "a message needs"),
        ('{"messages": ["x"]}', "a message needs"),
    ],
)
def test_a_malformed_line_is_named_with_its_file_and_number(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path / "a.jsonl", f'"fine"\n\n{line}\n')
    with pytest.raises(FormatError, match=r"a\.jsonl, line 3: " + complaint):
        load_text(path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"unknown text 'pydocs', and there is no file .*\nDid you mean pydoc\?"):
        load_text("pydocs")
    with pytest.raises(PlanError, match=r"\.jsonl or \.json file, not \.md"):
        load_text(write(tmp_path / "a.md", "x"))
    for name in ("empty.txt", "empty.jsonl"):
        with pytest.raises(PlanError, match="is empty"):
            load_text(write(tmp_path / name, " \n"))
    (tmp_path / "latin.txt").write_bytes(b"ab\xe9 ")
    with pytest.raises(FormatError, match="not UTF-8 at byte 2"):
        load_text(str(tmp_path / "latin.txt"))


def test_a_text_in_place_of_its_name_is_refused_in_short() -> None:
    with pytest.raises(PlanError, match=r"(?s)unknown text 'word .*Save a text itself as a .txt file") as caught:
        load_text("word " * 1000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("source", ["wikitext2", "c4"])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_hub_that_does_not_answer_is_asked_once(source: str, hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    released, asked, loaded = threading.Event(), list[float](), list[str]()

    def urlopen(request: Any, *, timeout: float) -> Any:
        asked.append(timeout)
        if hangs:  # as looking up a name may, which the timeout does not bound
            released.wait()
        raise OSError("nobody there")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr(sources, "_HUB_SECONDS", 0.02)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: loaded.append("x")))
    with pytest.raises(PlanError, match=rf"(?s)cannot load {source}: the Hub did not answer within 0.02 s .*'pydoc'"):
        load_text(source)
    released.set()
    assert asked == [0.02]
    assert not loaded


def test_without_the_package_datasets_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PlanError, match=r"(?s)needs the package datasets.*pip install datasets.*'pydoc'"):
        load_text("wikitext2")


class Hub(BaseHTTPRequestHandler):
    """A Hub that has two files of C4."""

    FILES = ("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz")
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        body = b""
        if "/resolve/" in self.path:
            lines = (json.dumps({"text": f"{Path(self.path).name} {i}"}) for i in range(5000))
            body = gzip.compress("\n".join(lines).encode())
        elif "/tree/" in self.path:
            body = json.dumps([{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in self.FILES]).encode()
        elif self.path.startswith("/api/"):
            body = json.dumps({"id": "allenai/c4", "sha": "0" * 40}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_c4_is_read_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setitem(sys.modules, "datasets", None)
        found = {part: load_text("c4", part).documents for part in ("calibration", "evaluation")}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert len(found["calibration"]) == 4000
    assert len(found["evaluation"]) == 1100
    assert not set(found["calibration"]) & set(found["evaluation"])
    assert sum("/resolve/" in line for line in Hub.asked) == 2


def test_the_parts_of_wikitext2_are_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str, *, split: str) -> dict[str, list[str]]:
        return {"text": [f"{path} {name} {split}", ""]}

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    splits = [str(load_text("wikitext2", part).documents[0]).split()[-1] for part in ("calibration", "evaluation")]
    assert splits == ["train", "test"]


def test_documents_become_one_stream_only_chats_a_template(caplog: pytest.LogCaptureFixture) -> None:
    chat = ({"role": "user", "content": "hi"},)
    tokenizer = byte_tokenizer(adds_bos=False, template=TEMPLATE)
    tokens = encode(Text("x", ("one", "two", chat, chat, "three")), tokenizer)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens) == "one\n\ntwo<user>hi\n<user>hi\nthree"
    assert not caplog.records  # transformers would have warned of a text longer than 8 tokens


def test_the_beginning_is_marked_once_if_the_tokenizer_marks_it() -> None:
    plain = Text("x", ("one", "two"))
    without, having = (encode(plain, byte_tokenizer(adds_bos=adds)) for adds in (False, True))
    assert having.tolist() == [BOS, *without.tolist()]
    templated = byte_tokenizer(adds_bos=True, template="<s>" + TEMPLATE)
    assert encode(Text("x", (({"role": "user", "content": "hi"},),)), templated).tolist().count(BOS) == 1


def test_a_list_of_documents_is_read_from_json(tmp_path: Path) -> None:
    chat = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    listed = ["one", {"text": "two"}, {"conversations": chat}, chat, {"prompt": "a", "completion": "b"}]
    found = load_text(write(tmp_path / "a.json", json.dumps(listed, indent=1)))
    assert found.documents == ("one", "two", turns, turns, sources.Completion("a", "b"))
    assert found.place(2) == f"{tmp_path / 'a.json'}, document 3"
    lines = load_text(write(tmp_path / "b.json", "\n".join(map(json.dumps, listed[:2]))))
    assert lines.documents == ("one", "two")
    with pytest.raises(FormatError, match=r"a\.json, document 2: not a document"):
        load_text(write(tmp_path / "a.json", json.dumps(["one", {"other": 1}])))


def test_a_system_prompt_is_part_of_the_chat(tmp_path: Path) -> None:
    chat = {"system": "Be brief.", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    asked = {"system": "Be brief.", "instruction": "hi", "output": "ho"}
    text = load_text(write(tmp_path / "a.jsonl", f"{json.dumps(chat)}\n{json.dumps(asked)}"))
    tokenizer = byte_tokenizer(adds_bos=False, template=TEMPLATE)
    shown = "<system>Be brief.\n<user>hi\n<assistant>ho\n"
    assert tokenizer.decode(encode(text, tokenizer)) == 2 * shown
    tokenizer.chat_template = None
    plain = str(tokenizer.decode(encode(Text("x", text.documents[1:]), tokenizer)))
    assert plain.startswith("Be brief.\n\n### Instruction")
    with pytest.raises(FormatError, match="line 1: 'history' is not supported"):
        load_text(write(tmp_path / "b.jsonl", json.dumps({**asked, "history": [["a", "b"]]})))
    with pytest.raises(FormatError, match="line 1: 'system' is not a string"):
        load_text(write(tmp_path / "b.jsonl", json.dumps({**asked, "system": ["a"]})))


def test_a_refused_chat_is_named_by_its_line(tmp_path: Path) -> None:
    chats = [[{"role": role, "content": "hi"}] for role in ("user", "user", "tool")]
    text = load_text(write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, chats))))
    strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    with pytest.raises(PlanError, match=r"a\.jsonl, line 5: the chat template refuses .*no tools"):
        encode(text, byte_tokenizer(adds_bos=False, template=strict))
    with pytest.raises(PlanError, match=r"a\.jsonl, line 1: a chat, but the tokenizer has no chat template"):
        encode(text, byte_tokenizer(adds_bos=False))


def test_a_chat_that_cannot_be_rendered_is_refused() -> None:
    chats = Text("x", (({"role": "system", "content": "hi"},),))
    with pytest.raises(PlanError, match="no chat template"):
        encode(chats, byte_tokenizer(adds_bos=False))
    with pytest.raises(PlanError, match="refuses a chat of the roles system: no system"):
        encode(chats, byte_tokenizer(adds_bos=False, template="{{ raise_exception('no system') }}"))


def test_samples_are_distinct_windows_that_the_seed_decides() -> None:
    tokens = torch.arange(107)
    every = {tuple(window) for window in windows(tokens, 10).tolist()}
    chosen = sample(tokens, 4, 10, seed=1)
    assert chosen.shape == (4, 10)
    assert len({tuple(window) for window in chosen.tolist()} & every) == 4
    assert torch.equal(chosen, sample(tokens, 4, 10, seed=1))
    assert not torch.equal(chosen, sample(tokens, 4, 10, seed=2))
    assert torch.equal(chosen, sample(tokens, 99, 10, seed=1)[:4])
    assert sample(tokens, 99, 10, seed=1).shape == (10, 10)


def test_windows_are_the_first_ones_in_order() -> None:
    tokens = torch.arange(25)
    assert windows(tokens, 10).tolist() == [list(range(10)), list(range(10, 20))]
    assert windows(tokens, 10, limit=1).tolist() == [list(range(10))]
    assert len(windows(tokens, 10, limit=7)) == 2


def test_too_few_tokens_are_counted_in_the_error() -> None:
    with pytest.raises(PlanError, match=r"has 25 tokens, too few for one window of 26\n.*at most 25"):
        windows(torch.arange(25), 26)
    with pytest.raises(PlanError, match="25 tokens"):
        sample(torch.arange(25), 1, 26, seed=0)
    for samples, length in ((0, 5), (5, 0)):
        with pytest.raises(PlanError, match="at least 1"):
            sample(torch.arange(25), samples, length, seed=0)
    with pytest.raises(PlanError, match="limit is 0"):
        windows(torch.arange(25), 5, limit=0)


def test_the_digest_is_that_of_little_endian_int64() -> None:
    expected = hashlib.sha256(struct.pack("<3q", 1, 2, 70000)).hexdigest()
    assert digest(torch.tensor([1, 2, 70000])) == expected
    assert digest(torch.tensor([1, 2, 70000], dtype=torch.int32)) == expected
    assert digest(torch.tensor([1, 2, 70001])) != expected


def test_the_default_text_fills_the_usual_sample() -> None:
    tokens = encode(load_text(), byte_tokenizer(adds_bos=True))
    assert sample(tokens, 128, 512, seed=0).shape == (128, 512)
