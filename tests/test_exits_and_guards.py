"""What the catalogue promises of encoders that are cut, of guards with few examples, and of students that search and
that trust their past."""

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.conformance.toys import CLASSES, Eye, Reader, pictures
from limbeck.core import find
from limbeck.core.batches import Batches, Table
from limbeck.core.curvature import top_eigenvalue
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Plan, fit
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import Part
from limbeck.core.searching import Past
from limbeck.core.writer import written_like
from limbeck.losses.contrast.modular_star_encoder import modular_star_encoder
from limbeck.losses.logits.kd import kd
from limbeck.losses.logits.map_kd import map_kd, precision
from limbeck.measure.retrieve.pair_recall import pair_recall
from limbeck.train.augmented.harmaug import HarmAug
from limbeck.train.self.sd_darts import SDDarts
from limbeck.zoo.darts import OPERATIONS, darts
from limbeck.zoo.pairs import PairEncoder, apart, pair_encoder
from tests.numbers import reference

F64 = torch.float64
VECTORS = Path(__file__).parent / "vectors"

pytestmark = pytest.mark.usefixtures("one_thread")


def tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=F64)


def total(parts: Any) -> Tensor:
    """The loss of a turn."""
    named = parts.values() if isinstance(parts, dict) else [parts]
    return sum((p.value if isinstance(p, Part) else p.mean() for p in named), torch.zeros(()))


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# ---------------------------------------------------------------- modular_star_encoder
BAR = 9


def encoder(exits: tuple[int, ...] = (1, 2, 3)) -> PairEncoder:
    torch.manual_seed(1)
    return pair_encoder(vocab=30, width=8, exits=exits, heads=2, length=8, dim=6, separator=BAR).double()


@pytest.fixture
def pairs() -> Tensor:
    texts = torch.randint(10, 30, (5, 9), generator=torch.Generator().manual_seed(2))
    texts[:, 4] = BAR
    texts[0, 3], texts[0, 4], texts[1, 7:] = BAR, 11, 0
    return texts


def test_one_exit_is_ordinary_contrastive_training(pairs: Tensor) -> None:
    (exit_,) = encoder((3,))(pairs)["exits"]
    q, d = F.normalize(exit_[:, 0], dim=-1), F.normalize(exit_[:, 1], dim=-1)
    own = torch.arange(5)
    wanted = (F.cross_entropy(10 * q @ d.mT, own) + F.cross_entropy(10 * d @ q.mT, own)) / 2
    assert torch.allclose(modular_star_encoder([exit_]), wanted, atol=1e-12)


def test_cutting_leaves_the_embeddings_of_the_exits_that_remain_unchanged(pairs: Tensor) -> None:
    whole = encoder()
    small = whole.cut(2)
    for mine, its in zip(small(pairs)["exits"], whole(pairs)["exits"], strict=False):
        assert torch.equal(mine, its)
    assert len(small(pairs)["exits"]) == 2
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())
    assert small.embed.weight.data_ptr() != whole.embed.weight.data_ptr()


def test_the_loss_is_linear_in_the_weights_of_the_exits(pairs: Tensor) -> None:
    exits = encoder()(pairs)["exits"]
    alone = [modular_star_encoder(exits, weights=w) for w in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))]
    mixed = modular_star_encoder(exits, weights=(0.3, 2.0, 0.7))
    assert torch.allclose(mixed, 0.3 * alone[0] + 2 * alone[1] + 0.7 * alone[2], atol=1e-12)
    assert torch.allclose(modular_star_encoder(exits), modular_star_encoder(exits, weights=(1 / 3, 2 / 3, 1.0)))


def test_a_zero_weight_takes_the_head_of_its_exit_out_of_the_gradient(pairs: Tensor) -> None:
    net = encoder()
    modular_star_encoder(net(pairs)["exits"], weights=(1.0, 0.0, 1.0)).backward()
    assert [head.weight.grad is not None for head in net.heads] == [True, False, True]
    assert net.blocks[1].up.weight.grad is not None  # a later exit reads it


