"""What the catalogue promises of networks that learn as a group, and of students with several teachers."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core import knobs
from limbeck.core.batches import Batches, Table
from limbeck.core.branches import Branches
from limbeck.core.consensus import Errors, covariance_weights, linear_weights, losses, min_logit, mixed, naive
from limbeck.core.ema import sigmoid_rampup
from limbeck.core.errors import BadInput
from limbeck.core.group import Roles, entropy
from limbeck.core.loop import Clock, Fitted, Plan, fit
from limbeck.core.nets import Nets, evaluating
from limbeck.core.privacy import ORDERS, Ledger, epsilon, log_q, noisy_vote, rdp
from limbeck.core.selection import Episode, Policy, log_chance, states
from limbeck.core.similarity import parc, powers, ranks
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd
from limbeck.losses.logits.meal_v2 import MealV2
from limbeck.losses.logits.reverse_kl import reverse_kl
from limbeck.train.many.distill_weighted import DistillWeighted
from limbeck.train.many.orc import ORC
from limbeck.train.many.pate import PATE
from limbeck.train.many.rl_kd import RLKD
from limbeck.train.online.bd_kd import BDKD
from limbeck.train.online.kdcl import KDCL
from tests.numbers import reference

CLASSES, WIDTH, EXAMPLES, SIZE = 4, 6, 40, 8
NOW = Clock(0, 10)


pytestmark = pytest.mark.usefixtures("one_thread")


class Mlp(nn.Module):
    """Three layers, the second with batch norm: {"logits", "feats", "emb"} of vectors."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(WIDTH, 5), nn.Linear(5, 7), nn.BatchNorm1d(5)
        self.head = nn.Linear(7, classes)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        shallow = self.norm(self.first(inputs)).relu()
        deep = self.second(shallow).relu()
        return {"logits": self.head(deep), "feats": [shallow, deep], "emb": deep}


def table() -> Table:
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(EXAMPLES) % CLASSES
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=g)
    return Table({"inputs": centres[labels] + torch.randn(EXAMPLES, WIDTH, generator=g), "labels": labels})


def first_batch() -> dict[str, Tensor]:
    return next(Batches(table(), SIZE, seed=3))


def run(name: str, given: dict[str, Any], nets: Nets, **plan: Any) -> Fitted:
    options: dict[str, Any] = {"steps": 6, "optimizer": {"sgd": {"lr": 0.1}}, "log_every": 1} | plan
    return fit(knobs.make(name, given), nets, Batches(table(), SIZE, seed=3), Plan(**options))


