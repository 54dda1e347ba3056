"""What the table of options says is so: every option of the config objects has its effect, or its sentence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AwqConfig, BitsAndBytesConfig, GgufConfig, GPTQConfig
from transformers.quantizers import auto

from fewbit.errors import PlanError
from fewbit.models.plugin.options import OPTIONS, Option
from fewbit.models.plugin.quantizer import FewbitQuantizer
from fewbit.models.skeleton import Skeleton
from fewbit.nn.layers import QLinear
from fewbit.texts import sources
from tests import gguf_files, models

TEXTS = [models.sentences(20)]
DOCUMENTED = Path(__file__).parents[2] / "docs" / "reference.md"
Make = Callable[..., Any]
Effect = Callable[[Make, pytest.MonkeyPatch, Path], None]

pytestmark = pytest.mark.filterwarnings("ignore:.*groups of 32 instead of 128")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("source") / "model", "llama", dtype="float32")


@pytest.fixture
def make(source: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make("GPTQConfig", bits=3)` is the model that transformers gives for it, by fewbit."""
    for name in ("gptq", "awq", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, name, FewbitQuantizer)

    def load(kind: str, folder: Path = source, loading: dict[str, Any] | None = None, **options: Any) -> Any:
        given: dict[str, Any] = {"dataset": TEXTS} if kind in ("GPTQConfig", "AwqConfig") else {}
        given |= {"bits": 4} if kind == "GPTQConfig" else {}
        config = getattr(transformers, kind)(**{**given, **options})
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **(loading or {})).eval()

    return load


def packed(model: Any) -> dict[str, QLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}


def specs(model: Any) -> set[str]:
    return {str(module.codec) for module in packed(model).values()}


def same(a: Any, b: Any) -> bool:
    left, right = packed(a), packed(b)
    return set(left) == set(right) and all(
        torch.equal(part, right[name].qtensor().parts[key])
        for name, module in left.items()
        for key, part in module.qtensor().parts.items()
    )


def saved(model: Any, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder)
    config: dict[str, Any] = models.quantization_of(folder)
    return config


# --- The effects, one for each option that works ---

EFFECTS: dict[tuple[str, str], Effect] = {}


def effect(*options: str) -> Callable[[Effect], Effect]:
    def put(function: Effect) -> Effect:
        for option in options:
            config, _, name = option.partition(".")
            EFFECTS[config, name] = function
        return function

    return put


