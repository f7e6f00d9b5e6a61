"""Facts that the papers state of masked distillation, distillation across tasks and distilled generators.

See the `invariants` of their catalogue rows.
"""

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.conformance import toys
from limbeck.core.errors import BadInput
from limbeck.core.graft import Grafted
from limbeck.core.loop import Clock, Plan, fit
from limbeck.core.masked import Decoder, covered, draw, only, patchify, pick, sides, unseen
from limbeck.core.nets import Nets
from limbeck.core.prototypes import Bank, Guide, assign
from limbeck.train.gans.dcd_gan import DCDGAN, hinge, texture
from limbeck.train.masked.dmae import DMAE, apart
from limbeck.train.masked.dmjd import DMJD, disjoint, visible
from limbeck.train.plain.proc_kd import ProCKD
from limbeck.zoo import nets as zoo
from tests.numbers import vector

B = 6


pytestmark = pytest.mark.usefixtures("double")


def alike(found: Any, wanted: Any, **tolerance: float) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.get_default_dtype())
    given = torch.as_tensor(found, dtype=torch.get_default_dtype()).detach()
    torch.testing.assert_close(given, wanted, **{"rtol": 1e-9, "atol": 1e-12, **tolerance})


def pictures(side: int = 8) -> dict[str, Tensor]:
    return {"inputs": torch.randn(B, 1, side, side), "labels": torch.arange(B) % 4, "index": torch.arange(B)}


def vits(**student: int) -> Nets:
    facts = {"classes": 4, "channels": 1, "size": 8}
    sizes = {"width": 8, "heads": 2, "layers": 4, **student}
    teacher = zoo.build({"net": "vit_tiny", "width": 12, "heads": 2, "layers": 8}, **facts)
    return Nets(student=zoo.build({"net": "vit_tiny", **sizes}, **facts), teacher=teacher)


# ---- masked pictures


def test_hidden_patches_enter_nowhere() -> None:
    nets, batch = vits(), pictures()
    shown = draw(B, 16, 5, torch.device("cpu"))
    assert shown.shape == (B, 5) and all(len(set(row.tolist())) == 5 for row in shown)
    noise = torch.randn(B, 16, 4) * covered(shown, 16).unsqueeze(-1)
    other = F.fold(noise.mT, (8, 8), (2, 2), stride=(2, 2))
    with only(nets.teacher, "blocks.0", shown, 16):
        before = nets.run("teacher", batch)["feats"]
        after = nets.run("teacher", {"inputs": batch["inputs"] + other})["feats"]
    for one, two in zip(before, after, strict=True):
        assert one.shape[1] == 5
        assert torch.equal(one, two)
    assert nets.run("teacher", batch)["feats"][0].shape[1] == 16


def test_picked_patches_keep_what_comes_before_them() -> None:
    tokens = torch.arange(2 * 5.0).view(2, 5, 1)
    alike(pick(tokens, torch.tensor([[3, 0], [1, 2]]), 4).squeeze(2), [[0, 4, 1], [5, 7, 8]])
    assert covered(torch.tensor([[3, 0]]), 4).tolist() == [[False, True, True, False]]


def test_patches_are_numbered_row_by_row() -> None:
    picture = torch.arange(16.0).view(1, 1, 4, 4)
    alike(patchify(picture, 2)[0], [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])


def test_a_decoder_tells_a_patch_from_its_own_token_and_place() -> None:
    decoder = Decoder(3, 4, 5, inner=4, depth=0, heads=1)
    tokens = torch.randn(2, 3, 3)  # a class token, and two patches
    shown = torch.tensor([[2, 0], [1, 3]])
    told = decoder(tokens, shown)
    alike(told[0, 2], decoder.leave(decoder.enter(tokens[0, 1]) + decoder.places[2]))
    alike(told[1, 3], decoder.leave(decoder.enter(tokens[1, 2]) + decoder.places[3]))
    alike(told[0, 1], decoder.leave(decoder.blank + decoder.places[1]))


