"""Divergences of two language-model heads from hidden states and head weights; logits are never built."""

from limbeck.core.headloss.heads import Head, Logits, Sparse, Term, ce
from limbeck.core.headloss.loss import head_loss

__all__ = ["Head", "Logits", "Sparse", "Term", "ce", "head_loss"]
