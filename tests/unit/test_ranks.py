"""What processes tell one another: in one process nothing changes, in three each function does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewbit.errors import PlanError
from fewbit.stats import Need, Stats
from fewbit.system import ranks
from tests.e2e.test_ranks import torchrun

# In three processes, of which the last has seen no row; what each found is written beside the script.
ASKED = """
import json, sys
from pathlib import Path
import torch
from fewbit.pipeline import capture
from fewbit.system import ranks
from fewbit.stats import Need, Stats
with ranks.joined("cpu"):
    me = ranks.rank()
    x = torch.arange(24.0).reshape(6, 4) ** 1.5
    weight = torch.arange(1.0, 7.0)
    rows = [slice(0, 2), slice(2, 6), slice(6, 6)][me]
    stats = Stats(4, Need.HESSIAN)
    stats.add(x[rows], weight[rows])
    stats.all_reduce()
    transposed = torch.full((2, 3), float(me)).T
    ranks.broadcast(transposed, 1)
    # One expert is reached in the first rank alone, another in the second.
    class Skeleton:
        device = "cpu"
    own = Stats(4, Need.MEAN_SQUARE)
    own.add(x[me : me + 1])
    name = ["a", "b", "b"][me]
    shapes = {"a": (1, 4), "b": (1, 4)}
    routed = capture._of_all_ranks(Skeleton, {name: name}, {name: own}, shapes, Need.MEAN_SQUARE)
    found = {
        "hessian": stats.hessian.tolist(), "rows": stats.rows,
        "part": list(ranks.part(7)), "owners": ranks.owners([1, 5, 2, 2]),
        "gathered": ranks.all_gather([me]), "to_first": ranks.gather_to_first(me),
        "from_first": ranks.run_on_first(lambda: me), "agreed": ranks.agreed(me + 10),
        "handed": transposed.tolist(), "added": float(ranks.all_reduce(torch.tensor(float(me)))),
        "routed": {n: (s.rows, s.mean_square.tolist()) for n, s in routed.items()},
        "order": list(routed),
    }
Path(sys.argv[1], str(me)).write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    out = tmp_path_factory.mktemp("said")
    (out / "asked.py").write_text(ASKED, encoding="utf-8")
    ended = torchrun(3, str(out / "asked.py"), str(out), cache=out / "cache")
    assert ended.returncode == 0, ended.stderr
    return [json.loads((out / str(rank)).read_text(encoding="utf-8")) for rank in range(3)]


def test_statistics_become_those_of_all_rows(said: list[dict[str, object]]) -> None:
    x = torch.arange(24.0).reshape(6, 4) ** 1.5
    exact = Stats(4, Need.HESSIAN)
    exact.add(x, torch.arange(1.0, 7.0))
    for own in said:
        assert own["rows"] == 6
        torch.testing.assert_close(torch.tensor(own["hessian"]), exact.hessian)


def test_work_is_parted_without_rest(said: list[dict[str, object]]) -> None:
    assert [own["part"] for own in said] == [[0, 1], [2, 3], [4, 5, 6]]
    owners = said[0]["owners"]
    assert all(own["owners"] == owners for own in said)
    assert isinstance(owners, list)
    loads = [sum(cost for cost, owner in zip([1, 5, 2, 2], owners, strict=True) if owner == rank) for rank in range(3)]
    assert sorted(loads) == [2, 3, 5]


def test_each_is_told_what_it_is_to_know(said: list[dict[str, object]]) -> None:
    assert [own["gathered"] for own in said] == [[[0], [1], [2]]] * 3
    assert [own["to_first"] for own in said] == [[0, 1, 2], [], []]
    assert [own["from_first"] for own in said] == [0, 0, 0]
    assert [own["agreed"] for own in said] == [10, 10, 10]
    assert [own["added"] for own in said] == [3, 3, 3]
    assert [own["handed"] for own in said] == [[[1.0, 1.0]] * 3] * 3  # a transposed tensor too


def test_a_linear_one_rank_did_not_reach_uses_the_other_ranks(said: list[dict[str, object]]) -> None:
    x = torch.arange(24.0).reshape(6, 4) ** 1.5
    for own in said:
        routed = own["routed"]
        assert isinstance(routed, dict)
        assert own["order"] == ["a", "b"]
        assert [routed[name][0] for name in "ab"] == [1, 2]
        torch.testing.assert_close(torch.tensor(routed["a"][1]), x[0].square())
        torch.testing.assert_close(torch.tensor(routed["b"][1]), x[1:3].square().mean(0))


def test_one_process_is_told_what_it_says() -> None:
    with ranks.joined("cpu") as device:
        assert device == "cpu"
        assert (ranks.rank(), ranks.size(), ranks.first(), ranks.silent()) == (0, 1, True, False)
        value = torch.ones(3)
        assert ranks.all_reduce(value) is value
        assert ranks.all_gather(value) == ranks.gather_to_first(value) == [value]
        assert ranks.run_on_first(lambda: value) is value
        assert (list(ranks.part(3)), ranks.owners([3, 1])) == ([0, 1, 2], [0, 0])


def test_a_program_that_uses_torch_distributed_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    assert ranks.silent()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        with pytest.raises(PlanError, match="this program already uses"), ranks.joined("cpu"):
            pass
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rank", ["0", "2"])
def test_more_processes_than_gpus_fail_in_each_of_them(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with pytest.raises(PlanError, match=r"3 processes were started on a machine with 2 GPUs\n.*--nproc-per-node 2"):
        ranks._own("cuda")
