"""A block has the checkpoint's weights each time that it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from fewbit.models.skeleton import Skeleton
from fewbit.models.source import locate
from tests import models


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
