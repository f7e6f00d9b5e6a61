"""Sampling from language models: what is given stays, what is drawn follows the network, and nothing is trained."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.generate import Reader, chances, checked, choose, sample, write
from limbeck.zoo.experts import tiny_moe_lm
from limbeck.zoo.transformer import tiny_lm


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


def test_a_nucleus_holds_the_fewest_tokens_that_reach_its_mass():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for top_p, kept in ((0.4, 1), (0.5, 1), (0.6, 2), (0.81, 3), (1.0, 4)):
        found = chances(p.log(), 1.0, top_p)
        assert int((found > 0).sum()) == kept
        assert torch.allclose(found[:kept], p[:kept] / p[:kept].sum())
    shuffled = chances(p[[2, 0, 3, 1]].log(), 1.0, 0.6)
    assert torch.allclose(shuffled, torch.tensor([0.0, 0.625, 0.0, 0.375]))
    assert chances(p.log(), 0.0).tolist() == [1, 0, 0, 0]
    with pytest.raises(ValueError, match=r"`top_p` must be in \(0, 1\]"):
        chances(p, 1.0, 0.0)


def test_networks_are_mixed_for_each_token_and_its_probability_is_told():
    one, other = (torch.randn(6, 6, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    a, b, prompts = Chain(one), Chain(other), torch.zeros(20000, 1, dtype=torch.long)
    torch.manual_seed(0)
    found = write(a, prompts, 1, mix=[(b, 0.2)])
    wanted = 0.8 * one[0].softmax(-1) + 0.2 * other[0].softmax(-1)
    share = torch.bincount(found.tokens[:, 1], minlength=6) / 20000
    assert (share - wanted).abs().max() < 4 * 0.5 / 20000**0.5
    assert torch.allclose(found.logprobs[:, 1], wanted.log()[found.tokens[:, 1]], atol=1e-6)
    assert not found.logprobs[:, 0].any()
    torch.manual_seed(1)
    alone = write(a, prompts[:50], 4, mix=[(b, 0.0)], top_p=0.9).tokens
    torch.manual_seed(1)
    assert torch.equal(alone, sample(a, prompts[:50], 4, top_p=0.9))
    with pytest.raises(ValueError, match="shares >= 0 with a sum <= 1"):
        write(a, prompts[:2], 1, mix=[(b, 1.2)])


def test_what_the_teacher_would_not_say_is_replaced_by_what_it_says():
    student, teacher = (Chain(3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(i))) for i in (1, 2))
    prompts = torch.arange(60)[:, None] % 6
    for block in (1, 3, 7):
        torch.manual_seed(0)
        found = checked(student, teacher, prompts, 9, top_k=2, block=block, teacher_temperature=0.5)
        best = teacher.table.topk(2, -1).indices
        passed = (found.tokens[:, 1:, None] == best[found.tokens[:, :-1]]).any(-1)
        assert passed[~found.replaced[:, 1:]].all() and 0 < found.replaced.sum() < found.replaced.numel()
    everything = checked(student, student, prompts, 9, top_k=6, block=4)
    assert not everything.replaced.any() and everything.calls == 3
    torch.manual_seed(2)
    found = checked(student, teacher, prompts, 9, top_k=6, block=4, end=5).tokens
    torch.manual_seed(2)
    assert torch.equal(found, sample(student, prompts, 9, end=5))


@pytest.mark.parametrize("block", [1, 4])
def test_blocks_do_not_change_the_distribution_of_checked_texts(block: int):
    student, teacher = (Chain(2 * torch.randn(3, 3, generator=torch.Generator().manual_seed(i))) for i in (3, 4))
    q, p = student.table.softmax(-1), teacher.table.softmax(-1)
    best = teacher.table.argmax(-1)
    step = torch.zeros(3, 3)  # the student's word if it is the teacher's first, else one of the teacher
    for x in range(3):
        step[x] = (1 - q[x, best[x]]) * p[x]
        step[x, best[x]] += q[x, best[x]]
    wanted = step @ step  # two words on from each first word
    torch.manual_seed(0)
    texts = torch.cat(
        [checked(student, teacher, torch.zeros(4, 1).long(), 2, top_k=1, block=block).tokens for _ in range(1000)]
    )
    found = torch.bincount(texts[:, 2], minlength=3) / len(texts)
    assert (found - wanted[0]).abs().max() < 4 * 0.5 / len(texts) ** 0.5


# ---------------------------------------------------------------- the cache of transformers models


def language_model(kind: str, seed: int, width: int = 32) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    if kind == "gpt2":
        sizes = {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, **sizes, **ends))  # type: ignore[no-any-return]
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "initializer_range": 0.3, "sliding_window": 4 if kind == "mistral" else None}
    config = (transformers.MistralConfig if kind == "mistral" else transformers.LlamaConfig)(
        vocab_size=20, **sizes, **more, **ends
    )
    return (transformers.MistralForCausalLM if kind == "mistral" else transformers.LlamaForCausalLM)(config)  # type: ignore[no-any-return]


class Anew(nn.Module):
    """The same model, which reads the whole text for each token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return out


