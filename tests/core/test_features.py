"""Features of any form, projectors between them, and what adapts while the student learns."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core import features
from limbeck.core.adapt import reverse_gradient, step_ahead
from limbeck.core.errors import BadInput
from limbeck.core.project import KINDS, projector
from limbeck.core.taps import Taps, untap
from limbeck.zoo.nets import build

MAP, TOKENS, VECTOR = (2, 3, 4, 4), (2, 16, 3), (2, 3)


def test_one_form_is_turned_into_another_and_back() -> None:
    picture = torch.randn(MAP)
    assert torch.equal(features.as_map(features.tokens(picture)), picture)
    assert features.tokens(torch.randn(VECTOR)).shape == (2, 1, 3)
    assert torch.allclose(features.pooled(picture), picture.mean((2, 3)))
    assert torch.allclose(features.pooled(features.tokens(picture)), picture.mean((2, 3)))
    with pytest.raises(BadInput, match="15 tokens are no square picture"):
        features.as_map(torch.randn(2, 15, 3))


def test_padding_is_left_out_of_the_mean() -> None:
    text, real = torch.randn(2, 3, 5), torch.tensor([[True, True, False], [True, False, False]])
    wanted = torch.stack([text[0, :2].mean(0), text[1, 0]])
    assert torch.allclose(features.pooled(text, real), wanted)


@pytest.mark.parametrize(
    "student, teacher",
    [
        (MAP, (2, 5, 8, 8)),
        ((2, 3, 7, 7), (2, 5, 4, 4)),
        (TOKENS, (2, 16, 6)),
        (TOKENS, (2, 5, 8, 8)),
        (MAP, (2, 49, 6)),
        (VECTOR, MAP),
        (VECTOR, (2, 7)),
    ],
    ids=str,
)
def test_the_larger_picture_is_averaged_down(student: Any, teacher: Any) -> None:
    one, other = torch.randn(student), torch.randn(teacher)
    a, b = features.same_places(one, other)
    assert a.shape[2:] == b.shape[2:] if a.ndim == 4 else a.shape[:-1] == b.shape[:-1]
    assert (tuple(a.shape), tuple(b.shape)) == features.common(student, teacher)
    if a.ndim == 4:
        for before, after in ((one, a), (other, b)):
            mean = features.pooled(before)
            even = features.as_map(before).shape[-1] % after.shape[-1] == 0
            assert not even or torch.allclose(after.mean((2, 3)), mean, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [MAP, TOKENS, VECTOR], ids=str)
def test_a_projector_serves_maps_tokens_and_vectors(kind: str, shape: Any) -> None:
    torch.manual_seed(0)
    places = features.tokens(torch.empty(shape)).shape[1]
    net = projector(kind, 3, 5, places=places)
    out = net(torch.randn(shape))
    wanted = {4: (2, 5, 4, 4), 3: (2, 16, 5), 2: (2, 5)}[len(shape)]
    assert tuple(out.shape) == ((2, places, 5) if kind == "attention" else wanted)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_the_orthogonal_projector_keeps_angles_while_it_is_trained() -> None:
    torch.manual_seed(0)
    net = projector("orthogonal", 3, 5)
    x, target = torch.randn(8, 3), torch.randn(8, 5)
    optimizer = torch.optim.SGD(net.parameters(), 0.5, weight_decay=0.1)
    before = net(x).detach()
    for _ in range(5):
        optimizer.zero_grad()
        (net(x) - target).square().mean().backward()
        optimizer.step()
    out = net(x)
    assert not torch.allclose(out, before)
    assert torch.allclose(out @ out.T, x @ x.T, atol=1e-5)


def test_an_unknown_projector_is_refused() -> None:
    with pytest.raises(ValueError, match="`projector` must be one of linear"):
        projector("liner", 3, 5)


def test_the_gradient_is_turned_round() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    reverse_gradient(x, 0.5).square().sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.tensor([-1.0, -2.0]))


def test_the_gradient_through_one_step_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y, other, wanted = (torch.randn(6, n, dtype=torch.float64) for n in (3, 1, 3, 1))

    def outer(weight: Tensor) -> Tensor:
        loss = (weight * (net(x) - y).square()[:, 0]).mean()
        ahead = step_ahead(net, loss, 0.3)
        out: Tensor = torch.func.functional_call(net, ahead, (other,))
        return (out - wanted).square().mean()

    before = [p.detach().clone() for p in net.parameters()]
    assert torch.autograd.gradcheck(outer, (torch.rand(6, dtype=torch.float64, requires_grad=True),))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_taps_read_what_a_layer_gets_and_its_weights() -> None:
    torch.manual_seed(0)
    net = build("resnet8", classes=3, channels=1, size=8).eval()
    taps = Taps(
        net, {"feats": ["blocks.0.relu2:in", "blocks.0"], "scales": ["blocks.0.bn2.weight"], "head": "head.weight"}
    )
    net(torch.randn(2, 1, 8, 8))
    seen = taps.read()
    before, after = seen["feats"]
    assert before.min() < 0 and torch.equal(before.relu(), after)
    assert seen["scales"][0] is net.blocks[0].bn2.weight and seen["head"] is net.head.weight
    untap(net)
    net(torch.randn(2, 1, 8, 8))
    with pytest.raises(BadInput, match="not reached"):
        taps.read()
    with pytest.raises(BadInput, match="has no layer 'blocks.0.relu9'.*did you mean"):
        Taps(net, {"feats": ["blocks.0.relu9:in"]})


def test_the_text_encoder_tells_what_it_looked_at() -> None:
    torch.manual_seed(0)
    net = build({"net": "text_encoder", "width": 16, "layers": 3, "attn": True}, classes=3, vocab=20).eval()
    ids = torch.randint(1, 20, (2, 7))
    ids[0, 4:] = 0
    out = net(ids)
    assert [tuple(a.shape) for a in out["attn"]] == [(2, 4, 7, 7)] * 3
    assert all((a[0, :, :, 4:] == 0).all() and torch.allclose(a.sum(-1), torch.ones(())) for a in out["attn"])
    q, k = (out[n][0].view(2, 7, 4, 4).transpose(1, 2) for n in ("queries", "keys"))
    assert torch.allclose(q @ k.mT / 2, out["attn_scores"][0], atol=1e-6)
    assert out["tokens"].shape == out["values"][0].shape == (2, 7, 16)
    plain = build({"net": "text_encoder", "width": 16, "layers": 3}, classes=3, vocab=20).eval()
    plain.load_state_dict(net.state_dict())
    assert torch.allclose(plain(ids)["logits"], out["logits"], atol=1e-6)
