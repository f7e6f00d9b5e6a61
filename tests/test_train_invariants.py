"""What the catalogue promises of the training methods, each driven through the loop on toys whose answer is known."""

import copy
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core import knobs
from limbeck.core.batches import Batches, Table, generator
from limbeck.core.errors import BadInput, Interrupted
from limbeck.core.loop import Clock, Fitted, Plan, fit
from limbeck.core.nets import Nets
from limbeck.core.state import Reservoir, average
from tests.numbers import reference

CLASSES, WIDTH, EXAMPLES = 4, 8, 240
SGD: dict[str, Any] = {"sgd": {"lr": 0.1}}
ADAM: dict[str, Any] = {"adam": {"lr": 1e-2}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Mlp(nn.Module):
    """Blobs to classes, with batch norm in the middle when asked for."""

    def __init__(self, hidden: int = 8, norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, hidden)
        self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Any]:
        emb = self.norm(self.body(x)).relu()
        return {"logits": self.head(emb), "emb": emb, "feats": [emb]}


def blobs(seed: int = 0, classes: tuple[int, ...] = (0, 1, 2, 3)) -> Table:
    """Points around a centre a class; `domain` splits them unevenly over two clients."""
    g = torch.Generator().manual_seed(seed)
    centres = 2.5 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7))
    labels = torch.tensor(classes)[torch.randint(len(classes), (EXAMPLES,), generator=g)]
    inputs = centres[labels] + torch.randn(EXAMPLES, WIDTH, generator=g)
    often = torch.rand(EXAMPLES, generator=g) < 0.9
    domain = torch.where(often, labels // 2, 1 - labels // 2)
    return Table({"inputs": inputs, "labels": labels, "domain": domain})


def batches(size: int = 24, **options: Any) -> Batches:
    return Batches(blobs(**options), size, seed=1)


def tasks() -> dict[str, Batches]:
    return {f"task{k}": batches(seed=k, classes=c) for k, c in enumerate(((0, 1), (2, 3)))}


_TEACHER: list[Mlp] = []


def teacher() -> Mlp:
    """A copy of a network that knows the blobs."""
    if not _TEACHER:
        with torch.random.fork_rng():  # the first call leaves the random state as every other does
            net = Mlp(32)
        fit(knobs.make("distill", {"match": ("ce",)}), Nets(student=net), batches(), Plan(80, optimizer=ADAM))
        _TEACHER.append(net)
    return copy.deepcopy(_TEACHER[0])


def accuracy(net: nn.Module, classes: tuple[int, ...] = (0, 1, 2, 3)) -> float:
    table = blobs(99, classes)
    net.eval()
    with torch.no_grad():
        return (net(table["inputs"])["logits"].argmax(-1) == table["labels"]).double().mean().item()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def close(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def run(name: str, given: dict[str, Any], nets: Nets, data: Any = None, **plan: Any) -> Fitted:
    options = {"steps": 6, "optimizer": SGD, "optimizers": {}, "log_every": 1} | plan
    return fit(knobs.make(name, given), nets, batches() if data is None else data, Plan(**options))


def turns(fitted: Fitted) -> list[tuple[int, str]]:
    return [(stage, player) for stage, _, player, _ in fitted.turns]


def tensors(named: dict[str, Any]) -> dict[str, Tensor]:
    return {k: torch.tensor(v, dtype=torch.long if k.endswith("ids") else torch.float64) for k, v in named.items()}


def kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax p || softmax q), by torch's own means."""
    return F.kl_div(
        F.log_softmax(q / temperature, -1), F.log_softmax(p / temperature, -1), reduction="none", log_target=True
    ).sum(-1)


# ---------------------------------------------------------------- takd
def chain(norm: bool = False) -> Nets:
    torch.manual_seed(3)
    return Nets(teacher=teacher(), student=Mlp(4, norm), assistants=nn.ModuleList([Mlp(16, norm), Mlp(8, norm)]))


def test_takd_trains_link_after_link_and_only_the_learner_of_each():
    nets = chain(norm=True)
    seen: list[tuple[str, dict[str, dict[str, Tensor]]]] = []

    class Watch:
        method = knobs.make("takd", {"match": ("ce", "kd", "fitnets")})
        setup, stages = method.setup, method.stages

        def step(self, nets: Nets, batch: Any, clock: Clock) -> Any:
            before = {p: weights(nets.find(p)) for p in everyone}  # batch norm moves while losses are computed
            for player, parts in self.method.step(nets, batch, clock):
                yield player, parts
                after = {p: weights(nets.find(p)) for p in everyone}
                moved = {p for p in everyone if any(not torch.equal(before[p][k], after[p][k]) for k in after[p])}
                seen.append((player, moved))

    everyone = ["teacher", "assistants.0", "assistants.1", "student", "losses.link0", "losses.link1", "losses.link2"]
    fit(Watch(), nets, batches(), Plan(2, optimizer=SGD, log_every=1))
    assert seen == [
        (p, {p, f"losses.link{k}"}) for k, p in enumerate(["assistants.0", "assistants.1", "student"]) for _ in (0, 1)
    ]


def test_takd_links_have_losses_of_their_own_and_each_learns_from_its_predecessor():
    nets = chain()
    links = (("ce",), ({"kd": {"temperature": 2.0}},), ({"kd": {"temperature": 8.0}},))
    start = {p: copy.deepcopy(nets.find(p)) for p in ("assistants.0", "assistants.1", "student")}
    run("takd", {"links": links}, nets, steps=3)
    losses: list[Callable[[Tensor, dict[str, Tensor]], Tensor]] = [
        lambda z, b: F.cross_entropy(z, b["labels"]),
        lambda z, b: 4 * kl(nets.assistants[0](b["inputs"])["logits"].detach(), z, 2.0).mean(),
        lambda z, b: 64 * kl(nets.assistants[1](b["inputs"])["logits"].detach(), z, 8.0).mean(),
    ]
    stream = batches()
    for (player, net), loss in zip(start.items(), losses, strict=True):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(3):
            batch = next(stream)
            optimizer.zero_grad()
            loss(net(batch["inputs"])["logits"], batch).backward()
            optimizer.step()
        assert close(nets.find(player), net), player


def test_takd_without_assistants_is_plain_distillation():
    ends = []
    for name in ("takd", "distill"):
        torch.manual_seed(3)
        nets = Nets(teacher=teacher(), student=Mlp(4))
        run(name, {"match": ({"ce": 0.1}, {"kd": {"weight": 0.9, "temperature": 4.0}})}, nets)
        ends.append(nets.student)
    assert same(*ends)


def test_takd_with_lambda_0_learns_from_labels_alone():
    ends = []
    for name, match in (("takd", ({"ce": 1.0}, {"kd": {"weight": 0.0}})), ("distill", ("ce",))):
        torch.manual_seed(3)
        nets = Nets(teacher=teacher(), student=Mlp(4))
        run(name, {"match": match}, nets)
        ends.append(nets.student)
    assert same(*ends)


def test_takd_builds_assistants_and_refuses_links_that_do_not_fit():
    nets = Nets(teacher=teacher(), student=Mlp(4))
    nets.factories["assistant"] = lambda: Mlp(8)
    fitted = run("takd", {"assistants": 2}, nets, steps=1)
    assert turns(fitted) == [(0, "assistants.0"), (1, "assistants.1"), (2, "student")]
    with pytest.raises(BadInput, match="for each of the 3 links, got 1"):
        run("takd", {"links": (("ce",),)}, chain(), steps=1)


def test_takd_improves_on_its_start():
    nets = chain()
    before = accuracy(nets.student)
    run("takd", {}, nets, steps=60, optimizer=ADAM)
    assert accuracy(nets.student) > max(0.85, before + 0.3)


# ---------------------------------------------------------------- ban
def test_ban_starts_every_generation_anew_and_keeps_the_past_ones():
    nets = Nets(teacher=teacher(), student=Mlp(8))
    starts: list[dict[str, Tensor]] = []
    method = knobs.make("ban", {"generations": 3})

    class Watch:
        setup, stages = method.setup, method.stages

        def step(self, nets: Nets, batch: Any, clock: Clock) -> Any:
            if clock.t == 0:
                starts.append(weights(nets.student))
                assert len(nets.generations) == clock.stage
                assert not any(p.requires_grad for p in nets.generations.parameters())
            yield from method.step(nets, batch, clock)

    fitted = fit(Watch(), nets, batches(), Plan(40, optimizer=ADAM, log_every=1))
    assert turns(fitted) == [(g, "student") for g in range(3) for _ in range(40)]
    for i, a in enumerate(starts):
        for b in starts[:i]:
            assert not torch.equal(a["body.weight"], b["body.weight"])
    members = [*nets.generations, nets.student]
    assert all(accuracy(m) > 0.85 for m in members)
    table = blobs(99)
    with torch.no_grad():
        wanted = torch.stack([m(table["inputs"])["logits"].softmax(-1) for m in members]).mean(0)
        found = method.ensemble(nets)(table["inputs"])["logits"].exp()
    assert torch.allclose(found, wanted, atol=1e-6)


def test_ban_learns_from_the_generation_before():
    method = knobs.make("ban", {"generations": 3, "match": ("kd",)})

    class Watch:
        setup, stages = method.setup, method.stages

        def step(self, nets: Nets, batch: Any, clock: Clock) -> Any:
            taught = nets.generations[-1] if clock.stage else nets.teacher
            for player, parts in method.step(nets, batch, clock):
                wanted = 16 * kl(taught(batch["inputs"])["logits"], nets.student(batch["inputs"])["logits"], 4.0).mean()
                assert float(parts["kd"]) == pytest.approx(wanted.item(), rel=1e-5)
                yield player, parts

    fit(Watch(), Nets(teacher=teacher(), student=Mlp(8)), batches(), Plan(2, optimizer=SGD))


def test_ban_without_a_teacher_begins_with_the_labels():
    nets = Nets(student=Mlp(8))
    nets.factories["student"] = lambda: Mlp(8)
    fitted = run("ban", {"generations": 1}, nets, steps=2)
    assert [sorted(parts) for *_, parts in fitted.turns] == [["ce"], ["ce"], ["kd"], ["kd"]]


def test_ban_has_no_gradient_where_student_and_teacher_agree():
    nets = Nets(teacher=teacher(), student=teacher())
    before = weights(nets.student)
    fitted = run("ban", {"generations": 1}, nets, steps=1)
    assert fitted.turns[0][3]["kd"] == pytest.approx(0, abs=1e-7)
    assert all(torch.allclose(v, before[k], atol=1e-6) for k, v in nets.student.state_dict().items())


def test_cwtm_weighs_by_confidence_and_an_even_teacher_gives_cross_entropy():
    from limbeck.losses.logits.cwtm import cwtm

    student, taught, labels = torch.randn(6, CLASSES), torch.randn(6, CLASSES), torch.arange(6) % CLASSES
    even = torch.eye(CLASSES)[torch.arange(6) % CLASSES]
    assert torch.allclose(cwtm(student, even, labels), F.cross_entropy(student, labels))
    assert torch.allclose(cwtm(torch.zeros(6, CLASSES), taught, labels), torch.tensor(math.log(CLASSES)))  # sum to 1
    sure = torch.zeros(6, CLASSES)
    sure[2, 0] = 50.0
    first = F.cross_entropy(student, labels, reduction="none")
    wanted = (first[2] + (first.sum() - first[2]) / CLASSES) / (1 + 5 / CLASSES)
    assert torch.allclose(cwtm(student, sure, labels), wanted)
    mask = torch.arange(6) < 4
    wanted = cwtm(student[:4], taught[:4], labels[:4])
    assert torch.allclose(cwtm(student, taught, labels, mask), wanted)
    student[4:], taught[4:] = torch.nan, torch.inf  # where nothing counts anything may stand
    (grad,) = torch.autograd.grad(cwtm(student.requires_grad_(), taught, labels, mask), student)
    assert torch.allclose(cwtm(student, taught, labels, mask), wanted) and not grad[4:].any()


def test_dkpp_keeps_the_likeliest_class_and_all_probabilities():
    from limbeck.losses.logits.dkpp import dkpp, shuffled

    logp = torch.randn(500, 5).log_softmax(-1)
    mixed = shuffled(logp)
    assert torch.equal(mixed.argmax(-1), logp.argmax(-1))
    assert torch.equal(mixed.sort(-1).values, logp.sort(-1).values)
    moved = (mixed != logp).double().mean(0)
    assert (moved - 0.75 * 0.8).abs().max() < 0.1  # 4 of 5 places shuffle, and 3 of 4 draws move an entry
    student = torch.randn(500, 2)
    assert torch.allclose(dkpp(student, logp[:, :2]), kl(logp[:, :2], student), atol=1e-6)


@pytest.mark.parametrize("match", [("cwtm",), ("dkpp",), ("ce", {"kd": {"temperature": 1.0}})])
def test_ban_can_do_its_ablations(match: tuple[Any, ...]):
    nets = Nets(teacher=teacher(), student=Mlp(8))
    run("ban", {"generations": 1, "match": match}, nets, steps=60, optimizer=ADAM)
    assert accuracy(nets.student) > 0.85


def test_ban_taps_follow_the_generations():
    from limbeck.core.taps import Taps

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x).relu())
            return out

    nets = Nets(student=Plain())
    nets.taps["student"] = Taps(nets.student, {"feats": ["body"]})
    fitted = run("ban", {"generations": 2, "match": ("kd", "fitnets")}, nets, steps=2)
    assert [sorted(parts) for *_, parts in fitted.turns[2:]] == [["fitnets", "kd"]] * 4
    for taps in nets.taps.values():
        taps.remove()
    assert not any(m._forward_hooks for net in (nets.student, *nets.generations) for m in net.modules())


