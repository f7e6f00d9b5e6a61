"""core/headloss against full logits in fp64: every divergence, with its gradients, whatever the way it is computed."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.core.headloss import Head, Logits, Sparse, Term, ce, head_loss, loss, tiles
from limbeck.core.headloss import divergences as d
from limbeck.losses.tokens.top_k_kd import top_k_kd

torch.set_num_threads(1)

TEXTS, LONG, WIDE, TEACHER_WIDE, WORDS = 2, 7, 8, 6, 29
EACH = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-3}


# ---- full logits, by the book ----------------------------------------------------------------------------------------
def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    return (share * a.exp() + (1 - share) * b.exp()).log()


def js(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    m = log_mix(log_p, log_q, beta)
    return beta * forward_kl(m, log_p) + (1 - beta) * forward_kl(m, log_q)


def alpha_beta(log_q: Tensor, log_p: Tensor, a: float, b: float) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def tvd_pp(log_q: Tensor, log_p: Tensor, mean: float | None = None) -> Tensor:
    q, reward = log_q.detach().exp(), (log_p > log_q.detach()).double()
    m = (q * reward).sum(-1, keepdim=True) if mean is None else mean
    std = (q * (reward - m) ** 2).sum(-1, keepdim=True) ** 0.5 if mean is None else (mean * (1 - mean)) ** 0.5
    return -(q * (reward - m) / std * log_q).sum(-1)


def akl(log_q: Tensor, log_p: Tensor, head: float) -> Tensor:
    p, gap = log_p.exp(), (log_p.exp() - log_q.detach().exp()).abs()
    down, order = p.sort(-1, descending=True)
    within = down.cumsum(-1) <= head
    within[..., 0] = True
    of_head = (gap.gather(-1, order) * within).sum(-1)
    share = of_head / gap.sum(-1)
    return share * forward_kl(log_q, log_p) + (1 - share) * forward_kl(log_p, log_q)


def taid(log_q: Tensor, log_p: Tensor, t: float) -> Tensor:
    return forward_kl(log_q, ((1 - t) * log_q.detach() + t * log_p).log_softmax(-1))


def dkd(log_q: Tensor, log_p: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
    rest = F.one_hot(y, WORDS) == 0

    def parts(log: Tensor) -> tuple[Tensor, Tensor]:
        yes = log.gather(-1, y[..., None]).exp()
        return torch.cat([yes, 1 - yes], -1).log(), log[rest].view(*log.shape[:-1], -1).log_softmax(-1)

    (is_q, others_q), (is_p, others_p) = parts(log_q), parts(log_p)
    return alpha * forward_kl(is_q, is_p) + beta * forward_kl(others_q, others_p)


Book = Callable[[Tensor, Tensor, Tensor], Tensor]  # log q, log p, labels
DIVERGENCES: dict[str, tuple[d.Divergence, Book]] = {
    "forward_kl": (d.forward_kl, lambda q, p, y: forward_kl(q, p)),
    "reverse_kl": (d.reverse_kl, lambda q, p, y: forward_kl(p, q)),
    "cross_entropy": (d.cross_entropy, lambda q, p, y: -(p.exp() * q).sum(-1)),
    "js": (d.js, lambda q, p, y: js(q, p, 0.5)),
    "js_0.1": (partial(d.js, beta=0.1), lambda q, p, y: js(q, p, 0.1)),
    "skew_kl": (d.skew_kl, lambda q, p, y: forward_kl(log_mix(p, q, 0.1), p)),
    "skew_kl_0.7": (partial(d.skew_kl, alpha=0.7), lambda q, p, y: forward_kl(log_mix(p, q, 0.7), p)),
    "skew_kl_0": (partial(d.skew_kl, alpha=0.0), lambda q, p, y: forward_kl(q, p)),
    "skew_reverse_kl": (d.skew_reverse_kl, lambda q, p, y: forward_kl(log_mix(q, p, 0.1), q)),
    "skew_reverse_kl_0.7": (
        partial(d.skew_reverse_kl, alpha=0.7),
        lambda q, p, y: forward_kl(log_mix(q, p, 0.7), q),
    ),
    "alpha_beta": (d.alpha_beta, lambda q, p, y: alpha_beta(q, p, 0.2, 0.7)),
    "alpha_beta_1_1": (
        partial(d.alpha_beta, alpha=1.0, beta=1.0),
        lambda q, p, y: 0.5 * (p.exp() - q.exp()).square().sum(-1),
    ),
    "alpha_divergence": (
        partial(d.alpha_divergence, alpha=0.3),
        lambda q, p, y: (1 - (0.3 * p + 0.7 * q).exp().sum(-1)) / 0.21,
    ),
    "total_variation": (d.total_variation, lambda q, p, y: 0.5 * (p.exp() - q.exp()).abs().sum(-1)),
    "tvd_pp": (d.tvd_pp, lambda q, p, y: tvd_pp(q, p)),
    "tvd_pp_batch": (partial(d.tvd_pp, mean=0.4), lambda q, p, y: tvd_pp(q, p, 0.4)),
    "akl": (d.akl, lambda q, p, y: akl(q, p, 0.5)),
    "akl_0.9": (partial(d.akl, head=0.9), lambda q, p, y: akl(q, p, 0.9)),
    "taid": (d.taid, lambda q, p, y: taid(q, p, 0.4)),
    "dkd": (d.dkd, lambda q, p, y: dkd(q, p, y, 1.0, 8.0)),
    "dkd_2_0.5": (partial(d.dkd, alpha=2.0, beta=0.5), lambda q, p, y: dkd(q, p, y, 2.0, 0.5)),
}
SURROGATES = {"cross_entropy", "tvd_pp", "tvd_pp_batch"}  # values that may be below 0, or above it at p = q
divergences = pytest.mark.parametrize("name", DIVERGENCES)


# ---- what is compared ------------------------------------------------------------------------------------------------
@dataclass
class Given:
    """Hidden states, heads and labels in some dtype."""

    hidden: Tensor
    head: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    teacher_bias: Tensor
    labels: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.head, self.bias]

    def doubled(self) -> "Given":
        """The same numbers in fp64."""
        return Given(
            *(t.detach().double().clone().requires_grad_(t.requires_grad) for t in list(vars(self).values())[:-1]),
            self.labels,
        )


def given(dtype: torch.dtype = torch.float64, *, near: bool = False, seed: int = 0) -> Given:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    teacher = draw(TEXTS, LONG, TEACHER_WIDE), draw(WORDS, TEACHER_WIDE), 0.5 * draw(WORDS)
    hidden, head, bias = draw(TEXTS, LONG, WIDE), 0.6 * draw(WORDS, WIDE), 0.5 * draw(WORDS)
    if near:
        hidden = F.pad(teacher[0], (0, WIDE - TEACHER_WIDE)) + 0.03 * hidden
        head, bias = F.pad(teacher[1], (0, WIDE - TEACHER_WIDE)) + 0.03 * head, teacher[2].clone()
    labels = torch.randint(WORDS, (TEXTS, LONG), generator=g)
    mine = [t.to(dtype).requires_grad_() for t in (hidden, head, bias)]
    return Given(*mine, *(t.to(dtype) for t in teacher), labels)


MASK = torch.tensor([[True, False, True, True, True, False, False], [False, True, True, False, True, True, True]])
WEIGHTS = 0.5 + torch.arange(TEXTS * LONG, dtype=torch.float64).view(TEXTS, LONG) / 7


def book(x: Given, formula: Book, temperature: float, softcap: float | None = None, scale: float = 1.0) -> Tensor:
    """The values [B, T] by full logits."""
    z, t = x.hidden @ x.head.T + x.bias, x.teacher_hidden @ x.teacher_head.T + x.teacher_bias
    if softcap is not None:
        z, t = softcap * (scale * z / softcap).tanh(), softcap * (scale * t / softcap).tanh()
    return formula((z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1), x.labels)


def heads(x: Given, **knobs: Any) -> tuple[Head, Head]:
    student = Head(x.hidden, x.head, x.bias, **knobs)
    return student, Head(x.teacher_hidden, x.teacher_head, x.teacher_bias, **knobs)


def far(found: Tensor | None, exact: Tensor | None) -> float:
    """|found - exact| / |exact|."""
    assert found is not None and exact is not None
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves, retain_graph=True))


@pytest.fixture(params=["large", "small"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The sizes of all loops as they are, where one turn does everything, and so small that each has several."""
    if request.param == "small":
        for name, size in {"TILE": 5, "TEACHER": 3, "CACHE": 2 * WORDS, "PIECE": 7}.items():
            monkeypatch.setattr(tiles, name, size)
    yield request.param


