"""Which plan for what: common rules come out where they hold, numbers overrule them, demands are met or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import fewbit
from fewbit import PlanError, checks, registry
from fewbit.advise import fitting
from fewbit.advise import recommend as recommending
from fewbit.advise.recommend import Recommendation
from fewbit.advise.rules import rules
from fewbit.api import advise
from fewbit.measure.comparison import Comparison, Loss, Row, Speed, Timing
from fewbit.measure.intervals import Interval
from fewbit.plans import plan
from fewbit.report import advice
from fewbit.texts.calibration import Calibration
from tests import models

REPORT = Path(__file__).parent.parent / "data" / "report.json"


def asked(purpose: str, **options: object) -> Recommendation:
    return fewbit.recommend("tiny", purpose, **{"memory": "8GB", **options})  # type: ignore[arg-type]


def measured(**kl: float) -> Comparison:
    """A report of tiny in which these plans lost so much, at 50 tokens/s, and the original none, at 100."""
    rows = []
    for name, loss in [("bf16", 0.0), *((name.replace("__", "-"), value) for name, value in kl.items())]:
        rate = timing(100.0 if name == "bf16" else 50.0)
        one = Interval(loss, loss * 0.99, loss * 1.01)
        rows.append(Row(name, "done", loss=Loss(one, one, one), speed=Speed(1.0, rate, rate)))
    return replace(Comparison.read(REPORT), rows=tuple(rows))


@pytest.mark.parametrize(
    ("purpose", "plans"),
    [
        ("experiment", {"nf4", "int8"}),
        ("serving", {"gptq-4bit", "awq-4bit"}),
        ("edge", {"q4_k_m"}),
        ("finetuning", {"nf4"}),
    ],
)
def test_the_common_rules_come_out(purpose: str, plans: set[str]) -> None:
    found = asked(purpose)
    assert found.best.plan in plans
    assert found.source.startswith("https://")
    assert not found.contradictions
    assert any(command.startswith(f"fewbit quantize tiny -o tiny-{found.best.plan}") for command in found.commands)


@pytest.mark.parametrize(
    ("capability", "plan", "words"),
    [
        ((12, 0), "nvfp4", "Blackwell"),
        ((10, 0), "nvfp4", "Blackwell"),
        ((9, 0), "fp8", "Hopper"),
        ((8, 9), "fp8", "Ada"),
        ((8, 0), "w4a16", "4-bit integers"),
        (None, "gptq-4bit", None),
    ],
)
def test_vllm_gets_what_the_card_multiplies_fastest(
    capability: tuple[int, int] | None, plan: str, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbit.system.machine.gpu_capability", lambda: capability)
    report = measured(nvfp4=0.05, fp8=0.01, w4a16=0.02, gptq__4bit=0.019 if capability is None else 0.03)
    found = asked("serving", target="vllm", report=report)
    assert found.best.plan == plan
    assert any(words in note for note in found.notes) if words else not any("card" in note for note in found.notes)
    assert "vllm serve" in found.commands[-1]
    assert asked("serving", report=report).best.plan in ("w4a16", "gptq-4bit")


def test_quality_is_awq_unless_numbers_say_better() -> None:
    assert asked("quality", report=measured(awq__4bit=0.03, gptq__4bit=0.05)).best.plan == "awq-4bit"
    better = asked("quality", report=measured(awq__4bit=0.05, gptq__4bit=0.03))
    assert better.best.plan == "gptq-4bit"
    assert "loses less than awq-4bit on this model" in better.contradictions[0]
    assert "as measured on tiny" in better.ranked_by


def test_priors_are_said_to_be_priors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the embedded model they are its own."""
    found = asked("quality")
    assert "by priors, measured on this model" in found.ranked_by
    assert found.commands[0].startswith(f"fewbit compare tiny --plans bf16,{found.best.plan}")
    other = fewbit.recommend(models.save(tmp_path / "m", "llama"), "edge", memory="8GB")
    assert "by priors, not measured on this model" in other.ranked_by
    for done, whose in ((asked("edge"), "this model."), (other, "the embedded model, not on this one.")):
        advice.recommendation(done)
        text = " ".join(capsys.readouterr().out.split())
        assert f"* a prior: measured on {whose}" in text
        assert "plans that fit 8 GB, in that order" in text
    assert done is other
    assert "a prior: measured on the embedded model. This command" in text


def test_quality_is_the_most_that_fits() -> None:
    found = asked("quality", memory="16GB")
    assert found.best.plan in ("gptq-8bit", "q8_0")
    assert found.best.kl is not None
    assert all(c.kl is not None and c.kl.high >= found.best.kl.low for c in found.ranked)
    whole = {row.plan: row.total for row in fewbit.estimate("tiny").plans}
    less = asked("quality", memory=whole["q6_k"])
    assert less.best.plan == "q6_k"
    four = asked("quality", memory=whole["q4_k_m"])
    assert four.best.plan == "q4_k_m"
    assert "by priors" in four.contradictions[0] if four.contradictions else True


