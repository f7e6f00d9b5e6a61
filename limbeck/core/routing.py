"""Mixtures of experts: a layer of them, and a way to say from outside which of its experts a layer uses.

A router reads places [..., D], taken as P in all, and gives (logits [P, N], gates [P, K], experts [P, K]): scores of
all N experts, and of each place the K that it uses with the weight of each. So do those of Mixtral, Qwen-MoE, OLMoE and
their like in transformers, which are steered in the same way.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.errors import BadInput
from limbeck.core.maths import upcast

Choose = Callable[[Tensor], Tensor]  # gate probabilities [P, N] -> the experts to use [P, K]


class Router(nn.Module):
    """Linear scores; the `top_k` likeliest experts, with their probabilities made to sum to 1.

    balance: in training, each expert's handicap in the choice moves by so much against its share of the places (Wang et
    al. 2024, 2408.15664); gates are without it. 0 leaves the load to itself.
    """

    bias: Tensor

    def __init__(self, width: int, num_experts: int, top_k: int, balance: float = 0.0) -> None:
        super().__init__()
        require(num_experts >= 2, "experts", num_experts, ">= 2")
        require(1 <= top_k <= num_experts, "top", top_k, f"in [1, {num_experts}]")
        require(balance >= 0, "balance", balance, ">= 0")
        self.num_experts, self.top_k, self.balance = num_experts, top_k, balance
        self.weight = nn.Parameter(0.02 * torch.randn(num_experts, width))
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.flatten(0, -2), self.weight)
        p = upcast(logits).softmax(-1)
        experts = (p.detach() + self.bias).topk(self.top_k, -1).indices
        if self.training and self.balance and torch.is_grad_enabled():
            with torch.no_grad():
                load = F.one_hot(experts, self.num_experts).sum((0, 1)).to(self.bias)
                self.bias += self.balance * (load.mean() - load).sign()
        return logits, renormalised(p, experts).to(x.dtype), experts


class Experts(nn.Module):
    """Sum over the chosen experts of gate x expert(x): [..., D] -> [..., D]. An expert is a GELU layer of `hidden`."""

    def __init__(self, width: int, hidden: int, num_experts: int, top_k: int, balance: float = 0.0) -> None:
        super().__init__()
        self.router = Router(width, num_experts, top_k, balance)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        _, gates, chosen = self.router(x)
        out = torch.zeros_like(flat)
        for n, expert in enumerate(self.experts):
            place, rank = (chosen == n).nonzero(as_tuple=True)
            made = gates[place, rank].unsqueeze(-1) * expert(flat[place])
            out = out.index_add(0, place, made.to(out.dtype))
        return out.view_as(x)


def renormalised(probabilities: Tensor, experts: Tensor) -> Tensor:
    """Gates of the experts in use, which sum to 1: [P, N], [P, K] -> [P, K]."""
    gates = probabilities.gather(-1, experts)
    return gates / gates.sum(-1, keepdim=True)


def every(probabilities: Tensor) -> Tensor:
    """All experts at every place: [P, N] -> [P, N]."""
    return torch.arange(probabilities.shape[-1], device=probabilities.device).expand_as(probabilities)


def sampled(probabilities: Tensor, count: int, chance: float) -> Tensor:
    """`count` experts a place: with probability `chance` drawn by their gates without replacement, else the likeliest.

    [P, N] -> [P, count], by torch's global generator.
    """
    best = probabilities.topk(count, -1).indices
    if not chance:
        return best
    drawn = torch.multinomial(probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny), count)
    return torch.where(torch.rand_like(probabilities[:, :1]) < chance, drawn, best)


def routers(module: nn.Module) -> dict[str, nn.Module]:
    """The routers of a network, by path. Raises BadInput when it has none that can be steered."""
    found = {path: layer for path, layer in module.named_modules() if _is_router(layer)}
    if not found:
        raise BadInput(
            f"no layer of {type(module).__name__} chooses among experts in a known way; take tiny_moe_lm, or a "
            "transformers model whose routers give (logits, gates, experts), such as Mixtral or Qwen-MoE"
        )
    return found


def _is_router(layer: nn.Module) -> bool:
    weight, count = getattr(layer, "weight", None), getattr(layer, "num_experts", None)
    known = isinstance(weight, Tensor) and weight.ndim == 2 and hasattr(layer, "top_k")
    return known and isinstance(count, int) and weight.shape[0] == count  # type: ignore[union-attr]


@contextmanager
def routed(module: nn.Module, choose: Choose | None = None) -> Iterator[Mapping[str, Tensor]]:
    """Inside, every router uses the experts that `choose` picks, with gates renormalised over them.

    choose: left out, they choose as ever. Yields the gate probabilities [P, N] of the last call of each, by path.
    """
    seen: dict[str, Tensor] = {}

    def steer(path: str) -> Callable[..., tuple[Tensor, ...] | None]:
        def hook(layer: nn.Module, _inputs: object, output: object) -> tuple[Tensor, ...] | None:
            if not isinstance(output, tuple) or len(output) != 3 or output[1].shape != output[2].shape:
                raise BadInput(f"{path} ({type(layer).__name__}) does not give (logits, gates, experts)")
            logits, gates, _ = output
            seen[path] = upcast(logits).softmax(-1)
            if choose is None:
                return None
            experts = choose(seen[path].detach())
            return logits, renormalised(seen[path], experts).to(gates.dtype), experts

        return hook

    handles = [layer.register_forward_hook(steer(path)) for path, layer in routers(module).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def imbalance(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' mean gates over the valid places; 0 when all get the same.

    probabilities [P, N], mask [...] of P places in all -> []. The importance loss of Shazeer et al. 2017, eq. 7.
    """
    if mask is not None:
        valid = mask.flatten().unsqueeze(-1)
        probabilities = torch.where(valid, probabilities, 0.0) / valid.sum().clamp_min(1) * len(probabilities)
    load = probabilities.mean(0)
    return load.var(correction=0) / load.mean().square().clamp_min(torch.finfo(load.dtype).tiny)
