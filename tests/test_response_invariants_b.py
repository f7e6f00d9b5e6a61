"""What must hold of churn_distill, dhkd, aligned, sdd, transfer, mld, bce, led, tgeo_kd, decision_tree and wad."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.bernoulli import bernoulli_kl, multi_hot
from limbeck.core.errors import BadInput
from limbeck.core.find import get
from limbeck.core.loop import Clock, Plan, fit
from limbeck.core.nets import Nets
from limbeck.core.places import activation, class_maps, local_logits
from tests.numbers import FP64, VECTORS, close, grad, rand

s, t, y = rand(6, 5, seed=1, scale=2), rand(6, 5, seed=2, scale=2), torch.tensor([0, 1, 2, 3, 4, 2])
some = torch.tensor(
    [[1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 0, 0]]
)


# ---- churn_distill -------------------------------------------------------------------------------------------------
def test_churn_goes_from_the_labels_to_the_base_model():
    loss = get("churn_distill")
    imitation = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)
    close(loss(s, t, y, share=0.0), get("ce")(s, y))
    close(loss(s, t, y, share=1.0), imitation)
    close(loss(s, t, y, share=0.3), 0.7 * get("ce")(s, y) + 0.3 * imitation)
    close(grad(lambda x: loss(x, t, y, share=1.0), t), torch.zeros(6, 5))
    assert grad(lambda x: loss(x, t, y, share=0.9), t).abs().max() > 1e-3


# ---- dhkd and aligned ----------------------------------------------------------------------------------------------
def test_the_binary_divergence_has_its_closed_form():
    d = torch.tensor([math.log(3.0)], dtype=FP64)
    close(bernoulli_kl(d, torch.zeros_like(d)), [-0.5 * math.log(0.75)])
    close(bernoulli_kl(s, torch.zeros_like(s)), (s / 2).cosh().log())
    assert bernoulli_kl(torch.tensor([-1e4, 1e4]), torch.zeros(2)).tolist() == pytest.approx([5000 - math.log(2)] * 2)


def test_dhkd_is_zero_only_where_the_logits_agree_exactly():
    module = get("dhkd")((6, 3), (6, 5)).double()
    emb = rand(6, 3, seed=3)
    told = module.head(emb).detach()
    close(module(emb, told), torch.zeros(6), 1e-14)
    assert module(emb, told + 1.0).min() > 0.1  # a softmax would not see it


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 3, dtype=FP64), nn.Linear(3, 5, dtype=FP64)

    def forward(self, inputs):
        emb = self.body(inputs)
        return {"emb": emb, "logits": self.head(emb)}


def two_heads(method):
    torch.manual_seed(0)
    nets = Nets(student=Two(), teacher=Two())
    batch = {"inputs": rand(6, 4, seed=5), "labels": y}
    method.setup(nets, batch)
    nets.losses.double()
    ((_, parts),) = list(method.step(nets, batch, Clock(0, 1)))
    return nets, {name: part.value for name, part in parts.items()}


def test_neither_head_of_dhkd_sees_the_loss_of_the_other():
    nets, parts = two_heads(get("distill")(match=("ce", "dhkd")))
    params = {"main": nets.student.head.weight, "second": nets.losses["dhkd"].head[0].weight}
    sees = lambda loss: [
        n
        for n, p in params.items()
        if torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True)[0] is not None
    ]
    assert sees(parts["ce"]) == ["main"] and sees(parts["dhkd"]) == ["second"]


def test_aligned_gives_the_gradient_of_the_authors_code():
    case = json.loads((VECTORS / "aligned.json").read_text())["released"]
    number = lambda name: torch.tensor(case[name], dtype=FP64)
    nets = Nets(student=Two(), teacher=Two())
    for name, p in nets.student.named_parameters():
        p.data = number(name)
    batch = {"inputs": number("inputs"), "labels": torch.tensor(case["labels"]), "teacher_logits": number("teacher")}
    method = get("aligned")(match=("ce", {"dhkd": {"weight": case["alpha"]}}))
    method.setup(nets, batch)
    nets.losses.double()["dhkd"].head[0].load_state_dict({k: number(f"second.{k}") for k in ("weight", "bias")})
    ((_, parts),) = list(method.step(nets, batch, Clock(0, 1)))
    sum(part.value for part in parts.values()).backward()
    for name, p in nets.student.named_parameters():
        close(p.grad, number(f"grad.{name}"), 1e-9)
    close(nets.losses["dhkd"].head[0].weight.grad, number("grad.second.weight"), 1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_aligned_takes_out_what_opposes_the_first_loss_and_nothing_else(sign):
    match = ("ce", {"kd": {"weight": sign}})
    nets, plain = two_heads_of(get("distill")(match=match))
    _, parts = two_heads_of(get("aligned")(match=match), nets)
    flat = lambda loss: torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, nets.params("student"), retain_graph=True)]
    )
    g1, g2, total = flat(plain["ce"]), flat(plain["kd"]), flat(sum(parts.values()))
    if g1 @ g2 < 0:
        close(total @ g1, g1 @ g1)
        close(total - g1, g2 - (g1 @ g2) / (g1 @ g1) * g1)
    else:
        close(total, g1 + g2)


def two_heads_of(method, nets=None):
    torch.manual_seed(0)
    nets = nets or Nets(student=Two(), teacher=Two())
    batch = {"inputs": rand(6, 4, seed=5), "labels": y}
    method.setup(nets, batch)
    ((_, parts),) = list(method.step(nets, batch, Clock(0, 1)))
    return nets, {name: part.value for name, part in parts.items()}


def test_aligned_meets_both_cases():
    signs = set()
    for sign in (1.0, -1.0):
        nets, plain = two_heads_of(get("distill")(match=("ce", {"kd": {"weight": sign}})))
        g1, g2 = (
            torch.cat([g.flatten() for g in torch.autograd.grad(v, nets.params("student"), retain_graph=True)])
            for v in plain.values()
        )
        signs.add(bool(g1 @ g2 < 0))
    assert signs == {True, False}


def test_aligned_needs_something_to_align():
    with pytest.raises(BadInput, match="`match` has 1"):
        get("aligned")(match=("ce",)).setup(Nets(student=Two()), {"inputs": rand(6, 4), "labels": y})


# ---- sdd -----------------------------------------------------------------------------------------------------------
fs, ft = rand(6, 3, 8, 8, seed=6), rand(6, 4, 4, 4, seed=7)
hs, ht, bs, bt = rand(5, 3, seed=8), rand(5, 4, seed=9), rand(5, seed=10), rand(5, seed=11)


def sdd(**knobs):
    module = get("sdd")([fs.shape], [ft.shape], hs.shape, ht.shape, **knobs)
    return module([fs], [ft], hs, ht, y, bs, bt)


def test_sdd_of_the_whole_picture_alone_is_the_loss_itself():
    whole = F.linear(fs.mean((2, 3)), hs, bs), F.linear(ft.mean((2, 3)), ht, bt)
    close(sdd(scales=(1,)), get("kd")(*whole))
    close(sdd(scales=(1,), local={"dkd": {"beta": 2.0, "weight": 3.0}}), 3 * get("dkd")(*whole, y, beta=2.0))
    close(sdd(scales=(1,), local="nkd"), get("nkd")(*whole, y))


def test_what_is_said_of_the_cells_is_on_average_what_is_said_of_the_whole():
    whole = F.linear(fs.mean((2, 3)), hs, bs)
    close(local_logits(fs, hs, bs, (4,)).mean(1), whole)
    close(class_maps(fs, hs, bs).mean((2, 3)), whole)
    assert local_logits(fs, hs, bs, (1, 2, 4)).shape == (6, 21, 5)
    close(local_logits(fs, hs, bs, (2,))[:, 1], F.linear(fs[:, :, :4, 4:].mean((2, 3)), hs, bs))  # row by row


def test_sdd_weighs_regions_that_disagree_with_the_whole():
    each = lambda scales: sdd(scales=scales, complementary=1.0) * sum(k * k for k in scales)
    cells = local_logits(ft, ht, bt, (2,)).argmax(-1) == y.unsqueeze(1)
    whole = F.linear(ft.mean((2, 3)), ht, bt).argmax(-1) == y
    differ = cells != whole.unsqueeze(1)
    assert differ.any() and not differ.all()
    kd = get("kd")(local_logits(fs, hs, bs, (2,)), local_logits(ft, ht, bt, (2,)))
    close(sdd(scales=(2,), complementary=2.0) * 4, ((1 + differ.double()) * kd).sum(1))
    close(sdd(scales=(1, 2), complementary=5.0) * 5, each((1,)) + ((1 + 4 * differ.double()) * kd).sum(1))


def test_sdd_says_which_head_does_not_read_the_feature():
    with pytest.raises(BadInput, match="teacher's feature, 4 wide, through its head, which reads 3"):
        get("sdd")([fs.shape], [ft.shape], hs.shape, hs.shape)
    with pytest.raises(BadInput, match="`local` must be a loss function of"):
        get("sdd")([fs.shape], [ft.shape], hs.shape, ht.shape, local="fitnets")


# ---- transfer ------------------------------------------------------------------------------------------------------
class Says(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, inputs):
        return self.logits[inputs]


def transfer(start, *teachers, **knobs):
    nets = Nets(student=Says(start), **{f"teacher_{i}" if i else "teacher": Says(z) for i, z in enumerate(teachers)})
    batch = {"inputs": torch.arange(6), "labels": y}
    method = get("transfer")(**knobs)
    method.setup(nets, batch)
    return method, nets, batch


def part(method, nets, batch):
    ((player, loss),) = list(method.step(nets, batch, Clock(0, 1)))
    assert player == "student"
    return loss.value


def test_transfer_takes_each_element_from_who_explains_it_best():
    right = F.one_hot(y, 5).double()
    better = torch.tensor([True, False, True, False, False, True])
    teacher = t + torch.where(better, 30.0, -30.0).unsqueeze(1) * right
    method, nets, batch = transfer(s, teacher)
    close(method.source(nets, batch), torch.where(better.unsqueeze(1), teacher, s))
    close(part(method, nets, batch), (get("kd")(s, teacher, temperature=1.0) * better).mean())
    third = s + 50 * right
    method, nets, batch = transfer(s, teacher, third)
    close(method.source(nets, batch)[~better], third[~better])
    assert not method.source(nets, batch).requires_grad


def test_transfer_from_a_teacher_that_is_never_better_leaves_the_start_alone():
    method, nets, batch = transfer(s, -100 * F.one_hot(y, 5).double())
    loss = part(method, nets, batch)
    loss.backward()
    assert loss.abs() < 1e-14 and nets.student.logits.grad.abs().max() < 1e-14


def test_transfer_chooses_alike_with_and_without_labels_where_everyone_is_right():
    surely = F.one_hot(y, 5).double() * 20
    chosen = []
    for labelled in (True, False):
        method, nets, batch = transfer(s + surely, t + surely, labelled=labelled)
        chosen.append(method.source(nets, batch))
    close(*chosen)
    labels = transfer(s, t, labelled=True), transfer(s, t, labelled=False)
    assert not torch.equal(*[m.source(n, b) for m, n, b in labels])


def test_transfer_remembers_the_start_while_the_student_moves():
    method, nets, batch = transfer(s, -100 * F.one_hot(y, 5).double())
    nets.student.logits.data += rand(6, 5, seed=12)
    close(part(method, nets, batch), get("kd")(nets.student.logits.detach(), s, temperature=1.0).mean())
    with pytest.raises(BadInput, match="needs a teacher"):
        get("transfer")().setup(Nets(student=Says(s)), {"inputs": torch.arange(6), "labels": y})


# ---- mld, bce and led ----------------------------------------------------------------------------------------------
def test_mld_sees_what_is_added_to_all_logits():
    loss = get("mld")
    close(loss(t, t), torch.zeros(6), 1e-14)
    assert loss(t + 1.0, t).min() > 0.1
    close(get("kd")(t + 1.0, t), torch.zeros(6), 1e-12)
    p, q = t.sigmoid(), s.sigmoid()
    close(loss(s, t), (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1))


def test_bce_takes_class_indices_as_one_class_present():
    close(get("bce")(s, y), get("bce")(s, F.one_hot(y, 5)))
    close(get("bce")(s, some), F.binary_cross_entropy_with_logits(s, some.double(), reduction="none").sum(-1))
    weight = torch.tensor(3.0, dtype=FP64)
    want = F.binary_cross_entropy_with_logits(s, some.double(), reduction="none", pos_weight=weight).sum(-1)
    close(get("bce")(s, some, positive_weight=3.0), want)
    with pytest.raises(BadInput, match="do not fit"):
        multi_hot(torch.zeros(6, 4), s)


def test_led_does_not_see_how_the_cloud_is_turned_moved_and_scaled():
    teacher = rand(6, 5, 4, seed=13)
    turn = torch.linalg.qr(rand(4, 4, seed=14))[0]
    close(get("led")([3 * teacher @ turn + 2], [teacher], some), 0.0, 1e-9)
    assert get("led")([rand(6, 5, 4, seed=15)], [teacher], some) > 1


def test_led_says_nothing_of_groups_of_one():
    student, teacher = rand(6, 5, 4, seed=15), rand(6, 5, 4, seed=13)
    alone = torch.eye(6, 5, dtype=torch.long)
    close(get("led")([student], [teacher], alone), 0.0)
    only_class = get("led")([student], [teacher], y, class_weight=0.0)
    close(only_class, 0.0)
    x = student[:1].expand(6, 5, 4).clone().requires_grad_()
    loss = get("led")([x], [teacher], some)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_led_leaves_masked_examples_out():
    student, teacher, mask = rand(6, 5, 4, seed=15), rand(6, 5, 4, seed=13), torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    left = get("led")([student[mask]], [teacher[mask]], some[mask])
    close(get("led")([student], [teacher], some, mask), left)


def test_activation_maps_lie_between_0_and_1():
    maps = activation(rand(3, 2, 4, 4, seed=16))
    assert maps.min() == 0 and (maps.amax((-2, -1)) == 1).all()
    assert activation(-torch.ones(1, 1, 2, 2)).abs().max() == 0


def test_saliency_of_the_same_maps_overlaps_fully():
    maps = rand(6, 5, 4, 4, seed=17)
    assert get("saliency_overlap")(maps, 2 * maps, some) == pytest.approx({"cosine": 1.0, "iou": 1.0})
    assert get("saliency_overlap")(-maps, maps, some) == pytest.approx({"cosine": 0.0, "iou": 0.0})


def test_multilabel_of_perfect_and_of_reversed_answers():
    sure = 4.0 * some - 2
    assert get("multilabel")(sure, some) == {"map": 1.0, "auroc": 1.0, "f1": 1.0}
    assert get("multilabel")(-sure, some)["auroc"] == 0.0
    assert get("multilabel")(torch.zeros(6, 5), some)["auroc"] == 0.5


# ---- tgeo_kd -------------------------------------------------------------------------------------------------------
class Scaled(nn.Module):
    """One weight."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7, dtype=FP64))

    def forward(self, inputs):
        return self.w * inputs


