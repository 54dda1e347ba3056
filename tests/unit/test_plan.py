"""A plan says for every weight what it gets, and what cannot be is told all at once, with what would fit."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fewbit import registry
from fewbit.errors import PlanError
from fewbit.formats.base import storing
from fewbit.methods.base import name_of
from fewbit.methods.gptq import GPTQ
from fewbit.methods.rtn import RoundToNearest
from fewbit.names import in_short
from fewbit.plans.mixtures import MIXTURES, Model
from fewbit.plans.plan import PRESETS, Plan, Rule, find, find_all, resolve
from fewbit.plans.rules import deciding
from fewbit.schemes.base import parse

SHAPES = {
    "model.layers.0.self_attn.q_proj": (576, 576),
    "model.layers.0.self_attn.k_proj": (192, 576),
    "model.layers.0.mlp.up_proj": (1536, 576),
    "model.layers.0.mlp.down_proj": (576, 1536),
}
LARGE = dict.fromkeys(SHAPES, (512, 1024))


def plan_of(*rules: Rule, adapt: bool = False) -> Plan:
    return Plan("test", "gptq", rules, adapt)


def schemes(plan: Plan, shapes: dict[str, tuple[int, int]]) -> dict[str, str]:
    return {module: str(a.scheme) for module, a in resolve(plan, shapes).assignments.items()}


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in MIXTURES])
def test_a_preset_resolves_as_it_is_where_its_group_fits(name: str) -> None:
    settled = resolve(find(name), LARGE)
    assert settled.plan.name == name
    assert list(settled.assignments) == list(LARGE)
    assert settled.kept == ()
    assert not [note for note in settled.notes if "activations" not in note]
    assert {str(a.scheme) for a in settled.assignments.values()} == {find(name).rules[0].scheme}
    for module, assignment in settled.assignments.items():
        assert (assignment.module, assignment.shape) == (module, LARGE[module])


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_preset_that_fits_every_shape_changes_nothing(name: str) -> None:
    settled = resolve(find(name), SHAPES | {"odd": (5, 37)})
    assert settled.kept == settled.notes == ()
    assert {str(a.scheme) for a in settled.assignments.values()} == {find(name).rules[0].scheme}


@pytest.mark.parametrize("name", [name for name, plan in PRESETS.items() if plan.adapt])
def test_a_preset_shrinks_its_group_and_says_so(name: str) -> None:
    settled = resolve(find(name), SHAPES)
    assert {a.scheme.group for a in settled.assignments.values()} == {64}
    (note,) = settled.notes
    assert "groups of 64 instead of 128" in note
    assert "576" in note
    assert "1536" not in note


def test_a_preset_leaves_what_no_group_fits_and_says_so() -> None:
    settled = resolve(find("gptq-4bit"), LARGE | {"odd": (512, 100), "narrow": (40, 1024)})
    assert set(settled.assignments) == set(LARGE)
    assert set(settled.kept) == {"odd", "narrow"}
    assert {a.scheme.group for a in settled.assignments.values()} == {128}
    for module in settled.kept:
        assert any(note.startswith(module) and "None" not in note for note in settled.notes)


def test_a_preset_that_fits_nothing_is_an_error() -> None:
    with pytest.raises(PlanError) as raised:
        resolve(find("gptq-4bit"), {"odd": (512, 100), "narrow": (40, 1024)})
    assert "odd" in str(raised.value)
    assert "narrow" in str(raised.value)


def test_a_named_scheme_is_not_shrunk_and_misfits_are_listed() -> None:
    with pytest.raises(PlanError) as raised:
        resolve(find("gptq-4bit").changed(scheme="int4-g128-sym"), SHAPES)
    for module, shape in SHAPES.items():
        assert (module in raised.value.message) == (shape[1] == 576)
    assert "3 of 4" in raised.value.message
    assert "scheme int4-g64-sym fits" in raised.value.hint
    assert set(schemes(find("gptq-4bit").changed(scheme="int4-g64-sym"), SHAPES).values()) == {"int4-g64-sym"}


def test_the_first_rule_that_matches_wins() -> None:
    plan = plan_of(Rule("*.down_proj", None), Rule("*.mlp.*", "int4-g64"), Rule("*_proj", "int4-g64", "gptq"))
    settled = resolve(plan, SHAPES)
    methods = {module.rpartition(".")[2]: type(a.method) for module, a in settled.assignments.items()}
    assert methods == {"q_proj": GPTQ, "k_proj": GPTQ, "up_proj": RoundToNearest}
    assert settled.kept == ("model.layers.0.mlp.down_proj",)


def test_what_no_rule_matches_is_kept() -> None:
    settled = resolve(plan_of(Rule("*.mlp.*", "int4-g64")), SHAPES)
    assert settled.kept == tuple(SHAPES)[:2]


@pytest.mark.parametrize(
    ("match", "hits"),
    [
        ("*", 4),
        ("*.self_attn.[qk]_proj", 2),
        ("model.layers.?.mlp.down_proj", 1),
        ("*.[!d]*_proj", 4),
        ("MODEL.*", 0),
        ("q_proj", 0),
    ],
)
def test_globs(match: str, hits: int) -> None:
    if hits:
        assert len(resolve(plan_of(Rule(match, "int4-g64")), SHAPES).assignments) == hits
    else:
        with pytest.raises(PlanError, match="matches nothing in this model"):
            resolve(plan_of(Rule(match, "int4-g64")), SHAPES)


def test_options_reach_the_method() -> None:
    plan = plan_of(Rule("*", "int4-g64", "gptq", {"damp": "0.1", "act_order": "false"}))
    methods = {a.method for a in resolve(plan, SHAPES).assignments.values()}
    assert methods == {GPTQ(damp=0.1, act_order=False)}


def test_changing_a_plan_drops_options_of_another_method() -> None:
    plan = plan_of(Rule("*.mlp.*", None), Rule("*", "int4-g128", "gptq", {"damp": "0.1"}), adapt=True)
    same = plan.changed(options={"refine": "0"})
    assert same.rules[1].options == {"damp": "0.1", "refine": "0"}
    assert same.adapt
    other = plan.changed(method="rtn", scheme="int3-g64")
    assert other.rules == (Rule("*.mlp.*", None), Rule("*", "int3-g64", "rtn"))
    assert not other.adapt
    assert plan.changed() == plan


def test_a_reason_for_all_tensors_is_said_once() -> None:
    with pytest.raises(PlanError) as raised:
        resolve(replace(plan_of(Rule("*", "int3-g64")), format="awq"), SHAPES)
    assert raised.value.message.count("4-bit integers") == 1
    assert "none of 4 tensors" in raised.value.message
    assert raised.value.message.startswith("plan test: ")
    assert raised.value.hint.startswith("Formats that store int3-g64: compressed-tensors, gptq. ")


def test_the_rule_of_what_cannot_be_stored_is_named() -> None:
    """It speaks of group sizes only where one would help."""
    plan = plan_of(Rule("*.mlp.*", "nf4-b64"), Rule("*", "int4-g128"))
    with pytest.raises(PlanError) as raised:
        resolve(replace(plan, format="awq"), SHAPES)
    assert "not nf4-b64 (rule 1, '*.mlp.*')" in raised.value.message
    assert raised.value.hint == "Formats that store nf4-b64: bnb. Choose one of them, or another scheme."
    with pytest.raises(PlanError) as raised:
        resolve(plan_of(Rule("*", "int4-g128")), SHAPES)
    assert "fits every tensor" in raised.value.hint


@pytest.mark.parametrize("spec", ["int5-g64", "int6-row-sym", "int7-g24"])
@pytest.mark.parametrize("format", registry.entries("formats"))
def test_a_scheme_that_no_format_stores_is_refused(spec: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scheme has a format today; a new one may not yet have one."""
    monkeypatch.setattr(
        "fewbit.plans.plan.storing", lambda scheme: [] if str(scheme).startswith(spec[:4]) else storing(scheme)
    )
    rules = [{"match": "*", "scheme": spec}]
    for attempt in (
        lambda: resolve(Plan("p", format, (Rule("*", spec),)), SHAPES),
        lambda: Plan.from_json({"name": "p", "format": format, "rules": rules}),
        lambda: plan_of(Rule("*", "int4-g64")).changed(scheme=spec, format=format),
    ):
        with pytest.raises(PlanError) as raised:
            attempt()
        assert f"scheme {spec}: no format stores it yet" in raised.value.message
        assert "int4-g128" in raised.value.hint
        assert spec[:4] not in raised.value.hint


