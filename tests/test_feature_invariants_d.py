"""Facts that the papers state, of methods that match features: see the `invariants` of their catalogue rows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.alignment import Alignment
from limbeck.core.bank import Bank, ClassMeans
from limbeck.core.errors import BadInput
from limbeck.core.exits import exit_from
from limbeck.core.features import picture, shrunk
from limbeck.core.graft import Bottleneck, Grafted, anatomy
from limbeck.core.loop import Clock, Plan, fit
from limbeck.core.maths import sinkhorn
from limbeck.core.nets import Nets
from limbeck.losses.attention.afd import AFD
from limbeck.losses.attention.at import at
from limbeck.losses.contrast.msdcrd import MSDCRD
from limbeck.losses.contrast.wcord import WCoRD
from limbeck.losses.features.dual_view import DualView
from limbeck.losses.features.nd_loss import NDLoss
from limbeck.losses.features.ofa_kd import OFAKD
from limbeck.losses.features.semckd import SemCKD
from limbeck.losses.features.srd import SRD
from limbeck.losses.features.srrl import SRRL
from limbeck.losses.features.vkd import VKD
from limbeck.train.plain.norm import NORM, Transform, folded, matching
from limbeck.train.plain.scalekd import ScaleKD
from limbeck.train.plain.simkd import SimKD
from limbeck.train.plain.sskd import SSKD, puzzle, trusted, turned
from limbeck.zoo import nets as zoo
from tests.numbers import vector

B = 6


pytestmark = pytest.mark.usefixtures("double")


def maps(channels: int, side: int) -> Tensor:
    return torch.randn(B, channels, side, side)


def pictures(side: int = 8) -> dict[str, Tensor]:
    return {"inputs": torch.randn(B, 1, side, side), "labels": torch.arange(B) % 4, "index": torch.arange(B)}


def net(name: str, **knobs: Any) -> nn.Module:
    return zoo.build({"net": name, **knobs}, classes=4, channels=1, size=8)


def two(student: str, teacher: str) -> Nets:
    nets = Nets(student=net(student), teacher=net(teacher))
    nets.teacher.double(), nets.student.double()
    return nets


def alike(found: Tensor, wanted: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found.detach(), torch.as_tensor(wanted).to(found), rtol=rtol, atol=atol)


# ---- ofa_kd


def adaptive(z: Tensor, teacher: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """What OFA says of the student's logits alone."""
    loss = OFAKD([(len(z), 2)], tuple(teacher.shape), gamma=gamma, branch_weight=0.0)
    out: Tensor = loss(z, [torch.zeros(len(z), 2)], teacher, labels)
    return out


def test_ofa_with_gamma_1_is_the_cross_entropy_with_the_teacher_whatever_the_label() -> None:
    z, teacher = torch.randn(B, 5), torch.randn(B, 5)
    wanted = -(teacher.softmax(1) * z.log_softmax(1)).sum(1)
    for label in range(5):
        alike(adaptive(z, teacher, torch.full((B,), label), 1.0), wanted)
    alike(
        adaptive(z + 7.0, teacher, torch.zeros(B, dtype=torch.long), 1.5),
        adaptive(z, teacher, torch.zeros(B).long(), 1.5),
    )


def test_ofa_of_a_sure_teacher_weighs_the_label_by_2_to_the_gamma_minus_1() -> None:
    z = torch.randn(1, 2)
    sure = torch.tensor([[900.0, -900.0]])
    alike(adaptive(z, sure, torch.tensor([0]), 2.0), -3 * z.log_softmax(1)[:, 0])


@pytest.mark.parametrize(("shape", "later"), [((B, 3, 9, 7), 2), ((B, 3, 4, 4), 0), ((B, 17, 8), 1), ((B, 5), 3)])
def test_exits_read_logits_off_maps_tokens_and_vectors(shape: tuple[int, ...], later: int) -> None:
    assert exit_from(shape, 4, later=later, width=8)(torch.randn(shape)).shape == (B, 4)