# ---- the matrix ------------------------------------------------------------------------------------------------------
@divergences
@pytest.mark.parametrize("dtype", EACH, ids=str)
def test_value_and_gradients_are_those_of_full_logits(name: str, dtype: torch.dtype, cut: str):
    divergence, formula = DIVERGENCES[name]
    for temperature, masked, capped in itertools.product([1.0, 2.5], [False, True], [False, True]):
        x = given(dtype)
        exact = x.doubled()
        mask = MASK if masked else torch.ones_like(MASK)
        cap: dict[str, Any] = {"scale": 1.5, "softcap": 3.0} if capped else {}
        wanted = torch.where(mask, book(exact, formula, temperature, **cap), 0)
        wanted_grads = gradients((wanted * WEIGHTS).sum(), exact.leaves())
        if masked:  # nothing at a masked place may matter
            for t in (x.hidden, x.teacher_hidden):
                t.data[~mask] = torch.nan
            x.labels = x.labels.masked_fill(~mask, -100)
        term = Term(divergence, temperature)
        for tile, ready in [(None, None), (1, WEIGHTS), (4, None)]:
            student, teacher = heads(x, **cap)
            (values,) = head_loss(
                student, teacher, [term], labels=x.labels, mask=mask if masked else None, weights=ready, tile=tile
            )
            assert values.shape == MASK.shape and values.dtype is torch.promote_types(dtype, torch.float32)
            assert far(values, wanted) < (EACH[dtype] if dtype is torch.float64 else 1e-5)
            assert bool((values[~mask] == 0).all())
            for mine, want in zip(gradients((values * WEIGHTS).sum(), x.leaves()), wanted_grads, strict=True):
                assert mine.dtype is dtype and far(mine, want) < EACH[dtype]


@divergences
def test_accumulation_and_any_weighting_of_places(name: str, cut: str):
    """Texts one at a time add up to both at once; the gradients are ready, scaled, or made again."""
    divergence, formula = DIVERGENCES[name]
    x = given()
    wanted = gradients(3 * book(x, formula, 2.0)[MASK].mean(), x.leaves())
    for recompute, ready in itertools.product([False, True], [None, WEIGHTS]):
        grads = [torch.zeros_like(t) for t in x.leaves()]
        for one in range(TEXTS):
            half = Given(*(t[one : one + 1] if t.ndim == 3 else t for t in list(vars(x).values())[:-1]), x.labels[one:])
            (values,) = head_loss(
                *heads(half),
                [Term(divergence, 2.0, weight=4.0)],
                labels=x.labels[one : one + 1],
                mask=MASK[one : one + 1],
                weights=None if ready is None else ready[one : one + 1],
                recompute=recompute,
            )
            part = 3 * values.sum() / MASK.sum()
            for total, grad in zip(grads, torch.autograd.grad(part, x.leaves()), strict=True):
                total += grad
        for total, want in zip(grads, wanted, strict=True):
            assert far(total, want) < 1e-9


