"""bitsandbytes' checkpoints: theirs load here, ours load there, bytes and logits are equal; and all that without it.

Only tests that compare with the package need it (`against_theirs`).
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import auto
from transformers.utils.import_utils import is_bitsandbytes_available

from fewbit import hook, prefer
from fewbit.api.generate import load
from fewbit.api.inspect import inspect
from fewbit.api.quantize import quantize
from fewbit.errors import FormatError, PlanError
from fewbit.models.plugin import quantizer
from fewbit.nn.choose import TOLERANCE
from fewbit.nn.layers import QLinear
from tests import models
from tests.e2e.conftest import Fewbit

INSTALLED = is_bitsandbytes_available()
against_theirs = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is the package to compare with")
if INSTALLED:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

# bitsandbytes says at every call that LLM.int8() goes through float16.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

CONFIGS: dict[str, dict[str, Any]] = {
    "nf4-b64-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-b64": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-b64": {"load_in_4bit": True},
    "llm.int8": {"load_in_8bit": True},
}
# All widths are multiples of a block: with others bitsandbytes 0.50 reads wrong scales on CPUs with AVX512.
FAMILIES = ("llama", "gpt2")
specs = pytest.mark.parametrize("spec", CONFIGS)


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("source") / request.param
    if request.param == "gpt2":
        return models.save(folder, "gpt2")
    return models.save(folder, request.param, dtype="float32", intermediate_size=128)


def loaded(folder: Path, **options: Any) -> Any:
    """By whatever transformers uses: outside `plugin.serving` bitsandbytes, if it is installed."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def ids() -> Tensor:
    return torch.randint(3, models.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def same_files(a: Path, b: Path) -> None:
    """Equal tensors by equal names, the JSON among them as JSON."""
    left, right = models.tensors_of(a), models.tensors_of(b)
    assert set(left) == set(right)
    for name, tensor in left.items():
        if "quant_state" in name:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(right[name].tolist()))
        else:
            assert tensor.dtype == right[name].dtype
            assert torch.equal(tensor, right[name]), name


def same_logits(a: Any, b: Any, spec: str) -> None:
    left, right = by_definition(a), by_definition(b)
    # What is rounded to 8 bits flips where the last digit of a float does: then it is one step of 127 away.
    assert (left - right).norm() <= (2e-2 if spec == "llm.int8" else 1e-5) * right.norm()


