"""What methods share that learn from texts written during training: prompts, rollouts, replay, advantages."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.bank import everyone
from limbeck.core.card import require
from limbeck.core.errors import BadInput
from limbeck.core.generate import sample
from limbeck.core.headloss import Term, divergences
from limbeck.core.headloss.divergences import Divergence
from limbeck.core.loop import Stage
from limbeck.core.maths import js, kl, reverse_kl
from limbeck.core.nets import Batch, Nets, evaluating

ONE_TOKENIZER = (
    "texts written during training need a teacher with the student's tokenizer; this one has another, and only "
    "`distillspec` reads what the student writes in the tokens of both"
)

# ---------------------------------------------------------------- prompts and completions


def text(batch: Batch) -> Tensor:
    """The whole texts of a shifted batch: [B, T + 1]."""
    return torch.cat([batch["inputs"], batch["labels"][:, -1:].clamp_min(0)], 1)


def starts(batch: Batch, prompt: int = 1) -> Tensor:
    """How many tokens of each text are its prompt: [B]; one more than there are inputs when none is free.

    prompt: tokens at the start that are given at least, >= 1; more where the mask begins later: what comes before its
    first True is all prompt.
    """
    inputs: Tensor = batch["inputs"]
    length = inputs.shape[1]
    free: Tensor = batch["mask"].bool() if "mask" in batch else torch.ones_like(inputs, dtype=torch.bool)
    first = torch.where(free.any(1), free.int().argmax(1) + 1, length + 1)
    return first.clamp(min(prompt, length + 1))


def completions(batch: Batch, prompt: int = 1) -> Tensor:
    """Where a label is a token of the completion that counts: [B, T]."""
    place = torch.arange(1, batch["inputs"].shape[1] + 1, device=batch["inputs"].device)
    mask = place >= starts(batch, prompt)[:, None]
    return mask & batch["mask"].bool() if "mask" in batch else mask


def told_anew(batch: Batch, tokens: Tensor, begun: Tensor, end: int = -1, *, retell: bool = False) -> Batch:
    """The batch with other texts [B, T + 1], of which everything from place `begun` [B] on counts, up to the end.

    What a store says of the old texts is left out. retell: where the teacher has another tokenizer, read the new texts
    in its tokens, by the batch's `retell`, so that losses between two tokenizers can be had of them.
    """
    if "teacher_inputs" in batch and not (retell and "retell" in batch):
        raise BadInput(ONE_TOKENIZER)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    written = torch.arange(tokens.shape[1], device=tokens.device) >= begun[:, None]
    mask = written[:, 1:]
    if end >= 0:
        mask = mask & ((written[:, :-1] & (inputs == end)).cumsum(1) == 0)
    new: Batch = {k: v for k, v in batch.items() if not k.startswith("teacher_")}
    new |= {"inputs": inputs, "labels": labels, "mask": mask}
    if "attention_mask" in batch:
        new["attention_mask"] = torch.ones_like(inputs)
    return new | batch["retell"](inputs, labels, mask) if "teacher_inputs" in batch else new


def rollout(
    batch: Batch, write: Callable[..., Tensor], *, prompt: int = 1, end: int = -1, retell: bool = False
) -> Batch:
    """The batch with completions written anew, from the same prompts and to the same length.

    write: (prompts [B, P], length, *, lengths [B], end) -> [B, P + length], such as `generate.sample` of a network;
        given `words`, too, where the batch says how many there are: ids from it on fill up a head.
    end: id of the token that ends a text, -1 for none; what follows it does not count. retell: see `told_anew`.
    """
    old, begun = text(batch), starts(batch, prompt)
    longest = int(begun.max())
    length, stop = old.shape[1] - longest, end if end >= 0 else None
    words = {"words": vocabulary(batch)} if "words" in batch else {}
    new = write(old[:, :longest], length, lengths=begun, end=stop, **words)
    return told_anew(batch, new, begun, end, retell=retell)


def vocabulary(batch: Batch) -> int | None:
    """How many ids are words, where the batch says so."""
    return int(batch["words"]) if "words" in batch else None


def own_words(nets: Nets, batch: Batch, chance: float, *, temperature: float, prompt: int, end: int) -> Batch:
    """With that chance the batch with completions by the student, drawn at `temperature`; else as it is."""
    if float(torch.rand(())) >= chance:
        return batch
    return rollout(batch, partial(sample, nets.student, temperature=temperature), prompt=prompt, end=end)


def either(first: Tensor, yes: Batch, no: Batch) -> Batch:
    """Examples of `yes` where `first` [B] is True, of `no` elsewhere: inputs, labels, mask and attention_mask."""
    names = ("inputs", "labels", "mask", "attention_mask")
    out = {k: torch.where(first[:, None], yes[k], no[k]) for k in names if k in yes and k in no}
    return {**{k: v for k, v in no.items() if k not in names}, **out}


# ---------------------------------------------------------------- what was said


@torch.no_grad()
def asked(nets: Nets, player: str, batch: Batch) -> Tensor:
    """Logits [B, T, V] as a network had them when it wrote: in eval mode, without gradient."""
    with evaluating(nets.find(player)):
        logits: Tensor = nets.run(player, batch)["logits"]
    return logits


def divergence(student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence, forward KL at beta 0 and reverse KL at 1: [..., V] x 2 -> [...]."""
    if beta == 0:
        return kl(student_logits, teacher_logits, temperature)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits, temperature)
    return js(student_logits, teacher_logits, beta, temperature)