def test_several_terms_in_one_pass(cut: str):
    x = given()
    terms = [ce(0.3), Term(d.forward_kl, 2.0, weight=4.0), Term(d.js, 1.0, weight=0.5), Term(d.dkd, 2.0)]
    formulas = [
        (1.0, lambda q, p, y: -q.gather(-1, y[..., None])[..., 0]),
        (2.0, DIVERGENCES["forward_kl"][1]),
        (1.0, DIVERGENCES["js"][1]),
        (2.0, DIVERGENCES["dkd"][1]),
    ]
    wanted = [book(x, formula, t) for t, formula in formulas]
    for factors in ([0.3, 4.0, 0.5, 1.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 0.0]):
        values = head_loss(*heads(x), terms, labels=x.labels, mask=MASK)
        for value, want in zip(values, wanted, strict=True):
            assert far(value[MASK], want[MASK]) < 1e-10
        mine = sum(f * v.sum() / 7 for f, v in zip(factors, values, strict=True))
        theirs = sum(f * v[MASK].sum() / 7 for f, v in zip(factors, wanted, strict=True))
        for a, b in zip(gradients(mine, x.leaves()), gradients(theirs, x.leaves()), strict=True):
            assert far(a, b) < 1e-10


# ---- heads -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", EACH, ids=str)
def test_adapter_on_the_head(dtype: torch.dtype, cut: str):
    x = given(dtype)
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(s, generator=g).to(dtype).requires_grad_() for s in ((3, WIDE), (WORDS, 3)))
    exact = x.doubled()
    exact_a, exact_b = (t.detach().double().requires_grad_() for t in (a, b))
    whole = Given(exact.hidden, exact.head + 0.5 * exact_b @ exact_a, *list(vars(exact).values())[2:])
    wanted = book(whole, DIVERGENCES["js"][1], 1.0)
    frozen = x.head.detach()
    (values,) = head_loss(
        Head(x.hidden, frozen, x.bias, lora=(a, b, 0.5)), heads(x)[1], [Term(d.js)], mask=MASK, weights=WEIGHTS
    )
    assert far(values[MASK], wanted[MASK]) < max(1e-5, EACH[dtype] / 100)
    mine = gradients((values * WEIGHTS).sum(), [x.hidden, a, b])
    theirs = gradients((torch.where(MASK, wanted, 0) * WEIGHTS).sum(), [exact.hidden, exact_a, exact_b])
    for one, other in zip(mine, theirs, strict=True):
        assert far(one, other) < EACH[dtype]


def test_an_adapted_teacher_speaks_through_its_adapter():
    x = given()
    a, b = torch.randn(2, TEACHER_WIDE, dtype=torch.float64), torch.randn(WORDS, 2, dtype=torch.float64)
    (found,) = head_loss(
        heads(x)[0], Head(x.teacher_hidden, x.teacher_head, x.teacher_bias, lora=(a, b, 2.0)), [Term(d.reverse_kl)]
    )
    x.teacher_head = x.teacher_head + 2 * b @ a
    assert far(found, book(x, DIVERGENCES["reverse_kl"][1], 1.0)) < 1e-10