def tgeo(**knobs):
    torch.manual_seed(0)
    method = get("tgeo_kd")(**{"held_out": 3, "rate": 0.3, **knobs})
    nets = Nets(student=Scaled())
    batch = {"inputs": s, "labels": y, "index": torch.arange(6), "teacher_logits": t}
    method.setup(nets, batch)
    nets.weigher.double()
    return method, nets, batch


def test_tgeo_with_constant_weights_is_a_fixed_mixture():
    method, nets, _ = tgeo()
    every = torch.ones(6, dtype=torch.bool)
    at = lambda a: method.loss(torch.full((6,), a, dtype=FP64), s, t, y, every).value
    close(at(1.0), get("kd")(s, t).mean())
    close(at(0.0), get("ce")(s, y).mean())
    weights = nets.weigher(s, t.softmax(-1), y)
    assert ((weights > 0) & (weights < 1)).all() and weights.unique().numel() == 6


def test_tgeo_remembers_the_teachers_mean_of_each_class():
    _, nets, _ = tgeo()
    p = t.softmax(-1)
    nets.weigher.note(p, y, torch.tensor([1, 1, 1, 0, 1, 1]).bool())
    said = nets.weigher.said / nets.weigher.times.clamp_min(1).unsqueeze(1)
    close(said[0], p[0])
    close(said[2], (p[2] + p[5]) / 2)
    assert nets.weigher.times.tolist() == [1, 1, 2, 0, 1]


