"""Merging by weights: the numbers of the published code, what the catalogue promises, and data of several domains."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.adapters.files import load
from limbeck.core import knobs
from limbeck.core.batches import Batches, Table
from limbeck.core.errors import BadInput
from limbeck.core.loop import Plan, fit
from limbeck.core.merging import MERGES, arcee_fusion, average, check, fused, importance, task_arithmetic, ties
from limbeck.core.nets import Nets
from limbeck.core.partition import only

NUMBERS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "branch_merge.json").read_text())["merge"]


def state(told: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in told.items()}


def drawn(seed: int, like: dict[str, Tensor] | None = None, spread: float = 0.3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    like = like or {"w": torch.zeros(6, 5), "b": torch.zeros(7), "steps": torch.tensor(3), "scale": torch.tensor(1.0)}
    return {
        k: v + spread * torch.randn(v.shape, generator=g) if v.is_floating_point() else v + seed
        for k, v in like.items()
    }


def test_arcee_fusion_is_that_of_the_published_code():
    branches = [state(branch) for branch in NUMBERS["branches"]]
    merged = arcee_fusion(state(NUMBERS["start"]), branches)
    for key, wanted in state(NUMBERS["value"]).items():
        torch.testing.assert_close(merged[key], wanted, rtol=0, atol=1e-12)
        assert not torch.equal(wanted, branches[-1][key]) or key != "a"
    for key, wanted in state(NUMBERS["importance"]).items():
        torch.testing.assert_close(importance(branches[1][key], branches[0][key]), wanted, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", MERGES)
def test_merging_a_network_with_itself_returns_it(name: str):
    start = drawn(0)
    branch = drawn(1, start)
    given = {"keep": 1.0} if name == "ties" else {}
    merged = MERGES[name](start, [branch, branch, branch] if name != "task_arithmetic" else [branch], **given)
    for key, value in branch.items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-7)
        assert merged[key].dtype == value.dtype
    if name == "arcee_fusion":
        assert all(torch.equal(merged[key], value) for key, value in branch.items())


def test_every_entry_is_that_of_one_of_the_two():
    start = drawn(0)
    first, second = drawn(1, start), drawn(2, start)
    merged = arcee_fusion(start, [first, second])
    taken = {k: merged[k] == first[k] for k in ("w", "b")}
    for key, theirs in taken.items():
        assert bool((theirs | (merged[key] == second[key])).all())
    assert 0 < int(taken["w"].sum()) < taken["w"].numel() / 2
    assert torch.equal(merged["steps"], second["steps"])


def test_importance_is_nothing_in_a_row_that_agrees():
    base = drawn(0)["w"]
    other = base.clone()
    other[2:] += torch.randn(4, 5, generator=torch.Generator().manual_seed(5))
    score = importance(base, other)
    assert not score[:2].any()
    assert bool((score[2:] > 0).all())
    assert torch.equal(fused(base, other)[:2], base[:2])


def test_the_last_branch_is_the_last_base():
    start = drawn(0)
    branches = [drawn(k, start) for k in (1, 2, 3)]
    pairwise = {k: fused(branches[1][k], branches[0][k]) for k in ("w", "b")}
    merged = arcee_fusion(start, branches)
    for key, value in pairwise.items():
        assert torch.equal(merged[key], fused(branches[2][key], value))
        assert float((merged[key] == branches[2][key]).double().mean()) > 0.5


def test_average_and_task_arithmetic_are_sums():
    start, first, second = (state({"w": w}) for w in ([1.0, 2.0], [3.0, 2.0], [0.0, 6.0]))
    assert average(start, [first, second])["w"].tolist() == [1.5, 4.0]
    assert task_arithmetic(start, [first, second], scale=0.5)["w"].tolist() == [1.5, 4.0]
    assert task_arithmetic(start, [first, second])["w"].tolist() == [2.0, 6.0]


def test_ties_trims_elects_a_sign_and_takes_the_mean_of_those_that_agree():
    start = state({"w": [0.0, 0.0, 0.0, 0.0], "b": [1.0]})
    first = state({"w": [4.0, -3.0, 0.1, 2.0], "b": [1.2]})
    second = state({"w": [2.0, 5.0, 0.2, -0.1], "b": [6.0]})
    merged = ties(start, [first, second], keep=0.6)  # 3 of 5: 4, -3, 2 of the first, 2, 5 and b's 5 of the second
    assert merged["w"].tolist() == [3.0, 5.0, 0.0, 2.0]
    assert merged["b"].tolist() == [6.0]
    assert ties(start, [first, second], keep=0.6, scale=2.0)["w"].tolist() == [6.0, 10.0, 0.0, 4.0]


def test_networks_of_two_shapes_are_refused():
    start = drawn(0)
    with pytest.raises(BadInput, match=r"'w' is \(6, 5\) at the start, \(2, 5\) in 1"):
        check(start, [drawn(1, start), drawn(2, start) | {"w": torch.zeros(2, 5)}])


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


def table() -> Table:
    g = torch.Generator().manual_seed(0)
    columns = {"inputs": torch.randn(60, 6, generator=g), "labels": torch.randint(3, (60,), generator=g)}
    return Table(columns | {"domain": torch.arange(60) % 2})


def trained(of: Table, steps: int = 8, size: int = 20, norm: bool = False, **given: Any) -> Nets:
    torch.manual_seed(0)
    nets = Nets(student=nn.Sequential(nn.BatchNorm1d(6), Line()) if norm else Line())
    plan = Plan(steps, optimizer={"sgd": {"lr": 0.5}})
    fit(knobs.make("branch_merge", {"match": ["ce"], **given}), nets, Batches(of, size, seed=1), plan)
    return nets


def test_a_branch_learns_from_its_own_domain_alone():
    whole = table()
    other = whole["inputs"] + 100 * (whole["domain"] == 1)[:, None]
    changed = Table({**whole.columns, "inputs": other})
    one, two = trained(whole), trained(changed)
    assert torch.equal(one.branches[0].head.weight, two.branches[0].head.weight)
    assert not torch.equal(one.branches[1].head.weight, two.branches[1].head.weight)


@pytest.mark.parametrize("name", MERGES)
def test_the_student_is_the_merge_of_its_branches(name: str):
    nets = trained(table(), merge=name, together=0.5, keep=0.5)
    start = trained(table(), steps=8, together=0.5, merge="task_arithmetic", scale=1e-30).student.state_dict()
    given = {"ties": {"keep": 0.5}}.get(name, {})
    wanted = MERGES[name](start, [b.state_dict() for b in nets.branches], **given)
    for key, value in nets.student.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-6)
        assert not torch.equal(value, start[key])


def test_a_batch_without_a_domain_leaves_its_branch_as_it_is():
    only = table().select((table()["domain"] == 0).nonzero()[:, 0])
    nets = trained(only, together=0.25)
    start = trained(only, together=0.25, merge="task_arithmetic", scale=1e-30).student
    torch.testing.assert_close(nets.branches[1].head.weight, start.head.weight, rtol=0, atol=1e-6)
    assert not torch.allclose(nets.branches[0].head.weight, start.head.weight, atol=1e-3)


def test_statistics_of_a_branch_are_those_of_its_own_domain():
    shown = table().select((table()["domain"] == 0).nonzero()[:, 0])
    norms = [branch[0].running_mean for branch in trained(shown, norm=True).branches]
    assert norms[0].abs().max() > 0.01 and not norms[1].any()


def test_constants_come_whole_with_the_examples_of_a_domain():
    batch = {
        "inputs": torch.arange(6).view(3, 2),
        "labels": torch.arange(6).view(3, 2),
        "index": torch.arange(3),
        "same_words": torch.arange(6).view(3, 2),
        "words": torch.tensor([9]),
    }
    own = only(batch, torch.tensor([False, True, True]))
    assert own["inputs"].tolist() == [[2, 3], [4, 5]]
    assert own["index"].tolist() == [1, 2]
    assert torch.equal(own["same_words"], batch["same_words"])
    assert torch.equal(own["words"], batch["words"])
    none = only(batch, torch.zeros(3, dtype=torch.bool))
    assert none["inputs"].shape == (1, 2)
    assert not none["mask"].any()


def test_a_domain_that_has_no_branch_is_refused():
    with pytest.raises(BadInput, match=r"`domain` must be in \[0, 1\), the branches, got 1"):
        trained(table(), branches=1)


# ---------------------------------------------------------------- data of several domains


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_texts_of_two_domains_are_cut_apart_and_share_a_tokenizer(tmp_path: Path):
    first = write(tmp_path, "first", [{"text": "ab" * 50} for _ in range(10)])
    second = write(tmp_path, "second", [{"said": "xyz" * 100} for _ in range(10)])
    spec = {"name": first, "domains": [{"name": second, "inputs": "said"}], "length": 10, "kind": "language"}
    for part in load(spec):
        assert part.tokenizer is not None
        for number, letters in enumerate(("ab", "xyz")):
            texts = part.select((part["domain"] == number).nonzero()[:, 0])
            assert len(texts)
            assert set(part.tokenizer.decode(texts["inputs"].flatten().tolist())) <= {*letters, "\n"}
    some = load({**spec, "limit": 8, "test_limit": 4})
    assert [part["domain"].bincount().tolist() for part in some] == [[4, 4], [2, 2], [2, 2]]


def test_classes_of_two_domains_are_one_task(tmp_path: Path):
    names = [
        write(tmp_path, n, [{"text": f"{n} {i}", "label": "no yes".split()[i % 2]} for i in range(50)]) for n in "pq"
    ]
    splits = load({"name": names[0], "domains": [names[1]]})
    assert [part["domain"].bincount().tolist() for part in splits] == [[40, 40], [5, 5], [5, 5]]
    assert splits.train.classes == ["no", "yes"]
    for part in splits:
        assert part.rows is not None
        assert [row["text"][0] for row in part.rows] == ["pq"[d] for d in part["domain"].tolist()]


def test_a_domain_may_not_differ_in_what_is_said_of_the_whole(tmp_path: Path):
    name = write(tmp_path, "p", [{"text": "a", "label": 0}])
    with pytest.raises(BadInput, match=r"a domain may differ in name, .*, got 'limits'"):
        load({"name": name, "domains": [{"name": name, "limits": 3}]})
