"""What the catalogue promises of training in stages: block by block, layer by layer, from general to special."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.blocks import depths, ends, fed, one_layer
from limbeck.core.elastic import Candidates, cut, inner, narrowed, ranked, slopes
from limbeck.core.embeddings import inherit_words, squeezed, word_embedding
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Plan, fit
from limbeck.core.nets import Nets
from limbeck.losses.attention.mobilebert import MobileBERT
from limbeck.losses.attention.xtremedistil import XtremeDistil
from limbeck.train.many.takd import TAKD
from limbeck.train.staged.amd import AMD
from limbeck.train.staged.g2sd import G2SD, apart
from limbeck.train.staged.programme import LATENT, Programme
from limbeck.train.staged.progressive_transfer import ProgressiveTransfer
from limbeck.train.staged.stablekd import StableKD
from limbeck.zoo.nets import build

CLASSES, SIZE = 3, 6


pytestmark = pytest.mark.usefixtures("one_thread")


class Chain(nn.Module):
    """Four convolutions in a row: {"logits", "feats"} of pictures [B, 1, 6, 6]."""

    def __init__(self, width: int, blocks: int = 4) -> None:
        super().__init__()
        widths = [1, *[width] * blocks]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.Tanh()) for a, b in pairwise(widths)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x, feats = inputs, []
        for block in self.blocks:
            x = block(x)
            feats.append(x)
        return {"logits": self.head(x.mean((2, 3))), "feats": feats}


def seen(**nets: nn.Module) -> tuple[Nets, dict[str, Tensor]]:
    """Networks, and a batch of pictures for them."""
    batch = {"inputs": torch.randn(5, 1, SIZE, SIZE), "labels": torch.arange(5) % CLASSES}
    return Nets(**nets), batch


def parts(method: Any, nets: Nets, batch: dict[str, Tensor], clock: Clock) -> dict[str, Any]:
    """The losses of its one turn."""
    ((player, losses),) = list(method.step(nets, batch, clock))
    assert player == "student"
    found: dict[str, Any] = losses
    return found


# ---------------------------------------------------------------- block by block


def test_blocks_end_where_feats_lie() -> None:
    nets, batch = seen(student=Chain(4))
    assert ends(nets, "student", batch) == [f"blocks.{k}" for k in range(4)]
    nets.student = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, CLASSES))
    with pytest.raises(BadInput, match="returns no feats"):
        ends(nets, "student", batch)


def test_a_block_is_fed_another_input() -> None:
    net, x = Chain(4), torch.randn(2, 1, SIZE, SIZE)
    other = torch.randn(2, 4, SIZE, SIZE)
    with fed(net, {"blocks.1": other}) as gave:
        out = net(x)
    torch.testing.assert_close(gave["blocks.1"], net(x)["feats"][1])
    torch.testing.assert_close(out["feats"][2], net.blocks[2](other))
    torch.testing.assert_close(net(x)["feats"][2], net.blocks[2](gave["blocks.1"]))  # and it is whole again


def test_blocks_run_alone_give_the_losses() -> None:
    nets, batch = seen(teacher=Chain(6), student=Chain(4))
    method = StableKD(weight=3.0)
    method.setup(nets, batch)
    found = parts(method, nets, batch, Clock(0, 100))
    aims, student, seams = nets.teacher(batch["inputs"])["feats"], nets.student, nets.blocks
    x = batch["inputs"]
    for k in range(3):
        wanted = 3.0 * F.mse_loss(seams.out[k](student.blocks[k](x)), aims[k])
        torch.testing.assert_close(found[f"block{k}"].value, wanted)
        x = seams.into[k](aims[k])
    last = student.head(student.blocks[3](x).mean((2, 3)))
    torch.testing.assert_close(found["ce"].value, F.cross_entropy(last, batch["labels"]))


def test_no_gradient_passes_from_block_to_block() -> None:
    nets, batch = seen(teacher=Chain(6), student=Chain(4))
    method = StableKD()
    method.setup(nets, batch)
    found = parts(method, nets, batch, Clock(0, 100))
    for k in range(4):
        loss = found[f"block{k}"].value if k < 3 else found["ce"].value + found["kd"].value
        grads = torch.autograd.grad(loss, nets.params("student.blocks"), allow_unused=True, retain_graph=True)
        assert [g is not None and bool(g.any()) for g in grads] == [i // 2 == k for i in range(8)]


def test_blocks_merge_two_by_two_until_there_is_one() -> None:
    method = StableKD(share=0.5)
    assert [method.seams(p, 4) for p in (0.0, 0.24, 0.26, 0.49, 0.5, 1.0)] == [[0, 1, 2]] * 2 + [[1]] * 2 + [[]] * 2
    assert [method.seams(p, 3) for p in (0.0, 0.26, 0.6)] == [[0, 1], [1], []]
    assert method.seams(0.0, 1) == []


def test_one_block_is_distillation_of_the_whole() -> None:
    nets, batch = seen(teacher=Chain(6, 1), student=Chain(4, 1))
    method = StableKD()
    method.setup(nets, batch)
    found = parts(method, nets, batch, Clock(0, 100))
    wanted = method.pair.parts(nets, batch, 0.0)
    assert found.keys() == wanted.keys() == {"ce", "kd"}
    for name, part in wanted.items():
        torch.testing.assert_close(found[name].value, part.value)


def test_the_teachers_own_blocks_are_right() -> None:
    nets, batch = seen(teacher=Chain(4), student=Chain(4))
    nets.student.load_state_dict(nets.teacher.state_dict())
    method = StableKD(match=("kd",))
    method.setup(nets, batch)
    for part in parts(method, nets, batch, Clock(0, 100)).values():
        assert abs(float(part)) < 1e-6


def test_features_of_other_sizes_are_refused() -> None:
    nets, batch = seen(teacher=Chain(6), student=Chain(4))
    nets.student.blocks[0][0].stride = (2, 2)
    with pytest.raises(BadInput, match="may differ in width alone"):
        StableKD().setup(nets, batch)


# ---------------------------------------------------------------- layer by layer


def reading(*roles: str, layers: int = 2, width: int = 8, teacher_layers: int = 4) -> tuple[Nets, dict[str, Tensor]]:
    """Encoders of texts, the student with fewer layers, and a batch."""
    sizes = {role: (layers if role == "student" else teacher_layers) for role in roles}
    told = {"net": "text_encoder", "width": width, "heads": 2, "length": 6, "dropout": 0.0, "attn": True}
    nets = Nets(**{role: build({**told, "layers": n}, vocab=12, classes=CLASSES) for role, n in sizes.items()})
    tokens = torch.randint(1, 12, (6, 6))
    return nets, {"inputs": tokens, "labels": torch.tensor([0, 1, 2, 0, 1, 2]), "index": torch.arange(6)}


def endless(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The batch, again and again."""
    while True:
        yield batch


