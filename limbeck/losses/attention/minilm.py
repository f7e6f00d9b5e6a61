"""The student's last layer looks where the teacher's last layer looks, and its values relate as the teacher's do."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import pick
from limbeck.core.heads import log_attention, looks_apart, relations_apart


@method(
    paper="Wang et al. 2020, eq. 4-8",
    year=2020,
    arxiv="2002.10957",
    differs="the weight of the value relations, 1 in the paper, is a knob for its ablation, and so is the teacher's "
    "layer, the last in the paper; attention is renormalised over the tokens that are no padding",
    zero_at_match=True,
)
def minilm(
    student_attn: list[Tensor],
    teacher_attn: list[Tensor],
    student_values: list[Tensor],
    teacher_values: list[Tensor],
    attention_mask: Tensor | None = None,
    *,
    value_weight: float = 1.0,
    layer: int = -1,
) -> Tensor:
    """KL(A_t || A_s) + value_weight KL(R_t || R_s), means over heads and tokens, of the last layers alone.  -> [B]

    A [B, h, T, T] is the attention; R = softmax(V V^T / sqrt(D / h)) says for each head how its values [B, T, D / h]
    relate. R has the same shape whatever the width, so that nothing is projected and no weight is learned; layers may
    differ in number and width. Padding neither looks nor is looked at.

    value_weight: of the value relations, >= 0.
    layer: of the teacher, from shallow (0) or from deep (-1, the paper's). Where its last layer looks everywhere alike,
        as after training on a task alone, an earlier one tells more.

    *Needs*: `attn` and `values` of both (`attn: true` in the zoo), the same tokens, as many heads in both layers.
    *Relates to*: weight 1 alone on unlabelled text, then `ce`; beside `ce` and `kd` on a task, 1 to 10. Use `minilm_v2`
        when heads differ in number; `tinybert` matches every layer. For a student of less than half the layers and
        width, teach an assistant of the student's width and the teacher's depth first (`takd`).
    """
    require(value_weight >= 0, "value_weight", value_weight, ">= 0")
    looks, aims = student_attn[-1], teacher_attn[pick("layer", teacher_attn, layer, "teacher")].detach()
    told = teacher_values[pick("layer", teacher_values, layer, "teacher")]
    heads = aims.shape[1]
    if looks.shape[1] != heads:
        raise BadInput(
            f"minilm compares head with head, but the student's last layer has {looks.shape[1]} and the teacher's "
            f"{heads}; use minilm_v2"
        )
    attention = looks_apart(log_attention(looks, attention_mask), log_attention(aims, attention_mask), attention_mask)
    return attention + value_weight * relations_apart(student_values[-1], told, heads, attention_mask)
