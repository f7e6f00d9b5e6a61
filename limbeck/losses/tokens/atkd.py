"""Where the teacher is sure of the next word, the student learns only what else could stand there; elsewhere both."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import kl, pair, where_labelled


@method(
    paper="Zhong et al. 2024, token-adaptive distillation",
    year=2024,
    arxiv="2402.11890",
    code="WHU-ZQH/ATKD@71802dc:distill/distill_trainer.py",
    differs="forward divergence only, without the roles turned round; an empty group counts 0, where the code divides "
    "by 0; T^2 as everywhere here",
    zero_at_match=True,
)
def atkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: float = 0.2,
    temperature: float = 1.0,
) -> Tensor:
    """alpha mean_easy(DKD) + (1 - alpha) mean_hard(TKD + DKD), spread over the places.  [..., V] x 2, [...] -> [...]

    KL(teacher || student) = TKD + u DKD with u = 1 - p_label of the teacher, TKD the divergence of [p_label, u] and
    DKD that among the other words. A place is easy when its u is below the median of the batch. Dropping the factor u
    lets a sure teacher speak of the other words; dropping TKD where it is sure saves rote learning.

    Each place holds its term times (places / places of its group), so that the mean over the places that count is the
    sum above.

    alpha: weight of the easy places, in [0, 1].
    temperature: T > 0; language models are matched at 1.

    *Needs*: logits of both over one vocabulary, and the next words. The median is that of what is given at once.
    *Relates to*: use it where a larger teacher makes `forward_kl` worse; `dkd` weighs the two terms alike everywhere.
    *Differs*: see the card.
    """
    require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]")
    require(temperature > 0, "temperature", temperature, "> 0")
    student, teacher = pair(student_logits / temperature, teacher_logits.detach() / temperature)
    student_binary, student_others = _split(student, labels.clamp_min(0))
    teacher_binary, teacher_others = _split(teacher, labels.clamp_min(0))
    is_it_the_label, which_of_the_others = kl(student_binary, teacher_binary), kl(student_others, teacher_others)
    counts = labels >= 0 if mask is None else mask.bool() & (labels >= 0)
    with torch.no_grad():
        doubt = torch.where(counts, teacher_binary.softmax(-1)[..., 1], torch.nan)
        easy = doubt < doubt.nanmedian()
        hard = counts & ~easy
        places = counts.sum().to(doubt)
        share_easy, share_hard = places / easy.sum().clamp_min(1), places / hard.sum().clamp_min(1)
    easy_term = alpha * share_easy * which_of_the_others
    hard_term = (1 - alpha) * share_hard * (is_it_the_label + which_of_the_others)
    value = torch.where(easy, easy_term, torch.where(hard, hard_term, 0.0))
    return where_labelled(temperature**2 * value, labels)


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of [label, any other] [..., 2], and of the others [..., V] with the label at -inf."""
    label = labels.unsqueeze(-1)
    rest = logits.scatter(-1, label, -torch.inf)
    return torch.cat([logits.gather(-1, label), rest.logsumexp(-1, keepdim=True)], -1), rest
