"""What the papers say must hold of these losses exactly, besides the reference numbers in the vectors."""

import json
import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import BadInput
from limbeck.core.find import get
from limbeck.core.reduce import mean
from tests import numbers
from tests.numbers import FP64, VECTORS, grad, rand


def close(a, b, tol=1e-12):
    numbers.close(a, b, tol)


s, t, y = rand(6, 5, seed=1, scale=3), rand(6, 5, seed=2, scale=3), torch.tensor([0, 1, 2, 3, 4, 2])
shift = rand(6, 1, seed=3, scale=10)


# ---- responses -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kd_gradient_is_the_difference_of_the_softened_probabilities(temperature):
    got = grad(lambda x: get("kd")(x, t, temperature=temperature), s)
    want = temperature * ((s / temperature).softmax(-1) - (t / temperature).softmax(-1)) / len(s)
    close(got, want)


@pytest.mark.parametrize("name", ["kd", "dkd", "forward_kl", "reverse_kl"])
def test_a_constant_per_example_changes_nothing(name):
    extra = (y,) if name == "dkd" else ()
    loss = get(name)
    close(loss(s + shift, t, *extra), loss(s, t, *extra), 1e-11)
    close(loss(s, t + shift, *extra), loss(s, t, *extra), 1e-11)
    close(loss(t + shift, t, *extra), torch.zeros(6), 1e-11)
    close(grad(lambda x: loss(x, t, *extra), t + shift), torch.zeros(6, 5), 1e-11)


def test_kd_tends_to_the_squared_difference_of_centred_logits_at_high_temperature():
    gap = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    close(get("kd")(s, t, temperature=1e4), gap.square().sum(-1) / (2 * 5), 1e-3)


def test_kd_is_the_same_per_place_in_a_sequence():
    seq_s, seq_t = rand(2, 3, 5, seed=4), rand(2, 3, 5, seed=5)
    close(get("kd")(seq_s, seq_t).flatten(), get("kd")(seq_s.flatten(0, 1), seq_t.flatten(0, 1)))
    labels = torch.tensor([[0, 1, 2], [3, 4, 0]])
    close(get("dkd")(seq_s, seq_t, labels)[1, 2], get("dkd")(seq_s[1, 2], seq_t[1, 2], labels[1, 2]))
    close(get("ce")(seq_s, labels)[1, 2], -seq_s[1, 2].log_softmax(-1)[0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_is_kd_when_beta_is_what_the_teacher_leaves_over(temperature):
    left_over = 1 - (t / temperature).softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    label = get("dkd")(s, t, y, alpha=1.0, beta=0.0, temperature=temperature)
    others = get("dkd")(s, t, y, alpha=0.0, beta=1.0, temperature=temperature)
    close(label + left_over * others, get("kd")(s, t, temperature=temperature))


def test_the_second_term_of_dkd_does_not_know_the_label_logits():
    moved_s, moved_t = s.clone(), t.clone()
    moved_s[range(6), y] += 7.0
    moved_t[range(6), y] -= 3.0
    close(get("dkd")(moved_s, moved_t, y, alpha=0.0), get("dkd")(s, t, y, alpha=0.0))
    assert not torch.allclose(get("dkd")(moved_s, t, y, beta=0.0), get("dkd")(s, t, y, beta=0.0))


def test_dkd_hides_the_label_also_where_logits_differ_by_thousands():
    far = torch.tensor([[5e3, 0.0, 1.0]], dtype=FP64)
    close(get("dkd")(far, torch.tensor([[9e3, 0.0, 1.0]], dtype=FP64), torch.tensor([0]), alpha=0.0), [0.0])


def test_forward_kl_to_a_certain_teacher_is_the_label_loss():
    certain = torch.where(F.one_hot(y, 5).bool(), 0.0, -1e6).double()
    close(get("forward_kl")(s, certain), get("ce")(s, y))


def test_the_two_divergences_are_each_other_with_the_roles_exchanged():
    close(get("reverse_kl")(s, t), get("forward_kl")(t, s))
    assert not torch.allclose(get("reverse_kl")(s, t), get("forward_kl")(s, t))


def test_smoothing_mixes_the_label_with_all_classes():
    log_p = s.log_softmax(-1)
    close(get("ce")(s, y, label_smoothing=0.2), 0.8 * get("ce")(s, y) + 0.2 * -log_p.mean(-1))


# ---- features and attention ----------------------------------------------------------------------------------------
def test_fitnets_is_zero_where_the_regressor_hits_the_hint():
    maps = rand(4, 2, 4, 4, seed=6)
    hint = get("fitnets")([(4, 2, 4, 4)], [(4, 3, 2, 2)]).double()
    close(hint([maps], [hint.projector(maps).detach()]), torch.zeros(4))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((4, 2, 8, 8), (4, 3, 4, 4)),
        ((4, 2, 4, 4), (4, 3, 8, 8)),
        ((4, 2, 7, 7), (4, 3, 5, 6)),
        ((4, 2, 3, 3), (4, 3, 8, 8)),
        ((4, 5), (4, 7)),
        ((4, 6, 5), (4, 6, 7)),
        ((4, 5), (4, 3, 8, 8)),
        ((4, 9, 5), (4, 3, 4, 4)),
    ],
)
def test_fitnets_sizes_its_regressor(student, teacher):
    torch.manual_seed(0)
    hint = get("fitnets")([(4, 1), student], [(4, 1), teacher], layer=1)
    out = hint([torch.randn(4, 1), torch.randn(student)], [torch.randn(4, 1), torch.randn(teacher)])
    assert out.shape == ((4, 6) if len(student) == len(teacher) == 3 else (4,)) and out.isfinite().all()


