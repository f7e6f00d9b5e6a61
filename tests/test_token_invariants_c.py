"""What the papers promise of losses on a vocabulary's logits, each as one number that could be otherwise."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from limbeck.conformance import losses
from limbeck.conformance.expect import Broken
from limbeck.core import maths
from limbeck.core.errors import BadInput
from limbeck.core.headloss import Term, divergences
from limbeck.core.loop import Clock
from limbeck.core.maths import kl
from limbeck.core.nets import Nets
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd
from limbeck.losses.tokens.abkd import abkd
from limbeck.losses.tokens.akl import akl
from limbeck.losses.tokens.atkd import atkd
from limbeck.losses.tokens.baby_llama import baby_llama
from limbeck.losses.tokens.dac_kl import DACKL
from limbeck.losses.tokens.first_trustworthy import first_trustworthy, recalibrated
from limbeck.losses.tokens.js import js
from limbeck.losses.tokens.self_evolution_kd import self_evolution_kd
from limbeck.losses.tokens.skew_kl import skew_kl
from limbeck.losses.tokens.skew_reverse_kl import skew_reverse_kl
from limbeck.losses.tokens.span_correlation import span_correlation
from limbeck.losses.tokens.swing_distillation import swing_distillation
from limbeck.losses.tokens.taid import TAID
from limbeck.losses.tokens.total_variation import total_variation
from limbeck.losses.tokens.tvd_pp import tvd_pp
from limbeck.train.many.several_teachers import SeveralTeachers
from tests.numbers import rand

B, T, V = 3, 5, 7


pytestmark = pytest.mark.usefixtures("double")


def logits(seed: int, *shape: int) -> Tensor:
    return rand(*(shape or (B, T, V)), seed=seed, scale=2)


def slope(value: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), at)[0]


Z, P = logits(1), logits(2)
LABELS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3))
MASK = torch.arange(B * T).view(B, T) % 4 != 2


def test_skew_divergences_have_their_ends_and_their_bound() -> None:
    for loss, end in ((skew_kl, kl(Z, P)), (skew_reverse_kl, maths.reverse_kl(Z, P))):
        assert torch.allclose(loss(Z, P, alpha=0.0), end)
        assert loss(Z, P, alpha=1.0).abs().max() < 1e-12
        far = loss(50 * Z, 50 * P, alpha=0.1)
        assert far.max() <= -math.log(0.1) + 1e-12
        assert far.max() > 1  # the bound is a bound of something


def test_jensen_shannon_is_symmetric_bounded_and_has_its_limits() -> None:
    assert torch.allclose(js(Z, P), js(P, Z))
    assert js(50 * Z, 50 * P).max() <= math.log(2) + 1e-12
    assert torch.allclose(js(Z, P, beta=1e-6) / 1e-6, kl(Z, P), rtol=1e-3)
    assert torch.allclose(js(Z, P, beta=1 - 1e-6) / 1e-6, maths.reverse_kl(Z, P), rtol=1e-3)


def test_total_variation_is_what_is_not_accepted() -> None:
    p, q = P.softmax(-1), Z.softmax(-1)
    assert torch.allclose(1 - total_variation(Z, P), torch.minimum(p, q).sum(-1))
    assert total_variation(1e3 * Z, 1e3 * P).max() <= 1 + 1e-12


def test_tvd_pp_is_total_variation_up_to_one_factor_of_the_batch() -> None:
    z = Z.clone().requires_grad_()
    ours, plain = slope(tvd_pp(z, P, MASK)[MASK], z), slope(total_variation(z, P)[MASK], z)
    q, r = Z.softmax(-1), (P.softmax(-1) > Z.softmax(-1)).double()
    accepted = (q * r).sum(-1)[MASK].mean()
    assert torch.allclose(ours * (accepted * (1 - accepted)).sqrt(), plain, atol=1e-12)
    assert torch.allclose(tvd_pp(Z, P, across="place"), torch.stack([tvd_pp(z, p) for z, p in _places()]).view(B, T))


def _places() -> list[tuple[Tensor, Tensor]]:
    return [(Z[b, t], P[b, t]) for b in range(B) for t in range(T)]


def test_akl_is_forward_kl_when_all_that_is_amiss_is_in_the_head() -> None:
    p = torch.tensor([0.3, 0.15, 0.35, 0.2])
    q = torch.tensor([0.3, 0.15, 0.35, 0.2])
    head_only = akl((q + torch.tensor([0.1, 0.0, -0.1, 0.0])).log(), p.log(), head_mass=0.7)
    assert torch.allclose(head_only, kl((q + torch.tensor([0.1, 0.0, -0.1, 0.0])).log(), p.log()))
    tail_only = akl((q + torch.tensor([0.0, 0.05, 0.0, -0.05])).log(), p.log(), head_mass=0.7)
    assert torch.allclose(tail_only, maths.reverse_kl((q + torch.tensor([0.0, 0.05, 0.0, -0.05])).log(), p.log()))


def test_abkd_meets_the_divergences_that_it_generalises() -> None:
    p, q = P.softmax(-1), Z.softmax(-1)
    assert torch.allclose(abkd(Z, P, alpha=1.0, beta=1.0), (p - q).square().sum(-1) / 2)
    assert torch.allclose(abkd(Z, P, alpha=0.5, beta=0.5), 2 * (p.sqrt() - q.sqrt()).square().sum(-1))
    assert torch.allclose(abkd(Z, P, alpha=1.0, beta=1e-7), kl(Z, P), rtol=1e-4)
    assert torch.allclose(abkd(Z, P, alpha=1e-7, beta=1.0), maths.reverse_kl(Z, P), rtol=1e-4)


def test_taid_is_forward_kl_at_the_end_and_says_nothing_at_t_0() -> None:
    for t, wanted in ((1.0, kl(Z, P)), (0.0, torch.zeros(B, T))):
        module, z = TAID((B, T, V), (B, T, V), t_start=0.0), Z.clone().requires_grad_()
        module.t.fill_(t)
        value = module(z, P)
        assert torch.allclose(value, wanted, atol=1e-12)
        assert (slope(value, z).abs().max() < 1e-12) == (t == 0)


def test_taid_passes_over_words_that_neither_knows_and_batches_in_which_nothing_counts() -> None:
    module, short = TAID((B, T, V), (B, T, V)), TAID((B, T, V - 1), (B, T, V - 1))
    z, p = (x.index_fill(-1, torch.tensor(3), -torch.inf) for x in (Z, P))
    z.requires_grad_()
    kept = [k for k in range(V) if k != 3]
    value = module(z, p)
    assert torch.allclose(value, short(Z[..., kept], P[..., kept]), atol=1e-12)
    assert slope(value, z).isfinite().all()
    module(Z / 2, P)  # the first batch only says where J begins
    before = copy.deepcopy(module.state_dict())
    module(Z, P, 0.9, torch.zeros(B, T, dtype=torch.bool))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_t_of_taid_rises_with_progress_and_stays_below_its_end() -> None:
    module = TAID((B, T, V), (B, T, V), alpha=0.2, t_end=0.9)
    ramp = TAID((B, T, V), (B, T, V), adaptive=False, t_end=0.9)
    seen, slow = [], []
    for step in range(30):
        for m, path in ((module, seen), (ramp, slow)):
            m(logits(10 + step) / (1 + step), P, step / 30)
            path.append(float(m.t))
    assert all(a <= b for a, b in pairwise(seen))
    assert all(a >= b for a, b in zip(seen, slow, strict=True))
    assert seen[15] > slow[15]
    assert seen[-1] <= 0.9 + 1e-6


def test_atkd_has_every_place_in_one_group_and_its_parts_make_up_kl() -> None:
    label = LABELS.unsqueeze(-1)
    doubt = 1 - P.softmax(-1).gather(-1, label).squeeze(-1)
    median = doubt[MASK].median()
    easy, hard = MASK & (doubt < median), MASK & (doubt >= median)
    assert int(easy.sum() + hard.sum()) == int(MASK.sum())
    rest = [logits.scatter(-1, label, -torch.inf) for logits in (Z, P)]
    which = kl(*rest)
    whether = kl(Z, P) - doubt * which
    both = 0.3 * which[easy].mean() + 0.7 * (whether + which)[hard].mean()
    assert torch.allclose(atkd(Z, P, LABELS, MASK, alpha=0.3)[MASK].mean(), both)


def test_self_evolution_gives_hard_places_a_part_of_the_answer() -> None:
    target = 0.5 * P.softmax(-1) + 0.5 * torch.nn.functional.one_hot(LABELS, V)
    plain = kl(Z, target.log())
    assert torch.allclose(self_evolution_kd(Z, P, LABELS, prior=0.0), plain)
    assert torch.allclose(self_evolution_kd(Z, P, LABELS, hard=0.0), plain)
    some = self_evolution_kd(Z, P, LABELS, hard=0.4)
    lower = some < plain - 1e-9
    assert int(lower.sum()) == round(0.4 * B * T)
    assert plain[lower].min() >= plain[~lower].max()
    z = (200 * Z).requires_grad_()  # so far off that all of the answer is given
    value = self_evolution_kd(z, -200 * Z, LABELS, prior=1.0, hard=1.0, truth=0.0)
    assert value.max() < 1e-12
    assert slope(value, z).abs().max() < 1e-12


def test_swing_distillation_is_kd_where_nothing_is_private_and_noise_keeps_probabilities() -> None:
    assert torch.allclose(swing_distillation(Z, P, LABELS, temperature=2.0), kd(Z, P, temperature=2.0))
    private = LABELS == 4
    value = swing_distillation(Z, P, LABELS, private=(4,), heat=3.0)
    assert torch.allclose(value, torch.where(private, kd(Z, P, temperature=4.0), kd(Z, P, temperature=1.0)))
    torch.manual_seed(0)
    noisy = swing_distillation(Z, P, LABELS, private=(4,), heat=3.0, noise=0.05)
    assert torch.equal(noisy[~private], value[~private])
    assert not torch.isclose(noisy[private], value[private]).any()
    z = Z.clone().requires_grad_()  # softmax minus a target that sums to 1
    pull = slope(swing_distillation(z, P, LABELS, private=(4,), noise=5.0), z)
    assert pull.sum(-1).abs().max() < 1e-12


def test_noise_of_swing_distillation_stays_on_words_that_there_are() -> None:
    z, p = (torch.cat([x, torch.full((B, T, 2), -torch.inf)], -1) for x in (Z, P))
    for noise in (0.5, 50.0):  # of much noise all may be cut at 0, and the even spread comes in
        torch.manual_seed(0)
        value = swing_distillation(z, p, LABELS, private=tuple(range(V)), noise=noise)
        assert value.isfinite().all() and float(value.max()) < 200


def test_first_keeps_a_distribution_and_is_0_at_the_kept_probabilities() -> None:
    log_p, ids = P.log_softmax(-1).topk(3, -1)
    for temperature, smoothing in ((1.0, 0.0), (1.8, 0.1), (0.5, 0.4)):
        kept = recalibrated(log_p, temperature, smoothing)
        assert torch.allclose(kept.sum(-1), log_p.exp().sum(-1))
        assert bool((kept >= 0).all())
        assert torch.allclose(kept, log_p.exp()) == (temperature == 1)
    moved = recalibrated(log_p, 1.0, 0.1)
    assert torch.allclose(log_p.exp()[..., 0] - moved[..., 0], torch.full((B, T), 0.1))
    shuffled_tail = torch.where(torch.zeros_like(P, dtype=torch.bool).scatter(-1, ids, True), P, P.mean())
    norm = P.logsumexp(-1, keepdim=True)
    tail = (1 - log_p.exp().sum(-1, keepdim=True)).log() - math.log(V - 3)
    student = torch.where(shuffled_tail == P, P - norm, tail)
    assert first_trustworthy(student, ids, log_p).abs().max() < 1e-12
    assert first_trustworthy(Z, ids, log_p).min() > 1e-3


def test_the_logits_of_several_teachers_are_averaged() -> None:
    assert torch.allclose(baby_llama(Z, torch.stack([P, P])), kd(Z, P, temperature=2.0))
    two = torch.stack([P, logits(5)])
    shifted = two + logits(6, 2, B, T, 1)
    assert torch.allclose(baby_llama(Z, two), baby_llama(Z, shifted))
    assert not torch.allclose(baby_llama(Z, two), kd(Z, P, temperature=2.0))


def test_several_teachers_are_all_asked_and_a_wrong_one_is_refused() -> None:
    class Says(nn.Module):
        def __init__(self, what: Tensor) -> None:
            super().__init__()
            self.what = nn.Parameter(what)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.what

    batch = {"inputs": LABELS, "labels": LABELS}
    nets = Nets(student=Says(Z), teachers=nn.ModuleList([Says(P), Says(logits(5))]))
    method = SeveralTeachers()
    method.setup(nets, batch)
    ((player, parts),) = method.step(nets, batch, Clock(0, 1))
    wanted = kd(Z, (P + logits(5)) / 2, temperature=2.0).mean() / 2
    assert player == "student"
    assert float(parts["baby_llama"]) == pytest.approx(float(wanted))
    assert float(parts["ce"]) == pytest.approx(float(ce(Z, LABELS).mean()) / 2)
    nets = Nets(student=Says(Z), teachers=nn.ModuleList([Says(P), Says(logits(5, B, T, V + 1))]))
    with pytest.raises(BadInput, match="share their classes"):
        method.setup(nets, batch)
    with pytest.raises(BadInput, match="at least one"):
        method.setup(Nets(student=Says(Z)), batch)


def test_dac_kl_is_kl_when_its_limits_take_in_everything() -> None:
    module = DACKL((B, T, V), (B, T, V))
    last = module.limits[2]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([-200.0, 200.0]))
    assert torch.allclose(module(Z, P), kl(Z, P))
    with torch.no_grad():
        last.bias.copy_(torch.tensor([-200.0, -200.0]))
    module.ramp = 1e-9
    assert torch.allclose(module(Z, P), ce(Z, P.argmax(-1)))  # the likeliest word alone


def test_span_correlation_binds_neighbours_of_one_span_only() -> None:
    p, q = P.softmax(-1), Z.softmax(-1)
    wanted = (p[:, 1:] * p[:, :-1] - q[:, 1:] * q[:, :-1]).square().sum(-1)
    phrases = torch.tensor([[0, 0, 1, 1, 1], [-1, -1, 0, 0, 1], [0, 1, 2, 3, 3]])
    value = span_correlation(Z, P, phrases=phrases)
    bound = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(value[:, 1:] != 0, bound)
    assert torch.allclose(value[:, 1:][bound], wanted[bound])
    same = span_correlation(Z, P, torch.tensor([[0, 6, 0, 0, 1]] * 3), breaks=(6,))
    assert torch.equal(same[0] != 0, torch.tensor([False, True, False, True, True]))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *, temperature=4.0: Term(divergences.forward_kl, temperature),
        lambda *, temperature=4.0: Term(divergences.reverse_kl, temperature, temperature**2),
        lambda *, temperature=2.0: Term(divergences.forward_kl, temperature, temperature**2),
        lambda *, temperature=4.0: None,
    ],
    ids=["factor dropped", "turned round", "another default", "never there"],
)
def test_a_wrong_head_form_is_caught(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    losses.check_head_form("kd")
    monkeypatch.setattr(kd, "card", replace(kd.card, head=wrong))  # type: ignore[attr-defined]
    with pytest.raises(Broken, match="head form"):
        losses.check_head_form("kd")
