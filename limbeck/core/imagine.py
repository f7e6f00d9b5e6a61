"""What methods without data share: pictures of a generator, and what the teacher's predictions on them should be like.

Everything is about the teacher's logits on made pictures, through which the gradient flows on to the pictures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.augment import Augment, Chain, Crop, Flip, ResizedCrop
from limbeck.core.errors import BadInput
from limbeck.core.maths import kl, log_probs
from limbeck.core.nets import Nets, evaluating, outputs, read_by


def imagine(nets: Nets, count: int, latent: int) -> Tensor:
    """`count` new pictures of nets.generator, with gradient."""
    pictures: Tensor = nets.generator(torch.randn(count, latent, device=nets.device))
    return pictures


@torch.no_grad()
def imagined(nets: Nets, count: int, latent: int) -> Tensor:
    """`count` new pictures of nets.generator, without gradient."""
    return imagine(nets, count, latent)


def check_generator(nets: Nets, latent: int) -> tuple[Tensor, dict[str, Any]]:
    """Two pictures of nets.generator and what the teacher returns on them; BadInput when it reads other codes."""
    pictures = read_by(nets.generator, latent, "codes (`latent`)", nets.device)
    with evaluating(nets.teacher):
        return pictures, nets.run("teacher", {"inputs": pictures})


def need_embedding(told: Mapping[str, Any], knob: str) -> None:
    """Raise BadInput unless the teacher returns its features before the head, which `knob` weighs."""
    if "emb" not in told:
        raise BadInput(
            f"the teacher returns no 'emb', which `{knob}` weighs; tap it (taps: {{emb: path}}) or set it to 0"
        )


def need_features(told: Mapping[str, Any], knob: str) -> None:
    """Raise BadInput unless a network returns features of its layers, which `knob` weighs."""
    if "feats" not in told:
        raise BadInput(
            f"a network returns no 'feats', which `{knob}` weighs; tap them (taps: {{feats: [...]}}) or set it to 0"
        )


def unevenness(logits: Tensor) -> Tensor:
    """sum_c p_c log p_c [] of the mean prediction p over the batch; -log C, the least, when all classes are even."""
    p = log_probs(logits).exp().mean(0)
    return (p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()


def agreed(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) where both name the same class, 0 elsewhere: [B, C] x 2 -> [B]; gradient to both."""
    same = student_logits.argmax(-1) == teacher_logits.argmax(-1)
    return torch.where(same, kl(student_logits, teacher_logits), 0.0)


def views(side: int, flip: bool) -> tuple[Augment, Augment]:
    """How pictures of a side are seen as a whole, moved by up to an eighth of it, and how a random part of them is."""
    mirrored = (Flip(),) if flip else ()
    return Chain((Crop(max(1, side // 8)), *mirrored)), Chain((ResizedCrop(0.25), *mirrored))


def look(view: Augment, pictures: Tensor) -> Tensor:
    """The pictures under a view, each under a draw of its own from the global generator."""
    return view.apply(pictures, view.draw(torch.default_generator, len(pictures)))


class _Reader(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Mapping[str, Any]) -> Any:
        return outputs(self.net, batch)


def run_with(nets: Nets, player: str, tensors: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of a network on a batch with some of its parameters replaced, by name. Its buffers are copies, so that
    the network itself, batch-norm statistics included, does not change."""
    net = nets.find(player)
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    state = {f"net.{name}": t for name, t in {**buffers, **tensors}.items()}
    found: dict[str, Any] = torch.func.functional_call(_Reader(net), state, (batch,))
    if player in nets.taps:
        found |= nets.taps[player].read()
    return found


def carrying(value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The scalar `value`, whose gradient with respect to each parameter is the given one, however it was found."""
    carried = sum(((p - p.detach()) * g.detach()).sum() for p, g in zip(parameters, gradients, strict=True))
    return value.detach() + carried
