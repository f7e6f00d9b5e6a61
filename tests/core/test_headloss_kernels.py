"""core/headloss/kernels.py against full logits in fp64, as test_headloss.py does it with torch's own functions.

Three ways to run the kernels: in a stand-in for Triton (always), in Triton's interpreter (where Triton is installed and
TRITON_INTERPRET=1 was set before, as `test_in_the_interpreter` does it), and on a CUDA device where there is one.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.core.headloss import Head, Logits, Sparse, Term, ce, fused, head_loss, tiles
from limbeck.core.headloss import divergences as d
from tests.core import tiny_triton
from tests.core.test_headloss import (
    DIVERGENCES,
    EACH,
    MASK,
    SURROGATES,
    WEIGHTS,
    WORDS,
    Given,
    book,
    far,
    given,
    gradients,
    heads,
    larger,
)

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
NAMES = [n for n, (f, _) in DIVERGENCES.items() if any(f is k or getattr(f, "func", None) is k for k in fused.KINDS)]
divergences = pytest.mark.parametrize("name", NAMES)
HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
HAVE, CUDA = importlib.util.find_spec("triton") is not None, torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WAYS = ["stand-in", *(["cuda"] if HAVE and CUDA and not INTERPRETED else [])]


@cache
def stand_in() -> ModuleType:
    return tiny_triton.kernels(ROOT / "limbeck/core/headloss/kernels.py")


@pytest.fixture(params=WAYS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the tensors are that the kernels take, in blocks of all words."""
    if request.param == "cuda":
        yield "cuda"
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(fused, "_kernels", stand_in)
        yield "cpu"


def on(device: str, x: Given) -> Given:
    return Given(*(t.detach().to(device).requires_grad_(t.requires_grad) for t in vars(x).values()))


def agree(x: Given, name: str, temperature: float, masked: bool, cap: dict[str, Any], tile: int | None) -> None:
    """Value and gradients are those of full logits, and what is masked does not matter."""
    divergence, formula = DIVERGENCES[name]
    exact = x.doubled()
    mask, weights = (MASK if masked else torch.ones_like(MASK)).to(x.labels.device), WEIGHTS.to(x.labels.device)
    wanted = torch.where(mask, book(exact, formula, temperature, **cap), 0)
    wanted_grads = gradients((wanted * weights).sum(), exact.leaves())
    for t in (x.hidden, x.teacher_hidden):
        t.data[~mask] = torch.nan
    (values,) = head_loss(
        *heads(x, **cap),
        [Term(divergence, temperature)],
        mask=mask if masked else None,
        weights=weights if tile == 4 else None,
        tile=tile,
        fused=True,
    )
    assert values.dtype is torch.float32 and far(values, wanted) < 1e-5
    for mine, want in zip(gradients((values * weights).sum(), x.leaves()), wanted_grads, strict=True):
        assert mine.dtype is x.hidden.dtype and far(mine, want) < EACH[mine.dtype]
    with torch.no_grad():  # the pass that writes no gradient
        (alone,) = head_loss(*heads(x, **cap), [Term(divergence, temperature)], mask=mask, fused=True)
    assert far(alone, wanted) < 1e-5


@divergences
@HALF
def test_value_and_gradients_are_those_of_full_logits(
    name: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
):
    ways = itertools.product([1.0, 2.5], [False, True], [False, True])
    for (temperature, masked, capped), tile in zip(ways, itertools.cycle([None, 1, 4]), strict=False):
        monkeypatch.setattr(fused, "BLOCK", 8 if tile == 4 else 4096)
        cap: dict[str, Any] = {"scale": 1.5, "softcap": 3.0} if capped else {}
        agree(on(device, given(dtype)), name, temperature, masked, cap, tile)


