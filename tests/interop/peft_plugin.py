"""A pytest plugin under which PEFT's own test_quantization.py runs over fewbit's layers and local models.

`FEWBIT_PEFT_MODELS` names a folder with the subfolders `plain` and `gptq`. PEFT's file asks which quantization packages
are installed to choose its cases. Here fewbit stands in for bitsandbytes and gptqmodel.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import import_utils
from transformers import AutoModelForCausalLM

import fewbit

# Models of the Hub that the file loads, and the folders that stand for them.
MODELS = {"peft-internal-testing/opt-125m": "plain", "marcsun13/opt-350m-gptq-4bit": "gptq"}
SERVED = {
    "is_bnb_available": True,
    "is_bnb_4bit_available": True,
    "is_gptqmodel_available": True,
    "is_torchao_available": False,
    "is_torchao_ge_v0_18_0": False,
}


def pytest_configure() -> None:
    assert peft.__version__  # PEFT itself has asked what is installed before the file does
    fewbit.prefer()
    load: Any = AutoModelForCausalLM.from_pretrained

    def from_folder(name: str, *args: Any, **kwargs: Any) -> Any:
        return load(Path(os.environ["FEWBIT_PEFT_MODELS"]) / MODELS[name], *args, **kwargs)

    patched: Any = AutoModelForCausalLM
    patched.from_pretrained = from_folder


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Any:
    found = {name: getattr(import_utils, name) for name in SERVED}
    for name, served in SERVED.items():
        setattr(import_utils, name, lambda served=served: served)
    try:
        return (yield)
    finally:
        for name, function in found.items():
            setattr(import_utils, name, function)
