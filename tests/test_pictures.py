"""Pairs of pictures: how they are made, networks that paint and judge, what is measured, and a recipe of it all."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from limbeck.adapters import tasks
from limbeck.adapters.files import load
from limbeck.core.batches import Batches, Table
from limbeck.core.errors import BadInput
from limbeck.core.find import get
from limbeck.train.gans.pix2pix import Pix2Pix
from limbeck.verbs.setting import judge, usual
from limbeck.zoo.nets import build
from tests import tiny


def pictures(channels: int = 1, count: int = 6) -> Table:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(count, channels, 12, 12, generator=draw)
    return Table({"inputs": x, "labels": torch.arange(count) % 3}, "images", list("abc"))


def test_degraded_pictures_are_what_their_name_says() -> None:
    table = pictures(3)
    made = {name: tasks.degraded(table, name, 0) for name in tasks.DEGRADE}
    for name, pair in made.items():
        assert pair["inputs"].shape == table["inputs"].shape and torch.equal(pair["labels"], table["inputs"]), name
        assert pair.paired and not table.paired and pair.num_classes == 0
        assert not torch.equal(pair["inputs"], pair["labels"]), name
    x = table["inputs"]
    assert torch.allclose(made["grey"]["inputs"][:, 0], x.mean(1))
    means = x.unflatten(3, (3, 4)).unflatten(2, (3, 4)).mean((3, 5))
    assert torch.allclose(made["downsample"]["inputs"][:, :, ::4, ::4], means, atol=1e-6)
    assert torch.equal(made["downsample"]["inputs"][:, :, :4, :4].std((2, 3)), torch.zeros(6, 3))
    assert (made["noise"]["inputs"] - x).std() == pytest.approx(0.3, rel=0.1)


def test_a_blur_is_a_bell_of_its_deviation_and_edges_are_where_a_step_is() -> None:
    dot = torch.zeros(1, 1, 21, 21)
    dot[..., 10, 10] = 1
    spread = tasks.degraded(Table({"inputs": dot}, "images"), {"blur": 2}, 0)["inputs"][0, 0]
    places = torch.arange(21.0) - 10
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    assert (spread.sum(0) * places.square()).sum() == pytest.approx(4, rel=0.05)
    step = torch.zeros(1, 1, 6, 6)
    step[..., 3:] = 0.5
    seen = tasks.degraded(Table({"inputs": step}, "images"), "edges", 0)["inputs"][0, 0]
    assert torch.equal(seen, torch.tensor([0.0, 0, 1, 1, 0, 0]).expand(6, 6))
    assert not tasks.degraded(Table({"inputs": step}, "images"), {"edges": 0.3}, 0)["inputs"].any()


def test_pairs_come_after_every_choice_by_class_in_one_scale() -> None:
    spec: dict[str, Any] = {
        "name": "fashion_mnist_small",
        "size": 14,
        "per_class": 3,
        "known": [1, 2],
        "test_limit": 40,
    }
    plain, pairs = load(spec), load({**spec, "degrade": "noise"})
    for before, after in zip(plain, pairs, strict=True):
        assert torch.allclose(after["labels"], before["inputs"]) and after.mean == before.mean
    noise = [part["inputs"][:6] - part["labels"][:6] for part in pairs]
    assert not torch.allclose(noise[0], noise[1], atol=0.1) and not torch.allclose(noise[1], noise[2], atol=0.1)
    assert torch.equal(load({**spec, "degrade": "noise"}).train["inputs"], pairs.train["inputs"])
    assert not torch.equal(load({**spec, "degrade": "noise", "seed": 1}).train["inputs"], pairs.train["inputs"])
    black = pairs.test.raw(pairs.test["labels"])
    assert black.min() == pytest.approx(0, abs=1e-6) and black.max() <= 1 + 1e-6


def test_both_pictures_of_a_pair_are_flipped_and_cropped_alike() -> None:
    table = tasks.degraded(pictures(), {"downsample": 1}, 0)  # a pair of equal pictures
    batch = next(Batches(table, 6, seed=1, augment=["flip", "crop"]))
    assert torch.allclose(batch["inputs"], batch["labels"], atol=1e-6)
    assert not torch.allclose(batch["labels"], table["labels"][batch["index"]])


@pytest.mark.parametrize(
    "spec, said",
    [
        ({"name": "blobs", "degrade": "blur"}, "`degrade` is for pictures"),
        ({"name": "digits", "degrade": "blurr"}, "did you mean `blur`"),
        ({"name": "digits", "degrade": {"blur": 0}}, "a number > 0, got 0"),
        ({"name": "digits", "degrade": {"blur": 1, "noise": 1}}, "takes one of"),
        ({"name": "digits", "degrade": "grey"}, "pictures in colour"),
        ({"name": "digits", "degrade": 3}, "data option `degrade`"),
    ],
)
def test_what_makes_no_pairs(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        load(spec)


@pytest.mark.parametrize("channels, size, depth", [(1, 14, 2), (3, 32, 3), (1, 9, 1)])
def test_a_painter_paints_in_the_size_of_its_input_and_shows_four_maps(channels: int, size: int, depth: int) -> None:
    torch.manual_seed(0)
    net = build({"net": "painter", "width": 4, "depth": depth}, channels=channels, size=size)
    x = torch.randn(5, channels, size, size)
    out = net(x)
    assert out["logits"].shape == x.shape and len(out["feats"]) == 4
    assert [f.shape[1] for f in out["feats"]] == [4 * 2**depth] * 3 + [4]
    out["logits"].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    flat = torch.linspace(-1.5, 1.5, 5).view(5, 1, 1, 1).expand_as(x)
    fitted = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        fitted.zero_grad()
        loss = (net(flat)["logits"] + flat).square().mean()
        loss.backward()
        fitted.step()
    assert loss < 0.5  # of negatives whose variance is 1.1


def test_a_patch_judge_looks_at_patches_of_any_size() -> None:
    net = build({"net": "patch_judge", "width": 8}, channels=1, size=16)
    x = torch.randn(2, 2, 16, 16)
    out = net(x)
    assert out["logits"].shape == (2, 1, 4, 4) and [f.shape[1] for f in out["feats"]] == [8, 16]
    assert net(x[..., :3, :3])["logits"].shape == (2, 1, 1, 1)
    assert (
        build({"net": "patch_judge", "beside": False}, channels=3)(x.repeat(1, 2, 1, 1)[:, :3])["logits"].shape[1] == 1
    )
    with pytest.raises(BadInput, match="width"):
        build({"net": "patch_judge", "width": 12}, channels=1)


def test_pictures_are_measured_where_white_is_1() -> None:
    table = tasks.degraded(pictures(), {"noise": 0.1}, 0)
    net = torch.nn.Identity()
    assert usual(table) == "psnr"
    plain = judge(net, table, ["psnr"])["psnr"]
    scaled = {k: (v - 0.5) / 0.25 for k, v in table.columns.items()}
    same = judge(net, Table(scaled, "images", mean=(0.5,), std=(0.25,)), ["psnr"])["psnr"]
    assert plain == pytest.approx(same, abs=1e-4) and 19 < plain < 23  # noise of 0.1, some of it cut off
    eye = build({"net": "resnet8", "width": 2}, classes=3, channels=1).eval()
    exact = Table({**table.columns, "inputs": table["labels"]}, "images")
    assert judge(net, exact, ["psnr", "frechet"], None, eye) == pytest.approx({"psnr": 100, "frechet": 0}, abs=1e-5)
    assert judge(net, table, ["frechet"], None, eye)["frechet"] > 1e-4


def test_psnr_refuses_pictures_of_another_size() -> None:
    with pytest.raises(ValueError, match="student_picture.*real_picture"):
        get("psnr")(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 1, 1))


RECIPE: dict[str, Any] = {
    "name": "pairs",
    "do": "teach",
    "student": {"net": "painter", "width": 2},
    "nets": {
        "generator": {"net": "painter", "width": 3},
        "discriminator": {"net": "patch_judge", "width": 4},
        "features": {"net": "resnet8", "width": 8, "classes": 10, "weights": "zoo/digits_resnet8"},
        "judge": {"net": "resnet8", "width": 2, "classes": 10},
    },
    "data": {"name": "digits", "degrade": "edges", "limit": 40, "test_limit": 30, "augment": ["flip"]},
    "method": "dcd_gan",
    "control": {"method": "pix2pix"},
    "train": {"steps": 2, "batch_size": 8},
    "measure": ["psnr", "frechet"],
}


def test_a_recipe_of_pairs_runs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    called = tiny.limbeck("run", path, "--out", tmp_path / "run")
    assert called.code == 0, called.err


@pytest.mark.parametrize(
    "change, said",
    [
        ({"measure": ["accuracy"]}, "labels, but labels here are pictures; `psnr`"),
        ({"nets": {**RECIPE["nets"], "judge": None}}, "name one as `nets.judge`"),
        ({"data": {"name": "digits", "limit": 40}}, "labels must be pictures"),
        ({"student": {"net": "resnet8", "width": 2, "classes": 3}}, "pictures"),
    ],
)
def test_a_recipe_of_pairs_that_cannot_run_says_why(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.yaml"
    body = {**RECIPE, **change}
    body["nets"] = {k: v for k, v in body["nets"].items() if v}
    if change.get("data"):
        body["measure"] = ["accuracy"]
    path.write_text(yaml.safe_dump(body))
    assert said in tiny.limbeck("run", path, "--out", tmp_path / "run").said
    assert not (tmp_path / "run").exists()


def test_pix2pix_asks_for_pairs() -> None:
    with pytest.raises(ValueError, match="pixels"):
        Pix2Pix(pixels=-1)