def test_guidance_pulls_earlier_exits_to_the_last_which_stays(pairs: Tensor) -> None:
    exits = [e.detach().requires_grad_() for e in encoder()(pairs)["exits"]]
    plain, guided = (modular_star_encoder(exits, guidance=g) for g in (0.0, 1.0))
    pull = torch.autograd.grad(guided - plain, exits, allow_unused=True)
    assert pull[0] is not None and pull[0].abs().max() > 0
    assert pull[2] is None or pull[2].abs().max() < 1e-12
    with pytest.raises(BadInput, match="3 exits"):
        modular_star_encoder(exits, weights=(1.0, 1.0))


def test_the_two_texts_of_a_pair_do_not_see_one_another(pairs: Tensor) -> None:
    net = encoder()
    other = pairs.clone()
    other[2:, 5:] = other[2:, 5:].flip(0)
    for a, b in zip(net(pairs)["exits"], net(other)["exits"], strict=True):
        assert torch.allclose(a[:, 0], b[:, 0], atol=1e-12)
        assert not torch.allclose(a[2:, 1], b[2:, 1])
    first, second = apart(pairs, BAR)
    assert first[0].tolist() == [*pairs[0, :3].tolist(), 0, 0]
    assert second[0].tolist() == pairs[0, 4:].tolist()
    assert second[1].tolist() == [*pairs[1, 5:7].tolist(), 0, 0, 0]
    with pytest.raises(BadInput, match="row 1 of the batch holds no token 9"):
        apart(torch.tensor([[1, BAR, 2], [1, 2, 3]]), BAR)


def test_recall_counts_exits_one_by_one_and_a_collapsed_encoder_has_none() -> None:
    x = torch.eye(30, dtype=F64)
    right, wrong = torch.cat([x, x], 1), torch.cat([x, x.roll(15, 0)], 1)
    told = pair_recall(torch.stack([wrong, right], 1), top=1)
    assert told == {"recall": 0.5, "recall_first": 0.0, "recall_last": 1.0}
    assert pair_recall(torch.ones(30, 8), top=10)["recall"] == 0
    with pytest.raises(BadInput, match="side by side"):
        pair_recall(torch.ones(3, 5))


def test_the_separator_is_that_of_hashed_words() -> None:
    from limbeck.adapters.words import Hashed

    for vocab in (50, 8192):
        assert pair_encoder(vocab=vocab, width=8).separator == Hashed(vocab).encode("|")[0]


# ---------------------------------------------------------------- harmaug
def test_written_texts_consist_of_the_n_grams_of_others() -> None:
    g = torch.Generator().manual_seed(0)
    texts = torch.randint(1, 6, (12, 8), generator=g)
    for row, end in enumerate(torch.randint(2, 9, (12,), generator=g).tolist()):
        texts[row, end:] = 0
    torch.manual_seed(0)
    for order in (1, 2, 3):
        known = {g for t in texts.tolist() for g in grams([*t, 0], order)}  # what T has cut may end there
        made = written_like(texts, 60, order=order)
        assert made.shape == (60, 8) and (made[:, 0] > 0).all()
        for text in made.tolist():
            assert set(grams(text, order)) <= known
            assert 0 not in text[: len([w for w in text if w])]
    assert len({tuple(t) for t in made.tolist()} - {tuple(t) for t in texts.tolist()}) > 5


def grams(text: list[int], order: int) -> list[tuple[int, ...]]:
    """The n-grams of a text with its beginning and, unless it is cut, its end; without what is after the end."""
    words = [w for w in text if w]
    words = [-1] * (order - 1) + words + ([0] if len(words) < len(text) else [])
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def test_words_follow_as_often_as_they_do_in_the_texts() -> None:
    texts = torch.tensor([[1, 2, 0, 0]] * 3 + [[1, 3, 0, 0]])
    torch.manual_seed(0)
    seconds = Counter(written_like(texts, 4000, order=2)[:, 1].tolist())
    assert seconds[2] / 4000 == pytest.approx(0.75, abs=0.03) and set(seconds) == {2, 3}