def test_masking_refuses_networks_without_patches() -> None:
    nets, batch = Nets(student=zoo.build("resnet8", classes=4, channels=1, size=8)), pictures()
    with pytest.raises(BadInput, match="square pictures"):
        sides(nets, "student", "blocks.1", batch)


# ---- dmae


def test_dmae_is_that_of_the_authors() -> None:
    given = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in vector("dmae", "masked").items()}
    told = given["told"].requires_grad_()
    ours = told.unflatten(2, (2, 2, 3)).permute(0, 1, 4, 2, 3).flatten(2)  # a pixel's channels lie together there
    pixels = unseen(ours, patchify(given["pictures"], math.isqrt(ours.shape[1])), given["shown"]).mean()
    alike(pixels, given["pixels"])
    alike(torch.autograd.grad(pixels, told)[0], given["pixels_grad"], rtol=1e-7)
    linear, student = nn.Linear(3, 4), given["student"].requires_grad_()
    linear.load_state_dict({k: torch.tensor(v) for k, v in given["projector"].items()})
    features = apart(linear(student), given["teacher"]).mean()
    alike(features, given["features"])
    alike(torch.autograd.grad(features, student)[0], given["features_grad"], rtol=1e-7)


def test_dmae_shows_both_networks_the_same_patches() -> None:
    nets, batch, seen = vits(), pictures(), {}
    for player in ("student", "teacher"):
        embed = nets.find(player).patches
        embed.register_forward_hook(lambda _m, _i, out: torch.zeros_like(out))
        nets.find(player).places.data = torch.arange(16.0).view(1, 16, 1).expand(1, 16, embed.out_channels).clone()
        nets.find(player).blocks[0].norm1.register_forward_pre_hook(
            lambda _m, inputs, player=player: seen.setdefault(player, []).append(inputs[0][..., 0].round().long())
        )
    method = DMAE(hidden=0.75)
    method.setup(nets, batch)
    seen.clear()
    list(method.step(nets, batch, Clock(0, 2)))
    ((student,), (teacher,)) = seen["student"], seen["teacher"]
    assert student.shape == (B, 4) and torch.equal(student, teacher)
    assert len({tuple(sorted(row.tolist())) for row in student}) > 1


def test_dmae_features_are_0_apart_when_parallel() -> None:
    teacher = torch.randn(B, 5, 7)
    alike(apart(teacher * torch.rand(B, 5, 1), teacher), torch.zeros(B))
    assert (apart(-teacher, teacher) > 0.1).all()


def test_dmae_compares_at_three_quarters_of_the_depth_and_drops_its_helpers() -> None:
    feats = [torch.full((1,), float(i)) for i in range(24)]
    assert DMAE().at_depth(feats) == 17 and DMAE().at_depth(feats[:12]) == 8
    nets, batch = vits(), pictures()
    fit(DMAE(), nets, [batch] * 4, Plan(4))
    assert set(nets.pretext) == {"decoder", "projector"} and not list(nets.losses)
    assert not any(p.requires_grad or p.grad is not None for p in nets.teacher.parameters())
    assert nets.companions["student"] == ["losses"]
    assert not any(layer._forward_pre_hooks for layer in nets.student.modules())


def test_dmae_without_weight_asks_no_teacher() -> None:
    nets, batch = vits(), pictures()
    alone = Nets(student=nets.student)
    fit(DMAE(weight=0.0), alone, [batch] * 4, Plan(4))
    assert set(alone.pretext) == {"decoder"}


def test_dmae_refuses_a_teacher_of_other_patches() -> None:
    with pytest.raises(BadInput, match="2 x 2 patches, the teacher 4 x 4"):
        DMAE().setup(vits(patch=4), pictures())


# ---- proc_kd


