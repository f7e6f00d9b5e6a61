"""Networks that several files of tests ask."""

import torch
from torch import Tensor, nn


class Speaker(nn.Module):
    """A small recurrent language model: [B, T] -> [B, T, words]. asked: rows that it was asked about so far."""

    def __init__(self, seed: int, words: int, hidden: int = 8, spread: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(words, hidden)
            self.body = nn.GRU(hidden, hidden, batch_first=True)
            self.head = nn.Linear(hidden, words)
        with torch.no_grad():
            self.head.weight *= spread
        self.asked = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.asked += len(tokens)
        out: Tensor = self.head(self.body(self.embed(tokens))[0])
        return out