def test_exits_merge_tokens_towards_7_by_7_and_leave_the_class_token_alone() -> None:
    made: Any = exit_from((2, 28 * 28 + 1, 4), 3, later=0, width=8, class_token=True)
    assert len(made[0].merges) == 2
    assert made[0].merges(torch.randn(2, 784, 8)).shape == (2, 49, 8)
    assert made(torch.randn(2, 785, 4)).shape == (2, 3)


def test_ofa_serves_convolutions_transformers_and_perceptrons() -> None:
    batch = pictures()
    for name in ("resnet8", "vit_tiny", "mlp"):
        out: Any = net(name)(batch["inputs"])
        loss = OFAKD([f.shape for f in out["feats"]], (B, 4))
        value = loss(out["logits"], out["feats"], torch.randn(B, 4), batch["labels"])
        assert value.shape == (B,)
        value.sum().backward()
        assert all(p.grad is not None for p in loss.parameters())


# ---- vkd


def test_vkd_keeps_its_projector_orthogonal_under_weight_decay() -> None:
    loss = VKD([(B, 3, 4, 4)], [(B, 5, 4, 4)])
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    student, teacher = maps(3, 4), maps(5, 4)
    start = loss.projector.inner.weight.detach().clone()
    for _ in range(50):
        optimizer.zero_grad()
        loss([student], [teacher]).mean().backward()
        optimizer.step()
    weight = loss.projector.inner.weight.detach()
    assert (weight - start).abs().max() > 0.05
    alike(weight.T @ weight, torch.eye(3), atol=1e-5)
    rows = torch.randn(B, 3)
    alike(loss.projector(rows) @ loss.projector(rows).T, rows @ rows.T, rtol=1e-5, atol=1e-5)


def test_vkd_does_not_see_scale_or_shift_of_the_teacher() -> None:
    loss = VKD([(B, 3)], [(B, 5)])
    student, teacher = torch.randn(B, 3), 10 * torch.randn(B, 5)
    for changed in (3 * teacher, teacher + 4):
        alike(loss([student], [changed]), loss([student], [teacher]), rtol=1e-5)


def test_vkd_whitens_what_counts() -> None:
    loss = VKD([(40, 3)], [(40, 3)], normalise="whiten")
    teacher, mask = torch.randn(40, 3) @ torch.randn(3, 3), torch.arange(40) < 30
    from limbeck.core.maths import whitened

    white = whitened(teacher, mask)[mask]
    alike(white.T @ white / 30, torch.eye(3), atol=1e-3)
    alike(loss([teacher], [teacher], mask)[mask], loss([teacher[mask]], [teacher[mask]]))


# ---- simkd


def test_simkd_is_the_official_projector_and_classifier() -> None:
    given = vector("simkd", "graft")
    student = torch.tensor(given["student_map"]).requires_grad_()
    neck, head = Bottleneck(2, 4, given["factor"]), nn.Linear(4, 3)
    neck.load_state_dict({k: torch.tensor(v) for k, v in given["neck"].items()}, strict=False)
    head.load_state_dict({"weight": torch.tensor(given["head"]), "bias": torch.tensor(given["head_bias"])})

    class Passing(nn.Module):
        def forward(self, inputs: Tensor) -> dict[str, Any]:
            return {"logits": inputs[:, :, 0, 0], "feats": [inputs]}

    teacher = torch.tensor(given["teacher_map"])
    out = Grafted(Passing(), neck, head, size=(2, 2))(student)
    loss = (out["grafted"] - teacher).square().mean()
    alike(loss, given["value"])
    alike(out["logits"], given["logits"])
    alike(torch.autograd.grad(loss, student)[0], given["grad"], rtol=1e-7)


