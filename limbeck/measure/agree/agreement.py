"""Does the student match the teacher? That is another question than whether it is right."""

from torch import Tensor

from limbeck.core.card import method
from limbeck.core.maths import kl


@method(
    paper="Stanton et al. 2021, section 3",
    year=2021,
    arxiv="2106.05945",
    code="samuelstanton/gnosis@7a40c5d:gnosis/boilerplate/eval_epoch.py",
    differs="share instead of percent",
    row="kd_fidelity_study",
)
def agreement(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, float]:
    """Fidelity of the student: how far it is from the teacher, whoever is right.  [..., C] x 2 -> two numbers

    agreement: share of examples with the same first choice, in [0, 1]. kl: mean KL(teacher || student) in nats at
    temperature 1, >= 0. An example with a nan among its logits does not agree.

    *Needs*: logits of both over the same classes, on data that was not trained on.
    *Relates to*: `accuracy` for being right. A student may be accurate at low fidelity; fidelity matters when it has
        to stand in for the teacher (ensembles, speculative decoding, robustness).
    *Differs*: see the card.
    """
    broken = student_logits.isnan().any(-1) | teacher_logits.isnan().any(-1)
    same = (student_logits.argmax(-1) == teacher_logits.argmax(-1)) & ~broken
    divergence = kl(student_logits.double(), teacher_logits.double())
    return {"agreement": same.double().mean().item(), "kl": divergence.mean().item()}
