"""trl's SFTTrainer trains over packed weights as over the same weights unpacked, with every loss it has.

Its losses `nll` and `chunked_nll` read the weight of the output head, which a GGUF file packs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed

import fewbit
from tests import models

trl = pytest.importorskip("trl", reason="make interop installs trl")
datasets = pytest.importorskip("datasets", reason="make interop installs datasets")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]  # trl's own, and of what it imports


def trained(model: Any, loss: str, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of three steps, and the adapter after them."""
    set_seed(0)
    settings = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        max_length=32,
        loss_type=loss,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"text": models.sentences(3, seed)} for seed in range(8)]),
        processing_class=models.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    mean = trainer.train().training_loss
    return mean, {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("loss", ["nll", "chunked_nll", "dft"])
@pytest.mark.parametrize("plan", ["q4_0", "nf4", "rtn-4bit"])
def test_sft_trains_over_packed_weights(plan: str, loss: str, tmp_path: Path) -> None:
    plain = models.save(tmp_path / "plain", "llama", dtype="float32")
    out = tmp_path / "packed"
    file = {"gguf_file": "model.gguf"} if plan == "q4_0" else {}
    fewbit.quantize(plain, out / "model.gguf" if file else out, plan=plan)

    def load() -> Any:
        if file:
            return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **file)
        return fewbit.load(out, dtype=torch.float32)

    packed, adapter = trained(load(), loss, tmp_path / "a")
    unpacked, expected = trained(load().dequantize(), loss, tmp_path / "b")
    assert packed == pytest.approx(unpacked, rel=1e-4)
    assert adapter.keys() == expected.keys()
    assert any(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name)
