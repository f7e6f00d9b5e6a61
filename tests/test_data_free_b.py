"""What the catalogue promises of black-box teachers, pictures of the web and films without labels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.adapters.films import hearts, hearts_made
from limbeck.conformance import toys
from limbeck.core import knobs
from limbeck.core.errors import BadInput
from limbeck.core.films import frames_of, strip_of
from limbeck.core.loop import Clock
from limbeck.core.nets import Nets
from limbeck.core.queries import Queries
from limbeck.losses.logits.echodfkd import echodfkd
from limbeck.losses.logits.kd import kd
from limbeck.measure.agree.frame_distance import frame_distance, moment
from limbeck.train.datafree.kd3_webly import Confidence, another_look, told_apart
from limbeck.zoo.films import conv_lstm, frames
from tests.numbers import near, number, reference

pytestmark = pytest.mark.usefixtures("double")


class Told(nn.Module):
    """A network that says what it is told to, in as many rows as it sees."""

    def __init__(self, **said: Any) -> None:
        super().__init__()
        self.said = said

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        return {k: [v] if k == "feats" else v[: len(inputs)] for k, v in self.said.items()}


class Painted(nn.Module):
    """tanh(W z + b) as pictures [B, 1, 3, 4]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, codes: Tensor) -> Tensor:
        return self.linear(codes).tanh().view(len(codes), 1, 3, 4)


class Scored(nn.Module):
    """A discriminator that scores pictures of ones as real ones, and others as made ones."""

    def __init__(self, real: Tensor, made: Tensor) -> None:
        super().__init__()
        self.real, self.made = real, made

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.real if bool((inputs == 1).all()) else self.made)[:, None]


# ---------------------------------------------------------------- mekd: a teacher that only answers


def black_box(**given: Any) -> tuple[Any, Nets, dict[str, Any]]:
    """The method, set up among what the reference tells, and the reference."""
    wanted = reference("mekd")
    told = {k: torch.tensor(v) for k, v in wanted["inputs"].items()}
    student = told["student_logits"].requires_grad_()
    nets = Nets(
        teacher=Told(logits=told["teacher_logits"]),
        student=Told(logits=student),
        generator=Painted(told["weight"], told["bias"]),
        discriminator=Scored(*(torch.tensor(wanted["gan"][f"{k}_scores"]).requires_grad_() for k in ("real", "made"))),
    )
    made = knobs.make("mekd", {"latent": 4, **given})
    made.setup(nets, {"inputs": torch.ones(5, 1, 3, 4), "index": torch.arange(5)})
    return made, nets, wanted


def local(count: int = 5) -> dict[str, Any]:
    return {"inputs": torch.ones(count, 1, 3, 4), "index": torch.arange(count)}


@pytest.mark.parametrize("answers", ["soft", "hard"])
def test_mekd_is_the_authors_code(answers: str):
    made, nets, wanted = black_box(answers=answers)
    nets.freeze("generator")
    ((player, parts),) = made.step(nets, local(), Clock(0, 2, stage=1))
    assert player == "student"
    for part in ("align", "soft"):
        near(number(parts[part]), wanted[answers][part])
    loss = sum(number(p) for p in parts.values())
    near(torch.autograd.grad(loss, nets.student.said["logits"])[0], wanted[answers]["grad"])


def test_mekds_generator_and_discriminator_are_the_authors_code():
    made, nets, wanted = black_box(inform=0.5)
    nets.teacher.said["logits"] = torch.tensor([[0.0, 900.0, 0.0, 0.0]]).expand(5, 4)  # quite sure: a weight of 1
    (first, judged), (second, parts) = made.step(nets, local(), Clock(0, 2))
    assert (first, second) == ("discriminator", "generator")
    gan, scores = wanted["gan"], nets.discriminator.made
    near(number(judged["real"]), gan["real"]), near(number(judged["made"]), gan["made"])
    near(torch.autograd.grad(number(judged["made"]), scores)[0], gan["discriminator_grad"])
    near(number(parts["real"]), gan["fooled"])
    near(number(parts["inform"]), gan["inform"], 1e-3)  # the code's 1e-5 within the logarithm
    assert number(parts["inform"]).item() == pytest.approx(0.5 * gan["fooled"])
    near(torch.autograd.grad(number(parts["real"]) + number(parts["inform"]), scores)[0], gan["generator_grad"], 1e-3)


