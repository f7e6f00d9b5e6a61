"""Do student and teacher look at the same places?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.bernoulli import multi_hot
from limbeck.core.card import method, require
from limbeck.core.places import activation


@method(
    paper="Termritthikun et al. 2023, explanations by class activation",
    year=2023,
    arxiv="2305.06244",
    differs="the paper shows the maps; the two figures are ours",
    row="explainable_kd_cxr",
)
def saliency_overlap(
    student_map: Tensor, teacher_map: Tensor, labels: Tensor, *, threshold: float = 0.5
) -> dict[str, float]:
    """Of the activation maps of present classes: two numbers in [0, 1].  [N, C, H, W] x 2, [N, C] -> two numbers

    What a linear classifier says at every place, its positive part, over its largest value. cosine: mean cosine of the
    two maps. iou: mean over pairs of maps of (places above the threshold in both) / (in either). Maps of the teacher
    without a positive place are left out; 0 where none is left. Of two sizes the smaller counts.

    threshold: in (0, 1), of the largest value.

    *Needs*: class maps of both; where a recipe measures it, they are Grad-CAM (`grad_cam` in core/places) at the last
        of the network's feats that has places; labels as 0 and 1, or class indices. *Relates to*: `agreement` for what
        they say, not why.
    """
    require(0 < threshold < 1, "threshold", threshold, "in (0, 1)")
    size = (min(student_map.shape[2], teacher_map.shape[2]), min(student_map.shape[3], teacher_map.shape[3]))
    student, teacher = (
        activation(F.adaptive_avg_pool2d(maps.double(), size)).flatten(2) for maps in (student_map, teacher_map)
    )
    pairs = (multi_hot(labels, student[..., 0]) > 0.5) & (teacher > 0).any(-1)
    s, t = student[pairs], teacher[pairs]
    if not len(s):
        return {"cosine": 0.0, "iou": 0.0}
    both, either = ((s > threshold) & (t > threshold)).sum(-1), ((s > threshold) | (t > threshold)).sum(-1)
    iou = (both.double() / either).mean()
    return {"cosine": torch.cosine_similarity(s, t, -1).mean().item(), "iou": iou.item()}