# ---------------------------------------------------------------- dml
def test_dml_is_algorithm_1_of_the_paper():
    torch.manual_seed(3)
    nets = Nets(peers=nn.ModuleList([Mlp(4), Mlp(6), Mlp(8)]))
    mine = copy.deepcopy(nets.peers)
    fitted = run("dml", {}, nets, steps=3)
    assert turns(fitted) == [(0, f"peers.{k}") for _ in range(3) for k in range(3)]
    optimizers = [torch.optim.SGD(p.parameters(), 0.1) for p in mine]
    stream = batches()
    for _ in range(3):
        batch = next(stream)
        for k, optimizer in enumerate(optimizers):
            z = [peer(batch["inputs"])["logits"] for peer in mine]
            others = sum(kl(z[j].detach(), z[k]).mean() for j in range(3) if j != k) / 2
            optimizer.zero_grad()
            (F.cross_entropy(z[k], batch["labels"]) + others).backward()
            optimizer.step()
    assert all(close(a, b) for a, b in zip(nets.peers, mine, strict=True))


@pytest.mark.parametrize("name", ["dml", "bd_kd", "kdcl"])
def test_peers_that_tell_other_classes_apart_are_refused(name: str):
    other = Mlp(6)
    other.head = nn.Linear(6, CLASSES + 3)
    nets = Nets(peers=nn.ModuleList([Mlp(6), other]))
    told = f"but peers.0 has {CLASSES} classes and peers.1 has {CLASSES + 3} classes"
    with pytest.raises(BadInput, match=told):
        knobs.make(name, {}).setup(nets, next(batches()))