def test_mekd_is_nothing_at_a_match_and_moves_neither_teacher_nor_generator():
    made, nets, _ = black_box()
    nets.freeze("generator")
    same = nets.teacher.said["logits"].clone().requires_grad_()
    parts = made.distance(nets, same, nets.teacher.said["logits"])
    assert all(float(p) == pytest.approx(0.0, abs=1e-12) for p in parts.values())
    student = (same.detach() + torch.randn(5, 4)).requires_grad_()
    number(made.distance(nets, student, nets.teacher.said["logits"])["align"]).backward()
    assert student.grad is not None and bool(student.grad.any())
    assert all(p.grad is None for p in nets.generator.parameters())


def test_mekd_without_its_graft_is_kd_on_generated_pictures():
    made, nets, wanted = black_box(align=0, temperature=3.0)
    student, teacher = (torch.tensor(wanted["inputs"][f"{who}_logits"]) for who in ("student", "teacher"))
    parts = made.distance(nets, student, teacher)
    assert set(parts) == {"soft"}
    near(number(parts["soft"]), float(kd(student, teacher, temperature=3.0).mean() / 3.0))


def test_mekd_wants_a_code_of_as_many_numbers_as_there_are_classes():
    scene = toys.scene("mekd")
    nets = scene.nets
    nets.generator = nn.Sequential(nn.Linear(6, 64), nn.Unflatten(1, (1, 8, 8)))
    with pytest.raises(BadInput, match="`latent` must be 4, the classes, got 6"):
        knobs.make("mekd", {"latent": 6}).setup(nets, next(scene.data))


def test_no_more_is_asked_than_the_budget_and_half_of_it_is_the_students():
    made, nets, _ = black_box(budget=21)
    spent = []
    for stage in (0, 1):
        if stage:
            nets.freeze("generator")
        for t in range(4):
            for _ in made.step(nets, local(), Clock(t, 4, stage=stage)):
                pass
            spent.append(int(nets.queries.asked))
    assert spent == [7, 11, 11, 11, 16, 21, 21, 21]  # two for the look at setup; 10 are kept for the student
    assert len(nets.queries.known) == 10


def test_a_black_box_counts_remembers_and_gives_no_gradient():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nets = Nets(teacher=teacher)
    x = torch.randn(6, 1, 2, 2, requires_grad=True)
    first = nets.run("teacher", {"inputs": x[:1].detach()})["logits"]
    queries = Queries(5, 4, x[:1], first, "hard", certainty=2.0)
    pictures, answers = queries.learn(nets, x)
    assert not answers.requires_grad and not pictures.requires_grad
    assert int(queries.asked) == 5 and queries.left() == 0
    with torch.no_grad():
        named = teacher(pictures).argmax(-1)
    assert torch.equal(answers, 2.0 * nn.functional.one_hot(named, 3))  # also of those that are shown once more
    assert torch.equal(pictures[:4], x[:4].detach())
    again, _ = queries.learn(nets, torch.randn(6, 1, 2, 2))
    assert int(queries.asked) == 5 and all(any(torch.equal(p, q) for q in pictures) for p in again)
    twin = Queries(5, 4, x[:1], first, "hard", certainty=2.0)
    twin.load_state_dict(queries.state_dict())
    assert twin.left() == 0 and len(twin.known) == 4
    assert Queries(0, 1, x[:1], first).left() is None


def test_mekds_student_comes_to_agree_with_the_teacher_on_what_is_painted():
    from limbeck.conformance.training import play

    made = toys.scene("mekd", steps=60)
    play(made)
    made.nets.generator.eval(), made.nets.student.eval()
    with torch.no_grad():
        pictures = made.nets.generator(torch.randn(200, 4))
        named = [made.nets.find(n)(pictures)["logits"].argmax(-1) for n in ("student", "teacher")]
    assert float((named[0] == named[1]).double().mean()) > 0.7


# ---------------------------------------------------------------- kd3: pictures of the web


