"""The Python API: any nn.Module or transformers model, any data, no YAML."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import limbeck
from limbeck.core.batches import Splits, Table, split
from limbeck.core.errors import BadInput, Interrupted
from limbeck.report.statistics import Gain
from limbeck.zoo.nets import build
from tests import tiny

FEW: dict[str, Any] = {"steps": 3, "train": {"batch_size": 16}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tensors() -> tuple[Tensor, Tensor]:
    x, y = tiny.images()
    return torch.from_numpy(x), torch.from_numpy(y)


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, tiny.CLASSES))


# ---- what comes back -------------------------------------------------------------------------------------------------
def test_teach_gives_the_student_its_figures_the_control_and_the_folder() -> None:
    teacher, student = net(16), net()
    before = {k: v.clone() for m in (teacher, student) for k, v in m.state_dict().items()}
    result = limbeck.teach(teacher, student, tensors(), match=["ce", {"kd": {"temperature": 2}}], seeds=2, **FEW)
    assert isinstance(result, limbeck.Result) and isinstance(result.artefact, nn.Sequential)
    assert result.artefact is not student
    assert set(result.metrics) == set(result.control) == {"accuracy"}
    assert isinstance(result.gain, Gain) and result.gain.n == 2 and result.gain.against == "control"
    pairs = zip(result.arms["student"], result.arms["control"], strict=True)
    assert result.gain.differences == tuple(s.metrics["accuracy"] - c.metrics["accuracy"] for s, c in pairs)
    assert json.loads((result.folder / "result.json").read_text())["gain"]["differences"] == [*result.gain.differences]
    mean = sum(o.metrics["accuracy"] for o in result.arms["student"]) / 2
    assert result.metrics["accuracy"] == pytest.approx(mean)
    assert result.verdict in str(result) and str(result.folder) in str(result)
    assert {"recipe.yaml", "result.json", "report.html"} <= {p.name for p in result.folder.iterdir()}
    assert result.folder.parent == Path("runs")
    after = {k: v for m in (teacher, student) for k, v in m.state_dict().items()}
    assert all(before[k].equal(after[k]) for k in after), "the modules that were given must stay as they were"
    assert all(p.requires_grad for p in teacher.parameters()), "nor may they be left frozen"
    weights = load_file(result.folder / "seed-0" / "weights.safetensors")
    assert all(v.equal(weights[k]) for k, v in result.artefact.state_dict().items())


def test_a_module_starts_every_seed_a_factory_starts_it_fresh() -> None:
    given = limbeck.teach(net(16), net(), tensors(), seeds=2, folder="given", **FEW)
    made = limbeck.teach(net(16), net, tensors(), seeds=2, folder="made", **FEW)
    start = {}
    for name, result in (("given", given), ("made", made)):
        first, second = (load_file(result.folder / f"seed-{s}" / "weights.safetensors")["1.weight"] for s in (0, 1))
        start[name] = (first - second).abs().max()
    assert start["given"] < 0.02 < start["made"]  # three steps of Adam move a weight by 0.003


def test_seeds_and_folders_repeat_bit_for_bit() -> None:
    teacher = net(8)
    runs = [limbeck.teach(teacher, net, tensors(), folder=f, **FEW) for f in ("a", "b")]
    a, b = (r.artefact.state_dict() for r in runs)
    assert all(a[k].equal(b[k]) for k in a)
    with pytest.raises(BadInput, match=r"^a holds a run already; go on with resume=True, or choose another folder"):
        limbeck.teach(net(8), net, tensors(), folder="a", **FEW)


def test_an_interrupted_run_goes_on_with_the_same_call() -> None:
    torch.manual_seed(0)
    teacher, student = net(16), net()
    options = {"steps": 6, "train": {"batch_size": 16, "log_every": 1}}
    whole = limbeck.teach(teacher, student, tensors(), folder="whole", **options)

    def stop(event: dict[str, Any]) -> None:
        import os
        import signal

        if event.get("t") == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="saved in cut"):
        limbeck.teach(teacher, student, tensors(), folder="cut", on_event=stop, **options)
    with pytest.raises(BadInput, match="holds another run"):
        limbeck.teach(teacher, student, tensors(), match=["ce"], folder="cut", resume=True, **options)
    cut = limbeck.teach(teacher, student, tensors(), folder="cut", resume=True, **options)
    a, b = whole.artefact.state_dict(), cut.artefact.state_dict()
    assert all(a[k].equal(b[k]) for k in a) and whole.metrics == cut.metrics
    again = limbeck.teach(teacher, student, tensors(), folder="cut", resume=True, **options)
    assert again.metrics == whole.metrics
    assert all(a[k].equal(v) for k, v in again.artefact.state_dict().items()), "nothing was trained, all is there"
    with pytest.raises(BadInput, match="no run to go on with in nowhere"):
        limbeck.teach(teacher, student, tensors(), folder="nowhere", resume=True, **options)


# ---- data ------------------------------------------------------------------------------------------------------------
def _forms() -> dict[str, Any]:
    x, y = tensors()
    table = Table({"inputs": x, "labels": y}, kind="images")
    return {
        "tensors": (x, y),
        "arrays": (x.numpy().astype(np.float64), y.numpy().astype(np.int32)),
        "bytes": ((x * 20 + 100).clamp(0, 255).byte(), y),
        "table": table,
        "splits": split(table),
        "pairs": TensorDataset(x, y),
        "rows": [{"inputs": a, "labels": int(b)} for a, b in zip(x, y, strict=True)],
        "path": str(tiny.data(Path())),
        "options": {"name": str(tiny.data(Path())), "limit": 40},
    }


@pytest.mark.parametrize(
    "form", sorted(["tensors", "arrays", "bytes", "table", "splits", "pairs", "rows", "path", "options"])
)
def test_data_comes_in_many_forms(form: str) -> None:
    result = limbeck.teach(net(8), net(), _forms()[form], **FEW)
    assert 0 <= result.metrics["accuracy"] <= 1
    assert load_file(result.folder / "seed-0/weights.safetensors")["1.weight"].dtype == torch.float32


X, Y = tensors()
WHOLE = Table({"inputs": X, "labels": Y}, kind="images")


@pytest.mark.parametrize(
    "data, part",
    [
        ((X, Y[:9]), "differ in length"),
        ((X[:0], Y[:0]), "empty"),
        ([], "empty"),
        ((X.clone().fill_(float("nan")), Y), "not finite"),
        ((X, ["a"] * len(X)), "cannot become a tensor"),
        (X, "data must be"),
        (7, "data must be"),
        ([{"picture": 1}], "needs `inputs` and `labels`, found picture"),
        ([(X[0], 1), (X[0, :, :4], 0)], "differ in shape"),
        ("nothing here", "no data called 'nothing here'"),
        ((X[:8], Y[:8]), "larger than"),
        (Splits(WHOLE, WHOLE, WHOLE.select([])), "empty"),
    ],
    ids=range(12),
)  # fmt: skip
def test_data_that_cannot_be_used(data: Any, part: str) -> None:
    with pytest.raises(BadInput, match=part):
        limbeck.teach(net(8), net(), data, folder="there", **FEW)
    assert not Path("there").exists() and not Path("runs").exists()


# ---- networks --------------------------------------------------------------------------------------------------------
class Broken(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ torch.zeros(5, 5)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 2)

    def forward(self, inputs: Tensor) -> Any:
        return [self.layer(inputs.flatten(1))]


@pytest.mark.parametrize(
    "student, options, part",
    [
        (Broken(), {}, r"the student \(Broken\) cannot read data, inputs of \(1, 8, 8\) float32: RuntimeError"),
        (Odd(), {}, "Odd returns list; a network must return a tensor of logits or a dict"),
        (lambda: 3, {}, "the function for the student made a int, not an nn.Module"),
        (3, {}, "got int"),
        ("mpl", {}, "no network 'mpl'; did you mean `mlp`"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), {"match": ["ce"]}, "tells 1 classes apart, but data has 2"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), {}, "the student has 3 classes and the teacher has 2"),
        (net(), {"match": ["fitnets"]}, "`fitnets` asks for student_feats, but the student returns logits"),
        (net(), {"match": ["kdd"]}, r"limbeck\.teach: `match\.0`: no method 'kdd'"),
        (net(), {"method": {"dml": {"peers": 0}}}, "`peers` must be >= 1"),
        (net(), {"train": {"batch": 3}}, r"limbeck\.teach: unknown key `train\.batch`; did you mean `batch_size`"),
        (net(), {"measure": ["acuracy"]}, "did you mean `accuracy`"),
        (net(), {"seeds": 0}, "at least one seed"),
        (net(), {"train": {"optimizer": {"sgd": {"lr": "x"}}}}, "refuses"),
    ],
    ids=range(14),
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    student: Any, options: dict[str, Any], part: str
) -> None:
    with pytest.raises(BadInput, match=part):
        limbeck.teach(net(8), student, tensors(), folder="there", **{"steps": 3, "train": {"batch_size": 16}} | options)
    assert not Path("there").exists()


def test_a_loss_of_ones_own_has_a_file() -> None:
    def gap(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return (student_logits - teacher_logits).abs().mean(-1)

    with pytest.raises(BadInput, match=r"a loss is given by its name, got the object 'gap'; `limbeck new gap --in"):
        limbeck.teach(net(8), net(), tensors(), match=["ce", gap], **FEW)  # type: ignore[list-item]


@pytest.mark.parametrize("student", ["mlp", {"net": "mlp", "width": 3}])
def test_networks_by_name(student: Any) -> None:
    result = limbeck.teach(None, student, tensors(), match=["ce"], **FEW)
    assert type(result.artefact).__name__ == "MLP" and list(result.arms) == ["student", "control"]


def test_taps_read_a_model_that_was_not_made_for_it() -> None:
    teacher = {"net": "mlp", "width": 8, "weights": "random", "taps": {"feats": ["blocks.0"]}}
    student = {"net": "mlp", "width": 4, "taps": {"feats": ["blocks.1"]}}
    result = limbeck.teach(teacher, student, tensors(), match=["ce", "fitnets"], **FEW)
    assert not any(m._forward_hooks for m in result.artefact.modules())


def bert(layers: int, vocab: int = 16) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=vocab,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        num_labels=2,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def tokens(vocab: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.randint(1, vocab, (64, 6), generator=torch.Generator().manual_seed(0))
    return x, x[:, 0] % 2


def test_transformers_models_are_taught_as_they_are() -> None:
    result = limbeck.teach(bert(2), bert(1), tokens(), match=["ce", "kd"], **FEW)
    assert type(result.artefact).__name__ == "BertForSequenceClassification"
    assert set(result.metrics) == {"accuracy"}
    with pytest.raises(BadInput, match=r"the student \(BertFor.*cannot read data, inputs of \(6,\) int64: IndexError"):
        limbeck.teach(bert(2), bert(1, vocab=3), tokens(), **FEW)


def test_a_language_model_is_judged_by_its_likelihood() -> None:
    x, _ = tokens()
    table = Table({"inputs": x[:, :-1], "labels": x[:, 1:]}, kind="tokens")
    teacher, student = ({"net": "tiny_lm", "width": w, "layers": 1, "heads": 1, "length": 8} for w in (16, 8))
    made = [build(n, vocab=16) for n in (teacher, student)]
    result = limbeck.teach(*made, table, match=["forward_kl"], **FEW)
    assert result.metrics["nll"] > 0 and "the control" in result.verdict


def perceptron() -> nn.Module:
    return build({"net": "mlp", "width": 4}, classes=2, channels=1, size=8)


# ---- the other verbs -------------------------------------------------------------------------------------------------
def test_condense_gives_a_table() -> None:
    judge = {"train": {"epochs": 2, "batch_size": 8}}
    for method, maker in (("dm", "mlp"), ({"dm": {}}, perceptron), ("herding", net)):
        result = limbeck.condense(
            tensors(), method=method, ipc=2, net=maker, steps=2, train={"per_class": 8}, judge=judge
        )
        assert isinstance(result.artefact, Table) and result.artefact["inputs"].shape == (4, 1, 8, 8)
        assert result.arms["control"][0].sizes == {"images": 4}
    with pytest.raises(BadInput, match="fewer than the 99"):
        limbeck.condense(tensors(), ipc=99, net=net, folder="there")
    with pytest.raises(BadInput, match="`dm` compares embeddings, but the network returns logits"):
        limbeck.condense(tensors(), ipc=2, net=net, train={"per_class": 8}, folder="there")
    assert not Path("there").exists()


def test_shorten_gives_a_sampler_and_compares_in_given_features() -> None:
    x = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    data = (x, (x[:, 0] > 0).long())
    denoiser = build({"net": "denoiser_mlp", "width": 8}, size=2)
    options: dict[str, Any] = {"updates": 2, "teacher_steps": 2, "train": {"batch_size": 16}}
    plain = limbeck.shorten(denoiser, data, **options)
    assert {"frechet", "energy_distance"} <= set(plain.metrics) and list(plain.arms) == [
        "student",
        "control",
        "teacher",
    ]
    assert type(plain.artefact) is type(denoiser)

    class Features(nn.Module):
        calls = 0

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            Features.calls += 1
            return {"logits": inputs, "emb": 3 * inputs}

    seen = limbeck.shorten(denoiser, data, features=Features(), **options)
    assert Features.calls and seen.metrics["frechet"] == pytest.approx(9 * plain.metrics["frechet"], rel=1e-3)
    with pytest.raises(BadInput, match="starts from a Denoiser, and the teacher is a Sequential"):
        limbeck.shorten(net(), data, **options)


def test_shape_gives_a_smaller_network() -> None:
    teacher = build({"net": "resnet8", "width": 4}, classes=2, channels=1, size=8)
    result = limbeck.shape(teacher, tensors(), method={"channel_pruning": {"ratio": 0.5}}, **FEW)
    assert sum(p.numel() for p in result.artefact.parameters()) < sum(p.numel() for p in teacher.parameters())
    assert list(result.arms) == ["student", "control", "removal", "teacher"]
    with pytest.raises(BadInput, match="'dml' is a method of train/online, not of shape"):
        limbeck.shape(teacher, tensors(), method="dml", **FEW)


def test_a_run_with_objects_is_resumed_in_python(tmp_path: Path) -> None:
    limbeck.teach(net(8), {"net": "mlp", "width": 4}, tensors(), folder="there", **FEW)
    said = tiny.limbeck("run", "--resume", "there").said
    assert said == (
        "the run in there was made in Python with objects (teacher, data); go on with it there: the same call with "
        "folder='there', resume=True"
    )
    limbeck.teach(None, {"net": "mlp", "width": 4}, tiny.data(tmp_path), match=["ce"], folder="named", **FEW)
    assert tiny.limbeck("run", "--resume", "named").code == 0, "names alone can be read back"


def test_run_takes_a_recipe(tmp_path: Path) -> None:
    recipe = limbeck.Recipe.load(tiny.recipe(tmp_path), ["train.steps=2"])
    result = limbeck.run(recipe, folder=tmp_path / "there")
    assert result.folder == tmp_path / "there" and result.arms["student"][0].parameters == 270


def test_the_public_surface_is_what_it_says() -> None:
    assert sorted(limbeck.__all__) == limbeck.__all__
    for name in ("limbeck.run", "limbeck.shape.layers.layer_choice"):  # modules of the same names as functions
        importlib.import_module(name)
    assert not isinstance(limbeck.run, ModuleType) and not isinstance(limbeck.shape, ModuleType)
    for name in limbeck.__all__:
        assert getattr(limbeck, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'tech'"):
        limbeck.tech  # noqa: B018
    assert {"kd", "dml"} <= set(limbeck.names()) and limbeck.needs(limbeck.get("kd")) == [
        "student_logits",
        "teacher_logits",
    ]
    assert limbeck.knobs(limbeck.get("kd")) == {"temperature": 4.0}
