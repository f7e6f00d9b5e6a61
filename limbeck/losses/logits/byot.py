"""The network teaches its own shallow parts: exits on inner layers learn from the label and from its last layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.exits import exit_from
from limbeck.core.features import Shape, pooled, width
from limbeck.core.maths import kl, pair, upcast


@method(
    paper="Zhang et al. 2019, Be Your Own Teacher, eq. 5-8",
    year=2019,
    arxiv="1905.08094",
    code="luanyunteng/pytorch-be-your-own-teacher@8045079:train.py",
    differs="KL, where the code has a cross-entropy: they differ by the last layer's entropy, a constant. The code "
    "sums squares over the batch of 128 at weight 1e-6, here it is 1.28e-4 of the mean over examples. Exits are "
    "separable convolutions, of which more follow earlier layers, where the code has one convolution of large stride",
    exceptions={
        "gradcheck": "what the last layer says is a constant in the gradient of the exits on purpose",
        "mask": "the exits' batch norm takes its statistics over the whole batch, masked examples too",
    },
)
class BYOT(nn.Module):
    """(1 - alpha) sum over all exits CE(z_i, label) + sum over inner ones [alpha T^2 KL(z_C || z_i) + w |F_i - F_C|^2].

    z_C are the student's own logits, F_C the mean of its last feature over places; both are constants where they
    teach. z_i and F_i [B, D] are what an exit says and what its classifier reads. lists, [B, C], [B] -> [B]

    Exits: separable convolutions for maps, merges and transformer blocks for tokens, plain layers for vectors; they
    train with the student and are dropped (`core.exits`), so that what remains is the plain network.

    alpha: share of the last layer against the label, in [0, 1].
    temperature: T > 0.
    feature_weight: w >= 0; the squares are summed over D. With alpha and w 0 this is deep supervision.
    class_token: whether token features begin with a class token, which is then read in the place of their mean.

    *Needs*: one feature a stage of the student, at least two, shallow to deep; labels; no teacher.
    *Relates to*: alone, in the place of `ce`. Compare with alpha and w 0: that inner layers see the labels helps by
        itself. `uskd` asks one inner layer only for a ranking; with a teacher use `ofa_kd`, whose exits are the same.
    *Differs*: see the card.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        student_logits: Shape,
        *,
        alpha: float = 0.1,
        temperature: float = 3.0,
        feature_weight: float = 1.28e-4,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]")
        require(temperature > 0, "temperature", temperature, "> 0")
        require(feature_weight >= 0, "feature_weight", feature_weight, ">= 0")
        self.alpha, self.temperature, self.feature_weight = alpha, temperature, feature_weight
        self.class_token = class_token
        *inner, last = student_feats
        if not inner:
            raise BadInput("byot teaches inner layers by the last, but got one feature; tap one a stage, at least two")
        self.exits = nn.ModuleList(
            exit_from(shape, student_logits[-1], later=len(inner) - i, width=width(last), class_token=class_token)
            for i, shape in enumerate(inner)
        )

    def forward(self, student_feats: list[Tensor], student_logits: Tensor, labels: Tensor) -> Tensor:
        """Per example."""
        last = student_feats[-1]
        deepest = (last[:, 0] if self.class_token and last.ndim == 3 else pooled(last)).detach()
        total = (1 - self.alpha) * F.cross_entropy(upcast(student_logits), labels, reduction="none")
        for leave, feature in zip(self.exits, student_feats, strict=False):
            read, said = both(leave, feature)
            total = total + (1 - self.alpha) * F.cross_entropy(upcast(said), labels, reduction="none")
            softened = kl(said, student_logits.detach(), self.temperature)
            mine, its = pair(read, deepest)
            apart = (mine - its).square().sum(-1)
            total = total + self.alpha * self.temperature**2 * softened + self.feature_weight * apart
        return total


def both(leave: nn.Module, feature: Tensor) -> tuple[Tensor, Tensor]:
    """What the classifier of an exit reads [B, D], and what it says [B, C]."""
    *body, head = leave.children()
    read = feature.to(head.weight.dtype)  # type: ignore[arg-type]
    for layer in body:
        read = layer(read)
    return read, head(read)
