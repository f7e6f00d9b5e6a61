"""The likeliest continuations of a text by one network, and texts that are written once and then kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from limbeck.core.bank import everyone
from limbeck.core.card import require
from limbeck.core.generate import Reader, begun
from limbeck.core.headloss.route import head_of
from limbeck.core.maths import log_probs
from limbeck.core.nets import Batch, Nets, can_spare_logits, evaluating, outputs
from limbeck.core.partition import rows
from limbeck.core.policy import starts, text, told_anew

MOVABLE = ("DynamicLayer", "DynamicSlidingWindowLayer")  # kinds of cache whose rows may change places
NEVER = float("-inf")


class Beams(NamedTuple):
    """The K best texts of each prompt, the best first.

    tokens: [B, K, P + length]. logprobs: [B, K], log-likelihood of what was written, the end included; -inf where there
    are fewer texts than K. counts: [B, K], how many tokens were written, the end included.
    """

    tokens: Tensor
    logprobs: Tensor
    counts: Tensor


@torch.no_grad()
def beam(
    module: nn.Module,
    prompts: Tensor,
    length: int,
    beams: int = 5,
    *,
    penalty: float = 0.0,
    lengths: Tensor | None = None,
    end: int | None = None,
) -> Beams:
    """Continue `prompts` [B, P] by up to `length` tokens, K ways each, so that log p(y | x) / |y|^penalty is large.

    Of all one-token continuations of the K texts at hand the K best stay. One that has ended keeps its place as long as
    it is among the best, and is not continued; |y| counts its end. At penalty 0 that is plain likelihood, which prefers
    short texts; at 1 it is the mean over tokens. With K no smaller than the number of texts the search is exhaustive.

    The network is asked in eval mode and without gradient, only about texts that go on, and by its own cache where it
    has one. A row with a shorter prompt goes on right where its own prompt stops, so that all rows end together.

    length: tokens after the longest prompt, >= 0. beams: K >= 1. penalty: >= 0. lengths: [B] tokens of each row that
    are its prompt, in [1, P]; all P when None. end: token that ends a text; what follows it in a row is filled with it.
    """
    start, texts = begun(prompts, length, lengths)
    count = len(texts)
    require(beams >= 1, "beams", beams, ">= 1")
    require(penalty >= 0, "penalty", penalty, ">= 0")
    tokens = texts[:, None].repeat(1, beams, 1)
    logprobs = torch.full((count, beams), NEVER, device=prompts.device)
    logprobs[:, 0] = 0.0  # at first there is one text alone
    counts, ended = torch.zeros_like(tokens[..., 0]), torch.zeros_like(tokens[..., 0], dtype=torch.bool)
    places = torch.arange(count * beams, device=prompts.device).view(count, beams)
    reader, parents = _Rows(module), places
    with evaluating(module):
        for t in range(int(start.min()) if count else 0, texts.shape[1]):
            asked = (~ended & (logprobs > NEVER)).flatten().nonzero()[:, 0]
            if not len(asked):
                break
            said = log_probs(reader.next(tokens.flatten(0, 1)[asked, :t], asked, parents.flatten()[asked]))
            best = said.topk(min(beams, said.shape[-1]), -1)
            free = (t >= start)[:, None].expand(-1, beams)
            go_on = (free & ~ended)[..., None]
            grown = torch.full((count * beams, best.values.shape[-1]), NEVER, device=prompts.device)
            words = tokens.new_zeros(grown.shape)
            grown[asked], words[asked] = best.values.to(grown.dtype), best.indices
            grown = torch.where(go_on, logprobs[..., None] + grown.view(count, beams, -1), NEVER)
            stays = torch.where(ended, 0 if end is None else end, tokens[..., t])
            words = torch.where(go_on, words.view(count, beams, -1), stays[..., None])
            grown[..., 0] = torch.where(go_on[..., 0], grown[..., 0], logprobs)
            more = counts + go_on[..., 0]
            rank = grown / more.clamp_min(1).to(grown.dtype)[..., None] ** penalty
            chosen = rank.flatten(1).topk(beams, 1).indices
            parents = chosen // grown.shape[-1]
            tokens = tokens.gather(1, parents[..., None].expand_as(tokens))
            tokens[..., t] = words.flatten(1).gather(1, chosen)
            logprobs, counts = grown.flatten(1).gather(1, chosen), more.gather(1, parents)
            before, free = ended.gather(1, parents), free.gather(1, parents)
            ended = before | (free & (tokens[..., t] == end)) if end is not None else before
            parents = parents + places[:, :1]
        if end is not None:
            over = (torch.arange(tokens.shape[2], device=tokens.device) - start[:, None])[:, None] >= counts[..., None]
            tokens = torch.where(over & ended[..., None], end, tokens)
    return Beams(tokens, logprobs, counts)


class _Rows(Reader):
    """A reader whose rows are picked anew for each token: some end, others are continued several ways."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.spares = not self.caches and can_spare_logits(module)
        self.held = torch.empty(0, dtype=torch.long)  # the number of each row that the cache knows

    def next(self, tokens: Tensor, numbers: Tensor, parents: Tensor) -> Tensor:
        """Logits [R, V] of what follows texts [R, t]. numbers: [R] of these rows, growing; parents: [R], the numbers
        that they went under when they had a token less."""
        if self.cache is not None:
            if all(type(layer).__name__ in MOVABLE for layer in getattr(self.cache, "layers", (None,))):
                self.cache.batch_select_indices(torch.searchsorted(self.held, parents))
            else:  # recurrent states and fixed windows stay where they are
                self.cache, self.seen = None, 0
        self.held = numbers
        if self.spares:
            said = {f"student_{k}": v for k, v in outputs(self.module, {"inputs": tokens}, logits=False).items()}
            if (head := head_of(said, "student")) is not None:
                return replace(head, hidden=head.hidden[:, -1]).logits()
            self.spares = False
        return self.after(tokens)[:, -1]