def test_dml_of_one_peer_is_plain_cross_entropy():
    ends = []
    for name, roles in (("dml", "peers"), ("distill", "student")):
        torch.manual_seed(3)
        net = Mlp(4)
        nets = Nets(**{roles: nn.ModuleList([net]) if roles == "peers" else net})
        fitted = run(name, {} if name == "dml" else {"match": ("ce",)}, nets)
        assert set(fitted.turns[0][3]) == {"ce"}
        ends.append(net)
    assert close(*ends)


@pytest.mark.parametrize("given", [True, False])
def test_dml_builds_the_first_as_the_student_and_only_the_others_as_peers(given: bool):
    torch.manual_seed(3)
    expected = [Mlp(4), *(Mlp(6 if given else 4) for _ in range(2))]
    nets = Nets()
    nets.factories = {"student": lambda: Mlp(4)} | ({"peer": lambda: Mlp(6)} if given else {})
    torch.manual_seed(3)
    knobs.make("dml", {"peers": 3}).setup(nets, next(batches()))
    assert all(same(a, b) for a, b in zip(nets.peers, expected, strict=True))


def test_dml_peers_that_agree_have_nothing_to_say_and_are_no_part_of_the_graph():
    one = Mlp(4)
    nets = Nets(peers=nn.ModuleList([one, copy.deepcopy(one)]))
    (player, parts), *_ = list(knobs.make("dml").step(nets, next(batches()), Clock(0, 1)))
    assert player == "peers.0" and float(parts["kl"]) == pytest.approx(0, abs=1e-7)
    parts["kl"].value.backward()
    assert all(p.grad is None for p in nets.peers[1].parameters())


