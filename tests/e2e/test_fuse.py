"""Fused models write the text that they wrote before, and everything else still finds its linears."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AwqConfig, BitsAndBytesConfig

import fewbit as fb
from fewbit.api import chat as chatting
from fewbit.api import generate as generating
from fewbit.api import quantize
from fewbit.api import serve as serving
from fewbit.errors import PlanError
from fewbit.measure import speed
from fewbit.models.decoding import caches, decode, operations
from fewbit.models.decoding.fuse import fuse, shared_inputs
from fewbit.models.load import fuses_by_itself, load_model
from fewbit.models.loading import Loading
from fewbit.models.plugin import quantizer
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.names import ADAPTER, ADAPTER_WEIGHTS
from fewbit.nn.fused import Slice, packed_linears
from fewbit.plans.plan import Plan, Rule, find
from fewbit.serving.settings import Serving
from fewbit.system import machine
from tests import architectures, models
from tests.e2e.conftest import Fewbit

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
FOUND = {
    "llama": [ATTENTION, MLP],
    "qwen2": [ATTENTION, MLP],
    "gemma3": [ATTENTION, MLP],
    "opt": [ATTENTION],
    "gpt2": [],
}
LENGTH = 48


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("llama"), "llama", "awq")


def quantized(root: Path, family: str, format: str = "gptq") -> Path:
    folder = models.save(root / "original", family)
    quantize.quantize(folder, root / "out", plan=find("rtn-4bit").changed(scheme="int4-g32", format=format))
    return root / "out"


def short(groups: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Of the first block, without the way to it."""
    return [tuple(name.partition(".0.")[2] for name in group) for group in groups if ".0." in group[0]]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_text_is_the_same_token_for_token(family: str, ids: Tensor, tmp_path: Path) -> None:
    out = quantized(tmp_path, family)
    plain = fb.load(out, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "not fused")
        fused = fb.load(out, dtype=torch.float32, fuse=LENGTH)
    if family in FOUND:
        expected = FOUND[family]
        assert short(shared_inputs(plain)) == expected
        assert sum(isinstance(m, Slice) for m in fused.modules()) == 2 * sum(map(len, expected))
    # Twice: the cache is used again. The second batch has another size.
    for prompt in (ids, ids.flip(1), ids[:1]):
        assert models.greedy(fused, prompt) == models.greedy(plain, prompt)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_static_cache_as_for_a_gpu_gives_the_same_text(family: str, ids: Tensor, tmp_path: Path) -> None:
    model = fb.load(quantized(tmp_path, family), dtype=torch.float32)
    expected = models.greedy(model, ids)
    assert decode.supports_static_cache(model, model.generate)
    cache = caches.static(model, LENGTH)
    mask = torch.ones_like(ids)
    own = {caches.CACHE: cache}
    got = model.generate(ids, attention_mask=mask, max_new_tokens=24, eos_token_id=None, **own)
    assert got.tolist() == expected


LATENT = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")


@pytest.mark.filterwarnings("default")  # the model warns about its own tiny config
@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe_lite"])
def test_latent_attention_is_fused_and_loops_in_a_static_cache(kind: str, ids: Tensor, tmp_path: Path) -> None:
    quantize.quantize(architectures.save(tmp_path / "model", kind), tmp_path / "out", plan="nf4", device="cpu")
    plain = fb.load(tmp_path / "out", dtype=torch.float32)
    fused = fb.load(tmp_path / "out", dtype=torch.float32, fuse=LENGTH)
    slices = {name for name, module in fused.named_modules() if isinstance(module, Slice)}
    assert {f"model.layers.{layer}.{name}" for layer in range(2) for name in LATENT} <= slices
    decoder = fused.generate.__self__
    assert decode.supports_static_cache(fused, decoder.plain)
    decoder.static = True
    for prompt in (ids, ids.flip(1), ids[:1]):
        assert models.greedy(fused, prompt) == models.greedy(plain, prompt)
        assert int(decoder.loop.step.at) == 24


