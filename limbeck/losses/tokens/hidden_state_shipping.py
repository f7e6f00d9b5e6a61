"""The teacher sends its last hidden states, and a copy of its head turns them into words where the student is."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.headloss import Head, Term, divergences, head_loss


def _head(*, temperature: float = 1.0) -> Term:
    return Term(divergences.forward_kl, temperature, temperature**2)


@method(
    paper="practice since 2025, without a paper: hidden states instead of logits between teacher and student (NeMo-RL)",
    year=2025,
    code="",
    differs="the row's tiles run over tokens and hold whole rows of the vocabulary, not stretches of it with a running "
    "maximum; no quantisation of the hidden states to eight bits",
    variant_of="forward_kl",
    head=_head,
)
def hidden_state_shipping(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    student_head_bias: Tensor | None = None,
    teacher_head_bias: Tensor | None = None,
    student_head_scale: float | None = None,
    teacher_head_scale: float | None = None,
    student_head_softcap: float | None = None,
    teacher_head_softcap: float | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)) of z = cap(scale (head hidden + bias)).  [..., D], [V, D] -> [...]

    The divergence of `forward_kl` over the whole vocabulary, to rounding, from D numbers a token instead of V: with
    D = 2048 and V = 152,000 a channel, or a store, 74 times narrower. Logits of neither side are built whole. The
    widths of student and teacher may differ; their vocabularies must be one. The teacher's head stays as it is. Places
    outside the mask are 0 and cost nothing.

    temperature: T > 0; language models are matched at 1.

    *Needs*: hidden states before the head and the heads' weights (any model of transformers, `tiny_lm`); of the
        teacher from a store of kind `hidden`, which keeps a copy of the head, or from the network itself.
    *Relates to*: use `sampled_kl` when 2 D bytes a token are too many: it needs about 30, at the price of noise;
        `forward_kl` when the teacher runs beside the student.
    *Differs*: see the card. An adapter on the student's head is not seen here.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    cap = (student_head_softcap or None, teacher_head_softcap or None)
    student = Head(student_hidden, student_head, student_head_bias, scale=student_head_scale or 1.0, softcap=cap[0])
    teacher = Head(teacher_hidden, teacher_head, teacher_head_bias, scale=teacher_head_scale or 1.0, softcap=cap[1])
    (value,) = head_loss(student, teacher, [_head(temperature=temperature)], mask=mask)
    return temperature**2 * value