def test_fitnets_refuses_what_it_cannot_compare():
    for student, teacher, layer, why in [((4, 6, 5), (4, 7, 5), 0, "square"), ((4, 5), (4, 5), 2, "layer")]:
        with pytest.raises(BadInput, match=why):
            get("fitnets")([student], [teacher], layer=layer)


def maps(channels, seed):
    return rand(3, channels, 4, 4, seed=seed)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 4.0])
def test_at_sees_only_where(power):
    at = lambda a, b: get("at")([a], [b], power=power)
    teacher, student = maps(4, 7), maps(2, 8)
    scale = torch.tensor([3.0, -0.25, 1e-9], dtype=FP64).view(3, 1, 1, 1)
    close(at(scale * teacher, teacher), torch.zeros(3))
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=FP64).view(1, 4, 1, 1)
    close(at(student, (signs * teacher)[:, [2, 0, 3, 1]]), at(student, teacher))
    q_s, q_t = (x.abs().pow(power).sum(1).flatten(1) for x in (student, teacher))
    close(at(student, teacher), (2 - 2 * F.cosine_similarity(q_s, q_t)) / 16)
    eq_2 = (F.normalize(q_s) - F.normalize(q_t)).norm(dim=1)
    close(eq_2, (16 * at(student, teacher)).sqrt())


def test_at_reads_tokens_as_pictures_and_pairs_layers_by_depth():
    early, late, teacher = maps(2, 1), maps(2, 2), maps(5, 3)
    whole = get("at")([late], [teacher])
    close(get("at")([early, late], [teacher]), whole)
    as_tokens = lambda x: x.flatten(2).mT
    close(get("at")([as_tokens(late)], [as_tokens(teacher)]), whole)
    close(get("at")([as_tokens(late)], [teacher]), whole)


def test_at_refuses_vectors():
    with pytest.raises(BadInput, match="a vector has none"):
        get("at")([rand(3, 4)], [maps(2, 3)])


# ---- relations -----------------------------------------------------------------------------------------------------
def turned(x, seed):
    rotation = torch.linalg.qr(rand(x.shape[1], x.shape[1], seed=seed)).Q
    return 3.7 * x @ rotation + rand(1, x.shape[1], seed=seed + 1, scale=5)


def test_rkd_sees_only_the_shape_of_the_cloud():
    a, b = rand(6, 3, seed=9), rand(6, 4, seed=10)
    close(get("rkd")(turned(a, 11), turned(b, 13)), get("rkd")(a, b), 1e-10)
    close(get("rkd")(turned(a, 11), a), 0.0, 1e-10)
    assert get("rkd")(a, b) > 0.1


def test_rkd_of_two_points_is_zero():
    two = rand(2, 3, seed=14), rand(2, 4, seed=15)
    assert get("rkd")(*two, angle_weight=0.0).item() == 0.0
    assert get("rkd")(*two).item() < 1e-28


def test_rkd_of_equal_points_has_a_finite_gradient():
    a = rand(5, 3, seed=16)
    a[1] = a[0]
    g = grad(lambda x: get("rkd")(x, rand(5, 4, seed=17)), a)
    assert g.isfinite().all() and 0 < g.abs().max() < 1e3
    assert grad(lambda x: get("rkd")(x, rand(5, 4, seed=17)), torch.zeros(5, 3, dtype=FP64)).isfinite().all()
    assert grad(lambda x: get("rkd")(x, rand(1, 4, seed=17)), rand(1, 3)).isfinite().all()


