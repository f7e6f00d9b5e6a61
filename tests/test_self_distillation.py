"""What the catalogue promises of students that are their own teachers: of their past, their average, their depth."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core import find, knobs
from limbeck.core.batches import Batches, Table
from limbeck.core.errors import BadInput
from limbeck.core.guidance import best_guidance, generations, limit
from limbeck.core.loop import Clock, Fitted, Plan, fit
from limbeck.core.maths import js
from limbeck.core.nets import Nets
from limbeck.core.past import LastBatch, Past
from limbeck.core.views import another
from limbeck.losses.logits.byot import BYOT
from limbeck.losses.logits.cs_kd import cs_kd, partners
from limbeck.losses.logits.kd import kd
from limbeck.losses.logits.ps_kd import PSKD
from limbeck.losses.logits.sd_gt_guidance import sd_gt_guidance
from limbeck.losses.logits.tfkd import tfkd, virtual_teacher
from limbeck.train.self.self_kd_ambiguity import recalibrated
from tests.numbers import reference

CLASSES, WIDTH, EXAMPLES, SIZE = 4, 6, 40, 8


pytestmark = pytest.mark.usefixtures("one_thread")


class Mlp(nn.Module):
    """Two layers, with batch norm when asked for: {"logits", "feats", "emb"} of vectors."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 5), nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7) if norm else nn.Identity()
        self.head = nn.Linear(7, CLASSES)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        shallow = self.first(inputs).relu()
        deep = self.norm(self.second(shallow)).relu()
        return {"logits": self.head(deep), "feats": [shallow, deep], "emb": deep}


def table() -> Table:
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(EXAMPLES) % CLASSES
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=g)
    return Table({"inputs": centres[labels] + torch.randn(EXAMPLES, WIDTH, generator=g), "labels": labels})


def run(name: str, given: dict[str, Any], nets: Nets, data: Any = None, **plan: Any) -> Fitted:
    options: dict[str, Any] = {"steps": 6, "optimizer": {"sgd": {"lr": 0.1}}, "log_every": 1} | plan
    return fit(knobs.make(name, given), nets, data or Batches(table(), SIZE, seed=3), Plan(**options))


def state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def trained(start: nn.Module, name: str, given: dict[str, Any], **plan: Any) -> dict[str, Tensor]:
    nets = Nets(student=copy.deepcopy(start))
    run(name, given, nets, **plan)
    return state(nets.student)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Linear(nn.Module):
    """The linear network of the reference runs, in double precision."""

    def __init__(self, weights: dict[str, Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4).double()
        self.layer.load_state_dict({k: torch.tensor(v, dtype=torch.float64) for k, v in weights.items()})

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.layer(inputs)
        return out


def close(net: Any, wanted: dict[str, Any]) -> bool:
    found = net.layer.state_dict()
    return all(torch.allclose(found[k], torch.tensor(v, dtype=torch.float64), rtol=1e-12) for k, v in wanted.items())


def told(case: dict[str, Any]) -> list[dict[str, Tensor]]:
    pairs = zip(case["inputs"], case["labels"], strict=True)
    return [{"inputs": torch.tensor(x, dtype=torch.float64), "labels": torch.tensor(y)} for x, y in pairs]


# ---------------------------------------------------------------- tfkd
def test_the_virtual_teacher_is_label_smoothing_before_it_is_softened():
    labels, a = torch.tensor([2, 0, 3]), 0.9
    virtual = virtual_teacher(labels, CLASSES, a)
    assert torch.allclose(virtual.sum(-1), torch.ones(3, dtype=torch.float64), atol=1e-15)
    eps = (1 - a) * CLASSES / (CLASSES - 1)
    assert torch.allclose(virtual, (1 - eps) * F.one_hot(labels, CLASSES).double() + eps / CLASSES, atol=1e-15)
    logits = torch.randn(3, CLASSES, dtype=torch.float64, requires_grad=True)
    smoothed = F.cross_entropy(logits, labels, label_smoothing=eps)
    (wanted,) = torch.autograd.grad(smoothed, logits)
    assert torch.allclose(wanted, (logits.softmax(-1) - virtual) / 3, atol=1e-12)


def test_tfkd_reg_asks_for_no_teacher_and_its_target_is_nearly_even():
    assert find.needs(tfkd) == ["student_logits", "labels"] and not find.wants(tfkd)
    even = tfkd(torch.zeros(1, 10, dtype=torch.float64), torch.tensor([4]))
    assert 0 < even.item() < 2e-4  # e^(0.99 / 20) is all that sets the label apart


def test_a_copy_of_the_teacher_has_no_gradient_from_tfkd_self_at_its_start():
    net = Mlp().double()
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    kd(net(x)["logits"], copy.deepcopy(net)(x)["logits"], temperature=20.0).mean().backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-12 for p in net.parameters())


