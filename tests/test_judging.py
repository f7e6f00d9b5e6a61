"""Judging a network: a language model at its valid places only, in bounded memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batches import Table
from limbeck.verbs import setting
from limbeck.verbs.setting import judge

TEXTS, LONG, WORDS = 11, 6, 7
MEASURES = ["accuracy", "agreement", "calibration"]


class Speaker(nn.Module):
    """Tokens [B, T] to logits [B, T, V]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(WORDS, WORDS)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.table(inputs)
        return 2 * logits


def texts(**columns: Tensor) -> Table:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (TEXTS, LONG + 1), generator=draw)
    return Table({"inputs": ids[:, :-1], "labels": ids[:, 1:], **columns}, "tokens")


def places(table: Table, where: Tensor) -> Table:
    """The same places as texts of one token each."""
    return Table({name: table[name][where][:, None] for name in ("inputs", "labels")}, "tokens")


def test_masked_places_have_no_influence() -> None:
    mask = torch.arange(LONG) < 1 + torch.arange(TEXTS)[:, None] % LONG
    table = texts(mask=mask)
    left_out = table["labels"].clone()
    left_out[1, 0] = -100
    wanted = judge(Speaker(0), places(texts(), mask), MEASURES, Speaker(1))
    assert judge(Speaker(0), table, MEASURES, Speaker(1)) == pytest.approx(wanted)
    assert judge(Speaker(0), texts(), MEASURES, Speaker(1)) != pytest.approx(wanted)
    mask[1, 0] = False
    wanted = judge(Speaker(0), places(texts(), mask), MEASURES, Speaker(1))
    assert judge(Speaker(0), texts(mask=mask), MEASURES, Speaker(1)) == pytest.approx(wanted)
    mask[1, 0] = True
    ignored = Table({**texts(mask=mask).columns, "labels": left_out}, "tokens")
    assert judge(Speaker(0), ignored, MEASURES, Speaker(1)) == pytest.approx(wanted)


def test_a_long_table_is_measured_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.arange(LONG) < torch.arange(TEXTS)[:, None] % (LONG + 1)
    whole = judge(Speaker(0), texts(mask=mask), MEASURES, Speaker(1))
    held: list[int] = []

    def predict(module: nn.Module, table: Table, **options: Any) -> Tensor:
        held.append(len(table) * LONG * WORDS)
        return real(module, table, **options)

    real = setting.predict
    monkeypatch.setattr(setting, "predict", predict)
    monkeypatch.setattr(setting, "HELD", 3 * LONG * WORDS)
    stretches = judge(Speaker(0), texts(mask=mask), MEASURES, Speaker(1))
    assert len(held) == 2 * 4 and max(held) <= setting.HELD
    for name in ("accuracy", "agreement", "kl", "nll"):
        assert stretches[name] == pytest.approx(whole[name], rel=1e-6), name
    assert stretches.keys() == whole.keys()