@effect("GPTQConfig.bits")
def bits(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    assert specs(make("GPTQConfig", bits=3)) == {"int3-g32-sym"}
    assert specs(make("GPTQConfig", bits=8)) == {"int8-g32-sym"}


@effect("GPTQConfig.group_size", "AwqConfig.group_size")
def group_size(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    assert specs(make("GPTQConfig", group_size=16)) == {"int4-g16-sym"}
    assert specs(make("GPTQConfig", group_size=-1)) == {"int4-row-sym"}
    assert specs(make("AwqConfig", group_size=32)) == {"int4-g32"}
    with pytest.warns(UserWarning, match="groups of 32 instead of 128"):
        assert specs(make("GPTQConfig")) == {"int4-g32-sym"}
    for kind in ("GPTQConfig", "AwqConfig"):
        with pytest.raises(PlanError, match="64") as refusal:
            make(kind, group_size=64)  # of 96 columns
        assert "int4-g32" in refusal.value.hint


@effect("GPTQConfig.dataset", "AwqConfig.dataset")
def dataset(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: list[str] = []

    def text(name: str, part: str) -> sources.Text:
        asked.append(name)
        return sources.Text(name, tuple(TEXTS))

    for kind, names in (("GPTQConfig", ("c4", "c4-new", "wikitext2", None)), ("AwqConfig", ("c4",))):
        plain = make(kind)
        assert same(plain, make(kind))
        assert not same(plain, make(kind, dataset=[models.sentences(20, seed=5)]))
        with pytest.raises(PlanError, match="no tokens"):
            make(kind, dataset=[""])
        with patch.context() as within:
            within.setattr(sources, "load_text", text)
            for name in names:
                make(kind, dataset=name)
    assert asked == ["c4", "c4", "wikitext2", "pydoc", "c4"]


@effect("GPTQConfig.tokenizer", "AwqConfig.tokenizer")
def tokenizer(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    models.save(folder / "bare", "llama", dtype="float32")
    for file in (folder / "bare").glob("token*"):
        file.unlink()
    models.tokenizer().save_pretrained(folder / "words")
    for kind in ("GPTQConfig", "AwqConfig"):
        plain = make(kind)
        assert same(plain, make(kind, folder / "bare", tokenizer=models.tokenizer()))
        assert same(plain, make(kind, folder / "bare", tokenizer=str(folder / "words")))
        with pytest.raises(PlanError, match="needs a tokenizer"):
            make(kind, folder / "bare")


@effect("GPTQConfig.damp_percent")
def damp_percent(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    assert not same(make("GPTQConfig"), heavy := make("GPTQConfig", damp_percent=0.9))
    assert saved(heavy, folder)["damp_percent"] == 0.9


@effect("GPTQConfig.desc_act", "GPTQConfig.act_group_aware")
def order(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    both = make("GPTQConfig")
    assert same(both, made := make("GPTQConfig", desc_act=True))
    assert not same(both, make("GPTQConfig", act_group_aware=False))
    assert all(module.permutation is None for module in packed(made).values())
    assert saved(made, folder)["desc_act"] is False


@effect("GPTQConfig.sym", "GPTQConfig.format")
def sym_and_format(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    uneven = make("GPTQConfig", sym=False)
    assert specs(uneven) == {"int4-g32"}
    assert saved(uneven, folder / "uneven")["checkpoint_format"] == "gptq_v2"
    plain, second = make("GPTQConfig"), make("GPTQConfig", checkpoint_format="gptq_v2")
    assert saved(plain, folder / "v1")["checkpoint_format"] == "gptq"
    assert saved(second, folder / "v2")["checkpoint_format"] == "gptq_v2"
    zeros = [models.tensors_of(folder / v)["model.layers.0.mlp.up_proj.qzeros"] for v in ("v1", "v2")]
    assert (zeros[0] == 0x77777777).all()
    assert (zeros[1] == torch.tensor(0x88888888 - 2**32, dtype=torch.int32)).all()
    for made, name in ((uneven, "uneven"), (plain, "v1"), (second, "v2")):
        assert same(made, AutoModelForCausalLM.from_pretrained(folder / name))


@effect("GPTQConfig.true_sequential")
def true_sequential(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    one, all_at_once = make("GPTQConfig"), make("GPTQConfig", true_sequential=False)
    first, second = packed(one), packed(all_at_once)
    for name in ("q_proj", "k_proj", "v_proj"):  # they see the same either way, in the first block
        key = f"model.layers.0.self_attn.{name}"
        assert torch.equal(first[key].qtensor().parts["codes"], second[key].qtensor().parts["codes"])
    key = "model.layers.0.mlp.down_proj"
    assert not torch.equal(first[key].qtensor().parts["codes"], second[key].qtensor().parts["codes"])


@effect("GPTQConfig.modules_in_block_to_quantize")
def modules_in_block(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    mlp = [["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]
    with pytest.warns(UserWarning, match=r"\d% of those in the model's blocks, stay in .*: self_attn\.q_proj, "):
        made = make("GPTQConfig", modules_in_block_to_quantize=mlp)
    assert {name.split(".", 3)[3] for name in packed(made)} == {"mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"}
    # Lists are steps: what stands in one list is measured at once.
    with pytest.warns(UserWarning, match="stay in"):
        other = make("GPTQConfig", modules_in_block_to_quantize=[[name for step in mlp for name in step]])
    assert not same(made, other)
    assert saved(made, folder)["modules_in_block_to_quantize"] == mlp
    assert same(made, AutoModelForCausalLM.from_pretrained(folder))
    with pytest.raises(PlanError, match=r"no block has a linear 'mlp\.gate', but self_attn\.q_proj"):
        make("GPTQConfig", modules_in_block_to_quantize=[*mlp, ["mlp.gate"]])
    with pytest.raises(PlanError, match=r"only \d+%"):
        make("GPTQConfig", modules_in_block_to_quantize=[["self_attn.q_proj"]])


@effect("GPTQConfig.block_name_to_quantize", "AwqConfig.block_name_to_quantize")
def block_name(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    for kind in ("GPTQConfig", "AwqConfig"):
        assert same(make(kind), make(kind, block_name_to_quantize="model.layers"))
        with pytest.raises(PlanError, match=r"blocks are model\.layers"):
            make(kind, block_name_to_quantize="transformer.h")


@effect("GPTQConfig.model_seqlen", "AwqConfig.model_seqlen", "GPTQConfig.batch_size", "AwqConfig.batch_size")
def windows(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    seen: list[tuple[int, ...]] = []
    plain = Skeleton.capture

    def captured(skeleton: Skeleton, batches: list[torch.Tensor]) -> Any:
        seen.append(tuple(batches[0].shape))
        return plain(skeleton, batches)

    patch.setattr(Skeleton, "capture", captured)
    long = [models.sentences(160)]
    for kind in ("GPTQConfig", "AwqConfig"):
        wanted: list[dict[str, int]] = [{}, {"model_seqlen": 32}, {"batch_size": 65, "model_seqlen": 32}]
        for options in wanted:
            make(kind, dataset=long, **options)
        assert seen[-3:] == [(16, models.CONTEXT), (64, 32), (65, 32)]
        with pytest.raises(PlanError, match="model_seqlen=129: the model's context is 128"):
            make(kind, model_seqlen=129)


@effect("GPTQConfig.meta", "AwqConfig.meta")
def meta(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    for kind in ("GPTQConfig", "AwqConfig"):
        assert saved(make(kind, meta={"quantizer": ["mine"]}), folder / kind)["meta"] == {"quantizer": ["mine"]}


@effect("AwqConfig.bits", "AwqConfig.zero_point")
def zero_point(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    assert specs(make("AwqConfig", bits=4)) == {"int4-g32"}
    even = make("AwqConfig", zero_point=False)
    assert specs(even) == {"int4-g32-sym"}
    even.save_pretrained(folder)
    assert same(even, AutoModelForCausalLM.from_pretrained(folder))


@effect("AwqConfig.format")
def version(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    plain, other = make("AwqConfig"), make("AwqConfig", version="gemv")
    assert saved(plain, folder / "gemm")["version"] == "gemm"
    assert saved(other, folder / "gemv")["version"] == "gemv"
    shapes = [models.tensors_of(folder / v)["model.layers.0.mlp.up_proj.qweight"].shape for v in ("gemm", "gemv")]
    assert shapes == [(64, 96 // 8), (96, 64 // 8)]
    for name in ("gemm", "gemv"):
        assert same(plain, AutoModelForCausalLM.from_pretrained(folder / name))


@effect("AwqConfig.modules_to_not_convert")
def modules_to_not_convert(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"8,192 parameters, 13% of those .* stay in float32: self_attn\.o_proj$"):
        made = make("AwqConfig", modules_to_not_convert=["o_proj", "lm_head"])
    assert not [name for name in packed(made) if "o_proj" in name]
    assert len(packed(made)) == 12
    assert "model.layers.0.self_attn.o_proj" in saved(made, folder)["modules_to_not_convert"]
    with pytest.raises(PlanError, match="no linear is called 'o_prof'"):
        make("AwqConfig", modules_to_not_convert=["o_prof"])


@effect("AwqConfig.do_fuse", "AwqConfig.fuse_max_seq_len", "AwqConfig.modules_to_fuse")
def fusing(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    ways: list[dict[str, Any]] = [{"do_fuse": True}, {"modules_to_fuse": {"attention": []}}]
    for options in ways:
        made = make("AwqConfig", fuse_max_seq_len=64, **options)
        assert "QLinear(64, 128" in repr(made)  # q, k and v of 64, 32 and 32 rows
        assert "do_fuse" not in saved(made, folder)
    assert "QLinear(64, 128" not in repr(make("AwqConfig"))
    with pytest.raises(PlanError, match="fuse_max_seq_len"):
        make("AwqConfig", do_fuse=True, fuse_max_seq_len=129)


@effect(
    "BitsAndBytesConfig.load_in_8bit",
    "BitsAndBytesConfig.load_in_4bit",
    "BitsAndBytesConfig.llm_int8_threshold",
    "BitsAndBytesConfig.bnb_4bit_quant_type",
    "BitsAndBytesConfig.bnb_4bit_use_double_quant",
)
def schemes(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    wanted: dict[str, dict[str, Any]] = {
        "llm.int8": {"load_in_8bit": True},
        "llm.int8-t3": {"load_in_8bit": True, "llm_int8_threshold": 3.0},
        "fp4-b64": {"load_in_4bit": True},
        "nf4-b64": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "nf4-b64-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    }
    for spec, options in wanted.items():
        assert specs(make("BitsAndBytesConfig", **options)) == {spec}


@effect("BitsAndBytesConfig.llm_int8_skip_modules")
def skip_modules(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    for width in ("load_in_4bit", "load_in_8bit"):
        made = packed(make("BitsAndBytesConfig", **{width: True}, llm_int8_skip_modules=["down_proj"]))
        assert made
        assert not [name for name in made if "down_proj" in name]


@effect("BitsAndBytesConfig.llm_int8_enable_fp32_cpu_offload")
def offload(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    # The meta device stands for a GPU: where weights would go decides, not that they get there.
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0, "lm_head": 0}
    for asked, count in ((True, 7), (False, 14)):
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=asked)
        quantizer = FewbitQuantizer(config, pre_quantized=False)
        model = models.build("llama", dtype="float32")
        quantizer.preprocess_model(model, torch.float32, device_map=places)
        assert len(packed(model)) == count
        assert asked is not any("layers.1" in name for name in packed(model))
    everything = make("BitsAndBytesConfig", loading={"device_map": {"": "cpu"}}, load_in_8bit=True)
    assert len(packed(everything)) == 14


@effect("BitsAndBytesConfig.bnb_4bit_compute_dtype")
def compute_dtype(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    ids = torch.randint(3, models.VOCAB, (1, 16), generator=torch.Generator().manual_seed(0))
    exact, coarse = (
        make("BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_compute_dtype=kind)
        for kind in (torch.float32, torch.bfloat16)
    )
    assert same(exact, coarse)
    wanted, got = models.logits(exact, ids), models.logits(coarse, ids)
    assert got.dtype == torch.float32
    assert 1e-4 < (got - wanted).norm() / wanted.norm() < 5e-2
    coarse.save_pretrained(folder)
    assert torch.equal(models.logits(AutoModelForCausalLM.from_pretrained(folder), ids), got)


@effect("BitsAndBytesConfig.bnb_4bit_quant_storage")
def storage(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    made = make("BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    made.save_pretrained(folder)
    tensor = models.tensors_of(folder)["model.layers.0.mlp.up_proj.weight"]
    assert tensor.dtype == torch.bfloat16
    assert same(made, AutoModelForCausalLM.from_pretrained(folder))


@effect("GgufConfig.gguf_file", "GgufConfig.dequantize")
def gguf(make: Make, patch: pytest.MonkeyPatch, folder: Path) -> None:
    gguf_files.written(gguf_files.save(folder / "source", "llama"), folder / "model.gguf", "q8_0")
    loading = {"gguf_file": "model.gguf"}
    assert packed(make("GgufConfig", folder, loading))
    assert packed(make("GgufConfig", folder, loading, gguf_file="model.gguf"))
    assert not packed(make("GgufConfig", folder, loading, dequantize=True))


# --- Values that are refused, and those that change nothing ---

REFUSED: dict[tuple[str, str], Any] = {
    ("GPTQConfig", "dataset"): [[1, 2, 3]],
    ("GPTQConfig", "format"): "marlin",
    ("GPTQConfig", "backend"): "marlin",
    ("GPTQConfig", "cache_block_outputs"): False,
    ("AwqConfig", "bits"): 8,
    ("AwqConfig", "format"): "llm-awq",
    ("AwqConfig", "backend"): "exllama_v2",
    ("AwqConfig", "dataset"): [[1, 2, 3]],
    ("AwqConfig", "damp_percent"): 0.2,
    ("AwqConfig", "desc_act"): True,
    ("AwqConfig", "act_group_aware"): False,
    ("AwqConfig", "true_sequential"): False,
    ("AwqConfig", "cache_block_outputs"): False,
    ("AwqConfig", "modules_in_block_to_quantize"): [["mlp.up_proj"]],
    ("BitsAndBytesConfig", "llm_int8_has_fp16_weight"): True,
    ("BitsAndBytesConfig", "bnb_4bit_quant_type"): "nf3",
}
NOT_NEEDED: dict[str, Any] = {
    "module_name_preceding_first_block": ["model.embed_tokens"],
    "pad_token_id": 7,
    "max_input_length": 4096,
    "sym": True,
}


def named(verdict: Callable[[Option], bool]) -> pytest.MarkDecorator:
    rows = [option for option in OPTIONS if verdict(option)]
    return pytest.mark.parametrize("option", rows, ids=lambda option: f"{option.config}.{option.name}")


@pytest.mark.parametrize("check", dict.fromkeys(EFFECTS.values()), ids=lambda check: check.__name__)
def test_what_works_has_its_effect(check: Effect, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        check(make, patch, tmp_path)


def test_every_verdict_has_its_test() -> None:
    assert set(EFFECTS) == {(o.config, o.name) for o in OPTIONS if o.verdict == "works"}
    assert set(REFUSED) == {(o.config, o.name) for o in OPTIONS if o.refusal}
    assert all(o.refusal for o in OPTIONS if o.verdict == "refused")


@named(lambda option: bool(option.refusal))
def test_what_is_refused_has_its_sentence(option: Option, make: Make) -> None:
    value = REFUSED[option.config, option.name]
    width = {"load_in_4bit": True} if option.config == "BitsAndBytesConfig" else {}
    with pytest.raises(PlanError) as refusal:
        make(option.config, **width, **{option.name: value})
    assert f"{option.config}({option.name}={value!r}): {option.refusal}" in refusal.value.message


def test_all_that_is_refused_is_said_at_once(make: Make) -> None:
    with pytest.raises(PlanError) as refusal:
        make("GPTQConfig", backend="marlin", cache_block_outputs=False)
    assert "backend" in refusal.value.message
    assert "cache_block_outputs" in refusal.value.message


@named(lambda option: option.verdict == "not needed")
def test_what_is_not_needed_changes_nothing(option: Option, make: Make) -> None:
    assert same(make(option.config), make(option.config, **{option.name: NOT_NEEDED[option.name]}))


def test_a_module_that_should_precede_the_blocks_must_be_there(make: Make) -> None:
    with pytest.raises(PlanError, match=r"the model has no 'transformer\.wte'"):
        make("GPTQConfig", module_name_preceding_first_block=["transformer.wte"])


@named(lambda option: option.verdict == "dropped")
def test_what_transformers_drops_it_drops(option: Option) -> None:
    config = getattr(transformers, option.config)(bits=4, **{option.name: {"version": 2}})
    assert option.name not in config.to_dict()


@pytest.mark.parametrize("config", [GPTQConfig, AwqConfig, BitsAndBytesConfig, GgufConfig])
def test_every_option_is_in_the_table_and_no_other(config: Any) -> None:
    asked = {name for name in inspect.signature(config.__init__).parameters if name not in ("self", "args", "kwargs")}
    if config is AwqConfig:  # what it hands on to the class above it
        asked = set(vars(AwqConfig())) - {"quant_method"}
    listed = {o.name for o in OPTIONS if o.config == config.__name__ and o.verdict != "dropped"}
    assert asked == listed


def test_the_table_in_the_docs_is_this_one() -> None:
    from options_table import table

    assert table() in DOCUMENTED.read_text(encoding="utf-8"), "run python tools/options_table.py"