def test_tgeo_keeps_held_out_examples_from_the_student():
    losses = []
    for filler in (0.0, 5.0):
        method, nets, batch = tgeo()
        batch["inputs"] = s.clone()
        batch["inputs"][::3] += filler
        _, loss = next(method.step(nets, batch, Clock(0, 4)))
        losses.append(loss.value.item())
    close(*losses)


def test_tgeo_gives_the_weigher_the_gradient_of_the_step_in_thought():
    method, nets, batch = tgeo()
    turns = {player: loss.value for player, loss in method.step(nets, batch, Clock(0, 4))}
    assert list(turns) == ["student", "weigher"]
    bias = nets.weigher.net[-1].bias
    (found,) = torch.autograd.grad(turns["weigher"], bias)
    held, teacher = torch.arange(6) % 3 == 0, t.softmax(-1)

    def outer(shift):
        with torch.no_grad():
            bias.add_(shift)
            a = nets.weigher(nets.student(s), teacher, y)
            bias.sub_(shift)
        w = nets.student.w.detach().clone().requires_grad_()
        inner = (a * get("kd")(w * s, t) + (1 - a) * get("ce")(w * s, y))[~held].mean()
        ahead = w.detach() - 0.3 * torch.autograd.grad(inner, w)[0]
        return get("ce")(ahead * s, y)[held].mean().item()

    close(turns["weigher"].item(), outer(0.0))
    close(found.item(), (outer(1e-5) - outer(-1e-5)) / 2e-5, 1e-6)
    assert abs(found.item()) > 1e-4