def test_dml_takes_unlabelled_examples_into_the_kl_alone():
    torch.manual_seed(3)
    nets = Nets(peers=nn.ModuleList([Mlp(4), Mlp(4)]))
    batch = next(batches())
    marked = {**batch, "labels": torch.where(torch.arange(24) < 12, batch["labels"], -100)}
    method = knobs.make("dml")
    _, parts = next(method.step(nets, marked, Clock(0, 1)))
    _, half = next(method.step(nets, {k: v[:12] for k, v in batch.items()}, Clock(0, 1)))
    _, whole = next(method.step(nets, batch, Clock(0, 1)))
    assert float(parts["ce"]) == pytest.approx(float(half["ce"]), rel=1e-6)
    assert float(parts["kl"]) == pytest.approx(float(whole["kl"]), rel=1e-6)


# ---------------------------------------------------------------- dafl
def test_dafl_losses_are_those_of_the_authors_code():
    wanted = reference("dafl")
    given = {k: v.requires_grad_() for k, v in tensors(wanted["inputs"]).items()}
    method = knobs.make("dafl")
    parts = method.realism({"logits": given["teacher_logits"], "emb": given["teacher_emb"]})
    for name, value in wanted["parts"].items():
        assert parts[name].item() == pytest.approx(value, rel=1e-9), name
    grads = torch.autograd.grad(sum(parts.values()), [given["teacher_logits"], given["teacher_emb"]])
    for name, grad in zip(("teacher_logits", "teacher_emb"), grads, strict=True):
        assert torch.allclose(grad, tensors(wanted["grad"])[name], rtol=1e-7, atol=1e-12), name
    from limbeck.losses.logits.kd import kd

    loss = kd(given["student_logits"], given["teacher_logits"], temperature=method.temperature).mean()
    assert loss.item() == pytest.approx(wanted["student"], rel=1e-9)
    (grad,) = torch.autograd.grad(loss, given["student_logits"])
    assert torch.allclose(grad, torch.tensor(wanted["student_grad"], dtype=torch.float64), rtol=1e-7, atol=1e-12)


def test_dafl_entropy_is_least_for_even_classes_and_activation_is_minus_the_mean():
    method = knobs.make("dafl", {"entropy": 1.0, "activation": 1.0})
    even = method.realism({"logits": 50 * torch.eye(CLASSES), "emb": torch.tensor([[1.0, -3.0]])})
    assert float(even["entropy"]) == pytest.approx(-math.log10(CLASSES), rel=1e-6)
    assert float(even["activation"]) == pytest.approx(-2.0)
    uneven = method.realism({"logits": 50 * torch.eye(CLASSES)[[0, 0, 1, 2]], "emb": torch.ones(1, 1)})
    assert float(uneven["entropy"]) > float(even["entropy"])
    certain = method.realism({"logits": 1e4 * torch.eye(CLASSES)[[0, 0]], "emb": torch.ones(1, 1)})
    assert all(torch.isfinite(v) for v in certain.values())


def painter(latent: int) -> nn.Module:
    return nn.Sequential(nn.Linear(latent, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, WIDTH))


def test_dafl_teaches_without_looking_at_the_data():
    torch.manual_seed(3)
    taught = teacher()
    nets = Nets(teacher=taught, student=Mlp(8), generator=painter(6))
    still = weights(nets.teacher)
    nothing = Batches(Table({"inputs": torch.zeros(EXAMPLES, 1)}), 24)
    speeds = {"generator": ADAM, "student": ADAM}
    fitted = run("dafl", {"latent": 6}, nets, nothing, steps=150, optimizers=speeds)
    assert turns(fitted)[:4] == [(0, "generator"), (0, "student")] * 2
    assert accuracy(nets.student) > 0.8
    assert all(torch.equal(v, still[k]) for k, v in nets.teacher.state_dict().items())
    with pytest.raises(BadInput, match=r"the generator does not read codes \(`latent`\) of 5 numbers"):
        run("dafl", {"latent": 5}, nets, nothing)


def test_dafl_student_sees_detached_pictures():
    nets = Nets(teacher=teacher(), student=Mlp(8), generator=painter(6))
    players = dict(knobs.make("dafl", {"latent": 6}).step(nets, next(batches()), Clock(0, 1)))
    players["student"].value.backward()
    assert all(p.grad is None for p in nets.generator.parameters())
    assert any(p.grad is not None for p in nets.student.parameters())


# ---------------------------------------------------------------- gkd
VOCABULARY = 8