def test_tied_embeddings_get_both_gradients():
    torch.manual_seed(0)
    embedding = nn.Embedding(WORDS, WIDE, dtype=torch.float64)
    ids, x = torch.randint(WORDS, (TEXTS, LONG)), given()

    def grads(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        embedding.weight.grad = None
        loss_of(embedding(ids).sin()).backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    labels = x.labels
    mine = grads(lambda h: head_loss(Head(h, embedding.weight), None, [ce()], labels=labels, mask=MASK)[0].sum())
    theirs = grads(lambda h: F.cross_entropy((h @ embedding.weight.T)[MASK], labels[MASK], reduction="sum"))
    assert far(mine, theirs) < 1e-12


def test_student_and_teacher_may_share_the_head():
    x = given()
    teacher = torch.randn(TEXTS, LONG, WIDE, dtype=torch.float64)
    (found,) = head_loss(Head(x.hidden, x.head), Head(teacher, x.head), [Term(d.forward_kl)])
    wanted = forward_kl((x.hidden @ x.head.T).log_softmax(-1), (teacher @ x.head.detach().T).log_softmax(-1))
    for a, b in zip(
        gradients(found.sum(), [x.hidden, x.head]), gradients(wanted.sum(), [x.hidden, x.head]), strict=True
    ):
        assert far(a, b) < 1e-10


def test_vocabularies_that_differ_by_padding_are_compared_over_the_real_words(cut: str):
    for dtype in (torch.float64, torch.bfloat16):
        x = given(dtype)
        exact = x.doubled()
        wanted = book(exact, DIVERGENCES["reverse_kl"][1], 1.0)
        wanted_grads = gradients(wanted.sum(), exact.leaves())
        pad = torch.full((4,), 50.0, dtype=dtype)  # padding words with wild logits
        x.head, x.bias = torch.cat([x.head.detach(), pad[:, None].expand(4, WIDE)]), torch.cat([x.bias.detach(), pad])
        x.head.requires_grad_(), x.bias.requires_grad_()
        with pytest.raises(ValueError, match="33 words and the teacher's 29; if only padding"):
            head_loss(*heads(x), [Term(d.reverse_kl)])
        (found,) = head_loss(*heads(x), [Term(d.reverse_kl)], words=WORDS)
        assert far(found, wanted) < 1e-5
        for a, b in zip(gradients(found.sum(), x.leaves()), wanted_grads, strict=True):
            assert not bool(a[WORDS:].any()) or a.ndim == 3
            assert far(a if a.ndim == 3 else a[:WORDS], b) < EACH[dtype]


def test_words_that_the_bias_forbids(cut: str):
    """-inf on both sides takes a word out; the rest is compared as if it did not exist."""
    x = given()
    keep = torch.arange(WORDS) != 3
    less = Given(
        x.hidden, x.head[keep], x.bias[keep], x.teacher_hidden, x.teacher_head[keep], x.teacher_bias[keep], x.labels
    )
    for name in (
        "forward_kl",
        "reverse_kl",
        "js",
        "skew_kl",
        "skew_reverse_kl",
        "alpha_beta",
        "total_variation",
        "akl",
    ):
        wanted = book(less, DIVERGENCES[name][1], 1.0)
        grads = gradients(wanted.sum(), [x.hidden, x.head])
        forbidding = [b.detach().masked_fill(~keep, -torch.inf) for b in (x.bias, x.teacher_bias)]
        student, teacher = Head(x.hidden, x.head, forbidding[0]), Head(x.teacher_hidden, x.teacher_head, forbidding[1])
        (found,) = head_loss(student, teacher, [Term(DIVERGENCES[name][0])])
        assert far(found, wanted) < 1e-9, name
        for a, b in zip(gradients(found.sum(), [x.hidden, x.head]), grads, strict=True):
            assert far(a, b) < 1e-9, name


# ---- teachers --------------------------------------------------------------------------------------------------------
@divergences
def test_logits_at_hand_and_all_words_stored_are_the_dense_teacher(name: str, cut: str):
    x = given()
    t = x.teacher_hidden @ x.teacher_head.T + x.teacher_bias
    order = torch.randperm(WORDS).expand_as(t)
    stored = Sparse(order, t.log_softmax(-1).gather(-1, order))
    term = [Term(DIVERGENCES[name][0])]
    dense, logits, sparse = (
        head_loss(heads(x)[0], teacher, term, labels=x.labels, mask=MASK)[0]
        for teacher in (heads(x)[1], Logits(t), stored)
    )
    wanted = gradients((dense * WEIGHTS).sum(), x.leaves())
    for other, close in ((logits, 1e-12), (sparse, 1e-7)):
        assert far(other, dense) < close
        for a, b in zip(gradients((other * WEIGHTS).sum(), x.leaves()), wanted, strict=True):
            assert far(a, b) < close


def coarse(log: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the ids, and of all other words as one."""
    rest = log.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log.gather(-1, ids), rest], -1)


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if not n.startswith("dkd")])
@pytest.mark.parametrize("dtype", EACH, ids=str)
def test_top_k_with_tail_is_the_divergence_over_k_plus_one_classes(name: str, dtype: torch.dtype, cut: str):
    divergence, formula = DIVERGENCES[name]
    x = given(dtype)
    exact = x.doubled()
    for temperature in (1.0, 2.5):
        log_p = ((exact.teacher_hidden @ exact.teacher_head.T + exact.teacher_bias) / temperature).log_softmax(-1)
        top, ids = log_p.topk(5, -1)
        log_q = ((exact.hidden @ exact.head.T + exact.bias) / temperature).log_softmax(-1)
        wanted = torch.where(MASK, formula(coarse(log_q, ids), coarse(log_p, ids), x.labels), 0)
        # a row with fewer entries: room for more is filled with -1
        ids, top = torch.cat([ids, ids.new_full((TEXTS, LONG, 2), -1)], -1), F.pad(top, (0, 2), value=3.0)
        teacher = Sparse(ids, top.float() if dtype is not torch.float64 else top, temperature=temperature)
        (found,) = head_loss(heads(x)[0], teacher, [Term(divergence, temperature)], mask=MASK)
        assert far(found, wanted) < max(EACH[dtype], 1e-5)
        wanted_grads = gradients((wanted * WEIGHTS).sum(), exact.leaves())
        for a, b in zip(gradients((found * WEIGHTS).sum(), x.leaves()), wanted_grads, strict=True):
            assert far(a, b) < max(EACH[dtype], 1e-5 if dtype is torch.float32 else 0)


def one_row(
    logits: list[float], teacher: Sparse, term: Term, dtype: torch.dtype, label: int = 0
) -> tuple[Tensor, Tensor]:
    """Value and gradient to the logits of one place."""
    z = torch.tensor([logits], dtype=dtype, requires_grad=True)
    (value,) = head_loss(Head(z, torch.eye(len(logits), dtype=dtype)), teacher, [term], labels=torch.tensor([label]))
    value.sum().backward()
    assert z.grad is not None
    return value.detach()[0], z.grad[0]


@pytest.mark.parametrize("gap", [10.0, 90.0, 120.0, 1e4])
def test_a_tail_that_a_float_does_not_hold_still_counts(gap: float):
    logits = [gap, *torch.linspace(-0.1, -1, 7).tolist()]
    ids, log_p = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.2]]).log()
    padded = torch.cat([ids, ids.new_full((1, 1), -1)], -1), torch.cat([log_p, log_p.new_zeros(1, 1)], -1)
    z = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    wanted = top_k_kd(z, ids, log_p.double()).sum()
    wanted.backward()
    value, grad = one_row(logits, Sparse(*padded), Term(d.forward_kl), torch.float32)
    assert z.grad is not None and value.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert far(grad, z.grad[0]) < (1e-6 if gap < 1e3 else 1e-4)  # logits of 1e4 are 0.001 apart
    sure = [100.0 if k == 3 else 99.0 if k == 1 else 0.0 for k in range(8)]
    few = torch.tensor([[3, 1]]), torch.tensor([[0.3, 0.2]]).log()
    low, high = (one_row(sure, Sparse(*few), Term(d.dkd), dtype, 3) for dtype in (torch.float32, torch.float64))
    assert low[0].item() == pytest.approx(high[0].item(), rel=1e-6) and far(low[1], high[1]) < 1e-5


def test_where_every_word_is_kept_there_is_no_tail():
    log_p = torch.linspace(0, 2, 6).log_softmax(-1)
    short = (log_p.exp() * 0.98).log()[None]  # as what is stored in few digits
    value, grad = one_row(log_p.tolist(), Sparse(torch.arange(6)[None], short), Term(d.forward_kl), torch.float32)
    wanted = top_k_kd(log_p[None], torch.arange(6)[None], short)
    assert value.item() == pytest.approx(wanted.item(), abs=1e-6) and grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n.startswith("dkd")])
def test_dkd_of_stored_words_is_that_over_k_plus_one_classes(name: str):
    x = given()
    divergence, knobs = DIVERGENCES[name][0], {"dkd": (1.0, 8.0), "dkd_2_0.5": (2.0, 0.5)}[name]
    log_p = (x.teacher_hidden @ x.teacher_head.T + x.teacher_bias).log_softmax(-1)
    top, ids = log_p.topk(5, -1)
    log_q = (x.hidden @ x.head.T + x.bias).log_softmax(-1)
    same = ids == x.labels[..., None]
    y = torch.where(same.any(-1), same.int().argmax(-1), 5)
    rest = F.one_hot(y, 6) == 0

    def parts(log: Tensor) -> tuple[Tensor, Tensor]:
        yes = log.gather(-1, y[..., None]).exp()
        return torch.cat([yes, 1 - yes], -1).log(), log[rest].view(*log.shape[:-1], -1).log_softmax(-1)

    (is_q, others_q), (is_p, others_p) = parts(coarse(log_q, ids)), parts(coarse(log_p, ids))
    wanted = torch.where(MASK, knobs[0] * forward_kl(is_q, is_p) + knobs[1] * forward_kl(others_q, others_p), 0)
    (found,) = head_loss(heads(x)[0], Sparse(ids, top), [Term(divergence)], mask=MASK, labels=x.labels)
    assert far(found, wanted) < 1e-9
    expected = gradients((wanted * WEIGHTS).sum(), x.leaves())
    for a, b in zip(gradients((found * WEIGHTS).sum(), x.leaves()), expected, strict=True):
        assert far(a, b) < 1e-9


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n.startswith("dkd")])
def test_room_for_more_draws_changes_nothing_where_only_the_label_was_drawn(name: str):
    logits, term = torch.linspace(-1, 1, 8).tolist(), Term(DIVERGENCES[name][0])
    one = one_row(logits, Sparse.counts(torch.tensor([[3]]), torch.ones(1, 1)), term, torch.float32, 3)
    more = Sparse.counts(torch.tensor([[3, -1, -1]]), torch.tensor([[1.0, 0.0, 0.0]]))
    padded = one_row(logits, more, term, torch.float32, 3)
    assert torch.isfinite(one[0]) and torch.equal(one[0], padded[0]) and torch.equal(one[1], padded[1])


def test_top_k_bounds_the_full_divergence_from_below():
    x = given()
    full = head_loss(*heads(x), [Term(d.forward_kl), Term(d.js)])
    log_p = (x.teacher_hidden @ x.teacher_head.T + x.teacher_bias).log_softmax(-1)
    before = [torch.zeros_like(f) for f in full]
    for k in (1, 4, 12, 28):
        found = head_loss(heads(x)[0], Sparse(*log_p.topk(k, -1)[::-1]), [Term(d.forward_kl), Term(d.js)])
        for low, mid, high in zip(before, found, full, strict=True):
            assert bool((low <= mid + 1e-12).all()) and bool((mid <= high + 2e-5).all())  # k = 28 drops a tail of 1e-9
        before = found


def test_sampled_targets_have_the_gradient_of_the_full_teacher_in_expectation():
    x, draws, n = given(), 3000, 12
    wanted = gradients(head_loss(*heads(x), [Term(d.forward_kl)])[0].sum(), x.leaves())
    p = (x.teacher_hidden @ x.teacher_head.T + x.teacher_bias).softmax(-1)
    g = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(draws // 100):  # the mean over 100 draws, so that the interval can be read off 30 means
        drawn = torch.multinomial(p.flatten(0, 1), 100 * n, True, generator=g).view(TEXTS, LONG, 100, n)
        counts = F.one_hot(drawn, WORDS).sum(-2).double()
        total = [torch.zeros_like(t) for t in x.leaves()]
        for i in range(0, 100, 25):
            some = counts[:, :, i : i + 25].movedim(2, 0)
            weight, ids = some.sort(-1, descending=True)
            few = x.hidden.expand(25, -1, -1, -1)
            teacher = Sparse.counts(ids[..., :n].masked_fill(weight[..., :n] == 0, -1), weight[..., :n])
            (values,) = head_loss(Head(few, x.head, x.bias), teacher, [Term(d.forward_kl)])
            for t, grad in zip(total, gradients(values.sum() / 100, x.leaves()), strict=True):
                t += grad
        seen.append(total)
    for i, want in enumerate(wanted):
        means = torch.stack([s[i] for s in seen])
        error = means.std(0) / math.sqrt(len(seen))
        off = (means.mean(0) - want) / error.clamp_min(1e-12)
        assert float(off.abs().max()) < 4.5 and 0.5 < float(off.square().mean()) < 1.7
    biased = head_loss(heads(x)[0], Sparse(*p.log().topk(n, -1)[::-1], tail="none"), [Term(d.forward_kl)])[0]
    assert far(gradients(biased.sum(), x.leaves())[1], wanted[1]) > 0.02


def test_sampled_targets_one_by_one():
    x = given()
    ids = torch.tensor([3, 7, -1]).expand(TEXTS, LONG, 3)
    counts = torch.tensor([1.0, 3.0, 9.0]).expand(TEXTS, LONG, 3)
    (found,) = head_loss(heads(x)[0], Sparse.counts(ids, counts), [Term(d.cross_entropy)])
    log_q = (x.hidden @ x.head.T + x.bias).log_softmax(-1)
    assert far(found, -0.25 * log_q[..., 3] - 0.75 * log_q[..., 7]) < 1e-7


def test_nothing_known_about_a_place_teaches_nothing():
    """No entry at all: all mass is in the one class of all words, and there the student agrees."""
    x = given()
    ids = torch.full((TEXTS, LONG, 2), -1)
    (found,) = head_loss(heads(x)[0], Sparse(ids, torch.zeros(TEXTS, LONG, 2)), [Term(d.forward_kl)])
    assert float(found.detach().abs().max()) < 1e-12
    assert all(float(g.abs().max()) < 1e-12 for g in gradients(found.sum(), x.leaves()))


def test_labels_of_dkd_are_found_among_stored_words():
    x = given()
    log_p = (x.teacher_hidden @ x.teacher_head.T + x.teacher_bias).log_softmax(-1)
    order = torch.cat([x.labels[..., None], (x.labels[..., None] + 1 + torch.arange(WORDS - 1)) % WORDS], -1)
    stored = Sparse(order, log_p.gather(-1, order))
    (found,) = head_loss(heads(x)[0], stored, [Term(d.dkd)], labels=x.labels)
    assert far(found, book(x, DIVERGENCES["dkd"][1], 1.0)) < 1e-7


# ---- numbers ---------------------------------------------------------------------------------------------------------
@divergences
@pytest.mark.parametrize("dtype", EACH, ids=str)
def test_zero_at_match_and_never_negative(name: str, dtype: torch.dtype):
    x = given(dtype)
    same = Head(x.hidden, x.head, x.bias)
    (found,) = head_loss(
        same, Head(x.hidden.detach(), x.head.detach(), x.bias.detach()), [Term(DIVERGENCES[name][0])], labels=x.labels
    )
    if name not in SURROGATES:
        assert float(found.detach().abs().max()) <= (1e-12 if dtype is torch.float64 else 1e-6)
        assert float(found.detach().min()) >= 0
        for seed in range(20):
            near = given(dtype, near=True, seed=seed)
            (close,) = head_loss(*heads(near), [Term(DIVERGENCES[name][0])], labels=near.labels)
            assert float(close.detach().min()) >= 0
    if name != "cross_entropy":
        for grad in gradients(found.sum(), x.leaves()):
            assert float(grad.abs().max()) < (1e-12 if dtype is torch.float64 else 1e-4)


@divergences
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finite_at_logits_of_ten_thousand(name: str, dtype: torch.dtype):
    x = given(dtype)
    x.head.data *= 1e4
    x.teacher_head.data *= 1e4
    (found,) = head_loss(*heads(x), [Term(DIVERGENCES[name][0])], labels=x.labels, mask=MASK)
    assert bool(found.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in gradients(found.sum() / 9, x.leaves()))


def larger(apart: float, words: int = 700, width: int = 48, places: int = 96) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A student close to its teacher, in bf16."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(places, width, generator=g), torch.randn(words, width, generator=g) * 2 / width**0.5
    near = hidden + apart * torch.randn(places, width, generator=g)
    half = [t.bfloat16() for t in (near, head, hidden, head)]
    return half[0].requires_grad_(), half[1].requires_grad_(), half[2], half[3]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("tile", [None, 16, 96])
@pytest.mark.parametrize("native", [False, True])
def test_half_precision_close_to_the_teacher(
    name: str, tile: int | None, native: bool, monkeypatch: pytest.MonkeyPatch
):
    """0.3 % when exact; fast, where the products are made in bf16, 3 % and 6 %, no worse than logits in bf16."""
    monkeypatch.setattr(loss, "half_units", lambda x: native)
    monkeypatch.setattr(tiles, "PIECE", 100)
    hidden, head, teacher_hidden, teacher_head = larger(0.2 if native else 0.05)
    divergence, formula = DIVERGENCES[name]

    def full(hidden: Tensor, head: Tensor) -> Tensor:
        log_p = (teacher_hidden.to(hidden.dtype) @ teacher_head.to(head.dtype).T).to(torch.float64).log_softmax(-1)
        return formula((hidden @ head.T).to(torch.float64).log_softmax(-1), log_p, torch.empty(0)).mean()

    exact = [hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()]
    value = full(*exact)
    wanted = gradients(value, exact)
    half = gradients(full(hidden, head), [hidden, head])
    (found,) = head_loss(
        Head(hidden, head), Head(teacher_hidden, teacher_head), [Term(divergence)], fast=native, tile=tile
    )
    assert float(found.detach().min()) >= 0
    assert abs(float(found.detach().mean()) - float(value.detach())) < (3e-2 if native else 1e-4) * float(
        value.detach()
    )
    for i, (mine, want) in enumerate(zip(gradients(found.mean(), [hidden, head]), wanted, strict=True)):
        error = far(mine, want)
        assert error < ((0.03, 0.06)[i] if native else 0.003)
        if native:
            assert error < 1.1 * far(half[i], want)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("tile", [16, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_that_are_added_up_in_full(native: bool, tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """As on CUDA: what a gradient in bf16 loses is in a second product, unless `fast` asks for one alone."""

    def wide_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
        assert a.dtype is b.dtype is dtype and out.dtype is torch.float32
        made.append(out.addmm_(a.float(), b.float(), beta=float(add)))

    made: list[Tensor] = []
    monkeypatch.setattr(tiles, "wide_product", wide_product)
    monkeypatch.setattr(tiles, "in_halves", lambda x, w, of: x.dtype is w.dtype is dtype and of is torch.float32)
    hidden, head, teacher_hidden, teacher_head = (t.detach().to(dtype) for t in larger(0.05))
    bias = torch.linspace(-1, 1, len(head))
    leaves = [t.double().requires_grad_() for t in (hidden, head, bias)]
    log_p = (teacher_hidden.double() @ teacher_head.double().T).log_softmax(-1)
    wanted = forward_kl((leaves[0] @ leaves[1].T + leaves[2]).log_softmax(-1), log_p)
    exact = gradients(wanted.sum(), leaves)
    teacher, terms = Head(teacher_hidden, teacher_head), (Term(d.forward_kl),)
    factors = ((hidden, head), (torch.zeros_like(hidden), head))
    task = tiles.Task(factors, bias, 1.0, None, teacher, terms, None, len(head), native=native, tile=tile)
    found = tiles.run(task, torch.ones(1, len(hidden)), [True, True, True, True, True])
    assert far(found.values[0], wanted) < 1e-5 and far(found.grads[-1], exact[2]) < 1e-4
    for grad, want in zip(found.grads[:2] + found.grads[2:3], [*exact[:2], exact[0]], strict=True):
        bound = 5e-3 if native else 1e-4
        assert far(grad, want) < bound and (not native or far(grad, want) > 1e-4)
    blocks = len(hidden) // tile
    of_gradients = (2 if native else 4 if dtype is torch.bfloat16 else 0) * 2 * blocks
    rounded = 2 if native and tile == len(hidden) else 0  # the head's, which one product fills
    assert len(made) == 3 * blocks + of_gradients - rounded


# ---- what is not done ------------------------------------------------------------------------------------------------
class Largest(TorchDispatchMode):
    """The most numbers that any operation returns in one tensor, and how many matrix products there are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        self.most = max(self.most, *sizes, 0)
        self.products += "mm" in str(func)
        return out


def test_no_tensor_of_all_logits_exists_and_every_product_is_made_once(monkeypatch: pytest.MonkeyPatch):
    places, words, width = 64, 600, 4
    monkeypatch.setattr(tiles, "TILE", 8)
    monkeypatch.setattr(tiles, "CACHE", 2 * words)
    monkeypatch.setattr(tiles, "TEACHER", 4)
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(places, width, generator=g), torch.randn(words, width, generator=g)
    hidden.requires_grad_(), head.requires_grad_()
    teacher = Head(hidden.detach() + 1, head.detach())
    for dtype, mask, share in ((torch.float32, None, 1.0), (torch.float32, torch.arange(places) % 4 == 0, 0.25)):
        for recompute, turns in ((False, 1), (True, 2)):
            with Largest() as seen:
                (values,) = head_loss(
                    Head(hidden.to(dtype), head.to(dtype)), teacher, [Term(d.js)], mask=mask, recompute=recompute
                )
                values.mean().backward()
            assert seen.most <= max(8 * words, words * width, places * width)
            projections, backs = turns * (8 + 16), 2 * 8
            assert seen.products == share * (projections + backs)


def test_the_gradient_of_the_head_is_handed_over_and_not_copied(monkeypatch: pytest.MonkeyPatch):
    x = given(torch.float32)
    rooms, make = [], tiles._room

    def room(*args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        rooms.append(made.data_ptr())
        return made

    monkeypatch.setattr(tiles, "_room", room)
    head_loss(*heads(x), [Term(d.js)])[0].mean().backward()
    assert x.head.grad is not None
    assert x.head.grad.data_ptr() in rooms


def test_only_what_needs_a_gradient_gets_one():
    x = given()
    x.head.requires_grad_(False), x.bias.requires_grad_(False)
    x.teacher_hidden.requires_grad_(), x.teacher_head.requires_grad_()
    with Largest() as seen:
        head_loss(*heads(x), [Term(d.forward_kl)])[0].sum().backward()
    assert x.hidden.grad is not None and seen.products == 3
    assert all(t.grad is None for t in (x.head, x.bias, x.teacher_hidden, x.teacher_head))
    with torch.no_grad(), Largest() as seen:
        (values,) = head_loss(*heads(x), [Term(d.forward_kl)])
    assert not values.requires_grad and seen.products == 2
    x.hidden.requires_grad_(False)
    assert not head_loss(*heads(x), [Term(d.forward_kl)])[0].requires_grad


def test_backward_twice():
    x = given()
    (values,) = head_loss(*heads(x), [Term(d.forward_kl)])
    first = gradients(values.sum(), x.leaves())
    kept = [g.clone() for g in first]
    for a, b, c in zip(first, kept, gradients(2 * values.sum(), x.leaves()), strict=True):
        assert torch.equal(a, b) and far(c, 2 * b) < 1e-12


def test_no_place_counts():
    x = given()
    x.hidden.data.fill_(torch.nan)
    (values,) = head_loss(*heads(x), [Term(d.forward_kl)], mask=torch.zeros_like(MASK))
    assert not bool(values.any())
    assert not any(bool(g.any()) for g in gradients(values.sum(), x.leaves()))


def test_autocast_changes_nothing():
    x = given(torch.float32)
    (want,) = head_loss(*heads(x), [Term(d.forward_kl)])
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = head_loss(*heads(x), [Term(d.forward_kl)])
        found.sum().backward()
    assert torch.equal(found, want) and x.head.grad is not None
    assert torch.equal(x.head.grad, gradients(want.sum(), x.leaves())[1])


def test_half_hidden_states_and_a_full_precision_head():
    """What autocast leaves."""
    x = given(torch.float32)
    x.hidden = x.hidden.detach().bfloat16().requires_grad_()
    x.teacher_hidden = x.teacher_hidden.bfloat16()
    exact = x.doubled()
    wanted = book(exact, DIVERGENCES["js"][1], 1.0)
    (found,) = head_loss(*heads(x), [Term(d.js)], fast=True)
    assert far(found, wanted) < 1e-5
    hidden, head, _ = gradients(found.mean(), x.leaves())
    to_hidden, to_head, _ = gradients(wanted.mean(), exact.leaves())
    assert far(hidden, to_hidden) < 3e-3 and far(head, to_head) < 1e-5 and head.dtype is torch.float32


def test_under_autocast_on_a_gpu_heads_are_rounded(monkeypatch: pytest.MonkeyPatch):
    """Values and gradients are those of the rounded head, and the gradient reaches the one in full precision."""
    x = given(torch.float32)
    rounded = [t.detach().bfloat16().float().requires_grad_() for t in (x.hidden, x.head)]
    sides = (
        Head(*rounded, x.bias),
        Head(x.teacher_hidden.bfloat16().float(), x.teacher_head.bfloat16().float(), x.teacher_bias),
    )
    (wanted,) = head_loss(*sides, [Term(d.js)])
    grads = gradients(wanted.mean(), [*rounded, x.bias])
    monkeypatch.setattr(loss, "autocast", lambda x: torch.bfloat16)
    (found,) = head_loss(*heads(x), [Term(d.js)])
    assert far(found, wanted) < 1e-6
    for mine, want in zip(gradients(found.mean(), x.leaves()), grads, strict=True):
        assert mine.dtype is torch.float32 and far(mine, want) < 3e-3
    adapted = Head(x.hidden, x.head, lora=(x.head, x.head, 1.0))
    assert adapted.rounded(torch.bfloat16) is adapted
    monkeypatch.undo()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss.autocast(x.hidden) is None


def test_tvd_pp_over_the_batch():
    """The mean reward of the whole batch comes from a pass without gradients."""
    x = given()
    with torch.no_grad():
        (reward,) = head_loss(*heads(x), [Term(d.acceptance)], mask=MASK)
        mean = reward[MASK].mean()
    (found,) = head_loss(*heads(x), [Term(partial(d.tvd_pp, mean=mean))], mask=MASK)
    q = (x.hidden @ x.head.T + x.bias).softmax(-1)[MASK]
    r = ((x.teacher_hidden @ x.teacher_head.T + x.teacher_bias).softmax(-1)[MASK] > q).double()
    m = float((q * r).sum(-1).mean())
    std = float((q * (r - m) ** 2).sum(-1).mean() ** 0.5)
    wanted = -(q.detach() * (r - m) / std * q.log()).sum(-1)
    assert far(found[MASK], wanted) < 1e-9
    for a, b in zip(gradients(found.sum(), x.leaves()), gradients(wanted.sum(), x.leaves()), strict=True):
        assert far(a, b) < 1e-9
    steepest = gradients(head_loss(*heads(x), [Term(d.total_variation)], mask=MASK)[0].sum() / std, x.leaves())
    for a, b in zip(gradients(found.sum(), x.leaves()), steepest, strict=True):
        assert far(a, b) < 1e-9


def test_akl_looks_further_where_the_head_is_long():
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 4, generator=g).double(), 0.01 * torch.randn(2000, 4, generator=g).double()
    teacher = torch.randn(3, 4, generator=g).double()
    (found,) = head_loss(Head(hidden, head), Head(teacher, head), [Term(d.akl)])
    assert far(found, akl((hidden @ head.T).log_softmax(-1), (teacher @ head.T).log_softmax(-1), 0.5)) < 1e-8


def test_a_new_divergence_is_a_few_lines():
    """Squared Hellinger distance, from nothing but its derivative."""

    def hellinger(rows: d.Rows) -> d.Pair:
        root = (0.5 * (rows.log_p + rows.log_q)).exp()
        return 1 - root.sum(-1), -0.5 * root

    x = given()
    (found,) = head_loss(*heads(x), [Term(hellinger)])
    (wanted,) = head_loss(*heads(x), [Term(partial(d.alpha_divergence, alpha=0.5))])
    assert far(4 * found, wanted) < 1e-9
    for a, b in zip(gradients(4 * found.sum(), x.leaves()), gradients(wanted.sum(), x.leaves()), strict=True):
        assert far(a, b) < 1e-9


# ---- what does not fit -----------------------------------------------------------------------------------------------
def test_one_sentence_for_what_does_not_fit():
    x = given()
    student, teacher = heads(x)
    kl = [Term(d.forward_kl)]
    ids = torch.zeros(TEXTS, LONG, 1, dtype=torch.long)
    stored = Sparse(ids, ids.float())
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Head(x.hidden, x.teacher_head), "do not fit a head"),
        (lambda: Head(x.hidden, x.head, softcap=0.0), "`softcap` must be > 0 or None, got 0"),
        (lambda: Term(d.forward_kl, 0.0), "`temperature` must be > 0, got 0"),
        (lambda: Sparse(ids, ids[..., 0]), "must be alike"),
        (lambda: Sparse(ids, ids.float(), tail="some"), "`tail` must be 'bucket' or 'none'"),  # type: ignore[arg-type]
        (lambda: head_loss(student, teacher, []), "nothing to compute"),
        (lambda: head_loss(student, None, kl), "against the teacher, and there is none"),
        (lambda: head_loss(student, teacher, [ce()]), "against the labels, and none were given"),
        (lambda: head_loss(student, teacher, [Term(d.dkd)]), "asks for labels"),
        (lambda: head_loss(student, teacher, [ce()], labels=x.labels - 100), "mask the others out"),
        (lambda: head_loss(student, teacher, kl, mask=MASK[0]), r"mask are for places \(7,\)"),
        (lambda: head_loss(student, Head(x.teacher_hidden[:1], x.teacher_head), kl), "the teacher's hidden states are"),
        (lambda: head_loss(student, teacher, kl, words=30), "`words` must be in \\[1, 29\\]"),
        (lambda: head_loss(student, stored, [Term(d.forward_kl, 2.0)]), "taken at temperature 1 and cannot be brought"),
        (
            lambda: head_loss(student, Sparse(ids + 29, ids.float()), kl),
            "ids must be below 29, the words compared; got 29",
        ),
        (lambda: head_loss(student, teacher, [Term(partial(d.js, beta=1.0))]), "`beta` must be in"),
        (lambda: head_loss(student, teacher, [Term(partial(d.skew_kl, alpha=2.0))]), "`alpha` must be in"),
        (lambda: head_loss(student, teacher, [Term(partial(d.alpha_beta, beta=0.0))]), "the limits are forward_kl"),
    ]
    for call, says in cases:
        with pytest.raises(ValueError, match=says):
            call()