def test_tgeo_leaves_statistics_and_student_alone_when_it_thinks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    nets = Nets(student=net)
    batch = {"inputs": s.float(), "labels": y, "index": torch.arange(6), "teacher_logits": t.float()}
    method = get("tgeo_kd")(held_out=3)
    method.setup(nets, batch)
    turns = method.step(nets, batch, Clock(0, 4))
    next(turns)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    next(turns)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---- decision_tree -------------------------------------------------------------------------------------------------
class Told(nn.Module):
    """Says what is written for each row, found by its first number."""

    def __init__(self, inputs, logits):
        super().__init__()
        self.weight, self.inputs, self.said = nn.Parameter(torch.zeros(1)), inputs, logits

    def forward(self, inputs):
        return self.said[(inputs[:, :1] - self.inputs[:, 0].to(inputs)).abs().argmin(1)]


case = json.loads((VECTORS / "decision_tree.json").read_text())
points, said = torch.tensor(case["inputs"]["inputs"]), torch.tensor(case["inputs"]["logits"], dtype=FP64)
classes = torch.arange(14) % 4


def tree(logits=said, x=points, **knobs):
    batches = [{"inputs": x[:7], "labels": classes[:7]}, {"inputs": x[7:], "labels": classes[7:]}]
    return get("decision_tree")(Told(x, logits), batches, **knobs)


