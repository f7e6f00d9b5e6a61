"""Stages, pools, parts of networks that freeze and are renewed: what chains, generations and task streams rest on."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core import loop
from limbeck.core.batches import Batches, Table
from limbeck.core.ensemble import Ensemble, mean_logits
from limbeck.core.errors import BadInput, Interrupted, LimbeckError
from limbeck.core.loop import Clock, Plan, Stage, Turn, fit
from limbeck.core.nets import Batch, Nets, evaluating, reinitialised
from limbeck.core.taps import Taps


@dataclass(frozen=True)
class Steps:
    """Least squares in given stages; `seen` notes the first input of every batch."""

    plan: tuple[Stage, ...]
    seen: list[tuple[int, float]]

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        yield from self.plan

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        self.seen.append((clock.stage, float(batch["inputs"][0, 0])))
        yield "student", nets.student(batch["inputs"]).square().mean()


def student() -> Nets:
    torch.manual_seed(0)
    return Nets(student=nn.Linear(2, 1))


def numbered(start: int, count: int) -> list[Batch]:
    return [{"inputs": torch.full((1, 2), float(start + i))} for i in range(count)]


TWO = (Stage(3, "a", "one"), Stage(3, "b", "two"), Stage(2, "c", "one"))


def test_each_stage_reads_its_own_pool_from_the_start_or_where_an_iterator_stands():
    method = Steps(TWO, [])
    fit(method, student(), {"one": numbered(0, 9), "two": iter(numbered(50, 9))}, Plan(3))
    assert method.seen == [(0, 0), (0, 1), (0, 2), (1, 50), (1, 51), (1, 52), (2, 0), (2, 1)]
    with pytest.raises(BadInput, match="stage 'b' reads the data pool 'two', there is one"):
        fit(Steps(TWO, []), student(), {"one": numbered(0, 9)}, Plan(3))


@pytest.mark.parametrize("at", [(0, 1), (1, 0), (1, 2), (2, 0), (2, 1)])
def test_pools_that_cannot_tell_their_position_are_put_back(at: tuple[int, int], tmp_path: Path):
    def pools() -> dict[str, Any]:
        return {"one": numbered(0, 9), "two": iter(numbered(50, 9))}

    whole = Steps(TWO, [])
    end = fit(whole, student(), pools(), Plan(3, log_every=1, accumulate=1)).nets

    def stop(event: dict[str, Any]) -> None:
        if (event["stage"], event["t"]) == at:
            signal.raise_signal(signal.SIGTERM)

    cut = Steps(TWO, [])
    with pytest.raises(Interrupted):
        fit(cut, student(), pools(), Plan(3, log_every=1), folder=tmp_path, on_event=stop)
    again = fit(cut, student(), pools(), Plan(3, log_every=1), folder=tmp_path, resume=True).nets
    assert cut.seen == whole.seen
    assert torch.equal(again.student.weight, end.student.weight)


def test_data_that_end_say_so():
    with pytest.raises(BadInput, match="the data ended after 4 batches; training needs an endless stream"):
        fit(Steps((Stage(5),), []), student(), numbered(0, 4), Plan(5))
    with pytest.raises(BadInput, match="the data pool 'two' ended after 2 batches"):
        fit(Steps(TWO, []), student(), {"one": numbered(0, 9), "two": numbered(0, 2)}, Plan(3))


def test_a_time_limit_is_shared_out_over_the_stages(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    progress: dict[int, list[float]] = {}

    class Slow(Steps):
        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            now[0] += 60.0
            progress.setdefault(clock.stage, []).append(clock.progress)
            yield from super().step(nets, batch, clock)

    method = Slow((Stage(10**9, until=0.25), Stage(2, until=0.5), Stage(10**9)), [])
    fit(method, student(), iter(numbered(0, 99)), Plan(1, max_minutes=12))
    stages = [stage for stage, _ in method.seen]
    assert [stages.count(s) for s in range(3)] == [3, 2, 7]  # the second ended early, the third takes what is left
    assert progress[0] == pytest.approx([0, 1 / 3, 2 / 3]) and progress[2] == pytest.approx([i / 7 for i in range(7)])


def test_where_another_network_learns_nothing_is_selected():
    class Two(Steps):
        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            player = "helper" if clock.stage == 0 else "student"
            yield player, nets.find(player)(batch["inputs"]).square().mean()

    def validate(nets: Nets) -> dict[str, float]:
        looked.append(0.0)
        return {"score": -float(len(looked))}  # the first look is the best

    looked: list[float] = []
    ends: list[Nets] = []
    for select in ("score", ""):
        nets = student()
        nets.helper = nn.Linear(2, 1)
        plan = Plan(4, validate_every=1, select=select, optimizer={"sgd": {"lr": 0.01}})
        method = Two((Stage(4, validated=False), Stage(4)), [])
        fitted = fit(method, nets, iter(numbered(1, 99)), plan, validate=validate)
        assert [stage for stage, *_ in fitted.validations] == [1] * 4
        ends.append(nets)
    assert torch.equal(ends[0].helper.weight, ends[1].helper.weight)  # the last weights
    assert not torch.equal(ends[0].student.weight, ends[1].student.weight)  # the best and the last


def test_what_follows_the_last_turn_is_done_for_every_micro_batch():
    done: list[float] = []

    class Epilogue:
        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            yield "student", nets.student(batch["inputs"]).square().mean()
            done.append(float(batch["inputs"][0, 0]))

    fit(Epilogue(), student(), iter(numbered(0, 9)), Plan(2, accumulate=3))
    assert done == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("more_in_the_first", [True, False])
def test_micro_batches_that_take_different_turns_are_refused(more_in_the_first: bool):
    class Uneven:
        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            first = float(batch["inputs"][0, 0]) == 0
            for _ in range(2 if first == more_in_the_first else 1):
                yield "student", nets.student(batch["inputs"]).square().mean()

    with pytest.raises(LimbeckError, match="took different turns"):
        fit(Uneven(), student(), iter(numbered(0, 9)), Plan(1, accumulate=2))


# ---------------------------------------------------------------- networks
class Block(nn.Module):
    """A linear layer, batch norm and dropout."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.norm(self.linear(x)))
        return out


