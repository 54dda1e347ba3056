"""llama.cpp's own converter, `convert_hf_to_gguf.py`, out of llama-cpp-python's source distribution.

`make interop` downloads that to build/peers. The converter runs in a process of its own, without its tokenizer part,
which knows tokenizers by hashes of published ones.

`python -m tests.interop.converter [TYPE ...]` writes the golden values of all or some architectures, and
`python -m tests.interop.converter towers [KIND ...]` those of vision towers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fewbit.formats.containers.gguf import GgufFile
from tests import gguf_files, mmproj_files, models
from tests.interop.llama_cpp import VERSION

ROOT = Path(__file__).resolve().parents[2]
SDIST = ROOT / "build" / "peers" / f"llama_cpp_python-{VERSION}.tar.gz"
_INSIDE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
# Entries of published config.json files that the converter reads and transformers no longer writes. None: those that
# transformers writes and they do not have.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cohere2": {"rotary_pct": 1.0},
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "deepseek_v32": {"scoring_func": "sigmoid"},
    "glm_moe_dsa": {"scoring_func": "sigmoid"},
    "sarvam_mla": {"scoring_func": "sigmoid"},
    "gemma4_unified_text": {"architectures": ["Gemma4UnifiedForConditionalGeneration"]},
    "kimi_linear": {
        "first_k_dense_replace": 1,
        "linear_attn_config": {
            "full_attn_layers": [2, 4],
            "kda_layers": [1, 3],
            "head_dim": 32,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "moe_router_activation_func": "sigmoid",
        "head_dim": 32,  # becomes the width of values, which llama.cpp does not use; fewbit writes that of latents
    },
    "sarvam_moe": {
        "architectures": ["SarvamMoEForCausalLM"],
        "num_experts": 4,
        "num_shared_experts": 1,
        "score_function": "sigmoid",
    },
    "mimo_v2_flash": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hybrid_layer_pattern": [0, 1, 1, 1, 0],
        "swa_head_dim": 16,
        "swa_v_head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "rope_parameters": None,
        "rope_theta": 5e6,
        "swa_rope_theta": 20000.0,
        "partial_rotary_factor": 0.5,
    },
    # As a published model without windows
    "laguna-element": {
        "sliding_window": None,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}
        },
    },
    "granite_swa": {"no_rope_layers": [1, 0, 1, 0]},
    "dots1": {"scoring_func": "sigmoid"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "granitemoehybrid-dense": {"layer_types": ["attention", "mamba", "mamba"]},
    "granitemoehybrid-attention": {"layer_types": ["attention"] * 2},
    "hunyuan_v1_moe": {"moe_intermediate_size": [96] * 2, "num_shared_expert": [1] * 2},
    "falcon_h1": {"head_dim": 16},
    "falcon_h1-plain": {"head_dim": 16},
    "minimax_m2": {"scoring_func": "sigmoid", "rotary_dim": 8},
    "exaone_moe": {"scoring_func": "sigmoid"},
    "afmoe": {"route_norm": True, "score_func": "sigmoid"},
    "glm4-sections": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        }
    },
    "glm": {"layernorm_epsilon": 1.5625e-7, "seq_length": models.CONTEXT},
    "solar_open": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}},
    "glm4_moe_lite": {"scoring_func": "sigmoid", "first_k_dense_replace": 1},
    "falcon-first": {"num_kv_heads": 1},
    "nemotron_h": {
        "hybrid_override_pattern": "M-*-",
        "num_hidden_layers": 4,
        **dict.fromkeys(("layers_block_type", "num_experts_per_tok", "n_routed_experts", "n_group", "topk_group")),
    },
    "bloom": {"seq_length": 1 << 20},
    "mpt": {"architectures": ["MPTForCausalLM"]},
    "gpt2": {"n_ctx": models.CONTEXT},
    "gpt_neox": {"rotary_pct": 0.25},
}
# Names of tensors in published models that differ from those that transformers saves: a pattern, and what it becomes
RENAMED = {"kimi_linear": (r"block_sparse_moe\.((gate|up|down)_proj)", r"mlp.\1")}
_RUN = """
import importlib, json, sys
from pathlib import Path
source, folder, out = map(Path, sys.argv[1:4])
sys.path[:0] = [str(source), str(source / "gguf-py")]
import gguf, torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
own = torch.exp  # in float32 it differs in the last bit among processors
torch.exp = lambda x: own(x.double()).to(x.dtype)
module, _, cls = sys.argv[5].partition(":")  # of a tower
if cls:
    kind = getattr(importlib.import_module("conversion." + module), cls)
else:
    found = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
    kind = get_model_class(found, mmproj=False)
def below(each):
    return [each, *(one for cls in each.__subclasses__() for one in below(cls))]
for each in below(ModelBase):
    each.set_vocab = lambda self: None
kind.no_mtp = True  # transformers does not save such blocks
read, entries = ModelBase.load_hparams, json.loads(sys.argv[4])
def changed(*each, **more):
    found = {**read(*each, **more), **entries}
    return {key: value for key, value in found.items() if value is not None or key not in entries}
