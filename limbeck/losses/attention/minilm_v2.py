"""Queries, keys and values of one layer, cut into any number of heads, relate in the student as in the teacher."""

import math

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.features import pick
from limbeck.core.heads import relations_apart


@method(
    paper="Wang et al. 2020, MiniLMv2, eq. 5-8",
    year=2020,
    arxiv="2012.15828",
    differs="as many relation heads as the asked-for number and both widths have in common",
    variant_of="minilm",
    zero_at_match=True,
)
def minilm_v2(
    student_queries: list[Tensor],
    teacher_queries: list[Tensor],
    student_keys: list[Tensor],
    teacher_keys: list[Tensor],
    student_values: list[Tensor],
    teacher_values: list[Tensor],
    attention_mask: Tensor | None = None,
    *,
    relation_heads: int = 48,
    layer: int = -1,
    query_weight: float = 1.0,
    key_weight: float = 1.0,
    value_weight: float = 1.0,
) -> Tensor:
    """Sum over M = Q, K, V of weight_M KL(R_t || R_s), means over relation heads and tokens.  [B, T, D] lists -> [B]

    R = softmax(M_a M_a^T / sqrt(d)) of each of the A pieces M_a [B, T, d = D / A] into which the heads, put side by
    side, are cut anew. The student's last layer learns from one layer of the teacher; both may have any width and any
    number of attention heads. Padding neither looks nor is looked at.

    relation_heads: A >= 1, as far as it divides both widths; 48 for a teacher of 12 heads, 64 for 16; more are finer.
    layer: of the teacher, from shallow (0) or from deep (-1); for large teachers one of the upper middle, 21 of 24.
    query_weight, key_weight, value_weight: >= 0.

    *Needs*: `queries`, `keys` and `values` of both (`attn: true` in the zoo), of the same tokens.
    *Relates to*: weight 1 alone on unlabelled text, then `ce`; 1 to 10 beside `ce` and `kd`. For equal heads `minilm`.
    """
    require(relation_heads >= 1, "relation_heads", relation_heads, ">= 1")
    weights = {"query_weight": query_weight, "key_weight": key_weight, "value_weight": value_weight}
    students = student_queries, student_keys, student_values
    teachers = teacher_queries, teacher_keys, teacher_values
    terms = []
    for (name, weight), student, teacher in zip(weights.items(), students, teachers, strict=True):
        require(weight >= 0, name, weight, ">= 0")
        last, aim = student[-1], teacher[pick("layer", teacher, layer, "teacher")]
        heads = math.gcd(relation_heads, last.shape[-1], aim.shape[-1])
        terms.append(weight * relations_apart(last, aim, heads, attention_mask))
    return torch.stack(terms).sum(0)
