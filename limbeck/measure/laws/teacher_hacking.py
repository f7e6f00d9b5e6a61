"""Does the student come nearer to the truth, or only to its teacher's mistakes?"""

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import kl


@method(
    paper="Tiapkin et al. 2025, golden and proxy metric",
    year=2025,
    arxiv="2502.02671",
    differs="the golden distance is estimated from what the oracle wrote, against the teacher's own, per token",
)
def teacher_hacking(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Proxy and golden distance of the student.  [..., C] x 2, [...] -> two numbers

    proxy: mean KL(teacher || student) in nats, >= 0: what distillation lowers. golden: mean log p_teacher(label) - log
    p_student(label) in nats: how much farther than its teacher the student is from whoever gave the labels, the oracle.
    Up to a constant it is KL(oracle || student), so both curves turn alike. Where golden rises while proxy falls, the
    student hacks its teacher. Both are 0 for identical models, and equal in the mean when the labels are the teacher's.

    *Needs*: held-out labels that are data, or samples of the oracle, and not the teacher's; the figures of several
        times of a training, such as those of runs of different lengths.
    *Relates to*: `agreement` for the proxy alone. Cures are fresh answers instead of many passes over the same, and
        more different prompts.
    *Differs*: see the card.
    """
    require(labels.numel() > 0, "labels", tuple(labels.shape), "the labels of at least one example")
    student, teacher, y = (
        student_logits.double().flatten(0, -2),
        teacher_logits.double().flatten(0, -2),
        labels.flatten(),
    )
    golden = F.cross_entropy(student, y) - F.cross_entropy(teacher, y)
    return {"proxy": kl(student, teacher).mean().item(), "golden": golden.item()}
