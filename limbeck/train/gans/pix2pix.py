"""A network learns to make pictures of pictures, by the pixels that are wanted and by whom it cannot fool."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from limbeck.core.adversarial import check_pictures, hinge, verdict
from limbeck.core.card import method, require
from limbeck.core.features import per_example
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean


@method(
    paper="Isola et al. 2017, section 3",
    year=2017,
    arxiv="1611.07004",
    differs="the hinge loss, as in code that compresses such networks, not cross-entropy; no dropout as noise. The "
    "discriminator moves before the student's loss is taken",
)
@dataclass(frozen=True)
class Pix2Pix:
    """student: -adversarial mean D(s) + pixels mean |s - real|, where it makes a picture s of an input.

    Before, the discriminator D minimises half the mean of max(0, 1 + D(s)) and of max(0, 1 - D(real)). No teacher: what
    a small network comes to by itself.

    adversarial, pixels: of the student's two parts, >= 0.
    paired: whether D sees the input beside the picture, which must then be as large.

    *Needs*: batches whose `labels` are pictures [B, C, H, W]; nets.discriminator, convolutional.
    *Relates to*: `dcd_gan` learns the same from a wide network that learns so.
    """

    adversarial: float = 1.0
    pixels: float = 100.0
    paired: bool = True

    def __post_init__(self) -> None:
        for name in ("adversarial", "pixels"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The paper's, for both."""
        adam = {"adam": {"lr": 2e-4, "betas": [0.5, 0.999]}}
        return {"discriminator": adam, "student": adam}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check on one batch what the student makes."""
        check_pictures(nets, "student", probe)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of the discriminator, then one of the student."""
        inputs, real, mask = batch["inputs"], batch["labels"], batch.get("mask")
        made = nets.run("student", batch)["logits"]
        fake, true = (verdict(nets, inputs, p, self.paired) for p in (made.detach(), real))
        yield "discriminator", 0.5 * mean(hinge(-fake) + hinge(true), mask)
        parts = {"pixels": self.pixels * mean(per_example((upcast(made) - real).abs()), mask)}
        if self.adversarial:
            fooled = per_example(verdict(nets, inputs, made, self.paired))
            parts["adversarial"] = -self.adversarial * mean(fooled, mask)
        yield "student", parts