def test_simkd_at_a_perfect_match_says_what_the_teacher_says() -> None:
    nets, batch = two("resnet8", "resnet8"), pictures()
    SimKD().setup(nets, batch)

    class Oracle(nn.Module):
        def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
            return aim, aim

    nets.teacher.eval()
    aim = nets.teacher(batch["inputs"])["feats"][-1]
    nets.student.neck = Oracle()
    alike(nets.student(batch["inputs"])["logits"], nets.teacher(batch["inputs"])["logits"])
    ((_, part),) = SimKD().step(nets, batch, Clock(0, 1))
    assert float(part.value) == 0


def test_simkd_keeps_the_teachers_classifier_and_counts_what_it_adds() -> None:
    nets, batch = two("resnet8", "resnet14"), pictures()
    body = sum(p.numel() for p in nets.student.parameters()) - sum(p.numel() for p in nets.student.head.parameters())
    head = {k: v.clone() for k, v in nets.teacher.head.state_dict().items()}
    fit(SimKD(), nets, [batch] * 3, Plan(3, optimizer={"sgd": {"lr": 0.1, "weight_decay": 0.1}}))
    for key, value in nets.student.head.state_dict().items():
        assert torch.equal(value, head[key])
    added = sum(p.numel() for p in nets.student.neck.parameters()) + sum(v.numel() for v in head.values())
    assert sum(p.numel() for p in nets.student.parameters()) == body + added


@pytest.mark.parametrize(("student", "teacher"), [("vit_tiny", "resnet8"), ("mlp", "vit_tiny"), ("convnet", "mlp")])
def test_a_grafted_student_of_any_kind_is_built_again_from_words(student: str, teacher: str) -> None:
    nets, batch = two(student, teacher), pictures()
    fit(SimKD(), nets, [batch] * 2, Plan(2))
    again = Grafted.from_spec(net(student), json.loads(json.dumps(nets.student.spec())))
    again.load_state_dict(nets.student.state_dict())
    alike(again.eval()(batch["inputs"])["logits"], nets.student.eval()(batch["inputs"])["logits"])


def test_anatomy_says_when_no_linear_layer_gives_the_logits() -> None:
    nets = Nets(student=nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh()))
    with pytest.raises(BadInput, match="no linear layer of the student"):
        anatomy(nets, "student", pictures())


def test_pictures_of_tokens_and_vectors() -> None:
    assert picture(torch.zeros(2, 9, 5)).shape == (2, 5, 3, 3)
    assert picture(torch.zeros(2, 7, 5)).shape == (2, 5, 1, 1)
    assert picture(torch.zeros(2, 5)).shape == (2, 5, 1, 1)
    assert shrunk(torch.zeros(2, 5, 8, 3), (4, 4)).shape == (2, 5, 4, 3)


# ---- srrl


def test_srrl_is_0_where_the_regressed_feature_is_the_teachers() -> None:
    loss = SRRL([(B, 3)], (B, 4), (5, 4), feature_weight=0.0)
    student, head, bias = torch.randn(B, 3), torch.randn(5, 4, requires_grad=True), torch.randn(5)
    h = F.relu(F.batch_norm(student @ loss.linear.weight.T, None, None, training=True)).detach()
    logits = F.linear(h, head, bias).detach()
    assert loss([student], h, logits, head, bias).max() < 1e-20
    loss([student.requires_grad_()], h, logits + 1, head, bias).sum().backward()
    assert head.grad is None and student.grad is not None and loss.linear.weight.grad is not None


# ---- srd


def test_srd_grows_by_the_logarithm_and_does_not_see_affine_changes() -> None:
    loss = SRD((B, 3), (B, 4))
    student, teacher = torch.randn(B, 3), torch.randn(B, 4)
    once = loss(student, teacher)
    alike(loss(student.repeat(2, 1), teacher.repeat(2, 1)), once + math.log(2))
    with torch.no_grad():
        scale = 1000 * torch.rand(4) + 1000
        loss.projector.weight.mul_(scale.unsqueeze(1))
        loss.projector.bias.mul_(scale).add_(5)
    alike(loss(student, 1e3 * teacher), loss(student, 1e6 * teacher), rtol=1e-6)
    assert (loss(student, teacher) - once).abs() < 0.05  # what is left is epsilon