def the_same_tokens(model: Any, other: Any, anew: Any, read: list[int], tolerance: float) -> None:
    """As networks wrapped in `anew` write, which read all of a text for each token. read: tokens that `model` reads."""
    prompts, lengths = torch.arange(15).view(3, 5), torch.tensor([5, 2, 3])
    found = sample(model, prompts, 12, 0.0, lengths=lengths)
    assert read == [2, *[1] * 14]  # the shortest prompt at once, then a token a step
    assert torch.equal(found, sample(anew(model), prompts, 12, 0.0, lengths=lengths))
    for drawn in ({"top_p": 0.8}, {"mix": True}):
        ends = []
        for wrap in (lambda m: m, anew):
            torch.manual_seed(5)
            given = {"mix": [(wrap(other), 0.3)]} if "mix" in drawn else drawn
            ends.append(write(wrap(model), prompts, 12, lengths=lengths, **given))
        assert torch.equal(ends[0].tokens, ends[1].tokens)
        assert torch.allclose(ends[0].logprobs, ends[1].logprobs, atol=tolerance)
    torch.manual_seed(6)
    one = checked(model, other, prompts, 12, top_k=3, block=4, lengths=lengths)
    torch.manual_seed(6)
    again = checked(anew(model), anew(other), prompts, 12, top_k=3, block=4, lengths=lengths)
    assert torch.equal(one.tokens, again.tokens) and one.replaced.any() and one.calls < 15 * 2


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_with_and_without_a_cache_the_tokens_are_the_same(kind: str):
    model, other = language_model(kind, 1), language_model(kind, 2)
    places: list[int] = []
    model.register_forward_hook(lambda _m, _a, given, _o: places.append(given["input_ids"].shape[1]), with_kwargs=True)
    the_same_tokens(model, other, Anew, places, 1e-4)


def test_a_reader_forgets_what_changes():
    model = language_model("llama", 1).eval()
    first, second = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[1, 2, 9, 8, 7]])
    reader = Reader(model)
    with torch.no_grad():
        reader.after(first)
        reader.forget(2)
        assert reader.seen == 2
        assert torch.allclose(reader.after(second, 3), model(input_ids=second).logits[:, -3:], atol=1e-5)
        assert torch.allclose(reader.after(second, 2), model(input_ids=second).logits[:, -2:], atol=1e-5)


# ---------------------------------------------------------------- the memory of the library's own networks


def tiny(seed: int, **more: Any) -> Any:
    torch.manual_seed(seed)
    model = tiny_lm(vocab=20, **{"width": 16, "layers": 2, "heads": 2, **more})
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


class Forgetful(Anew):
    """The same network, which reads the whole text for each token."""

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.model(tokens)["logits"]
        return found


@pytest.mark.parametrize("length", [None, 32])
def test_with_and_without_a_memory_the_tokens_are_the_same(length: int | None):
    model, other = tiny(1, length=length), tiny(2, length=length)
    read: list[int] = []
    model.embed.register_forward_hook(lambda _m, given, _o: read.append(given[0].shape[1]))
    the_same_tokens(model, other, Forgetful, read, 1e-5)


def test_a_memory_grows_forgets_and_holds_no_more_than_its_room():
    model = tiny(1).eval()
    first, second = torch.arange(12)[None], torch.cat([torch.arange(4), torch.arange(12, 20)])[None]
    reader = Reader(model, room=5)
    with torch.no_grad():
        for length in (3, 4, 9, 12):
            found = reader.after(first[:, :length], 2)
            assert torch.allclose(found, model(first[:, :length])["logits"][:, -2:], atol=1e-5)
        reader.forget(4)
        assert reader.seen == 4
        assert torch.allclose(reader.after(second, 8), model(second)["logits"][:, -8:], atol=1e-5)
        memory = model.memory(4)
        model(first[:, :3], memory=memory)
        assert memory.read == 3
        with pytest.raises(ValueError, match="`length` must be >= 6"):
            model(first[:, 3:6], memory=memory)


def test_networks_that_cannot_read_on_read_anew():
    assert tiny(1, causal=False).memory(8) is None
    experts = tiny_moe_lm(vocab=20, width=16, layers=1, heads=2, experts=2, top=1)
    assert experts.memory(8) is None and sample(experts, torch.zeros(2, 1).long(), 3).shape == (2, 4)
    bank = Chain(torch.eye(3))
    bank.memory = nn.Linear(1, 1)  # no method, only called so
    assert sample(bank, torch.zeros(2, 1).long(), 3).shape == (2, 4)
