"""Examples of one class should be spoken of alike: each learns what the student says of the others of its class."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import log_probs
from limbeck.core.responses import rows


@method(
    paper="Yun et al. 2020, eq. 1-2",
    year=2020,
    arxiv="2003.13964",
    code="alinlab/cs-kd@b447f25:train.py",
    differs="partners are in the same batch and all of them count, evenly: the mean over which of them is drawn. The "
    "paper draws one from the whole class and lets it through the network apart, without learning from it",
    exceptions={"gradcheck": "what partners say is a constant in the gradient on purpose"},
)
def cs_kd(student_logits: Tensor, labels: Tensor, mask: Tensor | None = None, *, temperature: float = 4.0) -> Tensor:
    """T^2 mean over partners j of KL(softmax(z_j / T) || softmax(z_i / T)).  [..., C], [...] -> [...]

    Partners of i are the other examples with its label, whose z_j is a constant; an example without any costs 0.

    temperature: T > 0.

    *Needs*: labels; batches in which classes repeat: `per_class` of at least 2 in the recipe's `train`, or batches
        several times as large as the number of classes. Memory for a number a pair of examples.
    *Relates to*: beside `ce`, both at weight 1 (3 for fine-grained classes); made against over-confidence. `dlb` and
        `ps_kd` compare an example with itself at another time; with a teacher use `kd`.
    *Differs*: see the card.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    logits, counts = rows(student_logits, mask)
    log_q = log_probs(logits, temperature)
    share = partners(labels.flatten(), None if counts is None else counts.squeeze(1)).to(log_q)
    log_p = log_q.detach()
    p = log_p.exp()
    with torch.autocast(p.device.type, enabled=False):  # which would take the products in half precision
        said, own = share @ p, share @ (p * log_p).sum(-1)
    return temperature**2 * (own - (said * log_q).sum(-1)).relu().view_as(labels)


def partners(labels: Tensor, counts: Tensor | None = None) -> Tensor:
    """How much each of N examples counts as a partner of each: [N] -> [N, N], rows that sum to 1, or 0 without any."""
    same = (labels.unsqueeze(1) == labels) & (labels >= 0)  # those without a label are no class
    same = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if counts is not None:
        same = same & counts
    return same.double() / same.sum(1, keepdim=True).clamp_min(1)
