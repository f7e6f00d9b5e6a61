"""How well masks cover what they should."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.films import marks


@method(
    paper="Dice 1945; Petit et al. 2024, section 4",
    year=1945,
    code="GregoirePetit/EchoDFKD@b62e537:core/evaluate_DICE.py",
    differs="over all pictures of a film, where the code takes the two that people have marked",
    row="echodfkd",
)
def dice(student_picture: Tensor, real_picture: Tensor, *, threshold: float = 0.5) -> float:
    """Mean over pictures of 2 |s and r| / (|s| + |r|), 1 where both are empty.  [N, C, T W, W] x 2 -> number in [0, 1]

    threshold: of the probability sigmoid(student_picture) above which a pixel is marked, in (0, 1).

    *Needs*: pairs whose labels are masks of 0 and 1, and a network that makes their logits; strips of square pictures
        count picture by picture. *Relates to*: `frame_distance` says when, not where. *Differs*: see the card.
    """
    require(0 < threshold < 1, "threshold", threshold, "in (0, 1)")
    made, real = (marks(m) for m in (student_picture.double().sigmoid() > threshold, real_picture > 0.5))
    both, all_ = (made & real).sum(-1).double(), (made.sum(-1) + real.sum(-1)).double()
    return (2 * both / all_.clamp_min(1)).where(all_ > 0, 1.0).mean().item()
