"""What the papers say must hold of nkd, uskd, dist, dist_plus, mlkd, ttm, wttm, wsld, luminet, ssld, sinkd and ctkd."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.adapt import reverse_gradient
from limbeck.core.errors import BadInput
from limbeck.core.find import get
from limbeck.core.loop import Clock, Plan, fit
from limbeck.core.nets import Nets
from limbeck.core.responses import average, column_correlation, others, row_correlation, rows, standardized
from tests.numbers import FP64, VECTORS, close, grad, rand

s, t, y = rand(6, 5, seed=1, scale=2), rand(6, 5, seed=2, scale=2), torch.tensor([0, 1, 2, 3, 4, 2])
factor, shift = rand(6, 1, seed=3).abs() + 0.2, rand(6, 1, seed=4, scale=5)


# ---- what they share -----------------------------------------------------------------------------------------------
def test_others_are_all_classes_but_the_label_in_their_order():
    assert others(torch.tensor([[5.0, 6.0, 7.0], [5.0, 6.0, 7.0]]), torch.tensor([0, 1])).tolist() == [[6, 7], [5, 7]]
    assert others(rand(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 4)


def test_rows_that_do_not_count_are_zero_even_when_they_are_nan():
    z = rand(2, 3, 5)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    z[0, 1] = torch.nan
    flat, counts = rows(z, mask)
    assert flat.isfinite().all() and counts.flatten().tolist() == mask.flatten().tolist()
    close(flat[4], z[1, 1])


def pearson(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1]


def test_correlation_is_that_of_pearson():
    close(row_correlation(s, t), torch.stack([pearson(a, b) for a, b in zip(s, t, strict=True)]), 1e-7)
    close(column_correlation(s, t), torch.stack([pearson(a, b) for a, b in zip(s.T, t.T, strict=True)]), 1e-7)
    close(row_correlation(torch.ones(2, 4, dtype=FP64), rand(2, 4)), torch.zeros(2))


def test_rows_that_do_not_count_are_as_if_they_were_not_there():
    kept, counts = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 0, 1, 1, 0, 1]).bool().unsqueeze(-1)
    spoiled = torch.where(counts, s, torch.nan)
    close(average(spoiled, counts), s[kept].mean(0))
    close(column_correlation(spoiled, t, counts), column_correlation(s[kept], t[kept]))
    close(column_correlation(s, t, torch.zeros_like(counts)), torch.ones(5))


# ---- nkd and uskd --------------------------------------------------------------------------------------------------
def moved(logits, by):
    out = logits.clone()
    out[range(6), y] += by
    return out


def test_nkd_matches_the_others_whatever_the_label_gets():
    rest = lambda a, b: get("nkd")(a, b, y, gamma=1.0) - get("nkd")(a, b, y, gamma=0.0)
    close(rest(moved(s, 3.0), moved(t, -2.0)), rest(s, t))
    assert not torch.allclose(get("nkd")(moved(s, 3.0), t, y, gamma=0.0), get("nkd")(s, t, y, gamma=0.0))
    q = (others(t, y) / 3).softmax(-1)
    close(
        get("nkd")(s, t, y, gamma=2.0, temperature=3.0) - get("nkd")(s, t, y, gamma=0.0),
        2.0 * 9 * -(q * (others(s, y) / 3).log_softmax(-1)).sum(-1),
    )


def test_nkd_pulls_at_the_others_only_as_far_as_they_differ():
    g = grad(lambda x: get("nkd")(x, t, y, gamma=1.0), moved(t, 5.0))
    only_label = grad(lambda x: get("nkd")(x, t, y, gamma=0.0), moved(t, 5.0))
    close(g, only_label)  # equal others: their gradient is 0 at any logit of the label


def uskd(**knobs):
    torch.manual_seed(0)
    return get("uskd")([(6, 3, 4, 4), (6, 4)], (6, 5), **knobs).double()


@pytest.mark.parametrize("as_released", [False, True])
def test_uskd_labels_of_the_others_are_a_fixed_set_in_another_order(as_released):
    zipf = uskd(as_released=as_released)._zipf(rand(6, 5, seed=7), s, y)
    assert zipf.shape == (6, 4)
    close(zipf.sum(-1), torch.ones(6))
    if not as_released:
        wanted = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4], dtype=FP64)
        close(zipf.sort(-1, descending=True).values, (wanted / wanted.sum()).expand(6, 4))


def test_uskd_ranks_by_what_both_say_of_the_others():
    module, w = uskd(), rand(6, 5, seed=7)
    p, q = w.softmax(-1), s.softmax(-1)
    at = y.unsqueeze(-1)
    score = others(p / (1 - p.gather(1, at)) + q / (1 - q.gather(1, at)), y)
    assert torch.equal(module._zipf(w, s, y).argsort(-1), score.argsort(-1))
    close(module._zipf(moved(w, 4.0), moved(s, -3.0), y), module._zipf(w, s, y))


def test_uskd_certainty_lifts_the_label_above_the_mean_of_the_batch():
    feats = [rand(6, 3, 4, 4, seed=5), rand(6, 4, seed=6)]
    module = uskd(beta=0.0, mu=0.0)
    p = s.softmax(-1).gather(1, y.unsqueeze(-1)).squeeze(-1)
    close(module(feats, s, y), -(p**2 + 1 - (p**2).mean()) * p.log())
    g = grad(lambda z: module(feats, z, y), s)
    soft = (p**2 + 1 - (p**2).mean()).unsqueeze(-1)
    close(g, soft * (s.softmax(-1) - F.one_hot(y, 5)) / 6)  # as if the soft label were a constant


def test_uskd_picks_the_layer_and_says_which_there_are():
    assert uskd().weak.in_features == 3
    assert uskd(layer=-1).weak.in_features == 4
    with pytest.raises(BadInput, match="none of the 2 features"):
        uskd(layer=2)


# ---- dist and dist_plus --------------------------------------------------------------------------------------------
def test_dist_is_zero_at_the_teacher_and_never_more_than_four():
    close(get("dist")(t, t), 0.0, 1e-6)
    close(grad(lambda x: get("dist")(x, t), t), torch.zeros(6, 5), 1e-6)
    for seed in range(5):
        for knobs in ({"gamma": 0.0}, {"beta": 0.0}):
            assert 0 <= get("dist")(rand(6, 5, seed=seed, scale=3), t, **knobs) <= 2


def test_dist_leaves_scale_and_offset_of_an_examples_probabilities_free():
    p = s.softmax(-1)
    share = torch.linspace(0.3, 0.9, 6, dtype=FP64).unsqueeze(-1)
    stretched = (share * p + (1 - share) / 5).log()  # sums to 1 again
    close(get("dist")(stretched, t, gamma=0.0), get("dist")(s, t, gamma=0.0), 1e-6)
    assert abs(get("dist")(stretched, t, beta=0.0) - get("dist")(s, t, beta=0.0)) > 1e-4


def dist_plus(**knobs):
    return get("dist_plus")([(6, 3, 4, 4)], [(6, 3, 4, 4)], **knobs)


f, h = rand(6, 3, 4, 4, seed=8), rand(6, 3, 4, 4, seed=9)


def test_dist_plus_without_features_is_dist():
    knobs = {"beta": 2.0, "gamma": 0.5, "temperature": 3.0}
    close(dist_plus(channel_weight=0.0, spatial_weight=0.0, **knobs)(s, t, [f], [h]), get("dist")(s, t, **knobs))


def test_dist_plus_is_zero_where_the_features_agree_and_rises_with_rho_falling():
    off = {"beta": 0.0, "gamma": 0.0}
    for one in ({"channel_weight": 0.0}, {"spatial_weight": 0.0}):
        close(dist_plus(**off, **one)(s, t, [h], [h]), 0.0, 1e-6)
        assert dist_plus(**off, **one)(s, t, [-h], [h]) > 1.9  # opposite features: 1 - rho, not rho


def test_dist_plus_leaves_scale_and_offset_at_every_place_free():
    module = dist_plus(beta=0.0, gamma=0.0, spatial_weight=0.0)
    a, b = rand(6, 1, 4, 4, seed=10).abs() + 0.1, rand(6, 1, 4, 4, seed=11)
    close(module(s, t, [a * f + b], [h]), module(s, t, [f], [h]), 1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((6, 3, 8, 8), (6, 5, 4, 4)), ((6, 16, 3), (6, 16, 5)), ((6, 16, 3), (6, 5, 4, 4)), ((6, 3), (6, 5, 4, 4))],
)
def test_dist_plus_brings_features_of_any_form_together(student, teacher):
    module = get("dist_plus")([student], [teacher]).double()
    value = module(s, t, [rand(*student)], [rand(*teacher, seed=1)])
    assert value.isfinite() and module.projector.inner.weight.shape == (5, 3)


# ---- standardised logits -------------------------------------------------------------------------------------------
def test_standard_scores_have_mean_zero_and_deviation_one():
    z = standardized(s)
    close(z.mean(-1), torch.zeros(6))
    close(z.std(-1), torch.ones(6), 1e-6)


def test_logit_standardization_does_not_see_scale_or_offset_of_an_example():
    loss = get("logit_standardization")
    close(loss(factor * s + shift, 3 * t - 2), loss(s, t), 1e-6)
    close(loss(factor * t + shift, t), torch.zeros(6), 1e-12)
    assert loss(s, t).min() > 1e-3
    assert not torch.allclose(get("kd")(factor * s, t, temperature=2.0), get("kd")(s, t, temperature=2.0))


def test_luminet_does_not_see_scale_or_offset_of_a_class():
    loss = get("luminet")
    a, b = rand(1, 5, seed=12).abs() + 0.5, rand(1, 5, seed=13, scale=5)
    close(loss(a * s + b, t, alpha=1.0), loss(s, t, alpha=1.0), 1e-4)
    close(loss(s, a * t + b, alpha=1.0), loss(s, t, alpha=1.0), 1e-4)
    close(loss(a * t + b, t, alpha=1.0), torch.zeros(6), 1e-9)


def test_luminet_sends_its_gradient_through_the_statistics():
    g = grad(lambda x: get("luminet")(x, t), s)
    close(g.sum(0), torch.zeros(5), 1e-9)  # moving a class for the whole batch changes nothing
    assert g.abs().max() > 0.1


# ---- mlkd ----------------------------------------------------------------------------------------------------------
def test_mlkd_with_one_temperature_and_level_is_kd():
    got = get("mlkd")(s, t, temperatures=(4.0,), batch_weight=0.0, class_weight=0.0)
    close(got, get("kd")(s, t, temperature=4.0).mean())
    got = get("mlkd")(s, t, temperatures=(2.0,), batch_weight=0.0, class_weight=0.0, standardize=True)
    close(got, get("logit_standardization")(s, t).mean())


def test_mlkd_levels_do_not_see_the_order_of_what_they_do_not_compare():
    only = lambda name: {f"{n}_weight": float(n == name) for n in ("instance", "batch", "class")}
    classes, examples = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([5, 3, 0, 1, 4, 2])
    turn_classes = lambda level: get("mlkd")(s[:, classes], t, **only(level))
    turn_examples = lambda level: get("mlkd")(s[examples], t, **only(level))
    close(turn_classes("batch"), get("mlkd")(s, t, **only("batch")))
    close(turn_examples("class"), get("mlkd")(s, t, **only("class")))
    for other in ("instance", "class"):
        assert abs(turn_classes(other) - get("mlkd")(s, t, **only(other))) > 1e-3
    for other in ("instance", "batch"):
        assert abs(turn_examples(other) - get("mlkd")(s, t, **only(other))) > 1e-3


class Seer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.seen = torch.nn.Linear(64, 3), []

    def forward(self, inputs):
        self.seen.append(inputs.detach().clone())
        return self.head(inputs.flatten(1))


def scene():
    torch.manual_seed(0)
    batch = {"inputs": torch.randn(8, 1, 8, 8), "labels": torch.arange(8) % 3}
    return Nets(student=Seer(), teacher=Seer()), batch


def turn(method, nets, batch):
    ((_, parts),) = list(method.step(nets, batch, Clock(0, 1)))
    return {name: float(part) for name, part in parts.items()}


def test_two_views_shows_both_networks_the_batch_and_another_view_of_it():
    nets, batch = scene()
    method = get("two_views")()
    method.setup(nets, batch)
    nets.student.seen.clear(), nets.teacher.seen.clear()
    turn(method, nets, batch)
    for net in (nets.student, nets.teacher):
        weak, strong = net.seen
        assert torch.equal(weak, batch["inputs"])
        assert not torch.isclose(strong, weak).all((1, 2, 3)).any()
    assert torch.equal(nets.student.seen[1], nets.teacher.seen[1])


def test_two_views_of_the_same_picture_add_up():
    nets, batch = scene()
    method = get("two_views")(augment=({"flip": {"probability": 0.0}},))
    z_s, z_t = nets.student(batch["inputs"]), nets.teacher(batch["inputs"])
    parts = turn(method, nets, batch)
    close(parts["weak_ce"], 0.1 * F.cross_entropy(z_s, batch["labels"]).item(), 1e-6)
    close(parts["strong_ce"], parts["weak_ce"], 1e-6)
    close(parts["weak_mlkd"], 0.9 * get("mlkd")(z_s, z_t).item(), 1e-5)
    temperatures = (2.0, 3.0, 4.0, 5.0, 6.0)
    close(parts["strong_mlkd"], 0.9 * sum(get("kd")(z_s, z_t, temperature=k).mean().item() for k in temperatures), 1e-5)


class Given:
    """An augmentation whose result is known."""

    width = 1

    def __init__(self, images):
        self.images = images

    def draw(self, generator, batch):
        return torch.zeros(batch, 1)

    def apply(self, images, params):
        return self.images


def linear(weight, bias):
    net = torch.nn.Linear(6, 6, dtype=FP64)
    net.load_state_dict({"weight": torch.tensor(weight, dtype=FP64), "bias": torch.tensor(bias, dtype=FP64)})
    return torch.nn.Sequential(torch.nn.Flatten(), net)


def test_two_views_can_repeat_the_released_code_with_its_slips():
    case = json.loads((VECTORS / "two_views.json").read_text())["released"]
    weak, strong = (torch.tensor(case[view], dtype=FP64) for view in ("weak", "strong"))
    instance = lambda temperature: {"kd": {"temperature": temperature, "weight": 0.9}}
    method = get("two_views")(
        weak=({"ce": 0.1}, {"mlkd": 0.45}, instance(2.0), instance(6.0)),
        strong=({"ce": 0.1}, instance(3.0), instance(4.0), instance(5.0)),
        augment=(Given(strong),),
    )
    nets = Nets(student=linear(**case["student"]), teacher=linear(**case["teacher"]))
    batch = {"inputs": weak, "labels": torch.tensor(case["labels"])}
    ((_, parts),) = list(method.step(nets, batch, Clock(0, 1)))
    loss = sum(part.value for part in parts.values())
    close(loss, case["loss"])
    loss.backward()
    close(nets.student[1].weight.grad, torch.tensor(case["grad"]["weight"], dtype=FP64))


def test_two_views_trains_losses_that_own_weights_on_either_view():
    nets, batch = scene()
    method = get("two_views")(weak=("ctkd",), strong=("ctkd",))
    fit(method, nets, [batch] * 4, Plan(4, optimizer={"sgd": {"lr": 0.5}}))
    thetas = [nets.losses[view]["ctkd"].theta.item() for view in ("weak", "strong")]
    assert all(theta > 1 for theta in thetas) and thetas[0] != thetas[1]


def test_two_views_asks_the_teacher_itself_about_the_strong_view():
    nets, batch = scene()
    del nets.modules["teacher"]
    stored = {**batch, "teacher_logits": torch.randn(8, 3)}
    with pytest.raises(BadInput, match="neither a teacher nor a store"):
        get("two_views")().setup(nets, stored)
    get("two_views")(strong=("ce",)).setup(nets, stored)


def test_two_views_needs_pictures_and_something_to_change():
    nets, batch = scene()
    with pytest.raises(BadInput, match="augments pictures"):
        get("two_views")().setup(nets, {**batch, "inputs": torch.zeros(8, 64)})
    with pytest.raises(BadInput, match="is empty"):
        get("two_views")(augment=()).setup(nets, batch)


# ---- ttm and wttm --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["ttm", "wttm"])
def test_transformed_matching_with_exponent_one_is_the_plain_divergence(name):
    close(get(name)(s, t, exponent=1.0), get("kd")(s, t, temperature=1.0))


def test_the_power_sum_runs_from_one_to_what_an_even_teacher_has():
    g = 0.3
    ratio = lambda teacher: get("wttm")(s, teacher, exponent=g) / get("ttm")(s, teacher, exponent=g)
    close(ratio(t), t.softmax(-1).pow(g).sum(-1))
    close(ratio(torch.zeros(6, 5, dtype=FP64)), torch.full((6,), 5 ** (1 - g), dtype=FP64))
    close(ratio(F.one_hot(y, 5).double() * 1e3), torch.ones(6))


def test_ttm_is_zero_where_the_student_says_the_softened_teacher():
    close(get("ttm")(0.1 * t + shift, t), torch.zeros(6), 1e-12)


# ---- wsld ----------------------------------------------------------------------------------------------------------
def test_wsld_weighs_by_how_much_worse_the_student_is():
    soft = -((t / 2).softmax(-1) * (s / 2).log_softmax(-1)).sum(-1) * 4
    weight = get("wsld")(s, t, y) / soft
    assert ((weight >= 0) & (weight < 1)).all()
    close(weight, 1 - (-F.cross_entropy(s, y, reduction="none") / F.cross_entropy(t, y, reduction="none")).exp(), 1e-5)
    entropy = -((t / 2).softmax(-1) * (t / 2).log_softmax(-1)).sum(-1) * 4
    close(get("wsld")(t, t, y) / entropy, torch.full((6,), 1 - math.exp(-1)), 1e-5)
    close(soft, get("kd")(s, t, temperature=2.0) + entropy)


def test_wsld_does_not_send_a_gradient_through_its_weight():
    weight = get("wsld")(s, t, y) / (
        get("kd")(s, t, temperature=2.0) + 4 * -((t / 2).softmax(-1) * (t / 2).log_softmax(-1)).sum(-1)
    )
    close(
        grad(lambda x: get("wsld")(x, t, y), s),
        weight.unsqueeze(-1) * 2 * ((s / 2).softmax(-1) - (t / 2).softmax(-1)) / 6,
    )


# ---- ssld ----------------------------------------------------------------------------------------------------------
def test_ssld_is_symmetric_and_zero_only_at_agreement():
    loss = get("ssld")
    close(loss(s, t), loss(t, s))
    close(loss(t + shift, t), torch.zeros(6), 1e-12)
    assert loss(s, t).min() > 1e-3
    close(loss(s, t), 0.5 * (get("forward_kl")(s, t) + get("reverse_kl")(s, t)))


# ---- sinkd ---------------------------------------------------------------------------------------------------------
def test_sinkd_tends_to_zero_at_the_teacher_as_the_blur_goes():
    blurs = [get("sinkd")(t, t, epsilon=e).item() for e in (1.0, 0.3, 0.1, 0.01)]
    assert blurs == sorted(blurs, reverse=True) and blurs[0] > 0.5 and blurs[-1] < 1e-3


def test_sinkd_sees_sets_not_pairs():
    order = torch.tensor([5, 3, 0, 1, 4, 2])
    close(get("sinkd")(s[order], t[order]), get("sinkd")(s, t))
    close(get("sinkd")(s[order], t, iterations=200), get("sinkd")(s, t, iterations=200), 1e-6)


def test_sinkd_serves_every_teacher_once_and_costs_no_more_than_the_pairs_at_a_small_blur():
    p, q = (s / 2).softmax(-1), (t / 2).softmax(-1)
    pairs = (p - q).abs().sum()
    assert get("sinkd")(s, t, epsilon=0.005, iterations=500) <= pairs + 1e-3
    alike = t[:1].expand(6, 5)
    close(get("sinkd")(s, alike, iterations=1), ((s / 2).softmax(-1) - (alike / 2).softmax(-1)).abs().sum())


# ---- ctkd ----------------------------------------------------------------------------------------------------------
def ctkd(**knobs):
    torch.manual_seed(0)
    return get("ctkd")((6, 5), (6, 5), **knobs).double()


def test_ctkd_gives_the_student_the_gradient_of_kd_at_the_temperature_of_the_moment():
    module = ctkd()
    temperature = module.temperature(s, t, 0.5).item()
    close(temperature, 1 + 20 / (1 + math.exp(-1)))
    close(module(s, t, 0.5), get("kd")(s, t, temperature=temperature))
    close(grad(lambda x: module(x, t, 0.5), s), grad(lambda x: get("kd")(x, t, temperature=temperature), s))


def test_ctkd_gives_its_temperature_the_gradient_of_the_authors_code():
    vector = json.loads((VECTORS / "ctkd.json").read_text())
    double = lambda name: torch.tensor(vector["inputs"][name], dtype=FP64)
    module = get("ctkd")((4, 5), (4, 5)).double()
    module.theta.data.fill_(vector["state"]["theta"][0])
    module(double("student_logits"), double("teacher_logits"), vector["inputs"]["progress"]).mean().backward()
    close(module.theta.grad, torch.tensor(vector["theta_grad"], dtype=FP64))


@pytest.mark.parametrize("instance_width", [0, 4])
def test_ctkd_pushes_its_temperature_against_the_student_by_the_curriculum(instance_width):
    module = ctkd(curriculum=0.4, instance_width=instance_width)
    weights = list(module.parameters())
    down = [torch.autograd.grad(_plain(module, s, t).mean(), w, retain_graph=True)[0] for w in weights]
    for progress, strength in ((0.0, 0.0), (0.2, 0.5), (0.4, 1.0), (1.0, 1.0)):
        up = torch.autograd.grad(module(s, t, progress).mean(), weights)
        for a, b in zip(up, down, strict=True):
            close(a, -strength * b)
    assert any(d.abs().max() > 1e-6 for d in down)


def _plain(module, student, teacher):
    """The loss at the module's temperature with the reversal undone."""
    if module.instance_width:
        theta = module.predict(torch.cat([student, teacher], -1))
    else:
        theta = module.theta
    temperature = 1 + 20 * theta.sigmoid()
    kl = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature.squeeze(-1) ** 2 * (kl[1].exp() * (kl[1] - kl[0])).sum(-1)


