"""Word-level distillation: at every place the student covers all that the teacher finds possible."""

from torch import Tensor

from limbeck.core import maths
from limbeck.core.card import method, require
from limbeck.core.headloss import Term, divergences


def _head(*, temperature: float = 1.0) -> Term:
    return Term(divergences.forward_kl, temperature, temperature**2)


@method(
    paper="Kim and Rush 2016, section 3.1",
    year=2016,
    arxiv="1606.07947",
    code="jongwooko/distillm@d47e77f:distillm/losses.py",
    differs="the word-level term of the row only, no beam-searched sequences; divergence, not cross-entropy: less the "
    "teacher's entropy, a constant without gradient",
    variant_of="kd",
    zero_at_match=True,
    head=_head,
)
def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) at each place.  [..., V] x 2 -> [...]

    Mean-seeking: the student pays for every word that the teacher would say and it would not, so it spreads out.

    temperature: T > 0; language models are matched at 1.

    *Needs*: logits of both over one vocabulary, aligned (the place t predicts the token t + 1); the mask of the batch
        takes out padding and prompts.
    *Relates to*: `kd` with the defaults of language. Use `reverse_kl` when a small student should stay with what the
        teacher surely says, above all on its own samples.
    *Differs*: see the card; libraries that scale by T without T^2 agree at T = 1.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    return temperature**2 * maths.kl(student_logits, teacher_logits.detach(), temperature)