def test_the_tree_says_what_a_search_over_all_splits_says():
    found = tree(depth=3)
    close(found(torch.tensor(case["asked"], dtype=FP64))["logits"].exp(), case["says"], 1e-9)
    feature, threshold = case["splits"][0]
    assert found.feature[0] == feature and found.threshold[0].item() == pytest.approx(threshold, abs=1e-6)


def test_leaves_of_the_tree_sum_to_one_and_importances_too():
    found = tree(depth=2, temperature=3.0)
    close(found.value.sum(-1), torch.ones(len(found.value)))
    close(found.importance.sum(), 1.0)
    assert len(found.value) <= 7


def test_a_tree_on_a_sure_teacher_is_a_tree_on_its_labels():
    x = torch.tensor(case["asked"])
    sure = tree(1e4 * F.one_hot(classes, 4).double(), depth=3)
    labelled = tree(soft=0.0, depth=3)
    close(sure(x)["logits"], labelled(x)["logits"], 1e-6)
    assert not torch.allclose(labelled(x)["logits"], tree(depth=3)(x)["logits"])


def test_the_tree_does_not_see_a_monotone_change_of_what_it_reads():
    stretched = points.double().exp().float()
    close(tree(depth=3)(points)["logits"], tree(x=stretched, depth=3)(stretched)["logits"], 1e-6)


def test_the_tree_is_saved_and_loaded_as_weights():
    first, second = tree(depth=2), tree(soft=0.0, depth=2)
    if first.value.shape == second.value.shape:
        second.load_state_dict(first.state_dict())
        close(second(points)["logits"], first(points)["logits"])
    assert {"feature", "threshold", "left", "right", "value"} <= set(first.state_dict())


# ---- wad -----------------------------------------------------------------------------------------------------------
def wad(anchors, classes_of, **knobs):
    module = get("wad")((4, 3), (4, 2), (8,), **knobs).double()
    module.bank[: len(anchors)] = F.normalize(torch.tensor(anchors, dtype=FP64), dim=-1)
    module.known[: len(anchors)] = torch.tensor(classes_of)
    return module


unlabelled, places = torch.full((4,), -100), torch.tensor([4, 5, 6, 7])
emb = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 2.0], [3.0, 1.0]], dtype=FP64)


