"""Student and teacher embeddings of one example agree, and differ from those of many others, remembered in banks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.bank import everyone
from limbeck.core.card import method, require
from limbeck.core.maths import upcast

# Added to the noise odds by the code; kept, so that published settings give the same numbers.
EPSILON = 1e-7


@method(
    paper="Tian et al. 2019, eq. 17-19",
    year=2019,
    arxiv="1910.10699",
    code="HobbitLong/RepDistiller@b84f547:crd/criterion.py",
    differs="from the paper, with its code: scores are divided by a constant Z, measured on the first batch, and the "
    "noise odds N/M carry + 1e-7, so that the loss cannot fall below 2e-7 x (size of the set). From the code: others "
    "are drawn without replacement, at most as many as there are; classes are learned from the batches seen",
)
class CRD(nn.Module):
    """Noise-contrastive loss of one positive against K negatives, from both sides.  [B, D], [B, E], [B] -> [B]

    v = unit vector of a linear map of an embedding; m = what the bank of the other network remembers. With h =
    exp(v . m / T) / Z and the noise odds n = K / N, an anchor costs -log(h+ / (h+ + n)) - sum_- log(n / (h- + n)).
    After that the bank rows of the batch become norm(momentum m + (1 - momentum) v): in training mode with gradients
    on, once a call, so call it once a micro-batch. Banks and Z are buffers: they are saved and resumed.

    width: of the unit vectors, >= 1.
    temperature: T > 0.
    momentum: of the banks, in [0, 1).
    negative_count: K >= 1, cut to the number of other examples.

    *Needs*: embeddings and the index of each example in a set of fixed size. With `labels` negatives come from other
        classes (examples not seen yet count as such); `negatives` [B, K] sets them, -1 for none. Else
        drawn from torch's generator.
    *Relates to*: use weight 0.8 beside `ce`, and `kd` at weight 1. Use `rkd` when there is no index or little memory:
        the banks hold 2 x N x width numbers.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_z: Tensor
    classes: Tensor

    def __init__(
        self,
        student_emb: tuple[int, ...],
        teacher_emb: tuple[int, ...],
        index: tuple[int, ...],
        *,
        width: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        negative_count: int = 16384,
    ) -> None:
        super().__init__()
        require(width >= 1, "width", width, ">= 1")
        require(temperature > 0, "temperature", temperature, "> 0")
        require(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        require(negative_count >= 1, "negative_count", negative_count, ">= 1")
        require(index[0] >= 2, "index", index, "the size of a training set of at least 2 examples")
        self.width, self.temperature, self.momentum, self.negative_count = width, temperature, momentum, negative_count
        self.student_embed = nn.Linear(math.prod(student_emb[1:]), width)
        self.teacher_embed = nn.Linear(math.prod(teacher_emb[1:]), width)
        reach = math.sqrt(3 / width)
        for bank in ("student_bank", "teacher_bank"):
            self.register_buffer(bank, torch.empty(index[0], width).uniform_(-reach, reach))
        self.register_buffer("log_z", torch.full((2,), torch.inf))  # student and teacher as anchor; inf: not yet known
        self.register_buffer("classes", torch.full((index[0],), -1))  # -1: not yet seen

    def forward(
        self,
        student_emb: Tensor,
        teacher_emb: Tensor,
        index: Tensor,
        labels: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> Tensor:
        """Per example; moves the banks in training mode."""
        learning = self.training and torch.is_grad_enabled()
        with torch.autocast(student_emb.device.type, enabled=False):
            if labels is not None and learning:
                self.classes[everyone(index)] = everyone(labels)
            negatives = self._draw(index, labels) if negatives is None else negatives
            places = torch.cat([index.unsqueeze(1), negatives], 1)
            student = _unit(self.student_embed, student_emb)
            teacher = _unit(self.teacher_embed, teacher_emb.detach())
            # Copies: the banks move below, before the backward pass reads them.
            loss = self._nce(0, student, self.teacher_bank.clone(), places, learning)
            loss = loss + self._nce(1, teacher, self.student_bank.clone(), places, learning)
            if learning:
                self._remember(self.student_bank, index, student)
                self._remember(self.teacher_bank, index, teacher)
        return loss

    def _nce(self, side: int, anchors: Tensor, bank: Tensor, places: Tensor, learning: bool) -> Tensor:
        absent = places < 0
        counts = (~absent).sum(1, keepdim=True).to(anchors.dtype)  # the positive and its negatives
        scores = (anchors @ bank.to(anchors.dtype).T).gather(1, places.clamp_min(0)) / self.temperature
        every = everyone(scores.detach().masked_fill(absent, -torch.inf).flatten())
        # Z = mean exp(score) x size of the set
        fresh = every.logsumexp(0) - everyone(counts).sum().log() + math.log(len(bank))
        log_z = torch.where(self.log_z[side].isinf(), fresh, self.log_z[side])
        if learning:
            self.log_z[side] = log_z
        log_h = scores - log_z
        odds = (counts - 1) / len(bank)
        log_both = torch.logaddexp(log_h, (odds + EPSILON).log())
        of_negatives = (log_both - odds.log()).masked_fill(absent, 0.0)[:, 1:].sum(1)
        return log_both[:, 0] - log_h[:, 0] + of_negatives

    def _draw(self, index: Tensor, labels: Tensor | None) -> Tensor:
        """Other examples for each of the batch, [B, K], of other classes where there are any; equally many for each,
        the places left over are -1."""
        chance = torch.ones(len(index), len(self.classes), device=index.device).scatter_(1, index.unsqueeze(1), 0)
        if labels is not None:
            other = chance * (self.classes != labels.unsqueeze(1))
            chance = torch.where(other.any(1, keepdim=True), other, chance)
        # The draw that torch.multinomial makes, without the look at the values by which it would wait for the device;
        # how many there are is not read for the same reason.
        drawn = (chance / torch.empty_like(chance).exponential_()).topk(min(self.negative_count, len(self.classes) - 1))
        there = torch.arange(drawn.indices.shape[1], device=index.device) < chance.sum(1).min()
        return drawn.indices.where(there, -1)

    @torch.no_grad()
    def _remember(self, bank: Tensor, index: Tensor, now: Tensor) -> None:
        index, now = everyone(index), everyone(now).to(bank.dtype)
        bank[index] = F.normalize(self.momentum * bank[index] + (1 - self.momentum) * now)


def _unit(embed: nn.Linear, embedding: Tensor) -> Tensor:
    return F.normalize(upcast(embed(embedding.flatten(1).to(embed.weight.dtype))))
