"""How much faster a teacher writes when the student drafts for it, from what both say about the same places."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.generate import chances


@method(
    paper="Leviathan et al. 2023, theorem 3.5 and eq. 1",
    year=2022,
    arxiv="2211.17192",
    differs="the mean over given places, where the theory takes the places of written texts as independent",
    row=("distillspec", "domain_draft_training"),
)
def acceptance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    lenience: float = 1.0,
    blocks: tuple[int, ...] = (3, 5, 7),
) -> dict[str, float]:
    """Acceptance of drafts in speculative decoding, and tokens per call of the teacher.  [..., V] x 2 -> numbers

    acceptance: a = mean sum_v min(q_v, p_v / lenience), q the student and p the teacher, in [0, 1]; 1 - TV at lenience
    1, where the teacher's distribution stays as it is. efficiency_g: (1 - a^(g + 1)) / (1 - a) for each block of g
    drafted tokens, in [1, g + 1].

    temperature: of both, >= 0; 0 is greedy decoding: the share of equal first choices.
    lenience: e in (0, 1]; a draft is kept with probability min(1, p / (e q)), which trades likeness for speed.
    blocks: g, tokens that the student drafts for each call, each >= 1.

    *Needs*: logits of both over one vocabulary, on texts like those to be written. *Relates to*: `speculate` and
    `assisted` of limbeck.core.speculative count the same in real decoding. *Differs*: see the card.
    """
    require(0 < lenience <= 1, "lenience", lenience, "in (0, 1]")
    require(bool(blocks) and min(blocks) >= 1, "blocks", blocks, "at least one, each >= 1")
    q, p = chances(student_logits.double(), temperature), chances(teacher_logits.double(), temperature)
    found = (p / lenience).minimum(q).sum(-1).mean().clamp(0, 1).item()
    return {"acceptance": found, **{f"efficiency_{g}": sum(found**i for i in range(g + 1)) for g in blocks}}