def test_what_a_gptq_file_cannot_mix_is_refused_in_words() -> None:
    with pytest.raises(PlanError, match=r"int4-g64, int4-g64-sym"):
        resolve(plan_of(Rule("*.mlp.*", "int4-g64-sym"), Rule("*", "int4-g64")), SHAPES)
    with pytest.raises(PlanError, match=r"together: these need one scheme, not int4-g64 and int8-g64\nGive these"):
        resolve(plan_of(Rule("*.up_proj", "int8-g64"), Rule("*", "int4-g64")), GATED)


def test_a_gptq_file_may_have_several_widths() -> None:
    found = resolve(plan_of(Rule("*.down_proj", "int8-g32"), Rule("*", "int4-g64")), GATED).assignments
    config = registry.get("formats", "gptq")().config(list(found.values()), ["head"])
    assert (config["bits"], config["group_size"]) == (4, 64)
    assert config["dynamic"] == {
        "-:^head$": {},
        r"+:^l\.0\.down_proj$": {"bits": 8, "group_size": 32},
    }
    config = registry.get("formats", "gptq")().config(
        [replace(found["l.0.up_proj"], module=f"l.{i}.up_proj") for i in range(3)], []
    )
    assert config["dynamic"] == {}
    wide = [replace(each, scheme=parse("int8-g64")) for name, each in found.items() if "down" not in name]
    other = [replace(wide[0], module=f"m.{i}", scheme=parse("int4-g64")) for i in range(3)]
    assert registry.get("formats", "gptq")().config([*wide, *other], [])["dynamic"] == {
        r"+:^l\.0\.(?:gate_proj|up_proj|gate_up_proj)$": {"bits": 8}
    }


