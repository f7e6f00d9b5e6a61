"""The DistillationTrainer takes the steps that `fit` takes, whatever the micro-batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import limbeck
import limbeck.adapters.trainer
from limbeck.core.errors import BadInput
from limbeck.core.headloss import route
from limbeck.core.nets import Nets
from limbeck.core.pair import Pair, parse_all

pytest.importorskip("transformers")

WORDS = 24
MATCH = ["ce", {"kd": {"temperature": 2, "weight": 0.5}}]


def llama(width: int, seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=32, **sizes))
    return model


def rows() -> list[dict[str, Any]]:
    """Four texts with prompts of unlike lengths, padded on the right."""
    draw = torch.Generator().manual_seed(3)
    out = []
    for n, prompt in ((9, 2), (5, 3), (9, 7), (6, 1)):
        ids = torch.randint(1, WORDS, (n,), generator=draw)
        labels = ids.clone()
        labels[:prompt] = -100
        pad = torch.zeros(9 - n, dtype=torch.long)
        out.append(
            {
                "input_ids": torch.cat([ids, pad]),
                "labels": torch.cat([labels, pad - 100]),
                "attention_mask": torch.cat([torch.ones(n, dtype=torch.long), pad]),
            }
        )
    return out


def trained(
    folder: Path, batch: int, accumulate: int, match: Any = MATCH, data: Any = None
) -> tuple[dict[str, torch.Tensor], list[float]]:
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=2,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", max_grad_norm=0.0, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    student = llama(8, 1)
    trainer = limbeck.DistillationTrainer(
        model=student, args=args, train_dataset=rows() if data is None else data, teacher=llama(16, 2), match=match
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {k: v.clone() for k, v in student.state_dict().items()}, losses


def by_hand() -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same two steps of plain gradient descent on all four texts."""
    batch = {k: torch.stack([row[k] for row in rows()]) for k in rows()[0]}
    ours = {"inputs": batch["input_ids"][:, :-1], "labels": batch["labels"][:, 1:].clamp_min(0)}
    ours |= {"mask": batch["labels"][:, 1:] != -100, "attention_mask": batch["attention_mask"][:, :-1]}
    student, pair = llama(8, 1), Pair("student", "teacher", parse_all(MATCH))
    nets, losses = Nets(student=student, teacher=llama(16, 2)), []
    for _ in range(2):
        loss = sum((p.value for p in pair.parts(nets, ours, 0.0).values()), torch.zeros(()))
        grads = torch.autograd.grad(loss, list(student.parameters()))
        losses.append(loss.item())
        with torch.no_grad():
            for p, g in zip(student.parameters(), grads, strict=True):
                p.sub_(0.1 * g)
    return student.state_dict(), losses


@pytest.mark.parametrize("worth", [8, 10**9])
def test_steps_are_those_of_the_whole_batch(worth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "WORTH", worth)
    wanted, losses = by_hand()
    for batch, accumulate in ((4, 1), (1, 4), (2, 2)):
        weights, told = trained(tmp_path, batch, accumulate)
        assert told == pytest.approx(losses, rel=1e-3), (batch, accumulate)
        for key, value in wanted.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6)


def test_whatever_says_which_tokens_count_they_weigh_the_same(tmp_path: Path) -> None:
    """Padding counts for nobody even where its labels say so, and texts without labels are all target."""
    whole = [{k: v for k, v in row.items() if k != "labels"} for row in rows()]
    shown = [{**row, "labels": row["input_ids"]} for row in whole]
    hidden = [{**row, "labels": row["input_ids"].where(row["attention_mask"].bool(), -100)} for row in whole]
    wanted, losses = trained(tmp_path, 4, 1, data=hidden)
    for data in (whole, shown):
        for batch, accumulate in ((4, 1), (1, 4)):
            weights, told = trained(tmp_path, batch, accumulate, data=data)
            assert told == pytest.approx(losses, rel=1e-3), (batch, accumulate)
            for key, value in wanted.items():
                torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6)


def test_a_loss_of_a_whole_batch_keeps_its_size(tmp_path: Path) -> None:
    batch = limbeck.adapters.trainer.shifted({k: torch.stack([row[k] for row in rows()]) for k in rows()[0]})
    nets, pair = Nets(student=llama(8, 1), teacher=llama(16, 2)), Pair("student", "teacher", parse_all(["cwtm"]))
    (part,) = pair.parts(nets, batch, 0.0).values()
    assert int(part.count) == 1
    assert trained(tmp_path, 4, 1, ["cwtm"])[1][0] == pytest.approx(float(part), rel=1e-3)


def test_predictions_have_a_place_for_each_label(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = limbeck.DistillationTrainer(model=llama(8, 1), args=args, teacher=llama(16, 2), match=MATCH)
    told = trainer.predict(rows())
    assert told.predictions.shape == (4, 9, WORDS) and told.label_ids.shape == (4, 9)
    text = {k: torch.stack([row[k] for row in rows()]) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = llama(8, 1)(**text).logits
    real = text["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(told.predictions)[real], wanted[real])


def test_losses_with_weights_are_refused(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(BadInput, match="`fitnets` has weights or memory of its own"):
        limbeck.DistillationTrainer(model=llama(8, 1), args=args, teacher=llama(8, 2), match=["fitnets"])
