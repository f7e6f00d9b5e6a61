"""Pictures with several labels: mosaics, own files of 0 and 1, what is measured, and where networks look."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from limbeck.adapters import tasks
from limbeck.adapters.files import load
from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.core.find import get
from limbeck.core.places import class_maps, grad_cam
from limbeck.verbs import saliency
from limbeck.verbs.setting import any_number, judge, usual
from limbeck.zoo.nets import build
from tests import tiny

FACTS = {"classes": 5, "channels": 1, "size": 8}
CLASSES = ["a", "b", "c"]


def numbered(count: int) -> Table:
    """Pictures of 2 x 3 pixels that hold their own number; its remainder by three is the class."""
    x = torch.arange(count).float()[:, None, None, None].expand(-1, 1, 2, 3)
    return Table({"inputs": x, "labels": torch.arange(count) % 3}, "images", CLASSES)


def pictures(several: bool = True) -> Table:
    draw = torch.Generator().manual_seed(0)
    labels = torch.rand(9, 5, generator=draw).round() if several else torch.arange(9) % 5
    return Table({"inputs": torch.randn(9, 1, 8, 8, generator=draw), "labels": labels}, "images", list("abcde"))


def test_a_mosaic_shows_its_pictures_and_has_their_labels() -> None:
    made = tasks.mosaics(numbered(8), 2, seed=3)
    assert made["inputs"].shape == (8, 1, 4, 6) and made["labels"].shape == (8, 3) and made.num_classes == 3
    parts = [made["inputs"][:, 0, row : row + 2, column : column + 3] for row in (0, 2) for column in (0, 3)]
    for part in parts:
        assert torch.equal(part.amin((1, 2)), part.amax((1, 2)))  # a whole picture
        assert part[:, 0, 0].sort().values.tolist() == list(range(8))  # each comes once in each place
    for i in range(8):
        shown = {int(part[i, 0, 0]) % 3 for part in parts}
        assert made["labels"][i].nonzero()[:, 0].tolist() == sorted(shown)
    assert torch.equal(tasks.mosaics(numbered(8), 2, seed=3)["inputs"], made["inputs"])
    assert not torch.equal(tasks.mosaics(numbered(8), 2, seed=4)["inputs"], made["inputs"])


def test_mosaics_of_the_parts_do_not_mix_and_limit_counts_them() -> None:
    plain = load({"name": "digits", "normalise": False})
    splits = load({"name": "digits", "mosaic": 2, "limit": 50, "normalise": False})
    assert len(splits.train) == 50 and len(splits.test) == len(plain.test)
    known = {picture.numpy().tobytes() for picture in plain.test["inputs"]}
    corners = splits.test["inputs"][:, :, :8, 8:]
    assert {picture.contiguous().numpy().tobytes() for picture in corners} == known
    assert splits.train["inputs"].shape[1:] == (1, 16, 16) and splits.train.num_classes == 10


@pytest.mark.parametrize(
    "spec, said",
    [
        ({"name": "blobs", "mosaic": 2}, "`mosaic` is for pictures"),
        ({"name": "shakespeare_small", "limit": 9, "mosaic": 2}, "`mosaic` needs one class label an example"),
        ({"name": "digits", "mosaic": 2, "per_class": 3}, "per_class needs one class label an example"),
        ({"name": "digits", "mosaic": 2, "known": [1, 2]}, "`mosaic` needs a label for every picture"),
        ({"name": "digits", "mosaic": 2, "labelled": 1}, "`labelled` needs one class label an example"),
        ({"name": "digits", "mosaic": 0}, "data option `mosaic`"),
    ],
)
def test_what_makes_no_mosaics(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        load(spec)


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.bool_])
def test_own_files_may_hold_several_labels(tmp_path: Path, dtype: Any) -> None:
    hot = (np.random.default_rng(0).random((20, 4)) < 0.4).astype(dtype)
    np.savez(tmp_path / "hot.npz", x=np.zeros((20, 6, 6), np.uint8), y=hot)
    splits = load({"name": str(tmp_path / "hot.npz"), "classes": list("wxyz"), "split": [0.5, 0.2, 0.3]})
    assert splits.train.classes == list("wxyz") and splits.train["labels"].dtype == torch.float32
    assert all(any_number(part) for part in splits)
    assert torch.cat([part["labels"] for part in splits]).sum() == hot.sum()
    np.savez(tmp_path / "soft.npz", x=np.zeros((20, 6, 6), np.uint8), y=hot * 0.5)
    assert load(str(tmp_path / "soft.npz")).train.num_classes == 0


def test_the_usual_measure_goes_by_the_labels() -> None:
    assert usual(pictures()) == "multilabel"
    assert usual(pictures(several=False)) == "accuracy"
    soft = Table({"inputs": torch.zeros(2, 3), "labels": torch.tensor([[0.2, 0.8], [0.5, 0.5]])}, classes=["a", "b"])
    assert not any_number(soft)


def test_every_class_has_an_embedding_of_its_own() -> None:
    torch.manual_seed(0)
    net = build({"net": "resnet8", "width": 4, "queries": True}, **FACTS).eval()
    x = torch.randn(3, 1, 8, 8)
    out = net(x)
    found = out["feats"][-1]
    assert found.shape == (3, 5, 16) and out["logits"].shape == (3, 5)
    nn.init.zeros_(net.head.weight[2])  # a class reads its own embedding alone
    after = net(x)["logits"]
    assert torch.allclose(after[:, 2], net.head.bias[2].expand(3)) and torch.equal(after[:, :2], out["logits"][:, :2])
    assert get("led")(out["feats"], out["feats"], torch.ones(3, 5)).item() == 0


def test_grad_cam_of_a_head_on_the_mean_is_what_the_head_says_at_every_place() -> None:
    torch.manual_seed(0)
    net = build({"net": "resnet8", "width": 4}, **FACTS).eval()
    out = net(torch.randn(3, 1, 8, 8))
    feature = out["feats"][-1]
    places = feature.shape[-1] * feature.shape[-2]
    assert torch.allclose(grad_cam(out["logits"], feature) * places, class_maps(feature, out["head"]), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet8", "convnet", "vit_tiny"])
def test_maps_of_frozen_networks_and_what_they_leave_alone(name: str) -> None:
    torch.manual_seed(0)
    net, table = build(name, **FACTS).requires_grad_(False).train(), pictures()
    with torch.no_grad():
        whole = saliency.maps(net, table)
    assert whole.shape[:2] == (9, 5) and whole.isfinite().all() and whole.abs().sum() > 0
    assert torch.allclose(whole, saliency.maps(net, table, batch_size=4), atol=1e-6)
    assert net.training and not table["inputs"].requires_grad
    one = judge(net, table, ["saliency_overlap"], net)
    assert one == pytest.approx({"cosine": 1.0, "iou": 1.0})
    other = judge(build(name, **FACTS), table, ["multilabel", "saliency_overlap"], net)
    assert other["cosine"] < 0.99 and {"map", "iou"} <= other.keys()
    assert "cosine" not in judge(net, table, ["multilabel", "saliency_overlap"])  # nobody to compare with


def test_a_network_without_places_has_no_maps() -> None:
    with pytest.raises(BadInput, match="MLP returns none"):
        saliency.maps(build("mlp", **FACTS), pictures())

    class Bare(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.flatten(1)[:, :5]

    with pytest.raises(BadInput, match="Bare returns none"):
        saliency.maps(Bare(), pictures())


RECIPE = {
    "name": "mosaics",
    "do": "teach",
    "teacher": {"net": "resnet8", "width": 2, "queries": True, "train": {"steps": 2, "batch_size": 8}},
    "student": {"net": "resnet8", "width": 2, "queries": True},
    "data": {"name": "digits", "mosaic": 2, "limit": 40, "test_limit": 30},
    "match": ["bce", "mld", {"led": 0.1}],
    "control": {"match": ["bce"]},
    "train": {"steps": 3, "batch_size": 8},
    "measure": ["multilabel", "saliency_overlap"],
    "expect": {"metric": "map"},
}


def test_a_recipe_of_several_labels_runs(tmp_path: Path) -> None:
    path = tmp_path / "mosaics.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    called = tiny.limbeck("run", path, "--out", tmp_path / "run")
    assert called.code == 0, called.err
    flat = tmp_path / "flat.yaml"
    flat.write_text(yaml.safe_dump({**RECIPE, "student": {"net": "mlp"}, "match": ["bce", "mld"]}))
    said = tiny.limbeck("run", flat, "--out", tmp_path / "flat").said
    assert "`measure.1`: saliency maps need a network" in said and not (tmp_path / "flat").exists()


def test_cross_entropy_says_what_such_labels_need() -> None:
    with pytest.raises(BadInput, match="of 0 to 1; use bce"):
        get("ce")(torch.zeros(2, 3), torch.eye(3)[:2])
