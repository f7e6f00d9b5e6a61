"""The networks of the zoo: shapes, published parameter counts, what can be left out, and building by name."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput, MissingExtra
from limbeck.core.nets import outputs
from limbeck.core.sampler import Denoiser
from limbeck.zoo.denoise import UNet, denoiser_mlp, unet
from limbeck.zoo.nets import DENOISERS, NETS, build
from limbeck.zoo.transformer import rotate

TOKENS = (
    "bag",
    "pair_encoder",
    "prompted_encoder",
    "routed_encoder",
    "text_cnn",
    "text_encoder",
    "tiny_lm",
    "tiny_moe_lm",
)
OTHERS = ("generator", "painter", "patch_judge", "frames", "conv_lstm", "darts")  # of other outputs: tested elsewhere
PICTURES = [name for name in NETS if name not in (*TOKENS, *DENOISERS, *OTHERS)]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# He et al. 2015 in the counts of akamaster/pytorch_resnet_cifar10; WRN with 100 classes as in HobbitLong/RepDistiller;
# ConvNet as in VICO-UoE/DatasetCondensation, width 128, three blocks
PUBLISHED = {
    "resnet20": (10, 3, 32, 269_722),
    "resnet32": (10, 3, 32, 464_154),
    "resnet44": (10, 3, 32, 658_586),
    "resnet56": (10, 3, 32, 853_018),
    "resnet110": (10, 3, 32, 1_727_962),
    "wrn16x2": (100, 3, 32, 703_284),
    "wrn40x1": (100, 3, 32, 569_780),
    "wrn40x2": (100, 3, 32, 2_255_156),
    "convnet": (10, 3, 32, 320_010),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    classes, channels, size, expected = PUBLISHED[name]
    assert count(build(name, classes=classes, channels=channels, size=size)) == expected


def test_convnet_on_28x28_pads_to_32x32() -> None:
    net = build("convnet", classes=10, channels=1, size=28)
    assert count(net) == 317_706
    out = net(torch.randn(2, 1, 28, 28))
    assert [tuple(f.shape) for f in out["feats"]] == [(2, 128, 16, 16), (2, 128, 8, 8), (2, 128, 4, 4)]
    assert torch.equal(out["emb"], out["feats"][-1].flatten(1))


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("channels, size", [(1, 8), (1, 28), (3, 32)])
def test_pictures_in_named_tensors_out(name: str, channels: int, size: int) -> None:
    if name.startswith(("resnet", "wrn")) and name not in ("resnet8", "resnet20", "wrn16x1"):
        size = 8  # the same code at another depth: small pictures tell as much
    torch.manual_seed(0)
    net = build(name, classes=7, channels=channels, size=size)
    out = outputs(net, {"inputs": torch.randn(3, channels, size, size)})
    assert out["logits"].shape == (3, 7)
    assert len(out["feats"]) >= 2 and all(len(f) == 3 for f in out["feats"])
    assert out["emb"].ndim == 2
    assert torch.allclose(net.head(out["emb"]), out["logits"])  # emb is what the head reads
    assert torch.allclose(out["emb"] @ out["head"].T + out["head_bias"], out["logits"], atol=1e-6)
    out["logits"].square().sum().backward()
    still = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still
    again = net.eval()(torch.randn(5, channels, size, size))
    assert torch.isfinite(again["logits"]).all()


def test_width_is_a_knob_and_a_residual_teacher_is_eight_times_its_student() -> None:
    facts = {"classes": 10, "channels": 1, "size": 28}
    narrow, wide = build({"net": "resnet8", "width": 8}, **facts), build("resnet20", **facts)
    assert count(wide) > 8 * count(narrow)
    assert [f.shape[1] for f in narrow(torch.randn(2, 1, 28, 28))["feats"]] == [8, 16, 32]


@pytest.mark.parametrize("name", ["resnet20", "wrn16x2", "vit_tiny", "tiny_lm"])
def test_blocks_that_keep_the_shape_can_be_left_out(name: str) -> None:
    facts: dict[str, Any] = {"vocab": 11} if name == "tiny_lm" else {"classes": 4, "channels": 3, "size": 16}
    x = torch.randint(11, (2, 6)) if name == "tiny_lm" else torch.randn(2, 3, 16, 16)
    net = build(name, **facts).eval()
    before = net(x)
    residual = name.startswith(("resnet", "wrn"))
    assert isinstance(net.blocks, nn.ModuleList)
    kept = [b for b in net.blocks if residual and b.changes] or [net.blocks[-1]]
    assert len(kept) < len(net.blocks)
    cut = copy.deepcopy(net)
    cut.blocks = nn.ModuleList(kept)
    after = cut(x)
    assert after["logits"].shape == before["logits"].shape
    if residual:  # each of the three stages still shows a map of the same shape
        assert [f.shape for f in after["feats"]] == [f.shape for f in before["feats"]]


def test_a_residual_block_without_weights_in_its_branch_is_the_identity() -> None:
    net = build("resnet20", classes=4, channels=1, size=8).eval()
    block = net.blocks[1]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x), x)
    first = net.blocks[3]
    nn.init.zeros_(first.bn2.weight)
    y = first(x)  # option A: every second pixel, and new channels that are zero on both sides
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and y[:, :8].eq(0).all() and y[:, 24:].eq(0).all()


@pytest.mark.parametrize("name", ["bag", "text_cnn", "text_encoder"])
def test_text_classifiers_ignore_padding(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, classes=3, vocab=50).eval()
    short = torch.randint(1, 50, (4, 9))
    long = torch.cat([short, torch.zeros(4, 20, dtype=torch.long)], 1)
    out = net(short)
    assert out["logits"].shape == (4, 3) and torch.allclose(net.head(out["emb"]), out["logits"])
    assert torch.allclose(out["logits"], net(long)["logits"], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"length": 12}, {"attn": True}, {"tied": False}], ids=str)
def test_language_model_is_causal(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = build({"net": "tiny_lm", "width": 32, "layers": 3, **options}, vocab=17).eval()
    ids = torch.randint(17, (2, 12))
    out = net(ids)
    assert out["logits"].shape == (2, 12, 17) and out["hidden"].shape == (2, 12, 32)
    assert [tuple(f.shape) for f in out["feats"]] == [(2, 12, 32)] * 3
    assert torch.allclose(out["hidden"] @ out["head"].T, out["logits"], atol=1e-5)
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 17
    again = net(changed)["logits"]
    assert torch.allclose(again[:, :8], out["logits"][:, :8], atol=1e-5)
    assert not torch.allclose(again[:, 8:], out["logits"][:, 8:], atol=1e-2)
    assert ("attn" in out) == options.get("attn", False)
    if "attn" in out:
        assert torch.allclose(out["attn"][0].sum(-1), torch.ones(2, 4, 12))
        assert out["attn"][0].triu(1).eq(0).all()


def test_attention_maps_do_not_change_what_is_computed() -> None:
    torch.manual_seed(0)
    with_maps = build({"net": "tiny_lm", "attn": True}, vocab=9)
    without = build("tiny_lm", vocab=9)
    without.load_state_dict(with_maps.state_dict())
    ids = torch.randint(9, (2, 10))
    assert torch.allclose(with_maps(ids)["logits"], without(ids)["logits"], atol=1e-5)


def test_rotary_positions_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 8).expand(1, 1, 9, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 9, 8)
    scores = rotate(q) @ rotate(k).transpose(-1, -2)
    for distance in range(-8, 9):
        line = scores[0, 0].diagonal(distance)
        assert torch.allclose(line, line[:1].expand_as(line), atol=1e-5)


@pytest.mark.parametrize("size", [8, 14, 28])
def test_unet_reads_pictures_times_and_labels(size: int) -> None:
    torch.manual_seed(0)
    net = unet(channels=1, size=size, classes=10)
    assert 200_000 < count(net) < 400_000
    x, t, labels = torch.randn(3, 1, size, size), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1, 2, 3])
    assert net(x, t).eq(0).all()  # starts as the skip connection of its Denoiser
    fitted = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(4):
        loss = (net(x, t, labels) - x).square().mean()
        fitted.zero_grad()
        loss.backward()
        fitted.step()
    assert all(p.grad is not None for p in net.parameters())
    out: Tensor = net(x, t, labels)
    assert out.shape == x.shape
    assert not torch.equal(net(x, t + 0.3, labels), out) and not torch.equal(net(x, t), out)
    deep = net(x, t, labels, features=True)
    assert deep.shape[0] == 3 and deep.shape[-1] <= 8
    assert torch.allclose(net(x[:1], t[:1], labels[:1]), out[:1], atol=1e-5)


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_come_wrapped_and_forward_derivatives_exist(name: str) -> None:
    facts = {"channels": 1, "size": 8} if name == "unet" else {"size": 2}
    x = torch.randn(4, 1, 8, 8) if name == "unet" else torch.randn(4, 2)
    plain = build(name, **facts)
    assert isinstance(plain, Denoiser) and plain.schedule.sigma_data == 1.0
    assert plain(x, 0.7).shape == x.shape
    flow = build({"net": name, "denoiser": {"schedule": "flow", "kind": "flow"}}, **facts)
    assert isinstance(flow, Denoiser) and flow.kind == "flow"
    net = unet(channels=1, size=8) if name == "unet" else denoiser_mlp(size=2)
    t = torch.rand(4)
    value, slope = torch.func.jvp(net, (x, t), (torch.ones_like(x), torch.ones_like(t)))
    assert value.shape == slope.shape == x.shape and slope.isfinite().all()


@pytest.mark.parametrize("channels, size", [(1, 28), (3, 32), (1, 14), (1, 8)])
def test_generator_makes_normalised_pictures_of_any_size(channels: int, size: int) -> None:
    net = build("generator", channels=channels, size=size)
    made = net(torch.randn(16, net.latent)).detach()
    assert made.shape == (16, channels, size, size)
    assert made.mean().abs() < 1e-4 and abs(float(made.std()) - 1) < 0.01


OWN = """
from torch import nn
class Mine(nn.Module):
    def __init__(self, classes, channels, hidden=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(hidden), nn.Linear(hidden, classes))
    def forward(self, x):
        return self.layers(x)
