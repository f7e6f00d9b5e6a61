"""Where every loss has a head form and the vocabulary is large, a step builds no logits and says the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.card import method
from limbeck.core.errors import BadInput
from limbeck.core.headloss import Term, ce, divergences, head_loss, route
from limbeck.core.maths import kl
from limbeck.core.nets import Batch, Nets, outputs
from limbeck.core.pair import Pair, parse_all
from limbeck.zoo.nets import build

WORDS = 96


@method(
    paper="a toy", year=2026, head=lambda *, temperature=2.0: Term(divergences.forward_kl, temperature, temperature**2)
)
def soft(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    return temperature**2 * kl(student_logits, teacher_logits.detach(), temperature)


@method(paper="a toy", year=2026, head=lambda: ce())
def hard(student_logits: Tensor, labels: Tensor) -> Tensor:
    flat = nn.functional.cross_entropy(student_logits.flatten(0, 1), labels.flatten(), reduction="none")
    return flat.view_as(labels)


def zoo(width: int) -> nn.Module:
    model: nn.Module = build({"net": "tiny_lm", "width": width, "layers": 1, "heads": 1}, vocab=WORDS)
    return model


def llama(width: int, **more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=32, **sizes, **more))
    return model


def granite(width: int) -> nn.Module:
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: nn.Module = GraniteForCausalLM(
        GraniteConfig(vocab_size=WORDS, num_key_value_heads=2, logits_scaling=4.0, **sizes)
    )
    return model


def gemma(width: int) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=WORDS, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05, **sizes)
    model: nn.Module = Gemma2ForCausalLM(config)
    return model


def adapted(width: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(llama(width), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    made: nn.Module = model
    return made


def batch(labels_left_out: bool = False) -> Batch:
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(WORDS, (3, 8), generator=draw)
    made = {"inputs": text[:, :-1], "labels": text[:, 1:].clone(), "mask": torch.rand(3, 7, generator=draw) < 0.7}
    if labels_left_out:
        made["labels"][0, 2:5] = -100
    return made


def step(pair: Pair, student: nn.Module, teacher: nn.Module, data: Batch) -> tuple[dict[str, float], list[Tensor]]:
    nets = Nets(student=student, teacher=teacher)
    pair.build(nets, data)
    parts = pair.parts(nets, data, 0.5)
    student.zero_grad()
    sum((p.value for p in parts.values()), torch.zeros(())).backward()
    return {k: float(p) for k, p in parts.items()}, [p.grad.clone() for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [zoo, llama, granite, gemma, adapted])
@pytest.mark.parametrize("left_out", [False, True])
def test_a_step_without_logits_is_the_step_with_them(
    make: Callable[[int], nn.Module], left_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    pair = Pair("student", "teacher", parse_all([soft, {hard: {"weight": {"linear": [0, 1]}}}]))
    student, teacher, data = make(16), make(32), batch(left_out)
    expected, wanted = step(pair, student, teacher, data)
    monkeypatch.setattr(route, "WORTH", 8)
    seen: list[bool] = []
    monkeypatch.setattr(route, "head_loss", _counted(head_loss, seen))
    found, grads = step(pair, student, teacher, data)
    assert seen, "the head form must have been taken"
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(grads) == len(wanted)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dkd", {"dkd": {"beta": 2.0}}], ids=str)
def test_words_without_a_label_are_nobody_for_losses_that_ask_for_it(
    name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    pair, student, teacher, data = Pair("student", "teacher", parse_all([name, "kd"])), zoo(16), zoo(32), batch(True)
    expected, wanted = step(pair, student, teacher, data)
    monkeypatch.setattr(route, "WORTH", 8)
    found, grads = step(pair, student, teacher, data)
    assert found == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def _counted(call: Callable[..., Any], seen: list[bool]) -> Callable[..., Any]:
    def counting(*args: Any, **knobs: Any) -> Any:
        seen.append(True)
        return call(*args, **knobs)

    return counting


@pytest.mark.parametrize("loss", ["sampled_kl", "top_k_kd"])
def test_stored_words_say_the_same_with_and_without_logits(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    student, data, draw = zoo(16), batch(), torch.Generator().manual_seed(2)
    data["teacher_ids"] = torch.stack([torch.randperm(WORDS, generator=draw)[:5] for _ in range(21)]).view(3, 7, 5)
    if loss == "sampled_kl":  # weights that do not sum to 1, and places with fewer draws
        weights = torch.rand(3, 7, 5, generator=draw)
        data["teacher_weights"] = weights.masked_fill(torch.rand(3, 7, 5, generator=draw) < 0.3, 0.0)
    else:
        data["teacher_logprobs"] = torch.randn(3, 7, WORDS, generator=draw).log_softmax(-1)[..., :5]
    pair = Pair("student", "teacher", parse_all([{loss: {"weight": 0.5}}, "ce"]))
    found = []
    for worth in (10**9, 8):
        monkeypatch.setattr(route, "WORTH", worth)
        nets = Nets(student=student)
        pair.build(nets, data)
        assert pair.without_logits(nets, data) is (worth == 8)
        student.zero_grad()
        parts = pair.parts(nets, data, 0.5)
        sum((p.value for p in parts.values()), torch.zeros(())).backward()
        grads = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        found.append(({k: p.value.item() for k, p in parts.items()}, grads))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_network_whose_logits_are_something_else_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Louder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo(16)

        def forward(self, inputs: Tensor, *, logits: bool = True) -> dict[str, Any]:
            told = self.inner(inputs, logits=logits)
            return {**told, "logits": 2 * told["logits"]} if logits else told

    monkeypatch.setattr(route, "WORTH", 8)
    nets, data = Nets(student=Louder(), teacher=zoo(16)), batch()
    pair = Pair("student", "teacher", parse_all([soft]))
    pair.build(nets, data)
    assert nets.logit_free == {"teacher"} and not pair.without_logits(nets, data)


def test_logits_are_spared() -> None:
    for model in (zoo(16), llama(16), adapted(16)):
        told = outputs(model, batch(), logits=False)
        assert "logits" not in told and told["hidden"].shape[:2] == (3, 7) and told["head"].shape[0] == WORDS


class Padded(nn.Module):
    """A language model whose head has more rows than there are words."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.inner = build({"net": "tiny_lm", "width": 16, "layers": 1, "heads": 1}, vocab=rows)

    def forward(self, inputs: Tensor, *, logits: bool = True) -> Any:
        return self.inner(inputs, logits=logits)


@pytest.mark.parametrize("worth", [8, 10**9])
def test_heads_padded_to_other_heights_are_compared_by_their_words(worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "WORTH", worth)
    torch.manual_seed(0)
    student, teacher, data = Padded(WORDS + 4), Padded(WORDS + 9), batch()
    pair = Pair("student", "teacher", parse_all([soft]))
    with pytest.raises(BadInput, match="the student has 100 classes and the teacher has 105 classes"):
        pair.build(Nets(student=student, teacher=teacher), data)
    nets, data = Nets(student=student, teacher=teacher), {**data, "words": torch.tensor([WORDS])}
    with pytest.warns(UserWarning, match=r"have 100 and 105 rows for 96 words; .* dropped: 0\.\d+ and 0\.\d+ of their"):
        pair.build(nets, data)
    assert pair.without_logits(nets, data) is (worth == 8)
    logits = [outputs(net, data)["logits"][..., :WORDS] for net in (student, teacher)]
    expected = soft(*logits)[data["mask"]].mean().item()
    assert pair.parts(nets, data, 0.0)["soft"].value.item() == pytest.approx(expected, rel=1e-5)