@divergences
def test_cross_entropy_beside(name: str, device: str):
    divergence, formula = DIVERGENCES[name]
    x = on(device, given(torch.float32))
    exact, mask = x.doubled(), MASK.to(device)
    wanted = [
        book(exact, lambda q, p, y: -q.gather(-1, y[..., None])[..., 0], 1.0)[mask],
        book(exact, formula, 2.0)[mask],
    ]
    terms = [ce(0.3), Term(divergence, 2.0, weight=4.0)]
    for turn, factors in itertools.product((1, -1), ([0.3, 4.0], [1.0, 2.0], [0.0, 1.0], [1.0, 0.0])):
        found = head_loss(*heads(x), terms[::turn], labels=x.labels, mask=mask, fused=True)[::turn]
        for mine, want in zip(found, wanted, strict=True):
            assert far(mine[mask], want) < 1e-6
        mine, theirs = (sum(f * v.sum() for f, v in zip(factors, side, strict=True)) for side in (found, wanted))
        assert isinstance(mine, Tensor) and isinstance(theirs, Tensor)
        for a, b in zip(gradients(mine, x.leaves()), gradients(theirs, exact.leaves()), strict=True):
            assert far(a, b) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_cross_entropy_alone(device: str, temperature: float):
    x = on(device, given(torch.float32))
    term = Term(d.cross_entropy, temperature, against="labels")
    (found,) = head_loss(heads(x)[0], None, [term], labels=x.labels, fused=True)
    exact = x.doubled()
    wanted = book(exact, lambda q, p, y: -q.gather(-1, y[..., None])[..., 0], temperature)
    assert far(found, wanted) < 1e-6
    for a, b in zip(gradients(found.sum(), x.leaves()), gradients(wanted.sum(), exact.leaves()), strict=True):
        assert far(a, b) < 1e-5


def test_padding_adapters_and_logits_at_hand(device: str):
    """Rows that are further apart than the words compared are many, and other teachers and heads than plain ones."""
    x = on(device, given(torch.float32))
    (wanted,) = head_loss(*heads(x), [Term(d.js)], words=25, fused=False)
    grads = gradients(wanted.sum(), x.leaves())
    t = x.teacher_hidden @ x.teacher_head.T + x.teacher_bias
    for logits in (t, t.mT.contiguous().mT):
        (found,) = head_loss(heads(x)[0], Logits(logits), [Term(d.js)], words=25, fused=True)
        assert far(found, wanted) < 1e-6
        for a, b in zip(gradients(found.sum(), x.leaves()), grads, strict=True):
            assert far(a, b) < 1e-5
    lora = (torch.ones(2, 8, device=device, requires_grad=True), x.head.detach()[:, :2].contiguous(), 0.5)
    student = Head(x.hidden, x.head, x.bias, lora=lora)
    both = [head_loss(student, heads(x)[1], [Term(d.js)], fused=f)[0] for f in (True, False)]
    assert far(*both) < 1e-6
    assert far(*(gradients(v.sum(), [lora[0]])[0] for v in both)) < 1e-5


@divergences
@HALF
def test_zero_at_match_and_never_negative(name: str, dtype: torch.dtype, device: str):
    x = on(device, given(dtype))
    term = [Term(DIVERGENCES[name][0])]
    same = Head(x.hidden.detach(), x.head.detach(), x.bias.detach())
    (found,) = head_loss(Head(x.hidden, x.head, x.bias), same, term, fused=True)
    if name not in SURROGATES:
        assert 0 <= float(found.detach().min()) <= float(found.detach().max()) <= 1e-6
        for seed in range(20):
            (close,) = head_loss(*heads(on(device, given(dtype, near=True, seed=seed))), term, fused=True)
            assert float(close.detach().min()) >= 0
    for grad in gradients(found.sum(), x.leaves()):
        assert float(grad.abs().max()) < 1e-4


@divergences
@HALF
def test_finite_at_logits_of_ten_thousand(name: str, dtype: torch.dtype, device: str):
    x = on(device, given(dtype))
    x.head.data *= 1e4
    x.teacher_head.data *= 1e4
    terms = [Term(DIVERGENCES[name][0]), ce()]
    found, wanted = (head_loss(*heads(x), terms, labels=x.labels, fused=f) for f in (True, False))
    for mine, theirs in zip(found, wanted, strict=True):
        assert bool(mine.isfinite().all()) and far(mine, theirs) < 1e-5
    both = [gradients(v[0].sum() + v[1].sum(), x.leaves()) for v in (found, wanted)]
    for a, b in zip(*both, strict=True):
        assert bool(a.isfinite().all()) and far(a, b) < 1e-3


@divergences
def test_words_that_the_bias_forbids(name: str, device: str):
    x = on(device, given(torch.float32))
    keep = torch.arange(WORDS, device=device) != 3
    sides = [b.detach().masked_fill(~keep, -torch.inf) for b in (x.bias, x.teacher_bias)]
    student, teacher = Head(x.hidden, x.head, sides[0]), Head(x.teacher_hidden, x.teacher_head, sides[1])
    both = [head_loss(student, teacher, [Term(DIVERGENCES[name][0])], fused=f)[0] for f in (True, False)]
    assert bool(both[0].isfinite().all()) and far(*both) < 1e-6
    for a, b in zip(*(gradients(v.sum(), [x.hidden, x.head]) for v in both), strict=True):
        assert far(a, b) < 1e-5


