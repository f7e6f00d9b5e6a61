"""Better data: stored and repaired labels, mixing, hard augmentations, and the choice of what is labelled."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.conformance.toys import CLASSES, Eye, pictures, seeing_teacher
from limbeck.core import find, sampler
from limbeck.core.active import Pool, choose, farthest, gains, robust, without_replacement
from limbeck.core.augment import RANDOM, Erase, RandAugment, build
from limbeck.core.batches import Batches, Table, generator
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Plan, fit
from limbeck.core.mixing import Mix, cutmix, deranged, inside, mixup, neighbours
from limbeck.core.nets import Batch, Nets
from limbeck.core.painting import repaint
from limbeck.core.sampler import Denoiser, Flow
from limbeck.core.store import Store, StoredBatches, capture, recover
from limbeck.core.warping import Affine, Autoencoder, Edit
from limbeck.losses.logits.kd import kd
from limbeck.train.augmented.cutmix_pick import deviation
from tests.numbers import reference

VECTORS = Path(__file__).parent / "vectors"
F64 = torch.float64


def tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=F64)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def batch() -> Batch:
    return next(Batches(pictures(3), 24, seed=1))


def nets(**more: nn.Module) -> Nets:
    return Nets(teacher=seeing_teacher(True), student=Eye(4, seed=1), **more)


def turn(method: Any, made: Nets, batch: Batch, clock: Clock | None = None) -> tuple[str, dict[str, float]]:
    """The first turn of a step: the player, and its parts as numbers."""
    player, parts = next(iter(method.step(made, batch, clock or Clock(0, 1))))
    parts = parts if isinstance(parts, dict) else {"loss": parts}
    return player, {name: float(part) for name, part in parts.items()}


class Hearing(nn.Module):
    """A network that keeps what it was shown."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []  # type: ignore[var-annotated]

    def forward(self, inputs: Tensor) -> Any:
        self.seen.append(inputs.detach().clone())
        return self.inner(inputs)


# ---------------------------------------------------------------- mixing
def test_boxes_and_shares_are_those_of_the_official_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in reference("cutmix_pick")["boxes"]:
        centres = iter([case["row"], case["column"]])
        monkeypatch.setattr("limbeck.core.mixing.drawn", lambda *_, lam=case["lam"]: torch.tensor([lam], dtype=F64))
        monkeypatch.setattr(torch, "randint", lambda *_, c=centres: torch.tensor([next(c)]))
        mix = cutmix(torch.zeros(4, 1, 8, 8))
        assert mix.box is not None and mix.box[0].tolist() == case["box"]
        assert mix.share.tolist() == pytest.approx([case["share"]] * 4)
        monkeypatch.undo()


def test_a_box_shows_the_partner_and_the_share_counts_its_pixels() -> None:
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 7, 9)
    mix = cutmix(x, per="example")
    out = mix.images(x)
    for i in range(6):
        assert set(out[i].unique().tolist()) <= {float(i), float(mix.partner[i])} and mix.partner[i] != i
        assert (out[i, 0] == i).double().mean() == pytest.approx(float(mix.share[i]))
    assert mix.share.unique().numel() > 1 and cutmix(x).share.unique().numel() == 1
    p = torch.eye(6, dtype=F64)
    assert torch.allclose(mix.targets(p).diagonal(), mix.share.double()) and torch.allclose(
        mix.targets(p).sum(1), torch.ones(6, dtype=F64)
    )


def test_a_share_of_1_changes_nothing_and_masked_partners_do_not_count() -> None:
    x = torch.randn(4, 1, 5, 5)
    mix = Mix(neighbours(4), torch.tensor([1.0, 1.0, 0.5, 1.0]))
    out = mix.batch({"inputs": x, "labels": torch.arange(4), "mask": torch.tensor([True, False, True, True])})
    assert torch.equal(out["inputs"][[0, 1, 3]], x[[0, 1, 3]]) and set(out) == {"inputs", "mask"}
    assert torch.allclose(out["inputs"][2], (x[2] + x[1]) / 2)
    assert out["mask"].tolist() == [True, False, False, True]


