"""Sampling from any network that maps tokens [B, T] to next-token logits [B, T, V]."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.maths import upcast
from limbeck.core.nets import evaluating, outputs
from limbeck.core.taps import unwrap

# ---------------------------------------------------------------- one token


def chances(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """softmax(logits / temperature) cut to its likeliest tokens and renormalised: [..., V] -> [..., V].

    temperature: >= 0; at 0 all is on the likeliest. top_p: in (0, 1], the mass that the fewest likeliest tokens reach;
    the others get none.
    """
    require(temperature >= 0, "temperature", temperature, ">= 0")
    require(0 < top_p <= 1, "top_p", top_p, "in (0, 1]")
    logits = upcast(logits)
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    p = torch.softmax(logits / temperature, -1)
    if top_p == 1:
        return p
    falling, order = p.sort(-1, descending=True)
    kept = falling.where(falling.cumsum(-1) - falling < top_p, torch.zeros_like(falling))  # mass before the token
    return torch.zeros_like(p).scatter_(-1, order, kept / kept.sum(-1, keepdim=True))


def draw(probabilities: Tensor) -> Tensor:
    """One class from each distribution [..., V] -> [...], by torch's global generator."""
    return torch.multinomial(probabilities.flatten(0, -2), 1).view(probabilities.shape[:-1])