GATED = {f"l.0.{leaf}_proj": (128, 128) for leaf in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (Rule("*", "int4-g64", "gptg"), "gptq"),
        (Rule("*", "int4-g64-symm"), "int4-g64-symm"),
        (Rule("*", "int4-g64", "gptq", {"dmp": "1"}), "damp"),
        (Rule("*", "int4-g64", "gptq", {"damp": "x"}), "`damp`"),
    ],
)
def test_a_rule_that_names_nothing_known(rule: Rule, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        resolve(plan_of(rule), SHAPES)


def test_names_may_be_in_any_case() -> None:
    """llama.cpp writes its types in capitals."""
    assert find("Q4_K_M") is find("q4_k_m")
    assert find_all(["W4A16", "Original"], but="original") == {"w4a16": find("w4a16"), "original": None}
    assert parse("INT4-G64-SYM") == parse("int4-g64-sym")
    given = find("gptq-4bit").changed(scheme="Q4_K", method="RTN", format="GGUF")
    assert given == find("gptq-4bit").changed(scheme="q4_k", method="rtn", format="gguf")
    written = {
        "name": "x",
        "format": "GGUF",
        "rules": [{"match": "*", "scheme": "MIXTURE:Q4_K_M", "method": "Imatrix"}],
    }
    assert Plan.from_json(written).rules == find("q4_k_m").rules
    assert registry.get("kernels", "CPU") is registry.get("kernels", "cpu")


@pytest.mark.parametrize(
    ("spec", "near"),
    [("int4-g64-sim", "int4-g64-sym"), ("int4_g32", "int4-g32"), ("nf4-b128-qd", "nf4-b128-dq"), ("Q4K", "q4_k")],
)
def test_a_misspelled_scheme_gets_the_nearest_of_all(spec: str, near: str) -> None:
    with pytest.raises(PlanError) as raised:
        parse(spec)
    assert raised.value.hint == f"Did you mean {near}?"


@pytest.mark.parametrize(("group", "near"), [(100, 128), (60, 64), (90, 64), (600, 256)])
def test_a_size_of_groups_gets_the_nearest_that_fits(group: int, near: int) -> None:
    with pytest.raises(PlanError) as raised:
        resolve(plan_of(Rule("*", f"int4-g{group}-sym")), {"one": (256, 256), "two": (256, 768)})
    assert raised.value.hint == f"The scheme int4-g{near}-sym fits every tensor."


def test_unknown_formats_and_plans_get_the_nearest_names() -> None:
    with pytest.raises(PlanError, match="gptq"):
        resolve(Plan("test", "gptg", (Rule("*", "int4-g64"),)), SHAPES)
    with pytest.raises(PlanError, match="Did you mean gptq-4bit") as raised:
        find("gptq4bit")
    assert "nf4" not in raised.value.hint
    with pytest.raises(PlanError) as raised:
        find("zzz")
    assert all(name in raised.value.hint for name in PRESETS)


PLANS = [
    *PRESETS.values(),
    plan_of(Rule("*.mlp.*", None), Rule("*", "int3-g64", "gptq", {"damp": "0.1"})),
    Plan("empty", "gptq", ()),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_json_gives_the_plan_back(plan: Plan, tmp_path: Path) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_json()), encoding="utf-8")
    assert find(str(file)) == plan


