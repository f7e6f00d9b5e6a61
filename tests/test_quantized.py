"""Students on a frozen base of few bits: the base never moves, nothing of full width is kept, what leaves is plain."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import limbeck
from limbeck.core.errors import BadInput
from limbeck.export import export
from limbeck.zoo.lora import adapted, merged
from limbeck.zoo.quantized import KINDS, Quantized, levels, quantized


def llama(seed: int = 0, words: int = 20) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=words, initializer_range=0.2, **sizes))


def test_the_levels_are_the_published_ones():
    # as bitsandbytes prints its NF4 table, to four digits
    wanted = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    wanted += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    torch.testing.assert_close(levels(), torch.tensor(wanted), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "error", "size"), [("int8", 0.004, 1.1), ("nf4", 0.11, 0.6)])
def test_weights_stay_near_and_are_small(kind: str, error: float, size: float):
    torch.manual_seed(0)
    layer = nn.Linear(130, 70)  # 9,100 weights, which are no whole groups
    small = Quantized(layer, kind)
    assert (small.weight - layer.weight).norm() < error * layer.weight.norm()
    assert torch.equal(Quantized(small.plain(), kind).weight, small.weight)  # what is on the grid stays there
    kept = sum(b.numel() * b.element_size() for b in small.buffers())
    assert kept < size * layer.weight.numel() and not any(p.requires_grad for p in small.parameters())
    assert torch.equal(Quantized(nn.Linear(4, 3).requires_grad_(False).apply(_zero), kind).weight, torch.zeros(3, 4))
    again = Quantized(nn.Linear(130, 70), kind)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.weight, small.weight)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.data.zero_()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_layer_and_no_wide_weight_is_kept_for_them(kind: str):
    torch.manual_seed(0)
    small, x = Quantized(nn.Linear(96, 80), kind), torch.randn(5, 96, requires_grad=True)
    plain, y = small.plain(), x.detach().clone().requires_grad_()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = small(x)
    assert all(count < 96 * 80 for count in saved)
    torch.testing.assert_close(found, plain(y))
    found.square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert small(x).dtype == torch.bfloat16
        small(x).float().sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_on_a_base_that_stays(kind: str):
    pytest.importorskip("peft")
    base, tokens = llama(), torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(0))
    model: Any = adapted(quantized(copy.deepcopy(base), kind), {"r": 4, "alpha": 64})
    layers = [m for m in model.modules() if isinstance(m, Quantized)]
    assert len(layers) == 14 and type(model.get_output_embeddings()) is nn.Linear
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.005)
    losses = []
    for _ in range(30):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all("lora_" in k for k in moved)
    plain: Any = merged(model)
    assert type(plain) is type(base) and plain.state_dict().keys() == base.state_dict().keys()
    assert not any(isinstance(m, Quantized) for m in plain.modules())
    assert len([m for m in model.modules() if isinstance(m, Quantized)]) == 14  # the copy alone was widened
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, model(input_ids=tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_quantised_network_without_adapters_is_widened_too():
    small = quantized(llama(), "int8")
    plain = merged(small)
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    assert merged(plain) is plain


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(BadInput, match="`quantize` has no 'int7'; did you mean `int8`"):
        quantized(llama(), "int7")
    with pytest.raises(BadInput, match="finds no linear layer in Conv2d"):
        quantized(nn.Conv2d(1, 1, 1), "int8")
    with pytest.raises(BadInput, match="`lora` has no 'rank'; .*alpha"):
        adapted(llama(), {"rank": 4})


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_trains_adapters_on_few_bits_and_writes_a_plain_model(
    kind: str, tmp_path: Path, pretrained: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(pretrained)
    llama(words=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"what is {n}?", "answer": f"{n} and {n}"} for n in range(60)]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = f"hf:{tmp_path / 'model'}"
    data = {"name": str(tmp_path / "talks.jsonl"), "kind": "chat", "length": 96}
    result = limbeck.teach(
        {"net": name, "quantize": kind}, {"net": name, "lora": {"r": 2}, "quantize": kind}, data,
        match=["ce", "forward_kl"], steps=3, train={"batch_size": 8}, measure=["calibration"], folder=tmp_path / "run",
    )  # fmt: skip
    export(tmp_path / "run", "hf", tmp_path / "out")
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, result.artefact(ids).logits, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, Quantized) for m in result.artefact.modules())
