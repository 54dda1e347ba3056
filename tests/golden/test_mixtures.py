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


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("mixture", mixtures.MIXTURES)
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "weighed"])
def test_types_are_those_of_llama_cpp(example: str, mixture: str, weighed: bool) -> None:
    case = EXAMPLES[example]
    found = mixtures.schemes(mixture, case.tensors(), case.model(), weighed=weighed)
    given = TABLE["types"][example][mixture]  # "weighed" stands there only where an importance matrix changes a type
    expected = given["weighed"] if weighed and "weighed" in given else given["plain"]
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
    assert mixtures.file_type("iq2_s") == 29  # IQ2_M: IQ2_S is a mixture of iq2_xs
    assert mixtures.file_type("int4-g128") == 1