RULE: dict[str, Any] = {"match": "*", "scheme": "int4-g64", "method": "gptq"}


@pytest.mark.parametrize(
    "rules",
    [
        "abc",
        3,
        None,
        [3],
        ["abc"],
        [{"match": "*"}],
        [{"scheme": "int4-g64"}],
        [RULE | {"group": 64}],
        [RULE | {"scheme": 4}],
        [RULE | {"match": 3}],
        [RULE | {"match": None}],
        [RULE | {"method": None}],
        [RULE | {"options": [1]}],
        [RULE | {"options": "damp"}],
        [RULE | {"options": {"damp": [0.1]}}],
    ],
    ids=str,
)
def test_json_that_is_no_plan_is_refused(rules: object) -> None:
    with pytest.raises(PlanError):
        resolve(Plan.from_json({"name": "test", "format": "gptq", "rules": rules}), SHAPES)


@pytest.mark.parametrize("lie", [[], "gptq", None, {}, {"name": "x", "format": "gptq"}, {"rules": []}], ids=str)
def test_json_of_another_kind_is_refused(lie: Any) -> None:
    with pytest.raises(PlanError, match="this is not a plan"):
        Plan.from_json(lie)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"sceme": "int4-g64"}, ("unknown key 'sceme'", "Did you mean scheme")),
        ({"options": {"dampp": 0.1}}, ("option of method gptq 'dampp'", "Did you mean damp")),
        ({"options": {"damp": "much"}}, ("'much'",)),
        ({"options": {"damp": 7}}, ("'7'", "0 to 1")),
        ({"options": [1]}, ("options is [1]",)),
        ({"method": "gtpq"}, ("unknown method 'gtpq'", "Did you mean gptq")),
        ({"scheme": "int4-g64-symm"}, ("int4-g64-symm", "Did you mean int4-g64-sym?")),
        ({"scheme": "mixture:q4_k_x"}, ("unknown mixture 'q4_k_x'", "q4_k_m")),
        ({"scheme": 4}, ("scheme is 4",)),
    ],
    ids=str,
)
def test_a_wrong_rule_is_named_with_its_key(rule: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    plan = {"name": "x", "format": "gptq", "rules": [RULE | {"match": "*.o_proj"}, RULE | {"match": "*.mlp.*"} | rule]}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(PlanError) as error:
        find(str(file))
    for word in ("plan.json", "rule 2 of the plan, '*.mlp.*'", *words):
        assert word in str(error.value)


def test_a_wrong_key_of_a_plan_is_named() -> None:
    plan = {"name": "x", "format": "gptq", "rules": [RULE]}
    with pytest.raises(PlanError, match="unknown key 'adpat'") as error:
        Plan.from_json(plan | {"adpat": True})
    assert "Did you mean adapt?" in error.value.hint
    with pytest.raises(PlanError, match="unknown format 'gtpq'"):
        Plan.from_json(plan | {"format": "gtpq"})
    with pytest.raises(PlanError, match="adapt is 'yes'"):
        Plan.from_json(plan | {"adapt": "yes"})


@pytest.mark.parametrize(
    "wrong", [{"scheme": "int4-g64-symm"}, {"method": "gtpq"}, {"format": "gtpq"}, {"options": {"dampp": "1"}}], ids=str
)
def test_a_change_that_is_unknown_is_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="unknown"):
        find("gptq-4bit").changed(**wrong)