def by_definition(model: Any) -> Tensor:
    """Logits with the values that bitsandbytes decodes of its 4-bit weights, multiplied in float32.

    Its own product is computed in bfloat16 on processors that have AVX512-BF16, whatever the type of the activations:
    each is held to the tolerance of that type.
    """
    for name, linear in list(model.named_modules()):
        if INSTALLED and isinstance(linear, Linear4bit):
            plain = _plain(linear)  # before the first product, which lays the codes out anew in place
            x = torch.randn(8, linear.in_features, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                theirs, exact = linear(x), plain(x)
            assert (theirs - exact).norm() <= TOLERANCE[torch.bfloat16] * exact.norm()
            model.set_submodule(name, plain)
    return models.logits(model, ids())


def _plain(linear: Any) -> nn.Linear:
    values = dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    made.weight, made.bias = nn.Parameter(values), linear.bias
    return made


@against_theirs
@specs
def test_theirs_loads_here_and_goes_back(spec: str, source: Path, tmp_path: Path) -> None:
    theirs = loaded(source, quantization_config=BitsAndBytesConfig(**CONFIGS[spec]))
    theirs.save_pretrained(tmp_path / "theirs")
    assert inspect(tmp_path / "theirs").schemes == {spec: 8 if "gpt2" in str(source) else 14}
    ours = load(tmp_path / "theirs", dtype=torch.float32, kernel="llm_int8" if spec == "llm.int8" else None)
    assert sum(isinstance(module, QLinear) for module in ours.modules()) == (8 if "gpt2" in str(source) else 14)
    same_logits(ours, theirs, spec)
    ours.save_pretrained(tmp_path / "again")
    same_files(tmp_path / "again", tmp_path / "theirs")
    same_logits(loaded(tmp_path / "again"), theirs, spec)


@against_theirs
@specs
def test_quantizing_in_loading_is_theirs_byte_for_byte(spec: str, source: Path, tmp_path: Path) -> None:
    loaded(source, quantization_config=BitsAndBytesConfig(**CONFIGS[spec])).save_pretrained(tmp_path / "theirs")
    with quantizer.serving():
        ours = loaded(source, quantization_config=BitsAndBytesConfig(**CONFIGS[spec]), device_map="auto")
    ours.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")


@specs
def test_what_is_quantized_in_loading_loads_again(spec: str, source: Path, tmp_path: Path) -> None:
    with quantizer.serving():
        ours = loaded(source, quantization_config=BitsAndBytesConfig(**CONFIGS[spec]), device_map="auto")
    ours.save_pretrained(tmp_path / "ours")
    assert inspect(tmp_path / "ours").schemes == {spec: 8 if "gpt2" in str(source) else 14}
    again = load(tmp_path / "ours", dtype=torch.float32)
    assert torch.equal(models.logits(again, ids()), models.logits(ours, ids()))


plans = pytest.mark.parametrize(("plan", "spec"), [("nf4", "nf4-b64-dq"), ("int8", "llm.int8")])


@plans
def test_a_plan_makes_what_the_config_object_makes(
    plan: str, spec: str, source: Path, tmp_path: Path, fewbit: Fewbit
) -> None:
    dry = fewbit("quantize", source, "-o", tmp_path / "ours", "--plan", plan, "--dry-run", "--json")
    done = fewbit("quantize", source, "-o", tmp_path / "ours", "--plan", plan, "--json")
    assert done.code == 0, done.err
    files = sum(tensor.nbytes for tensor in models.tensors_of(tmp_path / "ours").values())
    assert dry.json["output_bytes"] == done.json["output_bytes"] == files
    with quantizer.serving():
        ours = loaded(tmp_path / "ours")
        on_load = loaded(source, quantization_config=BitsAndBytesConfig(**CONFIGS[spec]))
    assert torch.equal(models.logits(ours, ids()), models.logits(on_load, ids()))


@against_theirs
@plans
def test_ours_loads_there(plan: str, spec: str, source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "ours", plan=plan)
    theirs = loaded(tmp_path / "ours")
    linear = Linear8bitLt if spec == "llm.int8" else Linear4bit
    assert sum(isinstance(module, linear) for module in theirs.modules()) == (8 if "gpt2" in str(source) else 14)
    kernel = "llm_int8" if spec == "llm.int8" else None
    ours = load(tmp_path / "ours", dtype=torch.float32, kernel=kernel)
    same_logits(theirs, ours, spec)
    theirs_made = loaded(source, quantization_config=BitsAndBytesConfig(**CONFIGS[spec]))
    same_logits(theirs, theirs_made, spec)


def test_gptq_on_nf4_is_a_file_of_theirs_and_better(tmp_path: Path, text: Path, fewbit: Fewbit) -> None:
    source = models.save(tmp_path / "source", "llama", dtype="float32", intermediate_size=128)
    options = ("--calibration", text, "--samples", 16, "--length", 64, "--json")
    plain = fewbit("quantize", source, "-o", tmp_path / "plain", "--plan", "nf4", "--json")
    done = fewbit("quantize", source, "-o", tmp_path / "gptq", "--plan", "nf4", "--method", "gptq", *options)
    assert plain.code == done.code == 0, done.err
    assert plain.json["output_bytes"] == done.json["output_bytes"]
    readers, ours = loaded(tmp_path / "gptq"), load(tmp_path / "gptq", dtype=torch.float32)
    same_logits(readers, ours, "nf4-b64-dq")
    original, nearest = models.original(source), loaded(tmp_path / "plain")
    words = models.tokenizer()(models.sentences(4, seed=9), return_tensors="pt")["input_ids"][:, :96]
    wanted = models.logits(original, words)
    assert (models.logits(ours, words) - wanted).norm() < 0.85 * (models.logits(nearest, words) - wanted).norm()


def test_what_a_plan_leaves_is_left_by_their_reader_too(tmp_path: Path, fewbit: Fewbit) -> None:
    source = models.save(tmp_path / "source", "llama", dtype="float32", intermediate_size=128)
    rules = [{"match": "*.0.mlp.down_proj", "scheme": None}, {"match": "*", "scheme": "nf4-b64"}]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"name": "mine", "format": "bnb", "rules": rules}), encoding="utf-8")
    assert fewbit("quantize", source, "-o", tmp_path / "out", "--plan", plan).code == 0
    config = models.quantization_of(tmp_path / "out")
    assert config["llm_int8_skip_modules"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    again = loaded(tmp_path / "out")
    assert type(again.model.layers[0].mlp.down_proj) is torch.nn.Linear
    same_logits(again, load(tmp_path / "out", dtype=torch.float32), "nf4-b64")


@specs
def test_what_is_resident_is_what_the_parts_say(spec: str, tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama", dtype="float32", intermediate_size=128)
    with quantizer.serving():
        model = loaded(source, quantization_config=BitsAndBytesConfig(**CONFIGS[spec]))
    for module in model.modules():
        if isinstance(module, QLinear):
            held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.prepared}
            assert sum(held.values()) == module.codec.nbytes(module.shape)


def test_more_than_they_skip_by_default_may_be_skipped(tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama", dtype="float32", intermediate_size=128)
    skipped = ["lm_head", "gate_proj", "up_proj", "down_proj"]
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped, llm_int8_threshold=4.5)
    with quantizer.serving():
        ours = loaded(source, quantization_config=config)
    quantized = {name: module for name, module in ours.named_modules() if isinstance(module, QLinear)}
    assert {name.rpartition(".")[2] for name in quantized} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {str(module.codec) for module in quantized.values()} == {"llm.int8-t4.5"}
    ours.save_pretrained(tmp_path / "ours")
    assert inspect(tmp_path / "ours").schemes == {"llm.int8-t4.5": 8}


# --- where bitsandbytes is not installed ------------------------------------------------------------------------------

WITHOUT = """
import importlib.metadata, importlib.util, sys, warnings
warnings.simplefilter("ignore")
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
for name in ("version", "metadata", "distribution"):
    def hidden(package, found=getattr(importlib.metadata, name)):
        if package == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(package)
        return found(package)
    setattr(importlib.metadata, name, hidden)
spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "bitsandbytes" else spec(name, package)
"""


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and, in `made-nf4` and `made-int8`, what both cells of the guide make of it."""
    folder = tmp_path_factory.mktemp("cells")
    models.save(folder / "source", "llama", dtype="bfloat16", intermediate_size=128)
    run(
        WITHOUT
        + """
import torch
import fewbit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import auto
from transformers.utils import is_bitsandbytes_available
assert not is_bitsandbytes_available()
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
                         bnb_4bit_use_double_quant=True)
