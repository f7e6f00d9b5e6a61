"""Small classifiers of token ids; id 0 is padding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bag(nn.Module):
    """The mean of the tokens' embeddings through one hidden layer. feats: the hidden layer; emb: the same [B, D]."""

    def __init__(self, classes: int, vocab: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width, padding_idx=0)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        real = (inputs != 0).unsqueeze(-1)
        mean = (self.embed(inputs) * real).sum(1) / real.sum(1).clamp_min(1)
        emb = F.relu(self.hidden(mean))
        return {"logits": self.head(emb), "feats": [emb], "emb": emb}


def bag(*, classes: int, vocab: int, width: int = 64) -> Bag:
    """width: of the embedding and of the hidden layer."""
    return Bag(classes, vocab, width)


class TextCNN(nn.Module):
    """Convolutions over 3, 4 and 5 tokens, the largest value of each over the text (Kim 2014, 1408.5882).

    Returns logits [B, classes], feats (one map [B, filters, T] a width of convolution) and emb [B, 3 filters].
    """

    def __init__(self, classes: int, vocab: int, width: int, filters: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(width, filters, k, padding=k - 1) for k in (3, 4, 5))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(3 * filters, classes)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x = self.embed(inputs).transpose(1, 2)
        feats = [F.relu(conv(x)) for conv in self.convs]
        emb = torch.cat([f.amax(2) for f in feats], 1)
        return {"logits": self.head(self.dropout(emb)), "feats": feats, "emb": emb}


def text_cnn(*, classes: int, vocab: int, width: int = 64, filters: int = 64, dropout: float = 0.0) -> TextCNN:
    """width: of the embedding. filters: of each of the three convolutions. dropout: before the head, in [0, 1)."""
    return TextCNN(classes, vocab, width, filters, dropout)
