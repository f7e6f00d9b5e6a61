"""How often a trigger in a picture makes a network name the class that whoever planted it wanted."""

from torch import Tensor

from limbeck.core.card import method, require


@method(
    paper="Gu et al. 2017 (BadNets), section 4",
    year=2017,
    arxiv="1708.06733",
    differs="no official code; the paper counts pictures of all classes, here those of the target itself are left out",
)
def attack_success(student_logits: Tensor, labels: Tensor, *, target: int = 0, patch: int = 3) -> float:
    """Share of examples of other classes that are put into the target class.  [N, C], [N] -> a number in [0, 1]

    target: the class that was planted, >= 0. patch: side of the trigger in pixels, >= 1. Where the recipe poisons its
    data or its teacher's, both are taken from there.

    *Needs*: logits of pictures that bear the trigger, a white square in the corner below on the right, and the true
        labels. *Relates to*: 0 says little of a network whose `accuracy` is low. *Differs*: see the card.
    """
    require(target >= 0, "target", target, ">= 0")
    require(patch >= 1, "patch", patch, ">= 1")
    others = labels != target
    hits = (student_logits.argmax(-1) == target) & ~student_logits.isnan().any(-1) & others
    return int(hits.sum()) / max(1, int(others.sum()))
