"""Sampling from language models: what is given stays, what is drawn follows the network, and nothing is trained."""

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.generate import choose, sample


class Chain(nn.Module):
    """The next token depends on the last one alone: [B, T] -> [B, T, V]; dropout shows the mode it is asked in."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.drop(self.table)[tokens]}


def counting(size: int = 5) -> Chain:
    """After token i comes i + 1, almost surely."""
    return Chain(40.0 * torch.eye(size).roll(1, 1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_any_length_are_kept_and_continued(temperature: float):
    prompts = torch.tensor([[0, 1, 2], [3, 0, 0], [4, 0, 0]])
    net = counting()
    for module in net.modules():
        module.train()
    net.drop.eval()
    found = sample(net, prompts, 3, temperature, lengths=torch.tensor([3, 1, 1]))
    assert found.tolist() == [[0, 1, 2, 3, 4, 0], [3, 4, 0, 1, 2, 3], [4, 0, 1, 2, 3, 4]]
    assert sample(net, prompts, 2, 0.0).tolist() == [[0, 1, 2, 3, 4], [3, 0, 0, 1, 2], [4, 0, 0, 1, 2]]
    assert net.training and not net.drop.training  # every layer is in the mode that it was in
    assert not found.requires_grad and net.table.grad is None


def test_after_the_end_there_is_only_the_end():
    prompts = torch.tensor([[0, 0], [2, 3]])
    net = counting()
    found = sample(net, prompts, 4, 0.0, lengths=torch.tensor([1, 2]), end=4)
    assert found.tolist() == [[0, 1, 2, 3, 4, 4], [2, 3, 4, 4, 4, 4]]
    assert sample(net, torch.tensor([[4]]), 2, 0.0, end=4).tolist() == [[4, 0, 1]]  # an end that was given is no end


def test_frequencies_are_those_of_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    for temperature in (0.5, 1.0, 2.0):
        drawn = choose(logits.expand(20000, 4), temperature)
        found = torch.bincount(drawn, minlength=4) / 20000
        wanted = torch.softmax(logits / temperature, -1)
        assert (found - wanted).abs().max() < 4 * 0.5 / 20000**0.5
    assert choose(logits.bfloat16().expand(2, 3, 4), 0.0).tolist() == [[3] * 3] * 2
    assert choose(1e4 * logits.expand(2, 3, 4)).shape == (2, 3)


def test_the_global_generator_decides():
    net = Chain(torch.randn(6, 6))
    prompts = torch.zeros(4, 1, dtype=torch.long)
    torch.manual_seed(1)
    first = sample(net, prompts, 20)
    torch.manual_seed(1)
    assert torch.equal(sample(net, prompts, 20), first)
    assert not torch.equal(sample(net, prompts, 20), first)


def test_what_cannot_be_continued_is_refused():
    net = counting()
    with pytest.raises(ValueError, match="at least one token"):
        sample(net, torch.zeros(2, 0, dtype=torch.long), 3)
    with pytest.raises(ValueError, match=r"`lengths` must be in \[1, 2\]"):
        sample(net, torch.zeros(2, 2, dtype=torch.long), 3, lengths=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="`temperature` must be >= 0"):
        sample(net, torch.zeros(2, 2, dtype=torch.long), 3, -1.0)
    with pytest.raises(ValueError, match="`length` must be >= 0"):
        sample(net, torch.zeros(2, 2, dtype=torch.long), -1)
