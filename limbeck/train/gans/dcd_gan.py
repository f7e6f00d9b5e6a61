"""A wide generator learns beside a small one; the discriminator says by which inner features the two still differ."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.adversarial import check_pictures, hinge, shown, verdict
from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import per_example
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import gram, pair, upcast
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import Part, mean


@method(
    paper="Hu et al. 2022, section 3",
    year=2022,
    arxiv="2212.14169",
    code="poopit/DCD-official@3dbc87b:distillers/pix2pixbest_distiller.py",
    differs="as in the paper the student also tries to fool the discriminator (`gan`); the code for pairs computes it "
    "but adds it nowhere, the code without pairs asks of the teacher's picture. The discriminator moves before the "
    "wide generator's loss is taken, in the code with it",
)
@dataclass(frozen=True)
class DCDGAN:
    """student: weight sum_l mean |a(D(c_S,l)) - a(D(c_T,l))| + style sum_l mean |Gram_l(s) - Gram_l(t)| + perceptual
    mean |phi(s) - phi(t)| - gan mean D(s), where student and wide generator make pictures s and t of one input.

    c_S,l and c_T,l are the generators' l-th features, brought to the channels that D reads by a 1x1 convolution, batch
    norm and ReLU each, trained with the student and dropped; a is an inner feature of D. Before, D learns to tell t
    from real pictures by the hinge loss, and the wide generator minimises -adversarial mean D(t) + pixels |t - real|.

    weight, gan: of the student's first and last part, >= 0.
    style, perceptual: of what the network `features` sees, >= 0.
    layer: which of its features is phi, counted from shallow (0) or from deep (-1).
    adversarial, pixels: of the wide generator's two parts, >= 0.
    inner: which of D's features is a, counted likewise.
    every: student steps for each step of D and the wide generator, >= 1; the code's n_dis, 1 to 4.
    paired: whether D sees the input beside the picture, which must then be as large.

    *Needs*: batches whose `labels` are pictures [B, C, H, W]; nets.student and nets.generator with as many `feats`;
        nets.discriminator, convolutional, with `feats`; nets.features, a classifier with `feats`, which stays as it is.
    *Relates to*: `pix2pix` is how the wide generator learns, and a small one would alone. `fitnets` in `distill`
        compares such features without asking anybody how they look.
    """

    weight: float = 1.0
    gan: float = 1.0
    style: float = 10.0
    perceptual: float = 1e4
    layer: int = 1
    adversarial: float = 1.0
    pixels: float = 100.0
    inner: int = -1
    every: int = 1
    paired: bool = True

    def __post_init__(self) -> None:
        for name in ("weight", "gan", "style", "perceptual", "adversarial", "pixels"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        require(self.every >= 1, "every", self.every, ">= 1")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The code's, for all."""
        adam = {"adam": {"lr": 2e-4, "betas": [0.5, 0.999]}}
        return dict.fromkeys(("discriminator", "generator", "student"), adam)

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check the networks on one batch, and build the connectors."""
        if (self.style or self.perceptual) and "features" not in nets:
            raise BadInput("`style` and `perceptual` need a network `features`: name one, or set both to 0")
        nets.freeze(*(name for name in nets if name == "features"))
        for who in ("student", "generator"):
            check_pictures(nets, who, probe)
        with torch.no_grad(), evaluating(*nets.modules.values()):
            student, wide = nets.run("student", probe), nets.run("generator", probe)
            read = shown(probe["inputs"], wide["logits"], self.paired).shape[1]
        if (ours := len(student["feats"])) != (theirs := len(wide["feats"])):
            raise BadInput(f"`dcd_gan` pairs features: the student has {ours}, the generator {theirs}; tap as many")
        nets.connectors = nn.ModuleDict()
        for who, out in (("student", student), ("generator", wide)):
            nets.connectors[who] = nn.ModuleList(connector(f.shape[1], read) for f in out["feats"])
        nets.companions["student"] = ["connectors"]

    def cooperated(self, nets: Nets, student: list[Tensor], wide: list[Tensor]) -> Tensor:
        """sum_l mean |a(D(c_S,l)) - a(D(c_T,l))|: [B]."""
        apart = []
        for layer, (mine, aim) in enumerate(zip(student, wide, strict=True)):
            read = nets.connectors["student"][layer](mine), nets.connectors["generator"][layer](aim.detach())
            one, other = pair(*(nets.run("discriminator", {"inputs": c})["feats"][self.inner] for c in read))
            apart.append(per_example((one - other).abs()))
        return torch.stack(apart).sum(0)

    def seen(self, nets: Nets, mine: Tensor, aim: Tensor, mask: Tensor | None) -> dict[str, Part]:
        """How differently the frozen network sees two pictures."""
        ours, theirs = (nets.run("features", {"inputs": x}, through=True)["feats"] for x in (mine, aim))
        parts = {}
        if self.style:
            apart = [per_example((texture(a) - texture(b)).abs()) for a, b in zip(ours, theirs, strict=True)]
            parts["style"] = self.style * mean(torch.stack(apart).sum(0), mask)
        if self.perceptual:
            one, other = pair(ours[self.layer], theirs[self.layer])
            parts["perceptual"] = self.perceptual * mean(per_example((one - other).abs()), mask)
        return parts

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of the discriminator and of the wide generator now and then, then one of the student."""
        inputs, real, mask = batch["inputs"], batch["labels"], batch.get("mask")
        wide = nets.run("generator", batch)
        made: Tensor = wide["logits"]
        if clock.t % self.every == 0:
            fake, true = (verdict(nets, inputs, p, self.paired) for p in (made.detach(), real))
            yield "discriminator", 0.5 * mean(hinge(-fake) + hinge(true), mask)
            fooled = per_example(verdict(nets, inputs, made, self.paired))
            pixels = mean(per_example((upcast(made) - real).abs()), mask)
            yield "generator", {"adversarial": -self.adversarial * mean(fooled, mask), "pixels": self.pixels * pixels}
        small = nets.run("student", batch)
        parts = self.seen(nets, small["logits"], made.detach(), mask) if self.style or self.perceptual else {}
        if self.weight:
            parts["cooperated"] = self.weight * mean(self.cooperated(nets, small["feats"], wide["feats"]), mask)
        if self.gan:
            fooled = per_example(verdict(nets, inputs, small["logits"], self.paired))
            parts["gan"] = -self.gan * mean(fooled, mask)
        yield "student", parts


def connector(width: int, out: int) -> nn.Module:
    """A 1x1 convolution, batch norm and ReLU."""
    convolution = nn.Conv2d(width, out, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())


def texture(maps: Tensor) -> Tensor:
    """Products of the channels of maps [B, C, H, W], summed over places, over C H W: [B, C, C]."""
    return gram(maps.flatten(2)) / maps[0].numel()
