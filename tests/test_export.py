"""Export: what leaves is a plain model of its own library that gives the student's numbers."""

import importlib.util
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import limbeck as library
from limbeck.core.nets import outputs
from limbeck.zoo.nets import build
from tests import tiny
from tests.tiny import limbeck, recipe

ONNX = importlib.util.find_spec("onnxruntime") is not None and importlib.util.find_spec("onnxscript") is not None


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pictures(count: int) -> Tensor:
    return torch.from_numpy(tiny.images(count, seed=5)[0])


def student(folder: str = "there", **spec: Any) -> nn.Module:
    """The student of a run, built by hand."""
    net = build({"net": "mlp", "width": 4, "depth": 1} | spec, classes=2, channels=1, size=8)
    net.load_state_dict(load_file(f"{folder}/seed-0/weights.safetensors"))
    return net.eval()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    # a loss that owns weights and a tap, so that there is something that must not leave
    changes = {"match": ["ce", "kd", "fitnets"], "train": {"steps": 2, "batch_size": 16}}
    called = limbeck("run", recipe(tmp_path, **changes), "--out", "there")
    assert called.code == 0, called.err
    return Path("there")


def test_safetensors_and_torch_hold_the_weights_alone(run: Path) -> None:
    net = student()
    assert limbeck("export", run).out.strip() == "there/export/model.safetensors"
    called = limbeck("export", run, "--to", "torch", "--out", "other/place")
    assert called.code == 0 and called.out.strip() == "other/place/model.pt", called.err
    for state in (load_file("there/export/model.safetensors"), torch.load("other/place/model.pt", weights_only=True)):
        assert set(state) == set(net.state_dict())
        assert all(v.equal(state[k]) for k, v in net.state_dict().items())
    names = _names(Path("other/place/model.pt"))
    assert names and not any("limbeck" in name for name in names)
    assert json.loads(Path("there/export/net.json").read_text()) == {"net": "mlp", "width": 4, "depth": 1}
    assert not list(Path().rglob(".*.draft"))


def _names(path: Path) -> set[str]:
    """Every module that unpickling the file would import."""
    import pickletools
    import zipfile

    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        body = archive.read(name)
    assert pickle.PROTO in body[:1]
    return {str(arg) for op, arg, _ in pickletools.genops(body) if op.name in ("GLOBAL", "STACK_GLOBAL")}


