"""Real speculative decoding as a measure: by transformers' assisted generation where both models are its own."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import limbeck
from limbeck.core import speculative
from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.verbs import drafts as verbs
from limbeck.verbs.drafts import drafts
from limbeck.verbs.figures import figures
from limbeck.verbs.setting import judge
from limbeck.zoo.transformer import tiny_lm

HOW: dict[str, Any] = {"texts": 3, "length": 12, "prompt": 2, "block": 3, "temperature": 0.0}


def llama(seed: int, layers: int, words: int = 12, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None, **more}
    config = transformers.LlamaConfig(
        vocab_size=words, num_hidden_layers=layers, initializer_range=0.3, **sizes, **ends
    )
    return transformers.LlamaForCausalLM(config)


def tiny(seed: int, layers: int) -> nn.Module:
    torch.manual_seed(seed)
    model = tiny_lm(vocab=12, width=16, layers=layers, heads=2)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def table(rows: int = 4, **constants: Any) -> Table:
    text = torch.randint(1, 12, (rows, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(1, 21) >= torch.tensor([1, 5, 20, 3][:rows])[:, None]
    columns = {"inputs": text[:, :-1], "labels": text[:, 1:], "mask": mask}
    return Table(columns, "tokens", constants={k: torch.tensor([v]) for k, v in constants.items()})


@pytest.mark.parametrize("make", [llama, tiny])
def test_a_perfect_draft_is_kept_and_a_poor_one_is_not(make: Any):
    teacher, poor = make(1, 2), make(2, 1)
    found = judge(copy.deepcopy(teacher), table(), [{"speculation": HOW}, "acceptance"], teacher)
    assert found["draft_acceptance"] == 1 and found["draft_efficiency"] > 2.5
    assert found["acceptance"] == pytest.approx(1)  # other measures stand beside it
    itself = judge(teacher, table(), [{"speculation": HOW}], teacher)
    assert itself["draft_acceptance"] == 1 and itself["draft_efficiency"] == pytest.approx(found["draft_efficiency"])
    worse = judge(poor, table(), [{"speculation": HOW}], teacher)
    assert worse["draft_acceptance"] < 0.6 and 1 <= worse["draft_efficiency"] < 2.5
    assert judge(poor, table(), [{"speculation": HOW}]) == {}  # nobody to draft for
    assert judge(poor, table(), [{"speculation": {**HOW, "temperature": 1.0}}], teacher) == judge(
        poor, table(), [{"speculation": {**HOW, "temperature": 1.0}}], teacher
    )


def test_models_of_transformers_write_by_their_own_generation(monkeypatch: pytest.MonkeyPatch):
    teacher, draft, called = llama(1, 2), llama(2, 1), []
    assisted = speculative.assisted

    def watched(target: Any, *rest: Any, **more: Any) -> Any:
        called.append(target)
        return assisted(target, *rest, **more)

    monkeypatch.setattr(verbs, "assisted", watched)
    found = drafts(draft, teacher, table(), **HOW)
    assert called == [teacher] * 3 and found["student_drafts"].shape == (3, 2)
    # prompts of 2, 5 and 3 tokens (the third text is all prompt but one), 12 more or as many as there is room for
    assert (found["student_drafts"][:, 0] + found["teacher_calls"]).tolist() == [12, 12, 1]
    monkeypatch.setattr(verbs, "assisted", lambda *_a, **_k: pytest.fail("a prompt holds the padding token"))
    again = drafts(llama(2, 1, pad_token_id=int(table()["inputs"][0, 0])), teacher, table(1), **HOW)
    assert again["student_drafts"][0].equal(found["student_drafts"][0])


def test_both_ways_stop_at_the_end_of_a_text():
    teacher, draft, prompts = llama(1, 2), llama(2, 1), torch.arange(1, 9).view(2, 4)
    whole = speculative.speculate(teacher, draft, prompts, 20, 0.0, block=3)[0]
    end = int(whole[0, 9])
    ours, count = speculative.speculate(teacher, draft, prompts, 20, 0.0, block=3, end=end)
    theirs, counted = speculative.assisted(teacher, draft, prompts, 20, block=3, end=end)
    assert torch.equal(ours, theirs) and count == counted
    for row, full in zip(ours, whole, strict=True):
        first = int((full[4:] == end).nonzero()[0]) + 4 if (full[4:] == end).any() else 23
        assert torch.equal(row[: first + 1], full[: first + 1]) and (row[first:] == row[first]).all()
    assert count.written < 40 and count.written == count.kept + count.calls


def test_heads_padded_to_other_heights_write_words_alone():
    teacher, draft = llama(1, 2, words=16), llama(2, 1, words=13)
    found = drafts(draft, teacher, table(words=12), **{**HOW, "temperature": 1.0})
    assert (found["student_drafts"][:, 0] + found["teacher_calls"]).tolist() == [12, 12, 1]


def test_what_has_no_next_token_is_refused():
    flat = Table({"inputs": torch.zeros(4, 6).long(), "labels": torch.zeros(4).long()}, "tokens")
    with pytest.raises(BadInput, match="texts whose next token is asked for"):
        drafts(tiny(1, 1), tiny(2, 1), flat, **HOW)
    with pytest.raises(BadInput, match="is longer than its prompt"):
        drafts(tiny(1, 1), tiny(2, 1), table(), **{**HOW, "prompt": 40})
    assert figures("speculation") == ["draft_acceptance", "draft_efficiency"]
    assert figures("speculation", teacher=False) == []


def test_a_recipe_asks_for_it_with_models_of_transformers(tmp_path: Path, pretrained: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(pretrained)
    model = llama(1, 3, words=len(tokenizer), max_position_embeddings=128)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"what is {n}?", "answer": f"{n} and {n}"} for n in range(60)]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = f"hf:{tmp_path / 'model'}"
    result = limbeck.teach(
        name, {"net": name, "keep": 2}, {"name": str(tmp_path / "talks.jsonl"), "kind": "chat", "length": 96},
        match=["forward_kl"], steps=2, train={"batch_size": 8}, folder=tmp_path / "run",
        measure=[{"speculation": {"texts": 2, "length": 6}}],
    )  # fmt: skip
    assert 0 <= result.metrics["draft_acceptance"] <= 1 <= result.metrics["draft_efficiency"] <= 6