def test_a_part_of_a_list_can_be_frozen():
    nets = Nets(peers=nn.ModuleList([Block(), Block()]))
    nets.freeze("peers.0")
    nets.train()
    assert not any(m.training for m in nets.peers[0].modules()) and nets.peers[1].training
    x = {"inputs": torch.randn(4, 3)}
    assert not nets.run("peers.0", x)["logits"].requires_grad and nets.run("peers.1", x)["logits"].requires_grad
    assert nets.params("peers.0") == [] and len(nets.params("peers.1")) == 4
    assert nets.is_frozen("peers.0") and nets.is_frozen("peers.0.linear") and not nets.is_frozen("peers")
    nets.thaw("peers.0")
    assert nets.peers[0].training and len(nets.params("peers.0")) == 4


def test_gradient_can_pass_through_a_frozen_network():
    nets = Nets(teacher=Block())
    x = torch.randn(4, 3, requires_grad=True)
    assert not nets.run("teacher", {"inputs": x})["logits"].requires_grad
    nets.run("teacher", {"inputs": x}, through=True)["logits"].sum().backward()
    assert x.grad is not None and all(p.grad is None for p in nets.teacher.parameters())


def test_a_fresh_network_comes_from_the_factory_or_is_initialised_anew():
    nets = Nets(student=Block())
    with torch.no_grad():
        for value in nets.student.state_dict().values():
            value.fill_(7)
    nets.freeze("student")
    fresh = nets.fresh("student")
    assert fresh is not nets.student and "student" in nets and (nets.student.linear.weight == 7).all()
    assert (
        fresh.linear.weight.abs().max() < 1
        and (fresh.norm.running_mean == 0).all()
        and fresh.norm.num_batches_tracked == 0
    )
    assert all(p.requires_grad for p in fresh.parameters())
    assert not torch.equal(nets.fresh("student").linear.weight, fresh.linear.weight)
    nets.factories["student"] = lambda: nn.Linear(5, 5)
    assert nets.fresh("student").in_features == 5
    with pytest.raises(BadInput, match="how to build a fresh 'studnet'; did you mean `student`"):
        nets.fresh("studnet")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(BadInput, match=r"inner \(Module\) cannot be initialised anew: it has no reset_parameters"):
        reinitialised(Own())