def moved(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """Names of the weights that are no longer what they were."""
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


def copied(module: nn.Module) -> dict[str, Tensor]:
    """Its weights as they are now."""
    return {k: v.clone() for k, v in module.state_dict().items()}


def test_weights_are_told_by_depth() -> None:
    nets, batch = reading("student")
    embedding, one, two, rest = depths(nets, "student", batch, embedding=True).names
    assert set(embedding) == {"embed.weight", "places.weight"}
    assert all(k.startswith("blocks.0.") for k in one) and all(k.startswith("blocks.1.") for k in two)
    assert set(rest) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert sorted(depths(nets, "student", batch).names[0]) == sorted([*embedding, *one])
    assert {*embedding, *one, *two, *rest} == set(dict(nets.student.named_parameters()))


def test_losses_of_a_layer_see_that_layer_alone() -> None:
    have = {"student_feats": list("ab"), "teacher_feats": list("pqrs"), "labels": 3}
    assert one_layer(have, 0, 2) == {"student_feats": ["a"], "teacher_feats": ["q"], "labels": 3}
    assert one_layer(have, 1, 2) == {"student_feats": ["b"], "teacher_feats": ["s"], "labels": 3}
    with pytest.raises(BadInput, match="teacher_feats are 1"):
        one_layer({"teacher_feats": ["p"]}, 0, 2)


def test_in_each_stage_one_layer_moves() -> None:
    nets, batch = reading("teacher", "student")
    method, seen_moving = ProgressiveTransfer(share=0.5), []

    class Watched(ProgressiveTransfer):
        def after(self, nets: Nets, player: str, clock: Clock) -> None:
            seen_moving.append((clock.stage, moved(last[0], nets.student)))
            last[0] = copied(nets.student)

    last = [copied(nets.student)]
    fit(Watched(share=method.share), nets, endless(batch), Plan(8, optimizer={"sgd": {"lr": 0.1}}))
    assert [stage for stage, _ in seen_moving] == [0, 0, 1, 1, 2, 2, 2, 2]
    for stage, names in seen_moving:
        layers = {k.split(".")[1] for k in names if k.startswith("blocks.")}
        assert layers == [{"0"}, {"1"}, {"0", "1"}][stage]
        assert ("head.weight" in names) == (stage == 2) and ("embed.weight" in names) == (stage != 1)


def test_layers_that_agree_cost_nothing() -> None:
    nets, batch = reading("teacher", "student", teacher_layers=2)
    nets.student.load_state_dict(nets.teacher.state_dict())
    method = ProgressiveTransfer()
    method.setup(nets, batch)
    assert isinstance(nets.losses["layer0"]["mobilebert"], MobileBERT)
    for stage in (0, 1):
        for part in parts(method, nets, batch, Clock(0, 4, stage)).values():
            assert abs(float(part)) < 1e-6


# ---------------------------------------------------------------- from general to special


def test_each_stage_starts_where_the_one_before_it_ended() -> None:
    nets, batch = reading("teacher", "teacher_general", "student")
    starts: list[dict[str, Tensor]] = []
    finals: list[dict[str, Tensor]] = []
    asked: list[str] = []

    class Watched(Programme):
        def step(self, nets: Nets, batch: dict[str, Any], clock: Clock) -> Iterator[Any]:
            if clock.t == 0:
                starts.append(copied(nets.student))
                asked.append(self.pairs[f"stage{clock.stage}"].teacher)
            yield from super().step(nets, batch, clock)

        def after(self, nets: Nets, player: str, clock: Clock) -> None:
            if clock.t + 1 == clock.steps:
                finals.append(copied(nets.student))

    pools = {"task": endless(batch), "texts": endless({**batch, "labels": torch.full((6,), -100)})}
    fit(Watched(), nets, pools, Plan(8, optimizer={"sgd": {"lr": 0.1}}))
    assert asked == ["teacher_general", "teacher", "teacher", "teacher"]
    for start, final in zip(starts[1:], finals[:-1], strict=True):
        assert all(torch.equal(start[k], final[k]) for k in start)
    assert moved(starts[1], nets.student)


def test_projectors_go_on_where_an_earlier_stage_left_them() -> None:
    nets, batch = reading("teacher", "student")
    same, other = {"match": [LATENT, "ce"]}, {"match": [{"tinybert": {"embedding_weight": 0.5}}]}
    method = Programme(program=(same, other, same))
    method.setup(nets, batch)
    first, second, third = (nets.losses[f"stage{k}"]["tinybert"] for k in range(3))
    for stage, _ in enumerate(method.stages(nets, 6)):
        if stage == 0:
            assert moved(copied(first), third)
            for weight in first.parameters():
                weight.data.add_(1.0)
    assert not moved(copied(first), third) and moved(copied(first), second)


def test_a_teacher_of_any_name_stays_still() -> None:
    nets, batch = reading("general", "student")
    method = Programme(program=({"teacher": "general", "match": ["kd"]},))
    method.setup(nets, batch)
    nets.train()
    assert not nets.general.training and nets.student.training
    assert not any(p.requires_grad for p in nets.general.parameters())


def test_inner_losses_of_a_copy_are_0() -> None:
    nets, batch = reading("teacher", "student", teacher_layers=2)
    nets.student.load_state_dict(nets.teacher.state_dict())
    method = Programme(program=({"match": [LATENT]}, {"match": ["xtremedistil"]}))
    method.setup(nets, batch)
    with torch.no_grad():
        for fit_ in nets.losses["stage0"]["tinybert"].maps.values():
            fit_.inner.weight.copy_(torch.eye(8))
            fit_.inner.bias.zero_()
    for stage in (0, 1):
        for part in parts(method, nets, batch, Clock(0, 4, stage)).values():
            assert abs(float(part)) < 1e-6


def test_a_copy_of_the_teachers_top_costs_nothing() -> None:
    nets, batch = reading("teacher", layers=0)
    told = nets.run("teacher", batch)
    student = told["feats"][1], told["feats"][2:], told["attn"][2:]  # what the third layer reads is its embedding
    shapes = [[tuple(x.shape) for x in group] for group in (student[1], told["feats"], student[2], told["attn"])]
    loss = XtremeDistil(tuple(student[0].shape), tuple(told["tokens"].shape), *shapes)
    values = loss(student[0], told["tokens"], student[1], told["feats"], student[2], told["attn"])
    assert float(values.abs().max()) == 0.0


def test_closed_groups_have_no_gradient() -> None:
    nets, batch = reading("teacher", "student")
    method = Programme(program=({"match": ["kd"], "top": 1}, {"match": ["kd"], "top": 2}, {"match": ["ce"]}))
    method.setup(nets, batch)
    open_groups = []
    for stage, _ in enumerate(method.stages(nets, 6)):
        ((_, losses),) = list(method.step(nets, batch, Clock(0, 2, stage)))
        nets.student.zero_grad(set_to_none=True)
        next(iter(losses.values())).value.backward()  # type: ignore[union-attr]
        open_groups.append({k.split(".")[0] for k, p in nets.student.named_parameters() if p.grad is not None})
    assert open_groups[0] == {"norm", "head"} and open_groups[1] == {"norm", "head", "blocks"}
    assert open_groups[2] == {"norm", "head", "blocks", "embed", "places"}


def test_words_of_all_dimensions_are_turned_and_of_fewer_the_nearest() -> None:
    words = torch.randn(20, 6, dtype=torch.float64)
    whole = squeezed(words, 6)
    torch.testing.assert_close(whole @ whole.mT, words @ words.mT)
    turn = torch.linalg.lstsq(whole, words).solution
    torch.testing.assert_close(turn @ turn.mT, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(whole @ turn, words)
    values = torch.linalg.svdvals(words)
    left = (words @ words.mT - squeezed(words, 4) @ squeezed(words, 4).mT).norm()
    torch.testing.assert_close(left, (values[4:] ** 4).sum().sqrt())
    nets, _ = reading("teacher")
    small = build({"net": "text_encoder", "width": 4, "heads": 2, "length": 6}, vocab=12, classes=CLASSES)
    inherit_words(small, nets.teacher)
    torch.testing.assert_close(small.embed.weight, squeezed(word_embedding(nets.teacher).weight, 4))
    with pytest.raises(BadInput, match="the same words"):
        inherit_words(build({"net": "text_encoder"}, vocab=9, classes=2), nets.teacher)


def test_a_wrong_stage_is_refused() -> None:
    with pytest.raises(BadInput, match="pool"):
        Programme(program=({"match": ["ce"], "pol": "task"},))
    with pytest.raises(ValueError, match="match"):
        Programme(program=({"pool": "task"},))
    with pytest.raises(ValueError, match="top"):
        Programme(program=({"match": ["ce"], "top": -1},))


# ---------------------------------------------------------------- what is not seen, then what it is


def patched() -> tuple[Nets, dict[str, Tensor]]:
    """Two small vision transformers, the student the narrower one, and a batch."""
    sizes = {"teacher": 8, "student": 4}
    facts = {"classes": CLASSES, "channels": 1, "size": SIZE}
    nets = Nets(
        **{r: build({"net": "vit_tiny", "patch": 2, "width": w, "heads": 2}, **facts) for r, w in sizes.items()}
    )
    return nets, {"inputs": torch.randn(5, 1, SIZE, SIZE), "labels": torch.arange(5) % CLASSES}


def test_g2sd_is_the_loss_of_its_authors() -> None:
    told = json.loads((Path(__file__).parent / "vectors/g2sd.json").read_text())["generic"]
    mine, aim = (torch.tensor(told[name], dtype=torch.float64) for name in ("told", "aim"))
    mine.requires_grad_(True)
    value = apart(mine, aim, torch.tensor(told["shown"])).mean()
    assert abs(value.item() - told["value"]) < 1e-9
    (grad,) = torch.autograd.grad(value, mine)
    torch.testing.assert_close(grad, torch.tensor(told["grad"], dtype=torch.float64), atol=1e-7, rtol=0)
    assert abs(apart(mine, aim, None).mean().item() - told["everywhere"]) < 1e-9
    torch.testing.assert_close(apart(mine, 7 * aim + 3, None), apart(mine, aim, None), atol=1e-4, rtol=1e-4)
    assert float(apart(F.layer_norm(aim, (5,), eps=1e-6), aim, torch.tensor(told["shown"])).max()) == 0.0


def test_student_and_teacher_see_the_same_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    nets, batch = patched()
    method, shown = G2SD(decoder_width=8, decoder_heads=2, teacher_width=8, teacher_heads=2), []
    method.setup(nets, batch)
    entered: dict[str, Tensor] = {}
    for role in ("student", "teacher"):
        block = nets.find(role).blocks[0]
        block.register_forward_hook(lambda _m, inputs, _o, role=role: entered.update({role: inputs[0].shape[1]}))
    seen = G2SD.seen

    def watched(self: G2SD, nets: Nets, player: str, batch: dict[str, Any], places: Tensor) -> Tensor:
        shown.append((player, places))
        return seen(self, nets, player, batch, places)

    monkeypatch.setattr(G2SD, "seen", watched)
    ((player, losses),) = list(method.step(nets, batch, Clock(0, 4, 1)))
    assert player == "student" and float(losses["generic"]) > 0  # type: ignore[index, arg-type]
    assert [name for name, _ in shown] == ["student", "teacher"] and torch.equal(shown[0][1], shown[1][1])
    assert entered == {"student": 2, "teacher": 2}  # a quarter of nine patches
    losses["generic"].value.backward()  # type: ignore[index, union-attr]
    assert all(p.grad is None for p in nets.decoder.parameters())


def test_the_teachers_decoder_comes_first_and_then_rests() -> None:
    nets, batch = patched()
    method = G2SD(decoder_width=8, decoder_heads=2, teacher_width=8, teacher_heads=2, before=0.5, share=0.25)
    done = fit(method, nets, endless(batch), Plan(8, log_every=1))
    assert [player for _, _, player, _ in done.turns] == ["decoder"] * 4 + ["student"] * 8
    assert [stage for stage, _, _, _ in done.turns] == [0] * 4 + [1] * 2 + [2] * 6
    assert nets.is_frozen("decoder")


# ---------------------------------------------------------------- the assistant is chosen


def test_a_narrowed_network_is_the_one_cut_out_of_it() -> None:
    nets, batch = patched()
    assert inner(nets.teacher)["blocks.0.down"] == "blocks.0.up"
    masks = ranked(nets.teacher, 0.3)
    alone = cut(nets.teacher, masks)
    with narrowed(nets.teacher, masks):
        inside = nets.teacher(batch["inputs"])["logits"]
    torch.testing.assert_close(inside, alone(batch["inputs"])["logits"])
    assert not torch.allclose(inside, nets.teacher(batch["inputs"])["logits"])
    assert alone.blocks[0].down.in_features == round(0.3 * nets.teacher.blocks[0].down.in_features)
    assert all((masks[path] <= wider).all() for path, wider in ranked(nets.teacher, 0.6).items())
    with pytest.raises(BadInput, match="no inner units"):
        inner(Chain(4))


def test_the_choice_is_by_the_slope_and_not_by_the_level_of_scores() -> None:
    scores, sizes = torch.tensor([0.5, 0.80, 0.84, 0.9]), torch.tensor([20, 40, 80, 100])
    wanted = [-(0.9 - 0.5) / 0.8, -(0.9 - 0.8) / 0.6, -(0.9 - 0.84) / 0.2]
    torch.testing.assert_close(slopes(scores, sizes), torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(slopes(scores + 5, sizes), slopes(scores, sizes), atol=1e-5, rtol=0)
    assert int(slopes(scores, sizes).argmax()) == 1


def test_candidates_are_scored_on_what_they_have_not_learned() -> None:
    labels = torch.tensor([0, 1, -100, 2, 0, 1, 2, 0, 1, 2, 0])
    pools = AMD(held=0.2).pools(labels)
    assert len(pools["held"]) == 2 and (labels[pools["held"]] >= 0).all() and len(pools["all"]) == 11
    assert sorted([*pools["held"].tolist(), *pools["learned"].tolist()]) == list(range(11))
    labels = torch.arange(200) % 10  # a fifth of what lies in order is of all classes
    assert len(labels[AMD(held=0.2).pools(labels)["held"]].unique()) == 10
    assert len(AMD(held=0.2).pools(labels[:3])["held"]) == 1


def test_every_stage_of_amd_has_a_part_of_the_time() -> None:
    nets, batch = patched()
    method = AMD(match=("ce",))
    method.setup(nets, batch)
    until = [0.0, *[stage.until for stage in method.stages(nets, 6)]]
    assert all(a < b for a, b in pairwise(until))


def test_one_candidate_is_the_assistant_of_takd() -> None:
    losses = ({"ce": 0.1}, {"kd": {"temperature": 2.0, "weight": 0.9}})
    nets, batch = patched()
    start = copied(nets.student)
    fit(AMD(match=losses, scales=(0.5,), looks=1), nets, dict.fromkeys(("learned", "held", "all"), Again(batch)), PLAN)
    found = copied(nets.student)
    nets.student.load_state_dict(start)
    candidates = Candidates(nets.teacher, (0.5,))
    assistant = cut(nets.teacher, candidates.masks(0))
    other = Nets(teacher=nets.teacher, student=nets.student, assistants=nn.ModuleList([assistant]))
    fit(TAKD(match=losses), other, Again(batch), PLAN)
    for name, value in found.items():
        torch.testing.assert_close(other.student.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    assert moved(start, other.student)


PLAN = Plan(3, optimizer={"sgd": {"lr": 0.1}})


class Again:
    """The batch, again and again, as often as one asks."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return endless(self.batch)