def test_srd_has_a_gradient_of_degree_0() -> None:
    d = torch.randn(B, 4, requires_grad=True)
    loss = (d.abs() ** 4).sum().log()
    alike((d * torch.autograd.grad(loss, d)[0]).sum(), 4.0)
    module = SRD((B, 4), (B, 4))
    nn.init.eye_(module.projector.weight), nn.init.zeros_(module.projector.bias)
    s, t = (F.batch_norm(torch.randn(B, 4), None, None, training=True, eps=1e-4) for _ in range(2))
    unit = lambda x: F.batch_norm(x, None, None, training=True, eps=1e-4)
    alike(module(s, t), ((unit(s) - unit(t)).abs() ** 4).sum().log())


# ---- norm


def test_norm_is_the_official_transform_and_loss() -> None:
    given = vector("norm", "transform")
    student = torch.tensor(given["student_map"]).requires_grad_()
    neck = Transform(2, 2 * given["groups"], True)
    neck.load_state_dict({k: torch.tensor(v) for k, v in given["neck"].items()}, strict=False)
    wide, onward = neck(student)
    loss = matching(wide, torch.tensor(given["teacher_map"]), given["groups"]).mean()
    alike(loss, given["value"])
    alike(onward, given["onward"])
    alike(torch.autograd.grad(loss, student)[0], given["grad"], rtol=1e-7)


@pytest.mark.parametrize(
    ("name", "residual"), [("resnet8", True), ("wrn16x1", False), ("vit_tiny", True), ("mlp", True)]
)
def test_norm_folds_into_the_plain_student(name: str, residual: bool) -> None:
    nets, batch = two(name, "resnet8"), pictures()
    names = set(nets.student.state_dict())
    method = NORM(groups=3, residual=residual)
    method.setup(nets, batch)
    nets.student.train()
    for _ in range(5):
        nets.student(3 * torch.randn(B, 1, 8, 8) + 1)  # statistics that are not those of the start
    wanted = nets.student.eval()(batch["inputs"])["logits"]
    plain = folded(nets.student).eval()
    alike(plain(batch["inputs"])["logits"], wanted, rtol=1e-8, atol=1e-10)
    assert set(plain.state_dict()) == names


def test_norm_leaves_the_plain_student_behind() -> None:
    nets, batch = two("resnet8", "resnet14"), pictures()
    fit(NORM(groups=2), nets, [batch] * 3, Plan(3, optimizer={"sgd": {"lr": 0.1}}))
    assert type(nets.student).__name__ == "ResNet" and nets.student.head.weight.shape == (4, 64)


def test_norm_is_0_when_every_group_is_the_teachers_and_a_linear_projector_with_one() -> None:
    aim = maps(3, 4)
    assert matching(aim.repeat(1, 4, 1, 1), aim, 4).max() == 0
    wide = maps(3, 4)
    alike(matching(wide, aim, 1), (wide - aim).square().flatten(1).mean(1))


# ---- afd and semckd


def test_alignment_weights_sum_to_1_over_the_candidates() -> None:
    encoders = lambda n: [nn.Linear(3, 4) for _ in range(n)]
    told = lambda n: [torch.randn(B, 3) for _ in range(n)]
    for extra in ({}, {"positions": 4}, {"bilinear": nn.Linear(4, 8)}):
        weights = Alignment(encoders(2), encoders(3), temperature=0.5, **extra)(told(2), told(3))
        assert weights.shape == (B, 2, 3)
        alike(weights.sum(2), torch.ones(B, 2))


def test_afd_of_one_pair_is_attention_transfer() -> None:
    student, teacher = maps(3, 4), maps(5, 4)
    loss = AFD([student.shape], [teacher.shape], key_width=4)
    alike(loss([student], [teacher]), at([student], [teacher]))