def test_memory_is_told_in_one_unit() -> None:
    found = asked("quality", memory="12MB")
    assert "needs 15.3 MB of memory, 12 MB are there" in [c.excluded for c in found.excluded]


def timing(rate: float, share: float = 0.02) -> Timing:
    ends = Interval(rate, rate * (1 - share), rate * (1 + share))
    return Timing(rate, ends.low, ends.high, 9, ends)


def test_tokens_a_second_come_from_this_machine() -> None:
    from fewbit.advise import speeds
    from fewbit.models.source import outlined

    assert "none, as tiny was not timed on this machine" in asked("quality").speeds
    source = outlined("tiny")
    row = Row("q4_k_m", "done", speed=Speed(1.0, timing(900), timing(77)))
    speeds.keep(source, "cpu", [row, Row("nf4", "failed", reason="killed")])
    speeds.keep(source, "cpu", [replace(row, plan="int8", speed=Speed(1.0, timing(900), timing(50)))])
    found = asked("quality")
    assert {c.plan: c.decode for c in found.ranked if c.decode} == {"q4_k_m": 77, "int8": 50}
    assert "as fewbit compare timed them on this machine" in found.speeds
    fast = asked("edge", max_kl=0.02, speed_first=True)
    assert fast.best.plan == "q4_k_m"
    assert "as timed on this machine" in fast.ranked_by


def test_speeds_that_overlap_do_not_decide() -> None:
    report = measured(gptq__4bit=0.05, awq__4bit=0.03)

    def at(**rates: Timing) -> Comparison:
        speed = {name.replace("__", "-"): Speed(1.0, rate, rate) for name, rate in rates.items()}
        return replace(report, rows=tuple(replace(row, speed=speed.get(row.plan, row.speed)) for row in report.rows))

    options: dict[str, object] = {"max_kl": 0.1, "speed_first": True}
    apart = at(gptq__4bit=timing(60), awq__4bit=timing(40))
    assert asked("serving", report=apart, **options).best.plan == "gptq-4bit"
    apart = at(gptq__4bit=timing(40), awq__4bit=timing(60))
    assert asked("serving", report=apart, **options).best.plan == "awq-4bit"
    noisy = at(gptq__4bit=timing(40, 0.6), awq__4bit=timing(60, 0.6))
    assert asked("serving", report=noisy, **options).best.plan == "gptq-4bit"  # the smaller one


def test_the_table_of_methods_is_in_order_of_loss() -> None:
    losses = [row.kl for row in advise.methods()]
    assert losses == sorted(losses, key=lambda kl: kl or 0)


def test_priors_and_rules_name_presets_only() -> None:
    purposes = rules()["purposes"].values()
    named = {p for rule in purposes for tier in [*rule["tiers"], rule["guide"]] for p in tier}
    assert named <= set(plan.PRESETS)
    # mxfp4_moe differs from q8_0 in experts only, and the embedded model has none, so it has no number there. Those of
    # two to four levels are for models that were trained with them.
    special = {"mxfp4_moe", "tq1_0", "tq2_0", "q1_0", "q2_0"}
    assert set(recommending.priors()["plans"]) == set(plan.PRESETS) - special
    for rule in purposes:
        tiers = [p for tier in rule["tiers"] for p in tier]
        assert len(tiers) == len(set(tiers))
        assert set(rule["guide"]) <= set(tiers)


def test_slower_than_the_original_is_said() -> None:
    found = asked("serving", report=measured(gptq__4bit=0.03))
    assert "Fewer bits are not faster here" in found.contradictions[-1]