def test_measuring_the_speed_brings_no_warning(llama: Path, ids: Tensor) -> None:
    model = fb.load(llama, dtype=torch.float32)  # a warning is an error in these tests
    assert min(speed.decode(model, ids[:1], new_tokens=2)) > 0


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
@pytest.mark.parametrize("nested", [False, True])
def test_every_scheme_can_be_fused(options: dict[str, Any], nested: bool, ids: Tensor, tmp_path: Path) -> None:
    if nested and "load_in_4bit" in options:
        options = {**options, "bnb_4bit_use_double_quant": True}
    folder = models.save(tmp_path / "original", "llama")
    with quantizer.serving():
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))
    before = models.greedy(model, ids)
    assert len(fuse(model)) == 4
    assert models.greedy(model, ids) == before


def test_the_guides_cell_fuses(llama: Path, ids: Tensor) -> None:
    config = AwqConfig(do_fuse=True, fuse_max_seq_len=LENGTH)
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with pytest.warns(UserWarning, match="quantization_config"):
        model: Any = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.float32)
    assert sum(isinstance(m, Slice) for m in model.modules()) == 10
    assert not any(isinstance(m, Slice) for m in plain.modules())
    assert models.greedy(model, ids) == models.greedy(plain, ids)
    cache = model.generate.__self__.cache
    assert {layer.whole[0].shape[2] for layer in cache.layers} == {LENGTH}
    with pytest.raises(
        PlanError, match=r"prompt \(9 tokens\) and new tokens make 49 tokens, but the model was fused for 48"
    ):
        models.greedy(model, ids, new=40)
    # Whoever brings a cache, or searches with beams, is served as before.
    assert len(model.generate(ids[:1], max_new_tokens=4, num_beams=2, attention_mask=torch.ones(1, 9))) == 1


def test_it_is_saved_as_it_was(llama: Path, tmp_path: Path) -> None:
    model = fb.load(llama, dtype=torch.float32, fuse=LENGTH)
    model.save_pretrained(tmp_path / "again")
    before, after = models.tensors_of(llama), models.tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.to(after[name].dtype), after[name]) for name, tensor in before.items())
    for file in ("config.json", "generation_config.json"):
        assert "fuse" not in (text := (tmp_path / "again" / file).read_text(encoding="utf-8"))
        assert "cache_implementation" not in json.loads(text)
    unpacked = model.dequantize()
    assert not packed_linears(unpacked)
    assert not any(isinstance(m, Slice) for m in unpacked.modules())
    x = torch.arange(3, 12)[None]
    assert torch.allclose(models.logits(unpacked, x), models.logits(fb.load(llama, dtype=torch.float32), x), atol=1e-5)


