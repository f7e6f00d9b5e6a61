"""How often the label is among the student's first choices."""

from torch import Tensor

from limbeck.core.card import method, require


@method(
    paper="Russakovsky et al. 2015, section 4.1",
    year=2014,
    arxiv="1409.0575",
    differs="share of hits instead of the error",
)
def accuracy(student_logits: Tensor, labels: Tensor, *, top: int = 1) -> float:
    """Share of examples whose label has one of the `top` largest logits.  [..., C], [...] -> number in [0, 1]

    Of equal logits one is taken, whichever comes first; an example with a nan among its logits is a miss.

    top: 1..C; 5 is usual on ImageNet.

    *Needs*: labels. *Relates to*: `agreement` asks the same of the teacher's choice instead of the label; `calibration`
        whether the probabilities can be believed.
    *Differs*: see the card.
    """
    classes = student_logits.shape[-1]
    require(1 <= top <= classes, "top", top, f"in 1..{classes}")
    require(labels.numel() > 0, "labels", tuple(labels.shape), "the labels of at least one example")
    chosen = student_logits.topk(top).indices == labels.unsqueeze(-1)
    hits = chosen.any(-1) & ~student_logits.isnan().any(-1)
    return hits.double().mean().item()
