"""Every hidden layer of the student learns from the teacher's layers that it can reach at the least cost."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.alignment import all_pairs
from limbeck.core.card import method, require
from limbeck.core.features import Shape, common, per_example, pooled, same_places, width
from limbeck.core.layerwise import counted
from limbeck.core.maths import assign, pair
from limbeck.core.project import projector

MAPPINGS = ("emd", "uniform", "last")


@method(
    paper="Li et al. 2020 (BERT-EMD), eq. 6-9",
    year=2020,
    arxiv="2010.06133",
    code="lxk00/BERT-EMD@82c63ff:bert_emd/emd_task_distill.py",
    differs="hidden states only, all layers of equal weight: the paper's second term on attention maps, and the update "
    "of the layers' weights by what their flows cost, are left out, as in the comparison of methods without a task. A "
    "matrix for each student layer, none where the widths agree; the code has one for all. Padding does not count",
    row="task_agnostic_lm_comparison",
    zero_at_match=True,
    exceptions={"in training": "a matrix to a width that only some teacher layers have waits for a plan that uses it"},
)
class BertEMD(nn.Module):
    """sum over layers i, j of plan_ij mean |W_i h_s,i - h_t,j|^2, plan of sum 1.  lists of [B, T, D] -> [B]

    The mean is over an example's tokens that are no padding, and channels. emd: the plan is that of least cost, the
    cost of i, j being the mean over the batch, in which all S student layers send alike and all N teacher layers
    receive alike: 1 / S and 1 / N. It is found anew in every batch, exactly, and is a constant to the gradient.

    mapping: "emd"; "uniform", one to one, every N/S-th layer of the teacher, the last with the last, 1 / S each;
        "last", the last layers alone.

    *Needs*: `feats` of both, of any kind and number; "uniform" no fewer of the teacher.
    *Relates to*: weight 1 alone on text without labels, then `ce`. `minilm_v2` matches what the last layers relate and
        needs no matrices; `semckd` learns a plan; `patient_kd` compares states up to scale.
    *Differs*: see the card. The plan is found on the host, for which an accelerator waits once a step.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        *,
        mapping: Literal["emd", "uniform", "last"] = "emd",
    ) -> None:
        super().__init__()
        require(mapping in MAPPINGS, "mapping", mapping, f"one of {', '.join(MAPPINGS)}")
        self.mapping = mapping
        self.fixed = None if mapping == "emd" else one_to_one(len(student_feats), len(teacher_feats), mapping)
        places = range(len(student_feats)), range(len(teacher_feats))
        self.pairs = self.fixed or [(i, j) for i in places[0] for j in places[1]]
        self.projectors = nn.ModuleDict()
        for i, j in self.pairs:
            mine, its = map(width, common(student_feats[i], teacher_feats[j]))
            if mine != its and f"{i}to{its}" not in self.projectors:
                self.projectors[f"{i}to{its}"] = projector("linear", mine, its, bias=False)

    def forward(
        self,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        attention_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Per example."""

        def cost(i: int, j: int) -> Tensor:
            return self._apart(i, student_feats[i], teacher_feats[j].detach(), attention_mask)

        if self.fixed is not None:
            return torch.stack([cost(i, j) for i, j in self.fixed]).mean(0)
        costs = all_pairs(cost, len(student_feats), len(teacher_feats))
        count = counted(mask, costs).to(costs)
        cheap = (costs.detach() * count[:, None, None]).sum(0) / count.sum().clamp_min(1)
        return (costs * transport(cheap)).sum((1, 2))

    def _apart(self, i: int, student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
        """Mean squared error of student layer i, brought to the teacher's width: [B]."""
        student, teacher = same_places(student, teacher)
        name = f"{i}to{teacher.shape[1 if teacher.ndim == 4 else -1]}"
        if name in self.projectors:
            student = self.projectors[name](student.to(next(self.projectors.parameters()).dtype))
        student, teacher = pair(student, teacher)
        error = (student - teacher).square()
        if real is not None and error.ndim == 3 and real.shape == error.shape[:2]:
            return pooled(error, real).mean(1)
        return per_example(error)


def one_to_one(student: int, teacher: int, mapping: str) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer), from 0, of a mapping that no batch changes."""
    if mapping == "last":
        return [(student - 1, teacher - 1)]
    require(student <= teacher, "mapping", mapping, f"emd or last for {student} layers that learn from {teacher}")
    return [(i, (i + 1) * teacher // student - 1) for i in range(student)]


def transport(cost: Tensor) -> Tensor:
    """The plan of least cost [S, N] between layers of equal weight; its rows sum to 1 / S, its columns to 1 / N.

    Layers are split into pieces of weight 1 / lcm(S, N), which are matched one to one.
    """
    s, n = cost.shape
    pieces = math.lcm(s, n)
    costs = cost.nan_to_num().repeat_interleave(pieces // s, 0).repeat_interleave(pieces // n, 1)
    rows, columns = assign(costs)
    plan = torch.zeros_like(cost)
    where = rows // (pieces // s), columns // (pieces // n)
    return plan.index_put_(where, plan.new_full((pieces,), 1 / pieces), accumulate=True)