def exact(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def say(*logits: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (SIZE,))
    return torch.stack(logits) if logits else 2 * torch.randn(3, SIZE, CLASSES, dtype=torch.float64), labels


# ---------------------------------------------------------------- one_ensemble: branches, a gate, and their mixture


def test_one_ensemble_agrees_with_the_official_code() -> None:
    case = reference("one_ensemble")
    gate = Branches((), [nn.Identity(), nn.Identity()], 32).double()
    gate.gate.load_state_dict({k: exact(v) for k, v in case["gate"].items()})
    gate.norm.load_state_dict({k: exact(v) for k, v in case["norm"].items()}, strict=False)
    chances = gate.chances(exact(case["feature"]))
    assert torch.allclose(chances, exact(case["chances"]), rtol=1e-12)

    logits, labels = exact(case["logits"]).requires_grad_(), torch.tensor(case["labels"])
    method = knobs.make("one_ensemble", {})
    mixture = (chances.detach().mT.unsqueeze(-1) * logits).sum(0)

    class Said(nn.Module):
        def run(self, *_: Any) -> tuple[Tensor, Tensor]:
            return logits, chances.detach()

    clock = Clock(20, 301)  # progress 20 / 300
    ((_, parts),) = method.step(Nets(student=Mlp(), branches=Said()), {"inputs": logits, "labels": labels}, clock)
    value = sum(part.value for part in parts.values())
    (grad,) = torch.autograd.grad(value, logits)
    assert mixture.shape == logits.shape[1:]
    assert value.item() == pytest.approx(case["value"], rel=2e-6)  # the code adds 1e-7 to each target probability
    assert torch.allclose(grad, exact(case["grad"]), atol=2e-6)
    assert sigmoid_rampup(20 / 300, 80 / 300) == pytest.approx(math.exp(-5 * 0.75**2))


def branched() -> Nets:
    nets = Nets(student=Mlp())
    nets.factories["student"] = Mlp
    knobs.make("one_ensemble", {"begin": "second"}).setup(nets, first_batch())
    return nets


def test_gate_is_a_distribution_and_the_student_stays_plain() -> None:
    nets = branched()
    logits, gate = nets.branches.run(nets, "student", first_batch())
    assert logits.shape == (3, SIZE, CLASSES)
    assert (gate >= 0).all() and torch.allclose(gate.sum(-1), torch.ones(SIZE))
    assert sum(p.numel() for p in nets.student.parameters()) == sum(p.numel() for p in Mlp().parameters())
    assert not nets.student._forward_hooks and "forward" not in nets.student.head.__dict__


def test_branches_share_the_trunk_alone_and_run_it_once() -> None:
    nets = branched()
    batch, student = first_batch(), nets.student
    logits, _ = nets.branches.run(nets, "student", batch)
    assert int(student.norm.num_batches_tracked) == 1
    for k, own in enumerate(nets.branches.own):
        whole = copy.deepcopy(student)
        whole.second, whole.head = own
        whole.norm.momentum = 0.0
        assert torch.allclose(whole(batch["inputs"])["logits"], logits[k + 1], atol=1e-6)
    grads = torch.autograd.grad(logits[1].sum(), [student.first.weight, student.head.weight])
    assert grads[0].any() and not grads[1].any()


class InPlace(Mlp):
    """The same with a residual sum and rectifiers that write over what the layers returned."""

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        shallow = self.norm(self.first(inputs))
        shallow += inputs[:, :5]
        return {"logits": self.head(self.second(shallow.relu_()).relu_())}


def test_branches_read_the_trunk_as_it_was_where_the_network_writes_in_place() -> None:
    nets = Nets(student=InPlace())
    nets.factories["student"] = InPlace
    knobs.make("one_ensemble", {"begin": "second"}).setup(nets, first_batch())
    logits, _ = nets.branches.run(nets, "student", first_batch())
    for k, own in enumerate(nets.branches.own):
        whole = copy.deepcopy(nets.student)
        whole.second, whole.head = own
        assert torch.allclose(whole(first_batch()["inputs"])["logits"], logits[k + 1], atol=1e-6)
    logits.sum().backward()


def test_kl_part_is_zero_when_all_branches_agree() -> None:
    nets = branched()
    for own in nets.branches.own:
        own[0].load_state_dict(nets.student.second.state_dict())
        own[1].load_state_dict(nets.student.head.state_dict())
    ((_, parts),) = knobs.make("one_ensemble", {"begin": "second"}).step(nets, first_batch(), NOW)
    assert abs(float(parts["kl"])) < 1e-9 < float(parts["ce"])


def test_shared_layers_may_not_come_after_branches() -> None:
    nets = Nets(student=Mlp())
    nets.factories["student"] = Mlp
    nets.student.forward = lambda x: Mlp.forward(nets.student, nets.student.head.weight.new_zeros(len(x), WIDTH) + x)
    method = knobs.make("one_ensemble", {"begin": "head"})
    method.setup(nets, first_batch())
    nets.branches.layers = ("second",)
    with pytest.raises(BadInput, match="after branches part"):
        nets.branches.run(nets, "student", first_batch())
    with pytest.raises(BadInput, match="at 'heat'"):
        knobs.make("one_ensemble", {"begin": "heat"}).setup(nets, first_batch())


# ---------------------------------------------------------------- kdcl: targets that are better than any member


def test_min_logit_is_at_least_as_sure_of_the_label_as_any_member() -> None:
    logits, labels = say()
    target = min_logit(logits, labels)
    members = logits.softmax(-1).gather(-1, labels.expand(3, -1).unsqueeze(-1))[..., 0]
    mine = target.softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert (mine >= members.amax(0) - 1e-12).all() and (mine > members.amax(0) + 1e-6).any()
    assert (target.gather(-1, labels[:, None]) == 0).all()
    by_hand = [[min(float(z[n, j] - z[n, labels[n]]) for z in logits) for j in range(CLASSES)] for n in range(SIZE)]
    assert torch.allclose(target, exact(by_hand))


def test_naive_takes_whoever_explains_an_example_best() -> None:
    logits, labels = say()
    for n in range(SIZE):
        each = [F.cross_entropy(z[n : n + 1], labels[n : n + 1]).item() for z in logits]
        assert torch.equal(naive(logits, labels)[n], logits[each.index(min(each)), n])


def test_linear_weights_are_on_the_simplex_and_not_worse_than_the_best() -> None:
    for _ in range(5):
        logits, labels = say()
        logits += 1.5 * F.one_hot(labels, CLASSES) * torch.rand(3, SIZE, 1)
        weights = linear_weights(logits, labels)
        assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1)
        found = F.cross_entropy(mixed(weights, logits), labels).item()
        assert found <= losses(logits, labels).mean(1).min().item() + 1e-12
        grid = [i / 20 for i in range(21)]
        for a, b in itertools.product(grid, grid):
            if a + b <= 1:
                other = F.cross_entropy(mixed(exact([a, b, 1 - a - b]), logits), labels).item()
                assert found <= other + 1e-6