def test_kd3s_choice_and_losses_are_those_worked_by_hand():
    wanted = reference("kd3_webly")
    told = {k: torch.tensor(v).requires_grad_() for k, v in wanted["inputs"].items()}
    nets = Nets(
        teacher=Told(logits=told["teacher_logits"].detach(), feats=told["teacher_map"].detach()),
        student=Told(logits=told["student_logits"], grafted=told["student_map"], emb=told["near"]),
        pool=Confidence(9),
    )
    given = {"trust": wanted["teacher_weight"], **{k: wanted[k] for k in ("share", "temperature")}}
    made = knobs.make("kd3_webly", {**given, "contrast": 0, "align": 1})
    seen = {"inputs": torch.randn(6, 1, 4, 4), "index": torch.arange(6) + 2, "labels": torch.arange(6)}
    ((_, parts),) = made.step(nets, seen, Clock(1, 2))
    assert nets.pool.named.tolist() == [-1, -1, *wanted["named"], -1]
    near(nets.pool.sure[2:8].double(), wanted["sure"])
    chosen = nets.pool.top(seen["index"], wanted["share"])
    assert chosen.tolist() == wanted["chosen"]
    for part, of in (("kd", "student_logits"), ("align", "student_map")):
        near(number(parts[part]), wanted[part])
        near(torch.autograd.grad(number(parts[part]), told[of], retain_graph=True)[0], wanted["grad"][of], 1e-7)
    lost = told_apart(told["near"], told["far"], chosen, wanted["contrast_temperature"])[chosen].mean()
    near(lost, wanted["contrast"])
    near(torch.autograd.grad(lost, told["near"])[0], wanted["grad"]["near"], 1e-7)


def test_kd3s_other_looks_are_those_worked_by_hand_and_all_kept_is_the_picture_itself():
    looks = reference("kd3_webly")["looks"]
    pictures, partner = torch.tensor(looks["pictures"]), torch.tensor(looks["partner"])
    near(another_look(pictures, partner, torch.tensor(looks["keep"])), looks["value"])
    near(another_look(pictures, partner, torch.ones(3)), looks["pictures"], 1e-12)
    taken = another_look(pictures, partner, torch.zeros(3))
    near(taken.mean((2, 3)), pictures[partner].mean((2, 3)).tolist())


