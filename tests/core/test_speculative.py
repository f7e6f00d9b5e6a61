"""Speculative decoding: the text is the target's, whoever drafts, and what is counted is what the measure predicts."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core import find
from limbeck.core.errors import BadInput
from limbeck.core.generate import sample
from limbeck.core.speculative import Count, assisted, speculate


class Chain(nn.Module):
    """The next token depends on the last one alone."""

    def __init__(self, seed: int, size: int = 4, spread: float = 1.5) -> None:
        super().__init__()
        self.table = nn.Parameter(spread * torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def test_any_draft_leaves_the_targets_distribution_as_it_is():
    target, draft = Chain(1), Chain(2, spread=3.0)
    p = target.table.softmax(-1).detach()
    wanted = torch.linalg.matrix_power(p, 3)[0]
    torch.manual_seed(0)
    texts, count = speculate(target, draft, torch.zeros(1500, 1, dtype=torch.long), 3, block=2)
    found = torch.bincount(texts[:, 3], minlength=4) / 1500
    assert (found - wanted).abs().max() < 4 * 0.5 / 1500**0.5
    assert count.written == 4500 and count.kept + count.calls == 4500 and 0 < count.acceptance < 1


def test_counts_are_what_the_measure_predicts():
    acceptance = find.get("acceptance")
    q, p = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    target, draft = Chain(1), Chain(2)
    target.table.data, draft.table.data = p.log().expand(4, 4).clone(), q.log().expand(4, 4).clone()
    torch.manual_seed(0)
    for block in (3, 5):
        _, count = speculate(target, draft, torch.zeros(8, 1, dtype=torch.long), 150, block=block)
        found = acceptance(draft.table.detach(), target.table.detach(), blocks=(block,))
        assert math.isclose(found["acceptance"], 0.6, rel_tol=1e-6)  # 0.1 + 0.2 + 0.2 + 0.1
        assert math.isclose(found[f"efficiency_{block}"], (1 - 0.6 ** (block + 1)) / 0.4, rel_tol=1e-6)
        assert abs(count.acceptance - 0.6) < 0.06
        assert abs(count.efficiency - found[f"efficiency_{block}"]) < 0.25
    _, lenient = speculate(target, draft, torch.zeros(8, 1, dtype=torch.long), 150, block=5, lenience=0.5)
    soft = acceptance(draft.table.detach(), target.table.detach(), lenience=0.5)["acceptance"]
    assert abs(lenient.acceptance - soft) < 0.06 and soft > 0.75


def test_the_measure_is_one_only_for_equals_and_efficiency_stays_in_its_range():
    acceptance = find.get("acceptance")
    a, b = torch.randn(50, 9), torch.randn(50, 9)
    total_variation = 0.5 * (a.softmax(-1) - b.softmax(-1)).abs().sum(-1).mean()
    found = acceptance(a, b)
    assert math.isclose(found["acceptance"], 1 - float(total_variation), rel_tol=1e-5)
    assert all(1 < found[f"efficiency_{g}"] < g + 1 for g in (3, 5, 7))
    equal = acceptance(a, a + 3.0)
    assert math.isclose(equal["acceptance"], 1, rel_tol=1e-6) and math.isclose(equal["efficiency_7"], 8, rel_tol=1e-5)
    greedy = acceptance(a, b, temperature=0.0)["acceptance"]
    assert math.isclose(greedy, float((a.argmax(-1) == b.argmax(-1)).double().mean()), rel_tol=1e-6)


def llama(seed: int, layers: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=12,
        num_hidden_layers=layers,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        **sizes,
    )
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def test_transformers_own_assisted_generation_counts_the_same():
    target, draft, prompts = llama(1, 2), llama(2, 1), torch.arange(1, 7).view(2, 3)
    alone = sample(target, prompts, 20, 0.0)
    ours, count = speculate(target, draft, prompts, 20, 0.0, block=3)
    theirs, counted = assisted(target, draft, prompts, 20, block=3)
    assert torch.equal(ours, alone) and torch.equal(theirs, alone)
    assert count == counted and count.written == 40 and count.calls == 40 - count.kept
    perfect = copy.deepcopy(target)
    _, best = assisted(target, perfect, prompts, 20, block=3)
    assert best == Count(written=40, calls=10, kept=30, refused=0) and best.efficiency == 4
    torch.manual_seed(0)
    _, drawn = assisted(target, perfect, prompts, 20, 1.0, block=3)
    assert drawn == best
    with pytest.raises(BadInput, match="cannot `generate`"):
        assisted(Chain(1), draft, prompts, 4)
    with pytest.raises(BadInput, match="one and the same"):
        assisted(target, target, prompts, 4)