def test_general_weights_invert_the_covariance_of_errors_an_epoch_later() -> None:
    logits, labels = say()
    memory = Errors(3)
    memory.add(logits, labels, torch.ones(SIZE, dtype=torch.bool), 0)
    assert torch.equal(memory.weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    memory.add(logits, labels, torch.zeros(SIZE, dtype=torch.bool), 1)
    errors = (logits.softmax(-1) - F.one_hot(labels, CLASSES)).numpy().reshape(3, -1)
    inverse = np.linalg.inv(errors @ errors.T / SIZE)
    assert np.allclose(memory.weights, inverse.sum(1) / inverse.sum(), atol=1e-4)
    assert covariance_weights(torch.diag(exact([1.0, 2.0, 4.0]))).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7], 1e-5)


@pytest.mark.parametrize("target", ["naive", "linear", "min_logit", "general"])
def test_kdcl_targets_are_constants_and_unlabelled_examples_do_not_count(target: Any) -> None:
    nets = Nets(peers=nn.ModuleList([Mlp(), Mlp(), Mlp()]))
    method = KDCL(target=target, peers=3)
    batch = first_batch()
    batch["labels"][0] = -100
    method.setup(nets, batch)
    turns = list(method.step(nets, batch, NOW))
    other = batch | {"labels": batch["labels"].clone(), "inputs": batch["inputs"].clone()}
    for k, (player, parts) in enumerate(turns):
        value = sum(part.value for part in parts.values())
        used = torch.autograd.grad(value, list(nets.peers.parameters()), allow_unused=True, retain_graph=True)
        per = len(used) // 3
        assert player == f"peers.{k}"
        assert all((g is None) == (i // per != k) for i, g in enumerate(used))
        assert math.isfinite(value.item()) and other["labels"][0] == -100
    if target == "min_logit":
        with torch.no_grad():
            said = [net(batch["inputs"])["logits"] for net in nets.peers]
        aim = min_logit(torch.stack(said)[:, 1:], batch["labels"][1:])
        wanted = kd(said[0][1:], aim, temperature=2.0).mean().item()
        assert float(turns[0][1]["kl"]) == pytest.approx(wanted, rel=1e-5)


def test_kdcl_does_not_learn_from_what_is_held_out() -> None:
    method = KDCL(target="general", held_out=0.5)
    apart = method.apart(torch.arange(1000))
    assert 400 < int(apart.sum()) < 600 and torch.equal(apart, method.apart(torch.arange(1000)))
    nets = Nets(peers=nn.ModuleList([Mlp(), Mlp()]))
    batch = first_batch()
    method.setup(nets, batch)
    mine = ~method.apart(batch["index"])
    assert 0 < int(mine.sum()) < SIZE
    _, parts = next(iter(method.step(nets, batch, NOW)))
    with torch.no_grad():
        said = nets.peers[0](batch["inputs"])["logits"]
    assert float(parts["ce"]) == pytest.approx(F.cross_entropy(said[mine], batch["labels"][mine]).item(), rel=1e-5)


# ---------------------------------------------------------------- bd_kd: two divergences, balanced by entropy


def test_bd_kd_stresses_the_divergence_that_mends_the_gap() -> None:
    student = exact([[6.0, 0.0, 0.0], [0.5, 0.0, 0.2]])
    partner = exact([[1.0, 0.5, 0.0], [4.0, 0.0, 0.0]])
    assert (entropy(student) < entropy(partner)).tolist() == [True, False]
    p, q = partner.softmax(-1).numpy(), student.softmax(-1).numpy()
    forward, reverse = (p * np.log(p / q)).sum(-1), (q * np.log(q / p)).sum(-1)
    wanted = [2 * 0.7 * forward[0] + 0.3 * reverse[0], 0.7 * forward[1] + 2 * 0.3 * reverse[1]]
    assert BDKD(forward=0.7, reverse=0.3).balanced(student, partner).tolist() == pytest.approx(wanted, rel=1e-9)


def test_bd_kd_without_reverse_and_stress_teaches_the_student_as_dml() -> None:
    start = nn.ModuleList([Mlp(), Mlp()])
    given = {"bd_kd": {"reverse": 0.0, "stress": 1.0}, "dml": {}}
    turns = [run(n, g, Nets(peers=copy.deepcopy(start)), steps=1).turns[0] for n, g in given.items()]
    assert turns[0][3] == pytest.approx(turns[1][3], rel=1e-6)


def test_bd_kd_is_zero_at_match_and_reaches_its_own_network_alone() -> None:
    said = torch.randn(SIZE, CLASSES, dtype=torch.float64)
    assert BDKD().balanced(said, said).abs().max() < 1e-12
    nets = Nets(peers=nn.ModuleList([Mlp(), Mlp()]))
    for k, (player, parts) in enumerate(BDKD().step(nets, first_batch(), NOW)):
        used = torch.autograd.grad(parts["kl"].value, list(nets.peers.parameters()), allow_unused=True)
        assert player == f"peers.{k}"
        assert all((g is None) == (i // (len(used) // 2) != k) for i, g in enumerate(used))
        if k:
            with torch.no_grad():
                mine, its = (net(first_batch()["inputs"])["logits"] for net in nets.peers)
            assert float(parts["kl"]) == pytest.approx(reverse_kl(its, mine).mean().item(), rel=1e-5)


# ---------------------------------------------------------------- orc: roles that change


def schoolroom(**given: Any) -> tuple[ORC, Nets]:
    nets = Nets(student=Mlp(), teacher=Mlp())
    nets.factories["student"] = Mlp
    method = ORC(**given)
    method.setup(nets, first_batch())
    return method, nets


def test_orc_groups_are_disjoint_and_cover_the_pool() -> None:
    method, nets = schoolroom()
    seen = set()
    for best in (-1, 0, 1, 2):
        nets.roles.promoted.fill_(best)
        teachers, students = method.groups(nets)
        assert not set(teachers) & set(students)
        assert {*teachers, *students} == {"mentor", "student", "peers.0", "peers.1"}
        seen.add(tuple(teachers))
    assert seen == {("mentor",), ("mentor", "student"), ("mentor", "peers.0"), ("mentor", "peers.1")}


def test_orc_promotes_whoever_is_best_on_the_batch() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    right = 3.0 * F.one_hot(labels, CLASSES)
    poor = right.clone()
    poor[0] = torch.tensor([0.0, 3.0, 0.0, 0.0])
    roles = Roles(3, 0.5)
    everywhere = torch.ones(4, dtype=torch.bool)
    roles.note(torch.stack([poor, right, 2 * right]), labels, everywhere)
    roles.change()
    assert int(roles.promoted) == 2 and roles.record.tolist() == [0.375, 0.5, 0.5]
    roles.note(torch.stack([poor, right, 2 * right]), labels, torch.tensor([True, False, False, False]))
    roles.note(torch.stack([2 * right, right, poor]), labels, everywhere)
    roles.change()
    assert int(roles.promoted) == 1  # right in both micro-batches


def test_orc_promotes_another_for_the_next_batch() -> None:
    labels, roles = torch.tensor([0, 1, 2, 3]), Roles(3, 0.5)
    logits = F.one_hot(labels, CLASSES) * torch.tensor([3.0, 2.0, 1.0]).view(3, 1, 1)  # the first is always best
    promoted = []
    for _ in range(4):
        roles.note(logits, labels, torch.ones(4, dtype=torch.bool))
        roles.change()
        promoted.append(int(roles.promoted))
    assert promoted == [0, 1, 0, 1] and roles.record.tolist() == [0.9375] * 3


def test_orc_runs_its_phases_in_order_and_keeps_the_best() -> None:
    nets = Nets(student=Mlp(), teacher=Mlp())
    nets.factories["student"] = Mlp
    still = copy.deepcopy(nets.teacher.state_dict())
    done = run("orc", {"others": 2}, nets, steps=5)
    by_step = [[p for _, s, p, _ in done.turns if s == t] for t in range(5)]
    assert by_step[0] == ["mentor", "student", "peers.0", "peers.1"]
    for players in by_step[1:]:
        assert players[0] == "mentor" and len(players) == 4
        assert players[2:] == [p for p in ("student", "peers.0", "peers.1") if p != players[1]]
    assert all(torch.equal(still[k], v) for k, v in nets.teacher.state_dict().items())
    best = int(nets.roles.record.argmax())
    kept = [nets.student, *nets.peers][best].state_dict()
    assert all(torch.equal(kept[k], v) for k, v in nets.student.state_dict().items())


def test_orc_teachers_relearn_what_students_missed() -> None:
    method, nets = schoolroom()
    batch = first_batch()
    for net in nets.peers:
        net.load_state_dict(nets.student.state_dict())
    with torch.no_grad():
        batch["labels"][:3] = nets.student(batch["inputs"])["logits"].argmax(-1)[:3]
        batch["labels"][3:] = (nets.student(batch["inputs"])["logits"].argmax(-1)[3:] + 1) % CLASSES
    players = iter(method.step(nets, batch, NOW))
    player, parts = next(players)
    with torch.no_grad():
        said = [net(batch["inputs"])["logits"].argmax(-1) for net in (nets.student, *nets.peers)]
        mentor = nets.mentor(batch["inputs"])["logits"]
    missed = (torch.stack(said) != batch["labels"]).any(0)
    assert player == "mentor" and missed.tolist() == 3 * [False] + (SIZE - 3) * [True]
    wanted = F.cross_entropy(mentor[missed], batch["labels"][missed]).item()
    assert float(parts["relearned"]) == pytest.approx(wanted, rel=1e-5)


def test_orc_without_roles_is_kd() -> None:
    method, nets = schoolroom(promote=False, intensive=0.0, weight=0.7)
    nets.roles.promoted.fill_(1)
    batch = first_batch()
    turns = dict(method.step(nets, batch, NOW))
    assert list(turns) == ["student", "peers.0", "peers.1"]
    with torch.no_grad():
        teacher, mine = nets.run("teacher", batch)["logits"], nets.peers[1](batch["inputs"])["logits"]
    assert float(turns["peers.1"]["ce"]) == pytest.approx(ce(mine, batch["labels"]).mean().item(), rel=1e-5)
    assert float(turns["peers.1"]["kl"]) == pytest.approx(0.7 * kd(mine, teacher).mean().item(), rel=1e-4)


# ---------------------------------------------------------------- meal_v2: an average, and a judge


def test_meal_v2_without_judge_pulls_towards_the_mean_of_probabilities() -> None:
    logits, _ = say()
    student = torch.randn(SIZE, CLASSES, dtype=torch.float64, requires_grad=True)
    loss = MealV2((SIZE, CLASSES), discriminator=0.0).double()
    for teachers in (logits[:1], logits):
        (grad,) = torch.autograd.grad(loss(student, teachers).sum(), student)
        assert torch.allclose(grad, student.softmax(-1) - teachers.softmax(-1).mean(0), atol=1e-12)


def test_meal_v2_student_works_against_the_judge_when_adversarial() -> None:
    logits, _ = say()
    student = torch.randn(SIZE, CLASSES, dtype=torch.float64, requires_grad=True)
    loss, grads, judges = MealV2((SIZE, CLASSES)).double(), [], []
    for weight, adversarial in ((0.0, True), (1.0, True), (1.0, False)):
        loss.discriminator, loss.adversarial = weight, adversarial
        value = loss(student, logits).sum()
        wanted = [student, *(loss.judge.parameters() if weight else ())]
        grad, *judge = torch.autograd.grad(value, wanted)
        grads.append(grad)
        judges.append(judge)
    assert torch.allclose(grads[1] - grads[0], grads[0] - grads[2]) and not torch.allclose(grads[0], grads[1])
    assert all(torch.equal(a, b) for a, b in zip(judges[1], judges[2], strict=True))


def test_meal_v2_shows_all_the_same_pictures() -> None:
    nets = Nets(student=Mlp(), teachers=nn.ModuleList([Mlp(), Mlp()]))
    seen: list[Tensor] = []
    for net in (nets.student, *nets.teachers):
        net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run("several_teachers", {"match": ("meal_v2",)}, nets, steps=1)
    last = seen[-3:]
    assert all(torch.equal(last[0], other) for other in last)


# ---------------------------------------------------------------- pate: votes and their price


@pytest.mark.parametrize("case", ["laplace 5.0", "laplace 20.0", "gaussian 10.0", "gaussian 40.0"])
def test_privacy_agrees_with_the_official_accounting(case: str) -> None:
    told = reference("pate")
    noise, scale = case.split()[0], float(case.split()[1])
    orders, wanted = exact(told["orders"]), told[case]
    wrong = log_q(exact(told["counts"]), noise, scale)
    costs = rdp(noise, scale, orders, wrong)
    assert wrong.tolist() == pytest.approx(wanted["log_q"], rel=1e-9)
    assert torch.allclose(costs, exact(wanted["rdp"]), rtol=1e-9, atol=1e-300)
    assert epsilon(costs.sum(0), orders, told["delta"]) == pytest.approx(wanted["epsilon"], rel=1e-9)
    assert (costs <= rdp(noise, scale, orders)).all() and (costs[2] < rdp(noise, scale, orders)).any()


def test_epsilon_grows_with_queries_and_with_gamma() -> None:
    orders = exact(ORDERS)
    for noise in ("laplace", "gaussian"):
        spent = [epsilon(n * rdp(noise, s, orders), orders, 1e-5) for s, n in ((20, 10), (20, 100), (5, 100))]
        assert spent[0] < spent[1] < spent[2]


def test_votes_without_noise_are_the_plurality_and_noise_has_its_scale() -> None:
    counts = torch.tensor([[3, 5, 2], [9, 0, 1]])
    for noise in ("laplace", "gaussian"):
        assert noisy_vote(counts, noise, 0.0).tolist() == [1, 0]
        lost = (noisy_vote(torch.tensor([[4.0, 0.0]]).expand(20000, 2), noise, 2.0) == 1).double().mean().item()
        exactly = {
            "laplace": (2 + 2) / (4 * math.exp(2)),
            "gaussian": 0.5 * math.erfc(4 / (2 * math.sqrt(2)) / math.sqrt(2)),
        }
        assert lost == pytest.approx(exactly[noise], abs=0.008)


def test_pate_parts_are_disjoint_and_cover_the_private_data() -> None:
    method = PATE(voters=5, public=0.25)
    whose = method.whose(torch.arange(4000))
    assert torch.equal(whose.unique(), torch.arange(6)) and torch.equal(whose, method.whose(torch.arange(4000)))
    assert (whose.bincount() / 4000).tolist() == pytest.approx([0.15] * 5 + [0.25], abs=0.03)


def test_pate_voters_see_their_part_and_the_student_only_what_was_voted() -> None:
    nets = Nets(student=Mlp())
    nets.factories["student"] = Mlp
    method, rows = PATE(voters=2, public=0.5, queries=6, scale=0.0), table()
    batch = {"inputs": rows["inputs"], "labels": rows["labels"], "index": torch.arange(EXAMPLES)}
    method.setup(nets, batch)
    whose, seen = method.whose(batch["index"]), {}
    for name, net in (("voters.0", nets.voters[0]), ("voters.1", nets.voters[1]), ("student", nets.student)):
        net.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
    for k, (player, _) in enumerate(method.step(nets, batch, NOW)):
        assert torch.equal(seen[player], batch["inputs"][whose == k])
    nets.freeze("voters")
    batch["labels"] = torch.where(whose == 2, 0, batch["labels"])  # public labels are not read
    list(method.step(nets, batch, Clock(0, 10, stage=1)))
    asked = (whose == 2).nonzero()[:6, 0]
    with torch.no_grad():
        votes = [net.eval()(batch["inputs"][asked])["logits"].argmax(-1) for net in nets.voters]
    counts = sum(F.one_hot(v, CLASSES) for v in votes)
    assert torch.equal(nets.ledger.labels, counts.argmax(-1)) and int(nets.ledger.asked) == 6
    assert {tuple(x) for x in seen["student"].tolist()} == {tuple(x) for x in batch["inputs"][asked].tolist()}
    assert method.figures(nets) == {"labels_voted": 6, "epsilon": math.inf, "epsilon_of_votes": math.inf}


def test_pate_shows_no_network_what_is_not_its_own() -> None:
    nets = Nets(student=Mlp())
    nets.factories["student"] = Mlp
    method, rows = PATE(voters=3, public=0.3, queries=6), table()
    whose = method.whose(torch.arange(EXAMPLES))
    method.setup(nets, {**rows.columns, "index": torch.arange(EXAMPLES)})
    nets.train()
    for count in (1, 5):  # batch norm knows no deviation of a single row
        mine = (whose == 1).nonzero()[:count, 0]
        batch = {"inputs": 100 + rows["inputs"][mine], "labels": rows["labels"][mine], "index": mine}
        list(method.step(nets, batch, NOW))
        list(method.step(nets, batch, Clock(0, 10, stage=1)))
    means = [net.norm.running_mean for net in (*nets.voters, nets.student)]
    assert [bool(m.any()) for m in means] == [False, True, False, False]


def test_pate_pays_for_a_query_once() -> None:
    ledger = Ledger(10, torch.zeros(1, 2), 3)
    public = torch.tensor([True, True, False, True, True])
    index, inputs, votes = torch.arange(5), torch.randn(5, 2), torch.tensor([[8, 2]] * 5)
    for _ in range(2):
        new = ledger.new(index, public)
        ledger.ask(index[new], inputs[new], votes[new], "gaussian", 4.0)
    assert int(ledger.asked) == 3 and ledger.slot.tolist()[:5] == [0, 1, -1, 2, -1]
    assert torch.allclose(ledger.free, 3 * rdp("gaussian", 4.0, ledger.orders))


# ---------------------------------------------------------------- rl_kd: a policy over teachers


def test_log_chance_is_a_sum_of_bernoulli_ones_and_its_slope_is_action_minus_chance() -> None:
    odds = torch.randn(3, SIZE, dtype=torch.float64, requires_grad=True)
    actions = torch.bernoulli(torch.full((3, SIZE), 0.5))
    found = log_chance(odds, actions)
    p = odds.detach().sigmoid().numpy()
    wanted = np.where(actions.numpy() > 0, np.log(p), np.log(1 - p)).sum(0)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-9)
    (grad,) = torch.autograd.grad(found.sum(), odds)
    assert torch.allclose(grad, actions - odds.detach().sigmoid(), atol=1e-12)


def test_an_episode_holds_the_policy_gradient_of_its_batches() -> None:
    policy, episode = Policy(5, 0.7), Episode(5, 0.0, 2)
    seen, counts = torch.randn(2, 2, SIZE, 5), torch.arange(SIZE) > 2
    assert policy(seen[0]).sigmoid().flatten().tolist() == pytest.approx([0.7] * 2 * SIZE)
    total = torch.zeros(())
    for batch, reward in zip(seen, (-1.5, 0.4), strict=True):
        odds = policy(batch)
        actions = torch.bernoulli(odds.detach().sigmoid())
        episode.add(batch, odds.detach(), actions, torch.tensor(reward), counts)
        total = total - reward * (log_chance(odds, actions) * counts).sum()
    wanted = torch.autograd.grad(total / (2 * counts.sum()), list(policy.parameters()))
    found = torch.autograd.grad(episode.objective(policy), list(policy.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))
    episode.end()
    assert not episode.weight.any() and not episode.bias.any()


def test_all_teachers_selected_is_their_uniform_mean() -> None:
    logits, labels = say()
    student = torch.randn(SIZE, CLASSES, dtype=torch.float64)
    method = RLKD(temperature=3.0)
    everyone = torch.ones(3, SIZE, dtype=torch.float64)
    uniform = torch.stack([kd(student, z, temperature=3.0) for z in logits]).mean(0)
    assert torch.allclose(method.taught(student, logits, everyone), uniform)
    some = everyone.clone()
    some[1], some[:, 0] = 0.0, 0.0
    taught = method.taught(student, logits, some)
    pair = torch.stack([kd(student, z, temperature=3.0) for z in (logits[0], logits[2])]).mean(0)
    assert taught[0] == 0 and torch.allclose(taught[1:], pair[1:])
    view = states({"logits": student}, logits, labels)
    assert view.shape == (3, SIZE, 2 * CLASSES + 1)
    assert torch.allclose(view[1, :, -1], F.cross_entropy(logits[1], labels, reduction="none").float())


def test_a_policy_learns_to_leave_out_who_is_always_wrong() -> None:
    g = torch.Generator().manual_seed(2)
    policy, episode = Policy(3, 0.5), Episode(3, 0.9, 2)
    seen = torch.stack([torch.tensor([1.0, 0.0, 0.1]), torch.tensor([0.0, 1.0, 3.0])])[:, None].expand(2, 1, 3)
    climb = torch.optim.SGD(policy.parameters(), 0.5)
    for _ in range(300):
        with torch.no_grad():
            odds = policy(seen)
        actions = torch.bernoulli(odds.sigmoid(), generator=g)
        episode.add(seen, odds, actions, actions[0, 0] - actions[1, 0], torch.ones(1, dtype=torch.bool))
        climb.zero_grad()
        episode.objective(policy).backward()
        climb.step()
        episode.end()
    chances = policy(seen).sigmoid()[:, 0].tolist()
    assert chances[0] > 0.8 and chances[1] < 0.2


def test_a_reward_is_read_with_the_statistics_of_the_batch_and_moves_none() -> None:
    """Running statistics lag behind a student that moves fast: read with them, rewards fell to -1327."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))
    nets = Nets(student=student, teachers=nn.ModuleList(nn.Linear(4, CLASSES) for _ in range(2)))
    batch = {"inputs": 5 + torch.randn(SIZE, 4), "labels": torch.arange(SIZE) % CLASSES}
    spec = RLKD(baseline=0.0)
    spec.setup(nets, batch)
    student.train()
    (_,) = spec.step(nets, batch, Clock(1, 10))
    assert int(student[1].num_batches_tracked) == 1
    wanted = -F.cross_entropy(copy.deepcopy(student)(batch["inputs"]), batch["labels"])
    assert float(nets.episode.mean) == pytest.approx(float(wanted), rel=1e-5)
    told = spec.figures(nets)
    assert set(told) == {"chosen_teacher_0", "chosen_teacher_1"} and all(0 < rate <= 1 for rate in told.values())
    assert int(nets.episode.offered) == SIZE


# ---------------------------------------------------------------- distill_weighted: sources by their likeness


def test_parc_of_the_labels_themselves_is_one_and_ranks_share_ties() -> None:
    from scipy.stats import rankdata, spearmanr

    labels = torch.arange(12) % 4
    assert parc(F.one_hot(labels).float(), labels, components=0).item() == pytest.approx(1)
    values = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])
    assert ranks(values).tolist() == rankdata(values.numpy()).tolist()
    features = torch.randn(12, 6, dtype=torch.float64)
    i, j = np.tril_indices(12, -1)
    far = (1 - np.corrcoef(features.numpy()))[i, j]
    other = (labels.numpy()[i] != labels.numpy()[j]).astype(float)
    assert parc(features, labels, components=0).item() == pytest.approx(spearmanr(far, other).statistic, rel=1e-9)
    centred = features.numpy() - features.numpy().mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    near = (1 - np.corrcoef(centred @ vectors[:, -2:]))[i, j].round(9)
    assert parc(features, labels, components=2).item() == pytest.approx(spearmanr(near, other).statistic, rel=1e-6)


def test_weights_of_sources() -> None:
    scores = exact([0.4, -0.1, 0.2])
    assert powers(scores, 2.0).tolist() == pytest.approx([0.8, 0.0, 0.2])
    assert powers(scores, math.inf).tolist() == [1.0, 0.0, 0.0]
    assert powers(scores, 60.0)[0] > 1 - 1e-9
    assert powers(scores.abs(), 0.0).tolist() == pytest.approx([1 / 3] * 3)
    assert powers(-scores.abs(), 3.0).tolist() == pytest.approx([1 / 3] * 3)


def test_distill_weighted_takes_sources_of_other_classes_and_unlabelled_examples() -> None:
    nets = Nets(student=Mlp(), teachers=nn.ModuleList([Mlp(3), Mlp(7)]))
    method = DistillWeighted(labelled=0.8, power=2.0, probe=6, components=0)
    batch = first_batch()
    batch["labels"][:2] = -100
    method.setup(nets, batch)
    nets.sources.weights.copy_(exact([0.3, 0.7]))
    ((player, parts),) = method.step(nets, batch, NOW)
    with torch.no_grad():
        told = nets.student(batch["inputs"])
        said = [nets.run(f"teachers.{s}", batch)["logits"] for s in range(2)]
        each = [kd(head(told["emb"]), z, temperature=1.0).mean() for head, z in zip(nets.heads, said, strict=True)]
    assert player == "student" and [head.out_features for head in nets.heads] == [3, 7]
    assert float(parts["sources"]) == pytest.approx(0.2 * float(0.3 * each[0] + 0.7 * each[1]), rel=1e-5)
    wanted = 0.8 * F.cross_entropy(told["logits"][2:], batch["labels"][2:]).item()
    assert float(parts["ce"]) == pytest.approx(wanted, rel=1e-5)
    assert int(nets.sources.count) == 6 and not nets.sources.done
    method.after(nets, "student", NOW)
    with torch.no_grad(), evaluating(*nets.teachers):
        scores = [parc(net(batch["inputs"][2:])["emb"], batch["labels"][2:], components=0) for net in nets.teachers]
    assert nets.sources.scores.tolist() == pytest.approx([s.item() for s in scores])
    assert nets.sources.weights.tolist() == pytest.approx(powers(torch.stack(scores), 2.0).tolist())