def test_one_cause_in_many_tensors_is_one_line() -> None:
    kinds = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "mlp.up_proj": (1536, 576)}
    shapes = {f"model.layers.{i}.{kind}": shape for i in range(8) for kind, shape in kinds.items()}
    shapes |= {"model.layers.3.mlp.down_proj": (576, 1500), "model.layers.4.mlp.down_proj": (576, 1536)}
    with pytest.raises(PlanError) as error:
        resolve(find("gptq-4bit").changed(scheme="int4-g128-sym"), shapes)
    first, alike, alone = error.value.message.split("\n")
    assert first == "plan gptq-4bit with scheme int4-g128-sym: 25 of 26 tensors cannot be stored as requested:"
    assert alike.startswith("  24 tensors, model.layers.0-7.self_attn.q_proj, model.layers.0-7.self_attn.k_proj")
    assert "[576 x 576, 192 x 576, 1536 x 576]: " in alike
    assert alone.startswith("  model.layers.3.mlp.down_proj [576 x 1500]: ")
    (note,) = resolve(find("gptq-4bit"), LARGE | {f"m.{i}.x": (512, 100) for i in range(5)}).notes
    assert note.startswith("m.0-4.x stay as they are: ")


@pytest.mark.parametrize(
    ("modules", "short"),
    [
        ([], ""),
        (["lm_head"], "lm_head"),
        ([f"a.{i}.x" for i in (0, 1, 2, 5, 7, 8)], "a.0-2,5,7-8.x"),
        ([f"a.{i}.{kind}" for i in range(3) for kind in "xy"], "a.0-2.x, a.0-2.y"),
        ([f"a.{i}.experts.{j}.w" for i in range(2) for j in range(4)], "a.0-1.experts.0-3.w"),
        (["a.0.x", "a.1.x.y", "b"], "a.0.x, a.1.x.y, b"),
    ],
    ids=str,
)
def test_names_in_short(modules: list[str], short: str) -> None:
    assert in_short(modules) == short


def test_options_may_be_written_as_json_writes_them() -> None:
    options = {"damp": 0.1, "act_order": False, "refine": 0}
    plan = Plan.from_json({"name": "test", "format": "gptq", "rules": [RULE | {"options": options}]})
    methods = {a.method for a in resolve(plan, SHAPES).assignments.values()}
    assert methods == {GPTQ(damp=0.1, act_order=False, refine=0)}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null", b'{"name": 1}'], ids=str)
def test_a_file_that_is_no_plan_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(PlanError):
        find(str(file))
    with pytest.raises(PlanError, match=r"absent\.json"):
        find(str(tmp_path / "absent.json"))


REST = Rule("*", "int4-g64")


@pytest.mark.parametrize(
    ("match", "said", "instead"),
    [
        ("*.dwn_proj", "matches nothing", "Did you mean '*.down_proj'?"),
        ("*.layers.*.mlp.dwn_proj", "matches nothing", "Did you mean '*.layers.*.mlp.down_proj'?"),
        ("*ffn_gate*", "matches nothing", "The model's linears are model.layers.0-7.self_attn.v_proj, model"),
        ("layers.*.mlp.*", "matches nothing", "Did you mean '*.layers.*.mlp.*'?"),
        ("model.layers.31.*", "matches nothing", "Did you mean 'model.layers.1.*' or 'model.layers.3.*'?"),
        ("model.layers.0", "names model.layers.0, and no linear inside", "write 'model.layers.0.*'"),
        ("*.layers.[01]", "names model.layers.0-1, and no linear inside", "write '*.layers.[01].*'"),
    ],
)
def test_a_rule_that_matches_nothing_is_refused(match: str, said: str, instead: str) -> None:
    modules = ["", *WHOLE, *(f"model.layers.{i}" for i in range(8)), "model.layers.0.mlp.router"]
    inside = {name: shape for name, shape in WHOLE.items() if name.startswith("model.layers")}
    with pytest.raises(PlanError) as refused:
        resolve(plan_of(Rule(match, None), REST), inside, modules=modules)
    assert f"rule 1 of the plan, '{match}', {said}" in refused.value.message
    assert instead in refused.value.hint


