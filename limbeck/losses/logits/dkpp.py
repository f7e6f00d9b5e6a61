"""The teacher's probabilities with those of the wrong classes shuffled: how sure it is, without what resembles what."""

import torch
from torch import Tensor

from limbeck.core.card import method
from limbeck.core.maths import kl_logprobs, log_probs


def shuffled(logprobs: Tensor) -> Tensor:
    """Permute all but the largest entry of each row at random: [..., C] -> [..., C]."""
    classes = torch.arange(logprobs.shape[-1], device=logprobs.device)
    first = classes == logprobs.argmax(-1, keepdim=True)
    source = torch.rand(logprobs.shape, device=logprobs.device).masked_fill(first, -1.0).argsort(-1)
    target = classes.expand(logprobs.shape).masked_fill(first, -1).argsort(-1)
    return torch.empty_like(logprobs).scatter(-1, target, logprobs.gather(-1, source))


@method(
    paper="Furlanello et al. 2018, section 3.2",
    year=2018,
    arxiv="1805.04770",
    row="ban",
    exceptions={"batch order": "every call shuffles the wrong classes of every example anew"},
)
def dkpp(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(shuffled softmax(teacher) || softmax(student)); the likeliest class stays.  [..., C] x 2 -> [...]

    Randomness is torch's global generator.

    *Needs*: logits of both over the same classes; no labels.
    *Relates to*: an ablation of `ban`: what `kd` gains over it is the likeness of classes. With two classes it is `kd`.
    *Differs*: the paper writes cross-entropy; this takes off the teacher's entropy, a constant without gradient.
    """
    return kl_logprobs(shuffled(log_probs(teacher_logits.detach())), log_probs(student_logits))
