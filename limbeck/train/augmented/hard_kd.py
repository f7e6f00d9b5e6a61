"""A network changes pictures until student and teacher disagree while the teacher stays itself; the student follows."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.bank import everyone
from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import kl
from limbeck.core.mixing import pictures
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import classes
from limbeck.core.reduce import mean
from limbeck.core.warping import Affine, Autoencoder, Edit


class Phase(nn.Module):
    """Whose turn it is, for how many steps now, and how far student and teacher were apart when last looked at."""

    searching: Tensor
    since: Tensor
    gap: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("searching", torch.tensor(False))
        self.register_buffer("since", torch.tensor(0))
        self.register_buffer("gap", torch.tensor(torch.inf))


@method(
    paper="Nix et al. 2023, section 3",
    year=2023,
    arxiv="2305.14890",
    differs="no official code; limits, weights and thresholds are chosen here, and `patience` ends a phase whose "
    "threshold is not reached. The generative model is a small variational autoencoder trained first on the same "
    "data, in place of a very deep one, and what its decoder changes is added to the picture",
)
@dataclass(frozen=True)
class HardKD:
    """Student: D(t(x), s(x)) + D(t(x'), s(x')). Augmentor: -D(t(x'), s(x')) + valid D(t(x), t(x')). x' = a(x, noise).

    D = T^2 KL from the first to the second at T. The student learns until D(t(x'), s(x')) < low, then the augmentor
    until it is > high, and so on; the gradient of the augmentor goes through both frozen networks.

    temperature: T > 0.
    valid: weight of what keeps the teacher's answer, >= 0; below about 1 the augmentor destroys pictures.
    low, high: thresholds in nats, 0 <= low <= high.
    patience: longest phase in steps, >= 1.
    edits: "affine", moves, turns and scales for each picture, or "latent", moves of its code in an autoencoder.
    shift, turn, zoom: limits of "affine": part of the side, radians, logarithm of the scale; >= 0.
    latent: numbers of a code, >= 1.

    *Needs*: nets.teacher at hand, pictures; for "latent" sides that are even; it begins with a stage for that network.
    *Relates to*: where the teacher knows of an invariance that the data do not show. The augmentor is dropped.
    *Differs*: see the card.
    """

    temperature: float = 1.0
    valid: float = 1.0
    low: float = 0.1
    high: float = 0.5
    patience: int = 20
    edits: Literal["affine", "latent"] = "affine"
    shift: float = 0.25
    turn: float = 0.5
    zoom: float = 0.25
    latent: int = 16

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(0 <= self.low <= self.high, "low", self.low, f"in [0, high], high {self.high}")
        require(self.patience >= 1, "patience", self.patience, ">= 1")
        require(self.edits in ("affine", "latent"), "edits", self.edits, "affine or latent")
        for name in ("valid", "shift", "turn", "zoom"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        require(self.latent >= 1, "latent", self.latent, ">= 1")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """Those of the networks that are dropped."""
        adam = {"adam": {"lr": 2e-3}}
        return {"augmentor": adam} if self.edits == "affine" else {"augmentor": adam, "painter": adam}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Build the augmentor for these pictures."""
        if "teacher" not in nets:
            raise BadInput("`hard_kd` asks the teacher about pictures made in each step: give the teacher, not a store")
        channels, height, width = pictures(probe, "hard_kd").shape[1:]
        if self.edits == "latent" and (height % 2 or width % 2):
            raise BadInput(f"edits: latent needs pictures with even sides, and these are {height} x {width}")
        classes(nets, probe, "hard_kd")
        nets.phase = Phase()
        if self.edits == "affine":
            nets.augmentor = Affine(channels, self.shift, self.turn, self.zoom)
            return
        nets.painter = Autoencoder((channels, height, width), self.latent)
        nets.augmentor = Edit(self.latent)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The painter first where there is one; then student and augmentor."""
        if "painter" in nets:
            yield Stage(steps, "painter", until=0.3, validated=False)
            nets.freeze("painter")
        yield Stage(steps, "search")

    def change(self, nets: Nets, images: Tensor) -> Tensor:
        """x' [B, C, H, W]."""
        out: Tensor = nets.augmentor(images, nets.painter) if "painter" in nets else nets.augmentor(images)
        return out

    def apart(self, first: Tensor, second: Tensor) -> Tensor:
        """D for each example, with gradient to both: [B, C] x 2 -> [B]."""
        return self.temperature**2 * kl(second, first, self.temperature)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of whoever's phase it is."""
        mask, searching = batch.get("mask"), bool(nets.phase.searching)
        if "painter" in nets and not nets.is_frozen("painter"):
            error, code = nets.painter(batch["inputs"])
            yield "painter", {"error": mean(error, mask), "code": mean(code, mask)}
            return
        with nullcontext() if searching else torch.no_grad():
            changed = {"inputs": self.change(nets, batch["inputs"])}
        told, again = nets.run("teacher", batch)["logits"], nets.run("teacher", changed, through=searching)["logits"]
        with evaluating(nets.student) if searching else nullcontext():
            answer = nets.run("student", changed)["logits"]
        hard = mean(self.apart(again, answer), mask)
        nets.phase.gap.fill_(everyone(hard.value.detach().float()[None]).mean())  # all processes change at once
        if searching:
            yield "augmentor", {"gap": -1 * hard, "valid": self.valid * mean(self.apart(told, again), mask)}
        else:
            clean = mean(self.apart(told, nets.run("student", batch)["logits"]), mask)
            yield "student", {"clean": clean, "hard": hard}

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """The other's phase begins when the threshold is passed, or patience is at its end."""
        if player == "painter":
            return
        phase = nets.phase
        phase.since += 1
        passed = phase.gap > self.high if bool(phase.searching) else phase.gap < self.low
        if bool(passed) or int(phase.since) >= self.patience:
            phase.searching.fill_(not bool(phase.searching))
            phase.since.zero_()