def test_a_rule_for_what_stays_as_it_is_is_a_note() -> None:
    """The head, an embedding, a tower and a router are no linears of the blocks. To keep them needs no note."""
    inside = {name: shape for name, shape in WHOLE.items() if name.startswith("model.layers")}
    modules = [
        "",
        *WHOLE,
        "model.layers.0.mlp.router",
        "visual",
        "visual.blocks",
        "visual.blocks.0",
        "visual.blocks.0.qkv",
    ]
    for match in ("lm_head", "*embed*", "visual.*", "*.router"):
        assert resolve(plan_of(Rule(match, None), REST), inside, modules=modules).notes == ()
        (note,) = resolve(plan_of(Rule(match, "int8-g64"), REST), inside, modules=modules).notes
        assert f"rule 1 of the plan, '{match}', matches no linear in the model's blocks" in note
        assert "qkv" not in note  # it is inside of `visual.blocks`


def test_only_a_rule_for_the_head_decides_on_it() -> None:
    """Other rules match linears of the blocks too, and have left the head as it is."""
    shapes = {name: shape for name, shape in WHOLE.items() if name != "model.embed_tokens"}
    for match in ("*", "*[dr]*", "*_*"):
        assert deciding([Rule(match, "int4-g64")], shapes, "lm_head")["lm_head"] == -1
        assert deciding([Rule(match, "int4-g64")], shapes)["lm_head"] == 0
        for head in ("lm_head", "*head"):
            rules = [Rule(match, "int4-g64"), Rule(head, "int8-g64", "gptq")]
            assert deciding(rules, shapes, "lm_head")["lm_head"] == 1
    made = resolve(plan_of(REST, Rule("lm_head", "int8-g64", "gptq")), shapes, modules=[*WHOLE], head="lm_head")
    assert made.notes == ()
    assert str(made.assignments["lm_head"].scheme) == "int8-g64"
    assert name_of(made.assignments["lm_head"].method) == "imatrix"
    assert {str(a.scheme) for name, a in made.assignments.items() if name != "lm_head"} == {str(REST.scheme)}


def test_a_rule_that_an_earlier_one_hides_is_refused() -> None:
    for before, after in (("*", "*.down_proj"), ("*.mlp.*", "model.*.mlp.down_proj")):
        with pytest.raises(PlanError, match=r"rule 2 of the plan, .*has no effect: rule 1, ") as refused:
            resolve(plan_of(Rule(before, "int4-g64"), Rule(after, None)), WHOLE, modules=[*WHOLE])
        assert "Put rule 2 before rule 1." in refused.value.hint
    # The last rule is for what the others leave, which is nothing in this model.
    every = [Rule("*.mlp.*", "int4-g64"), Rule("*.self_attn.*", "int4-g64"), Rule("*", "int8-g64")]
    inside = {name: shape for name, shape in WHOLE.items() if name.startswith("model.layers")}
    assert len(resolve(plan_of(*every), inside, modules=[*WHOLE]).assignments) == len(inside)