def nothing():
    return 3
def needy(secret):
    return nn.Linear(secret, 1)
"""


def test_a_class_of_the_users_own_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    net = build({"net": f"{tmp_path}/mine.py:Mine", "hidden": 6}, classes=5, channels=1, size=8)
    assert outputs(net, {"inputs": torch.randn(2, 1, 8, 8)})["logits"].shape == (2, 5)
    for name, words in {
        "mine.py:Mime": ["Mime", "`Mine`"],
        "mine.py:nothing": ["int", "nn.Module"],
        "mine.py:needy": ["secret"],
        "mime.py:Mine": ["no file", "mime.py"],
    }.items():
        with pytest.raises(BadInput) as caught:
            build(f"{tmp_path}/{name}", classes=5, channels=1, size=8)
        assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(BadInput, match="hiden.*`hidden`"):
        build({"net": f"{tmp_path}/mine.py:Mine", "hiden": 6}, classes=5, channels=1)


BAD: dict[str, tuple[Any, list[str]]] = {
    "name": ("resnet21", ["resnet21", "did you mean", "`resnet20`"]),
    "no net": ({"width": 3}, ["`net`"]),
    "knob": ({"net": "resnet20", "widht": 8}, ["widht", "`width`"]),
    "type": ({"net": "resnet20", "width": "broad"}, ["resnet20.width", "int", "'broad'"]),
    "fixed": ({"net": "resnet20", "depth": 8}, ["depth", "20"]),
    "tokens": ("tiny_lm", ["tiny_lm", "token ids", "vocab"]),
    "range": ({"net": "convnet", "depth": 9}, ["depth", "[1, 4]", "9"]),
    "schedule": ({"net": "unet", "denoiser": "flo"}, ["flo", "`flow`"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_names_and_knobs_get_one_clear_sentence(case: str) -> None:
    spec, words = BAD[case]
    with pytest.raises(BadInput) as caught:
        build(spec, classes=10, channels=1, size=28)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "name, library, extra", [("timm:resnet18", "timm", "vision"), ("hf:gpt2", "transformers", "text")]
)
def test_a_missing_library_is_asked_for_by_its_extra(
    name: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf"{library}.*limbeck\[{extra}\]"):
        build(name, classes=2, channels=3)


def test_a_broken_library_is_one_sentence_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(BadInput, match="cannot be imported.*nms.*torchvision must fit torch"):
        build("timm:resnet18", classes=2, channels=3)


def test_timm_by_name() -> None:
    pytest.importorskip("timm")
    net = build("timm:resnet10t", classes=4, channels=1)
    assert net(torch.randn(1, 1, 64, 64)).shape == (1, 4)
    with pytest.raises(BadInput, match="resnet10x.*did you mean"):
        build("timm:resnet10x", classes=4, channels=1)


def test_hf_from_a_local_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    net = build(f"hf:{tmp_path}/model", vocab=20)
    out = outputs(net, {"inputs": torch.randint(20, (2, 5))})
    assert out["logits"].shape == (2, 5, 20) and "attn" not in out
    spec = {"net": f"hf:{tmp_path}/model", "output_attentions": True, "attn_implementation": "eager"}
    looking = build(spec, vocab=20)
    assert [a.shape for a in outputs(looking, {"inputs": torch.randint(20, (2, 5))})["attn"]] == [(2, 2, 5, 5)]
    with pytest.raises(BadInput, match="cannot be loaded"):
        build(f"hf:{tmp_path}/nothing", vocab=20)


def test_unet_is_what_build_wraps() -> None:
    wrapped = build({"net": "unet", "width": 16}, channels=1, size=8)
    assert isinstance(wrapped, Denoiser) and isinstance(wrapped.net, UNet)
