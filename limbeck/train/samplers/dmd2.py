"""A few-step generator that follows the difference of two scores: of the data, and of what it makes itself."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import Part, mean
from limbeck.core.sampler import Denoiser, clean_grid, denoising, guided, rollout


@method(
    paper="Yin et al. 2024, sections 4.2 to 4.5",
    year=2024,
    arxiv="2405.14867",
    code="tianweiy/DMD2@8d8fa55633d47cfb81bbc7a892e7248f9518763f:main/edm/edm_guidance.py",
    differs="the head of the critic is sized by the features that it gets; generated and real examples share the "
    "labels of the batch, where the code draws new ones; the single step starts from t_max",
)
@dataclass(frozen=True)
class DMD2:
    """Student: 0.5 |x - sg(x - g)|**2, g = (D_fake(x_t) - D_real(x_t)) / mean|x - D_real(x_t)|; fake: denoises x.

    x is what the student makes of noise, x_t the same noised to a random time. The fake score (a copy of the teacher
    at first) follows the student and moves every step, the student every `ratio` steps. A critic on the inner features
    of the fake score tells noised x from noised data.

    ratio: steps of the fake score for one of the student, >= 1; the paper's is 5, 10 for Stable Diffusion.
    steps: of the student, >= 1. Beyond 1, x comes from backward simulation: the student's own first k - 1 steps
        without gradient, then step k, k drawn for the whole batch.
    gan: weight of softplus(-critic(x)) for the student, >= 0; at 0 there is no critic. The paper's is 3e-3.
    gan_fake: weight of softplus(critic(x)) + softplus(-critic(data)) for the fake score, >= 0.
    guidance: classifier-free guidance of the teacher, >= 0; 1 is none. Needs `guided`.
    levels: noise levels from t_min to t_max, >= 2. low, high: shares of them between which x is compared, in [0, 1].
    guided: give the labels of the batch to all networks.

    *Needs*: nets.teacher, a Denoiser whose network knows `features=True` (for the critic); data, for the critic and for
        shapes. nets.student begins as a copy of the teacher when there is none; nets.discriminator, features [B, ...]
        -> logits [B, 1], is built when there is none.
    *Relates to*: `consistency_distillation` needs no further networks; `reflow` needs no data.
    *Differs*: see the card. The paper trains 64x64 pictures by AdamW at 2e-6, then 5e-7, weight decay 0.01.
    """

    ratio: int = 5
    steps: int = 1
    gan: float = 3e-3
    gan_fake: float = 1e-2
    guidance: float = 1.0
    levels: int = 1000
    low: float = 0.02
    high: float = 0.98
    guided: bool = False

    def __post_init__(self) -> None:
        for name, least in (("ratio", 1), ("steps", 1), ("levels", 2), ("gan", 0), ("gan_fake", 0), ("guidance", 0)):
            require(getattr(self, name) >= least, name, getattr(self, name), f">= {least}")
        require(0 <= self.low <= self.high <= 1, "low", self.low, f"in [0, high], high ({self.high}) in [0, 1]")
        require(self.guidance == 1 or self.guided, "guidance", self.guidance, "1 unless `guided` is true")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Copy the teacher into the fake score (and the student), and put the critic's head on it."""
        if "student" not in nets:
            nets.student = copy.deepcopy(nets.teacher).train().requires_grad_(True)
        nets.student.solver = "renoise"
        nets.fake = copy.deepcopy(nets.teacher).train().requires_grad_(True)
        if self.gan:
            if "discriminator" not in nets:
                nets.discriminator = head(nets.fake, probe["inputs"])
            nets.companions.setdefault("fake", []).append("discriminator")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of the student now and then, and one of the fake score with its critic."""
        real, labels = batch["inputs"], batch["labels"] if self.guided else None
        turn = clock.t % self.ratio == 0
        k = int(torch.randint(self.steps, ()))
        with torch.set_grad_enabled(turn):
            grid = clean_grid(nets.student.schedule, self.steps)
            x = rollout(nets.student, torch.randn_like(real), grid, k, labels=labels)
        if turn:
            parts = {"matching": mean(self.matching(nets, x, labels))}
            if self.gan:
                parts["gan"] = self.gan * mean(softplus(-self.critic(nets, x, labels)))
            yield "student", parts
        x = x.detach()
        t = self.times(nets.fake, x, 0, self.levels)
        yield "fake", {"denoising": mean(denoising(nets.fake, x, t, labels)), **self.judging(nets, x, real, labels)}

    def matching(self, nets: Nets, x: Tensor, labels: Tensor | None) -> Tensor:
        """0.5 |x - sg(x - g)|**2 [B, ...], whose gradient in x is g."""
        with torch.no_grad():
            t = self.times(nets.teacher, x, int(self.low * self.levels), int(self.high * self.levels) + 1)
            xt = nets.teacher.schedule.noised(x, t, torch.randn_like(x))
            d_real, d_fake = guided(nets.teacher, xt, t, labels, self.guidance), nets.fake(xt, t, labels)
            size = (x - d_real).abs().flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1))
            g = (d_fake - d_real) / size.clamp_min(1e-12)
        surrogate: Tensor = 0.5 * (x - (x - g).detach()).square()
        return surrogate

    def times(self, denoiser: Denoiser, x: Tensor, first: int, end: int) -> Tensor:
        """Times [B] of random noise levels from `first` up to, without, `end`."""
        level = torch.randint(first, min(end, self.levels), (len(x),), device=x.device)
        return denoiser.schedule.at(level.to(upcast(x).dtype) / (self.levels - 1))

    def critic(self, nets: Nets, x: Tensor, labels: Tensor | None) -> Tensor:
        """Logits [B, 1] that noised x is real."""
        t = self.times(nets.fake, x, 0, self.levels)
        xt = nets.fake.schedule.noised(x, t, torch.randn_like(x))
        logits: Tensor = nets.discriminator(nets.fake(xt, t, labels, features=True))
        return logits

    def judging(self, nets: Nets, x: Tensor, real: Tensor, labels: Tensor | None) -> dict[str, Part]:
        """The critic's own part, when there is one."""
        if not self.gan:
            return {}
        is_real, is_fake = self.critic(nets, real, labels), self.critic(nets, x, labels)
        return {"gan": self.gan_fake * mean(softplus(is_fake) + softplus(-is_real))}


def head(fake: Denoiser, inputs: Tensor) -> nn.Module:
    """Features of `fake` -> logits [B, 1]: strided convolutions for maps, a hidden layer for vectors."""
    try:
        with torch.no_grad(), evaluating(fake):
            shape = fake(inputs[:2], fake.schedule.t_max, features=True).shape[1:]
    except TypeError as error:
        raise BadInput(
            f"the critic reads inner features, and {type(fake.net).__name__}.forward does not take `features=True`; "
            "add it, or set `gan` to 0"
        ) from error
    layers: list[nn.Module] = []
    if len(shape) == 3:
        channels, sides = shape[0], list(shape[1:])
        while max(sides) > 2:
            groups = nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0), channels)
            layers += [nn.Conv2d(channels, channels, 3, stride=2, padding=1), groups, nn.SiLU()]
            sides = [(side + 1) // 2 for side in sides]
        shape = torch.Size([channels, *sides])
    else:
        layers += [nn.Flatten(), nn.Linear(prod(shape), prod(shape)), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(prod(shape), 1)).to(inputs.device)