def test_ctkd_temperature_stays_between_its_bounds_and_rises_in_training():
    module = ctkd()
    for theta in (-1e4, -3.0, 3.0, 1e4):
        module.theta.data.fill_(theta)
        assert 1 <= module.temperature(s, t, 1.0).item() <= 21
    module = ctkd()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    seen = []
    for step in range(10):
        seen.append(module.temperature(s, t, 1.0).item())
        optimizer.zero_grad()
        module(s, t, step / 9).mean().backward()
        optimizer.step()
    assert seen[1] == seen[0] and seen[1:] == sorted(seen[1:]) and seen[-1] > seen[0]


def test_ctkd_asks_for_a_temperature_an_example_without_a_gradient_to_the_logits():
    module = ctkd(instance_width=4)
    temperature = module.temperature(s, t, 1.0)
    assert temperature.shape == (6, 1) and temperature.unique().numel() == 6
    x = s.clone().requires_grad_()
    fixed = get("kd")
    module(x, t, 1.0).mean().backward()
    want = torch.stack([grad(lambda z, i=i: fixed(z, t[i], temperature=temperature[i].item()), s[i]) for i in range(6)])
    close(x.grad, want / 6)


def test_a_reversed_gradient_is_the_negative_times_its_factor():
    x = torch.tensor([2.0], requires_grad=True)
    (reverse_gradient(x, 0.25) ** 2).backward()
    assert x.grad.item() == -1.0