def test_fresh_networks_of_a_run_differ_from_those_built_under_its_seed():
    class Fresh:
        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            made.append(nets.fresh("student").weight.detach().clone())
            yield "student", nets.student(batch["inputs"]).square().mean()

    made: list[Tensor] = []
    torch.manual_seed(5)
    nets = Nets(student=nn.Linear(2, 1))
    start = nets.student.weight.detach().clone()
    fit(Fresh(), nets, iter(numbered(0, 9)), Plan(2, seed=5))
    assert not torch.equal(made[0], start) and not torch.equal(made[1], made[0])
    after = torch.rand(3)
    torch.manual_seed(5)
    nn.Linear(2, 1)
    assert torch.equal(torch.rand(3), after)  # nor does the run reach what is built after it


def test_a_retired_network_keeps_its_taps_and_the_new_one_gets_its_own():
    nets = Nets(student=Block(), past=nn.ModuleList())
    nets.freeze("past")
    nets.taps["student"] = Taps(nets.student, {"feats": ["linear", "norm"], "emb": "drop"})
    old = nets.student
    nets.retire("student", "past")
    assert nets.past[0] is old and nets.student is not old and nets.is_frozen("past.0")
    nets.train()
    x = {"inputs": torch.randn(4, 3)}
    for player, net in (("student", nets.student), ("past.0", old)):
        out = nets.run(player, x)
        assert [f.shape for f in out["feats"]] == [(4, 3), (4, 3)]
        assert torch.equal(out["feats"][0], net.linear(x["inputs"])) and out["feats"][0].requires_grad == (
            player == "student"
        )
    for taps in nets.taps.values():
        taps.remove()
    assert not any(m._forward_hooks for net in (old, nets.student) for m in net.modules())


def test_evaluating_puts_every_layer_back():
    block, other = Block(), Block()
    block.norm.eval()
    with evaluating(block, other):
        assert not any(m.training for net in (block, other) for m in net.modules())
    assert block.training and not block.norm.training and block.drop.training and other.norm.training


def test_an_ensemble_is_the_mean_of_probabilities():
    nets = [nn.Linear(3, 4) for _ in range(3)]
    x = 30 * torch.randn(5, 3)
    wanted = torch.stack([n(x).softmax(-1) for n in nets]).mean(0)
    assert torch.allclose(Ensemble(nets)(x)["logits"].exp(), wanted, atol=1e-6)
    weights = torch.softmax(torch.randn(3, 5), 0)
    weights[:, 0] = torch.tensor([1.0, 0.0, 0.0])
    logits = torch.stack([n(x) for n in nets])
    mixed = mean_logits(logits, weights)
    assert torch.allclose(mixed.exp(), (weights[..., None] * logits.softmax(-1)).sum(0), atol=1e-6)
    assert torch.isfinite(mixed).all()
    with pytest.raises(BadInput, match="at least one member"):
        Ensemble([])


def test_batches_of_a_table_go_on_in_the_next_stage():
    table = Table({"inputs": torch.arange(12.0).repeat(2, 1).T})
    method = Steps((Stage(2), Stage(2)), [])
    fit(method, student(), Batches(table, 2, shuffle=False), Plan(2))
    assert method.seen == [(0, 0), (0, 2), (1, 4), (1, 6)]
