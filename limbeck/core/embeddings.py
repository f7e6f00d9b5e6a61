"""Word embeddings of another width: what remains of them in fewer dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.core.taps import unwrap


def squeezed(embedding: Tensor, width: int) -> Tensor:
    """The `width` leading principal directions of an embedding, uncentred: U S of its SVD. [V, D] -> [V, width]

    Inner products of words are the nearest that so few dimensions allow, and the same with all of them; 0 beyond.
    """
    u, s, _ = torch.linalg.svd(embedding.detach().double(), full_matrices=False)
    kept = (u * s)[:, :width]
    return nn.functional.pad(kept, (0, width - kept.shape[1])).to(embedding.dtype)


def word_embedding(module: nn.Module) -> nn.Embedding:
    """A network's embedding of words: the one that transformers names, else the one with most rows."""
    inner: Any = unwrap(module)
    if hasattr(inner, "get_input_embeddings"):
        found = inner.get_input_embeddings()
    else:
        all_ = [layer for layer in inner.modules() if isinstance(layer, nn.Embedding)]
        found = max(all_, key=lambda layer: layer.num_embeddings, default=None)
    if not isinstance(found, nn.Embedding):
        raise BadInput(f"{type(inner).__name__} embeds no words, so there is nothing to inherit or to start from")
    return found


def inherit_words(student: nn.Module, teacher: nn.Module) -> None:
    """Start a student's word embedding from the teacher's, squeezed to its width. Raises BadInput for other words."""
    mine, its = word_embedding(student), word_embedding(teacher)
    if mine.num_embeddings != its.num_embeddings:
        raise BadInput(
            f"the student embeds {mine.num_embeddings:,} words, the teacher {its.num_embeddings:,}: only an embedding "
            "of the same words can be inherited"
        )
    with torch.no_grad():
        mine.weight.copy_(squeezed(its.weight, mine.embedding_dim))
