"""Every exit of one encoder learns to tell which two texts belong together, so that it can be cut after any of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.maths import FLOOR, upcast


@method(
    paper="Gurioli et al. 2025, section 3, fine-tuning",
    year=2025,
    arxiv="2503.03008",
    differs="no official code; the pre-training (hidden words, and whether two snippets are of one repository) is left "
    "out. Exits lie at the paper's share of all layers (4, 9, 18, 27 and 36 of 36); where `weights` are not told they "
    "count as evenly spread. `guidance` is ours, and off",
)
def modular_star_encoder(
    student_exits: list[Tensor],
    mask: Tensor | None = None,
    *,
    scale: float = 10.0,
    weights: tuple[float, ...] = (),
    guidance: float = 0.0,
) -> Tensor:
    """sum_i w_i [L_i + g (1 - cos(e_i, e_K))], L_i = (CE(s Q_i D_i^T) + CE(s D_i Q_i^T)) / 2.  [[B, 2, D]] -> []

    Q_i, D_i [B, D] are the unit vectors of the first and the second texts of B pairs at exit i of K. In CE row and
    column b belong together, and all others of the batch are what b is told from: infoNCE, both ways, as in CLIP.
    e_K, the last exit's embeddings, are constants where they guide; the last exit is not guided.

    scale: s > 0, one over the temperature.
    weights: w_i >= 0, one an exit; empty is i / K. A zero takes that exit's head out of the gradient.
    guidance: g >= 0; not part of the paper, in which later exits shape earlier ones by what they share alone.

    *Needs*: an encoder with heads on some of its layers that reads pairs, as `pair_encoder` of the zoo does. Pairs
        where `mask` [B] is false are neither asked nor among the candidates.
    *Relates to*: alone; more pairs in a batch are a harder task. `byot` is this for classes, with a KL in addition.
    *Differs*: see the card.
    """
    require(scale > 0, "scale", scale, "> 0")
    require(guidance >= 0, "guidance", guidance, ">= 0")
    require(all(w >= 0 for w in weights), "weights", weights, ">= 0")
    count = len(student_exits)
    if weights and len(weights) != count:
        raise BadInput(f"`weights` has {len(weights)} numbers, but the student has {count} exits")
    units = [F.normalize(upcast(e), dim=-1, eps=1e-6) for e in student_exits]
    pairs = units[0].new_ones(len(units[0]), dtype=torch.bool) if mask is None else mask.bool()
    total = units[0].new_zeros(())
    for i, unit in enumerate(units):
        weight = weights[i] if weights else (i + 1) / count
        if weight == 0:
            continue
        total = total + weight * told_apart(scale * unit[:, 0] @ unit[:, 1].mT, pairs)
        if guidance and i + 1 < count:
            if unit.shape != units[-1].shape:
                raise BadInput(f"guidance needs exits of one width, got {unit.shape[-1]} and {units[-1].shape[-1]}")
            apart = 1 - (unit * units[-1].detach()).sum(-1).mean(-1)
            total = total + weight * guidance * over(apart, pairs)
    return total


def told_apart(alike: Tensor, pairs: Tensor) -> Tensor:
    """Mean cross-entropy of finding b among the columns of row b, and among the rows of column b. [B, B], [B] -> []"""
    alike = torch.where(pairs & pairs.unsqueeze(1), alike, FLOOR)
    both = (alike.logsumexp(0) + alike.logsumexp(1)) / 2 - alike.diagonal()
    return over(both, pairs)


def over(values: Tensor, pairs: Tensor) -> Tensor:
    """Mean over those pairs that count; 0 where there is none. [B] x 2 -> []"""
    return torch.where(pairs, values, 0.0).sum() / pairs.sum().clamp_min(1)