def test_afd_is_0_where_all_maps_are_proportional() -> None:
    where = torch.rand(B, 1, 4, 4)
    student, teacher = [where * torch.ones(1, 3, 1, 1), 2 * where.repeat(1, 2, 1, 1)], [3 * where.repeat(1, 5, 1, 1)]
    loss = AFD([s.shape for s in student], [t.shape for t in teacher], key_width=4)
    assert loss(student, teacher).abs().max() < 1e-20


def test_semckd_of_one_pair_is_the_projected_mean_square_and_has_a_regressor_a_pair() -> None:
    student, teacher = maps(3, 4), maps(5, 2)
    loss = SemCKD([student.shape], [teacher.shape])
    target = loss.regressors[0][0](F.adaptive_avg_pool2d(student, 2))
    alike(loss([student], [teacher]), (target - teacher).square().flatten(1).mean(1))
    several = SemCKD([student.shape] * 2, [teacher.shape] * 3)
    assert sum(len(row) for row in several.regressors) == 6


def test_semckd_takes_a_short_batch_and_refuses_a_long_one() -> None:
    student, teacher = maps(3, 4), maps(5, 4)
    loss = SemCKD([student.shape], [teacher.shape])
    assert loss([student[:5]], [teacher[:5]]).shape == (5,)
    with pytest.raises(BadInput, match="batches of 6"):
        loss([student.repeat(2, 1, 1, 1)], [teacher.repeat(2, 1, 1, 1)])


def test_semckd_and_afd_serve_tokens() -> None:
    student, teacher = [torch.randn(B, 7, 3), torch.randn(B, 7, 4)], [torch.randn(B, 7, 5)]
    for loss in (SemCKD, AFD):
        assert loss([s.shape for s in student], [t.shape for t in teacher])(student, teacher).shape == (B,)


# ---- nd_loss


def nd(student: Tensor, teacher: Tensor, mean: Tensor) -> Tensor:
    loss = NDLoss(tuple(student.shape), tuple(teacher.shape), (len(student), 1)).eval()
    loss.classes.means.copy_(mean)
    out: Tensor = loss(student, teacher, torch.zeros(len(student), 1), torch.zeros(len(student), dtype=torch.long))
    return out


def test_nd_loss_rewards_direction_and_length_up_to_the_teachers() -> None:
    mean, teacher = torch.randn(1, 4), torch.randn(B, 4)
    longer = teacher.norm(dim=1, keepdim=True) * F.normalize(mean) * 1.5
    assert nd(longer, teacher, mean).abs().max() < 1e-12
    short = 0.1 * torch.randn(B, 4)
    cos = F.cosine_similarity(short, mean)
    alike(nd(short, teacher, mean), 1 - cos * short.norm(dim=1) / teacher.norm(dim=1))
    alike(nd(short, teacher, 7 * mean), nd(short, teacher, mean))


def test_class_means_are_those_of_everything_that_counted() -> None:
    memory, rows, labels = ClassMeans(3, 2), torch.randn(20, 2), torch.arange(20) % 2
    mask = torch.arange(20) != 4
    for part in (slice(0, 6), slice(6, 20)):
        memory.add(rows[part], labels[part], mask[part])
    for c in range(2):
        alike(memory.means[c], rows[(labels == c) & mask].mean(0))
    assert memory.counts.tolist() == [9, 10, 0]


# ---- wcord


def test_the_transport_plan_has_its_marginals_and_costs_nothing_for_a_permutation() -> None:
    rows = F.normalize(torch.randn(B, 4))
    cost = 1 - rows @ rows[torch.randperm(B)].T
    plan = sinkhorn(cost, epsilon=0.01, iterations=200)
    alike(plan.sum(0), torch.full((B,), 1 / B), atol=1e-9)
    alike(plan.sum(1), torch.full((B,), 1 / B), atol=1e-4)
    assert (plan * cost).sum() < 1e-3


