"""Several teachers speak as one: the student learns the softened mean of their logits."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import kl, upcast


@method(
    paper="Timiryasov and Tastet 2023 (Baby Llama), distillation loss",
    year=2023,
    arxiv="2308.02019",
    code="timinar/BabyLlama@3035185:distill-ensemble-pretraining-baby-llama.py",
    differs="a mean over the tokens; the code divides by the batch alone and so weighs this term by the length of a "
    "text against its cross-entropy: multiply the weight by the length for its balance",
)
def baby_llama(student_logits: Tensor, teachers_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    """T^2 KL(softmax(mean_m teacher_m / T) || softmax(student / T)).  [..., V], [M, ..., V] -> [...]

    The mean of logits is the geometric mean of the teachers' probabilities: likely is what all of them find likely.

    temperature: T > 0; 2 in the paper.

    *Needs*: logits of M teachers over the student's vocabulary.
    *Relates to*: 0.5 ce + 0.5 of this for a student of little data, whose teachers learned from the same; `kd` for one
        teacher.
    *Differs*: see the card.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    return temperature**2 * kl(student_logits, upcast(teachers_logits.detach()).mean(0), temperature)
