"""A teacher that only answers: pictures go in, answers come out, each is counted, and there may be so many and no more.

No gradient passes through it. What was answered is remembered, so that a student can go on when nothing more is said.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from limbeck.core.memory import Memory
from limbeck.core.nets import Nets

Answers = Literal["soft", "hard"]


class Queries(nn.Module):
    """How often nets.teacher was asked, and its newest answers, as buffers.

    budget: pictures that it may be asked about, 0 is any number. size: answered pictures that are kept. pictures,
    logits: a few and what it said of them, which count as asked, and like which the buffers are. answers: "soft", its
    logits, or "hard", the class alone, as one-hot times `certainty`. Each process counts its own.
    """

    asked: Tensor

    def __init__(
        self,
        budget: int,
        size: int,
        pictures: Tensor,
        logits: Tensor,
        answers: Answers = "soft",
        certainty: float = 1.0,
    ) -> None:
        super().__init__()
        self.budget, self.answers, self.certainty = budget, answers, certainty
        self.register_buffer("asked", torch.tensor(len(pictures)))
        self.known = Memory(size, {"inputs": pictures, "answers": logits})

    def left(self, reserve: int = 0) -> int | None:
        """How many more it may be asked if `reserve` are kept back; None is any number."""
        return max(0, self.budget - reserve - int(self.asked)) if self.budget else None

    @torch.no_grad()
    def ask(self, nets: Nets, pictures: Tensor, reserve: int = 0) -> Tensor:
        """Answers to the first of the pictures that there is budget for: [B, ...] -> [K, C], K <= B."""
        shown = pictures.detach()[: self.left(reserve)]
        if not len(shown):
            return self.known.get_buffer("of_answers")[:0]
        logits: Tensor = nets.run("teacher", {"inputs": shown})["logits"]
        self.asked += len(shown)
        if self.answers == "soft":
            return logits
        return self.certainty * one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)

    @torch.no_grad()
    def learn(self, nets: Nets, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """As many pictures as were given, with their answers: of the new ones while the budget lasts, which are then
        remembered, and of remembered ones in the place of the others. [B, ...] -> [B, ...], [B, C]"""
        answers = self.ask(nets, pictures)
        seen = len(answers)
        fresh = pictures.detach()[:seen]
        if self.budget and seen:
            self.known.add(inputs=fresh, answers=answers)
        if seen == len(pictures):
            return fresh, answers
        old = self.known.draw(len(pictures) - seen)
        return torch.cat([fresh, old["inputs"]]), torch.cat([answers, old["answers"]])
