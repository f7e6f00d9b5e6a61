"""Soft prompts before a frozen encoder, and their transfer from one task to another."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.conformance.toys import scene
from limbeck.core.batches import Batches, Table
from limbeck.core.loop import Clock, Fitted, Plan, fit
from limbeck.core.nets import Nets
from limbeck.core.policy import Numbers
from limbeck.train.plain.distill import Distill
from limbeck.train.plain.panda_prompt import PandaPrompt, distance
from limbeck.zoo.nets import build

REFERENCE = json.loads((Path(__file__).parent / "vectors" / "panda_prompt.json").read_text())["reference"]
OWN = {"prompt", "body.head.weight", "body.head.bias"}


def encoder(seed: int = 0, **knobs: Any) -> nn.Module:
    torch.manual_seed(seed)
    spec = {"net": "prompted_encoder", "width": 16, "layers": 2, "heads": 2, "length": 8, "prompt": 3, "dropout": 0.0}
    return build({**spec, **knobs}, classes=2, vocab=20)


def texts() -> Batches:
    g = torch.Generator().manual_seed(0)
    inputs = torch.randint(1, 20, (48, 8), generator=g)
    inputs[:, 6:] = 0
    return Batches(Table({"inputs": inputs, "labels": (inputs[:, 0] > 9).long()}, kind="tokens"), 16, seed=1)


def play(method: Any, student: nn.Module, teacher: nn.Module | None = None, steps: int = 6) -> Fitted:
    nets = Nets(student=student)
    if teacher is not None:
        nets.teacher = teacher
    return fit(method, nets, texts(), Plan(steps, optimizer={"adam": {"lr": 0.05}}, log_every=1, seed=3))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def moved(before: dict[str, Tensor], after: nn.Module) -> set[str]:
    return {k for k, v in after.state_dict().items() if not torch.equal(v, before[k])}


# ---------------------------------------------------------------- the network


def test_without_a_prompt_it_is_the_encoder_itself() -> None:
    net, inputs = encoder(prompt=0).eval(), next(texts())["inputs"]
    plain, out = net.body(inputs), net(inputs)
    for name in ("logits", "emb", "tokens"):
        torch.testing.assert_close(out[name], plain[name])
    torch.testing.assert_close(out["feats"][-1], plain["feats"][-1])


def test_the_prompt_is_heard_in_every_layer_and_padding_is_not() -> None:
    net, inputs = encoder().eval(), next(texts())["inputs"]
    logits = net(inputs)["logits"]
    torch.testing.assert_close(net(inputs[:, :6])["logits"], logits, rtol=0, atol=1e-7)
    for layer in range(2):
        with torch.no_grad():
            net.prompt[layer].normal_()
        louder = net(inputs)["logits"]
        assert (louder - logits).abs().max() > 1e-6
        logits = louder


def test_a_head_or_prompt_of_another_shape_stays_fresh() -> None:
    source, target = (
        encoder(prompt=0, frozen=False),
        build(
            {"net": "prompted_encoder", "width": 16, "layers": 2, "heads": 2, "length": 8, "prompt": 3},
            classes=5,
            vocab=20,
        ),
    )
    before = state(target)
    target.load_state_dict(source.state_dict())
    assert moved(before, target).isdisjoint(OWN)
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items() if k not in OWN)
    same = encoder(1)
    same.load_state_dict(encoder(2).state_dict())
    assert torch.equal(same.prompt, encoder(2).prompt)


# ---------------------------------------------------------------- the method


def test_distance_is_that_of_the_official_code() -> None:
    s, t = (torch.tensor(REFERENCE["inputs"][f"{n}_logits"], dtype=torch.float64) for n in ("student", "teacher"))
    labels, s = torch.tensor(REFERENCE["inputs"]["labels"]), s.requires_grad_()
    weight = 0.1 * REFERENCE["beta"] / len(s)
    value = nn.functional.cross_entropy(s, labels) + weight * distance(s, t).mean()
    torch.testing.assert_close(value.item(), REFERENCE["value"], rtol=1e-9, atol=0)
    torch.testing.assert_close(distance(s, t).mean().item() / len(s), REFERENCE["mse"], rtol=1e-9, atol=0)
    value.backward()
    torch.testing.assert_close(s.grad, torch.tensor(REFERENCE["grad"], dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_only_prompt_and_head_change() -> None:
    student = encoder()
    before = state(student)
    made = play(PandaPrompt(), student)
    assert moved(before, student) == OWN
    assert moved(before, made.nets.scout) == OWN
    assert not moved(before, made.nets.teacher)


def test_the_first_distance_is_0_and_later_ones_are_not() -> None:
    made = play(PandaPrompt(scouting=0.5), encoder())
    said = [(player, parts.get("logits")) for _, _, player, parts in made.turns]
    assert [player for player, _ in said] == ["scout"] * 3 + ["student"] * 6
    assert said[3][1] == 0.0 and said[4][1] > 0.0  # type: ignore[operator]


def test_without_weight_it_is_plain_prompt_transfer() -> None:
    ends = [state(play(method, encoder()).nets.student) for method in (PandaPrompt(weight=0.0), Distill(match=("ce",)))]
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
    held = state(play(PandaPrompt(weight=50.0, scouting=0.0), encoder()).nets.student)
    assert not torch.equal(held["prompt"], ends[0]["prompt"])


def test_a_strong_weight_holds_the_logits_where_they_were() -> None:
    batch = next(texts())
    start = encoder()(batch["inputs"])["logits"]
    far = []
    for weight in (0.0, 100.0):
        student = play(PandaPrompt(weight=weight, scouting=0.0), encoder(), steps=20).nets.student
        far.append(distance(student(batch["inputs"])["logits"], start).mean().item())
    assert far[1] < 0.2 * far[0]


class Says(nn.Module):
    """An embedding for each example."""

    def __init__(self, emb: list[list[float]]) -> None:
        super().__init__()
        self.emb = nn.Parameter(torch.tensor(emb))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.emb, "emb": self.emb}


def test_likeness_is_the_mean_cosine_so_far() -> None:
    nets = Nets(teacher=Says([[1.0, 0.0], [0.0, 2.0]]), scout=Says([[3.0, 0.0], [1.0, 1.0]]))
    nets.likeness = Numbers(total=0.0, count=0.0)
    method, batch = PandaPrompt(), {"inputs": torch.zeros(2, 1)}
    torch.testing.assert_close(method.likeness(nets, batch), torch.tensor((1 + 0.5**0.5) / 2))
    nets.scout = Says([[-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(method.likeness(nets, batch), torch.tensor((1 + 0.5**0.5 - 2) / 4).clamp_min(0))
    assert method.likeness(nets, batch) == 0


def test_decay_falls_to_0_from_a_tenth_of_the_way_on() -> None:
    method = PandaPrompt(decay=True)
    assert [round(method.share(p), 9) for p in (0.0, 0.1, 0.55, 1.0)] == [1.0, 1.0, 0.5, 0.0]
    assert PandaPrompt().share(1.0) == 1.0


def test_a_wider_teacher_has_a_scout_of_its_own_width() -> None:
    made = scene("panda_prompt", steps=2)
    made.method.setup(made.nets, next(made.data))
    assert made.nets.scout.head.in_features == made.nets.teacher.head.in_features
    player, _ = next(made.method.step(made.nets, next(made.data), Clock(0, 2)))
    assert player == "scout"