def test_rkd_sums_of_the_paper_are_the_means_times_their_number():
    a, b = rand(4, 3, seed=18), rand(4, 2, seed=19)
    huber = lambda x: 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5
    mu = {id(e): sum((e[i] - e[j]).norm() for i in range(4) for j in range(4)) / 12 for e in (a, b)}
    d = lambda e, i, j: (e[i] - e[j]).norm() / mu[id(e)]
    cos = lambda e, i, j, k: F.cosine_similarity(e[i] - e[j], e[k] - e[j], dim=0)
    pairs = sum(huber(d(a, *p) - d(b, *p)) for p in permutations(range(4), 2))
    triples = sum(huber(cos(a, *p) - cos(b, *p)) for p in permutations(range(4), 3))
    close(get("rkd")(a, b, distance_weight=1.0, angle_weight=0.0) * 16, pairs, 1e-10)
    close(get("rkd")(a, b, distance_weight=0.0, angle_weight=1.0) * 64, triples, 1e-10)


# ---- contrast ------------------------------------------------------------------------------------------------------
N = 12


def crd(**knobs):
    torch.manual_seed(0)
    return get("crd")((4, 5), (4, 7), (N,), **{"width": 3, "negative_count": 6} | knobs).double()


def banks(module):
    return torch.stack([module.student_bank, module.teacher_bank]).clone()


def test_crd_banks_move_only_the_rows_of_the_batch_and_keep_unit_length():
    module, index = crd(), torch.tensor([3, 0, 7, 11])
    before = banks(module)
    module(rand(4, 5), rand(4, 7), index)
    after = banks(module)
    changed = (before != after).any(-1)
    assert changed[:, index].all() and changed.sum() == 2 * len(index)
    close(after[:, index].norm(dim=-1), torch.ones(2, 4))


def test_crd_looks_without_touching_outside_training():
    module, index = crd(), torch.tensor([3, 0, 7, 11])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad():
        module(rand(4, 5), rand(4, 7), index, torch.tensor([0, 1, 2, 0]))
    module.eval()(rand(4, 5), rand(4, 7), index, torch.tensor([0, 1, 2, 0]))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_crd_agrees_with_its_first_call_too_and_with_the_banks_that_it_leaves():
    vector = json.loads((VECTORS / "crd.json").read_text())
    whole = ("index", "negatives", "classes")
    double = lambda d: {k: torch.tensor(v, dtype=torch.long if k in whole else FP64) for k, v in d.items()}
    module = get("crd")((3, 4), (3, 3), (7,), **vector["knobs"]).double()
    first = vector["first_call"]
    module.load_state_dict(double(first["state"]), strict=False)  # all but log_z, which this call sets
    assert module.log_z.isinf().all()
    close(mean(module(**double(first["inputs"]))).value, first["value"])
    for key, want in double(vector["state"]).items():
        close(module.state_dict()[key], want)
    module(**double(vector["inputs"]))
    for key, want in double(vector["state_after"]).items():
        close(module.state_dict()[key], want)


def test_crd_tends_to_zero_when_the_positive_wins_everything():
    module = crd(temperature=0.01, width=5)
    with torch.no_grad():
        for bank in (module.student_bank, module.teacher_bank):
            bank.copy_(torch.nn.functional.one_hot(torch.arange(N) % 2, 5))
        module.student_embed.weight.copy_(torch.eye(5))
        module.student_embed.bias.zero_()
        module.teacher_embed.weight.copy_(torch.eye(5, 7))
        module.teacher_embed.bias.zero_()
        module.log_z.fill_(50.0)
    student, teacher = F.one_hot(torch.tensor([0]), 5).double(), F.one_hot(torch.tensor([0]), 7).double()
    loss = module(student, teacher, torch.tensor([0]), negatives=torch.tensor([[1, 3, 5]]))
    assert 0 < loss.item() <= 1.01 * 2 * N * 1e-7  # the floor that the code's epsilon leaves


def test_crd_trains_both_embeddings_and_no_teacher():
    module = crd()
    student, teacher = rand(4, 5).requires_grad_(), rand(4, 7).requires_grad_()
    mean(module(student, teacher, torch.tensor([3, 0, 7, 11]))).value.backward()
    assert teacher.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [student, *module.parameters()])


