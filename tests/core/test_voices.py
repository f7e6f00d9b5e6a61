"""On-policy methods say the same with logits and without them, and without them no logits of a batch are built."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core import knobs, voices
from limbeck.core.errors import BadInput
from limbeck.core.headloss import route
from limbeck.core.loop import Clock
from limbeck.core.nets import Batch, Nets
from limbeck.zoo.nets import build

WORDS = 96
METHODS: dict[str, list[dict[str, Any]]] = {
    "gkd": [{"beta": b, "on_policy": 1.0, "temperature": 2.0} for b in (0.0, 0.3, 1.0)],
    "imitkd": [{"candidates": k, "schedule": "student", "sampling": 1.0} for k in (0, 1, 5)],
    "on_policy_distillation": [{"sampling": 0.7, "updates": 2, "discount": 0.5}, {"supervised": 0.5}],
    "distillm": [{"forward": f, "share": 1.0, "held": 1, "capacity": 4, "alpha": 0.2} for f in (0.0, 0.4, 1.0)],
    "sdft": [{"beta": 0.5, "skip": 1, "between": (3,)}],
    "skd_speculative": [{"beta": b, "top_k": 9, "teacher_sampling": 1.0, "teacher_top_p": 1.0} for b in (0.0, 0.5)],
    "mini_llm": [{"epochs": 2, "temperature": 1.5}, {"soft": 0.0, "single": 0.0}, {"supervised": 0.5}],
}


def lm(width: int, seed: int, vocab: int = WORDS) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = build({"net": "tiny_lm", "width": width, "layers": 1, "heads": 1}, vocab=vocab)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(WORDS, (4, 8), generator=draw)
    mask = torch.arange(1, 8) >= torch.tensor([[1], [2], [4], [3]])
    made = {"inputs": text[:, :-1], "labels": text[:, 1:].clone(), "mask": mask, "index": torch.arange(4)}
    made["labels"][2, :2] = -100  # of the prompt
    return made


WITH_LOGITS: dict[str, dict[str, Any]] = {
    "distillm2": {"sampling": 1.0},
    "mgsr_llm": {"threshold": 0.05},
    "distillspec": {"match": ("forward_kl",)},
}


def turns(name: str, given: dict[str, Any], *, words: int = 0) -> tuple[list[dict[str, float]], list[Tensor], Nets]:
    """The values of every turn of one step, and the gradients that they leave; no update in between."""
    nets = Nets(student=lm(16, 1, WORDS + (4 if words else 0)), teacher=lm(32, 2, WORDS + (9 if words else 0)))
    data = {**batch(), **({"words": torch.tensor([words])} if words else {})}
    method: Any = knobs.make(name, given)
    method.setup(nets, data)
    torch.manual_seed(3)
    found = []
    for _, parts in method.step(nets, data, Clock(0, 10)):
        named = parts if isinstance(parts, dict) else {"loss": parts}
        found.append({k: float(p) for k, p in named.items()})
        sum((p.value for p in named.values()), torch.zeros(())).backward()
    return found, [p.grad.clone() for p in nets.student.parameters() if p.grad is not None], nets


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, some in METHODS.items() for given in some])
@pytest.mark.parametrize("words", [0, WORDS])
def test_a_step_on_written_texts_is_the_same_without_logits(
    name: str, given: dict[str, Any], words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, wanted, plain = turns(name, given, words=words)
    monkeypatch.setattr(route, "WORTH", 8)
    asked: list[tuple[str, int]] = []
    run = Nets.run

    def watched(self: Nets, player: str, given: Batch, **more: Any) -> dict[str, Any]:
        told = run(self, player, given, **more)
        asked.append((player, told["logits"].shape[1] if "logits" in told else 0))
        return told

    monkeypatch.setattr(Nets, "run", watched)
    found, grads, nets = turns(name, given, words=words)
    assert nets.logit_free == {"student", "teacher"} and not plain.logit_free
    assert asked and max(places for _, places in asked) <= 8  # few enough to probe a head, and those are of one text
    assert sum(places > 0 for _, places in asked) <= 2
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert len(grads) == len(wanted) and any(bool(g.any()) for g in wanted)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", [*METHODS, *WITH_LOGITS])
@pytest.mark.parametrize(("mine", "its"), [(5, 5), (4, 9), (9, 4)])
def test_nobody_writes_or_compares_what_is_no_word(
    name: str, mine: int, its: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that fill up a head say the most here, and are still never drawn."""
    nets = Nets(student=lm(16, 1, WORDS + mine), teacher=lm(32, 2, WORDS + its))
    read: list[Tensor] = []
    run = Nets.run

    def watched(self: Nets, player: str, given: Batch, **more: Any) -> dict[str, Any]:
        read.append(given["inputs"])
        return run(self, player, given, **more)

    monkeypatch.setattr(Nets, "run", watched)
    data, method = (
        {**batch(), "words": torch.tensor([WORDS])},
        knobs.make(name, WITH_LOGITS.get(name, METHODS.get(name, [{}])[0])),
    )
    if hasattr(method, "setup"):
        method.setup(nets, data)
    for seed in range(5):
        torch.manual_seed(seed)
        for _, parts in method.step(nets, data, Clock(0, 10)):
            assert all(torch.isfinite(p.value) for p in (parts if isinstance(parts, dict) else {"": parts}).values())
    assert len(read) > 9 and max(int(ids.max()) for ids in read) < WORDS


def test_a_student_teaches_itself_without_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "WORTH", 8)
    nets, method = Nets(student=lm(16, 1)), knobs.make("sdft", {})
    method.setup(nets, batch())
    assert nets.logit_free == {"student", "wiser"}
    ((_, part),) = method.step(nets, batch(), Clock(0, 10))
    assert 0 < float(part) < 5


def test_the_likeliest_words_are_those_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "WORTH", 8)
    monkeypatch.setattr(voices, "TILE", 3)
    nets, data = Nets(student=lm(16, 1), teacher=lm(32, 2)), batch()
    logits = voices.hear(nets, "teacher", data)
    wanted = voices.likeliest(logits, 4, data["mask"])
    voices.spare(nets, data, "student", "teacher")
    head = voices.hear(nets, "teacher", data)
    assert not isinstance(head, Tensor)
    found = voices.likeliest(head, 4, data["mask"])
    assert torch.equal(found.ids[data["mask"]], wanted.ids[data["mask"]])
    torch.testing.assert_close(found.logits[data["mask"]], wanted.logits[data["mask"]])


@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_with_another_tokenizer_is_refused_before_the_first_step(name: str) -> None:
    nets, data = Nets(student=lm(16, 1), teacher=lm(32, 2)), batch()
    with pytest.raises(BadInput, match="need a teacher with the student's tokenizer; this one has another"):
        knobs.make(name, {}).setup(nets, {**data, "teacher_inputs": data["inputs"]})