def test_tfkd_self_is_one_generation_of_ban():
    given = {"match": ({"ce": 0.1}, {"kd": {"temperature": 20, "weight": 0.9}}), "generations": 1}
    turns = run("ban", given, Nets(student=Mlp()), steps=2).turns
    assert [(stage, sorted(parts)) for stage, _, _, parts in turns] == [(0, ["ce"])] * 2 + [(1, ["ce", "kd"])] * 2


# ---------------------------------------------------------------- ps_kd
def test_ps_kd_is_plain_cross_entropy_in_its_first_pass_and_without_a_share():
    start, one_pass = Mlp(), EXAMPLES // SIZE
    plain = trained(start, "distill", {"match": ("ce",)}, steps=one_pass)
    ours = trained(start, "distill", {"match": ("ps_kd",)}, steps=one_pass)
    assert all(torch.allclose(plain[k], ours[k], atol=1e-6) for k in plain)
    longer = trained(start, "distill", {"match": ("ce",)}, steps=3 * one_pass)
    never = trained(start, "distill", {"match": ({"ps_kd": {"share": 0.0}},)}, steps=3 * one_pass)
    later = trained(start, "distill", {"match": ("ps_kd",)}, steps=3 * one_pass)
    assert all(torch.allclose(longer[k], never[k], atol=1e-6) for k in longer)
    assert any(not torch.allclose(longer[k], later[k], atol=1e-4) for k in longer)


def test_ps_kd_learns_from_the_pass_before():
    net, data, steps = Mlp(), Batches(table(), SIZE, seed=3), 15
    mine = copy.deepcopy(net)
    past = F.one_hot(table()["labels"], CLASSES).float()
    optimizer = torch.optim.SGD(mine.parameters(), 0.1)
    for t in range(steps):
        batch = next(data)
        a, label = 0.8 * t / (steps - 1), F.one_hot(batch["labels"], CLASSES).float()
        logits = mine(batch["inputs"])["logits"]
        q = (1 - a) * label + a * past[batch["index"]]
        loss = -(q * logits.log_softmax(-1)).sum(-1).mean()
        past[batch["index"]] = logits.detach().softmax(-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ours = trained(net, "distill", {"match": ("ps_kd",)}, steps=steps)
    assert all(torch.allclose(ours[k], v, atol=1e-5) for k, v in state(mine).items())


def test_ps_kd_targets_sum_to_one_and_the_share_rises_linearly_to_its_end():
    loss = PSKD((2, CLASSES), (3,), share=0.8)
    past = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    loss.past.remember(torch.tensor([0, 1]), past)
    label = F.one_hot(torch.tensor([0, 1]), CLASSES).float()
    for progress in (0.0, 0.25, 1.0):
        q = loss.targets(label, torch.tensor([0, 1]), progress)
        assert torch.allclose(q.sum(-1), torch.ones(2))
        assert torch.allclose(q, label + 0.8 * progress * (past - label), atol=1e-7)


def test_the_gradient_of_ps_kd_is_what_the_student_says_less_the_target():
    loss = PSKD((2, CLASSES), (3,)).double()
    index, labels = torch.tensor([2, 0]), torch.tensor([1, 3])
    loss.past.remember(index[:1], torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64))
    logits = torch.randn(2, CLASSES, dtype=torch.float64, requires_grad=True)
    q = loss.targets(F.one_hot(labels, CLASSES).double(), index, 0.5)
    loss(logits, index, labels, progress=0.5).sum().backward()
    assert logits.grad is not None and torch.allclose(logits.grad, logits.detach().softmax(-1) - q, atol=1e-12)