def divergence_of_heads(beta: float, temperature: float = 1.0, weight: float = 1.0) -> Term:
    """The same from hidden states."""
    ends: dict[float, Divergence] = {0: divergences.forward_kl, 1: divergences.reverse_kl}
    return Term(ends.get(beta, partial(divergences.js, beta=beta)), temperature, weight)


# ---------------------------------------------------------------- advantages


def to_go(values: Tensor, mask: Tensor, discount: float = 1.0) -> Tensor:
    """Sum of each value and those after it, each `discount` times less: [B, T] -> [B, T]; masked ones are 0."""
    values, total = torch.where(mask, values, 0.0), torch.zeros_like(values[:, 0])
    sums = []
    for t in reversed(range(values.shape[1])):
        total = values[:, t] + discount * total
        sums.append(total)
    return torch.where(mask, torch.stack(sums[::-1], 1), 0.0)


def remaining(mask: Tensor) -> Tensor:
    """How many valid places there are from each on, itself included: [B, T], at least 1."""
    return mask.long().flip(1).cumsum(1).flip(1).clamp_min(1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Values over the valid places shifted and scaled to mean 0 and variance 1, 0 elsewhere: [B, T] -> [B, T]."""
    count = mask.sum().clamp_min(1)
    centred = torch.where(mask, values - torch.where(mask, values, 0.0).sum() / count, 0.0)
    return centred * (centred.square().sum() / count + 1e-8).rsqrt()


# ---------------------------------------------------------------- schedules and state

SHARES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "exponential": lambda progress: 200**-progress,
    "sigmoid": lambda progress: 1 / (1 + math.exp(20 * (progress - 0.5))),
    "data": lambda progress: 1.0,
    "student": lambda progress: 0.0,
}


def share(schedule: str, progress: float) -> float:
    """Share of texts from the data that are left at `progress` in [0, 1], by one of `SHARES`."""
    require(schedule in SHARES, "schedule", schedule, f"one of {', '.join(SHARES)}")
    return SHARES[schedule](progress)


def warmed_up(supervised: float, steps: int) -> Iterator[Stage]:
    """A stage on the data's own words with that share in [0, 1) of the steps, none at 0, then one on written texts."""
    first = max(1, round(supervised * steps)) if supervised else 0
    if first:
        yield Stage(first, "supervised", until=supervised)
    yield Stage(max(1, steps - first), "on policy")


class Numbers(nn.Module):
    """A few tensors that a method remembers, as registered buffers, so that they are saved and resumed like weights."""

    def __init__(self, **values: Tensor | float) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, torch.as_tensor(value).detach().clone())


class Replay(nn.Module):
    """First in, first out: the texts of the last batches, as registered buffers; the same on all processes.

    capacity: texts kept, >= 1. like: a batch, of which the buffers take shape and type.
    """

    head: Tensor
    filled: Tensor

    COLUMNS = ("inputs", "labels", "mask")

    def __init__(self, capacity: int, like: Mapping[str, Any]) -> None:
        super().__init__()
        require(capacity >= 1, "capacity", capacity, ">= 1")
        self.capacity = capacity
        for name in self.COLUMNS:
            column = like[name] if name in like else torch.ones_like(like["inputs"], dtype=torch.bool)
            kind = torch.bool if name == "mask" else column.dtype
            self.register_buffer(f"of_{name}", column.new_zeros((capacity, *column.shape[1:]), dtype=kind))
        self.register_buffer("head", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        return int(self.filled)

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """The oldest leave when it is full."""
        columns = {name: everyone(batch[name].to(getattr(self, f"of_{name}").dtype)) for name in self.COLUMNS}
        count = len(columns["inputs"])
        kept = min(count, self.capacity)
        places = (self.head + torch.arange(count - kept, count, device=self.head.device)) % self.capacity
        for name, column in columns.items():
            getattr(self, f"of_{name}")[places] = column[count - kept :]
        self.head.copy_((self.head + count) % self.capacity)
        self.filled.copy_((self.filled + count).clamp_max(self.capacity))

    def draw(self, count: int) -> Batch:
        """`count` texts by the global generator, all different when there are enough."""
        if not len(self):
            raise BadInput("the replay buffer is empty: nothing was written yet")
        few = count > len(self)
        index = torch.randint(len(self), (count,)) if few else torch.randperm(len(self))[:count]
        return {name: getattr(self, f"of_{name}")[index.to(self.head.device)] for name in self.COLUMNS}
