"""Which layers resemble which: the network matches itself, order is kept, and what is proposed can be tapped."""

import itertools

import pytest
import torch
from torch import nn

from limbeck.core import layers
from limbeck.core.errors import BadInput
from limbeck.core.taps import Taps
from limbeck.zoo.nets import build


def batch(examples: int = 32) -> dict[str, torch.Tensor]:
    return {"inputs": torch.randn(examples, 1, 8, 8, generator=torch.Generator().manual_seed(0))}


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet14", classes=4, channels=1, size=8)


def test_a_network_matches_itself_layer_by_layer(teacher: nn.Module) -> None:
    pairs = layers.propose(teacher, teacher, batch())
    assert [p.student for p in pairs] == [p.teacher for p in pairs] == [f"blocks.{i}" for i in range(6)]
    assert all(p.alike == pytest.approx(1, abs=1e-4) and p.projector == "none" for p in pairs)


def test_rotated_and_scaled_features_are_alike() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 6)
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    assert layers.likeness([x], [3 * x @ turn, torch.randn(20, 6)])[0, 0] == pytest.approx(1, abs=1e-5)


def test_the_best_order_is_that_of_trying_all() -> None:
    torch.manual_seed(0)
    for s, t in ((2, 4), (3, 3), (3, 6), (4, 2)):
        worth = torch.randn(s, t, dtype=torch.float64)
        small, large = sorted((s, t))
        tried = [list(zip(range(small), c, strict=True)) for c in itertools.combinations(range(large), small)]
        tried = [[(i, j) if s <= t else (j, i) for i, j in pairs] for pairs in tried]
        best = max(tried, key=lambda pairs: sum(float(worth[i, j]) for i, j in pairs))
        assert layers.in_order(worth) == best


def test_the_last_layers_of_an_untrained_student_are_not_tied_to_the_first_of_the_teacher(teacher: nn.Module) -> None:
    student = build({"net": "resnet8", "width": 8}, classes=4, channels=1, size=8)
    pairs = layers.propose(student, teacher, batch())
    assert pairs[-1].student == "blocks.2" and pairs[-1].teacher in ("blocks.4", "blocks.5")
    assert pairs[-1].student_shape == (32, 2, 2) and pairs[-1].teacher_shape == (64, 2, 2)
    assert pairs[-1].projector == "linear"


@pytest.mark.parametrize("name", ["vit_tiny", "mlp", "convnet"])
def test_what_is_proposed_can_be_tapped_in_any_kind_of_network(name: str, teacher: nn.Module) -> None:
    student = build(name, classes=4, channels=1, size=8)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    pairs = layers.propose(student, teacher, batch())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items()) and student.training
    assert not any(m._forward_hooks for m in student.modules())
    for side, net in (("student", student), ("teacher", teacher)):
        taps = Taps(net, layers.taps_of(pairs)[side])
        net(batch()["inputs"])
        shapes = [tuple(f.shape[1:]) for f in taps.read()["feats"]]
        assert shapes == [p.student_shape if side == "student" else p.teacher_shape for p in pairs]


def test_a_plain_stack_of_layers_gives_its_leaves() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 4))
    assert list(layers.layers(net, batch())) == ["0", "1", "2", "3"]
    wrapped = nn.ModuleDict({"x": nn.Linear(3, 3)})
    with pytest.raises(BadInput, match="at least 4 examples, got 3"):
        layers.propose(net, wrapped, batch(3))