def test_the_past_keeps_what_counts_also_of_texts():
    past = Past(4, (3, 2))
    now, mask = torch.rand(2, 3, 2), torch.tensor([[True, False, True], [False, False, True]])
    past.remember(torch.tensor([3, 1]), now, mask)
    otherwise = torch.full((2, 3, 2), -1.0)
    found = past.recall(torch.tensor([3, 1]), otherwise)
    assert torch.equal(found, torch.where(mask.unsqueeze(-1), now, -1.0))
    assert torch.equal(past.recall(torch.tensor([0, 2]), otherwise), otherwise)


# ---------------------------------------------------------------- mean_teacher
@pytest.mark.parametrize("k", [0, 1], ids=["mse", "kl"])
def test_mean_teacher_goes_the_way_of_the_authors_functions(k: int):
    case = reference("mean_teacher")["cases"][k]
    nets, data = Nets(student=Linear(case["start"])), told(case)
    given = {"weight": case["weight"], "rampup": case["rampup"], "distance": case["distance"], "augment": ()}
    given |= {"decay": case["decay"], "early_decay": case["decay"]}
    run("mean_teacher", given, nets, data, steps=len(data), optimizer={"sgd": {"lr": case["lr"]}})
    assert close(nets.student, case["student"]) and close(nets.average, case["average"])


@pytest.mark.parametrize("weight", [100.0, 0.0])
def test_the_average_is_the_mean_of_all_weights_so_far_and_never_gets_a_gradient(weight: float):
    nets, visited = Nets(student=Mlp(norm=True)), []
    method = knobs.make("mean_teacher", {"weight": weight, "decay": 0.9999, "early_decay": 0.9999, "augment": ()})

    class Watch:
        setup, step = method.setup, method.step

        def after(self, nets: Nets, player: str, clock: Clock) -> None:
            method.after(nets, player, clock)
            visited.append(nets.student.head.weight.detach().clone())
            assert torch.allclose(nets.average.head.weight, torch.stack(visited).mean(0), atol=1e-6)
            assert all(not p.requires_grad and p.grad is None for p in nets.average.parameters())
            assert nets.average.training and int(nets.average.norm.num_batches_tracked) == clock.t + 1

    visited.append(nets.student.head.weight.detach().clone())
    fit(Watch(), nets, Batches(table(), SIZE, seed=3), Plan(5, optimizer={"sgd": {"lr": 0.5}}))
    assert len(visited) == 6 and not torch.equal(visited[0], visited[-1])


def test_mean_teacher_of_weight_0_is_cross_entropy_and_with_decay_0_the_pi_model():
    start = Mlp()
    plain = trained(start, "distill", {"match": ("ce",)})
    assert same(plain, trained(start, "mean_teacher", {"weight": 0.0, "augment": ()}))
    assert not same(plain, trained(start, "mean_teacher", {"augment": (), "rampup": 0.0}))
    nets = Nets(student=copy.deepcopy(start))
    run("mean_teacher", {"decay": 0.0, "early_decay": 0.0}, nets)
    assert same(state(nets.student), state(nets.average))


def test_who_is_kept_of_mean_teacher_is_a_knob_and_starts_from_the_recipe():
    assert knobs.make("mean_teacher", {}).learner == "average"
    method = knobs.make("mean_teacher", {"result": "student"})
    assert method.learner == "student"
    nets = Nets()
    nets.factories["student"] = Mlp
    method.setup(nets, {})
    assert same(state(nets.student), state(nets.average)) and nets.student is not nets.average