ids = torch.arange(20)[None] + 3
for name, config in (("nf4", nf4), ("int8", BitsAndBytesConfig(load_in_8bit=True))):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, device_map="auto")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "QLinear"
    assert type(model.lm_head).__name__ == "Linear"
    model.generate(ids.to(model.device), max_new_tokens=3)
    before = model(ids.to(model.device)).logits
    model.save_pretrained(sys.argv[2] + name)
    again = AutoModelForCausalLM.from_pretrained(sys.argv[2] + name, device_map="auto")
    assert type(again.model.layers[0].mlp.up_proj).__name__ == "QLinear"
    assert torch.equal(again(ids.to(again.device)).logits, before)
assert "bitsandbytes" not in sys.modules
""",
        folder / "source",
        folder / "made-",
    )
    return folder


@plans
def test_both_cells_of_the_guide_run_without_bitsandbytes(plan: str, spec: str, cells: Path) -> None:
    assert inspect(cells / f"made-{plan}").schemes == {spec: 14}
    models.logits(loaded(cells / f"made-{plan}"), ids())


@against_theirs
@plans
def test_both_cells_make_the_files_that_it_makes(plan: str, spec: str, cells: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(**CONFIGS[spec], bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(cells / "source", quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    same_files(cells / f"made-{plan}", tmp_path / "theirs")


@against_theirs
@pytest.mark.parametrize("name", ["bitsandbytes", "bnb"])
def test_who_serves_where_both_are_installed_is_the_users_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "preferred", set())
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", dict(auto.AUTO_QUANTIZER_MAPPING))

    def served() -> bool:
        return {auto.AUTO_QUANTIZER_MAPPING[f"bitsandbytes_{bits}bit"] for bits in (4, 8)} == {
            quantizer.FewbitQuantizer
        }

    assert not served()
    prefer("gptq")
    assert not served()
    prefer(name)
    assert served()


def test_the_choice_may_be_made_before_transformers_is_imported() -> None:
    run(
        "import fewbit, sys\nfewbit.prefer()\nassert 'transformers' not in sys.modules\n"
        "import transformers.modeling_utils\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as found\n"
        "assert {found['bitsandbytes_4bit'].__name__, found['bitsandbytes_8bit'].__name__} == {'FewbitQuantizer'}"
    )


def test_a_method_that_does_not_exist_cannot_be_preferred() -> None:
    with pytest.raises(PlanError, match="bitsandbites") as raised:
        prefer("bitsandbites")
    assert "Did you mean bitsandbytes" in raised.value.hint
    with pytest.raises(PlanError, match="unknown quantization method 'bnp'") as raised:
        prefer("bnp")
    assert raised.value.hint == "Did you mean bnb?"


# --- bad input --------------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    source = models.save(folder / "source", "llama", intermediate_size=128)
    quantize(source, folder / "out", plan="nf4")
    return folder / "out"


def spoiled(good: Path, tmp_path: Path, changes: Mapping[str, Tensor | None], **config: Any) -> Path:
    """A copy with tensors replaced (None: gone) and keys of the quantization_config too."""
    from safetensors.torch import save_file

    for file in good.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = models.tensors_of(good) | dict(changes)
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "model.safetensors", {"format": "pt"})
    stored = json.loads((good / "config.json").read_text(encoding="utf-8"))
    models.edit_json(tmp_path / "config.json", quantization_config={**stored["quantization_config"], **config})
    return tmp_path


def saying(**changes: Any) -> Tensor:
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [64, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.5,
    }
    return torch.tensor(list(json.dumps(state | changes).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({STATE: saying(quant_type="af4")}, STATE),
        ({STATE: saying(quant_type="fp4")}, STATE),
        ({STATE: saying(blocksize=63)}, STATE),
        ({STATE: saying(blocksize=True)}, STATE),
        ({STATE: saying(blocksize=4096)}, f"{Q}.weight.absmax"),
        ({STATE: saying(shape=[64, 65])}, f"{Q}.weight"),
        ({STATE: saying(shape=[2**40, 2**40])}, f"{Q}.weight"),
        ({STATE: saying(shape=[-64, -64])}, STATE),
        ({STATE: saying(shape=[4096])}, STATE),
        ({STATE: saying(shape=[64.0, 64])}, STATE),
        ({STATE: saying(shape=None)}, STATE),
        ({STATE: saying(dtype="float128")}, STATE),
        ({STATE: saying(nested_blocksize=128)}, STATE),
        ({STATE: saying(nested_offset=None)}, STATE),
        ({STATE: saying(nested_offset=float("nan"))}, STATE),
        ({STATE: torch.tensor([255, 254], dtype=torch.uint8)}, STATE),
        ({STATE: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, STATE),
        ({STATE: torch.tensor(list(b"[" * 4000), dtype=torch.uint8)}, STATE),
        ({STATE: torch.zeros(5000, dtype=torch.uint8)}, STATE),
        ({STATE: None}, STATE),
        ({STATE: None, STATE.replace("nf4", "af4"): saying()}, STATE.replace("nf4", "af4")),
        ({STATE.replace("nf4", "fp4"): saying()}, Q),
        ({f"{Q}.weight.nested_absmax": torch.ones(9)}, f"{Q}.weight.nested_absmax"),
        ({f"{Q}.weight.nested_absmax": torch.full((1,), torch.inf)}, f"{Q}.weight.nested_absmax"),
        ({f"{Q}.weight.nested_absmax": None}, f"{Q}.weight.nested_absmax"),
        ({f"{Q}.weight.nested_quant_map": torch.ones(255)}, f"{Q}.weight.nested_quant_map"),
        ({f"{Q}.weight.nested_quant_map": torch.full((256,), torch.nan)}, f"{Q}.weight.nested_quant_map"),
        ({f"{Q}.weight.quant_map": torch.linspace(-1, 1, 16)}, f"{Q}.weight.quant_map"),
        ({f"{Q}.weight.quant_map": None}, f"{Q}.weight.quant_map"),
        ({f"{Q}.weight.absmax": torch.ones(64)}, f"{Q}.weight.absmax"),
        ({f"{Q}.weight.absmax": torch.ones(63, dtype=torch.uint8)}, f"{Q}.weight.absmax"),
        ({f"{Q}.weight": torch.zeros(2047, 1, dtype=torch.uint8)}, f"{Q}.weight"),
        ({f"{Q}.weight": torch.zeros(64, 64, dtype=torch.int8)}, f"{Q}.weight"),
        ({f"{Q}.weight": None}, f"{Q}.weight"),
        ({f"{Q}.SCB": torch.ones(64)}, f"{Q}.SCB"),
    ],
)
def test_a_file_that_lies_is_refused_by_the_tensors_name(
    changes: dict[str, Tensor | None], told: str, good: Path, tmp_path: Path
) -> None:
    folder = spoiled(good, tmp_path, changes)
    with pytest.raises(FormatError) as raised:
        load(folder)
    assert told in str(raised.value)


@pytest.mark.parametrize(
    "threshold", [-1.0, float("inf"), 10**400, "six", None, True], ids=lambda value: f"{value!s:.9}"
)
def test_a_threshold_that_cannot_be_is_refused(threshold: object, good: Path, tmp_path: Path) -> None:
    folder = spoiled(good, tmp_path, {}, llm_int8_threshold=threshold)
    with pytest.raises(FormatError, match="llm_int8_threshold"):
        inspect(folder)


def test_a_shape_that_the_model_does_not_have_is_refused(good: Path, tmp_path: Path) -> None:
    folder = spoiled(good, tmp_path, {STATE: saying(shape=[32, 128])})
    with pytest.raises(FormatError, match=Q):
        load(folder)