class Fixed(nn.Module):
    """Says what it is told to say of token ids [B, T], whatever they are."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.told = nn.Parameter(logits)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.told[: len(inputs)]


def guard(student: Tensor, teacher: Tensor, labels: Tensor, **knobs: Any) -> tuple[Tensor, Nets]:
    """The loss of one step, and the networks after its backward pass."""
    method, nets = HarmAug(**knobs), Nets(teacher=Fixed(teacher), student=Fixed(student))
    batch: Batch = {"inputs": torch.arange(2, 2 + 3 * len(labels)).view(-1, 3), "labels": labels}
    method.setup(nets, batch)
    (player, parts), *_ = method.step(nets, batch, Clock(0, 1))
    assert player == "student"
    loss = total(parts)
    loss.backward()
    return loss.detach(), nets


def test_without_written_texts_it_is_the_loss_of_the_official_loop() -> None:
    told = reference("harmaug")
    student, labels, p = tensor(told["student_logits"]), torch.tensor(told["labels"]), tensor(told["unsafe"])
    loss, nets = guard(student, torch.stack([1 - p, p], 1).log(), labels, written=0)
    assert float(loss) == pytest.approx(told["value"], abs=1e-12)
    assert torch.allclose(nets.student.told.grad, tensor(told["grad"]), atol=1e-12)


def test_where_both_say_the_same_half_the_cross_entropy_is_left() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 2, dtype=F64), torch.tensor([0, 1, 1, 0, 1, 0])
    loss, _ = guard(logits, logits.clone(), labels, written=0)
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, labels)) / 2, abs=1e-12)
    plain = (F.cross_entropy(logits, labels) + kd(logits, logits.flip(0), temperature=1.0).mean()) / 2
    assert float(guard(logits, logits.flip(0), labels, written=0)[0]) == pytest.approx(float(plain), abs=1e-12)


def test_classes_that_change_places_leave_the_loss_as_it_is() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(10, 2, dtype=F64), torch.randn(10, 2, dtype=F64), torch.arange(6) % 2
    torch.manual_seed(1)
    loss, _ = guard(student, teacher, labels, written=4, positive=1)
    torch.manual_seed(1)
    turned, _ = guard(student.flip(1), teacher.flip(1), 1 - labels, written=4, positive=0)
    assert float(loss) == pytest.approx(float(turned), abs=1e-12)


def test_what_is_written_is_of_the_rare_class_and_labelled_by_the_teacher() -> None:
    torch.manual_seed(0)
    student, labels = torch.randn(10, 2, dtype=F64), torch.tensor([0, 1, 0, 0, 1, 0])
    teacher = torch.randn(10, 2, dtype=F64)
    seen: list[Tensor] = []
    method, nets = HarmAug(written=4, order=2), Nets(teacher=Fixed(teacher), student=Fixed(student))
    nets.student.register_forward_hook(lambda _m, given, _out: seen.append(given[0].clone()))
    batch = {"inputs": torch.arange(2, 20).view(6, 3), "labels": labels, "attention_mask": torch.ones(6, 3).bool()}
    method.setup(nets, batch)
    (_, parts), *_ = method.step(nets, batch, Clock(0, 1))
    rare = {tuple(batch["inputs"][i].tolist()) for i in (1, 4)}
    assert {tuple(t) for t in seen[-1][6:].tolist()} <= rare  # nothing in common, so nothing new can be put together
    every = torch.cat([labels, teacher[6:].argmax(1)])
    assert float(parts["ce"]) == pytest.approx(float(F.cross_entropy(student, every)) / 2, abs=1e-12)
    assert len(nets.kept) == 2


def test_nothing_is_written_before_the_class_has_come_and_stores_and_pictures_are_refused() -> None:
    torch.manual_seed(0)
    logits = torch.randn(10, 2, dtype=F64)
    labels = torch.zeros(6, dtype=torch.long)
    loss, nets = guard(logits, logits.clone(), labels, written=4)
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits[:6], labels)) / 2, abs=1e-12)
    assert len(nets.kept) == 0
    with pytest.raises(BadInput, match="not a store"):
        HarmAug().setup(Nets(student=Reader(4)), {"inputs": torch.ones(2, 3).long(), "labels": torch.ones(2).long()})
    with pytest.raises(BadInput, match="token ids"):
        HarmAug().setup(Nets(student=Eye(), teacher=Eye()), next(Batches(pictures(), 8)))


# ---------------------------------------------------------------- skd_map
def test_the_coefficient_is_that_of_the_official_code() -> None:
    for case in reference("skd_map")["coefficients"]:
        logits, labels = tensor(case["teacher_logits"]), torch.tensor(case["labels"])
        everyone = torch.ones_like(labels, dtype=torch.bool)
        assert float(precision(logits, labels, everyone, 10, 5)) == pytest.approx(case["map"], abs=1e-12)
        assert float(precision(logits, labels, everyone, 10, 0)) == pytest.approx(case["mrr"], abs=1e-12)


def test_it_is_one_for_a_teacher_that_is_right_and_nothing_for_one_that_never_is() -> None:
    torch.manual_seed(0)
    student, labels = torch.randn(4, 30, dtype=F64), torch.tensor([3, 8, 20, 29])
    sure = F.one_hot(labels, 30).double() * 5
    wanted = kd(student, sure, temperature=2.0).mean()
    assert torch.allclose(map_kd(student, sure, labels), wanted)
    assert map_kd(student, sure, (labels + 15) % 30, top=1) == 0
    assert map_kd(student, sure, labels, torch.zeros(4).bool()) == 0
    unknown = labels.where(torch.tensor([True, True, False, False]), -100)
    assert torch.allclose(map_kd(student, sure, unknown), wanted)


def test_the_first_hit_alone_counts_at_one_over_its_rank() -> None:
    ranked = torch.arange(20, 0, -1, dtype=F64).expand(1, 20)  # place 0 first, then 1, 2 ...
    for gold, margin, wanted in (
        (0, 0, 1.0),
        (3, 0, 1 / 4),
        (3, 2, 1 / 2),
        (12, 5, 1 / 8),
        (12, 0, 0.0),
        (4, 1, 1 / 4),
    ):
        found = precision(ranked, torch.tensor([gold]), torch.ones(1).bool(), 10, margin)
        assert float(found) == pytest.approx(wanted), (gold, margin)


def passes(knobs: dict[str, Any], teacher: bool, steps: int = 9) -> tuple[list[dict[str, float]], Nets, Any]:
    """What was logged over passes of four steps, the networks, and the start."""
    nets = Nets(student=Eye(4, seed=1), **({"teacher": Eye(4, seed=9)} if teacher else {}))
    start = copy.deepcopy(nets.student)
    done = fit(find.get("skd_map")(**knobs), nets, Batches(pictures(), 24, seed=3), Plan(steps, log_every=1))
    return [parts for _, _, _, parts in done.turns], nets, start


def test_the_student_becomes_the_teacher_after_every_pass() -> None:
    kinds: list[nn.Module] = []
    method = find.get("skd_map")(match=("ce", "kd"))
    nets = Nets(student=Eye(4, seed=1))
    ended: list[nn.Module] = []

    class Watched:
        setup, step = method.setup, method.step

        def after(self, nets: Nets, player: str, clock: Clock) -> None:
            method.after(nets, player, clock)
            kinds.append(copy.deepcopy(nets.past))
            ended.append(copy.deepcopy(nets.student))

    fit(Watched(), nets, Batches(pictures(), 24, seed=3), Plan(9, log_every=1))  # type: ignore[arg-type]
    assert same(kinds[3], ended[3]) and same(kinds[7], ended[7])
    assert all(same(kinds[t], kinds[3]) for t in (4, 5, 6)) and not same(kinds[4], ended[4])
    assert int(nets.generation.number) == 2 and all(not p.requires_grad for p in nets.past.parameters())


def test_before_the_first_pass_ends_the_given_teacher_or_nobody_teaches() -> None:
    alone, *_ = passes({"match": ("ce", "kd")}, teacher=False)
    assert ["kd" in parts for parts in alone] == [False] * 4 + [True] * 5
    taught, *_ = passes({"match": ("ce", "kd")}, teacher=True)
    assert all("kd" in parts for parts in taught)
    often, *_ = passes({"match": ("ce", "kd"), "every": 2}, teacher=False)
    assert ["kd" in parts for parts in often] == [False] * 2 + [True] * 7


def test_where_the_teacher_cannot_be_trusted_it_is_cross_entropy() -> None:
    trusted = ("ce", {"map_kd": {"margin": 0, "top": 1}})
    _, nets, start = passes({"match": trusted}, teacher=False, steps=4)
    plain = Nets(student=copy.deepcopy(start))
    fit(find.get("distill")(match=("ce",)), plain, Batches(pictures(), 24, seed=3), Plan(4))
    assert same(nets.student, plain.student)
    table = pictures()
    wrong = Table({**table.columns, "labels": torch.full_like(table["labels"], 3)}, kind="images")
    blind = Eye(4, seed=9)
    with torch.no_grad():
        blind.head.bias[0] = 1e3  # never says 3 first
    ends = []
    for match in (trusted, ("ce",)):
        nets = Nets(student=copy.deepcopy(start), teacher=copy.deepcopy(blind))
        fit(find.get("skd_map")(match=match, every=100), nets, Batches(wrong, 24, seed=3), Plan(3))
        ends.append(nets.student)
    assert same(*ends)


# ---------------------------------------------------------------- sd_darts
def supernet(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return darts(classes=CLASSES, channels=1, width=4, cells=2)


def searched(**knobs: Any) -> Nets:
    torch.manual_seed(0)
    nets = Nets(student=supernet())
    nets.factories["student"] = lambda: darts(classes=CLASSES, channels=1, width=4, cells=2)
    fit(SDDarts(**knobs), nets, Batches(pictures(), 24, seed=3), Plan(4, log_every=1))
    return nets


def test_without_weight_every_update_is_that_of_darts() -> None:
    nets = Nets(student=supernet())
    method, batch = SDDarts(weight=0, spacing=1, share=1.0), next(Batches(pictures(), 24, seed=3))
    method.setup(nets, batch)
    nets.past.keep(nets.student, nets.architecture())
    held = method.apart(batch["index"])
    assert 0 < int(held.sum()) < 24
    (first, theirs), (second, mine) = method.step(nets, batch, Clock(0, 1))
    assert (first, second) == ("architecture", "student") and list(mine) == ["ce"]
    for rows, parts in ((held, theirs), (~held, mine)):
        said = nets.student(batch["inputs"][rows], nets.architecture())["logits"]
        assert torch.allclose(total(parts), F.cross_entropy(said, batch["labels"][rows]), atol=1e-6)
    plain = searched(weight=0.0, spacing=1, share=1.0).student
    assert same(plain, searched(weight=0.0, spacing=3, teachers=1, share=1.0).student)
    assert not same(plain, searched(weight=5.0, spacing=1, share=1.0).student)


def test_the_past_says_nothing_when_it_is_the_present_and_one_teacher_is_the_vote() -> None:
    net = supernet().double().eval()
    method, batch = SDDarts(teachers=1, temperature=2.0), {"inputs": pictures()["inputs"][:6].double()}
    nets = Nets(student=net, past=Past(net, 1))
    nets.freeze("past")
    mix = torch.rand(5, len(OPERATIONS), dtype=F64).softmax(-1)
    nets.past.keep(net, mix)
    said = net(batch["inputs"], mix)["logits"]
    vote = method.vote(nets, batch)
    assert torch.allclose(vote.exp(), (said / 2).softmax(-1), atol=1e-12)
    assert method.distance(said, vote).abs().max() < 1e-12
    three = SDDarts(teachers=3, temperature=2.0)
    nets.past = Past(net, 3)
    nets.freeze("past")
    for seed in range(4):  # the fourth takes the place of the first
        nets.past.keep(net, torch.rand(5, len(OPERATIONS), generator=torch.Generator().manual_seed(seed)).double())
    each = [nets.run(f"past.nets.{k}", batch)["logits"] for k in range(3)]
    wanted = torch.stack([(z / 2).softmax(-1) for z in each]).mean(0)
    assert torch.allclose(three.vote(nets, batch).exp(), wanted, atol=1e-12)
    assert torch.allclose(
        nets.past.nets[0].chosen, torch.rand(5, len(OPERATIONS), generator=torch.Generator().manual_seed(3)).double()
    )


def test_every_node_keeps_two_edges_with_one_operation_each_and_the_rest_is_not_computed() -> None:
    net = supernet().eval()
    mix = torch.full((5, len(OPERATIONS)), 0.01)
    mix[0, 3], mix[1, 1], mix[2, 0], mix[3, 4], mix[4, 2] = 0.9, 0.2, 0.9, 0.8, 0.7
    net.choose(mix)
    wanted = torch.zeros_like(mix)
    wanted[0, 3] = wanted[1, 1] = wanted[3, 4] = wanted[4, 2] = 1.0
    assert torch.equal(net.chosen, wanted)
    x = pictures()["inputs"][:4]
    assert torch.allclose(net(x)["logits"], net(x, wanted)["logits"], atol=1e-6)
    net(x)["logits"].sum().backward()
    touched = [[any(p.grad is not None for p in op.parameters()) for op in edge] for edge in net.cells[0].edges]
    assert touched[0] == [False, False, True, False] and not any(touched[2])


def test_the_chosen_network_starts_anew_or_keeps_the_weights_of_the_supernet() -> None:
    anew, kept = searched(share=0.5, spacing=2), searched(share=1.0, spacing=2)
    for nets in (anew, kept):
        assert torch.equal(nets.student.chosen.sum(1).sort().values, tensor([0, 1, 1, 1, 1]).float())
    assert not same(anew.student, kept.student)
    with pytest.raises(BadInput, match="supernet"):
        SDDarts().setup(Nets(student=Eye()), next(Batches(pictures(), 8)))


def test_the_largest_eigenvalue_is_that_of_the_hessian() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(7, dtype=F64, requires_grad=True), torch.randn(7, 7, dtype=F64)
    loss = (w @ x).square().sum() + (x**3).sum()
    hessian = torch.autograd.functional.hessian(lambda v: (w @ v).square().sum() + (v**3).sum(), x.detach())
    wanted = torch.linalg.eigvalsh(hessian).abs().max()
    assert top_eigenvalue(loss, [x], iterations=500, tolerance=1e-12) == pytest.approx(float(wanted), rel=1e-4)
    assert top_eigenvalue(x.sum() * 2 + 0 * x.square().sum(), [x]) == 0
    nets = searched(share=1.0)
    alpha, batch = nets.architecture.alpha, next(Batches(pictures(), 24))
    said = nets.student.eval()(batch["inputs"], nets.architecture())["logits"]
    assert math.isfinite(top_eigenvalue(F.cross_entropy(said, batch["labels"]), [alpha]))