def test_another_view_is_drawn_for_pictures_alone():
    pictures, texts = torch.rand(4, 1, 8, 8), torch.randint(5, (4, 8))
    assert not torch.equal(another(pictures, ("crop",)), pictures)
    torch.manual_seed(7)
    first = another(pictures, ("crop",))
    torch.manual_seed(7)
    assert torch.equal(another(pictures, ("crop",)), first)
    assert another(texts, ("crop",)) is texts and another(pictures, ()) is pictures


# ---------------------------------------------------------------- cs_kd
LABELS = torch.tensor([2, 0, 2, 1, 0, 2])


def test_partners_share_the_label_and_weigh_evenly():
    found = partners(LABELS, torch.tensor([True, True, True, True, True, False]))
    apart = LABELS.unsqueeze(1) != LABELS
    assert not found[apart].any() and not found.diagonal().any() and not found[:, 5].any()
    assert torch.equal(found.sum(1), torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.float64))
    assert torch.equal(partners(LABELS)[0], torch.tensor([0, 0, 0.5, 0, 0, 0.5], dtype=torch.float64))
    assert not partners(torch.full((3,), -100)).any()


def test_cs_kd_is_0_for_equal_predictions_and_for_those_alone():
    logits = torch.randn(CLASSES, 5, dtype=torch.float64)[LABELS]
    assert cs_kd(logits, LABELS).abs().max() < 1e-12
    other = torch.randn(6, 5, dtype=torch.float64)
    assert cs_kd(other, LABELS)[3] == 0 and (cs_kd(other, LABELS)[[0, 1, 2, 4, 5]] > 0).all()


def test_no_gradient_of_cs_kd_goes_through_the_partner():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    for i in (0, 1):
        (grad,) = torch.autograd.grad(cs_kd(logits, LABELS)[i], logits)
        assert grad[i].any() and not grad[torch.arange(6) != i].any()


def test_cs_kd_descends_and_masked_examples_teach_nobody():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    optimizer, seen = torch.optim.Adam([logits], 0.05), []
    for _ in range(30):
        loss = cs_kd(logits, LABELS).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < seen[0] / 2
    mask = torch.arange(6) != 2
    spoiled = logits.detach().clone()
    spoiled[2] = math.inf
    assert torch.equal(cs_kd(spoiled, LABELS, mask)[mask], cs_kd(logits.detach(), LABELS, mask)[mask])


def test_cs_kd_is_exact_under_autocast():
    logits = torch.randn(6, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = cs_kd(logits, LABELS)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), cs_kd(logits.double(), LABELS), rtol=1e-4)


def test_batches_of_pairs_come_from_per_class():
    batch = next(Batches(table(), per_class=2, seed=0))
    assert (partners(batch["labels"]).sum(1) == 1).all() and len(batch["index"].unique()) == 2 * CLASSES


# ---------------------------------------------------------------- dlb
def test_dlb_goes_the_way_of_the_authors_loop():
    case = reference("dlb")
    nets, data = Nets(student=Linear(case["start"])), told(case)
    given = {"weight": case["weight"], "temperature": case["temperature"]}
    fitted = run("dlb", given, nets, data, steps=len(data), optimizer={"sgd": {"lr": case["lr"]}})
    assert close(nets.student, case["end"])
    assert [sorted(parts) for _, _, _, parts in fitted.turns] == [["ce"], *[["ce", "kl"]] * 3]


def test_each_example_of_dlb_is_seen_in_two_steps_one_after_the_other():
    seen: list[Tensor] = []

    class Watch(Mlp):
        def forward(self, inputs: Tensor) -> dict[str, Any]:
            if self.training:
                seen.append(inputs.detach().clone())
            return super().forward(inputs)

    nets = Nets(student=Watch())
    run("dlb", {}, nets, steps=4)
    data = Batches(table(), SIZE, seed=3)
    new = [next(data)["inputs"] for _ in range(4)]
    assert torch.equal(seen[0], new[0]) and len(seen) == 4
    for t in (1, 2, 3):
        assert torch.equal(seen[t], torch.cat([new[t - 1], new[t]]))
    assert not any(column.requires_grad for column in nets.last.read().values())