def test_wcord_tells_pairs_from_strangers_by_a_critic_of_slope_at_most_1() -> None:
    loss = WCoRD((B, 3), (B, 4), (20,), width=8, local_weight=0.0, global_weight=1.0)
    student, teacher, index = 3 * torch.randn(B, 3), 3 * torch.randn(B, 4), torch.arange(B)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.2)
    start = loss(student, teacher, index).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(student, teacher, index).backward()
        optimizer.step()
    assert loss.eval()(student, teacher, index).item() < start - 0.1
    for layer in (loss.student_map, loss.teacher_map):
        assert torch.linalg.matrix_norm(layer.weight, 2) < 1.01
    from limbeck.losses.contrast.wcord import _cut

    a, b = student, student + 0.1 * torch.randn(B, 3)
    moved = (_cut(loss.student_map(a)) - _cut(loss.student_map(b))).norm(dim=1)
    assert (moved <= 1.01 * (a - b).norm(dim=1)).all()


def test_a_bank_remembers_what_counts_and_averages_all_others() -> None:
    bank = Bank(5, 3)
    before = bank.rows.clone()
    alike(bank.others(torch.tensor([2])), before[[0, 1, 3, 4]].mean(0, keepdim=True))
    now = torch.randn(2, 3)
    bank.remember(torch.tensor([1, 4]), now, 0.25, torch.tensor([True, False]))
    alike(bank.rows[1], 0.25 * before[1] + 0.75 * now[0])
    assert torch.equal(bank.rows[[0, 2, 3, 4]], before[[0, 2, 3, 4]])


# ---- msdcrd


def test_msdcrd_at_scale_1_is_infonce_of_pooled_features() -> None:
    student, teacher = maps(4, 4), maps(4, 2)
    loss = MSDCRD([student.shape], [teacher.shape], scales=(1,), temperature=0.3, channel_weight=0.0)
    nn.init.eye_(loss.projector.inner.weight)
    s, t = (F.normalize(x.mean((2, 3))) for x in (student, teacher))
    alike(loss([student], [teacher]), F.cross_entropy(s @ t.T / 0.3, torch.arange(B)))


def test_msdcrd_falls_to_0_at_the_match_when_it_is_sharp() -> None:
    teacher = maps(4, 4)
    loss = MSDCRD([teacher.shape], [teacher.shape], temperature=1e-3)
    nn.init.eye_(loss.projector.inner.weight)
    assert loss([teacher], [teacher]) < 1e-6 < loss([maps(4, 4)], [teacher])


def test_msdcrd_leaves_out_regions_that_the_teacher_gets_wrong() -> None:
    student, teacher, labels = maps(4, 2), maps(4, 2), torch.arange(B) % 3
    head = torch.randn(3, 4)
    loss = MSDCRD([student.shape], [teacher.shape], scales=(2,), channel_weight=0.0)
    regions = teacher.flatten(2).mT.flatten(0, 1)
    right = (regions @ head.T).argmax(1) == labels.repeat_interleave(4)
    assert 0 < right.sum() < len(right)
    s = F.normalize(loss.projector(student).flatten(2).mT.flatten(0, 1))
    each = F.cross_entropy(s @ F.normalize(regions).T / 0.1, torch.arange(4 * B), reduction="none")
    alike(loss([student], [teacher], labels, head), each[right].mean())


# ---- scalekd


def test_the_alternative_view_does_not_see_a_constant_and_both_are_0_at_the_match() -> None:
    teacher = torch.randn(B, 9, 4)
    shapes = [(B, 3, 3, 3)], [(B, 9, 4)]
    alternative, both = DualView(*shapes, spatial_weight=0.0), DualView(*shapes)
    other = torch.randn(B, 9, 4)
    shifted = alternative.compare(other, other + torch.randn(4), teacher + torch.randn(4))
    alike(shifted, alternative.compare(other, other, teacher))
    assert both.compare(teacher, teacher, teacher).max() < 1e-20


