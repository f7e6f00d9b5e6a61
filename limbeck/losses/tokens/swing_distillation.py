"""Where a word may be private, the teacher is softened and blurred before the student sees it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import FLOOR, kl_logprobs, log_probs, pair


@method(
    paper="Li et al. 2022, dynamic temperature and noise",
    year=2022,
    arxiv="2212.08349",
    differs="the paper's recogniser, its map from privacy to temperature and its noise are not known here: T = T0 (1 + "
    "heat s), Laplace noise where s is above a threshold, and the recogniser is the user's or a list of tokens",
)
def swing_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    privacy: Tensor | None = None,
    *,
    private: Sequence[int] = (),
    temperature: float = 1.0,
    heat: float = 4.0,
    noise: float = 0.0,
    threshold: float = 0.5,
) -> Tensor:
    """T^2 KL(noisy softmax(teacher / T) || softmax(student / T)) with a T of each place.  [..., V] x 2 -> [...]

    T = temperature (1 + heat s), s the probability that the next word is private: what the teacher knows by heart
    there becomes nearly uniform. Noise is added to its probabilities there, which are cut at 0 and sum to 1 again.

    private: token ids that are private, such as digits; s = 1 where one is the label. Not read when the batch brings
        `privacy`, s as a tagger of names and numbers finds it.
    temperature: T0 > 0, of public words.
    heat: >= 0; how many times T0 is added for a private word.
    noise: >= 0, the scale of the Laplace noise: sensitivity / privacy budget of one answer; 0 for none.
    threshold: noise comes where s is above this, in [0, 1].

    *Needs*: logits of both over one vocabulary; labels with `private`, or `privacy`.
    *Relates to*: beside `ce` on public words, at 0.5 each, instead of `forward_kl`. Texts whose labels are private
        leak through `ce` as well: mask them there. What leaks is measured by `exposure`, of `canaries` in the data.
    *Differs*: see the card. No guarantee of differential privacy follows without accounting over all answers.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    require(heat >= 0, "heat", heat, ">= 0")
    require(noise >= 0, "noise", noise, ">= 0")
    require(0 <= threshold <= 1, "threshold", threshold, "in [0, 1]")
    student, teacher = pair(student_logits, teacher_logits.detach())
    chance = torch.zeros_like(teacher[..., 0])
    if privacy is not None:
        chance = privacy.detach().to(teacher).clamp(0, 1)
    elif private:
        if labels is None:
            raise ValueError("`private` lists tokens to look for among the labels, and the batch holds none")
        chance = torch.isin(labels, torch.tensor(list(private), device=labels.device)).to(teacher)
    softness = temperature * (1 + heat * chance)
    log_p = log_probs(teacher, softness.unsqueeze(-1))
    if noise:
        draw = torch.empty_like(log_p).exponential_() - torch.empty_like(log_p).exponential_()  # Laplace of scale 1
        real = (log_p > FLOOR).to(log_p)  # words at -inf only fill up a head
        blurred = (log_p.exp() + noise * draw).clamp_min(0) * real
        total = blurred.sum(-1, keepdim=True)
        blurred = torch.where(total > 0, blurred / total, real / real.sum(-1, keepdim=True))
        log_p = torch.where((chance > threshold).unsqueeze(-1), blurred.log().clamp_min(FLOOR), log_p)
    return softness**2 * kl_logprobs(log_p, log_probs(student, softness.unsqueeze(-1)))
