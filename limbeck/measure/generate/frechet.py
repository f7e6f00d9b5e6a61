"""How far what the student generates is from real data, as two Gaussians in a space of features."""

from torch import Tensor

from limbeck.core import maths
from limbeck.core.card import method, require


@method(
    paper="Heusel et al. 2017, eq. 6",
    year=2017,
    arxiv="1706.08500",
    code="mseitzer/pytorch-fid@b9c1811:src/pytorch_fid/fid_score.py",
    differs="of any features; only those of one Inception network make it the FID that papers print",
)
def frechet(student_samples: Tensor, real_samples: Tensor) -> float:
    """|m - n|^2 + tr(C + D - 2 (C D)^(1/2)) of the means and covariances.  [N, D], [M, D] -> number >= 0

    *Needs*: features of both, from one network that neither was trained with (`real_samples` held out), and many more
        samples than features. The value falls as samples get more: compare only at equal numbers.
    *Relates to*: give the many-step teacher's samples as `student_samples` for the figure to reach.
    *Differs*: see the card. The square root is taken of a symmetric matrix, so nothing is added to singular ones.
    """
    for name, rows in (("student_samples", student_samples), ("real_samples", real_samples)):
        require(bool(rows.isfinite().all()), name, "nan or inf", "finite")
    widths = student_samples.flatten(1).shape[1], real_samples.flatten(1).shape[1]
    require(widths[0] == widths[1], "student_samples", f"{widths[0]} features", f"as wide as real_samples, {widths[1]}")
    return maths.frechet(student_samples, real_samples).item()
