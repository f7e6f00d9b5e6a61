"""What shape methods must do exactly: the numbers of their vectors, and equalities that no copy would give."""

import copy
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.core import surgery
from limbeck.core.errors import BadInput
from limbeck.core.find import get
from limbeck.core.nets import outputs, reinitialised
from limbeck.core.taps import Taps
from limbeck.shape.quant.fake_quant import QuantConv2d, plain
from limbeck.zoo.resnet import resnet, wrn
from limbeck.zoo.transformer import tiny_lm

torch.set_num_threads(1)


def vector(name):
    return json.loads((Path(__file__).parent / "vectors" / f"{name}.json").read_text())


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def pictures():
    return torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def with_statistics(net):
    """Batch norms that have seen data and have scales and shifts of their own."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return net.eval()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---- layer choice --------------------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.layer_idx = None

    def forward(self, x):
        return x + self.inner(x).tanh()


def deep(blocks=12):
    net = nn.Sequential(OrderedDict(first=nn.Linear(3, 5), blocks=nn.Sequential(*[Block(5) for _ in range(blocks)])))
    for i, block in enumerate(net.blocks):
        block.layer_idx = i
    net.config = type("Config", (), {"num_hidden_layers": blocks})()
    return net


@pytest.mark.parametrize(
    "case", [vector("layer_choice"), vector("layer_choice")["released"]], ids=["every", "released"]
)
@pytest.mark.parametrize("blocks", ["", "blocks"])
def test_layer_choice_keeps_the_layers_of_the_papers(case, blocks):
    teacher = seeded(lambda: deep(case["blocks"]))
    student = get("layer_choice")(teacher, blocks=blocks, **case["knobs"])
    assert len(student.blocks) == len(case["kept"])
    for i, (mine, theirs) in enumerate(zip(student.blocks, case["kept"], strict=True)):
        assert equal(mine.state_dict(), teacher.blocks[theirs].state_dict())
        assert mine.layer_idx == i
    assert student.config.num_hidden_layers == len(case["kept"]) and teacher.config.num_hidden_layers == 12
    x = torch.randn(2, 3)
    by_hand = teacher.first(x)
    for i in case["kept"]:
        by_hand = teacher.blocks[i](by_hand)
    assert torch.equal(student(x), by_hand)


@pytest.mark.parametrize(
    ("make", "stay"),
    [
        (lambda: resnet(classes=4, channels=1, depth=20, width=4), [0, 2, 3, 4, 6, 8]),
        (lambda: wrn(classes=4, channels=1, depth=22, widen=2, width=4), [0, 2, 3, 4, 6, 8]),
    ],
    ids=["resnet", "wrn"],
)
def test_layer_choice_leaves_what_changes_the_shape(make, stay):
    teacher = seeded(make)
    student = get("layer_choice")(teacher)
    assert len(student.blocks) == len(stay)
    assert all(equal(a.state_dict(), teacher.blocks[i].state_dict()) for a, i in zip(student.blocks, stay, strict=True))
    assert outputs(student, {"inputs": pictures()})["logits"].shape == (3, 4)
    with pytest.raises(BadInput, match=r"\[3\], which change the shape"):
        get("layer_choice")(teacher, keep=[0, 1, 2, 4, 5, 6, 7, 8])


def test_layer_choice_leaves_what_halves_the_map_at_equal_width():
    half = lambda stride: nn.Sequential(OrderedDict(conv=nn.Conv2d(2, 2, 3, stride, 1), relu=nn.ReLU()))
    teacher = nn.Module()
    teacher.stages = nn.ModuleList(
        nn.Sequential(Wrapped(half(2)), Wrapped(half(1)), Wrapped(half(2))) for _ in range(2)
    )
    student = get("layer_choice")(teacher, keep_every=3)
    assert [[block.inner.conv.stride for block in stage] for stage in student.stages] == [[(2, 2), (2, 2)]] * 2


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize(
    ("teacher", "knobs", "message"),
    [
        (lambda: resnet(classes=4, channels=1, depth=8), {}, "nothing to leave out: 2 of 3 blocks"),
        (deep, {"blocks": "block"}, "did you mean"),
        (deep, {"blocks": "first"}, "first is Linear"),
        (deep, {"keep": [0, 12]}, "`keep` must be indices in 0..11"),
        (deep, {"keep_every": 1}, "`keep_every` must be >= 2"),
        (lambda: nn.Linear(2, 2), {}, "no list of like blocks"),
    ],
)
def test_layer_choice_says_what_is_wrong(teacher, knobs, message):
    with pytest.raises(ValueError, match=message):
        get("layer_choice")(teacher(), **knobs)


# ---- channel pruning -----------------------------------------------------------------------------------------------
class Depthwise(nn.Module):
    """Expand, filter each channel, project: the block of mobile networks, beside an identity."""

    def __init__(self):
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8)
        self.each, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 1, 1)

    def forward(self, x, scale=1.0, shift=None):
        y = torch.relu(self.norm1(self.expand(x)))
        y = self.project(self.norm2(self.each(y)).relu())
        return x + scale * (y if shift is None else y + shift)


class Forks(nn.Module):
    """One convolution is read by two others (can be cut), one also by a sum, and one is called twice (cannot)."""

    def __init__(self):
        super().__init__()
        self.fork, self.left, self.right = nn.Conv2d(1, 6, 1), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.twice, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.fork(x).relu()
        y = self.left(x)
        return self.last(self.twice(self.twice(y + self.right(x))))


@pytest.mark.parametrize("score", ["l1", "batch_norm"])
@pytest.mark.parametrize(
    ("make", "norm_after"),
    [
        (lambda: resnet(classes=4, channels=1, depth=8, width=8), "bn1"),
        (lambda: wrn(classes=4, channels=1, depth=10, widen=1, width=8), "bn2"),
    ],
    ids=["resnet", "wrn"],
)
def test_a_pruned_network_gives_what_the_dense_one_gives_with_those_channels_at_zero(make, norm_after, score):
    teacher = with_statistics(seeded(make))
    student = get("channel_pruning")(teacher, ratio=0.6, score=score).eval()
    dense = copy.deepcopy(teacher)
    for block, small in zip(dense.blocks, student.blocks, strict=True):
        norm = getattr(block, norm_after)
        scores = block.conv1.weight.abs().sum((1, 2, 3)) if score == "l1" else norm.weight.abs()
        n = len(scores)
        gone = scores.argsort()[: n - int(n * 0.4 + 1e-9)]
        assert small.conv1.out_channels == small.conv2.in_channels == n - len(gone) == int(n * 0.4)
        assert small.conv1.in_channels == block.conv1.in_channels
        assert small.conv2.out_channels == block.conv2.out_channels
        with torch.no_grad():
            norm.weight[gone] = 0
            norm.bias[gone] = 0
    wanted, found = (outputs(net, {"inputs": pictures()})["logits"] for net in (dense, student))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_channel_pruning_takes_the_filters_that_the_code_takes():
    v = vector("channel_pruning")
    weight = torch.tensor(v["inputs"]["weight"])
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 1))
    teacher[0].weight.data.copy_(weight)
    student = get("channel_pruning")(teacher, **v["knobs"])
    assert torch.equal(student[0].weight, weight[v["kept"]])
    assert torch.equal(student[2].weight, teacher[2].weight[:, v["kept"]])
    assert torch.equal(student[2].bias, teacher[2].bias)


def test_channel_pruning_goes_through_depthwise_convolutions():
    teacher = with_statistics(seeded(Depthwise))
    student = get("channel_pruning")(teacher).eval()
    assert (student.expand.out_channels, student.each.groups, student.norm2.num_features) == (4, 4, 4)
    weak = teacher.expand.weight.abs().sum((1, 2, 3)).argsort()[:4]
    with torch.no_grad():
        teacher.project.weight[:, weak] = 0
    torch.testing.assert_close(student(pictures()), teacher(pictures()))


def test_channel_pruning_cuts_only_what_convolutions_alone_read():
    student = get("channel_pruning")(seeded(Forks))
    sizes = {name: surgery.widths(layer) for name, layer in student.named_children()}
    assert sizes == {"fork": (1, 3), "left": (3, 4), "right": (3, 4), "twice": (4, 4), "last": (4, 2)}
    assert student(pictures()).shape == (3, 2, 12, 12)


def test_channel_pruning_looks_into_the_parts_of_what_cannot_be_traced():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Depthwise()
            self.again = self.block  # one module under two names is cut once

        def forward(self, x):
            return self.again(self.block(x)) if x.sum() > 0 else self.block(x)

    student = get("channel_pruning")(Moody())
    assert student.block.expand.out_channels == 4 and student.again is student.block
    assert student(pictures()).shape == (3, 1, 12, 12)


@pytest.mark.parametrize(
    ("teacher", "knobs", "message"),
    [
        (Depthwise, {"ratio": 0.0}, r"`ratio` must be in \(0, 1\)"),
        (Depthwise, {"ratio": 1.0}, r"`ratio` must be in \(0, 1\)"),
        (Depthwise, {"score": "l2"}, "`score` must be 'l1' or 'batch_norm'"),
        (Forks, {"score": "batch_norm"}, "no convolution whose channels"),
        (lambda: nn.Conv2d(2, 2, 1), {}, "no convolution whose channels"),
    ],
)
def test_channel_pruning_says_what_is_wrong(teacher, knobs, message):
    with pytest.raises(ValueError, match=message):
        get("channel_pruning")(teacher(), **knobs)


# ---- weight inheritance --------------------------------------------------------------------------------------------
def perceptron():
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2))


@pytest.mark.parametrize("choose", ["leading", "uniform"])
def test_weight_inheritance_takes_the_slices_that_the_codes_take(choose):
    v = vector("weight_inheritance")
    teacher = perceptron().double()
    teacher.load_state_dict({k: torch.tensor(x, dtype=torch.float64) for k, x in v["inputs"].items()})
    case = v if choose == "leading" else v["uniform"]
    student = get("weight_inheritance")(teacher, **case["knobs"])
    assert equal(
        dict(student.state_dict()), {k: torch.tensor(x, dtype=torch.float64) for k, x in case["value"].items()}
    )


@pytest.mark.parametrize("make", [perceptron, lambda: resnet(classes=4, channels=1, depth=8), lambda: tiny_lm(vocab=9)])
@pytest.mark.parametrize("choose", ["leading", "uniform", "largest"])
def test_weight_inheritance_at_full_width_is_the_teacher(make, choose):
    teacher = seeded(make)
    assert equal(get("weight_inheritance")(teacher, width=1.0, choose=choose).state_dict(), teacher.state_dict())


def test_weight_inheritance_keeps_the_same_channels_wherever_a_width_occurs():
    teacher = seeded(lambda: resnet(classes=4, channels=1, depth=8, width=8))
    heavy = torch.tensor([1, 4, 6, 7])
    with torch.no_grad():
        for conv in (teacher.conv, teacher.blocks[0].conv1, teacher.blocks[0].conv2):
            conv.weight[heavy] += 10
    student = get("weight_inheritance")(teacher, [{"inputs": pictures()}], choose="largest")
    assert torch.equal(student.conv.weight, teacher.conv.weight[heavy])
    inner = teacher.blocks[0].conv2.weight[heavy][:, heavy]
    assert torch.equal(student.blocks[0].conv2.weight, inner)
    assert torch.equal(student.norm.running_var, teacher.norm.running_var[heavy])
    assert student.head.weight.shape == (4, 16) and student.conv.in_channels == 1


def test_weight_inheritance_of_a_language_model_cuts_queries_keys_and_values_alike_and_keeps_ties():
    teacher = seeded(lambda: tiny_lm(vocab=9, width=16, heads=2, layers=1))
    student = get("weight_inheritance")(teacher, [{"inputs": torch.arange(6).view(2, 3)}])
    assert student.head.weight is student.embed.weight and student.embed.weight.shape == (9, 8)
    mine, theirs = (
        student.blocks[0].attention.qkv.weight.view(3, 8, 8),
        teacher.blocks[0].attention.qkv.weight.view(3, 16, 16),
    )
    assert torch.equal(mine, theirs[:, :8, :8])


def test_weight_inheritance_follows_a_flattened_map():
    teacher = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(4, 4), nn.Flatten(), nn.Linear(4 * 9, 2))
    student = get("weight_inheritance")(teacher, choose="uniform")
    assert torch.equal(student[3].weight, teacher[3].weight.view(2, 4, 9)[:, [0, 2]].flatten(1))
    assert student(torch.randn(2, 1, 3, 3)).shape == (2, 2)


@pytest.mark.parametrize(
    ("teacher", "knobs", "message"),
    [
        (perceptron, {"width": 0.0}, r"`width` must be in \(0, 1\]"),
        (perceptron, {"choose": "best"}, "`choose` must be"),
        (lambda: nn.Linear(2, 2), {}, "has 1 layers"),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 2)),
            {},
            "MultiheadAttention",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.GLU(), nn.Linear(2, 2)), {}, "no layer gives as many"),
        (lambda: tiny_lm(vocab=9, width=16), {"width": 0.4}, "does not run when made narrower"),
    ],
)
def test_weight_inheritance_says_what_is_wrong(teacher, knobs, message):
    with pytest.raises(ValueError, match=message):
        get("weight_inheritance")(teacher(), [{"inputs": torch.zeros(1, 3, dtype=torch.long)}], **knobs)


# ---- quantisation --------------------------------------------------------------------------------------------------
def test_fake_quant_rounds_weights_as_the_code_does():
    v = vector("fake_quant")
    weight = torch.tensor(v["inputs"]["weight"], dtype=torch.float64)
    for bits, want in v["weights"].items():
        teacher = nn.Sequential(nn.Linear(7, 4, dtype=torch.float64))
        teacher[0].weight.data.copy_(weight)
        student = get("fake_quant")(teacher, bits=int(bits), activation_bits=32)
        torch.testing.assert_close(
            plain(student)[0].weight, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )
        assert torch.equal(student[0].weight, weight)  # the float weight learns
        x = torch.randn(5, 7, dtype=torch.float64)
        assert torch.equal(student(x), plain(student)(x))


def test_fake_quant_rounds_activations_to_levels_of_the_range_met():
    case = vector("fake_quant")["activation"]
    student = get("fake_quant")(nn.Linear(1, 1, bias=False, dtype=torch.float64), bits=32, activation_bits=case["bits"])
    student.weight.data.fill_(1.0)
    x = torch.tensor(case["input"], dtype=torch.float64).view(-1, 1)
    assert torch.equal(student.eval()(x), x)  # no range yet: nothing is rounded
    out = student.train()(x)
    torch.testing.assert_close(out.flatten(), torch.tensor(case["value"], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert (student.low.item(), student.high.item()) == (-1.0, 3.0)
    far = torch.tensor([[-9.0], [9.0], [0.0]], dtype=torch.float64, requires_grad=True)
    levels = student.eval()(far)
    torch.testing.assert_close(
        levels.flatten(), torch.tensor([-4 / 3, 8 / 3, 0.0], dtype=torch.float64), rtol=1e-6, atol=0
    )
    levels.sum().backward()
    assert far.grad.flatten().tolist() == [0.0, 0.0, 1.0]
    student.train()(far)
    torch.testing.assert_close(student.low, torch.tensor(-1 * 0.99 - 9 * 0.01))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quant_gives_few_levels_is_idempotent_and_lets_gradients_straight_through(bits):
    teacher = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)))
    student = get("fake_quant")(teacher, bits=bits, activation_bits=32)
    once = plain(student)
    for channel in once[0].weight.detach().flatten(1):
        assert channel.unique().numel() <= 2**bits - 1
    torch.testing.assert_close(plain(get("fake_quant")(once, bits=bits))[0].weight, once[0].weight)
    x = torch.randn(2, 2, 4, 4)
    through = torch.autograd.grad(student(x).square().sum(), student[0].weight)[0]
    at_rounded = torch.autograd.grad(once(x).square().sum(), once[0].weight)[0]
    torch.testing.assert_close(through, at_rounded)


def test_fake_quant_with_32_bits_is_the_teacher_and_plain_is_plain():
    teacher = with_statistics(seeded(lambda: resnet(classes=4, channels=1, depth=8, width=4)))
    batch = {"inputs": pictures()}
    same = get("fake_quant")(teacher, bits=32, activation_bits=32)
    assert torch.equal(outputs(same, batch)["logits"], outputs(teacher, batch)["logits"])
    student = get("fake_quant")(teacher, [batch], bits=8, activation_bits=8, skip=("conv", "head"))
    assert type(student.conv) is nn.Conv2d and isinstance(student.blocks[0].conv1, QuantConv2d)
    assert all(layer.high > 0 for layer in student.modules() if isinstance(layer, QuantConv2d))
    assert torch.equal(student.norm.running_mean, teacher.norm.running_mean) and not student.training
    near, exact = (outputs(net, batch)["logits"] for net in (student, teacher))
    assert 0 < (near - exact).abs().max() < 0.1 * exact.abs().max()
    leaves = plain(student)
    assert not any(isinstance(layer, QuantConv2d) for layer in leaves.modules())
    assert leaves.state_dict().keys() == teacher.state_dict().keys()
    exported = torch.export.export(leaves, (batch["inputs"],)).module()
    torch.testing.assert_close(exported(batch["inputs"])["logits"], leaves(batch["inputs"])["logits"])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"bits": 1}, "`bits` must be in 2..32"),
        ({"activation_bits": 33}, "`activation_bits` must be"),
        ({"skip": ("1",)}, "`skip` must be paths of linear or convolution layers: 0, 2, 4"),
        ({"skip": ("0", "2", "4")}, "no linear or convolution layer to quantise"),
    ],
)
def test_fake_quant_says_what_is_wrong(knobs, message):
    with pytest.raises(ValueError, match=message):
        get("fake_quant")(perceptron(), **knobs)


# ---- what they share -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["layer_choice", "channel_pruning", "weight_inheritance", "fake_quant"])
def test_taps_stay_on_the_teacher_and_the_student_can_start_anew(name):
    teacher = seeded(lambda: resnet(classes=4, channels=1, depth=14, width=4)).requires_grad_(False).eval()
    taps = Taps(teacher, {"inner": "blocks.1"})
    student = get(name)(teacher)
    student(pictures())
    with pytest.raises(BadInput, match="not reached"):
        taps.read()
    assert all(p.requires_grad for p in student.parameters())
    fresh = reinitialised(student)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in student.parameters()]
    assert not torch.equal(fresh.head.weight, student.head.weight)


def test_share_keeps_the_strongest_in_their_order():
    scores = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0])
    assert surgery.share(scores, 0.6).tolist() == [1, 3]
    assert surgery.share(scores, 0.99).tolist() == [1]
    assert surgery.share(torch.arange(10.0), 0.9).tolist() == [9]  # 10 * (1 - 0.9) is 0.9999999999999998