@divergences
@pytest.mark.parametrize("side", ["hidden", "teacher_hidden"])
def test_what_is_no_number_does_not_vanish(name: str, side: str, device: str):
    x = on(device, given(torch.float32))
    getattr(x, side).data[0, 2] = torch.nan
    (found,) = head_loss(*heads(x), [Term(DIVERGENCES[name][0])], fused=True)
    assert bool(found[0, 2].isnan()) and int(found.isnan().sum()) == 1
    assert bool(gradients(found.sum(), [x.head])[0].isnan().any())


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("apart", [0.05, 1e-3])
def test_half_precision_close_to_the_teacher(name: str, apart: float, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "BLOCK", 128)
    hidden, head, *teacher = (t.detach().to(device) for t in larger(apart))
    if apart < 0.01:  # in fp32, where two that are so close still differ
        hidden = teacher[0].float() + apart * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(
            device
        )
        head, teacher = head.float(), [t.float() for t in teacher]
    divergence, formula = DIVERGENCES[name]
    leaves, exact = [t.requires_grad_() for t in (hidden, head)], [hidden.detach().double(), head.detach().double()]
    log_p = (teacher[0].double() @ teacher[1].double().T).log_softmax(-1)
    wanted = formula((exact[0].requires_grad_() @ exact[1].requires_grad_().T).log_softmax(-1), log_p, log_p).mean()
    (found,) = head_loss(Head(*leaves), Head(*teacher), [Term(divergence)], fused=True)
    assert far(found.mean(), wanted) < 1e-3
    for a, b in zip(gradients(found.mean(), leaves), gradients(wanted, exact), strict=True):
        assert far(a, b) < 0.003


# ---- when ------------------------------------------------------------------------------------------------------------
def test_on_a_cpu_it_is_never_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "_launched", None)
    x = given(torch.float32)
    head_loss(*heads(x), [Term(d.forward_kl)])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="fused=True asks for tensors on a CUDA device"):
        head_loss(*heads(x), [Term(d.forward_kl)], fused=True)


class OnCuda:
    """A task whose tensors would be on a GPU, for the choice alone."""

    def __init__(self, task: tiles.Task) -> None:
        self.task, self.factors = task, [(self, self)]
        self.device = torch.device("cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


def task(*terms: Term, teacher: Any = None, dtype: torch.dtype = torch.float32, fused: bool | None = None) -> Any:
    x = torch.ones(2, 3, dtype=dtype)
    said = teacher or Logits(torch.ones(2, 5))
    return OnCuda(tiles.Task(((x, torch.ones(5, 3, dtype=dtype)),), None, 1, None, said, terms, None, 5, fused=fused))


def test_on_cuda_it_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "_kernels", stand_in)
    kl, js = Term(d.forward_kl), Term(partial(d.js, beta=0.1))
    assert fused.plan(task(kl)) == fused.Plan("forward_kl", 0.0, 0, None)
    assert fused.plan(task(ce(), js)) == fused.Plan("js", 0.1, 1, 0)
    assert fused.plan(task(ce(), fused=True)) == fused.Plan("", 0.0, None, 0, asked=True)
    assert fused.plan(task(Term(d.skew_kl))) == fused.Plan("skew_kl", 0.1, 0)
    assert fused.plan(task(Term(partial(d.skew_reverse_kl, alpha=0)))) == fused.Plan("reverse_kl", 0.0, 0)
    stored = Sparse(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1))
    none: list[tuple[tuple[Term, ...], dict[str, Any]]] = [
        ((kl, js), {}),
        ((ce(), ce()), {}),
        ((kl,), {"teacher": stored}),
        ((kl,), {"dtype": torch.float64}),
        ((Term(d.akl),), {}),
        ((Term(lambda rows: d.forward_kl(rows)),), {}),
        ((Term(partial(d.js, beta=1.0)),), {}),
        ((Term(partial(d.skew_kl, alpha=2.0)),), {}),
        ((Term(partial(d.js, beta="0.5")),), {}),
        ((Term(partial(d.js, alpha=0.5)),), {}),
        ((Term(d.forward_kl, against="labels"),), {}),
    ]
    for terms, how in none:
        assert fused.plan(task(*terms, **how)) is None
        with pytest.raises(ValueError, match="no kernel for these terms: in fp32, it knows one of cross_entropy, forw"):
            fused.plan(task(*terms, **how, fused=True))
    assert fused.plan(task(kl, fused=False)) is None
    monkeypatch.setenv("LIMBECK_TRITON", "0")
    assert fused.plan(task(kl)) is None and fused.plan(task(kl, fused=True)) is not None


