"""A stranger's way: a language model in a folder, a smaller one out of it, and nothing of ours in that."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from limbeck.export import export
from limbeck.zoo.nets import build, is_transformers

pytest.importorskip("transformers")


@pytest.fixture
def model(tmp_path: Path, pretrained: Path) -> str:
    """A folder with a model of four layers and its tokenizer, and talks.jsonl beside it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(pretrained)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    folder = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"question": f"what is {n}?", "answer": f"{n} and {n}"} for n in range(60)]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.mark.parametrize("student", [{"keep": 2}, {"keep": [0, 3], "lora": {"r": 2, "targets": ["q_proj", "v_proj"]}}])
def test_a_language_model_goes_in_and_a_smaller_one_comes_out(
    model: str, student: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert is_transformers(model) and is_transformers("owner/name")
    assert not is_transformers("nets.py:Net") and not is_transformers("resnet20")
    data = {"name": str(tmp_path / "talks.jsonl"), "kind": "chat", "length": 96}
    result = limbeck.teach(
        model, {"net": model, **student}, data, match=["ce", "forward_kl"], steps=3, train={"batch_size": 8},
        measure=["calibration"], folder=tmp_path / "run",
    )  # fmt: skip
    assert {"nll", "bits_per_byte"} <= set(result.metrics) and len(result.artefact.model.layers) == 2
    written = export(tmp_path / "run", "hf", tmp_path / "out")
    assert written.exists() and not any("lora" in p.name or "adapter" in p.name for p in (tmp_path / "out").iterdir())
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(plain).__module__.startswith("transformers.") and plain.config.num_hidden_layers == 2
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "what?"}], tokenize=False)
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, result.artefact(ids).logits, rtol=1e-4, atol=1e-5)
    untouched: Any = build(f"hf:{model}", vocab=300)
    start: Any = build({"net": model, "keep": [0, 3]}, vocab=300)
    assert start.model.layers[1].mlp.up_proj.weight.equal(untouched.model.layers[3].mlp.up_proj.weight)
    moved = (plain.model.layers[0].self_attn.q_proj.weight - start.model.layers[0].self_attn.q_proj.weight).abs().max()
    assert moved.item() > 0, "the student must have learned"
