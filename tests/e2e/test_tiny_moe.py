"""A trained mixture of experts: GPTQ loses a third of what rounding loses, with every expert quantized.

`make tiny-moe` trains the model. Without it these tests are skipped.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import fewbit
from fewbit.plans.plan import find

MODEL = Path(__file__).parents[2] / "build" / "tiny-moe"
LAYERS, EXPERTS, CHOSEN = 8, 16, 2
SAMPLES, LENGTH = 32, 512  # of the calibration text

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL.exists(), reason="`make tiny-moe` trains the model")]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model at 3 bits in groups of 128, by GPTQ and by round to nearest."""
    folder, calibration = tmp_path_factory.mktemp("tiny-moe"), fewbit.Calibration(samples=SAMPLES, length=LENGTH)
    for method in ("gptq", "rtn"):
        plan = find("rtn-4bit").changed(method=method, scheme="int3-g128-sym")
        fewbit.quantize(MODEL, folder / method, plan=plan, calibration=calibration)
    return {method: folder / method for method in ("gptq", "rtn")}


def kl(folder: Path) -> float:
    done = fewbit.evaluate(folder, reference=MODEL, length=LENGTH, samples=8)
    assert done.quality.kl is not None
    return done.quality.kl.mean.value


def test_gptq_loses_a_third_of_what_rounding_loses(outputs: dict[str, Path]) -> None:
    assert kl(outputs["gptq"]) <= 0.35 * kl(outputs["rtn"])


def test_the_record_has_the_rows_of_every_expert(outputs: dict[str, Path]) -> None:
    record = json.loads((outputs["gptq"] / "fewbit.json").read_text(encoding="utf-8"))
    rows = {each["module"]: each["rows"] for each in record["tensors"] if ".experts." in each["module"]}
    assert len(rows) == LAYERS * EXPERTS * 3
    assert min(rows.values()) > 0
    of_layers = Counter[str]()
    for name, count in rows.items():
        layer, leaf = name.partition(".experts.")[0], name.rpartition(".")[2]
        of_layers[f"{layer} {leaf}"] += count
    assert set(of_layers.values()) == {SAMPLES * LENGTH * CHOSEN}
    assert {each["rows"] for each in record["tensors"] if ".experts." not in each["module"]} == {None}