# ---- several processes -----------------------------------------------------------------------------------------------
class Reader(nn.Module):
    """A language model with tied embeddings, which returns hidden states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDE, dtype=torch.float64)
        self.body = nn.Linear(WIDE, WIDE, dtype=torch.float64)
        self.head = nn.Linear(WIDE, WORDS, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embedding(ids)).tanh()


def split_head(how: str) -> dict[str, Tensor]:
    """Gradients of the mean over processes, each with its own text, as FSDP2 takes it; in one process, of the whole."""
    import os

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    model, x = Reader(), given()
    ids = x.labels
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in (model.head, model.body) if how == "untied" else (model.body,):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        ids = ids[rank : rank + 1]
    share = slice(rank, rank + 1) if world > 1 else slice(None)
    hidden = model(ids)
    weight = model.embedding.weight if how == "tied" else model.head.weight
    teacher = Head(x.teacher_hidden[share], x.teacher_head)
    values = head_loss(Head(hidden, weight), teacher, [Term(d.reverse_kl), ce(0.5)], labels=ids, mask=MASK[share])
    (world * (values[0].sum() + 0.5 * values[1].sum())).backward()
    sharded = [isinstance(p, DTensor) for p in model.parameters()]
    assert all(sharded) if world > 1 else not any(sharded)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


@pytest.mark.parametrize("how", ["untied", "tied"])
def test_a_head_in_shards(tmp_path: Path, how: str):
    from tests.test_distributed import processes  # loads the loop and Accelerate, which nothing else here needs

    (wanted,) = processes(1, tmp_path / "one", split_head, how)
    for found in processes(2, tmp_path / "two", split_head, how):
        assert found.keys() == wanted.keys()
        for name, want in wanted.items():
            assert far(found[name], want) < 1e-12, name