@pytest.mark.parametrize("place", [".", "./", "../held", "config.json"])
def test_an_output_is_named_after_the_models_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not `.-q4_k_m`, which would be hidden."""
    folder = models.save(tmp_path / "held", "llama")
    monkeypatch.chdir(folder)
    found = fewbit.recommend(place, "edge", memory="8GB")
    assert [each.partition(" -o ")[2][:5] for each in found.commands if " -o " in each] == ["held-"] * 2


def test_what_failed_is_out() -> None:
    report = measured(awq__4bit=0.03)
    failed = Row("gptq-4bit", "failed", reason="killed")
    found = asked("serving", report=replace(report, rows=(*report.rows, failed)))
    assert found.best.plan == "awq-4bit"
    assert any(c.plan == "gptq-4bit" and "killed" in (c.excluded or "") for c in found.excluded)


def test_memory_decides() -> None:
    whole = {row.plan: row.total for row in fewbit.estimate("tiny").plans}
    found = asked("edge", memory=whole["q3_k_m"])
    assert found.best.total <= whole["q3_k_m"] < whole["q4_k_m"]
    with pytest.raises(PlanError, match=r"nothing fits 1 MB: the smallest is iq2_xxs with"):
        asked("quality", memory="1MB")


def test_targets_read_what_is_recommended() -> None:
    assert asked("quality", target="llama.cpp").best.format == "gguf"
    assert asked("serving", target="vllm").commands[-1].startswith("vllm serve ")
    with pytest.raises(PlanError, match="no plan for edge makes files that vllm reads") as error:
        asked("edge", target="vllm")
    assert "serving" in error.value.hint


def test_a_stated_loss() -> None:
    fast = asked("edge", max_kl=0.01, speed_first=True)
    assert fast.best.plan == "q5_k_s"
    assert "priors" in " ".join(fast.notes)
    with pytest.raises(PlanError, match="the nearest is gptq-8bit with"):
        asked("serving", max_kl=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": "much"}, "memory='much': expected a size such as 8GB"),
        ({"memory": "0GB"}, "memory='0GB': expected a size such as 8GB"),
        ({"max_kl": -1.0}, "above 0"),
        ({"target": "onnx"}, "unknown target"),
    ],
)
def test_bad_demands(options: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        asked("serving", **options)


def test_bad_models_and_purposes() -> None:
    with pytest.raises(PlanError, match="unknown purpose"):
        asked("speed")
    with pytest.raises(PlanError, match="a size, not a model"):
        fewbit.recommend("7B", "serving")


@pytest.mark.parametrize(
    ("text", "count"), [("8GB", 8e9), ("8 GiB", 8 * 2**30), ("512mb", 512e6), ("1000", 1000), ("1.5g", 1.5e9)]
)
def test_amounts_of_memory(text: str, count: float) -> None:
    assert checks.size("memory", text) == count


def test_the_table_has_every_preset_once_and_follows_a_report() -> None:
    rows = advise.methods()
    assert sorted(p for row in rows for p in row.plans) == sorted(plan.PRESETS)
    assert {p for row in rows for p in row.best_for} == set(rules()["purposes"])
    gptq = next(row for row in advise.methods(measured(gptq__4bit=0.5)) if row.method == "GPTQ")
    assert (gptq.kl, gptq.kl_plan, gptq.decode, gptq.basis) == (0.5, "gptq-4bit", 50.0, "measured")


def test_the_reference_has_the_table() -> None:
    from fewbit.advise.table import table
    from fewbit.report.advice import markdown

    page = (Path(__file__).parent.parent.parent / "docs" / "reference.md").read_text(encoding="utf-8")
    assert markdown(table(device="cpu", here=False)) in page, "run python tools/methods_table.py"


def test_rules_are_data_with_sources() -> None:
    raw = json.loads((Path(recommending.__file__).parent / "rules.json").read_text(encoding="utf-8"))
    assert all(each["source"].startswith("https://") for kind in raw.values() for each in kind.values())


def test_kernels_that_round_count_only_where_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu", "cpu_exact"):
        monkeypatch.setattr(registry.get("kernels", name), "unavailable", lambda self: None)
    found = {}
    for activations in ("exact", ""):
        monkeypatch.setenv("FEWBIT_ACTIVATIONS", activations)
        found[activations] = recommending.kernel("int3-g64", "cpu"), recommending.kernel("int3-g64", "cpu", here=False)
    assert found == {"exact": ("cpu_exact", "cpu"), "": ("cpu", "cpu")}


@pytest.mark.parametrize("name", ["q4_k_m", "q3_k_m", "q2_k"])
def test_chosen_types_are_proposed_at_equal_bytes(name: str) -> None:
    """The prior was measured at the size of the plan, and the command asks for no more."""
    estimated = fewbit.estimate("tiny")
    row = next(each for each in estimated.plans if each.plan == name)
    prior = recommending.priors()["sizes"]["plans"][name]
    assert prior["bits"] == pytest.approx(row.bits, abs=1e-3)
    found = recommending._sized(recommending._candidate(row, 0, None, {}, "cpu"), estimated)
    assert found is not None
    assert row.bits - 1e-3 < found.bits <= row.bits
    assert found.command == f"fewbit quantize tiny -o tiny-{name}.gguf --plan {name} --bits {found.bits:g}"
    assert found.kl.high < found.kl_of_plan.low
    if name == "q4_k_m":
        assert asked("edge").sized == found


@pytest.mark.parametrize("purpose", ["serving", "finetuning", "experiment"])
def test_nothing_is_proposed_that_was_not_better(purpose: str) -> None:
    assert asked(purpose).sized is None


def test_overlapping_intervals_are_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    priors = json.loads(json.dumps(recommending.priors()))
    priors["sizes"]["plans"]["q4_k_m"]["interval"] = [0.01, 0.016]
    monkeypatch.setattr(recommending, "priors", lambda: priors)
    assert asked("edge").sized is None


def test_a_memory_is_filled_with_chosen_widths() -> None:
    sizes = {row.plan: row.total for row in fewbit.estimate("tiny", context=512).plans}
    between = (sizes["q4_k_m"] + sizes["q5_k_m"]) // 2
    done = asked("edge", memory=None, fit=between, context=512)
    found = done.fitted
    assert found is not None
    assert found.format == "gguf"
    assert between - 100 < found.total <= between
    assert found.basis == "prior"
    losses = {name: recommending.priors()["plans"][name]["kl"] for name in ("q4_k_m", "q5_k_m")}
    assert found.kl is not None
    assert losses["q5_k_m"] < found.kl < losses["q4_k_m"]
    assert done.sized is None
    make = f"fewbit quantize tiny -o tiny-fit.gguf --plan {found.plan} --fit {between} --context 512"
    assert list(done.commands[1:3]) == [f"{make} --dry-run", make]
    larger = asked("edge", memory=None, fit="1GB", context=512).fitted
    assert larger is not None
    assert (larger.plan, round(larger.bits, 2)) == ("q8_0", 8.5)
    assert larger.total == sizes["q8_0"]


def test_widths_fit_where_no_plan_fits_with_its_own_types() -> None:
    smallest = next(row.total for row in fewbit.estimate("tiny", context=512).plans if row.plan == "iq2_xxs")
    done = asked("edge", memory=None, fit=smallest - 10_000, context=512)
    assert done.fitted is not None
    assert smallest - 11_000 < done.fitted.total <= smallest - 10_000
    assert done.ranked == ()
    assert any(c.excluded and "of memory" in c.excluded for c in done.excluded)
    assert any(f"--plan {done.fitted.plan} --fit {smallest - 10_000}" in command for command in done.commands)


def test_a_limit_of_loss_is_one_of_what_is_filled() -> None:
    options: dict[str, object] = {"memory": None, "fit": 12_000_000, "context": 512}
    found = asked("edge", **options).fitted
    assert found is not None
    assert found.kl is not None
    with pytest.raises(PlanError, match=f"nothing that fills .* or less: the nearest is {found.plan} at .* .prior"):
        asked("edge", **options, max_kl=found.kl * 0.99)
    # Plans with their own types lose more in this memory, and do not meet it.
    done = asked("edge", **options, max_kl=found.kl * 1.01)
    assert done.fitted == found
    assert any("checked against priors" in note for note in done.notes)
    with pytest.raises(PlanError, match="was not measured"):
        replace(found, kl=None).check(1.0)


def test_what_is_compared_includes_the_filled_plan() -> None:
    done = asked("edge", memory=None, fit=10_500_000, context=512)
    assert done.fitted is not None
    compared = done.commands[0].split("--plans ")[1].split()[0].split(",")
    assert done.fitted.plan in compared
    assert len(set(compared)) == len(compared)


def test_widths_are_those_that_the_target_reads() -> None:
    found = asked("quality", memory=None, fit="12MB", context=512, target="vllm").fitted
    assert found is not None
    assert found.format in ("gptq", "compressed-tensors")


def test_a_report_decides_what_fills_a_memory() -> None:
    report = measured(gptq__4bit=0.001, gptq__8bit=0.0005, q4_k_m=0.5)
    found = asked("quality", memory=None, fit="13MB", context=512, report=report).fitted
    assert found is not None
    assert found.basis == "report"
    assert found.plan == "gptq-4bit"
    assert found.kl is not None
    assert 0.0005 < found.kl < 0.001


def test_the_loss_between_plans_is_on_the_lowest_line() -> None:
    points = [(2.0, 0.8), (3.0, 0.6), (4.0, 0.2), (8.0, 0.0)]
    assert fitting.expected(3.0, points) == pytest.approx(0.5)
    assert fitting.expected(5.0, points) == pytest.approx(0.15)
    assert fitting.expected(9.0, points) == 0.0
    assert fitting.expected(1.9, points) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fit": "12MB"}, "`memory` and `fit` are given"),
        ({"memory": None, "fit": "12XB"}, "fit='12XB': expected a size such as 8GB"),
        ({"memory": None, "fit": "12MB", "batch": 2}, "batch=2.* is given with `fit`"),
        ({"measure": True}, "`measure` is given without `fit`"),
        ({"memory": None, "fit": "12MB", "calibration": Calibration(samples=2)}, "without `measure`"),
        ({"memory": None, "fit": "4MB"}, "nothing fits 4 MB"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        asked("quality", **options)