@pytest.mark.skipif(not ONNX, reason="the extra `export` is not installed")
def test_onnx_gives_the_numbers_of_the_module(run: Path) -> None:
    import onnxruntime

    called = limbeck("export", run, "--to", "onnx")
    assert called.code == 0 and called.err == "", called.err
    assert [p.name for p in Path("there/export").iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession("there/export/model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["inputs"] and [o.name for o in session.get_outputs()] == [
        "logits"
    ]
    for count in (1, 5):
        x = pictures(count)
        (found,) = session.run(None, {"inputs": x.numpy()})
        expected = outputs(student(), {"inputs": x})["logits"].detach().numpy()
        assert found.shape == (count, 2)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.skipif(not ONNX, reason="the extra `export` is not installed")
def test_onnx_of_a_sampler_draws_its_samples(tmp_path: Path) -> None:
    import onnxruntime

    from limbeck.core.sampler import generate

    x = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    np.savez("blobs.npz", inputs=x.numpy(), labels=np.arange(80) % 2)
    net = {"net": "denoiser_mlp", "width": 8}
    teacher = {**net, "weights": "random"}
    train = {"steps": 2, "batch_size": 16}
    path = recipe(tmp_path, do="shorten", teacher=teacher, student=None, data="blobs.npz", teacher_steps=2, train=train)
    assert limbeck("run", path, "match=null", "--out", "there").code == 0
    called = limbeck("export", "there", "--to", "onnx")
    assert called.code == 0, called.err
    session = onnxruntime.InferenceSession("there/export/model.onnx", providers=["CPUExecutionProvider"])
    made = build(json.loads(Path("there/seed-0/net.json").read_text()), size=2, classes=2)
    made.load_state_dict(load_file("there/seed-0/weights.safetensors"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x[:7].numpy()})
    np.testing.assert_allclose(found, generate(made, x[:7], 1).detach().numpy(), atol=1e-4)  # type: ignore[arg-type]


def test_onnx_without_the_extra_is_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    called = limbeck("export", run, "--to", "onnx")
    assert called.code == 2 and "pip install 'limbeck[export]'" in called.said
    assert not Path("there/export").exists()


def bert(layers: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        num_labels=2,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


@pytest.mark.parametrize("way", ["a module in Python", "a local folder in a recipe"])
def test_hf_writes_a_model_of_transformers(tmp_path: Path, way: str) -> None:
    transformers = pytest.importorskip("transformers")
    x = torch.randint(1, 16, (64, 6), generator=torch.Generator().manual_seed(0))
    y = x[:, 0] % 2
    options: dict[str, Any] = {"steps": 2, "train": {"batch_size": 16}, "match": ["ce", "kd"]}
    if way == "a module in Python":
        library.teach(bert(2), bert(1), (x, y), folder="there", **options)
    else:
        bert(2).save_pretrained("large")  # type: ignore[operator]
        bert(1).save_pretrained("small")  # type: ignore[operator]
        np.savez("words.npz", inputs=x.numpy(), labels=y.numpy())
        changes = {"teacher": "hf:large", "student": "hf:small", "data": {"name": "words.npz", "kind": "tokens"}}
        path = recipe(tmp_path, **changes, match=options["match"], train={"steps": 2, "batch_size": 16})
        called = limbeck("run", path, "--out", "there")
        assert called.code == 0, called.err
    called = limbeck("export", "there", "--to", "hf", "--out", "plain")
    assert called.code == 0 and called.out.strip() == "plain", called.err
    assert sorted(p.name for p in Path("plain").iterdir()) == ["config.json", "model.safetensors"]
    assert all(b"limbeck" not in p.read_bytes() for p in Path("plain").iterdir())
    assert type(transformers.AutoModel.from_pretrained("plain")).__name__ == "BertModel"
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained("plain")
    weights = load_file("there/seed-0/weights.safetensors")
    assert all(v.equal(weights[k]) for k, v in loaded.state_dict().items())
    assert loaded.config.num_hidden_layers == 1


def test_a_shaped_network_is_built_again(tmp_path: Path) -> None:
    teacher = {"net": "resnet8", "width": 4, "weights": str(tiny.teacher(tmp_path, "resnet8", width=4))}
    tiny.data(tmp_path)
    changes = {"do": "shape", "teacher": teacher, "student": None, "method": {"fake_quant": {"bits": 4}}}
    called = limbeck("run", recipe(tmp_path, **changes), "--out", "there")
    assert called.code == 0, called.err
    assert limbeck("export", "there").code == 0
    state = load_file("there/export/model.safetensors")
    plain = build({"net": "resnet8", "width": 4}, classes=2, channels=1, size=8)
    plain.load_state_dict(state)  # an ordinary network again: no ranges, no rounding layers
    levels = (
        plain.get_submodule(next(n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d))).weight[0].unique()
    )
    assert len(levels) <= 2**4


@pytest.mark.parametrize(
    "to, part",
    [
        ("onyx", "no export format 'onyx'; did you mean `onnx`?"),
        ("hf", "MLP is no transformers model, so it has no `hf` form"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(run: Path, to: str, part: str) -> None:
    called = limbeck("export", run, "--to", to, "--out", "export")
    assert called.code == 2 and part in called.said
    assert not Path("export").exists() and not list(Path().glob(".*.draft"))


def test_torn_weights_are_not_exported(run: Path) -> None:
    weights = run / "seed-0/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    called = limbeck("export", run)
    assert called.code == 2 and "is not a whole safetensors file" in called.said
    assert not (run / "export").exists()


def test_an_object_from_python_leaves_as_weights(tmp_path: Path) -> None:
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 2)) for _ in range(2)]
    x, y = tiny.images()
    library.teach(*nets, (x, y), folder="there", steps=2, train={"batch_size": 16})
    assert limbeck("export", "there", "--to", "torch").code == 0
    assert set(torch.load("there/export/model.pt", weights_only=True)) == {"1.weight", "1.bias"}
    assert not Path("there/export/net.json").exists()
    called = limbeck("export", "there", "--to", "onnx")
    assert called.code == 2 and "export safetensors or torch" in called.said