def guide() -> tuple[Guide, dict[str, Any]]:
    given = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in vector("proc_kd", "guide").items()}
    neck = Guide(2, 3, 4, given["temperature"])
    with torch.no_grad():
        neck.ask.weight.copy_(given["ask"][..., None, None])
        neck.ask.bias.copy_(given["ask_bias"])  # type: ignore[union-attr]
        neck.answer.weight.copy_(given["answer"][..., None, None])
        neck.prototypes.copy_(given["prototypes"])
    return neck, given


def test_proc_kd_reads_prototypes_as_worked_by_hand() -> None:
    neck, given = guide()
    maps = given["maps"].requires_grad_()
    gap, augmented = neck(maps)
    alike(augmented, given["augmented"])
    alike(neck.looks(neck.ask(maps)), given["looks"])
    alike(neck.looks(neck.ask(maps)).sum(1), torch.ones(2, 2, 2))
    asked = gap.square().mean()
    alike(asked, given["asked"])
    alike(torch.autograd.grad(asked, maps)[0], given["asked_grad"], rtol=1e-7, atol=1e-9)


def test_proc_kd_bank_is_worked_by_hand() -> None:
    _, given = guide()
    told = vector("proc_kd", "bank")
    bank, features = Bank(4, 3), torch.tensor(told["features"])
    with torch.no_grad():
        bank.prototypes.copy_(given["prototypes"])
    assert assign(features.flatten(0, 1), bank.prototypes).view(2, 3).tolist() == told["nearest"]
    distances = bank(features).mean(1)
    alike(distances, told["distances"])
    alike(torch.autograd.grad(distances.mean(), bank.prototypes)[0], told["grad"])


def test_proc_kd_assignment_does_not_see_a_common_shift() -> None:
    features, prototypes = torch.randn(50, 3), torch.randn(6, 3)
    near = assign(features, prototypes)
    assert torch.equal(near, assign(features + 7.0, prototypes + 7.0)) and len(near.unique()) > 3
    assert not torch.equal(near, assign(features + 7.0, prototypes))


def test_proc_kd_without_prototypes_is_the_plain_student_and_then_it_is_not() -> None:
    nets, batch = vits(), pictures()
    plain = nets.student(batch["inputs"])["logits"]
    method = ProCKD(prototypes=5)
    method.setup(nets, batch)
    assert len(nets.bank.prototypes.unique(dim=0)) == 5
    alike(nets.student(batch["inputs"])["logits"], plain)
    nets.student.neck.prototypes.copy_(torch.randn(5, 12))
    assert (nets.student(batch["inputs"])["logits"] - plain).abs().max() > 1e-3


def test_proc_kd_moves_nobody_but_the_bank_first_and_keeps_it_then() -> None:
    nets, batch = vits(), pictures()
    start = {k: v.clone() for k, v in nets.student.state_dict().items()}
    method = ProCKD(prototypes=5, pretraining=1.0)
    fit(method, nets, [batch] * 2, Plan(1))
    bank = nets.bank.prototypes.detach()
    assert torch.equal(nets.student.neck.prototypes, bank) and not bank.requires_grad
    assert not torch.equal(nets.student.body.patches.weight, start["patches.weight"])
    assert "prototypes" not in dict(nets.student.neck.named_parameters())


@pytest.mark.parametrize("student", ["vit_tiny", "resnet8", "mlp"])
def test_a_guided_student_is_built_again_from_words(student: str) -> None:
    facts = {"classes": 4, "channels": 1, "size": 8}
    nets = Nets(student=zoo.build(student, **facts), teacher=zoo.build("resnet8", classes=7, channels=1, size=8))
    batch = pictures()
    fit(ProCKD(prototypes=3), nets, [batch] * 3, Plan(3))
    again = Grafted.from_spec(zoo.build(student, **facts), json.loads(json.dumps(nets.student.spec())))
    again.load_state_dict(nets.student.state_dict())
    alike(again.eval()(batch["inputs"])["logits"], nets.student.eval()(batch["inputs"])["logits"])


def test_proc_kd_needs_the_teacher_itself() -> None:
    with pytest.raises(BadInput, match="the teacher itself"):
        ProCKD().setup(Nets(student=vits().student), pictures())