def choose(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """One class drawn from `chances`: [..., V] -> [...]; the likeliest at temperature 0."""
    return logits.argmax(-1) if temperature == 0 else draw(chances(logits, temperature, top_p))


# ---------------------------------------------------------------- a growing text


class Room:
    """Keys and values [B, h, T, D] of one layer, in room for `length` tokens that is made once; `read` are in it."""

    def __init__(self, length: int) -> None:
        self.length, self.read = length, 0
        self.keys, self.values = torch.empty(0), torch.empty(0)

    @torch.no_grad()
    def take(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of everything read so far, once these [B, h, t, D] are added to it."""
        end = self.read + keys.shape[2]
        require(end <= self.length, "length", self.length, f">= {end}, the tokens that are to be read")
        if not self.read:
            shape = (*keys.shape[:2], self.length, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, self.read : end], self.values[:, :, self.read : end] = keys, values
        self.read = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Memory:
    """What a network of our own has read of a text: a `Room` a layer. length: tokens, at most."""

    def __init__(self, length: int, layers: int) -> None:
        self.length, self.rooms = length, [Room(length) for _ in range(layers)]

    @property
    def read(self) -> int:
        """Tokens that are in it."""
        return self.rooms[0].read if self.rooms else 0

    def forget(self, length: int) -> None:
        """Keep the first `length` tokens alone."""
        for room in self.rooms:
            room.read = min(room.read, length)


class Reader:
    """Next-token logits of one network on texts that grow.

    A causal transformers model keeps the keys and values of what it has read in its own cache, and a network with a
    method `memory(length)` in a `Memory`, so that a further token costs one place; any other network reads the text
    anew. The cache lives as long as the reader.

    room: tokens that the text will have, if known; a longer one moves to twice the room.
    """

    def __init__(self, module: nn.Module, room: int = 64) -> None:
        self.module, self.room = module, room
        self.cache: Any = None
        self.seen = 0
        takes = _arguments(module)
        self.caches, self.keeps = "past_key_values" in takes, "logits_to_keep" in takes
        self.memory = self._remembering(room)

    def _remembering(self, length: int) -> Memory | None:
        makes = getattr(unwrap(self.module), "memory", None)
        return makes(length) if inspect.ismethod(makes) else None  # a bank that is called so is no method

    def after(self, tokens: Tensor, last: int = 1) -> Tensor:
        """Logits of what follows each of the last places of `tokens` [B, T]: [B, last, V].

        Up to where it has been read, the text must be what it was; see `forget`.
        """
        logits: Tensor
        self.forget(tokens.shape[1] - last)
        if self.memory is not None:
            if tokens.shape[1] > self.memory.length:
                self.memory, self.seen = self._remembering(2 * tokens.shape[1]), 0
            out = self.module(tokens[:, self.seen :], memory=self.memory)
            self.seen = tokens.shape[1]
            logits = out["logits"]
            return logits[:, -last:]
        if not self.caches:
            logits = outputs(self.module, {"inputs": tokens})["logits"]
            return logits[:, -last:]
        more = {"logits_to_keep": last} if self.keeps else {}
        out = self.module(input_ids=tokens[:, self.seen :], past_key_values=self.cache, use_cache=True, **more)
        self.cache, self.seen = out.past_key_values, tokens.shape[1]
        logits = out.logits
        return logits[:, -last:]

    def forget(self, length: int) -> None:
        """Keep what was read of the first `length` tokens alone; the rest may change."""
        if length >= self.seen:
            return
        if self.memory is not None:
            self.memory.forget(length)
            self.seen = length
            return
        layers = getattr(self.cache, "layers", ())
        if length and layers and all(type(layer).__name__ == "DynamicLayer" for layer in layers):
            self.cache.crop(length - self.seen)  # below 0: how many to drop, in old and new versions
            self.seen = length
        else:  # windows and recurrent states cannot be rolled back
            self.cache, self.seen = None, 0


def _arguments(module: nn.Module) -> set[str]:
    """What a causal transformers model can be given; nothing for any other network."""
    inner: Any = unwrap(module)
    config = getattr(inner, "config", None)
    if config is None or getattr(inner, "main_input_name", "") != "input_ids":
        return set()
    if getattr(config, "is_encoder_decoder", False) or not inner.can_generate():
        return set()
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # an adapter's forward names nothing
    return set(inspect.signature(base.forward).parameters)


# ---------------------------------------------------------------- whole texts


class Written(NamedTuple):
    """tokens: [B, P + length]. logprobs: the same shape, log-probability of each token under the distribution that it
    was drawn from; 0 where it was given or follows the end."""

    tokens: Tensor
    logprobs: Tensor


@torch.no_grad()
def write(
    module: nn.Module,
    prompts: Tensor,
    length: int,
    temperature: float = 1.0,
    *,
    top_p: float = 1.0,
    mix: Sequence[tuple[nn.Module, float]] = (),
    lengths: Tensor | None = None,
    end: int | None = None,
    words: int | None = None,
) -> Written:
    """Continue `prompts` [B, P] by `length` tokens drawn from the network.

    The network is asked in eval mode and without gradient; randomness is torch's global generator. A row with a
    shorter prompt goes on right where its own prompt stops, so that all rows end together.

    length: tokens after the longest prompt, >= 0. temperature: >= 0, where 0 takes the likeliest token.
    top_p: in (0, 1], see `chances`. mix: further networks with their shares >= 0, sum <= 1: each token is drawn from
    the mean of the distributions, in which `module` has the share that is left. lengths: [B] tokens of each row that
    are its prompt, in [1, P]; all P when None. end: token that ends a text; what follows it in a row is filled with it.
    words: ids from it on are no words and never drawn, as those that fill up a head; None for none.
    """
    starts, tokens = begun(prompts, length, lengths)
    total = sum(share for _, share in mix)
    require(all(s >= 0 for _, s in mix) and total <= 1, "mix", [s for _, s in mix], "shares >= 0 with a sum <= 1")
    require(not mix or temperature > 0, "temperature", temperature, "> 0 where networks are mixed")
    voices = [(module, 1.0 - total), *mix]
    readers = [(Reader(net, tokens.shape[1]), share) for net, share in voices if share > 0]
    logprobs = torch.zeros(tokens.shape, device=tokens.device)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with evaluating(*(net for net, _ in voices)):
        for t in range(int(starts.min()), tokens.shape[1]):
            said = [share * chances(r.after(tokens[:, :t])[:, -1, :words], temperature, top_p) for r, share in readers]
            p = torch.stack(said).sum(0) if len(said) > 1 else said[0]
            drawn = draw(p) if temperature > 0 else p.argmax(-1)
            free = (t >= starts) & ~ended
            logprobs[:, t] = torch.where(free, p.gather(-1, drawn[:, None])[:, 0].log(), 0.0)
            tokens[:, t] = torch.where(free, drawn, tokens[:, t])
            if end is not None:
                tokens[:, t] = torch.where(ended, end, tokens[:, t])
                ended |= free & (tokens[:, t] == end)
                if ended.all():
                    tokens[:, t + 1 :] = end
                    break
    return Written(tokens, logprobs)


def sample(
    module: nn.Module,
    prompts: Tensor,
    length: int,
    temperature: float = 1.0,
    *,
    top_p: float = 1.0,
    mix: Sequence[tuple[nn.Module, float]] = (),
    lengths: Tensor | None = None,
    end: int | None = None,
    words: int | None = None,
) -> Tensor:
    """The tokens of `write`: [B, P] -> [B, P + length]."""
    return write(
        module, prompts, length, temperature, top_p=top_p, mix=mix, lengths=lengths, end=end, words=words
    ).tokens


class Checked(NamedTuple):
    """tokens: [B, P + length]. replaced: the same shape, True where the teacher's word stands for the student's.
    calls: how often the teacher was asked."""

    tokens: Tensor
    replaced: Tensor
    calls: int


@torch.no_grad()
def checked(
    student: nn.Module,
    teacher: nn.Module,
    prompts: Tensor,
    length: int,
    temperature: float = 1.0,
    *,
    top_k: int,
    block: int = 5,
    top_p: float = 1.0,
    teacher_temperature: float = 1.0,
    teacher_top_p: float = 1.0,
    lengths: Tensor | None = None,
    end: int | None = None,
    words: int | None = None,
) -> Checked:
    """Continue `prompts` by the student's tokens, where each that is not among the teacher's `top_k` is replaced.

    The student drafts `block` tokens, the teacher reads them in one call, and all rows go on after the first place at
    which any token was replaced: what comes later was drafted for another text. Each row is distributed as if it had
    been checked token by token. The drawn tokens are those of `write` as long as nothing is replaced.

    top_k: tokens that the teacher lets pass, >= 1. block: >= 1. temperature, top_p: of the student's draws.
    teacher_temperature, teacher_top_p: of the teacher's replacements. lengths, end, words: as in `write`.
    """
    require(top_k >= 1, "top_k", top_k, ">= 1")
    require(block >= 1, "block", block, ">= 1")
    starts, tokens = begun(prompts, length, lengths)
    replaced = torch.zeros_like(tokens, dtype=torch.bool)
    writer, judge, calls = Reader(student, tokens.shape[1]), Reader(teacher, tokens.shape[1]), 0
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    t = int(starts.min())
    with evaluating(student, teacher):
        while t < tokens.shape[1] and not ended.all():
            size = min(block, tokens.shape[1] - t)
            places = torch.arange(t, t + size, device=tokens.device)
            over = ended[:, None].repeat(1, size + 1)  # whether a row has ended before each place of the block
            for i in range(size):
                drawn = choose(writer.after(tokens[:, : t + i])[:, -1, :words], temperature, top_p)
                tokens[:, t + i] = torch.where(t + i >= starts, drawn, tokens[:, t + i])
                if end is not None:
                    tokens[:, t + i] = torch.where(over[:, i], end, tokens[:, t + i])
                    over[:, i + 1] = over[:, i] | ((t + i >= starts) & (tokens[:, t + i] == end))
            logits, calls = upcast(judge.after(tokens[:, : t + size - 1], size)[..., :words]), calls + 1
            own = logits.gather(-1, tokens[:, t : t + size, None])
            refused = ((logits > own).sum(-1) >= top_k) & (places >= starts[:, None]) & ~over[:, :size]
            anywhere = refused.any(0)
            if bool(anywhere.any()):
                i = int(anywhere.int().argmax())
                instead = choose(logits[:, i], teacher_temperature, teacher_top_p)
                tokens[:, t + i] = torch.where(refused[:, i], instead, tokens[:, t + i])
                replaced[:, t + i] = refused[:, i]
                for reader in (writer, judge):
                    reader.forget(t + i)
                ended = over[:, i]
                if end is not None:
                    ended = ended | ((t + i >= starts) & (tokens[:, t + i] == end))
                t += i + 1
            else:
                ended, t = over[:, size], t + size
        if end is not None and t < tokens.shape[1]:
            tokens[:, t:] = end
    return Checked(tokens, replaced, calls)


def begun(prompts: Tensor, length: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the prompt of each row ends [B], and the texts [B, P + length] with room for what is to be written."""
    rows, longest = prompts.shape
    require(length >= 0, "length", length, ">= 0")
    require(longest >= 1, "prompts", tuple(prompts.shape), "at least one token long: the network continues something")
    starts = torch.full((rows,), longest, device=prompts.device) if lengths is None else lengths.to(prompts.device)
    require(bool(((starts >= 1) & (starts <= longest)).all()), "lengths", starts.tolist(), f"in [1, {longest}]")
    return starts, torch.cat([prompts, prompts.new_zeros(rows, length)], 1)