def test_a_shorter_batch_is_remembered_as_such_and_a_longer_one_refused():
    like = {"inputs": torch.rand(3, 2), "mask": torch.ones(3, dtype=torch.bool), "logits": torch.rand(3, 4), "words": 5}
    last = LastBatch(like)
    assert not last.read()["mask"].any() and "words" not in last.read()
    last.keep(like)
    assert torch.equal(last.read()["inputs"], like["inputs"]) and last.read()["mask"].all()
    last.keep({name: column[:2] for name, column in like.items() if isinstance(column, Tensor)})
    assert last.read()["mask"].tolist() == [True, True, False]
    with pytest.raises(BadInput, match="begin with the longest"):
        last.keep({name: column.repeat(2, *[1] * (column.ndim - 1)) for name, column in last.read().items()})


# ---------------------------------------------------------------- byot
def byot(**given: float) -> tuple[BYOT, Mlp, Tensor, Tensor]:
    net = Mlp().double()
    out = net(torch.randn(6, WIDTH, dtype=torch.float64))
    loss = BYOT([tuple(f.shape) for f in out["feats"]], tuple(out["logits"].shape), **given).double()
    return loss, net, torch.randn(6, WIDTH, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])


def test_byot_without_its_teaching_is_deep_supervision():
    loss, net, x, y = byot(alpha=0.0, feature_weight=0.0)
    out = net(x)
    wanted = sum(F.cross_entropy(z, y, reduction="none") for z in (out["logits"], loss.exits[0](out["feats"][0])))
    assert torch.allclose(loss(out["feats"], out["logits"], y), wanted, atol=1e-12)


def test_what_byot_teaches_does_not_move_the_last_layer():
    loss, net, x, y = byot(alpha=1.0, feature_weight=1.0)
    out = net(x)
    total = loss(out["feats"], out["logits"], y).sum()  # alpha 1: nothing of the labels is left
    total.backward()
    assert net.first.weight.grad is not None and net.first.weight.grad.any()
    last = (net.second.weight, net.head.weight)
    assert all(p.grad is None or not p.grad.any() for p in last)
    weights = [p.grad for p in loss.exits.parameters()]
    assert all(g is not None and g.any() for g in weights)


def test_byot_leaves_the_plain_network_and_needs_two_layers():
    nets = Nets(student=Mlp())
    before = state(nets.student)
    run("distill", {"match": ("byot",)}, nets)
    after = state(nets.student)
    assert before.keys() == after.keys() and not same(before, after)
    assert nets.companions == {"student": ["losses"]}
    with pytest.raises(BadInput, match="at least two"):
        BYOT([(2, 3)], (2, 4))


# ---------------------------------------------------------------- sd_gt_guidance
# The illustration of the authors' README: 11 noisy points of a sinusoid, RBF kernel of gamma 80, ridge 0.2, and the
# mean squared distance from the sinusoid of each step, to the five digits printed there and in the notebook. (README
# heads the last column with 0.25; its text, and the numbers, say 0.35.)
POINTS = torch.arange(11, dtype=torch.float64).unsqueeze(1) / 10
NOISY = torch.tensor(
    [
        *(0.38476636465198066, 1.2333967683416893, 1.33232242217057, 0.69201594888895180, -0.29756145531871736),
        *(-0.24189291901377769, -0.7964485769175675, -0.9616480167034174, -0.49672509509916934, -0.3469066003991437),
        0.5589512650600734,
    ],
    dtype=torch.float64,
)
PRINTED = {
    0.0: ([0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251], 0.49505),
    0.25: ([0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011], 0.15250),
    0.35: ([0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948], 0.14959),
}
RIDGE = 0.2


def rbf(x: Tensor, y: Tensor) -> Tensor:
    return (-80 * torch.cdist(x, y).square()).exp()


def error(fit_: Tensor) -> float:
    x = torch.arange(101, dtype=torch.float64) / 100
    return float((fit_ - (2 * math.pi * x).sin()).square().mean())