def test_without_triton(monkeypatch: pytest.MonkeyPatch):
    fused._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "limbeck.core.headloss.kernels", None)  # importing it fails
    monkeypatch.delattr("limbeck.core.headloss.kernels", raising=False)
    try:
        assert fused.plan(task(Term(d.forward_kl))) is None
        with pytest.raises(ImportError, match="fused=True needs Triton, which cannot be imported: pip install triton"):
            fused.plan(task(Term(d.forward_kl), fused=True))
    finally:
        fused._kernels.cache_clear()


def test_where_triton_fails_torch_goes_on(monkeypatch: pytest.MonkeyPatch):
    x = given(torch.float32)
    tries = []

    def fails(*args: Any) -> Tensor:
        tries.append(1)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused, "_launched", fails)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (wanted,) = head_loss(*heads(x), [Term(d.forward_kl)])
    for asked in (False, True):
        monkeypatch.setattr(fused, "plan", lambda task, asked=asked: fused.Plan("forward_kl", 0.0, 0, None, asked))
        if asked:
            with pytest.raises(RuntimeError, match="C compiler"):
                head_loss(*heads(x), [Term(d.forward_kl)])
        else:
            with pytest.warns(RuntimeWarning, match="Failed to find C compiler; to go without from the start, set LIM"):
                (found,) = head_loss(*heads(x), [Term(d.forward_kl)], tile=4)
            assert torch.allclose(found, wanted) and len(tries) == 1


# ---- Triton itself ---------------------------------------------------------------------------------------------------
def by_itself(*command: str, **environment: str) -> str:
    """Of another process, because Triton is interpreted or not from its import on."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not HAVE or INTERPRETED, reason="Triton is not installed")
def test_in_the_interpreter():
    out = by_itself(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton_itself", TRITON_INTERPRET="1"
    )
    assert "1 passed" in out and "skipped" not in out


@pytest.mark.skipif(not INTERPRETED, reason="`test_in_the_interpreter` runs it, in a process of its own")
def test_by_triton_itself(monkeypatch: pytest.MonkeyPatch):
    """Two places, for each takes about a second."""
    monkeypatch.setattr(fused, "BLOCK", 16)
    whole = given(torch.float32)
    two = [t[:1, :2].detach().requires_grad_(t.requires_grad) if t.ndim == 3 else t for t in vars(whole).values()]
    x = Given(*two[:-1], whole.labels[:1, :2])
    exact, cap = x.doubled(), {"scale": 1.5, "softcap": 3.0}
    for name in NAMES:
        divergence, formula = DIVERGENCES[name]
        wanted, terms = book(exact, formula, 2.5, **cap), [Term(divergence, 2.5)]
        if name in ("forward_kl", "js"):
            wanted = wanted + book(exact, lambda q, p, y: -q.gather(-1, y[..., None])[..., 0], 1.0, **cap)
            terms.append(ce())
        found = sum(head_loss(*heads(x, **cap), terms, labels=x.labels, fused=True))
        assert isinstance(found, Tensor) and far(found, wanted) < 1e-5, name
        for a, b in zip(gradients(found.sum(), x.leaves()), gradients(wanted.sum(), exact.leaves()), strict=True):
            assert far(a, b) < 1e-5, name


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from limbeck.core.headloss import fused, kernels
number, numbers = "fp32", "*fp32"
kinds = dict(z=numbers, t=numbers, z_stride="i32", t_stride="i32", words="i32", labels="*i64", values=numbers,
    label_values=numbers, weights=numbers, label_weights=numbers, rate=number, label_rate=number, knob=number,
    scale=number, softcap=number)
for kind in ("forward_kl", "js"):
    fixed = dict(KIND=kind, LABELS=True, SUM=kind == "js", GRADIENT=True, CAPPED=True, BLOCK=fused.BLOCK)
    source = ASTSource(kernels.compare, kinds | dict.fromkeys(fixed, "constexpr"), fixed)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": fused.WARPS})
    print(kind, len(made.asm["cubin"]) > 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAVE or INTERPRETED, reason="Triton is not installed")
def test_it_compiles_without_a_device(tmp_path: Path):
    out = by_itself("-W", "ignore", "-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert out.split("\n")[:2] == ["forward_kl True", "js True"]