# ---- knobs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "knob", "bad"),
    [
        ("nkd", "gamma", -1.0),
        ("nkd", "temperature", 0.0),
        ("dist", "beta", -1.0),
        ("dist", "gamma", -1.0),
        ("dist", "temperature", math.nan),
        ("logit_standardization", "temperature", 0.0),
        ("mlkd", "temperatures", ()),
        ("mlkd", "temperatures", (2.0, 0.0)),
        ("mlkd", "batch_weight", -1.0),
        ("ttm", "exponent", 0.0),
        ("ttm", "exponent", 1.5),
        ("wttm", "exponent", 0.0),
        ("wsld", "temperature", 0.0),
        ("luminet", "alpha", -1.0),
        ("luminet", "temperature", 0.0),
        ("sinkd", "temperature", 0.0),
        ("sinkd", "epsilon", 0.0),
        ("sinkd", "iterations", 0),
    ],
)
def test_knobs_out_of_range_are_named(name, knob, bad):
    args = (s, t, y) if name in ("nkd", "wsld") else (s, t)
    with pytest.raises(ValueError, match=f"`{knob}` must be"):
        get(name)(*args, **{knob: bad})


@pytest.mark.parametrize(
    ("make", "knob"),
    [
        *[(uskd, {k: -1.0}) for k in ("alpha", "beta", "mu")],
        *[(dist_plus, {k: -1.0}) for k in ("beta", "gamma", "channel_weight", "spatial_weight", "temperature")],
        *[(ctkd, k) for k in ({"lowest": 0.0}, {"span": -1.0}, {"curriculum": 1.5}, {"instance_width": -1})],
    ],
)
def test_knobs_of_modules_out_of_range_are_named(make, knob):
    with pytest.raises(ValueError, match=f"`{next(iter(knob))}` must be"):
        make(**knob)