@pytest.mark.parametrize("guidance", list(PRINTED))
def test_repeated_ridge_gives_the_figures_of_the_authors(guidance: float):
    x = torch.arange(101, dtype=torch.float64).unsqueeze(1) / 100
    kernel, cross = rbf(POINTS, POINTS), rbf(x, POINTS)
    fits = generations(kernel, NOISY, ridge=RIDGE, guidance=guidance, steps=6, cross=cross)
    end = limit(kernel, NOISY, ridge=RIDGE, guidance=guidance, cross=cross)
    steps, last = PRINTED[guidance]
    assert [round(error(f), 5) for f in fits] == steps and round(error(end), 5) == last


def test_labels_alone_repeat_the_first_fit_and_the_limit_is_a_stronger_ridge():
    kernel, y = rbf(POINTS, POINTS), torch.stack([NOISY, NOISY.flip(0)], 1)
    eye = torch.eye(11, dtype=torch.float64)
    first = kernel @ torch.linalg.solve(kernel + RIDGE * eye, y)
    assert torch.allclose(generations(kernel, y, ridge=RIDGE, guidance=1.0, steps=4), first.expand(4, 11, 2))
    end = generations(kernel, y, ridge=RIDGE, guidance=0.3, steps=400)[-1]
    wanted = kernel @ torch.linalg.solve(kernel + RIDGE / 0.3 * eye, y)
    assert torch.allclose(end, wanted, atol=1e-13)
    assert torch.allclose(limit(kernel, y, ridge=RIDGE, guidance=0.3), wanted, atol=1e-13)


def test_the_best_guidance_is_where_the_validation_error_is_least():
    g, d = torch.randn(2, 20, 3, dtype=torch.float64)
    wanted = 0.3 * g + 0.7 * d + 0.1 * torch.randn(20, 3, dtype=torch.float64)
    best = best_guidance(wanted, g, d)
    errors = [(wanted - (a * g + (1 - a) * d)).square().mean().item() for a in (best - 1e-3, best, best + 1e-3)]
    assert errors[1] < min(errors[0], errors[2]) and 0.2 < best < 0.4
    assert best_guidance(g, g, d) == 1 and best_guidance(2 * d - g, g, d) == 0 and best_guidance(g, d, d) == 1


def test_the_guided_loss_pulls_towards_the_mixed_target():
    z = torch.randn(5, CLASSES, dtype=torch.float64, requires_grad=True)
    t, y, a = torch.randn(5, CLASSES, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3]), 0.35
    (found,) = torch.autograd.grad(sd_gt_guidance(z, t, y, guidance=a).sum(), z)
    mixed = a * F.one_hot(y, CLASSES).double() + (1 - a) * t.softmax(-1)
    (wanted,) = torch.autograd.grad((z.softmax(-1) - mixed).square().mean(-1).sum(), z)
    assert torch.allclose(found, wanted, atol=1e-14)


def test_guidance_goes_through_generations():
    given = {"match": ({"sd_gt_guidance": {"guidance": 0.5}},), "generations": 2}
    turns = run("ban", given, Nets(student=Mlp()), steps=2).turns
    assert [(stage, *parts) for stage, _, _, parts in turns[2:]] == [(k, "sd_gt_guidance") for k in (1, 1, 2, 2)]


# ---------------------------------------------------------------- self_kd_ambiguity
class Says(nn.Module):
    """Logits as given, and a feature that a lower classifier of identity reads off unchanged."""

    def __init__(self, logits: Tensor, lower: Tensor) -> None:
        super().__init__()
        self.logits, self.lower = nn.Parameter(logits), nn.Parameter(lower)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        return {"logits": self.logits, "feats": [self.lower]}


