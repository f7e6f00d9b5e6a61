"""Small random tensors for every name of the vocabulary, shaped as losses and measures meet them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from limbeck.core import find
from limbeck.core.errors import BadInput

B, T, C, N, K = 6, 3, 5, 24, 4  # examples, tokens, classes, examples of the whole set, kept entries or negatives
WHOLE = (  # no dimension counts examples
    *("student_head", "teacher_head", "student_head_bias", "teacher_head_bias", "teacher_scales", "teacher_shifts"),
    *("edges", "progress", "features", "curves"),
    *(
        "student_embedding",
        "teacher_embedding",
        "same_words",
        "nearest_words",
        "word_starts",
        "projection",
        "projection_weights",
    ),
)
# a loss that asks for one of these reads two tokenisations: the teacher's has a token more, and more words
TWO = ("student_vocab_logits", "teacher_vocab_logits", "teacher_spans", "teacher_labels", "teacher_mask")
PROBABILITIES = ("teacher_logprobs", "teacher_tail", "teacher_weights")  # what no scale may be put on
Inputs = dict[str, Any]


def tensors(
    method: Any,
    *,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    lead: tuple[int, ...] | None = None,
    seed: int = 0,
    optional: bool = True,
) -> Inputs:
    """What `method` asks for: {name: tensor, or list of tensors}.

    scale: factor on every floating-point signal. lead: leading dimensions of logits and labels; (B, T) for losses on
    tokens, else (B,). optional: also what it takes when it is there.
    """
    names = find.needs(method) + (find.wants(method) if optional else [])
    if lead is None:
        lead = (B, T) if ".tokens." in f"{method.__module__}." else (B,)
    two = any(name in TWO for name in names)
    made = {name: _make(name, lead, Generator().manual_seed(1000 * seed + _salt(name)), two) for name in names}
    return {name: _cast(name, value, dtype, scale) for name, value in made.items()}


def _salt(name: str) -> int:
    return sum(i * ord(c) for i, c in enumerate(name, 1))


def _cast(name: str, value: Any, dtype: torch.dtype, scale: float) -> Any:
    if isinstance(value, list):
        return [_cast(name, v, dtype, scale) for v in value]
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    signal = name.startswith(("student_", "teacher_", "teachers_")) and name not in PROBABILITIES
    return (value * scale if signal else value).to(dtype)


def _make(name: str, lead: tuple[int, ...], g: Generator, two: bool = False) -> Any:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    side, _, rest = name.partition("_")
    wide = 1 if side == "teacher" else 0  # teachers are wider than students
    places, words = (T + wide, C + 2 + 2 * wide) if two else (T, C)
    kinds: dict[str, Callable[[], Any]] = {
        "inputs": lambda: torch.randint(C, lead, generator=g) if two else normal(B, 1, 8, 8),
        "teacher_inputs": lambda: torch.randint(C, (B, places), generator=g),
        "teacher_labels": lambda: torch.randint(C, (B, places), generator=g),
        "teacher_mask": lambda: torch.arange(B * places).view(B, places) % 7 != 5,
        "teacher_attention_mask": lambda: torch.arange(places).expand(B, places) < 4 - torch.arange(B)[:, None] % 2,
        "student_spans": lambda: torch.tensor([[0, 1, 1], [0, 1, 2], [-1, 0, 1]]).repeat(B // 3, 1),
        "teacher_spans": lambda: torch.tensor([[0, 1, 1, 1], [0, 0, 1, 2], [0, 0, 1, 1]]).repeat(B // 3, 1),
        "same_words": lambda: torch.tensor([[0, 1], [1, 0], [2, 4], [5, 8]]),
        "nearest_words": lambda: torch.tensor([1, 0, -1, 4, 2, 3, 3, 6, 5]),
        "word_starts": lambda: torch.arange(9) % 4 == 1,
        "projection": lambda: torch.tensor([[0, 1], [1, 0], [2, 4], [3, 2], [3, 5], [4, 3], [5, 8], [6, 6], [6, 7]]),
        "projection_weights": lambda: torch.tensor([1, 1, 1, 0.9, 0.1, 1, 1, 0.5, 0.5], dtype=torch.float64),
        "labels": lambda: _classes(lead, g),
        "mask": lambda: (
            torch.arange(lead.numel() if isinstance(lead, torch.Size) else torch.Size(lead).numel()).view(lead) % 3 != 1
        ),
        "attention_mask": lambda: torch.arange(T) <= torch.arange(B).unsqueeze(1) % T,
        "index": lambda: torch.randperm(N, generator=g)[:B],
        "domain": lambda: torch.randint(2, (B,), generator=g),
        "weights": lambda: torch.rand(B, generator=g, dtype=torch.float64) + 0.1,
        "phrases": lambda: torch.tensor([[0, 0, 0], [0, 1, 1], [-1, 0, 0]]).repeat(B // 3, 1),
        "privacy": lambda: torch.rand(*lead, generator=g, dtype=torch.float64),
        "progress": lambda: 0.5,
        "negatives": lambda: torch.randint(N, (B, K), generator=g),
        "foreground": lambda: torch.rand(B, 4, generator=g) > 0.5,
        "edges": lambda: torch.randint(B, (2, 2 * B), generator=g),
        "features": lambda: normal(N, 3),
        "curves": lambda: normal(4, N),
        "chosen": lambda: torch.zeros(N, dtype=torch.bool),
        "teachers_logits": lambda: normal(2, *lead, C),
        "teacher_ids": lambda: torch.rand(*lead, C, generator=g).argsort(-1)[..., :K],
        "teacher_logprobs": lambda: normal(*lead, C).log_softmax(-1).sort(-1, descending=True).values[..., :K],
        "teacher_tail": lambda: torch.rand(*lead, generator=g, dtype=torch.float64) / 2,
        "teacher_weights": lambda: torch.rand(*lead, K, generator=g, dtype=torch.float64),
        "real_samples": lambda: normal(N, 3),
        "logits": lambda: normal(*lead, C),
        "feats": lambda: [normal(B, 3 + 2 * wide, 8, 8), normal(B, 4 + 2 * wide, 4, 4)],
        "attn": lambda: [normal(B, 2, T, T).softmax(-1) for _ in range(2 + wide)],
        "tokens": lambda: normal(B, places, 4 + 2 * wide),
        "attn_scores": lambda: [normal(B, 2, T, T) for _ in range(2 + wide)],
        "queries": lambda: [normal(B, T, 4 + 2 * wide) for _ in range(2 + wide)],
        "keys": lambda: [normal(B, T, 4 + 2 * wide) for _ in range(2 + wide)],
        "values": lambda: [normal(B, T, 4 + 2 * wide) for _ in range(2 + wide)],
        "scales": lambda: [normal(5).abs() + 0.1, normal(6).abs() + 0.1],
        "shifts": lambda: [normal(5), normal(6)],
        "head_bias": lambda: normal(C),
        "head_scale": lambda: 0.5 + wide,
        "head_softcap": lambda: 5.0 + wide,
        "exits": lambda: [normal(B, 2, 4) for _ in range(3)],
        "emb": lambda: normal(B, 4 + 2 * wide),  # as wide as the last of the feats, which a head may read too
        "hidden": lambda: normal(B, places, 4 + 2 * wide),
        "head": lambda: normal(words, 4 + 2 * wide),
        "embedding": lambda: normal(words, 4 + 2 * wide),
        "vocab_logits": lambda: normal(B, places, words),
        "map": lambda: normal(B, C, 4, 4),
        "cls": lambda: normal(B, 4, C),
        "box": lambda: normal(B, 4, 4).abs().cumsum(-1),
        "heat": lambda: normal(B, 2, 4, 4),
        "scores": lambda: normal(B, 7),
        "image": lambda: normal(B, 3 + wide),
        "text": lambda: normal(B, 3 + wide),
        "samples": lambda: normal(N, 3),
    }
    key = name if name in kinds else rest
    if key not in kinds:
        raise BadInput(f"the suite has no toy for {name!r}; add it to limbeck/conformance/tensors.py")
    return kinds[key]()


def _classes(lead: tuple[int, ...], g: Generator) -> Tensor:
    """Class labels, of which three that every mask lets count are alike, so that there is something within a class."""
    labels = torch.randint(C, lead, generator=g)
    labels.view(-1)[[0, 3, 5]] = labels.view(-1)[0].clone()
    return labels


def leaves(inputs: Inputs, side: str) -> list[tuple[str, Tensor]]:
    """The floating-point tensors of one side ("student", "teacher"), each with the name it came under."""
    found: list[tuple[str, Tensor]] = []
    for name, value in inputs.items():
        if name.split("_")[0].rstrip("s") == side:
            several = value if isinstance(value, list) else [value]
            found += [(name, v) for v in several if isinstance(v, Tensor) and v.is_floating_point()]
    return found


def change(inputs: Inputs, rule: Callable[[str, Tensor], Tensor]) -> Inputs:
    """New inputs: `rule(name, tensor)` of every tensor, within lists too; everything else as it was."""
    return {
        name: [rule(name, v) for v in value]
        if isinstance(value, list)
        else rule(name, value)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def fresh(inputs: Inputs, *, grad: bool = True) -> Inputs:
    """Copies that share nothing with the originals; floating-point ones ask for a gradient if `grad`."""
    return change(inputs, lambda _, v: v.detach().clone().requires_grad_(grad and v.is_floating_point()))


def permute(inputs: Inputs, order: Tensor) -> Inputs:
    """The same examples in another order."""
    moved = {"teachers_logits": 1}
    return change(inputs, lambda name, v: v if name in WHOLE else v.index_select(moved.get(name, 0), order))