def test_wad_weighs_by_the_gap_between_the_two_best_classes():
    module = wad([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [0, 1, 2])
    got = module(s[:4, :3], emb, unlabelled, places)
    ce = get("ce")(s[:4, :3], torch.tensor([0, 0, 1, 0]))
    close(got / ce, [0.0, 1.0, 1.0, 2 / 10**0.5], 1e-7)  # a tie, two sure ones, and one between
    again = wad([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [0, 1, 2])
    close(again(s[:4, :3], 7 * emb, unlabelled, places), got, 1e-7)


def test_wad_counts_nothing_before_two_classes_have_come():
    module = wad([[1.0, 0.0]], [0])
    close(module(s[:4, :3], emb, unlabelled, places), torch.zeros(4))


def test_wad_takes_labelled_examples_as_they_are_and_as_anchors():
    module = wad([[1.0, 0.0]], [0])
    labels = torch.tensor([-100, -100, 1, -100])
    got = module(s[:4, :3], emb, labels, places)
    close(got[2], get("ce")(s[2:3, :3], torch.tensor([1]))[0])
    assert module.known[6] == 1 and got[3] > 0
    hidden = wad([[1.0, 0.0]], [0])
    masked = hidden(s[:4, :3], emb, labels, places, torch.tensor([True, True, False, True]))
    assert hidden.known[6] == -1 and masked[3] == 0


def test_wad_admits_what_it_fits_best_after_each_round():
    module = wad([[1.0, 0.0], [0.0, 1.0]], [0, 1], rounds=2, share=1.0)
    got = module(s[:4, :3], emb, unlabelled, places, None, 0.0)
    loss = module.loss[places].clone()
    assert loss.isfinite().all() and got.shape == (4,)
    module(s[:4, :3], emb, unlabelled, places, None, 0.4)
    best = loss.argmin()
    assert (module.known[places] >= 0).nonzero().flatten().tolist() == [best.item()]  # int((1 - 1/2)^2 * 4)
    again = module(s[:4, :3], emb, unlabelled, places, None, 0.4)
    close(again[best], get("ce")(s[:4, :3], module.known[places].clamp_min(0))[best])
    module(s[:4, :3], emb, unlabelled, places, None, 1.0)
    assert (module.known[places] >= 0).sum() == 1 and module.round == 2


# ---- in training ---------------------------------------------------------------------------------------------------
def test_transfer_runs_in_the_loop_and_moves_only_the_student():
    method, nets, batch = transfer(s.float(), (t + 30 * F.one_hot(y, 5)).float())
    start = nets.teacher_start.logits.clone() if "teacher_start" in nets else None
    del nets.modules["teacher_start"]
    fit(method, nets, [batch] * 3, Plan(3, optimizer={"sgd": {"lr": 0.5}}))
    assert start is not None and torch.equal(nets.teacher_start.logits, start)
    assert not torch.equal(nets.student.logits, start)


# ---- knobs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "knob"),
    [
        (lambda: get("churn_distill")(s, t, y, share=1.5), "share"),
        (lambda: get("dhkd")((6, 3), (6, 5), temperature=0.0), "temperature"),
        (lambda: get("dhkd")((6, 3), (6, 5), hidden=-1), "hidden"),
        (lambda: get("dhkd")((6, 3), (6, 5), dropout=1.0), "dropout"),
        (lambda: sdd(scales=()), "scales"),
        (lambda: sdd(scales=(0,)), "scales"),
        (lambda: sdd(complementary=-1.0), "complementary"),
        (lambda: get("transfer")(temperature=0.0), "temperature"),
        (lambda: get("mld")(s, t, temperature=0.0), "temperature"),
        (lambda: get("bce")(s, y, positive_weight=0.0), "positive_weight"),
        (lambda: get("led")([fs], [ft], y, class_weight=-1.0), "class_weight"),
        (lambda: get("led")([fs], [ft], y, instance_weight=-1.0), "instance_weight"),
        (lambda: get("tgeo_kd")(held_out=1), "held_out"),
        (lambda: get("tgeo_kd")(rate=0.0), "rate"),
        (lambda: get("tgeo_kd")(every=0), "every"),
        (lambda: tree(depth=0), "depth"),
        (lambda: tree(soft=1.5), "soft"),
        (lambda: get("wad")((4, 3), (4, 2), (8,), rounds=-1), "rounds"),
        (lambda: get("wad")((4, 3), (4, 2), (8,), share=2.0), "share"),
        (lambda: get("multilabel")(s, some, threshold=1.0), "threshold"),
    ],
)
def test_knobs_out_of_range_are_named(call, knob):
    with pytest.raises(ValueError, match=f"`{knob}` must be"):
        call()