# ---------------------------------------------------------------- texts that are written once


class Kept(nn.Module):
    """A text an example, as registered buffers, so that a resumed run goes on with those of the run that was cut.

    examples: of the training set. width: tokens of a text.
    """

    texts: Tensor
    known: Tensor

    def __init__(self, examples: int, width: int) -> None:
        super().__init__()
        self.register_buffer("texts", torch.zeros(examples, width, dtype=torch.int32))
        self.register_buffer("known", torch.zeros(examples, dtype=torch.bool))

    @torch.no_grad()
    def read(self, batch: Batch, write: Callable[[Batch], Tensor]) -> Tensor:
        """The texts of a batch, [B, width]; those that nobody wrote before are written, all in one call.

        write: (batch) -> texts [B, width] of its examples.
        """
        index = batch["index"]
        new = (~self.known[index]).nonzero()[:, 0]
        found = self.texts[index].long()
        if len(new):
            found[new] = write(rows(batch, new))
        index, all_found = everyone(index), everyone(found)
        self.texts[index] = all_found.to(self.texts.dtype)
        self.known[index] = True
        return found


def best(module: nn.Module, batch: Batch, beams: int, *, penalty: float, prompt: int, end: int) -> Beams:
    """`beam` on the prompts of a batch, to the batch's own length: texts [B, K, T + 1].

    prompt, end: as in `policy.rollout`.
    """
    old, given = text(batch), starts(batch, prompt)
    longest = int(given.max())
    stop = end if end >= 0 else None
    return beam(module, old[:, :longest], old.shape[1] - longest, beams, penalty=penalty, lengths=given, end=stop)


def keep_texts(nets: Nets, probe: Batch) -> None:
    """Room for a text of every example, as nets.written; none where batches do not tell which examples they hold."""
    if "index" in probe:
        nets.written = Kept(int(probe.get("examples") or probe["index"].max() + 1), text(probe).shape[1])


def with_texts(nets: Nets, batch: Batch, write: Callable[[Batch], Tensor], *, prompt: int, end: int) -> Batch:
    """The batch with the texts that `write` makes of it, or that it made before; see `Kept.read`, `policy.rollout`."""
    texts = nets.written.read(batch, write) if "written" in nets and "index" in batch else write(batch)
    return told_anew(batch, texts, starts(batch, prompt), end)
