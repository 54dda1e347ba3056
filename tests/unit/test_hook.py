"""`import fewbit` costs nothing, and registers with transformers whichever of the two is imported first."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

CHECK = """
import transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from fewbit.models.plugin.quantizer import FewbitQuantizer
assert AUTO_QUANTIZER_MAPPING["gptq"] is FewbitQuantizer
"""
PEFT = """
from peft import LoraConfig, get_peft_model
from fewbit.models.adapters.lora import QLoraLinear
from fewbit.nn.layers import QLinear
assert LoraConfig()._custom_modules == {QLinear: QLoraLinear}
from peft.utils import transformers_weight_conversion  # PEFT imports it when it first adapts a model
assert hasattr(transformers_weight_conversion.convert_peft_config_for_transformers, "__wrapped__")
from transformers.models.gemma4 import modeling_gemma4  # the last module that is watched
assert not [f for f in sys.meta_path if type(f).__module__ == "fewbit.hook"]
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import sys\n{code}"], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done


def cpu_seconds(code: str) -> float:
    """Processor time of a process that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_verb_stays_a_verb_when_everything_has_been_imported() -> None:
    run(
        "import pkgutil, importlib, fewbit, fewbit.api.inspect, fewbit.api.adapters\n"
        "assert 'peft' not in sys.modules\n"
        "for module in pkgutil.walk_packages(fewbit.__path__, 'fewbit.'):\n"
        "    try:\n"
        "        module.name.endswith('__main__') or importlib.import_module(module.name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert error.name == 'triton', error\n"
        "wrong = [name for name in fewbit.__all__ if not callable(getattr(fewbit, name))]\n"
        "assert not wrong, wrong"
    )


def test_calibration_is_where_it_was() -> None:
    run("import fewbit, fewbit.api\nassert fewbit.api.Calibration is fewbit.Calibration")


def test_types_that_verbs_take_and_give_are_public() -> None:
    run(
        "import fewbit, inspect, re, typing\n"
        "private = []\n"
        "for name in fewbit.__all__:\n"
        "    verb = getattr(fewbit, name)\n"
        "    if isinstance(verb, type) or name == 'prefer': continue\n"
        "    verb = inspect.unwrap(verb)\n"
        "    for hint in verb.__annotations__.values():\n"
        "        for word in re.findall(r'[A-Za-z_]\\\\w*', str(hint)):\n"
        "            kind = verb.__globals__.get(word)\n"
        "            ours = isinstance(kind, type) and kind.__module__.startswith('fewbit')\n"
        "            if ours and word not in fewbit.__all__: private.append((name, word))\n"
        "assert not private, private\n"
        "assert set(fewbit.__all__) <= set(dir(fewbit))"
    )


def test_importing_fewbit_imports_nothing_heavy() -> None:
    run(
        "import fewbit, fewbit.cli.app\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert {'quantize', 'load', 'evaluate', 'generate', 'inspect', 'finetune', 'merge'} <= set(dir(fewbit))\n"
        "assert 'torch' not in sys.modules"
    )


@pytest.mark.parametrize(
    ("code", "share"),
    [("import fewbit", 0.1), ("import fewbit.cli.app; sys.argv[1:] = ['--help']; fewbit.cli.app.main()", 0.25)],
    ids=["import", "help"],
)
def test_starting_is_quick(code: str, share: float) -> None:
    """CPU time, as a share of what importing torch takes in the same run: no machine is too slow or too busy."""
    assert min(cpu_seconds(code) for _ in range(3)) < share * cpu_seconds("import torch")


def test_help_draws_nothing() -> None:
    """rich takes longer to import than all else that help needs; so each command's sentence is there whole, not cut."""
    done = run(
        "import atexit, fewbit.cli.app\nsys.argv[1:] = ['--help']\n"
        "atexit.register(lambda: print('heavy', sorted({'rich', 'torch', 'transformers'} & set(sys.modules))))\n"
        "fewbit.cli.app.main()"
    )
    assert "heavy []" in done.stdout
    assert "quantize" in done.stdout
    assert "..." not in done.stdout.partition("Commands:")[2]


@pytest.mark.parametrize(
    "first",
    [
        "import fewbit; from transformers import AutoModelForCausalLM",
        "from transformers import PreTrainedModel; import fewbit",
        "import fewbit.models.plugin.quantizer",
        "import fewbit.models.experts",
    ],
)
def test_either_may_come_first(first: str) -> None:
    run(f"{first}\n{CHECK}")


@pytest.mark.parametrize("first", ["import peft; import fewbit", "import fewbit; import peft"])
def test_so_may_peft(first: str) -> None:
    run(f"{first}\n{CHECK}\n{PEFT}")


@pytest.mark.parametrize("first", ["conversions", "plugin.modules", "plugin.patch_fp8"])
def test_any_module_can_be_the_first(first: str) -> None:
    """It imports transformers, and what registers itself then may need this module."""
    run(f"import fewbit.models.{first} as m\n{CHECK}assert 'import' in m.__loader__.get_source(m.__name__)")


def test_a_verb_that_does_not_exist() -> None:
    import fewbit

    with pytest.raises(AttributeError, match="quantise"):
        _ = fewbit.quantise


def test_installing_twice_changes_nothing() -> None:
    run(
        "import fewbit\nfrom fewbit import hook\nhook.install()\n"
        "assert sum(type(f).__module__ == 'fewbit.hook' for f in sys.meta_path) == 1"
    )
