"""Teacher and student are both compared with a mixture of the two: between forward and reverse divergence."""

from functools import partial

from torch import Tensor

from limbeck.core import maths
from limbeck.core.card import method, require
from limbeck.core.headloss import Term, divergences


def _head(*, beta: float = 0.5, temperature: float = 1.0) -> Term:
    return Term(partial(divergences.js, beta=beta), temperature, temperature**2)


@method(
    paper="Agarwal et al. 2023 (GKD), generalised Jensen-Shannon divergence",
    year=2023,
    arxiv="2306.13649",
    differs="the divergence of the row only; on-policy texts are `gkd`",
    row="gkd",
    zero_at_match=True,
    head=_head,
)
def js(student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon: T^2 (beta KL(p || m) + (1 - beta) KL(q || m)), m = beta p + (1 - beta) q.

    p = softmax(teacher / T), q = softmax(student / T).  [..., V] x 2 -> [...]. At most log 2 at beta = 0.5 (times T^2),
    symmetric there.

    beta: in (0, 1); small ones behave like beta times `forward_kl`, large ones like (1 - beta) times `reverse_kl`: the
        gradient fades at both ends, so raise the weight there.
    temperature: T > 0; language models are matched at 1.

    *Needs*: logits of both over one vocabulary, aligned.
    *Relates to*: use `gkd` to train on the student's own texts; `skew_kl` for a bound without the loss of gradient.
    *Differs*: see the card.
    """
    require(0 < beta < 1, "beta", beta, "in (0, 1); the ends are forward_kl and reverse_kl")
    require(temperature > 0, "temperature", temperature, "> 0")
    return temperature**2 * maths.js(student_logits, teacher_logits.detach(), beta, temperature)