ModelBase.load_hparams = staticmethod(changed)
kind(folder, gguf.LlamaFileType.ALL_F32, out, model_name="m").write()
"""


# llama.cpp's script for CLIP. It expects what CLIPVisionModel was in older versions of transformers.
_CLIP = """
import sys
from pathlib import Path
import torch, transformers
source, script = Path(sys.argv.pop(1)), Path(sys.argv[1])
sys.path.insert(0, str(source / "gguf-py"))
sys.argv.pop(0)
class Outer(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, folder):
        made = cls()
        made.vision_model = transformers.CLIPVisionModel.from_pretrained(folder)
        return made
text = script.read_text(encoding="utf-8").replace("CLIPVisionModel.from_pretrained", "Outer.from_pretrained")
exec(compile(text, str(script), "exec"))
"""


def unpacked(place: Path) -> Path:
    """The converter's folder, in `place`."""
    with tarfile.open(SDIST) as sdist:
        parts = ("conversion/", "gguf-py/", "convert_lora_to_gguf.py", "tools/mtmd/legacy-models/")
        wanted = [each for each in sdist if each.name.startswith(tuple(_INSIDE + part for part in parts))]
        sdist.extractall(place, wanted, filter="data")
    return place / _INSIDE


def projectors(place: Path) -> str:
    """The header of llama.cpp that lists its projectors."""
    name = f"{_INSIDE}tools/mtmd/clip-impl.h"
    with tarfile.open(SDIST) as sdist:
        sdist.extract(name, place, filter="data")
    return (place / name).read_text(encoding="utf-8")


def vocabularies(place: Path) -> list[Path]:
    """llama.cpp's files of vocabularies that have texts and ids beside them (.inp, .out), unpacked in `place`."""
    with tarfile.open(SDIST) as sdist:
        wanted = [each for each in sdist if each.name.startswith(f"{_INSIDE}models/ggml-vocab-")]
        sdist.extractall(place, wanted, filter="data")
    return sorted(path.with_suffix("") for path in (place / _INSIDE / "models").glob("*.inp"))


def convert(source: Path, folder: Path, out: Path, entries: Mapping[str, Any], tower: str = "") -> None:
    """Convert the model in `folder` to a file of float32 at `out`.

    source: what `unpacked` gave. entries: further entries of config.json, which are written there too, as the converter
    of some types reads it itself. tower: module and class of the converter for the vision tower; "": the text model.
    """
    place = folder / "config.json"
    found = json.loads(place.read_text(encoding="utf-8")) | dict(entries)
    if found["model_type"] in RENAMED:
        pattern, name = RENAMED[found["model_type"]]
        path = folder / "model.safetensors"
        tensors = {re.sub(pattern, name, key): tensor for key, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    kept = {key: value for key, value in found.items() if value is not None or key not in entries}
    place.write_text(json.dumps(kept), encoding="utf-8")
    _run(_RUN, source, folder, out, json.dumps(dict(entries)), tower)


def _run(program: str, *arguments: Path | str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise RuntimeError(f"the converter failed: {done.stderr[-3000:]}")


def convert_tower(source: Path, folder: Path, out: Path, kind: str) -> None:
    """Convert the vision tower of the model in `folder`, as published, to a file of float32 at `out`."""
    if mmproj_files.KINDS[kind].cls:
        convert(source, folder, out, {}, mmproj_files.KINDS[kind].cls)
        return
    state, place = load_file(folder / "model.safetensors"), out.with_suffix(".clip")
    place.mkdir()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vision_config"]
    (place / "config.json").write_text(json.dumps(config | {"_name_or_path": "m"}), encoding="utf-8")
    tower = {name.removeprefix("vision_tower."): tensor for name, tensor in state.items() if "vision_tower." in name}
    save_file(tower, place / "model.safetensors", metadata={"format": "pt"})
    own = {name: tensor for name, tensor in state.items() if "multi_modal_projector." in name}
    torch.save(own, place / "llava.projector")
    script = source / "tools" / "mtmd" / "legacy-models" / "convert_image_encoder_to_gguf.py"
    projector = place / "llava.projector"
    _run(_CLIP, source, script, "-m", place, "--llava-projector", projector, "--clip-model-is-vision", "--use-f32")
    (place / "mmproj-model-f32.gguf").rename(out)


def tower_values(kinds: Sequence[str]) -> None:
    """Write the golden values of the towers of these kinds, or of all."""
    values = mmproj_files.golden() if mmproj_files.GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as each:
        place = Path(each)
        source = unpacked(place)
        for kind in kinds or mmproj_files.KINDS:
            folder = gguf_files.numbered(mmproj_files.save(place / kind, kind))
            out = place / f"{kind}.gguf"
            convert_tower(source, mmproj_files.published(folder, place / f"{kind}-published", kind), out, kind)
            file = GgufFile(out)
            values[kind] = {"digest": gguf_files.digest(file), "keys": gguf_files.keys_of(file)}
    mmproj_files.GOLDEN.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main(kinds: Sequence[str]) -> None:
    """Write the golden values of these families and types, or of all."""
    values = gguf_files.golden() if gguf_files.GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        source = unpacked(Path(place))
        for kind in kinds or gguf_files.KINDS:
            folder, out = Path(place) / kind, Path(place) / f"{kind}.gguf"
            convert(source, gguf_files.numbered(gguf_files.save(folder, kind)), out, PUBLISHED.get(kind, {}))
            file = GgufFile(out)
            values[kind] = {"digest": gguf_files.digest(file), "keys": gguf_files.keys_of(file)}
    gguf_files.GOLDEN.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["towers"]:
        tower_values(sys.argv[2:])
    else:
        main(sys.argv[1:])
