"""What the papers say must hold exactly of minilm, patient_kd, tinybert, a2d, mi_alpha, trg, e2kd, cskd and others."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.errors import BadInput
from limbeck.core.find import get
from limbeck.core.heads import log_relation, looks_apart
from limbeck.core.loop import Clock
from limbeck.core.nets import Nets
from limbeck.core.taps import spread
from limbeck.losses.features.patient_kd import patient_layers
from limbeck.train.plain.cskd import FUSIONS, at_places, dense_loss
from limbeck.train.plain.flex_kd import Units, slopes
from tests.numbers import FP64, VECTORS, close, made, rand, rotation


def attention(seed=0, heads=2, tokens=3):
    return rand(2, heads, tokens, tokens, seed=seed).softmax(-1)


# ---------------------------------------------------------------- minilm, minilm_v2


def test_minilm_does_not_see_a_rotation_of_the_values_of_a_head():
    attn, values, aims = [attention()], rand(2, 3, 4, seed=1), [rand(2, 3, 6, seed=2)]
    turned = torch.cat([values[..., :2] @ rotation(2, 3), values[..., 2:] @ rotation(2, 4)], -1)
    mixed = values @ rotation(4, 5)
    loss = [get("minilm")(attn, [attention(9)], [v], aims) for v in (values, turned, mixed)]
    close(loss[1], loss[0])
    assert (loss[2] - loss[0]).abs().min() > 1e-3


def test_minilm_looks_at_the_last_layers_alone_and_has_no_weights():
    one = get("minilm")(
        [attention(1), attention()], [attention(2)], [rand(2, 3, 4), rand(2, 3, 4, seed=1)], [rand(2, 3, 4)]
    )
    two = get("minilm")([attention()], [attention(3), attention(2)], [rand(2, 3, 4, seed=1)], [rand(2, 3, 4)])
    close(one, two)
    assert not isinstance(get("minilm"), type)


def test_minilm_may_copy_an_earlier_layer_of_the_teacher():
    mine, early, late = attention(), attention(2), attention(3)
    values, told = rand(2, 3, 4), [rand(2, 3, 4, seed=1), rand(2, 3, 4, seed=2)]
    close(
        get("minilm")([mine], [early, late], [values], told, layer=0),
        get("minilm")([mine], [early], [values], told[:1]),
    )
    with pytest.raises(BadInput, match="2 is none of the 2 features of the teacher"):
        get("minilm")([mine], [early, late], [values], told, layer=2)


def test_minilm_does_not_see_padding():
    real = torch.tensor([[True, True, False], [True, True, True]])
    attn, values, aims = rand(2, 2, 3, 3).softmax(-1), rand(2, 3, 4, seed=1), rand(2, 3, 4, seed=2)
    spoiled, other = values.clone(), attn.clone()
    spoiled[0, 2], other[0, :, 2] = 7.0, 1 / 3
    run = lambda a, v: get("minilm")([a], [attention(5)], [v], [aims], real)
    close(run(other, spoiled), run(attn, values))


def test_minilm_refuses_heads_of_another_number():
    with pytest.raises(BadInput, match="minilm_v2"):
        get("minilm")([attention(heads=2)], [attention(heads=3)], [rand(2, 3, 6)], [rand(2, 3, 6)])


def test_relations_are_distributions():
    close(log_relation(rand(2, 5, 6), 3).exp().sum(-1), torch.ones(2, 3, 5))


def test_minilm_v2_with_values_alone_is_the_value_term_of_minilm():
    student, aims = [rand(2, 3, 4)], [rand(2, 3, 6, seed=1)]
    v2 = get("minilm_v2")(
        *([rand(2, 3, 4, seed=s)] for s in (2, 3, 4, 5)), student, aims, relation_heads=2, query_weight=0, key_weight=0
    )
    same = [attention()]
    close(v2, get("minilm")(same, same, student, aims))


def test_minilm_v2_is_0_for_rotations_inside_relation_heads():
    aims = [[rand(2, 3, 4, seed=s)] for s in range(3)]
    turned = [
        [torch.cat([a[0][..., :2] @ rotation(2, s), a[0][..., 2:] @ rotation(2, s + 5)], -1)]
        for s, a in enumerate(aims)
    ]
    both = [x for pair in zip(turned, aims, strict=True) for x in pair]
    close(get("minilm_v2")(*both, relation_heads=2), torch.zeros(2))
    assert (get("minilm_v2")(*both, relation_heads=4) > 1e-3).all()


def test_looks_apart_of_no_real_token_is_0():
    logs = log_relation(rand(2, 3, 4), 2), log_relation(rand(2, 3, 4, seed=1), 2)
    apart = looks_apart(*logs, torch.tensor([[False] * 3, [True] * 3]))
    assert apart[0] == 0 and apart[1] > 0


# ---------------------------------------------------------------- patient_kd, tinybert


def test_patient_kd_takes_the_layers_of_the_paper():
    assert [j + 1 for _, j in patient_layers(6, 12, "skip")] == [2, 4, 6, 8, 10]
    assert [j + 1 for _, j in patient_layers(6, 12, "last")] == [7, 8, 9, 10, 11]
    assert [j + 1 for _, j in patient_layers(3, 12, "skip")] == [4, 8]
    with pytest.raises(BadInput, match="every block"):
        patient_layers(1, 12, "skip")


def test_patient_kd_does_not_see_positive_scale():
    teacher = [rand(4, 3, 5, seed=s) for s in range(4)]
    student = [torch.rand(4, 1, 1, dtype=FP64) * teacher[1] + 0.0, rand(4, 3, 5, seed=9)]
    close(made("patient_kd", student, teacher)(student, teacher), torch.zeros(4))
    assert (made("patient_kd", student, teacher, normalized=False)(student, teacher) > 1e-3).all()


def test_patient_kd_reads_the_first_token_or_the_mean_of_real_ones():
    teacher, student = [rand(2, 3, 5, seed=s) for s in range(2)], [rand(2, 3, 5, seed=s) for s in (5, 6)]
    moved = [student[0].clone(), student[1]]
    moved[0][:, 2] += 1
    real = torch.tensor([[True, True, False]] * 2)
    first, average = (made("patient_kd", student, teacher, state=s) for s in ("first", "mean"))
    close(first(moved, teacher), first(student, teacher))
    close(average(moved, teacher, real), average(student, teacher, real))
    assert (average(moved, teacher) - average(student, teacher)).abs().min() > 1e-4


def test_tinybert_is_0_when_all_coincides_and_maps_do_nothing():
    tokens, feats, scores = rand(2, 3, 4), [rand(2, 3, 4, seed=1)], [rand(2, 2, 3, 3, seed=2)]
    loss = made("tinybert", tokens, tokens, feats, feats, scores, scores)
    assert (loss(tokens, tokens, feats, feats, scores, scores) > 1e-3).all()
    for linear in loss.maps.values():
        nn.init.eye_(linear.inner.weight)
        nn.init.zeros_(linear.inner.bias)
    close(loss(tokens, tokens, feats, feats, scores, scores), torch.zeros(2))


def test_tinybert_maps_last_on_last_and_shares_one_map_when_told():
    assert spread(4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]
    tokens, wide = rand(2, 3, 2), rand(2, 3, 3)
    args = (tokens, wide, [tokens, tokens], [wide] * 4, [rand(2, 2, 3, 3)] * 2, [rand(2, 2, 3, 3)] * 4)
    assert len(made("tinybert", *args).maps) == 2 and len(made("tinybert", *args, shared=True).maps) == 1


def test_tinybert_refuses_other_numbers_of_heads():
    tokens = rand(2, 3, 2)
    with pytest.raises(BadInput, match="minilm_v2"):
        made("tinybert", tokens, tokens, [tokens], [tokens], [rand(2, 2, 3, 3)], [rand(2, 4, 3, 3)])


# ---------------------------------------------------------------- a2d, mi_alpha, trg


def test_a2d_compares_heads_one_to_one_with_an_identity_and_does_not_see_a_constant():
    student, teacher = [attention(1)], [attention(2)]
    loss = made("a2d", student, teacher)
    nn.init.eye_(loss.alignment.inner.weight)
    with torch.no_grad():
        loss.alignment.inner.bias.copy_(torch.tensor([3.0, -1.0]))
    close(loss(teacher, teacher), torch.zeros(2))
    flat = [x[0].flatten(2).log_softmax(-1) for x in (teacher, student)]
    close(loss(student, teacher), (flat[0].exp() * (flat[0] - flat[1])).sum((1, 2)))


def test_mi_alpha_is_infonce_at_1_and_nwj_at_0():
    student, teacher = [rand(5, 3)], [rand(5, 4, seed=1)]
    loss = made("mi_alpha", student, teacher, alpha=1.0)
    critic, everyone = loss.critics[0], torch.ones(5, dtype=torch.bool)
    with torch.no_grad():
        critic.score.weight.mul_(40)
    scores, _ = critic(student[0], teacher[0], everyone)
    infonce = (scores.diagonal() - scores.logsumexp(0) + math.log(5)).mean()
    close(-loss(student, teacher), infonce)
    assert infonce <= math.log(5)
    loss.alpha = 0.0
    nn.init.zeros_(critic.baseline[2].weight)
    nn.init.ones_(critic.baseline[2].bias)
    others = (scores - 1).exp()[~torch.eye(5, dtype=torch.bool)]
    close(-loss(student, teacher), scores.diagonal().mean() - others.mean())


def test_trg_is_0_for_equal_tokens_and_does_not_see_where_they_lie():
    tokens = [rand(4, 6, 3)]
    loss = made("trg", tokens, tokens, global_weight=0.0, neighbours=4)
    close(loss(tokens, tokens), 0.0)
    loss.local_weight = 0.0
    close(loss([tokens[0] @ rotation(3)], tokens), 0.0)
    loss.local_weight, loss.inner_weight = 1.0, 0.0
    close(loss([tokens[0] + 5.0], tokens), 0.0, 1e-9)
    assert loss([rand(4, 6, 3, seed=1)], tokens) > 1e-4


def test_trg_draws_the_same_places_of_both():
    tokens = [rand(4, 9, 3)]
    loss = made("trg", tokens, tokens, global_weight=0.0, sampled=5)
    close(loss(tokens, tokens), 0.0)


# ---------------------------------------------------------------- e2kd, cskd


class Kernel(nn.Module):
    """Softplus of one convolution, and a head on the mean of its squares."""

    def __init__(self, kernel, head):
        super().__init__()
        self.kernel, self.head = nn.Parameter(torch.tensor(kernel, dtype=FP64)), torch.tensor(head, dtype=FP64)

    def forward(self, inputs):
        feature = F.softplus(F.conv2d(inputs, self.kernel))
        return {"logits": feature.square().mean((2, 3)) @ self.head.T, "feats": [feature]}


def explained(**knobs):
    numbers = json.loads((VECTORS / "e2kd.json").read_text())["explained"]
    kd = {"kd": {"temperature": numbers["temperature"]}}
    method = get("e2kd")(match=(kd,), **{"weight": numbers["weight"], **knobs})
    nets = Nets(
        student=Kernel(numbers["student_kernel"], numbers["student_head"]),
        teacher=Kernel(numbers["teacher_kernel"], numbers["teacher_head"]),
    )
    batch = {"inputs": torch.tensor(numbers["images"], dtype=FP64)}
    return method, nets, batch, numbers


def test_e2kd_is_that_of_the_authors():
    method, nets, batch, numbers = explained()
    method.setup(nets, batch)
    ((player, parts),) = method.step(nets, batch, Clock(0, 1))
    total = sum(part.value for part in parts.values())
    close(total.detach(), numbers["value"], 1e-9)
    total.backward()
    close(nets.student.kernel.grad, numbers["grad"], 1e-9)
    assert player == "student" and nets.teacher.kernel.grad is None


def test_e2kd_without_weight_is_kd_and_explains_every_so_often():
    method, nets, batch, _ = explained(weight=0.0, every=2)
    ((_, first),), ((_, second),) = method.step(nets, batch, Clock(0, 4)), method.step(nets, batch, Clock(1, 4))
    assert set(first) == {"explanation", "kd"} and set(second) == {"kd"}
    assert first["explanation"].value == 0
    close(first["kd"].value.detach(), second["kd"].value.detach())


def test_e2kd_explanations_are_0_apart_when_equal_and_do_not_see_the_scale_of_logits():
    method, nets, batch, numbers = explained(weight=1.0)
    nets.student = Kernel(numbers["teacher_kernel"], (3 * torch.tensor(numbers["teacher_head"])).tolist())
    ((_, parts),) = method.step(nets, batch, Clock(0, 1))
    close(parts["explanation"].value.detach(), 0.0, 1e-9)


def test_cskd_dense_loss_is_that_of_the_authors():
    numbers = json.loads((VECTORS / "cskd.json").read_text())
    dense = numbers["dense"]
    teacher = torch.tensor(dense["teacher_map"], dtype=FP64)
    for case in dense["cases"]:
        tokens = torch.tensor(dense["student_tokens"], dtype=FP64, requires_grad=True)
        value = dense_loss(tokens.mT.unflatten(2, (4, 4)), teacher, FUSIONS["linear"](case["progress"])).mean()
        close(value.detach(), case["value"], 1e-9)
        value.backward()
        close(tokens.grad, case["grad"], 1e-9)
    for name, fall in FUSIONS.items():
        close([fall(x) for x in numbers["shares"]["progress"]], numbers["shares"][name])


def test_cskd_ends_with_one_answer_for_all_places_and_a_flat_teacher_always_gives_it():
    student, teacher = rand(2, 3, 4, 4), rand(2, 3, 4, 4, seed=1)
    whole = teacher.mean((2, 3)).argmax(1)
    wanted = F.cross_entropy(student, whole[:, None, None].expand(2, 4, 4), reduction="none").mean((1, 2))
    close(dense_loss(student, teacher, 0.0), wanted)
    flat = teacher.mean((2, 3), keepdim=True).expand_as(teacher)
    close(dense_loss(student, flat, 0.7), wanted)
    assert not torch.allclose(dense_loss(student, teacher, 1.0), wanted)


class Picture(nn.Module):
    """A map and a linear head on its mean."""

    def __init__(self, channels, classes=3):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, channels, 3), nn.Linear(channels, classes)

    def forward(self, inputs):
        feature = self.body(inputs)
        return {"logits": self.head(feature.mean((2, 3))), "feats": [feature]}


def test_cskd_asks_the_teacher_at_every_place():
    torch.manual_seed(0)
    nets, method = Nets(student=Picture(2), teacher=Picture(4)), get("cskd")()
    batch = {"inputs": torch.randn(5, 1, 6, 6), "labels": torch.arange(5) % 3}
    method.setup(nets, batch)
    told = nets.run("teacher", batch)

    places = at_places(nets.teacher_head, told)
    assert places.shape == (5, 3, 4, 4)
    torch.testing.assert_close(places.mean((2, 3)), told["logits"])
    ((_, parts),) = method.step(nets, batch, Clock(0, 2))
    assert set(parts) == {"ce", "hard", "dense"}


# ---------------------------------------------------------------- pca_gl, local_relation, flex_kd


def transformer_teacher(width=4, places=4):
    told = [[rand(2, places, width, seed=s)] for s in (1, 2, 3)]
    return [rand(2, places, 5, seed=4)], *told, [rand(2, 2, places, places, seed=5).softmax(-1)]


def test_pca_gl_leaves_only_the_values_relation_when_all_is_replaced():
    student, teacher = [rand(2, 3, 6, 6)], transformer_teacher()
    loss = made("pca_gl", student, *teacher, replaced=1.0, feature_weight=0.0, adversarial_weight=0.0)
    assert (loss(student, *teacher) > 1e-3).all()
    values = nn.Module()
    values.forward = lambda maps: teacher[3][0].mT.unflatten(2, (2, 2))
    loss.convolutions[2] = values
    close(loss(student, *teacher), torch.zeros(2))
    loss.replaced = 0.0
    assert (loss(student, *teacher) > 1e-3).all()


def test_pca_gl_has_a_matrix_a_block_of_neighbours():
    student, teacher = [rand(2, 3, 8, 8)], transformer_teacher(places=64)
    loss = made("pca_gl", student, *teacher)
    part = loss._part(teacher[0][0]).unflatten(0, (8, 8))
    assert len(loss.parts) == 16 and part.unique().numel() == 16
    assert (part[:2, :2] == 0).all() and (part[6:, 6:] == 15).all() and part[0, 2] == 1 and part[2, 0] == 4


def test_pca_gl_discriminator_goes_down_where_the_student_goes_up():
    student, teacher = [rand(2, 3, 6, 6).requires_grad_()], transformer_teacher()
    loss = made("pca_gl", student, *teacher, attention_weight=0.0, feature_weight=0.0, dropout=0.0)
    before = loss(student, *teacher).mean()
    weights = list(loss.discriminator.parameters())
    grads = torch.autograd.grad(before, [*weights, *student])
    with torch.no_grad():
        moved = [student[0] - 1e-3 * grads[-1] / grads[-1].norm()]
        assert loss(moved, *teacher).mean() > before
        for weight, grad in zip(weights, grads, strict=False):
            weight -= 1e-2 * grad
        assert loss(student, *teacher).mean() < before


def test_local_relation_does_not_see_a_common_rotation_and_is_about_images_at_one_region():
    maps = rand(3, 4, 6, 6)
    turned = torch.einsum("bchw,cd->bdhw", maps, 2 * rotation(4))
    other = rand(3, 4, 6, 6, seed=1)
    loss = get("local_relation")
    close(loss([turned], [maps], grid=3), 0.0)
    assert loss([other], [maps], grid=3) > 1e-3
    close(loss([other], [maps], grid=1, same_weight=0, across_weight=0), 0.0)
    images = [F.normalize(x.mean((2, 3))) for x in (other, maps)]
    wanted = (images[0] @ images[0].T - images[1] @ images[1].T).square().mean()
    close(loss([other], [maps], grid=1, inside_weight=0, across_weight=0), wanted)


def test_local_relation_draws_regions_beyond_its_cap():
    student, teacher = [rand(4, 3, 4, 4)], [rand(4, 5, 4, 4, seed=1)]
    torch.manual_seed(0)
    loss = lambda cap: get("local_relation")(student, teacher, inside_weight=0, same_weight=0, cap=cap)
    close(loss(64), loss(1000))
    assert loss(8) != loss(8)


def test_flex_kd_units_are_those_of_the_hand():
    numbers = json.loads((VECTORS / "flex_kd.json").read_text())["units"]
    student = torch.tensor(numbers["student"], dtype=FP64, requires_grad=True)
    teacher = torch.tensor(numbers["teacher"], dtype=FP64)
    units = Units([tuple(student.shape)], [tuple(teacher.shape)], layer=-1)
    units.importance += torch.tensor([0.0, 3.0, 1.0, 2.0])
    units.choose()
    assert units.chosen.tolist() == numbers["chosen"]
    value = units([student], [teacher], torch.tensor(numbers["attention_mask"]))
    close(value.detach(), numbers["value"], 1e-9)
    value.backward()
    close(student.grad, numbers["grad"], 1e-9)


def test_flex_kd_does_not_see_scale_and_shift_and_keeps_all_units_of_equal_widths():
    teacher = rand(4, 5, 6)
    units = Units([(4, 5, 6)], [(4, 5, 6)], layer=-1)
    units.importance += torch.rand(6)
    units.choose()
    assert units.chosen.tolist() == list(range(6)) and not list(units.parameters())
    close(units([teacher * (torch.rand(6, dtype=FP64) + 0.1) + rand(6, seed=2)], [teacher]), 0.0, 1e-7)
    with pytest.raises(BadInput, match="units"):
        Units([(4, 7)], [(4, 6)], layer=-1)


class Squashed(nn.Module):
    """Hidden states that are given, and a head on the mean of their tanh over the tokens."""

    def __init__(self, hidden, head):
        super().__init__()
        self.hidden, self.head = nn.Parameter(hidden), nn.Parameter(head)

    def forward(self, inputs):
        feature = 1.0 * self.hidden
        return {"logits": feature.tanh().mean(1) @ self.head.T, "feats": [feature]}


def test_flex_kd_judges_units_by_the_slope_of_the_first_choice():
    numbers = json.loads((VECTORS / "flex_kd.json").read_text())["slopes"]
    hidden, head = (torch.tensor(numbers[k], dtype=FP64) for k in ("hidden", "head"))
    nets = Nets(teacher=Squashed(hidden, head))
    units = Units([(2, 3, 2)], [tuple(hidden.shape)], layer=-1).double()
    batch = {"inputs": torch.zeros(2, 3, dtype=torch.long)}
    units.add(slopes(nets, batch, -1), batch)
    close(units.importance, numbers["importance"], 1e-9)
    assert not any(p.requires_grad or p.grad is not None for p in nets.teacher.parameters())