def test_crd_draws_others_of_other_classes():
    module, index, labels = crd(), torch.arange(N), torch.arange(N) % 3
    module(rand(N, 5), rand(N, 7), index, labels)
    drawn = module._draw(index, labels)
    assert drawn.shape == (N, 6)
    assert (module.classes[drawn] != labels[:, None]).all()
    assert all(row.unique().numel() == 6 for row in drawn)
    without = module._draw(index, None)
    assert without.shape == (N, 6) and (without != index[:, None]).all()
    assert module._draw(index, torch.zeros(N, dtype=torch.long)).shape == (N, 6)
    assert crd(negative_count=1000)._draw(index, None).shape == (N, N - 1)


def test_crd_goes_on_from_a_saved_state_with_the_same_bits():
    steps = [(rand(4, 5, seed=i), rand(4, 7, seed=i + 9), torch.randperm(N)[:4]) for i in range(4)]
    whole, half = crd(), crd()
    torch.manual_seed(1)
    want = [whole(*step) for step in steps]
    torch.manual_seed(1)
    for step in steps[:2]:
        half(*step)
    generator = torch.get_rng_state()
    resumed = crd()
    resumed.load_state_dict(half.state_dict())
    torch.set_rng_state(generator)
    got = [resumed(*step) for step in steps[2:]]
    assert torch.equal(torch.stack(got), torch.stack(want[2:]))
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())


# ---- knobs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "knob", "bad"),
    [
        ("kd", "temperature", 0.0),
        ("kd", "temperature", math.nan),
        ("forward_kl", "temperature", -1),
        ("reverse_kl", "temperature", 0),
        ("dkd", "alpha", -1),
        ("dkd", "beta", -1),
        ("dkd", "temperature", 0),
        ("ce", "label_smoothing", 1.0),
    ],
)
def test_knobs_out_of_range_are_named(name, knob, bad):
    args = (s, y) if name == "ce" else (s, t, y) if name == "dkd" else (s, t)
    with pytest.raises(ValueError, match=f"`{knob}` must be"):
        get(name)(*args, **{knob: bad})


@pytest.mark.parametrize(
    "knob", [{"width": 0}, {"temperature": 0.0}, {"momentum": 1.0}, {"negative_count": 0}], ids=lambda k: next(iter(k))
)
def test_knobs_of_crd_out_of_range_are_named(knob):
    with pytest.raises(ValueError, match=f"`{next(iter(knob))}` must be"):
        crd(**knob)


@pytest.mark.parametrize(("name", "knob"), [("rkd", "distance_weight"), ("rkd", "angle_weight"), ("at", "power")])
def test_negative_knobs_are_named(name, knob):
    args = ([maps(2, 1)], [maps(2, 2)]) if name == "at" else (rand(4, 3), rand(4, 3))
    with pytest.raises(ValueError, match=f"`{knob}` must be"):
        get(name)(*args, **{knob: -1.0})


# ---- precision -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["kd", "dkd", "forward_kl", "reverse_kl", "ce"])
def test_half_inputs_are_computed_in_single_precision_from_the_first_step(name):
    args = (t, y) if name == "dkd" else (y,) if name == "ce" else (t,)
    knobs = {} if name == "ce" else {"temperature": 3.0}  # dividing by 4 would be exact in bf16 too
    half = [x.bfloat16() if x.is_floating_point() else x for x in (s, *args)]
    single = [x.float() if x.is_floating_point() else x for x in half]
    assert torch.equal(get(name)(*half, **knobs), get(name)(*single, **knobs))


@pytest.mark.parametrize("name", ["kd", "dkd", "ce", "at", "rkd", "crd"])
def test_autocast_does_not_reach_into_a_loss(name):
    torch.manual_seed(0)
    inputs = {
        "crd": (torch.randn(4, 5), torch.randn(4, 7), torch.tensor([3, 0, 7, 11])),
        "at": ([torch.randn(3, 2, 4, 4)], [torch.randn(3, 4, 4, 4)]),
        "rkd": (torch.randn(6, 3), torch.randn(6, 4)),
        "ce": (s.float(), y),
        "dkd": (s.float(), t.float(), y),
    }.get(name, (s.float(), t.float()))
    out = []
    for cast in (False, True):
        loss = crd().float() if name == "crd" else get(name)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out.append(loss(*inputs))
    assert torch.equal(*out)