def test_a_rule_for_a_tied_head_must_agree() -> None:
    """A GGUF file has one tensor for a tied head and the embeddings, which the rule for the embeddings decides on."""
    shapes = {name: shape for name, shape in WHOLE.items() if name != "lm_head"}
    settle = partial(resolve, shapes=shapes, modules=[*WHOLE], tied={"lm_head": "model.embed_tokens"})
    for scheme in (None, "int8-g64"):
        with pytest.raises(PlanError, match=r"no effect: lm_head has the weight of model\.embed_tokens") as refused:
            settle(plan_of(Rule("lm_head", scheme), REST))
        assert refused.value.hint == "Write 'model.embed_tokens'."
    blocks = Rule("model.layers.*", "int4-g64")
    for rules in ((Rule("lm_head", "int4-g64"), REST), (Rule("lm_head", None), blocks)):
        assert settle(plan_of(*rules)).notes == ()


WHOLE = {"model.embed_tokens": (4096, 256), "lm_head": (4096, 256)} | {
    f"model.layers.{i}.{name}": shape
    for i in range(8)
    for name, shape in (("self_attn.v_proj", (128, 256)), ("mlp.up_proj", (768, 256)), ("mlp.down_proj", (256, 768)))
}
NAMES = {"model.embed_tokens": "token_embd", "lm_head": "output"} | {
    f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}"
    for i in range(8)
    for theirs, ours in (("self_attn.v_proj", "attn_v"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"))
}
MODEL = Model("llama", layers=8, gqa=2, tied=False, names=NAMES)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_has_a_scheme_for_each_weight(name: str) -> None:
    settled = resolve(find(name), WHOLE, MODEL)
    assert list(settled.assignments) == list(WHOLE)
    assert settled.kept == settled.notes == ()
    assert str(settled.assignments["model.layers.7.mlp.up_proj"].scheme) == MIXTURES[name].base


def test_a_mixture_gives_more_bits_where_more_is_lost() -> None:
    settled = resolve(find("q4_k_m"), WHOLE, MODEL)
    found = {module: str(a.scheme) for module, a in settled.assignments.items()}
    assert found["lm_head"] == "q6_k"
    assert found["model.embed_tokens"] == "q4_k"
    assert [found[f"model.layers.{i}.mlp.down_proj"] for i in range(4)] == ["q6_k", "q4_k", "q4_k", "q6_k"]


def test_what_no_block_divides_stays_in_16_bits_and_is_named() -> None:
    settled = resolve(find("q4_k_m"), WHOLE | {"model.layers.0.mlp.up_proj": (768, 40)}, MODEL)
    assert settled.kept == ("model.layers.0.mlp.up_proj",)
    assert "model.layers.0.mlp.up_proj" in settled.notes[0]


def test_embeddings_and_head_are_not_asked_for_inputs() -> None:
    settled = resolve(find("q4_k_m").changed(method="gptq"), WHOLE, MODEL)
    methods = {module: name_of(a.method) for module, a in settled.assignments.items()}
    assert methods["model.layers.0.mlp.up_proj"] == "gptq"
    assert methods["model.embed_tokens"] == methods["lm_head"] == "imatrix"
    plain = resolve(find("q4_k_m").changed(method="rtn"), WHOLE, MODEL)
    assert {name_of(a.method) for a in plain.assignments.values()} == {"rtn"}


def test_a_mixture_may_depend_on_importances() -> None:
    def first(method: str) -> str:
        settled = resolve(find("q4_0").changed(method=method), WHOLE, MODEL)
        return str(settled.assignments["model.layers.0.mlp.down_proj"].scheme)

    assert first("imatrix") == first("gptq") == "q4_1"
    assert first("rtn") == "q4_0"


def test_a_mixture_is_for_gguf() -> None:
    with pytest.raises(PlanError, match="mixture of block types, which gptq cannot store"):
        resolve(find("q4_k_m").changed(format="gptq"), LARGE)


def test_an_unknown_mixture_is_told_with_the_nearest() -> None:
    with pytest.raises(PlanError, match="unknown mixture 'q4_k_x'") as error:
        resolve(Plan("test", "gguf", (Rule("*", "mixture:q4_k_x"),)), WHOLE, MODEL)
    assert "q4_k_m" in str(error.value.hint)


def test_a_scheme_in_place_of_a_mixture_is_taken_at_its_word() -> None:
    settled = resolve(find("q4_k_m").changed(scheme="q5_0"), WHOLE, MODEL)
    assert {str(a.scheme) for a in settled.assignments.values()} == {"q5_0"}
    with pytest.raises(PlanError, match="blocks of 256 do not divide 40 columns"):
        resolve(find("q4_k_m").changed(scheme="q4_k"), WHOLE | {"model.layers.0.mlp.up_proj": (768, 40)}, MODEL)


def test_gguf_holds_block_types_alone() -> None:
    with pytest.raises(PlanError, match="block types such as q4_k, not int4-g128"):
        resolve(Plan("test", "gguf", (Rule("*", "int4-g128"),)), WHOLE, MODEL)


@pytest.mark.parametrize(
    ("module", "shape", "gate"),
    [
        ("model.layers.0.mlp.gate", (8, 64), True),
        ("model.layers.0.mlp.router.classifier", (6, 64), True),  # LongCat
        ("model.layers.0.mlp.router.layer", (64, 64), True),
        ("model.layers.0.mlp.gate_proj", (96, 64), False),
        ("model.layers.0.mlp.gate", (96, 64), False),  # of a gated MLP
    ],
)
def test_linears_of_a_router_stay_unless_a_rule_names_them(module: str, shape: tuple[int, int], gate: bool) -> None:
    up = "model.layers.0.mlp.up_proj"
    found = resolve(find("nf4"), {module: shape, up: (96, 64)})
    assert (module in found.kept) is gate
    named = Plan("mine", "bnb", (Rule(module, "nf4-b64-dq"), Rule("*", "nf4-b64-dq")))
    assert module in resolve(named, {module: shape, up: (96, 64)}).assignments


@pytest.mark.parametrize(("scheme", "columns"), [("nvfp4", 40), ("mxfp4", 48), ("int4-g16", 40), ("fp8-row", 40)])
def test_adapting_a_scheme_of_one_group_size(scheme: str, columns: int) -> None:
    """Its groups are smaller than 32 columns, or cannot change: weights that they divide are quantized."""
    shapes = {"model.layers.0.q_proj": (256, 512), "odd": (256, columns)}
    plan = Plan("p", "compressed-tensors", (Rule("*", scheme),), adapt=True)
    settled = resolve(plan, shapes)
    fits = scheme == "fp8-row"
    assert {module: str(a.scheme) for module, a in settled.assignments.items()} == dict.fromkeys(
        shapes if fits else [*shapes][:1], scheme
    )
    assert [note for note in settled.notes if note.startswith("odd stays as it is: ")] == (
        [] if fits else [f"odd stays as it is: groups of {parse(scheme).group} do not divide {columns} columns"]
    )


@pytest.mark.parametrize(
    ("scheme", "method", "said"),
    [("iq2_xs", "rtn", True), ("iq2_xs", "imatrix", False), ("iq2_xs", "gptq", False), ("iq3_s", "rtn", False)],
)
def test_types_that_need_importances_are_noted(scheme: str, method: str, said: bool) -> None:
    notes = resolve(Plan("p", "gguf", (Rule("*", scheme, method),)), LARGE).notes
    expected = f"{len(LARGE)} weights become iq2_xs without an importance matrix, which llama-quantize refuses"
    assert [note.startswith(expected) for note in notes] == [True] * said


def test_what_a_gguf_file_transposes_stays_in_16_bits() -> None:
    names = {"a.kv": "blk.0.attn_k_b", "a.o": "blk.0.attn_output"}
    model = Model("x", layers=1, gqa=1, tied=False, names=names, transposed=frozenset({"a.kv"}))
    shapes = dict.fromkeys(names, (64, 256))
    for scheme in ("q8_0", "mixture:q8_0"):
        found = resolve(Plan("p", "gguf", (Rule("*", scheme),)), shapes, model)
        assert (list(found.assignments), found.kept) == (["a.o"], ("a.kv",))
        assert "a.kv" in found.notes[0]
        assert "transposed" in found.notes[0]
    with pytest.raises(PlanError, match="transposed"):
        resolve(Plan("p", "gguf", (Rule("a.*", "q8_0"),)), shapes, model)
