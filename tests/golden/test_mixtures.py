"""The types that llama.cpp gave to tensors, as tests/interop/test_mixtures.py recorded them in mixtures.json.

Made with llama-cpp-python 0.3.36; that test makes the same table again and compares, where the peer is installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewbit.plans import mixtures
from tests.golden.mixture_models import EXAMPLES, summed_up

TABLE = json.loads((Path(__file__).parent / "mixtures.json").read_text(encoding="utf-8"))
# "weighed" stands there only where an importance matrix changes a type, or is required.
CASES = [
    pytest.param(
        example, mixture, how == "weighed", given.get(how, given.get("plain")), id=f"{how}-{mixture}-{example}"
    )
    for example, types in TABLE["types"].items()
    for mixture, given in types.items()
    for how in ("plain", "weighed")
    if how in given or (how == "weighed" and given)  # llama.cpp refuses q1_0 for some rows
]


def test_the_table_has_every_example_and_mixture() -> None:
    assert list(TABLE["types"]) == list(EXAMPLES)
    assert all(list(types) == list(mixtures.MIXTURES) for types in TABLE["types"].values())


@pytest.mark.parametrize(("example", "mixture", "weighed", "expected"), CASES)
def test_types_are_those_of_llama_cpp(example: str, mixture: str, weighed: bool, expected: dict[str, str]) -> None:
    case = EXAMPLES[example]
    found = mixtures.schemes(mixture, case.tensors(), case.model(), weighed=weighed)
    assert summed_up({name: scheme or "f16" for name, scheme in found.items()}) == expected


def test_the_order_of_tensors_does_not_matter() -> None:
    case = EXAMPLES["smollm2-135m"]
    backwards = dict(reversed(case.tensors().items()))
    assert mixtures.schemes("q4_k_m", backwards, case.model()) == mixtures.schemes(
        "q4_k_m", case.tensors(), case.model()
    )


def test_file_types_are_those_of_llama_cpp() -> None:
    assert {name: mixture.file_type for name, mixture in mixtures.MIXTURES.items()} == TABLE["file_types"]
    assert mixtures.file_type("q4_k") == 14
    assert mixtures.file_type("q6_k") == 18
    assert mixtures.file_type("q5_1") == 9
    assert mixtures.file_type("iq2_xs") == 20
    assert mixtures.file_type("iq2_s") == 29  # IQ2_M: IQ2_S is a mixture of iq2_xs
    assert mixtures.file_type("iq3_s") == 26
    assert mixtures.file_type("int4-g128") == 1