# ---- dcd_gan


class Judge(nn.Module):
    """The discriminator of the vector: one inner feature, and a map of verdicts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, 1, 1))

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        inner = self.layers[:2](inputs)
        return {"logits": self.layers[2](inner), "feats": [inner]}


class Made(nn.Module):
    """Gives the features of the vector."""

    def __init__(self, feats: list[Tensor]) -> None:
        super().__init__()
        self.feats = nn.ParameterList(feats)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        return {"logits": inputs, "feats": [1.0 * f for f in self.feats]}


PAIRS = dict.fromkeys(("inputs", "labels"), torch.zeros(3, 1, 4, 4))


def cooperating() -> tuple[Nets, dict[str, Any]]:
    given = vector("dcd_gan", "cooperated")
    student, wide = ([torch.tensor(f) for f in given[k]] for k in ("student", "wide"))
    nets = Nets(student=Made(student), generator=Made(wide), discriminator=Judge())
    nets.discriminator.layers.load_state_dict({k: torch.tensor(v) for k, v in given["discriminator"].items()})
    DCDGAN(style=0, perceptual=0).setup(nets, PAIRS)
    for who, states in given["connectors"].items():
        for one, state in zip(nets.connectors[who], states, strict=True):
            one.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    return nets, given


def test_dcd_gan_asks_the_discriminator_as_the_authors_do() -> None:
    nets, given = cooperating()
    student, wide = (nets.run(k, {"inputs": torch.zeros(1)})["feats"] for k in ("student", "generator"))
    value = DCDGAN().cooperated(nets, student, wide).mean()
    alike(value, given["value"])
    for found, wanted in zip(torch.autograd.grad(value, list(nets.student.feats)), given["grad"], strict=True):
        alike(found, wanted, rtol=1e-7, atol=1e-10)


def test_dcd_gan_is_0_when_connectors_say_the_same() -> None:
    nets, _ = cooperating()
    feats = [torch.randn(3, 3, 4, 4), torch.randn(3, 2, 4, 4)]
    nets.connectors["generator"] = nets.connectors["student"]
    alike(DCDGAN().cooperated(nets, feats, feats), torch.zeros(3))
    assert (DCDGAN().cooperated(nets, feats, [f + torch.randn_like(f) for f in feats]) > 1e-3).all()


def test_dcd_gan_textures_and_hinge_are_those_of_the_authors() -> None:
    given = vector("dcd_gan", "texture")
    maps, wide = torch.tensor(given["student"]).requires_grad_(), torch.tensor(given["wide"])
    value = (texture(maps) - texture(wide)).abs().mean()
    alike(value, given["value"])
    alike(torch.autograd.grad(value, maps)[0], given["grad"], rtol=1e-7)
    order = torch.randperm(8)
    alike(texture(maps.flatten(2)[..., order].view_as(maps)), texture(maps))
    said = vector("dcd_gan", "hinge")
    fake, real = (torch.tensor(said[k]) for k in ("fake", "real"))
    alike(0.5 * (hinge(-fake) + hinge(real)).mean(), said["discriminator"])


def test_dcd_gan_student_learns_through_a_discriminator_that_stays() -> None:
    made = toys.place(DCDGAN(perceptual=100.0), "gans", steps=3)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in next(made.data).items()}
    made.method.setup(made.nets, batch)
    turns = []
    for player, parts in made.method.step(made.nets, batch, Clock(1, 3)):
        turns.append((player, parts))
    ((_, parts),) = [t for t in turns if t[0] == "student"]
    assert set(parts) == {"style", "perceptual", "cooperated", "gan"}
    wide = list(made.nets.generator.parameters())
    for name, part in parts.items():
        mine = list(made.nets.student.parameters())
        grads = torch.autograd.grad(part.value, mine, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.any() for g in grads), name
        assert not any(
            g is not None for g in torch.autograd.grad(part.value, wide, retain_graph=True, allow_unused=True)
        )


def test_dcd_gan_student_steps_leave_the_discriminator_and_the_wide_generator_as_they_were() -> None:
    made = toys.place(DCDGAN(perceptual=100.0, every=10), "gans", steps=4)
    after: dict[int, dict[str, Tensor]] = {}
    weights = lambda: {
        f"{who}.{k}": v.detach().clone()
        for who in ("discriminator", "generator", "student")
        for k, v in made.nets.find(who).named_parameters()
    }
    fit(made.method, made.nets, made.data, made.plan, on_event=lambda event: after.update({event["t"]: weights()}))
    for key, value in after[0].items():
        assert torch.equal(value, after[3][key]) != key.startswith("student"), key


def test_dcd_gan_says_what_is_missing() -> None:
    nets = Nets(student=Made([torch.zeros(1, 2, 4, 4)]), generator=Made([]), discriminator=Judge())
    with pytest.raises(BadInput, match="`features`"):
        DCDGAN().setup(nets, PAIRS)
    with pytest.raises(BadInput, match="the student has 1, the generator 0"):
        DCDGAN(style=0, perceptual=0).setup(nets, PAIRS)


# ---- dmjd


def test_dmjd_is_that_of_the_authors() -> None:
    given = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in vector("dmjd", "masked").items()}
    told, seen = given["told"].requires_grad_(), given["visible"].requires_grad_()
    targets = torch.cat([given["targets"]] * 2)
    dark = unseen(told, targets, given["shown"]).mean()
    alike(dark, given["hidden"])
    both = dark + visible(seen, targets, given["shown"]).mean()
    alike(both, given["both"])
    for found, wanted in zip(torch.autograd.grad(both, [told, seen]), ("told_grad", "visible_grad"), strict=True):
        alike(found, given[wanted], rtol=1e-7)


def test_dmjd_views_of_one_half_are_complementary() -> None:
    one, other = disjoint(draw(B, 16, 16, torch.device("cpu")), 0.5, 1.0)
    assert torch.equal(covered(one, 16), ~covered(other, 16))


@pytest.mark.parametrize(
    ("hidden", "predicted", "again"), [(0.6, 1.0, 0), (0.75, 1.0, 0), (0.6, 0.6, 6), (0.3, 1.0, 7)]
)
def test_dmjd_views_hide_as_many_and_first_what_was_shown(hidden: float, predicted: float, again: int) -> None:
    one, other = (covered(v, 16) for v in disjoint(draw(B, 16, 16, torch.device("cpu")), hidden, predicted))
    assert len({int(n) for n in torch.cat([one, other]).sum(1)}) == 1
    assert ((~one & ~other).sum(1) == again).all()  # shown by both


def test_dmjd_is_0_when_shown_patches_tell_their_targets() -> None:
    targets, shown = torch.randn(B, 9, 5), draw(B, 9, 4, torch.device("cpu"))
    own = torch.stack([t[s] for t, s in zip(targets, shown, strict=True)])
    alike(visible(own, targets, shown), torch.zeros(B))
    alike(unseen(torch.where(covered(shown, 9).unsqueeze(2), targets, 9.0), targets, shown), torch.zeros(B))
    assert (visible(own.flip(1), targets, shown) > 1e-3).all()


def test_dmjd_takes_what_the_teacher_sees_in_the_whole_picture() -> None:
    nets, batch = vits(), pictures()
    method = DMJD()
    method.setup(nets, batch)
    wanted = nets.run("teacher", batch)["feats"][-1]
    found = method.targets(nets, batch, 4)
    alike(found.mean(2), torch.zeros(B, 16), atol=1e-9)
    alike(found, (wanted - wanted.mean(2, keepdim=True)) / (wanted.var(2, correction=0, keepdim=True) + 1e-5).sqrt())
    alone = Nets(student=nets.student)
    fit(DMJD(target="pixels"), alone, [batch] * 4, Plan(4))
    assert set(alone.pretext) == {"decoder", "shown"}
