"""How near pictures come to what they should be, pixel by pixel."""

from torch import Tensor

from limbeck.core.card import method, require

MOST = 100.0  # decibels of a picture without any error


@method(
    paper="Wang et al. 2004, section I",
    year=2004,
    differs="the mean over pictures of each one's own, at most 100; values beyond black and white count as these",
)
def psnr(student_picture: Tensor, real_picture: Tensor) -> float:
    """Mean over pictures of -10 log10 mean (s - r)^2, in decibels.  [N, C, H, W] x 2 -> number <= 100, higher is better

    *Needs*: pairs of pictures, with white at 1.
    *Relates to*: blurred pictures score well here and badly by `frechet`, which sees whether they look like real ones.
    """
    require(len(real_picture) > 0, "real_picture", tuple(real_picture.shape), "at least one picture")
    told = f"as that of real_picture, {list(real_picture.shape)}"
    require(student_picture.shape == real_picture.shape, "student_picture", list(student_picture.shape), told)
    one, other = (p.double().clamp(0, 1) for p in (student_picture, real_picture))
    error = (one - other).square().flatten(1).mean(1)
    return -10 * error.clamp_min(10 ** (-MOST / 10)).log10().mean().item()