def test_kd3s_choice_never_sees_labels_and_follows_the_student():
    def chosen(labels: Tensor, trust: float, student: Tensor) -> list[bool]:
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(12, 3, generator=g)
        nets = Nets(teacher=Told(logits=logits), student=Told(logits=student), pool=Confidence(12))
        made = knobs.make("kd3_webly", {"trust": trust, "share": 0.5, "align": 0, "contrast": 0})
        seen = {"inputs": torch.zeros(12, 1, 2, 2), "index": torch.arange(12), "labels": labels}
        list(made.step(nets, seen, Clock(1, 2)))
        return nets.pool.top(seen["index"], 0.5).tolist()

    one, other = (3 * torch.randn(12, 3, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    zeros = torch.zeros(12, dtype=torch.long)
    assert chosen(zeros, 0.3, one) == chosen(torch.arange(12), 0.3, one) != chosen(zeros, 0.3, other)
    assert chosen(zeros, 1.0, one) == chosen(zeros, 1.0, other)


def test_kd3s_student_says_what_the_teacher_says_where_its_projected_features_are_the_same():
    scene = toys.scene("kd3_webly")
    batch = next(scene.data)
    scene.method.setup(scene.nets, batch)
    student, teacher = scene.nets.student.eval(), scene.nets.teacher
    told = scene.nets.run("teacher", batch)
    near(student.head(told["emb"]), told["logits"].tolist())
    assert not any(p.requires_grad for p in student.head.parameters())
    assert student.head.weight.data_ptr() != teacher.head.weight.data_ptr()


# ---------------------------------------------------------------- echodfkd: films that nobody has marked


def film_network() -> tuple[nn.Module, dict[str, Any]]:
    vector = json.loads((Path(__file__).parent / "vectors" / "echodfkd.json").read_text())["network"]
    net = conv_lstm(channels=1, width=1, blocks=2, layers=2).eval()
    state = {k: torch.tensor(v) for k, v in vector["weights"].items()}
    left = net.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all(k.endswith("num_batches_tracked") for k in left.missing_keys)
    return net, vector


def test_the_student_of_films_is_the_authors_network():
    net, vector = film_network()
    made = net(strip_of(torch.tensor(vector["frames"])))["logits"]
    near(frames_of(made), vector["made"])


def test_a_student_of_films_remembers_and_a_marker_does_not():
    film = strip_of(torch.randn(2, 5, 1, 8, 8))
    other = film.clone()
    other[:, :, :8] += 1.0
    for net, remembers in ((conv_lstm(channels=1, width=3, blocks=2, layers=1), True), (frames(channels=1), False)):
        net.eval()
        one, two = (frames_of(net(x)["logits"]) for x in (film, other))
        assert one.shape == (2, 5, 1, 8, 8) and not torch.equal(one[:, 0], two[:, 0])
        assert bool((one[:, 1:] - two[:, 1:]).abs().max() > 1e-9) is remembers
        last = film.clone()
        last[:, :, -8:] += 1.0
        near(frames_of(net(last)["logits"])[:, :-1], one[:, :-1].tolist())  # the past does not know the future
    with pytest.raises(BadInput, match="a strip of square pictures"):
        frames_of(torch.zeros(1, 1, 9, 8))


def test_a_byte_loses_less_than_a_255th_of_a_mask():
    teacher = torch.randn(2000) * 4
    student = torch.zeros(2000).requires_grad_()
    (grad,) = torch.autograd.grad(echodfkd(student[:, None], teacher[:, None]).sum(), student)
    mask = 0.5 - grad  # the gradient is sigmoid(student) - mask
    lost = teacher.sigmoid() - mask
    assert float(lost.min()) >= -1e-12 and 1 / 256 < float(lost.max()) < 1 / 255
    near((255 * mask).round() / 255, mask.tolist())


def test_moments_do_not_hang_on_the_scale_of_the_masks_and_ties_go_to_the_first():
    areas = 50 + 20 * torch.sin(torch.arange(24.0) / 3) + torch.randn(24)
    for aim in (3, 14, 22):
        assert int(moment(areas, torch.tensor(aim))) == int(moment(7.5 * areas, torch.tensor(aim)))
        assert int(moment(-areas, torch.tensor(aim))) == int(moment(-0.1 * areas, torch.tensor(aim)))
    assert int(moment(areas, torch.tensor(14))) in range(12, 17)  # the valley that is asked for
    assert int(moment(torch.full((5,), 3.0), torch.tensor(2))) == 0


def test_frame_distance_is_none_for_the_masks_themselves_and_counts_a_delay():
    phase = (torch.arange(20) - 5) / 20
    sizes = 50 + 45 * torch.cos(2 * torch.pi * phase)  # largest at 5, least at 15
    masks = (torch.arange(100) < sizes[:, None]).double().view(1, 20, 1, 10, 10)
    late = masks.roll(2, 1)
    told = [frame_distance(strip_of(40 * m - 20), strip_of(masks)) for m in (masks, late)]
    assert told[0]["afd"] == 0.0
    assert told[1]["afd_least"] == 2.0 and told[1]["afd_largest"] == 2.0


def test_no_label_enters_what_the_student_of_films_learns():
    net = conv_lstm(channels=1, width=2, blocks=1, layers=1)
    nets = Nets(student=net, teacher=frames(channels=1, width=2, depth=1))
    films = strip_of(torch.randn(3, 4, 1, 8, 8))
    method = knobs.make("distill", {"match": ("echodfkd",)})
    lost = []
    for labels in (torch.zeros_like(films), torch.full_like(films, torch.nan)):
        ((_, parts),) = method.step(nets, {"inputs": films, "labels": labels, "index": torch.arange(3)}, Clock(0, 1))
        lost.append(sum(number(p) for p in (parts.values() if isinstance(parts, dict) else [parts])))
    assert lost[0].isfinite() and torch.equal(lost[0], lost[1])


def test_films_are_drawn_alike_every_time_and_a_generator_paints_only_nearly_what_it_was_asked():
    real, made = hearts(4, 2, 2), hearts_made(4)
    for films, masks in (*real.values(), made["train"]):
        assert films.shape[1:] == (160, 16) and masks.shape == (len(films), 1, 160, 16)
        assert films.min() >= 0 and films.max() <= 1 and set(masks.flatten().tolist()) == {0.0, 1.0}
        dark, bright = films[masks[:, 0] == 1].mean(), films[masks[:, 0] == 0].mean()
        assert dark < bright
    assert all((a == b).all() for a, b in zip(real["test"], hearts(4, 2, 2)["test"], strict=True))
    assert (made["test"][0][:2] == hearts()["test"][0][:2]).all()