class Speaker(nn.Module):
    """A small recurrent language model over 8 tokens: [B, T] -> [B, T, 8]."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.body = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embed(tokens))[0])
        return out


def texts(length: int = 8, mask: bool = False) -> Table:
    g = torch.Generator().manual_seed(5)
    following = torch.softmax(2 * torch.randn(VOCABULARY, VOCABULARY, generator=g), -1)
    rows = [torch.randint(VOCABULARY, (EXAMPLES,), generator=g)]
    for _ in range(length):
        rows.append(torch.multinomial(following[rows[-1]], 1, generator=g)[:, 0])
    tokens = torch.stack(rows, 1)
    columns = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}
    if mask:
        starts = torch.randint(1, length, (EXAMPLES, 1), generator=g)
        columns["mask"] = torch.arange(1, length + 1) >= starts
    return Table(columns, "tokens")


@pytest.mark.parametrize("case", reference("gkd")["cases"], ids=lambda c: f"beta={c['beta']}")
def test_gkd_divergence_is_that_of_the_paper(case: dict[str, Any]):
    given = tensors(reference("gkd")["inputs"])
    student = given["student_logits"].requires_grad_()
    method = knobs.make("gkd", {"beta": case["beta"], "temperature": case["temperature"]})
    value = method.divergence(student, given["teacher_logits"])
    assert torch.allclose(value, torch.tensor(case["value"], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert torch.allclose(grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-7, atol=1e-10)


def test_gkd_divergence_is_symmetric_bounded_and_blind_to_shifts():
    a, b = 30 * torch.randn(50, 9), 30 * torch.randn(50, 9)
    half = knobs.make("gkd", {"beta": 0.5})
    assert torch.allclose(half.divergence(a, b), half.divergence(b, a), atol=1e-6)
    assert half.divergence(a, b).max() <= math.log(2) + 1e-6
    for beta in (0.0, 0.2, 0.5, 1.0):
        shifted = knobs.make("gkd", {"beta": beta}).divergence(a, a + torch.randn(50, 1))
        assert shifted.abs().max() < 1e-5
        assert shifted.min() >= 0


def test_gkd_with_lambda_0_is_supervised_and_exact_in_halves():
    ends = []
    plans = [("gkd", 24, 1), ("gkd", 12, 2), ("distill", 24, 1)]
    for name, size, accumulate in plans:
        torch.manual_seed(3)
        nets = Nets(teacher=Speaker(16).double(), student=Speaker().double())
        given = {"on_policy": 0.0, "beta": 0.0} if name == "gkd" else {"match": ("forward_kl",)}
        run(name, given, nets, Batches(texts(mask=True), size, seed=1), steps=3, accumulate=accumulate)
        ends.append(nets.student)
    assert close(ends[0], ends[1]) and close(ends[0], ends[2])


def test_gkd_writes_on_from_the_prompts_and_counts_only_what_it_wrote():
    nets = Nets(teacher=Speaker(16), student=Speaker())
    batch = next(Batches(texts(mask=True), 24, seed=1))
    method = knobs.make("gkd", {"on_policy": 1.0})
    new = method.rollout(nets, batch)
    assert torch.equal(new["inputs"][:, 1:], new["labels"][:, :-1])
    prompt = torch.arange(8) < method.starts(batch)[:, None]
    assert torch.equal(new["inputs"][prompt], batch["inputs"][prompt])
    assert not torch.equal(new["inputs"], batch["inputs"])
    assert torch.equal(new["mask"], batch["mask"])
    unmasked = {k: v for k, v in batch.items() if k != "mask"}
    assert method.rollout(nets, unmasked)["mask"].all()
    fixed = knobs.make("gkd", {"on_policy": 1.0, "prompt": 3})
    assert fixed.rollout(nets, unmasked)["mask"].sum(1).eq(6).all()  # tokens 4 to 9 of 9
    assert next(fixed.step(nets, unmasked, Clock(0, 1)))[1].count == 24 * 6
    later = torch.where(method.starts(batch) > 3, method.starts(batch), 3)
    supervised = knobs.make("gkd", {"on_policy": 0.0, "prompt": 3})
    for given in (fixed, supervised):
        assert torch.equal(given.starts(batch), later)
        assert next(given.step(nets, batch, Clock(0, 1)))[1].count == (9 - later).sum()


def test_gkd_does_not_count_what_comes_after_the_end():
    nets = Nets(teacher=Speaker(16), student=Speaker())
    batch = next(Batches(texts(), 24, seed=1))
    new = knobs.make("gkd", {"end": 0, "prompt": 2}).rollout(nets, batch)
    assert not new["mask"].all()
    tokens = torch.cat([new["inputs"], new["labels"][:, -1:]], 1)
    for row, mask in zip(tokens.tolist(), new["mask"].tolist(), strict=True):
        ends = [i for i in range(2, 9) if row[i] == 0]
        last = ends[0] if ends else 8
        assert mask == [2 <= i <= last for i in range(1, 9)]


def test_gkd_brings_the_student_to_the_teacher():
    table = texts()
    expert = Speaker(16)
    fit(knobs.make("distill", {"match": ("ce",)}), Nets(student=expert), Batches(table, 24), Plan(60, optimizer=ADAM))
    for given in ({"on_policy": 1.0, "beta": 1.0}, {"on_policy": 0.5, "beta": 0.5}):
        torch.manual_seed(3)
        nets = Nets(teacher=copy.deepcopy(expert), student=Speaker())
        fitted = run("gkd", given, nets, Batches(table, 24), steps=50, optimizer=ADAM)
        losses = [next(iter(parts.values())) for *_, parts in fitted.turns]
        assert sum(losses[-5:]) < 0.4 * sum(losses[:5]), given


# ---------------------------------------------------------------- fedftg
def test_fedftg_without_repairs_is_federated_averaging():
    torch.manual_seed(3)
    nets = Nets(student=Mlp(8))
    server = copy.deepcopy(nets.student)
    fitted = run("fedftg", {"clients": 2, "server": 0, "local": 2}, nets, steps=4, optimizers={"clients": SGD})
    assert turns(fitted) == [(0, f"clients.{k}") for _ in range(4) for k in range(2)]
    stream, counts = batches(), torch.zeros(2)
    for _ in range(2):
        clients = [copy.deepcopy(server) for _ in range(2)]
        for batch in (next(stream), next(stream)):
            for k, client in enumerate(clients):
                own = batch["domain"] == k
                counts[k] += own.sum()
                loss = F.cross_entropy(client(batch["inputs"][own])["logits"], batch["labels"][own])
                for p, g in zip(client.parameters(), torch.autograd.grad(loss, list(client.parameters())), strict=True):
                    p.data -= 0.1 * g
        share = counts / counts.sum()
        with torch.no_grad():
            for mine, *theirs in zip(server.parameters(), *(c.parameters() for c in clients), strict=True):
                mine.copy_(sum(s * t for s, t in zip(share, theirs, strict=True)))
    assert close(nets.student, server)


def test_fedftg_repairs_by_what_clients_know_of_each_class():
    torch.manual_seed(3)
    nets = Nets(student=Mlp(8, norm=True), generator=painter(6 + CLASSES))
    method = knobs.make("fedftg", {"clients": 2, "latent": 6, "local": 2, "server": 1, "tuning": 2})
    fitted = fit(method, nets, batches(), Plan(2, optimizer=SGD, log_every=1))
    players = [p for _, p in turns(fitted)]
    assert players == ["clients.0", "clients.1"] * 2 + ["generator", "student", "student"]
    assert nets.federation.counts.sum() == 48
    assert torch.allclose(nets.federation.knowledge.sum(0), torch.ones(CLASSES))
    weight = nets.federation.counts.sum(1) / 48
    mean = sum(w * c.norm.running_mean for w, c in zip(weight, nets.clients, strict=True))
    assert torch.allclose(nets.student.norm.running_mean, mean, atol=1e-6)  # the repair left the statistics alone
    for client in nets.clients:
        client.load_state_dict(nets.student.state_dict())
    for net in (nets.student, *nets.clients):
        net.eval()
    x, y = torch.randn(5, WIDTH), torch.tensor([0, 1, 2, 3, 0])
    loss, joint = method.discrepancy(nets, x, y)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(joint.exp(), nets.student(x)["logits"].softmax(-1), atol=1e-5)


def test_fedftg_discrepancy_by_hand():
    nets = Nets(student=Mlp(8), generator=painter(6 + CLASSES), clients=nn.ModuleList([Mlp(4), Mlp(4)]))
    method = knobs.make("fedftg", {"clients": 2, "latent": 6})
    method.setup(nets, next(batches()))
    nets.federation.counts.copy_(torch.tensor([[3.0, 0.0, 1.0, 2.0], [1.0, 5.0, 1.0, 0.0]]))
    x, y = torch.randn(4, WIDTH), torch.tensor([0, 1, 2, 3])
    w, one, two = nets.student(x)["logits"], nets.clients[0](x)["logits"], nets.clients[1](x)["logits"]
    a = torch.tensor([0.75, 0.0, 0.5, 1.0])
    loss, joint = method.discrepancy(nets, x, y)
    assert torch.allclose(loss, (a * kl(w, one) + (1 - a) * kl(w, two)).mean(), atol=1e-6)
    assert torch.allclose(joint.exp(), a[:, None] * one.softmax(-1) + (1 - a)[:, None] * two.softmax(-1), atol=1e-6)
    z = torch.randn(4, 6)
    parts = method.hardness(nets, z, x, y)
    assert torch.allclose(parts["hard"], -loss)
    assert torch.allclose(parts["diversity"], torch.exp(-(torch.cdist(x, x) * torch.cdist(z, z)).mean()), atol=1e-6)


def test_fedftg_gives_the_server_what_no_client_has():
    torch.manual_seed(3)
    nets = Nets(student=Mlp(8), generator=painter(6 + CLASSES))
    before = accuracy(nets.student)
    fast = {"clients": SGD, "generator": ADAM, "student": {"sgd": {"lr": 0.01}}}
    run("fedftg", {"clients": 2, "latent": 6, "local": 5, "server": 2, "tuning": 2}, nets, steps=60, optimizers=fast)
    assert accuracy(nets.student) > max(0.85, before + 0.3)


def test_fedftg_skips_clients_without_data_and_refuses_unknown_ones():
    nets = Nets(student=Mlp(8))
    nobody = {**next(batches()), "domain": torch.zeros(24, dtype=torch.long)}
    method = knobs.make("fedftg", {"clients": 2, "server": 0})
    method.setup(nets, nobody)
    assert [p for p, _ in method.step(nets, nobody, Clock(0, 10))] == ["clients.0"]
    with pytest.raises(BadInput, match=r"`domain` must be in \[0, 2\), the clients, got 2"):
        method.setup(nets, {**nobody, "domain": torch.full((24,), 2)})


def test_fedftg_shares_out_data_that_belong_to_nobody():
    nets = Nets(student=Mlp(8))
    free = {k: v for k, v in next(batches(240)).items() if k != "domain"}
    method = knobs.make("fedftg", {"clients": 3, "alpha": 0.5, "server": 0})
    method.setup(nets, free)
    found = {p: parts.count for p, parts in method.step(nets, free, Clock(0, 10))}
    assert sum(found.values()) == 240 and set(found) <= {f"clients.{k}" for k in range(3)}
    for c in range(CLASSES):
        per_class = nets.federation.knowledge[:, c]
        assert (per_class - nets.federation.shares[c]).abs().max() < 4 * 0.5 / 50**0.5
    with pytest.raises(BadInput, match=r"does not read noise and class \(`latent` \+ C\) of 9 numbers"):
        made = Nets(student=Mlp(8), generator=painter(6))
        knobs.make("fedftg", {"latent": 5}).setup(made, free)
    with pytest.raises(ValueError, match="`alpha` must be > 0"):
        knobs.make("fedftg", {"alpha": 0.0})


def test_average_weighs_parameters_and_statistics():
    nets = [Mlp(4, norm=True) for _ in range(3)]
    nets[1].norm.num_batches_tracked += 7
    nets[0].norm.running_mean += 1.0
    target = Mlp(4, norm=True)
    average(target, nets[:2], torch.tensor([0.25, 0.75]))
    assert torch.allclose(target.head.weight, 0.25 * nets[0].head.weight + 0.75 * nets[1].head.weight)
    assert torch.allclose(target.norm.running_mean, torch.full((4,), 0.25))
    assert target.norm.num_batches_tracked == 7
    with pytest.raises(ValueError, match="3 networks to average but 2 weights"):
        average(target, nets, torch.tensor([0.5, 0.5]))


# ---------------------------------------------------------------- lwf
def test_lwf_first_learns_then_keeps():
    torch.manual_seed(3)
    nets = Nets(student=Mlp(8))
    fitted = run("lwf", {}, nets, tasks(), steps=3)
    assert turns(fitted) == [(task, "student") for task in range(2) for _ in range(3)]
    parts = [set(p) for *_, p in fitted.turns]
    assert parts == [{"ce"}] * 3 + [{"ce", "task0"}] * 3
    assert fitted.turns[3][3]["task0"] == pytest.approx(0, abs=1e-6)  # the student still is the teacher
    assert fitted.turns[4][3]["task0"] > 0
    assert nets.heads.of.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["lwf", "mkd_ocl"])
def test_tasks_share_out_the_classes(name: str):
    labels = torch.tensor([4, 0, 2, 1, 3, 0, 4])
    pools = knobs.make(name, {"tasks": 2}).pools(labels)
    assert {k: labels[v].tolist() for k, v in pools.items()} == {"task0": [0, 2, 1, 0], "task1": [4, 3, 4]}
    with pytest.raises(BadInput, match="5 classes cannot be shared out over 6 tasks"):
        knobs.make(name, {"tasks": 6}).pools(labels)


def test_lwf_by_hand():
    torch.manual_seed(3)
    nets = Nets(student=Mlp(8))
    mine = copy.deepcopy(nets.student)
    run("lwf", {"weight": 0.7}, nets, tasks(), steps=3, optimizers={"student": SGD})
    old, pools = None, tasks()
    for task in range(2):
        new = [2 * task, 2 * task + 1]
        for _ in range(3):
            batch = next(pools[f"task{task}"])
            z = mine(batch["inputs"])["logits"]
            loss = F.cross_entropy(z[:, new], batch["labels"] - 2 * task)
            if old is not None:
                loss = loss + 0.7 * kl(old(batch["inputs"])["logits"][:, :2].detach(), z[:, :2], 2.0).mean()
            for p, g in zip(mine.parameters(), torch.autograd.grad(loss, list(mine.parameters())), strict=True):
                p.data -= 0.1 * g
        old = copy.deepcopy(mine)
    assert close(nets.student, mine)


def test_lwf_forgets_less_than_fine_tuning():
    old, new = blobs(99, (0, 1)), blobs(99, (2, 3))
    drift: dict[float, list[float]] = {0.0: [], 1.0: []}
    right: dict[float, list[float]] = {0.0: [], 1.0: []}
    for seed in range(3):
        for weight in drift:
            torch.manual_seed(seed)
            nets = Nets(student=Mlp(4))
            run("lwf", {"weight": weight}, nets, tasks(), steps=100, optimizer={"adam": {"lr": 0.03}})
            nets.student.eval()
            with torch.no_grad():
                before, now = (net(new["inputs"])["logits"][:, :2] for net in (nets.teacher, nets.student))
                found = nets.student(old["inputs"])["logits"][:, :2].argmax(-1)
            drift[weight].append(kl(before, now).mean().item())
            right[weight].append((found == old["labels"]).double().mean().item())
            with torch.no_grad():
                learned = nets.student(new["inputs"])["logits"][:, 2:].argmax(-1) + 2
            assert (learned == new["labels"]).double().mean() > 0.95
    assert all(kept < 0.05 * lost for kept, lost in zip(drift[1.0], drift[0.0], strict=True))
    assert min(right[1.0]) > 0.99 > sum(right[0.0]) / 3  # on the old classes, of which it has seen nothing since


# ---------------------------------------------------------------- mkd_ocl
def test_mkd_ocl_without_weight_is_replay_and_its_teacher_follows():
    torch.manual_seed(3)
    nets = Nets(student=Mlp(8))
    fitted = run("mkd_ocl", {"weight": 0.0, "rate": 0.25, "memory": 10, "replay": 4}, nets, tasks(), steps=3)
    assert all(p["momentum"] == 0 for *_, p in fitted.turns)
    torch.manual_seed(3)
    mine = Mlp(8)
    average_of = copy.deepcopy(mine)
    memory = Reservoir(10, {"inputs": torch.zeros(1, WIDTH), "labels": torch.zeros(1, dtype=torch.long)})
    torch.manual_seed(generator("training", 0).initial_seed())  # as the loop does
    pools = tasks()
    for task in range(2):
        for _ in range(3):
            batch = next(pools[f"task{task}"])
            old = memory.draw(4)
            memory.add(batch)
            x, y = (torch.cat([old[k], batch[k]]) for k in ("inputs", "labels"))
            loss = F.cross_entropy(mine(x)["logits"], y)
            for p, g in zip(mine.parameters(), torch.autograd.grad(loss, list(mine.parameters())), strict=True):
                p.data -= 0.1 * g
            for a, p in zip(average_of.parameters(), mine.parameters(), strict=True):
                a.data.copy_(0.75 * a + 0.25 * p)
    assert close(nets.student, mine)
    assert close(nets.momentum, average_of)
    assert not any(p.requires_grad for p in nets.momentum.parameters())


def test_mkd_ocl_takes_the_mean_over_both_views():
    nets = Nets(student=Mlp(8))
    method = knobs.make("mkd_ocl", {"weight": 3.0, "temperature": 2.0})
    batch = next(batches())
    method.setup(nets, batch)
    nets.momentum.load_state_dict(Mlp(8).state_dict())
    ((_, parts),) = method.step(nets, batch, Clock(0, 1))
    far = 4 * kl(nets.momentum(batch["inputs"])["logits"], nets.student(batch["inputs"])["logits"], 2.0).mean()
    assert float(parts["momentum"]) == pytest.approx(3.0 * far.item(), rel=1e-5)  # vectors: x' = x


def test_mkd_ocl_at_rate_1_has_nothing_to_teach():
    nets = Nets(student=Mlp(8))
    fitted = run("mkd_ocl", {"rate": 1.0}, nets, tasks(), steps=4)
    assert same(nets.momentum, nets.student)
    assert all(p["momentum"] == pytest.approx(0, abs=1e-6) for *_, p in fitted.turns)


def test_mkd_ocl_shows_teacher_and_student_the_same_changed_pictures():
    class Eye(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            out: Tensor = self.net(x)
            return out

    nets = Nets(student=Eye())
    method = knobs.make("mkd_ocl")
    batch = {"inputs": torch.randn(6, 1, 8, 8), "labels": torch.arange(6) % CLASSES}
    method.setup(nets, batch)
    list(method.step(nets, batch, Clock(0, 1)))
    changed, plain = nets.student.seen
    assert torch.equal(nets.momentum.seen[-1], changed) and torch.equal(plain, batch["inputs"])
    assert not torch.equal(changed, plain)


def test_a_reservoir_is_a_fair_sample():
    hits = torch.zeros(40)
    for _ in range(400):
        memory = Reservoir(10, {"row": torch.zeros(1, dtype=torch.long)})
        for start in range(0, 40, 8):
            memory.add({"row": torch.arange(start, start + 8)})
        rows = memory.draw(99)["row"]
        assert len(rows) == 10 and len(set(rows.tolist())) == 10
        hits[rows] += 1
    # each of 40 rows is kept with probability 1/4: 100 times, give or take 4 standard deviations of 8.7
    assert hits.min() > 65 and hits.max() < 135


# ---------------------------------------------------------------- all that have stages, stopped in the middle of each
def scene(name: str) -> tuple[dict[str, Any], Nets, Any]:
    torch.manual_seed(3)
    if name == "takd":
        return {"match": ("ce", "kd", "fitnets")}, chain(norm=True), batches()
    if name == "ban":
        return {"generations": 2, "match": ("kd", "fitnets")}, Nets(student=Mlp(8, norm=True)), batches()
    if name == "fedftg":
        nets = Nets(student=Mlp(8, norm=True), generator=painter(6 + CLASSES))
        return {"clients": 2, "latent": 6, "local": 2, "server": 1, "tuning": 1}, nets, batches()
    if name == "dafl":
        return {"latent": 6}, Nets(teacher=teacher(), student=Mlp(8), generator=painter(6)), batches()
    if name == "gkd":
        return {}, Nets(teacher=Speaker(16), student=Speaker()), Batches(texts(), 24)
    if name == "dml":
        return {}, Nets(peers=nn.ModuleList([Mlp(4), Mlp(6)])), batches()
    return {}, Nets(student=Mlp(8, norm=True)), tasks()


@pytest.mark.parametrize("name", ["takd", "ban", "dml", "dafl", "gkd", "fedftg", "lwf", "mkd_ocl"])
def test_stopped_in_the_middle_of_any_stage_it_ends_with_the_same_bits(name: str, tmp_path: Path):
    plan = Plan(5, optimizer=ADAM, schedule="cosine", ema=0.9, log_every=1)

    def go(folder: str, resume: bool = False, stop: tuple[int, int] | None = None) -> Fitted:
        given, nets, data = scene(name)
        sent: list[int] = []  # a second signal would end the process at once

        def listen(event: dict[str, Any]) -> None:
            if stop == (event["stage"], event["t"]) and not sent:
                sent.append(event["t"])
                signal.raise_signal(signal.SIGTERM)

        return fit(knobs.make(name, given), nets, data, plan, folder=tmp_path / folder, resume=resume, on_event=listen)

    whole = go("whole")
    for stage in sorted({s for s, *_ in whole.turns}):
        for t in (0, 2, 4):
            folder = f"{stage}-{t}"
            with pytest.raises(Interrupted):
                go(folder, stop=(stage, t))
            again = go(folder, resume=True)
            assert again.turns == whole.turns, (stage, t)
            for role, module in whole.nets.modules.items():
                assert same(module, again.nets.modules[role]), (stage, t, role)


@pytest.mark.parametrize("name,knob,value", [
    ("takd", "assistants", -1), ("ban", "generations", 0), ("dml", "temperature", 0.0), ("dml", "weight", -1.0),
    ("dafl", "entropy", -1.0), ("dafl", "latent", 0), ("gkd", "on_policy", 1.5), ("gkd", "beta", -0.1),
    ("gkd", "prompt", 0), ("fedftg", "local", 0), ("fedftg", "label", -1.0), ("lwf", "tasks", 0),
    ("lwf", "temperature", 0.0), ("mkd_ocl", "rate", 1.1), ("mkd_ocl", "memory", 0), ("fkd", "temperature", -1.0),
])  # fmt: skip
def test_a_knob_out_of_its_range_is_refused_by_name(name: str, knob: str, value: float):
    with pytest.raises(ValueError, match=f"`{knob}` must be "):
        knobs.make(name, {knob: value})