def test_shares_of_mixup_follow_the_beta_distribution() -> None:
    share = mixup(20000, alpha=0.5, per="example").share
    assert float(share.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(share.var()) == pytest.approx(1 / 8, abs=0.004)  # 1 / (4 (2 alpha + 1))
    assert all((deranged(n) != torch.arange(n)).all() for n in (2, 3, 9))


# ---------------------------------------------------------------- funmatch
def test_funmatch_is_the_reference_and_blends_as_the_code_does() -> None:
    ref, method = reference("funmatch"), find.get("funmatch")(temperature=2.0)
    assert method.loss(tensor(ref["student_logits"]), tensor(ref["teacher_logits"])).tolist() == pytest.approx(
        ref["value"], rel=1e-9
    )
    x = tensor(ref["inputs"])
    share = torch.full((4,), max(ref["u"], 1 - ref["u"]), dtype=F64)
    assert torch.allclose(Mix(neighbours(4), share).images(x), tensor(ref["blend"]), rtol=1e-12)
    shares = torch.stack([method.mix(3).share for _ in range(200)])
    assert (shares >= 0.5).all() and (shares.std(1) == 0).all() and shares.max() > 0.95 and shares.min() < 0.55


def test_funmatch_shows_both_the_same_tensor_and_is_0_for_twins(batch: Batch) -> None:
    teacher = seeing_teacher(True)
    made = Nets(teacher=Hearing(teacher), student=Hearing(copy.deepcopy(teacher).eval()))
    for alpha in (0.0, 0.3, 1.0, 4.0):
        _, parts = turn(find.get("funmatch")(alpha=alpha), made, batch)
        assert parts["loss"] == pytest.approx(0, abs=1e-6)
        assert torch.equal(made.teacher.seen[-1], made.student.seen[-1])
        assert torch.equal(made.teacher.seen[-1], batch["inputs"]) == (alpha == 0)


def test_funmatch_without_blends_is_kd_without_labels(batch: Batch) -> None:
    made = nets()
    _, parts = turn(find.get("funmatch")(alpha=0, temperature=3.0), made, batch)
    wanted = kd(made.student(batch["inputs"])["logits"], made.teacher(batch["inputs"])["logits"], temperature=3.0)
    assert parts["loss"] == pytest.approx(float(wanted.detach().mean()), rel=1e-5)


# ---------------------------------------------------------------- mix_kd
def test_mix_kd_is_the_official_loss() -> None:
    ref, method = reference("mix_kd"), find.get("mix_kd")()
    student = tensor(ref["student_logits"]).requires_grad_()
    mix = Mix(torch.tensor(ref["partner"]), tensor(ref["share"]))
    target = mix.targets(torch.eye(5, dtype=F64)[torch.tensor(ref["labels"])])
    assert torch.allclose(target, tensor(ref["target"]), rtol=1e-12)
    ce, soft = method.losses(student, tensor(ref["teacher_logits"]), target)
    assert float(ce.detach().mean()) == pytest.approx(ref["ce"], rel=1e-6)
    assert float(soft.detach().mean()) == pytest.approx(ref["kd"], rel=1e-6)
    (ce + soft).mean().backward()
    assert student.grad is not None and torch.allclose(student.grad, tensor(ref["grad"]), atol=1e-7)


def test_mix_kd_ignores_scale_and_offset_of_the_teacher_and_leaves_what_is_clean() -> None:
    method = find.get("mix_kd")()
    z, other, target = torch.randn(6, 5, dtype=F64), torch.randn(6, 5, dtype=F64), torch.eye(6, 5, dtype=F64)
    _, one = method.losses(other, z, target)
    _, two = method.losses(other, 7 * z + 3, target)
    assert torch.allclose(one, two, rtol=1e-5)
    assert float(method.losses(2 * z + 1, z, target)[1].abs().max()) < 1e-10
    mix = find.get("mix_kd")(clean=1.0).mix(6)
    x = torch.randn(6, 1, 4, 4)
    assert torch.equal(mix.images(x), x) and torch.equal(mix.targets(target), target)
    assert [int((find.get("mix_kd")(clean=c).mix(20).share == 1).sum()) for c in (0.0, 0.5, 0.9)] == [0, 10, 18]


def test_mix_kd_reads_the_labels_that_there_are(batch: Batch) -> None:
    made, none, method = nets(), torch.arange(24) % 4 == 0, find.get("mix_kd")(clean=0.25)
    labels = batch["labels"].masked_fill(none, -100)
    torch.manual_seed(0)
    _, parts = next(iter(method.step(made, {**batch, "labels": labels}, Clock(0, 1))))
    torch.manual_seed(0)
    mix = method.mix(24)
    counts = ~none & (~none[mix.partner] | (mix.share == 1))
    assert int(parts["ce"].count) == int(counts.sum()) < 18 and parts["kd"].count == 24
    assert 0 < float(parts["ce"]) < 1


# ---------------------------------------------------------------- cutmix_pick
def test_cutmix_pick_scores_and_losses_are_the_official_ones() -> None:
    ref = reference("cutmix_pick")
    student, teacher = tensor(ref["student_logits"]), tensor(ref["teacher_logits"])
    for score, wanted in ref["scores"].items():
        found = find.get("cutmix_pick")(score=score).scores(student, teacher)
        assert found.tolist() == pytest.approx(wanted, rel=1e-9)
    assert float(deviation(tensor(ref["pools"]))) == pytest.approx(ref["deviation"], rel=1e-9)
    assert float(deviation(tensor(ref["pools"])[:, :, :1].expand(3, 6, 4))) == 0  # it says the same of everything


class Saying(nn.Module):
    """Says of a picture what stands in its first pixels."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * inputs.flatten(1)[:, :CLASSES]


def test_cutmix_pick_adds_up_as_the_official_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ref, method = reference("cutmix_pick"), find.get("cutmix_pick")()
    told = iter([tensor(ref["teacher_logits"])])
    answers = iter([tensor(ref["student_logits"]), tensor(ref["mixed_student"])])

    class Fixed:
        def run(self, player: str, _batch: Batch) -> dict[str, Tensor]:
            return {"logits": next(told if player == "teacher" else answers)}

    monkeypatch.setattr(type(method), "pick", lambda *_: {"teacher_logits": tensor(ref["mixed_teacher"])})
    _, parts = turn(method, Fixed(), {"labels": torch.tensor(ref["labels"])})  # type: ignore[arg-type]
    assert sum(parts.values()) == pytest.approx(ref["total"], rel=1e-9)


def test_cutmix_pick_takes_the_least_certain(batch: Batch) -> None:
    made = Nets(teacher=Saying(1.0), student=Saying(2.0))
    method = find.get("cutmix_pick")(runs=3)
    state = torch.get_rng_state()
    picked = method.pick(made, batch)
    torch.set_rng_state(state)
    pool = torch.cat([cutmix(batch["inputs"]).images(batch["inputs"]) for _ in range(3)])
    rated = method.scores(made.student(pool), made.teacher(pool))
    chosen = method.scores(made.student(picked["inputs"]), picked["teacher_logits"])
    assert len(chosen) == 24 and torch.allclose(chosen.sort().values, rated.sort().values[-24:])
    assert chosen.mean() > rated.mean()
    torch.set_rng_state(state)
    whole = find.get("cutmix_pick")(runs=1).pick(made, batch)["inputs"]
    torch.set_rng_state(state)
    assert torch.equal(whole, cutmix(batch["inputs"]).images(batch["inputs"]))  # no choice: CutMix


# ---------------------------------------------------------------- reinforced data sets
def test_dataset_reinforcement_is_the_official_target_and_loss() -> None:
    ref, method = reference("dataset_reinforcement"), find.get("dataset_reinforcement")(reinforced=1.0)
    said = {"teacher_ids": torch.tensor(ref["teacher_ids"]), "teacher_logprobs": tensor(ref["teacher_logprobs"])}
    target = method.target(said, 7)
    assert torch.allclose(target, tensor(ref["target"]), rtol=1e-9)
    assert torch.allclose(target.sum(1), torch.ones(4, dtype=F64))
    student = tensor(ref["student_logits"]).requires_grad_()
    loss = method.loss(student, target).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(ref["value"], rel=1e-9)
    assert student.grad is not None and torch.allclose(student.grad, tensor(ref["grad"]), atol=1e-7)


def test_all_entries_give_kd_and_few_fall_back_to_the_label() -> None:
    teacher, student = torch.randn(5, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    kept = teacher.log_softmax(-1).sort(-1, descending=True)
    said = {"teacher_ids": kept.indices, "teacher_logprobs": kept.values, "labels": torch.tensor([0, 1, 2, 3, 0])}
    method = find.get("dataset_reinforcement")(reinforced=1.0)
    assert torch.allclose(
        method.loss(student, method.target(said, 4)), kd(student, teacher, temperature=1.0), rtol=1e-9
    )
    labels = find.get("dataset_reinforcement")(reinforced=0.0)
    assert torch.equal(labels.target(said, 4), torch.eye(4, dtype=F64)[said["labels"]])
    assert torch.allclose(
        labels.loss(student, labels.target(said, 4)), -student.log_softmax(-1).gather(1, said["labels"][:, None])[:, 0]
    )
    many = {k: v.repeat(400, *[1] * (v.ndim - 1)) for k, v in said.items()}
    hard = (find.get("dataset_reinforcement")(reinforced=0.8).target(many, 4).amax(1) == 1).double().mean()
    assert float(hard) == pytest.approx(0.2, abs=0.03)


STRONG: list[Any] = [{"resized_crop": {"smallest": 0.4}}, "flip", {"randaugment": {"magnitude": 0.6}}, "erase"]


def test_strong_views_are_replayed_bit_for_bit_in_any_batch(tmp_path: Path) -> None:
    table, teacher = pictures(4, 30), Hearing(seeing_teacher(True))
    capture(teacher, table, tmp_path / "s", views=3, topk=2, augment=STRONG, batch_size=30)
    shown = [x for x in teacher.seen if len(x) == 30]
    stream = StoredBatches(Batches(table, 7, seed=2), Store.open(tmp_path / "s"), crops=2)
    for _ in range(2 * stream.steps_per_epoch):
        epoch_ = stream.epoch
        got = next(stream)
        views = stream.views(got["index"][::2], epoch_).flatten()
        wanted = torch.stack([shown[v][i] for v, i in zip(views.tolist(), got["index"].tolist(), strict=True)])
        assert torch.equal(got["inputs"], wanted)


def test_randaugment_does_what_each_operation_says() -> None:
    x = torch.rand(len(RANDOM), 3, 12, 12)
    augment = RandAugment(layers=1, magnitude=0.5, fill=(0.25,))
    params = torch.stack([torch.arange(float(len(RANDOM))), torch.full((len(RANDOM),), 0.5)], 1)
    out = augment.apply(x, params)
    assert torch.equal(out[0], x[0]) and all(not torch.equal(a, b) for a, b in zip(out[1:], x[1:], strict=True))
    for i, op in enumerate(RANDOM):  # each picture is its own: the others in the batch change nothing
        assert torch.equal(augment.apply(x[i : i + 1], params[i : i + 1])[0], out[i]), op
    bright = RANDOM.index("brightness")
    assert torch.allclose(out[bright] - 0.25, 1.45 * (x[bright] - 0.25), atol=1e-6)
    contrast = RANDOM.index("contrast")
    assert torch.allclose(out[contrast].mean(), x[contrast].mean(), atol=1e-5)
    assert float(out[contrast].mean(0).std()) == pytest.approx(1.45 * float(x[contrast].mean(0).std()), rel=1e-3)
    assert torch.equal(augment.apply(x, params * torch.tensor([1.0, 0.0]))[bright:], x[bright:])  # no strength
    drawn = augment.draw(generator(0), 4000)
    assert set(drawn[:, 1].tolist()) == {-0.5, 0.5} and set(drawn[:, 0].tolist()) == set(range(len(RANDOM)))


def test_erase_blots_out_boxes_of_the_asked_area() -> None:
    x = torch.rand(3000, 1, 20, 20) + 1
    erase = Erase(probability=0.5, fill=(-1.0,))
    out = erase.apply(x, erase.draw(generator(1), 3000))
    share = (out == -1).double().mean((1, 2, 3))
    assert float((share > 0).double().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(share.max()) <= 0.4 and float(share[share > 0].mean()) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert torch.equal(out[out != -1], x[out != -1])
    with pytest.raises(BadInput, match="erase"):
        build(["eras"])


# ---------------------------------------------------------------- ferkd
def test_ferkd_repairs_as_worked_by_hand() -> None:
    ref, method = reference("ferkd"), find.get("ferkd")()
    target, counts = method.repaired(tensor(ref["said"]), torch.tensor(ref["labels"]))
    assert torch.allclose(target, tensor(ref["target"]), rtol=1e-9) and counts.all()
    assert torch.allclose(target.sum(1), torch.ones(6, dtype=F64))
    assert method.loss(tensor(ref["student_logits"]), target).tolist() == pytest.approx(ref["value"], rel=1e-9)
    _, counts = find.get("ferkd")(least="drop").repaired(tensor(ref["said"]), torch.tensor(ref["labels"]))
    assert counts.tolist() == [False] + [True] * 5


def test_ferkd_with_extreme_thresholds_is_fkd(batch: Batch) -> None:
    made = nets()
    said = made.teacher(batch["inputs"])["logits"].log_softmax(-1).topk(2)
    stored = {**batch, "teacher_ids": said.indices, "teacher_logprobs": said.values}
    plain = find.get("fkd")()
    surgical = find.get("ferkd")(hard=0.0, easy=0.0, selfmix=0.0)
    surgical.setup(made, stored)
    assert turn(surgical, made, stored)[1]["loss"] == pytest.approx(turn(plain, made, stored)[1]["loss"], rel=1e-6)
    strict = find.get("ferkd")(hard=1.0, easy=1.0, selfmix=0.0, smoothing=0.0)  # nothing is sure enough: labels only
    wanted = torch.nn.functional.cross_entropy(made.student(batch["inputs"])["logits"], batch["labels"])
    assert turn(strict, made, stored)[1]["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_selfmix_stays_within_a_picture_and_with_itself_changes_nothing() -> None:
    method = find.get("ferkd")(similar=0.3)
    index = torch.tensor([4, 4, 4, 7, 9, 9])
    target = torch.eye(6, 4, dtype=F64)[[0, 0, 1, 2, 3, 3]]
    x = torch.randn(6, 1, 8, 8)
    mix = method.mix({"inputs": x, "index": index}, target)
    assert mix.partner.tolist() == [1, 1, 2, 3, 5, 4]  # 1 and 2 differ too much from what follows; 3 is alone
    assert torch.equal(mix.targets(target), target)
    assert torch.equal(mix.images(x)[3], x[3]) and torch.equal(mix.images(x)[1:3], x[1:3])


# ---------------------------------------------------------------- hard_kd
def test_changers_begin_as_the_identity_and_gradients_flow_through() -> None:
    x = torch.randn(5, 2, 8, 8)
    affine, coder = Affine(2), Autoencoder((2, 8, 8), latent=4)
    edit = Edit(4)
    assert torch.allclose(affine(x), x, atol=1e-5) and torch.allclose(edit(x, coder), x, atol=1e-6)
    torch.nn.init.normal_(affine.say.weight)
    moved = affine(x)
    assert not torch.allclose(moved, x, atol=1e-2) and not torch.equal(moved, affine(x))  # noise has a say
    moved.square().sum().backward()
    assert all(p.grad is not None for p in affine.parameters())


def test_hard_kd_with_an_identity_is_twice_the_clean_loss(batch: Batch) -> None:
    made = nets()
    made.student.eval()
    method = find.get("hard_kd")(temperature=2.0)
    method.setup(made, batch)
    _, parts = turn(method, made, batch)
    assert parts["hard"] == pytest.approx(parts["clean"], rel=1e-3) and parts["clean"] > 0.01
    ref = reference("hard_kd")
    assert method.apart(tensor(ref["first"]), tensor(ref["second"])).tolist() == pytest.approx(ref["value"], rel=1e-9)


def test_the_augmentor_has_no_gradient_where_both_agree_and_the_teacher_never_has_one(batch: Batch) -> None:
    teacher = seeing_teacher(True)
    for student, agrees in ((copy.deepcopy(teacher).eval(), True), (Eye(4, seed=1).eval(), False)):
        made = Nets(teacher=teacher, student=student)
        method = find.get("hard_kd")(valid=0.0)
        method.setup(made, batch)
        torch.nn.init.normal_(made.augmentor.say.weight, std=0.1)
        for searching in (True, False):
            made.phase.searching.fill_(searching)
            player, parts = next(iter(method.step(made, batch, Clock(0, 1))))
            assert player == ("augmentor" if searching else "student")
            sum((p.value for p in parts.values()), torch.zeros(())).backward()
            assert all(p.grad is None for p in teacher.parameters())
            size = max(
                (float(p.grad.abs().max()) for p in made.augmentor.parameters() if p.grad is not None), default=0
            )
            assert (size < 1e-6) == (agrees or not searching), size
            made.augmentor.zero_grad()


def test_phases_change_at_the_thresholds(batch: Batch) -> None:
    made = nets()
    method = find.get("hard_kd")(low=0.1, high=0.5, patience=50)
    method.setup(made, batch)
    for gap, searching in ((0.3, False), (0.05, True), (0.3, True), (0.6, False), (0.2, False)):
        made.phase.gap.fill_(gap)
        method.after(made, "student", Clock(0, 1))
        assert bool(made.phase.searching) is searching


def test_the_search_drives_student_and_teacher_apart_and_latent_edits_train_first() -> None:
    data = Batches(pictures(3), 24, seed=1)
    for edits in ("affine", "latent"):
        made = nets()
        method = find.get("hard_kd")(edits=edits, low=0.0, high=1e9, patience=10, latent=4)
        fitted = fit(method, made, copy.deepcopy(data), Plan(20, log_every=1))
        players = [player for _, _, player, _ in fitted.turns]
        search = ["student"] * 10 + ["augmentor"] * 10
        assert players == (["painter"] * 20 if edits == "latent" else []) + search
        gaps = [-parts["gap"] for _, _, player, parts in fitted.turns if player == "augmentor"]
        assert gaps[-1] > gaps[0]
    with pytest.raises(BadInput, match="even sides"):
        find.get("hard_kd")(edits="latent").setup(nets(), {"inputs": torch.randn(2, 1, 7, 8)})


# ---------------------------------------------------------------- active choice
def test_robust_probabilities_solve_the_game() -> None:
    ref = reference("robust_sampling")
    gain = tensor(ref["gains"])
    supports = []
    for case in ref["cases"]:
        p, k = robust(gain, case["wrong"]), case["wrong"]
        earned = float((p * gain).sort().values[: len(gain) - k].sum())
        assert float(p.sum()) == pytest.approx(1) and earned == pytest.approx(case["value"], rel=1e-9)
        flat = (p * gain)[p > 0]
        assert torch.allclose(flat, flat[0].expand_as(flat))
        supports.append(int((p > 0).sum()))
    assert supports[0] == 1 and float(robust(gain, 0)[gain.argmax()]) == 1 and supports == sorted(supports)


def test_gains_are_one_less_the_margin_and_draws_fill_up_by_gain() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.45, 0.1, 0.45], [0.98, 0.01, 0.01]], dtype=F64)
    assert gains(p.log()).tolist() == pytest.approx([0.8, 1.0, 0.03])
    assert without_replacement(tensor([0.0, 1.0, 0.0, 0.0]), tensor([0.2, 0.9, 0.1, 0.7]), 3).tolist() == [1, 3, 0]
    counts = torch.zeros(3)
    for _ in range(1000):
        counts[without_replacement(tensor([0.5, 0.3, 0.2]), torch.ones(3), 1)] += 1
    assert (counts / 1000).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.05)


def test_k_centre_picks_the_farthest_and_does_not_know_the_classes_names() -> None:
    z = torch.randn(40, 5, dtype=F64)
    points, chosen = z.softmax(-1), torch.arange(40) < 4
    picks = farthest(points, chosen, 12)
    distance = torch.cdist(points, points[:4]).amin(1)
    assert int(picks[0]) == int(distance.argmax()) and not chosen[picks].any()
    radii = [
        float(torch.cdist(points[p : p + 1], points[torch.cat([torch.arange(4), picks[:i]])]).min())
        for i, p in enumerate(picks.tolist())
    ]
    assert radii == sorted(radii, reverse=True)
    select = find.get("p_coreset")
    order = torch.randperm(5)
    assert torch.equal(select(z[:, order], chosen, budget=6), select(z, chosen, budget=6))


def test_choose_sees_only_what_was_looked_at_and_takes_any_selection() -> None:
    logits = torch.randn(20, 4)
    logits[15:] = torch.inf
    chosen = torch.arange(20) % 5 == 0
    for select in ("p_coreset", {"robust_sampling": {"wrong": 0.3}}, "random_subset", "herding"):
        rows = choose(select, logits, chosen, 5)
        assert len(rows.unique()) == 5 and (rows < 15).all() and not chosen[rows].any(), select
    assert (
        len(choose("p_coreset", logits, chosen, 99)) == 12 and len(choose("p_coreset", logits, chosen | True, 3)) == 0
    )
    for wrong in ("kd", "quality_filter"):
        with pytest.raises(BadInput, match="data/select"):
            choose(wrong, logits, chosen, 1)


def test_a_pool_keeps_the_newest_view_and_refuses_more_than_it_holds() -> None:
    pool = Pool(10, 3, torch.zeros(4, 2), memory=3)
    first = {"index": torch.tensor([7, 2, 5]), "inputs": torch.ones(3, 2)}
    slots, new = pool.meet(first, torch.tensor([True, False, True]))
    assert slots.tolist() == [0, 1] and new.all()
    slots, new = pool.meet({"index": torch.tensor([5, 9]), "inputs": 2 * torch.ones(2, 2)}, torch.ones(2).bool())
    assert slots.tolist() == [1, 2] and new.tolist() == [False, True]
    assert pool.inputs[:, 0].tolist() == [1, 2, 2] and sorted(pool.draw(9).tolist()) == [0, 1, 2]
    with pytest.raises(BadInput, match="memory"):
        pool.meet({"index": torch.tensor([0]), "inputs": torch.ones(1, 2)}, torch.tensor([True]))
    assert Pool(96, 3, torch.zeros(24, 2), 9).look == 7  # two passes less one batch, wherever an epoch stands


def few_labels(each: int = 2) -> Table:
    table = pictures(3)
    labels = table["labels"].clone()
    for c in range(CLASSES):
        labels[(labels == c).nonzero()[each:, 0]] = -100
    return Table({"inputs": table["inputs"], "labels": labels}, "images", classes=[*"abcd"])


def test_rad_asks_the_teacher_once_for_each_of_the_chosen() -> None:
    teacher = Hearing(seeing_teacher(True))
    made = Nets(teacher=teacher, student=Eye(4, seed=1))
    made.factories["student"] = lambda: Eye(4)
    method = find.get("rad_active")(rounds=2, budget=9)
    fitted = fit(method, made, Batches(few_labels(), 24, seed=3), Plan(12, optimizer={"adam": {"lr": 1e-2}}))
    pool = made.pool
    assert int(pool.chosen.sum()) == 18 and int(pool.asked) == 18
    assert sum(len(x) for x in teacher.seen) == 18
    assert int(pool.used) == 18 + 2 * CLASSES and fitted.steps == 3 * 12 + 2 * pool.look
    labels = few_labels()["labels"]
    assert (labels[pool.chosen] == -100).all()
    said = pool.told[pool.slot[pool.chosen]].argmax(1)
    truth = pictures(3)["labels"][pool.chosen]
    assert (said == truth).double().mean() > 0.6
    ref = reference("rad_active")
    loss = find.get("rad_active")(soft_weight=0.7, temperature=2.0).loss(
        tensor(ref["student_logits"]), torch.tensor(ref["labels"]), tensor(ref["told"])
    )
    assert loss.tolist() == pytest.approx(ref["value"], rel=1e-6)


def test_rad_refuses_a_teacher_of_other_classes() -> None:
    pixels = pictures(3)["inputs"][0].numel()
    made = Nets(teacher=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(pixels, 7)), student=Eye(4))
    made.factories["student"] = lambda: Eye(4)
    with pytest.raises(BadInput, match=f"the student has {CLASSES} classes and the teacher has 7 classes"):
        fit(find.get("rad_active")(rounds=1), made, Batches(few_labels(), 24, seed=3), Plan(2))


def test_rad_looks_at_all_of_the_pool_when_a_part_of_each_batch_is_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(Pool, "query", lambda pool, *_: looked.append(int(pool.said.isfinite().all(1).sum())))
    for labelled, look in ((None, 7), (12, 11), (20, 35)):  # of 96, 72 have no label
        made = nets()
        made.factories["student"] = lambda: Eye(4)
        fit(find.get("rad_active")(rounds=1), made, Batches(few_labels(6), 24, seed=3, labelled=labelled), Plan(2))
        assert made.pool.look == look and looked.pop() == 72


def test_pcoreset_buys_labels_in_rounds_and_keeps_the_mean_of_its_heads(batch: Batch) -> None:
    made = nets()
    made.factories["student"] = lambda: Eye(4)
    method = find.get("pcoreset_activekd")(rounds=2, budget=5, start=1)
    fit(method, made, Batches(pictures(3), 24, seed=3), Plan(12, optimizer={"adam": {"lr": 1e-2}}))
    pool = made.pool
    assert pool.first.tolist() == [1] * CLASSES and int(pool.chosen.sum()) == CLASSES + 10
    assert int(pool.asked) == int(pool.used) == CLASSES + 10  # every label that was chosen has been read, no other
    index = pool.chosen.nonzero()[:, 0]
    assert torch.equal(pool.labels[pool.slot[index]], pictures(3)["labels"][index])
    made.student.eval()
    first, second = method.heads(made, batch["inputs"])
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.allclose((first + second) / 2, made.student(batch["inputs"])["logits"], atol=1e-5)


@pytest.mark.parametrize("name", ["funmatch", "mix_kd", "cutmix_pick", "hard_kd"])
def test_what_is_made_in_each_step_needs_a_teacher_at_hand(name: str, batch: Batch) -> None:
    with pytest.raises(BadInput, match="not a store"):
        find.get(name)().setup(Nets(student=Eye(4)), batch)


@pytest.mark.parametrize(
    "name", ["funmatch", "mix_kd", "cutmix_pick", "hard_kd", "config_diffusion_augment", "pcoreset_activekd"]
)
def test_a_teacher_of_other_classes_is_refused(name: str, batch: Batch) -> None:
    made = Nets(teacher=nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), student=Eye(4))
    with pytest.raises(BadInput, match=f"`{name}` compares classes one by one, but the student has 4 classes and the"):
        find.get(name)().setup(made, batch)


def test_what_has_no_label_learns_from_the_store_or_does_not_count(batch: Batch) -> None:
    said = torch.randn(24, CLASSES, dtype=F64).log_softmax(-1).sort(-1, descending=True)
    labels = torch.where(torch.arange(24) % 3 == 0, batch["labels"], -100)
    stored = {"teacher_ids": said.indices, "teacher_logprobs": said.values, "labels": labels}
    p = recover(said.indices, said.values, CLASSES)
    target = find.get("dataset_reinforcement")(reinforced=0.0).target(stored, CLASSES)
    assert torch.allclose(target[labels < 0], p[labels < 0]) and (target[labels >= 0].amax(1) == 1).all()
    for knobs in ({}, {"least": "drop"}, {"reliability": "top"}):
        target, counts = find.get("ferkd")(**knobs).repaired(p, labels)
        wanted, also = find.get("ferkd")(**knobs).repaired(p[labels >= 0], labels[labels >= 0])
        assert torch.equal(target[labels >= 0], wanted) and torch.equal(counts[labels >= 0], also)
        assert not counts[labels < 0].any()


@pytest.mark.parametrize("name", ["ferkd", "dataset_reinforcement"])
def test_stored_labels_are_missed_by_name(name: str, batch: Batch) -> None:
    with pytest.raises(BadInput, match="teacher_ids"):
        find.get(name)().setup(nets(), batch)


def test_recovery_and_boxes_are_exact() -> None:
    p = torch.rand(3, 5, dtype=F64).softmax(-1)
    kept, ids = p.topk(5)
    assert torch.allclose(recover(ids, kept.log(), 5), p)
    assert inside(torch.tensor([[1, 3, 0, 2]]), 4, 4)[0, 0].nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]


# ---------------------------------------------------------------- painted pictures
class Halving(nn.Module):
    """A denoiser whose answer is known: x / 2 + t / 10."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return 0.5 * x + 0.1 * t.view(-1, 1, 1, 1)


def test_repainting_follows_the_reference_and_without_a_pull_it_is_ddim() -> None:
    ref = reference("config_diffusion_augment")
    denoiser = Denoiser(Halving(), Flow(), "x0")
    x, noise = tensor(ref["inputs"]), tensor(ref["noise"])
    asked: dict[str, Any] = {"strength": ref["strength"], "steps": ref["steps"], "noise": noise}
    plain = repaint(denoiser, x, None, **asked)
    assert torch.allclose(plain, tensor(ref["plain"]), rtol=1e-5, atol=1e-7)
    pulled = repaint(denoiser, x, None, **asked, pull=lambda x0: ref["guidance"] * (1 - x0))
    assert torch.allclose(pulled, tensor(ref["pulled"]), rtol=1e-5, atol=1e-7)
    grid = denoiser.schedule.at(ref["strength"] * torch.linspace(1, 0, ref["steps"] + 1))
    grid[-1] = 0
    z = denoiser.schedule.noised(x, grid[0].expand(2), noise)
    for t, s in pairwise(grid):
        z = sampler.step(denoiser, z, t, s, "ddim")
    assert torch.allclose(z, plain, rtol=1e-6)
    assert torch.equal(repaint(denoiser, x, None, **asked, pull=torch.zeros_like), plain)


def test_guidance_is_the_gradient_of_the_gap_and_reaches_no_weights(batch: Batch) -> None:
    teacher = seeing_teacher(True)
    twins = Nets(teacher=teacher, student=copy.deepcopy(teacher).eval())
    method = find.get("config_diffusion_augment")(guidance=3.0)
    x, y = batch["inputs"], batch["labels"]
    assert float(method.pull(twins, x, y).abs().max()) < 1e-5
    made = nets()
    pull = method.pull(made, x, y)
    assert all(p.grad is None for net in ("teacher", "student") for p in made.find(net).parameters())
    made.student.eval()

    def gap(images: Tensor) -> Tensor:
        with torch.no_grad():
            t, s = (made.find(n)(images)["logits"].log_softmax(-1) for n in ("teacher", "student"))
        return (t - s).gather(1, y[:, None])[:, 0]

    assert pull.abs().max() > 0.01 and (gap(x + 0.02 * pull) - gap(x)).mean() > 0


def test_each_picture_is_painted_once_and_those_that_convince_the_teacher_are_learned() -> None:
    made = nets()
    method = find.get("config_diffusion_augment")(prepare=15, sure=0.5, steps=3)
    fitted = fit(method, made, Batches(pictures(3), 24, seed=3), Plan(8, log_every=1))
    painted, players = made.painted, [player for _, _, player, _ in fitted.turns]
    assert players == ["painter"] * 15 + ["student"] * 8 and bool(painted.done.all())
    with torch.no_grad():
        p = made.teacher(painted.images)["logits"].softmax(-1).gather(1, pictures(3)["labels"][:, None])[:, 0]
    assert torch.equal(p >= 0.5, painted.kept) and int(painted.kept.sum()) > 0
    assert "painted" not in fitted.turns[15][3] and "painted" in fitted.turns[-1][3]


def test_micro_batches_without_a_convincing_picture_have_the_same_parts() -> None:
    made = nets()
    method = find.get("config_diffusion_augment")(prepare=0, sure=0.5, steps=1)
    made.painter = Denoiser(Halving(), Flow(), "x0")
    batch: Batch = next(Batches(pictures(3), 24, seed=3))
    method.setup(made, batch | {"examples": 96})
    for kept in (True, False):
        made.painted.kept.fill_(kept)
        _, parts = turn(method, made, batch, Clock(0, 1, stage=2))
        assert set(parts) == {"ce", "kd", "painted"} and (parts["painted"] > 0) is kept


def test_painting_needs_the_labels_of_all() -> None:
    with pytest.raises(BadInput, match="labels of all"):
        find.get("config_diffusion_augment")().setup(nets(), next(Batches(few_labels(), 24)))