def test_lora_targets_still_resolve(llama: Path, ids: Tensor) -> None:
    gradients = []
    for length in (None, LENGTH):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["k_proj", "up_proj"], init_lora_weights="gaussian")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(fb.load(llama, dtype=torch.float32, fuse=length), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(1))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, fused = gradients
    assert plain.keys() == fused.keys()
    assert len(plain) == 8
    for name, gradient in plain.items():
        assert float((fused[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


def test_a_graph_is_recorded_anew_when_adapters_change(llama: Path, ids: Tensor) -> None:
    model = fb.load(llama, dtype=torch.float32, device="cpu", fuse=LENGTH)
    decoder: decode.Decoder = model.generate.__self__
    config = LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights="gaussian")

    def renewed() -> bool:
        before = decoder.cache
        models.greedy(model, ids, 2)
        return decoder.cache is not before

    assert renewed()
    assert not renewed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tuned = get_peft_model(model, config)
    assert renewed()
    tuned.add_adapter("second", config)
    assert renewed()
    tuned.set_adapter("second")
    assert renewed()
    assert not renewed()
    with tuned.disable_adapter():
        assert renewed()
    assert renewed()


def test_what_our_operations_serve_is_not_compiled_and_said(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations are for GPUs. Here a stand-in says whether they replaced all of a block's."""
    asked = list[bool]()

    def compiled(compile: bool, replaced: list[str]) -> bool:
        def replace(model: Any, *, whole: bool = False) -> list[str]:
            asked.append(whole)
            return replaced

        monkeypatch.setattr(operations, "replace", replace)
        model = fb.load(llama)
        decode.within(model, LENGTH, compile=compile)
        return bool(model.generate.__self__.compile)

    # A warning is an error in these tests.
    assert not compiled(False, ["model.norm"])
    assert not compiled(False, [])
    assert compiled(True, [])
    with pytest.warns(UserWarning, match="not compiled: fewbit's own operations serve all its blocks, and are faster"):
        assert not compiled(True, ["model.norm"])
    assert asked == [False, False, True, True]


def test_what_differs_is_not_fused_and_said(ids: Tensor, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "original", "llama")
    plan = json.loads(json.dumps(find("rtn-4bit").changed(scheme="int4-g32").to_json()))
    plan["rules"].insert(0, {"match": "*.k_proj", "scheme": None})
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    quantize.quantize(folder, tmp_path / "out", plan=str(tmp_path / "plan.json"))
    model = fb.load(tmp_path / "out")
    assert short(fuse(model))[0] == ("self_attn.q_proj", "self_attn.v_proj")
    model = fb.load(tmp_path / "out")
    odd = model.model.layers[1].mlp.up_proj
    odd.adopt(odd.qtensor(), torch.float16)
    with pytest.warns(UserWarning, match=r"not fused: model.layers.1.mlp.gate_proj \+ .* they differ in activations"):
        fuse(model)


def test_linears_of_one_scheme_are_fused_beside_another(ids: Tensor, tmp_path: Path) -> None:
    """As in GGUF mixtures, where v often has a larger type than q and k."""
    wanted = Plan("mixed", "gguf", (Rule("*.v_proj", "q8_0", "rtn"), Rule("*", "q4_0", "rtn")))
    out = tmp_path / "out.gguf"
    quantize.quantize(models.save(tmp_path / "original", "llama"), out, plan=wanted)
    expected = fb.load(out)(ids).logits
    model = fb.load(out)
    with pytest.warns(UserWarning, match="v_proj and 1 more: its neighbours have other schemes than q8_0"):
        assert short(fuse(model))[0] == ("self_attn.q_proj", "self_attn.k_proj")
    assert torch.equal(model(ids).logits, expected)


def test_a_model_with_nothing_to_fuse_says_so(tmp_path: Path) -> None:
    model = fb.load(quantized(tmp_path, "gpt2"))
    with pytest.warns(UserWarning, match="no two quantized linears"):
        assert fuse(model) == []


def test_a_model_that_puts_positions_before_the_text(fewbit: Fewbit, tmp_path: Path) -> None:
    """CPM-Ant puts a learned prompt before each text. It needs a place in the cache, which only the user can give."""
    packed = tmp_path / "packed"
    fb.quantize(architectures.save(tmp_path / "model", "cpmant"), packed, plan="rtn-4bit")
    few = ("The house is", "--max-new-tokens", 4)
    refused = fewbit("generate", packed, *few, "--fuse")
    assert refused.code == 2
    assert re.search(r"takes \d+ positions in the cache with those that the model puts before it", refused.err)
    assert "--max-length" in refused.err
    longer, plain = fewbit("generate", packed, *few, "--max-length", 100), fewbit("generate", packed, *few)
    assert (longer.code, plain.code) == (0, 0)
    assert longer.out.splitlines()[0] == plain.out.splitlines()[0]


def test_bad_lengths_are_refused_before_any_work(llama: Path, fewbit: Fewbit) -> None:
    for arguments, message in (
        (("--no-fuse", "--max-length", 20), "--max-length has no effect with --no-fuse"),
        (("--max-length", 0), "--max-length 0"),
        (("--compile", "--no-fuse", "--device", "cpu"), "--compile without --fuse"),
        (("--compile", "--device", "cpu"), "--compile needs an NVIDIA GPU"),
        (("--fuse", "--max-length", 1000), f"beyond the model's context of {models.CONTEXT}"),
        (("--max-length", 20), "--max-length 20 is too short"),
    ):
        answer = fewbit("generate", llama, "a text", *arguments)
        assert (answer.code, answer.out) == (2, "")
        assert message in answer.err
    with pytest.raises(PlanError, match="without a length"):
        AwqConfig(do_fuse=True)
    with pytest.raises(PlanError, match="without a length"):
        AwqConfig(modules_to_fuse={"attention": []})
    config = AwqConfig(do_fuse=True, fuse_max_seq_len=4096)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed .quantization_config")
        with pytest.raises(PlanError, match=f"fuse_max_seq_len 4096 is beyond the model's context of {models.CONTEXT}"):
            AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    with pytest.raises(PlanError, match="fuse=True: only `generate` knows"):
        fb.load(llama, fuse=True)
    with pytest.raises(PlanError, match="no packed weights"):
        fb.load(llama.parent / "original", fuse=LENGTH)


def test_a_gpu_generates_fused_unless_something_is_against_it(llama: Path, tmp_path: Path) -> None:
    source, there = locate(llama), Loading("cuda")
    assert fuses_by_itself(source, there, models.CONTEXT)
    assert fuses_by_itself(source, Loading("cuda:1"), 2)
    assert not fuses_by_itself(source, there, models.CONTEXT + 1)
    assert not fuses_by_itself(locate(llama.parent / "original"), there, 2)
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        (tmp_path / name).touch()
    for other in ({"device": "cpu"}, {"device": "auto"}, {"adapter": tmp_path}, {"tensor_parallel": True}):
        assert not fuses_by_itself(source, replace(there, **other), 2), other


def test_generate_loads_the_model_as_its_fuse_says(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule for GPUs is replaced: this machine may have none."""
    found = list[int | None]()

    def load(source: Any, loading: Loading, **kwargs: Any) -> Any:
        found.append(loading.fuse)
        return load_model(source, loading, **kwargs)

    monkeypatch.setattr(generating, "load_model", load)
    monkeypatch.setattr(generating, "fuses_by_itself", lambda *given: True)
    ids = len(load_tokenizer(locate(llama))("a text")["input_ids"])
    texts = {
        fb.generate(llama, "a text", max_new_tokens=8, device="cpu", fuse=fuse).text for fuse in (None, False, True, 40)
    }
    assert len(texts) == 1
    assert found == [ids + 8, False, ids + 8, 40]


def test_chat_and_serve_load_on_the_gpu_if_there_is_one(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have none: the answer to which device there is is replaced."""
    found = list[Any]()

    def load(source: Any, loading: Loading, **kwargs: Any) -> Any:
        found.append(loading.device)
        raise PlanError("enough")

    monkeypatch.setattr(machine, "device", lambda wanted: wanted or "cuda")
    monkeypatch.setattr(chatting, "Conversation", lambda *given: None)  # the model has no chat template
    monkeypatch.setattr(chatting, "load_model", load)
    monkeypatch.setattr(serving, "load_model", load)
    for device in (None, "auto", "cuda:1"):
        with pytest.raises(PlanError, match="enough"):
            chatting.conversation(llama, Loading(device))
        with pytest.raises(PlanError, match="enough"):
            serving.service(llama, Loading(device), Serving())
    assert found == ["cuda", "cuda", "auto", "auto", "cuda:1", "cuda:1"]


def test_the_command_line_fuses(llama: Path, fewbit: Fewbit) -> None:
    plain, fused, fitting = (
        fewbit("generate", llama, "a text", "--max-new-tokens", 12, *more, "--json").json
        for more in (("--no-fuse",), ("--fuse", "--max-length", LENGTH), ("--fuse",))
    )
    assert plain["text"] == fused["text"] == fitting["text"]
    assert fused["tokens"] > 1
    assert fused["after_first"] > 0
    said = fewbit("generate", llama, "a text", "--max-new-tokens", 12, "--fuse", "--max-length", LENGTH)
    assert "tokens/s" in said.err
