"""What users do with a model of transformers, done with one of each family of schemes: loading, generating, saving."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, TextStreamer

from fewbit.api import quantize
from fewbit.models.plugin import quantizer
from fewbit.nn.fused import packed_linears
from fewbit.nn.layers import QLinear
from fewbit.plans.plan import find
from tests import models

KINDS = ("gptq", "awq", "nf4", "int8", "gguf", "ct")
PLANS = {"gptq": "rtn-4bit", "ct": "w4a16", "nf4": "nf4", "int8": "int8", "gguf": "q8_0"}
GGUF = "model.gguf"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind, all of one model, and that model as "original"."""
    place = tmp_path_factory.mktemp("matrix")
    made = {"original": models.save(place / "original", "llama", dtype="float32")}
    (place / "plan.json").write_text(
        '{"name": "awq", "format": "awq", "rules": [{"match": "*", "scheme": "int4-g32"}]}', encoding="utf-8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWBIT_CACHE", str(place / "cache"))
        for kind in KINDS:
            made[kind] = place / kind
            out = made[kind] / GGUF if kind == "gguf" else made[kind]
            out.parent.mkdir(exist_ok=True)
            plan = find(str(place / "plan.json")) if kind == "awq" else find(PLANS[kind])
            quantize.quantize(made["original"], out, plan=plan.changed(method="rtn"))
    return made


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def load(kind: str, folders: dict[str, Path]) -> Callable[..., Any]:
    def from_pretrained(folder: Path | None = None, **options: Any) -> Any:
        if kind == "gguf":
            options["gguf_file"] = GGUF
        with quantizer.serving():
            return AutoModelForCausalLM.from_pretrained(folder or folders[kind], **options).eval()

    return from_pretrained


@pytest.fixture
def tokenizer(folders: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(folders["original"])


IDS = torch.arange(40)[None] + 3


def written(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    made: Tensor = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, min_new_tokens=8, pad_token_id=2, **options
    )
    assert made.shape[1] == 48
    return made


def test_places_types_and_attention(load: Callable[..., Any]) -> None:
    plain = load(dtype=torch.float32)
    count = len(packed_linears(plain))
    assert count >= 14
    wanted = models.logits(plain, IDS)
    ways: list[dict[str, Any]] = [
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"attn_implementation": "sdpa"},
        {"attn_implementation": "eager"},
    ]
    for options in ways:
        model = load(dtype=torch.float32, **options)
        assert len(packed_linears(model)) == count, options
        # Attention by another formula rounds otherwise; all else is the same, bit for bit.
        slack = 1e-5 if "attn_implementation" in options else 0
        assert (models.logits(model, IDS) - wanted).norm() <= slack * wanted.norm(), options
        assert model.config._attn_implementation == options.get("attn_implementation", "sdpa")


def test_the_type_asked_for_is_the_type(load: Callable[..., Any]) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name in ("dtype", "torch_dtype"):
            model = load(**{name: dtype})
            assert model.dtype == dtype
            # Before the first product, which would prepare a layer again for the type that it meets.
            assert {layer.dtype for layer in model.modules() if isinstance(layer, QLinear)} <= {dtype}
            assert models.logits(model, IDS).dtype == dtype
            assert model.model.norm.weight.dtype == dtype


def test_generating_in_every_mode(load: Callable[..., Any], folders: dict[str, Path], tokenizer: Any) -> None:
    model = load(dtype=torch.float32)
    greedy = written(model, do_sample=False)
    assert torch.equal(greedy, written(model, do_sample=False, cache_implementation="static", disable_compile=True))
    assert torch.equal(greedy, written(model, do_sample=False, use_cache=False))
    assert torch.equal(greedy, written(model, do_sample=False, num_beams=1))
    assert torch.equal(greedy, written(model, do_sample=False, prompt_lookup_num_tokens=3))
    # Whoever proposes, what is written is the model's own choice.
    assert torch.equal(greedy, written(model, do_sample=False, assistant_model=models.original(folders["original"])))
    beams = written(model, num_beams=3, do_sample=False)
    scores = [_log_probability(model, found) for found in (beams, greedy)]
    assert scores[0] >= scores[1] - 1e-4
    sampled = written(model, do_sample=True, temperature=1.0, top_k=0)
    assert torch.equal(sampled, written(model, do_sample=True, temperature=1.0, top_k=0))
    text = tokenizer.decode(greedy[0, 40:], skip_special_tokens=True)
    shown = io.StringIO()
    with redirect_stdout(shown):
        written(model, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert shown.getvalue().rstrip("\n") == text.rstrip("\n")
    pieces: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(target=written, args=(model,), kwargs={"do_sample": False, "streamer": pieces})
    thread.start()
    assert "".join(pieces) == text
    thread.join()


def _log_probability(model: Any, found: Tensor) -> float:
    said = models.logits(model, found)[0, 39:-1].log_softmax(-1)
    return float(said.gather(1, found[0, 40:, None]).sum())


def test_a_pipeline_and_the_footprint(load: Callable[..., Any], tokenizer: Any, folders: dict[str, Path]) -> None:
    model = load(dtype=torch.float32)
    make: Any = transformers.pipeline
    done = make("text-generation", model=model, tokenizer=tokenizer)("The model", max_new_tokens=4, do_sample=False)
    assert done[0]["generated_text"].startswith("The model")
    packed = packed_linears(model).values()
    others = models.original(folders["original"])
    held = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert model.get_memory_footprint() == sum(held.values())
    assert model.get_memory_footprint() < others.get_memory_footprint()
    assert (
        sum(linear.prepared[0].nbytes for linear in packed)
        <= sum(n.in_features * n.out_features for n in packed) * 1.0625
    )


# The layer's backward and its change of kernel are not for a graph: it breaks there, and computes as without.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_it_is_the_same(load: Callable[..., Any]) -> None:
    model = load(dtype=torch.float32)
    wanted = models.logits(model, IDS)
    compiled = torch.compile(model, backend="eager")
    assert (models.logits(compiled, IDS) - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_saved_model_is_the_same(load: Callable[..., Any], tmp_path: Path) -> None:
    model = load(dtype=torch.float32)
    wanted = models.logits(model, IDS)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(models.logits(load(tmp_path / "out", dtype=torch.float32), IDS), wanted)


# Of a GGUF file, users push the folder that save_pretrained made.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gguf"])
def test_a_pushed_model_is_the_same(
    kind: str, load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(dtype=torch.float32)
    wanted = models.logits(model, IDS)
    pushed = tmp_path / "pushed"

    # A hub that keeps what is uploaded in a folder.
    def create_commit(self: HfApi, repo_id: str, operations: Any, **options: Any) -> Any:
        for operation in operations:
            place = pushed / repo_id / operation.path_in_repo
            place.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                place.write_bytes(file.read())

    for name in ("create_commit", "create_repo", "create_branch"):
        answer = create_commit if name == "create_commit" else lambda *args, **options: _Url("me/model")
        monkeypatch.setattr(HfApi, name, answer)
        for module in (transformers.utils.hub, transformers.modeling_utils):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *args, _f=answer, **options: _f(None, *args, **options))
    model.push_to_hub("me/model")
    assert torch.equal(models.logits(load(pushed / "me" / "model", dtype=torch.float32), IDS), wanted)


class _Url(str):
    @property
    def repo_id(self) -> str:
        return str(self)


# PEFT asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_learns(load: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(dtype=torch.float32), peft.LoraConfig(target_modules="all-linear", r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert any(isinstance(module, QLinear) for module in model.modules())
