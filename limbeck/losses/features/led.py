"""Labels that are present have an embedding each: how these lie to one another is learned from the teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.bernoulli import multi_hot
from limbeck.core.card import method, require
from limbeck.core.features import tokens
from limbeck.core.layerwise import counted, picked
from limbeck.core.maths import pairwise_distances, upcast


@method(
    paper="Yang et al. 2023, label-wise embedding distillation",
    year=2023,
    arxiv="2308.06453",
    code="penghui-yang/L2D@ea7fa55:criterion/distiller_zoo/le_based/led.py",
    differs="embeddings that coincide are at a distance of 0; the code has 1e-6, which counts as 1 where all do",
    row="l2d_multilabel",
    zero_at_match=True,
)
def led(
    student_feats: list[Tensor],
    teacher_feats: list[Tensor],
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    layer: int = -1,
    class_weight: float = 100.0,
    instance_weight: float = 1000.0,
) -> Tensor:
    """class_weight sum_c H(of class c) + instance_weight sum_i H(of image i).  lists of [B, C, D], [B, C] -> []

    H = 1/n sum_jk Huber(d_s - d_t) over the n embeddings of a group, d their Euclidean distances over the mean of those
    that are not 0. Groups: a class in all images where it is present, an image with all classes present in it; below 2
    there is no distance. Either cloud may be turned, moved, scaled, so widths may differ.

    layer: which of the feats, counted from shallow (0) or from deep (-1), has an embedding of class c at its place c.
    class_weight: of the same class in different images, >= 0.
    instance_weight: of different classes in the same image, >= 0.

    *Needs*: embeddings a label of both, as a decoder with a query a label gives (the last feats of a resnet with
        `queries: true`); labels as 0 and 1, or class indices, which leave only the first term.
    *Relates to*: bce + 10 / 64 to 10 `mld` + 1 / 64 to 1 of this, far less where training is short: it starts above
        a thousand. `rkd` compares one embedding an image.
    """
    require(class_weight >= 0, "class_weight", class_weight, ">= 0")
    require(instance_weight >= 0, "instance_weight", instance_weight, ">= 0")
    student, teacher = (upcast(tokens(feature)) for feature in picked(student_feats, teacher_feats, layer))
    present = (multi_hot(labels, student[..., 0]) > 0.5) & counted(mask, student).unsqueeze(-1)
    teacher = teacher.detach()
    of_classes = _apart(student.transpose(0, 1), teacher.transpose(0, 1), present.T)
    of_images = _apart(student, teacher, present)
    return class_weight * of_classes + instance_weight * of_images


def _apart(student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """sum over the groups of H: [G, N, D], [G, N, E], which of the N take part [G, N] -> []"""
    both = present.unsqueeze(-1) & present.unsqueeze(-2)
    s, t = (_relative(pairwise_distances(x), both) for x in (student, teacher))
    huber = F.smooth_l1_loss(s, t.to(s), reduction="none").sum((-2, -1))
    return (huber / present.sum(-1).clamp_min(1)).sum()


def _relative(distances: Tensor, both: Tensor) -> Tensor:
    """Distances of those that take part, over the mean of the ones that are not 0."""
    d = torch.where(both, distances, 0.0)
    mean = d.sum((-2, -1), keepdim=True) / (d > 0).sum((-2, -1), keepdim=True).clamp_min(1)
    return d / torch.where(mean > 0, mean, 1.0)