def test_self_kd_ambiguity_has_the_parts_worked_by_hand():
    case = reference("self_kd_ambiguity")
    logits, lower, past = (torch.tensor(case[k], dtype=torch.float64) for k in ("logits", "lower", "past"))
    seen, batch = torch.tensor(case["seen"]), {"labels": torch.tensor(case["labels"]), "index": torch.arange(5)}
    method = knobs.make("self_kd_ambiguity", {k: case[k] for k in ("weight", "temperature", "threshold")})
    nets = Nets(student=Says(logits, lower))
    method.setup(nets, batch | {"inputs": torch.zeros(5, 1)})
    nets.lower.double().load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
    nets.past.double()
    for stage, name in enumerate(("distil", "recalibrate")):
        if stage:
            assert torch.allclose(nets.past.rows, lower.softmax(-1)) and nets.past.seen.all()
            nets.past.rows.copy_(past)
            nets.past.seen.copy_(seen)
        ((player, parts),) = method.step(nets, batch | {"inputs": torch.zeros(5, 1)}, Clock(0, 2, stage))
        assert player == "student" and sorted(parts) == sorted(case[name])
        assert all(float(parts[k]) == pytest.approx(v, rel=1e-9) for k, v in case[name].items())
        grads = torch.autograd.grad(parts["kl"].value, [nets.lower.weight, nets.student.lower], allow_unused=True)
        assert grads == (None, None)  # the lower classifier, and all that only it reads, is a constant to the last
    q, doubtful = recalibrated(past[seen], batch["labels"][seen], case["threshold"])
    assert torch.allclose(q, torch.tensor(case["targets"], dtype=torch.float64)[seen])
    assert doubtful.tolist() == [a for a, s in zip(case["ambiguous"], case["seen"], strict=True) if s]
    assert torch.equal(q.gather(1, batch["labels"][seen].unsqueeze(1)).squeeze(1), q.amax(1))  # the label stays first


@pytest.mark.parametrize("classes", [2, 3, 10, 12])
def test_at_threshold_1_only_the_first_choice_decides(classes: int):
    p, labels = torch.zeros(classes, classes).softmax(-1), torch.arange(classes)
    assert not recalibrated(p, labels, 1.0)[1].any() and recalibrated(p, labels, 0.9)[1].all()
    p[0, 1] += 0.1
    assert recalibrated(p, labels, 1.0)[1].tolist() == [True] + [False] * (classes - 1)


def test_without_weight_and_recalibration_it_is_training_with_two_exits():
    nets, kept = Nets(student=Mlp()), []
    start = copy.deepcopy(nets.student)
    method = knobs.make("self_kd_ambiguity", {"weight": 0.0, "share": 1.0})

    class Watch:
        step, stages = method.step, method.stages

        def setup(self, nets: Nets, probe: dict[str, Any]) -> None:
            method.setup(nets, probe)
            kept.append(copy.deepcopy(nets.lower))

    fit(Watch(), nets, Batches(table(), SIZE, seed=3), Plan(6, optimizer={"sgd": {"lr": 0.1}}))
    (lower,), data = kept, Batches(table(), SIZE, seed=3)
    optimizer = torch.optim.SGD([*start.parameters(), *lower.parameters()], 0.1)
    for _ in range(6):
        batch = next(data)
        out = start(batch["inputs"])
        loss = sum(F.cross_entropy(z, batch["labels"]) for z in (out["logits"], lower(out["feats"][0])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, wanted in ((nets.student, start), (nets.lower, lower)):
        assert all(torch.allclose(v, state(wanted)[k], atol=1e-6) for k, v in state(ours).items())


def test_doubt_is_restored_in_the_second_stage_alone():
    fitted = run("self_kd_ambiguity", {"share": 0.5}, Nets(student=Mlp()), steps=4)
    assert [stage for stage, *_ in fitted.turns] == [0, 0, 1, 1]
    assert len({stage for stage, *_ in run("self_kd_ambiguity", {"share": 1.0}, Nets(student=Mlp())).turns}) == 1


def test_js_is_0_for_equal_distributions_and_at_most_log_2():
    a, b = 50 * torch.randn(2, 30, CLASSES, dtype=torch.float64)
    assert js(a, a).abs().max() < 1e-12
    assert js(a, b).max() <= math.log(2) + 1e-12 and js(a, b).max() > 0.9 * math.log(2)
