"""How many pictures of a film lie between its true moments of the largest and least area and those that are told."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.films import marks


@method(
    paper="Petit et al. 2024, section 4, aFD",
    year=2024,
    arxiv="2409.07566",
    code="GregoirePetit/EchoDFKD@b62e537:core/evaluate_aFD.py",
    differs="the true moments are those of the true masks' extremes, where the code has a person's choice",
    row="echodfkd",
)
def frame_distance(student_picture: Tensor, real_picture: Tensor, *, threshold: float = 0.098) -> dict[str, float]:
    """afd_largest, afd_least: means over films of |t - t*| in pictures, t* the true moment; afd: the mean of both.

    t is the extreme of the marked area within one stretch of pictures, all of which are beyond the median area: that
    whose ends lie nearest to t*.  [N, C, T W, W] x 2 -> three numbers >= 0, lower is better

    threshold: of the probability above which a pixel counts to the area, in (0, 1); 25 of 255 in the code.

    *Needs*: films as strips of square pictures, whose labels are masks of 0 and 1, and a network that makes their
        logits. *Relates to*: `dice` says how well each picture is marked. *Differs*: see the card.
    """
    require(0 < threshold < 1, "threshold", threshold, "in (0, 1)")
    made, real = (marks(m).sum(-1) for m in (student_picture.double().sigmoid() > threshold, real_picture > 0.5))
    far = [
        torch.tensor([abs(moment(m, aim) - aim) for m, aim in zip(sign * made, (sign * real).argmin(1), strict=True)])
        for sign in (-1, 1)
    ]
    largest, least = (f.double().mean().item() for f in far)
    return {"afd": (largest + least) / 2, "afd_largest": largest, "afd_least": least}


def moment(areas: Tensor, near: Tensor) -> Tensor:
    """The first place of the least area [T] within that stretch below the median whose ends lie nearest to `near`."""
    ordered = areas.double().sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    below = areas < middle if bool((areas < middle).any()) else areas <= middle
    edge = torch.zeros(1, dtype=torch.long, device=areas.device)
    steps = torch.cat([edge, below.long(), edge]).diff()
    starts, ends = (steps == 1).nonzero()[:, 0], (steps == -1).nonzero()[:, 0] - 1
    nearest = torch.minimum((starts - near).abs(), (ends - near).abs()).argmin()
    start, end = starts[nearest], ends[nearest]
    return start + areas[start : end + 1].argmin()
