"""How well one class, mostly a rare one that must not be missed, is told from all others."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.ranking import ranked


@method(
    paper="Lee et al. 2024, section 4, F1 and AUPRC",
    year=2024,
    arxiv="2410.01524",
    code="imnotkind/HarmAug@c9d716c:src/kd_trainer.py",
    differs="one class against any number of others; where there is nothing to tell the code says 1 for F1, here both "
    "are 0",
    row="harmaug",
)
def rare_class(student_logits: Tensor, labels: Tensor, *, positive: int = 1) -> dict[str, float]:
    """Of the class `positive` by softmax(z): two numbers in [0, 1].  [N, C], [N] -> two numbers

    auprc: average precision, sum over thresholds of (recall gained) x precision; examples that score alike are one
    threshold. positive_f1: 2 tp / (2 tp + fp + fn) where the largest logit decides. 0 without an example of the class.

    positive: which class, in [0, C).

    *Needs*: labels. *Relates to*: `multilabel` takes the mean of all classes; `accuracy` says little of rare ones. A
        guesser's auprc is the part of examples that are of the class.
    *Differs*: see the card.
    """
    classes = student_logits.shape[-1]
    require(0 <= positive < classes, "positive", positive, f"in [0, {classes})")
    require(labels.numel() > 0, "labels", tuple(labels.shape), "the labels of at least one example")
    present = labels == positive
    logits = student_logits.double().nan_to_num(nan=float("-inf"))
    # log odds of the class: as the probability orders, but without its rounding to 1
    others = logits[..., torch.arange(classes, device=logits.device) != positive].logsumexp(-1)
    odds = (logits[..., positive] - others).nan_to_num(nan=float("-inf"))
    said = logits.argmax(-1) == positive
    right, wrong = int((said & present).sum()), int((said != present).sum())
    return {"auprc": ranked(odds, present)[0], "positive_f1": 2 * right / max(1, 2 * right + wrong)}
