"""How often a text's other half is among the nearest of all, by the embeddings of one or of several exits."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput


@method(
    paper="Gurioli et al. 2025, section 5, recall at k",
    year=2025,
    arxiv="2503.03008",
    differs="of equally near texts half are taken to come first, so that an encoder that says the same of all texts "
    "has no hit; the paper's candidates are those of its benchmarks, here they are all second texts of the set",
    row="modular_star_encoder",
    exceptions={"every example counts": "the more texts there are to choose from, the harder it is to find one"},
)
def pair_recall(student_logits: Tensor, *, top: int = 10) -> dict[str, float]:
    """Share of first texts whose second text is among the `top` nearest of N.  [N, (K,) 2 D] -> three numbers

    The first D numbers of a row are the embedding of a pair's first text, the others of its second, as one exit of K
    gives them; nearness is their cosine. recall: the mean over exits; recall_first, recall_last: of the first and of
    the last exit. All are in [0, 1], and the same where there is one exit.

    top: >= 1.

    *Needs*: a network that embeds pairs, such as `pair_encoder` of the zoo; no labels.
    *Relates to*: `accuracy` where the candidates are classes. It is harder among more candidates: compare on one set.
    *Differs*: see the card.
    """
    require(top >= 1, "top", top, ">= 1")
    require(student_logits.numel() > 0, "student_logits", tuple(student_logits.shape), "the embeddings of some pairs")
    exits = student_logits.double().unsqueeze(1) if student_logits.ndim == 2 else student_logits.double()
    if exits.ndim != 3 or exits.shape[-1] % 2:
        raise BadInput(f"pair_recall reads two embeddings side by side, [N, K, 2 D], got {list(student_logits.shape)}")
    found = [_hits(first, second, top) for first, second in (exit_.chunk(2, -1) for exit_ in exits.unbind(1))]
    return {"recall": sum(found) / len(found), "recall_first": found[0], "recall_last": found[-1]}


def _hits(first: Tensor, second: Tensor, top: int) -> float:
    """Share of rows b of first [N, D] to which fewer than `top` rows of second [N, D] are nearer than row b."""
    first, second = (
        x.nan_to_num() / x.nan_to_num().norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (first, second)
    )
    hits = 0
    for rows in torch.arange(len(first), device=first.device).split(1024):
        near = (first[rows] @ second.mT).round(decimals=9)  # so that equal texts tie
        own = near.gather(1, rows[:, None])
        before = (near > own).sum(1) + ((near == own).sum(1) - 1) / 2
        hits += int((before < top).sum())
    return hits / len(first)
