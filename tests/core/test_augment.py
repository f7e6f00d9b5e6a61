"""Augmentations: replay, one transform for two batches, exact known moves, gradients, seeds."""

import pytest
import torch
from torch import Tensor

from limbeck.core.augment import OPS, Augment, Chain, Crop, Flip, ResizedCrop, Siamese, build
from limbeck.core.batches import generator
from limbeck.core.errors import BadInput


def images(batch: int = 6, channels: int = 3, side: int = 12) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=generator(1, "images"))


ALL: dict[str, Augment] = {
    "crop": Crop(2),
    "flip": Flip(),
    "resized_crop": ResizedCrop(),
    "chain": Chain((Crop(1), Flip(), Siamese())),
    "every": Siamese(every=True),
    **{op: Siamese(ops=(op,)) for op in OPS},
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_draws_are_seeded_and_replayable(name: str, channels: int) -> None:
    augment, x = ALL[name], images(channels=channels)
    params = augment.draw(generator(7), 6)
    assert params.shape == (6, augment.width) and params.dtype == torch.float32
    torch.rand(5)
    assert torch.equal(augment.draw(generator(7), 6), params)
    assert not torch.equal(torch.cat([augment.draw(generator(s), 6) for s in range(8)]), params.repeat(8, 1))
    once = augment.apply(x, params)
    assert once.shape == x.shape
    assert torch.equal(augment.apply(x, params), once)
    rows = torch.tensor([4, 1])  # what one picture gets does not depend on its neighbours
    assert torch.allclose(augment.apply(x[rows], params[rows]), once[rows], atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_one_row_treats_every_batch_alike(name: str) -> None:
    augment, x = ALL[name], images()
    row = augment.draw(generator(3), 1)
    small = augment.apply(x[:2], row)
    large = augment.apply(torch.cat([x, x]), row)
    assert torch.allclose(large[:2], small, atol=1e-6) and torch.allclose(large[6:8], small, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_the_pixels(name: str) -> None:
    x = images().requires_grad_()
    y = ALL[name].apply(x, ALL[name].draw(generator(2), 6))
    y.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
    torch.autograd.gradcheck(
        lambda z: ALL[name].apply(z, ALL[name].draw(generator(2), 2)), images(2, 1, 4).double().requires_grad_()
    )


def test_crop_moves_by_whole_pixels_and_fills() -> None:
    x = torch.arange(1.0, 10).view(1, 1, 3, 3)
    moved = Crop(1, fill=(-5.0,)).apply(x, torch.tensor([[1.0, -1.0]]))
    assert moved[0, 0].tolist() == [[-5, 4, 5], [-5, 7, 8], [-5, -5, -5]]
    two = Crop(1, fill=(7.0, 8.0)).apply(x.repeat(1, 2, 1, 1), torch.tensor([[3.0, 0.0]]))
    assert two[0, 0].eq(7).all() and two[0, 1].eq(8).all()
    offsets = Crop(2).draw(generator(0), 2000)
    assert offsets.unique().tolist() == [-2, -1, 0, 1, 2]


def test_flip_mirrors_where_it_says() -> None:
    x = images(2)
    y = Flip().apply(x, torch.tensor([[1.0], [0.0]]))
    assert torch.equal(y[0], x[0].flip(-1)) and torch.equal(y[1], x[1])
    assert 0.45 < float(Flip().draw(generator(0), 2000).mean()) < 0.55
    assert Flip(0.0).draw(generator(0), 100).sum() == 0 and Flip(1.0).draw(generator(0), 100).sum() == 100


def test_resized_crop_of_the_whole_is_the_picture_and_of_a_quarter_is_enlarged() -> None:
    x = images()
    assert torch.allclose(ResizedCrop().apply(x, torch.tensor([[0.0, 0.0, 1.0, 1.0]])), x, atol=1e-5)
    quarter = torch.zeros(1, 1, 8, 8)
    quarter[..., 4:, :4] = 1
    enlarged = ResizedCrop().apply(quarter, torch.tensor([[0.5, 0.0, 0.5, 0.5]]))
    assert enlarged[..., 1:, :7].eq(1).all() and enlarged[..., 0, 0].item() == 0.75  # borders mix with the neighbours
    box = ResizedCrop(smallest=0.2).draw(generator(0), 3000)
    assert (box >= 0).all() and (box[:, :2] + box[:, 2:] <= 1 + 1e-6).all()
    assert 0.18 < float((box[:, 2] * box[:, 3]).min()) < 0.25


def test_cutout_hides_a_quarter_at_most_and_colour_of_one_channel_is_affine() -> None:
    x = torch.ones(200, 1, 12, 12)
    cut = Siamese(ops=("cutout",))
    hidden = (cut.apply(x, cut.draw(generator(0), 200)) == 0).float().mean((1, 2, 3))
    assert hidden.max() == 0.25 and hidden.min() > 0
    colour = Siamese(ops=("color",))
    y = colour.apply(images(1, 1), torch.tensor([[0.0, 0.5, 0.3, 0.5, 0.0]]))  # factor 1: nothing happens
    assert torch.allclose(y, images(1, 1), atol=1e-6)


def test_siamese_draws_each_operation_and_none_left_out() -> None:
    drawn = {int(Siamese().draw(generator(s), 3)[0, 0]) for s in range(100)}
    assert drawn == set(range(len(OPS)))
    digits = Siamese(ops=("color", "crop"))
    assert {int(digits.draw(generator(s), 1)[0, 0]) for s in range(100)} == {0, 1}


def test_rows_of_several_draws_can_be_mixed() -> None:
    augment, x = Siamese(), images(8)
    draws = [augment.draw(generator(s), 1) for s in range(8)]
    assert len({int(d[0, 0]) for d in draws}) > 2
    mixed = augment.apply(x, torch.cat(draws))
    for i, draw in enumerate(draws):
        assert torch.allclose(mixed[i : i + 1], augment.apply(x[i : i + 1], draw), atol=1e-6)


def test_rotation_and_scale_keep_the_background() -> None:
    x = torch.full((4, 1, 12, 12), -0.8)
    for op in ("rotate", "scale", "crop", "cutout"):
        augment = Siamese(ops=(op,), fill=(-0.8,))
        assert torch.allclose(augment.apply(x, augment.draw(generator(5), 4)), x, atol=1e-6)


def test_build_reads_recipes() -> None:
    assert build([]) is None
    made = build(["crop", {"siamese": {"ops": ["crop"], "rotate": 5}}, Flip(1.0)], size=28, fill=(-1.0,))
    assert made == Chain((Crop(4, (-1.0,)), Siamese(("crop",), rotate=5, fill=(-1.0,)), Flip(1.0)))
    with pytest.raises(BadInput, match="did you mean `siamese`"):
        build(["siamse"])
    with pytest.raises(BadInput, match="no operation 'colour'.*`color`"):
        build([{"siamese": {"ops": ["colour"]}}])
