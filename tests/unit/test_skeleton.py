"""A block has the checkpoint's weights each time that it is loaded, and a checkpoint that does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.errors import FormatError
from fewbit.models.skeleton import Skeleton
from fewbit.models.source import locate
from fewbit.schemes.base import PartSpec
from tests import architectures, models


def test_overwritten_weights_come_back(tmp_path: Path) -> None:
    """Tensors of a file with the model's own dtype are mapped, and what is written into a mapping stays there."""
    folder = models.save(tmp_path / "m", "llama", dtype="float32", tie_word_embeddings=False)
    skeleton = Skeleton(locate(folder), torch.float32, torch.device("cpu"))
    for block in skeleton.blocks:
        with skeleton.materialized(block) as module:
            before = {name: parameter.clone() for name, parameter in module.named_parameters()}
            for parameter in module.parameters():
                parameter.data.zero_()
        with skeleton.materialized(block) as module:
            for name, parameter in module.named_parameters():
                assert torch.equal(parameter, before[name]), name


CONV = "model.layers.0.self_attn.{}_conv1d.weight"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"k": None}, rf"the tensor {CONV.format('k')} is missing"),
        ({"k": None, "q": None}, rf"2 tensors are missing, the first is {CONV.format('q')}"),
        ({"v": (slice(5),)}, rf"{CONV.format('v')} of shape \[5, 1, 4\] make one of shape .* requires \[192, 1, 4\]"),
        ({"v": (..., slice(3))}, rf"{CONV.format('v')} of shape \[64, 1, 3\] cannot be joined; config.json requires"),
    ],
)
def test_one_of_several_merged_tensors(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    """transformers makes one parameter of three; what is wrong with one of them is an error before any work."""
    folder = architectures.save(tmp_path, "kimi_linear")
    tensors = load_file(file := folder / "model.safetensors")
    for which, part in changed.items():
        own = tensors.pop(CONV.format(which))
        tensors |= {CONV.format(which): own[part].contiguous()} if part else {}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=words):
        fewbit.preview(folder, plan="nf4")


def test_what_transformers_does_not_load_is_named(tmp_path: Path) -> None:
    folder, name = models.save(tmp_path / "m", "llama"), "model.layers.0.mlp.up_proj.weight"
    skeleton = Skeleton(locate(folder), torch.float32, torch.device("cpu"))
    wrong = torch.zeros(3, 5, dtype=torch.float32, device="cpu")
    skeleton.checkpoint.add(name, PartSpec((3, 5), torch.float32), wrong)
    with (
        pytest.raises(FormatError, match=rf"{name} has shape \[3, 5\], the model expects \[96, 64\]"),
        skeleton.materialized("model.layers.0"),
    ):
        pass
