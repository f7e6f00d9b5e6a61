"""Whoever can be asked what a teacher says of documents: a network that is here, or anything that answers likewise."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.core.checkpoint import fingerprint
from limbeck.core.errors import BadInput
from limbeck.core.headloss import Head
from limbeck.core.nets import device_of, evaluating, heads, outputs
from limbeck.core.signals.coding import Entries
from limbeck.core.signals.keys import Document
from limbeck.core.signals.kinds import Kind

__all__ = ["Given", "Local", "Source", "fingerprint_of"]

Given = Tensor | Entries


class Source(Protocol):
    """Whoever can be asked what a teacher says.

    fingerprint: tells teachers apart. vocab: number of token ids; 0 when the answers show it. alone: whether a
    document's answer does not depend on which others are asked about with it.
    """

    fingerprint: str
    vocab: int
    alone: bool

    def ask(self, documents: Sequence[Document], kind: Kind) -> Iterator[Given]:
        """For each document logits [P, V], hidden states [P, D], a vector [D], or entries of its P asked places."""
        ...


class Local:
    """A network as a source. It may return what `nets.outputs` understands; hidden states come with their head."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.fingerprint, self.vocab, self.alone = module, fingerprint(module), 0, False

    def ask(self, documents: Sequence[Document], kind: Kind) -> Iterator[Given]:
        """Padded at the end, so that a causal network never sees the padding."""
        device = device_of(self.module)
        long = max(len(d.tokens) for d in documents) - (kind.name != "embedding")
        inputs = torch.zeros(len(documents), max(1, long), dtype=torch.long)
        real = torch.zeros_like(inputs, dtype=torch.bool)
        for row, document in enumerate(documents):
            tokens = document.tokens[: inputs.shape[1]]
            inputs[row, : len(tokens)], real[row, : len(tokens)] = tokens, True
        with torch.no_grad(), evaluating(self.module):
            out = outputs(self.module, {"inputs": inputs.to(device), "attention_mask": real.to(device)})
        if kind.wants not in out:
            raise BadInput(
                f"a store of kind `{kind.name}` needs a teacher that returns {kind.wants!r}, got {', '.join(out)}"
            )
        for row, document in enumerate(documents):
            found: Tensor = out[kind.wants][row]
            yield found if kind.name == "embedding" else found[torch.from_numpy(document.asked).to(device)]

    def head(self, document: Document) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The linear map from hidden states to logits, and what else is done to these; tried out on a document."""
        inner: Any = self.module
        found = (
            inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else getattr(inner, "head", None)
        )
        if not isinstance(found, nn.Linear):
            raise BadInput(
                f"{type(inner).__name__} has no linear `head` and no output embeddings: its hidden states alone "
                "give no logits; choose another kind"
            )
        told = heads(inner) if hasattr(inner, "get_output_embeddings") else {}
        cap, scale = told.get("head_softcap"), told.get("head_scale")
        with torch.no_grad(), evaluating(self.module):
            out = outputs(self.module, {"inputs": document.tokens[None].to(device_of(self.module))})
            if not {"hidden", "logits"} <= set(out):
                raise BadInput(f"a store of kind `hidden` needs a teacher that returns 'hidden', got {', '.join(out)}")
            again = Head(out["hidden"], found.weight, found.bias, scale or 1.0, cap).logits().float()
        off = float((again - out["logits"].float()).abs().max() / again.abs().max().clamp_min(1e-6))
        if off > 0.02:
            raise BadInput(
                f"the hidden states and the head of {type(inner).__name__} do not give its logits (off by {off:.0%}): "
                "something else lies between; choose another kind"
            )
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in found.state_dict().items()}
        return tensors, {"fingerprint": fingerprint(found), "softcap": cap, "scale": scale}


def fingerprint_of(head: dict[str, Tensor]) -> str:
    """The fingerprint of a linear layer with these tensors."""
    layer = nn.Linear(1, 1, bias="bias" in head, device="meta")
    for key, value in head.items():
        setattr(layer, key, nn.Parameter(value, requires_grad=False))
    return fingerprint(layer)