def test_dual_view_asks_the_queries_it_is_given() -> None:
    asked, given = (
        vector("scalekd", "asked"),
        json.loads((Path(__file__).parent / "vectors" / "dual_view.json").read_text()),
    )
    student, teacher = (torch.tensor(given["inputs"][f"{who}_feats"][0]) for who in ("student", "teacher"))
    loss = DualView([student.shape], [teacher.shape], heads=2)
    loss.load_state_dict({k: torch.tensor(v) for k, v in given["state"].items()}, strict=False)
    queries = torch.tensor(asked["queries"])
    value = loss.compare(loss.spatial(student, queries), loss.alternative(student, 2 * queries), teacher)
    alike(value.mean(), asked["value"])


def test_scalekd_goes_through_the_teachers_last_stage_and_leaves_it_alone() -> None:
    nets, batch = two("resnet8", "vit_tiny"), pictures()
    method = ScaleKD(stage=("blocks.3",), heads=4)
    method.setup(nets, batch)
    ((player, parts),) = method.step(nets, batch, Clock(0, 1))
    assert player == "student" and set(parts) == {"ce", "kd", "before", "last"}
    parts["before"].value.backward()
    assert all(p.grad is None for p in nets.teacher.parameters())
    assert all(p.grad is not None for p in nets.losses.before.spatial.local.parameters())
    with pytest.raises(BadInput, match="do not make its last feature"):
        ScaleKD(stage=("blocks.1",), heads=4).setup(two("resnet8", "vit_tiny"), batch)


# ---- sskd


class Told(nn.Module):
    """Says what it was told, whatever it is shown."""

    def __init__(self, logits: Any, emb: Any) -> None:
        super().__init__()
        self.logits, self.emb = (nn.Parameter(torch.tensor(x)) for x in (logits, emb))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits, "emb": self.emb}


def test_sskd_is_the_official_loss() -> None:
    given = vector("sskd", "losses")
    nets = Nets(
        student=Told(given["student_logits"], given["student_z"]),
        teacher=Told(given["teacher_logits"], given["teacher_z"]),
        puzzlers=nn.ModuleDict({"teacher": nn.Identity(), "student": nn.Identity()}),
    )
    batch = {"inputs": torch.zeros(4, 1, 2, 2), "labels": torch.tensor(given["labels"])}
    method = SSKD(**given["knobs"])
    ((player, pretext),) = method.step(nets, batch, Clock(0, 1, stage=0))
    assert player == "puzzlers.teacher"
    alike(pretext.value, given["pretext"])
    ((player, parts),) = method.step(nets, batch, Clock(0, 1, stage=1))
    assert player == "student"
    for name, part in parts.items():
        alike(part.value, given["parts"][name])
    assert [int(parts["turned"].count), int(parts["puzzle"].count)] == given["kept"]
    sum(part.value for part in parts.values()).backward()
    alike(nets.student.logits.grad, given["grad"]["student_logits"], rtol=1e-7)
    alike(nets.student.emb.grad, given["grad"]["student_z"], rtol=1e-7)


def test_sskd_trusts_the_right_and_the_best_ranked_share_of_the_wrong() -> None:
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [3, 2, 1]])
    truth, real = torch.tensor([0, 2, 1, 1]), torch.ones(4, dtype=torch.bool)
    assert trusted(logits, truth, 0.0, real).tolist() == [True, False, False, False]
    assert trusted(logits, truth, 0.7, real).tolist() == [True, False, True, True]
    assert trusted(logits, truth, 1.0, real).all()
    real[2] = False
    assert trusted(logits, truth, 0.5, real).tolist() == [True, False, False, True]


def test_sskd_lays_each_picture_before_its_three_turns() -> None:
    shown = torch.arange(8.0).view(2, 1, 2, 2)
    batch = turned(shown)
    assert torch.equal(batch[::4], shown)
    for k in range(1, 4):
        assert torch.equal(batch[4 + k], torch.rot90(shown[1], k, (1, 2)))
    z, real = torch.randn(8, 3), torch.ones(2, dtype=torch.bool)
    alike(puzzle(z, real)[4], torch.stack([F.cosine_similarity(z[6], z[0], 0), F.cosine_similarity(z[6], z[4], 0)]))
    alike(puzzle(5 * z, real), puzzle(z, real))
