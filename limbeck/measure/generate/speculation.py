"""How much faster a teacher writes when the student drafts for it, counted while it writes."""

from torch import Tensor

from limbeck.core.card import method, require


@method(
    paper="Leviathan et al. 2023, algorithm 1",
    year=2022,
    arxiv="2211.17192",
    differs="the end of a text counts as the teacher's own token",
    row=("distillspec", "domain_draft_training"),
)
def speculation(
    student_drafts: Tensor,
    teacher_calls: Tensor,
    *,
    texts: int = 16,
    length: int = 32,
    prompt: int = 8,
    block: int = 5,
    temperature: float = 0.0,
) -> dict[str, float]:
    """What was kept of the drafts in real speculative decoding.  [N, 2], [N] -> two numbers

    draft_acceptance: share in [0, 1] of the drafted tokens that the teacher judged and kept; 0 where it judged none.
    draft_efficiency: tokens written for each call of the teacher, in [1, block + 1]; without drafts it is 1.

    texts: >= 1, the first of the set that have a prompt, which is continued.
    length: >= 1, tokens written at most for each; no text grows longer than those of the set.
    prompt: >= 1, tokens at the start that are given; more where the mask begins later, as in chats.
    block: >= 1, tokens that the student drafts for each call.
    temperature: >= 0, of both; 0 is greedy decoding.

    *Needs*: a teacher with the student's vocabulary; a table of texts. Two models of transformers write by its own
        assisted generation, all others by `limbeck.core.speculative.speculate`.
    *Relates to*: `acceptance` predicts the same from what both say about given texts, for next to no time.
    *Differs*: see the card.
    """
    for name, value in {"texts": texts, "length": length, "prompt": prompt, "block": block}.items():
        require(value >= 1, name, value, ">= 1")
    require(temperature >= 0, "temperature", temperature, ">= 0")
    kept, refused = student_drafts.double().sum(0).tolist()
    calls = teacher_calls.double().sum().item()
    judged = kept + refused
    return {
        "draft_acceptance": kept / judged if judged else 0.0,
        "draft_efficiency": (kept + calls) / calls if calls else 1.0,
    }
