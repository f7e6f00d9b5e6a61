"""What the papers on condensed data promise of their losses, and the numbers of their authors' code."""

import json
import signal
from itertools import chain
from pathlib import Path

import torch
from pytest import approx, fixture, mark, raises
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from limbeck.core.batches import Batches, Table
from limbeck.core.errors import BadInput, Interrupted
from limbeck.core.find import get
from limbeck.core.loop import Clock, Plan, fit
from limbeck.core.nets import Nets
from limbeck.core.synset import SynSet, Trajectories
from limbeck.core.unroll import Functional, krr, label_solve, relu_kernels
from limbeck.train.datasets.dc import gradient_distance, gradients
from tests.numbers import reference

VECTORS = Path(__file__).parent / "vectors"


@fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Tiny(nn.Module):
    """The network of the reference numbers, which the authors' code was given too."""

    def __init__(self, weights):
        super().__init__()
        layers = [nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), *([nn.Linear(8, 2)] if "3.weight" in weights else [])]
        self.layers = nn.Sequential(*layers)
        self.layers.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})

    def forward(self, x):
        emb = self.layers[:3](x)
        return {"emb": emb, "logits": self.layers[3:](emb)}


def scene(v, factory):
    nets = Nets(images=SynSet(torch.tensor(v["images"]), torch.tensor(v["image_labels"])))
    nets.factories["net"] = factory
    return nets, {k: torch.tensor(v[k]) for k in ("inputs", "labels") if k in v}


def first(method, nets, batch, t=0, steps=1):
    """The loss of the images' first turn, and its gradients by parameter."""
    if hasattr(method, "setup"):
        method.setup(nets, batch)
    player, loss = next(iter(method.step(nets, batch, Clock(t, steps))))
    loss = getattr(loss, "value", loss)
    assert player == "images"
    loss.backward()
    return loss.item(), {n: p.grad for n, p in nets.images.named_parameters()}


def blobs(n=60, classes=3, width=2):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=g)
    return {"inputs": y[:, None] + 0.5 * torch.randn(n, width, generator=g), "labels": y}


class MLP(nn.Module):
    def __init__(self, width=2, classes=3, act=nn.ReLU):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(width, 16), act()), nn.Linear(16, classes)

    def forward(self, x):
        emb = self.body(x)
        return {"emb": emb, "logits": self.head(emb)}


# ---------------------------------------------------------------- dm


def test_dm_agrees_with_the_authors_code():
    v = reference("dm")
    value, grads = first(get("dm")(augment=()), *scene(v, lambda: Tiny(v["weights"])))
    assert value == approx(v["value"], rel=1e-9)
    torch.testing.assert_close(grads["codes"], torch.tensor(v["grad"]), rtol=1e-7, atol=1e-10)


@mark.parametrize("augment", [(), ("crop", "rotate", "flip", "color", "cutout", "scale")])
def test_dm_is_0_when_the_set_equals_the_batch(augment):
    v = reference("dm")
    v["images"], v["image_labels"] = v["inputs"], v["labels"]
    value, grads = first(get("dm")(augment=augment), *scene(v, lambda: Tiny(v["weights"])))
    assert value == approx(0, abs=1e-20) and grads["codes"].abs().max() < 1e-9


def test_dm_depends_on_the_mean_feature_alone():
    class Linear(nn.Module):  # features are the inputs, so that their means are in our hands
        def forward(self, x):
            return {"emb": x.flatten(1), "logits": x.flatten(1)}

    batch, values = blobs(), []
    for spread in (0.0, 3.0):
        offsets = spread * torch.tensor([[1.0, -2.0], [-1.0, 2.0]] * 3)
        images = torch.arange(6.0).view(6, 1).expand(6, 2).div(2).floor() + offsets
        nets = Nets(images=SynSet(images, torch.arange(3).repeat_interleave(2)))
        nets.factories["net"] = Linear
        value, grads = first(get("dm")(), nets, batch)
        values.append(value)
        assert torch.equal(grads["codes"][0], grads["codes"][1])  # both of a class pull alike
    assert values[0] == approx(values[1], rel=1e-12) and values[0] > 0.1


def test_dm_does_not_rely_on_the_order_of_labels():
    batch, images = blobs(), SynSet(torch.randn(6, 2), torch.tensor([2, 0, 1, 1, 0, 2]))
    shuffle, values = torch.randperm(60), []
    torch.manual_seed(3)
    net = MLP()
    for rows, own in ((torch.arange(60), torch.arange(6)), (shuffle, torch.tensor([3, 1, 5, 0, 2, 4]))):
        nets = Nets(images=SynSet(images.codes[own], images.labels[own]))
        nets.factories["net"] = lambda: net
        values.append(first(get("dm")(), nets, {k: t[rows] for k, t in batch.items()})[0])
    assert values[0] == approx(values[1], rel=1e-12)


def test_dm_network_gets_no_gradient_and_no_embedding_is_a_clear_error():
    nets, net = Nets(images=SynSet(torch.randn(3, 2), torch.arange(3))), MLP()
    nets.factories["net"] = lambda: net
    first(get("dm")(), nets, blobs())
    assert all(p.grad is None for p in net.parameters())
    nets.factories["net"] = lambda: nn.Linear(2, 3)
    with raises(BadInput, match="returns logits; return 'emb' too"):
        first(get("dm")(), nets, blobs())


# ---------------------------------------------------------------- dc


def test_dc_agrees_with_the_authors_code():
    v = reference("dc")
    value, grads = first(get("dc")(), *scene(v, lambda: Tiny(v["weights"])))
    assert value == approx(v["value"], rel=1e-9)
    torch.testing.assert_close(grads["codes"], torch.tensor(v["grad"]), rtol=1e-7, atol=1e-10)


def test_dc_distance_agrees_with_the_authors_code():
    v = json.loads((VECTORS / "dc.json").read_text())["distance"]
    matrices = [i for i, g in enumerate(v["grad"]) if g is not None]  # the code gives vectors no gradient
    mine = [torch.tensor(v["mine"][i], requires_grad=True) for i in matrices]
    distance = gradient_distance(mine, [torch.tensor(v["real"][i]) for i in matrices])
    distance.backward()
    assert distance.item() == approx(v["value"], rel=1e-9) and len(matrices) == 2
    for m, i in zip(mine, matrices, strict=True):
        torch.testing.assert_close(m.grad, torch.tensor(v["grad"][i]), rtol=1e-7, atol=1e-10)


def test_dc_is_0_when_the_set_equals_the_batch():
    """Up to the 1e-6 that keeps the cosine of two short gradients finite, in the authors' code too."""
    batch, net = blobs(), MLP(act=nn.Tanh)
    nets = Nets(images=SynSet(batch["inputs"], batch["labels"]))
    nets.factories["net"] = lambda: net
    rest = 0.0
    for c in range(3):
        rows = batch["labels"] == c
        for g in gradients(net, batch["inputs"][rows], batch["labels"][rows]):
            rest += (1e-6 / (g.square().sum(1) + 1e-6)).sum().item()
    assert first(get("dc")(), nets, batch)[0] == approx(rest, rel=1e-6) and rest < 3 * 19 / 20


def test_dc_distance_has_no_scale_and_a_bound():
    mine, real = ([torch.randn(4, 3, 2, 2), torch.randn(5, 7)] for _ in range(2))
    base = gradient_distance(mine, real).item()
    scaled = [m * torch.rand(len(m)).add(0.5).view(-1, *[1] * (m.ndim - 1)) for m in mine]
    assert gradient_distance(scaled, real).item() == approx(base, abs=1e-5)
    assert gradient_distance(mine, mine).item() == approx(0, abs=1e-5)
    opposite = gradient_distance([-r for r in real], real).item()
    assert opposite == approx(2 * 9, abs=1e-5) and 0 <= base <= 2 * 9


def test_dc_gradient_is_that_of_the_plain_sum():
    """Class by class, with each graph freed at once, as if all had been kept."""
    batch, labels = blobs(), torch.tensor([0, 1, 2, 2])
    images = torch.randn(4, 2)
    net = MLP(act=nn.Tanh)
    nets = Nets(images=SynSet(images, labels))
    nets.factories["net"] = lambda: net
    value, grads = first(get("dc")(), nets, batch)
    x, total = images.clone().requires_grad_(), torch.zeros(())
    weights = [p for p in net.parameters() if p.ndim > 1]
    for c in range(3):
        rows, own = batch["labels"] == c, labels == c
        real = torch.autograd.grad(cross_entropy(net(batch["inputs"][rows])["logits"], batch["labels"][rows]), weights)
        mine = torch.autograd.grad(cross_entropy(net(x[own])["logits"], labels[own]), weights, create_graph=True)
        total = total + sum(
            (1 - (m * r).sum(1) / (m.norm(dim=1) * r.norm(dim=1) + 1e-6)).sum() for m, r in zip(mine, real, strict=True)
        )
    assert value == approx(total.item(), rel=1e-12)
    torch.testing.assert_close(grads["codes"], torch.autograd.grad(total, x)[0])


@mark.parametrize("ipc, wanted", [(1, ["images"] * 2), (10, ["images", *["net"] * 50] * 2)])
def test_dc_loops_follow_the_images_a_class(ipc, wanted):
    nets = Nets(images=SynSet.noise((2,), 3, ipc))
    nets.factories["net"] = MLP
    steps = wanted.count("images")
    data = Batches(Table(blobs(), classes=list("abc")), per_class=4)
    turns = fit(get("dc")(), nets, data, Plan(steps=steps, log_every=1)).turns
    assert [player for _, _, player, _ in turns] == wanted


def test_dc_holds_batch_norm_statistics_of_real_images():
    class Normed(MLP):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 16), nn.ReLU())

    nets = Nets(images=SynSet(100 * torch.ones(3, 2), torch.arange(3)), net=Normed())
    nets.factories["net"] = Normed
    batch = blobs(45)
    first(get("dc")(), nets, batch)
    norm = nets.net.body[0]
    firsts = torch.cat([(batch["labels"] == c).nonzero()[:16, 0] for c in range(3)])
    torch.testing.assert_close(norm.running_mean, batch["inputs"][firsts].mean(0))
    assert not norm.training and norm.momentum == 0.1


# ---------------------------------------------------------------- mtt


class Chain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def expert_scene(start, goal, images=None, labels=None):
    nets = Nets(images=SynSet(torch.randn(4, 3) if images is None else images, torch.tensor(labels or [0, 1, 0, 1])))
    nets.factories["net"] = Chain
    nets.experts = Trajectories(torch.stack([start, goal])[None])
    return nets


ONE = {"experts": 1, "epochs": 1, "match_epochs": 1, "max_start": 1, "inner_steps": 4, "augment": (), "rate": 0.3}


def test_mtt_agrees_with_the_authors_code():
    v = reference("mtt")
    nets = expert_scene(torch.tensor(v["start"]), torch.tensor(v["goal"]), torch.tensor(v["images"]), v["image_labels"])
    method = get("mtt")(**{**v["knobs"], "augment": ()})
    value, grads = first(method, nets, {})
    assert value == approx(v["value"], rel=1e-9)
    torch.testing.assert_close(grads["codes"], torch.tensor(v["grad"]), rtol=1e-7, atol=1e-10)
    assert grads["units"].item() / method.rate_unit == approx(v["rate_grad"], rel=1e-7)


def flat_pair():
    return torch.randn(26), torch.randn(26)


def test_mtt_is_0_at_the_goal_and_1_without_a_move():
    start, goal = flat_pair()
    nets = expert_scene(start, goal)
    method = get("mtt")(**ONE)
    method.setup(nets, {})
    x, y = nets.images()
    reached = method.train(Functional(nets.net), start, x, y, nets.images.rate).detach()
    nets.experts = Trajectories(torch.stack([start, reached])[None])
    assert next(iter(method.step(nets, {}, Clock(0, 1))))[1].item() == approx(0, abs=1e-20)
    nets.experts = Trajectories(torch.stack([start, goal])[None])
    with torch.no_grad():
        nets.images.units.zero_()
    assert next(iter(method.step(nets, {}, Clock(0, 1))))[1].item() == approx(1, rel=1e-12)


def test_mtt_does_not_see_a_common_scale_of_all_weights():
    """All weights in other units: the loss is the same function of them, and the step has the square of the unit."""

    class Linear(nn.Module):
        """Logits of w / scale."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(6))

        def forward(self, x):
            return x @ self.w.view(3, 2) / self.scale

    start, goal, values = torch.randn(6), torch.randn(6), []
    images = torch.randn(4, 3)
    for scale in (1.0, 7.0):
        Linear.scale = scale
        nets = Nets(images=SynSet(images, torch.tensor([0, 1, 0, 1])))
        nets.factories["net"] = Linear
        nets.experts = Trajectories(scale * torch.stack([start, goal])[None])
        values.append(first(get("mtt")(**{**ONE, "rate": 0.3 * scale**2, "rate_unit": 1e-4 * scale**2}), nets, {})[0])
    assert values[0] == approx(values[1], rel=1e-10) and values[0] > 0


def test_mtt_gradient_reaches_images_and_rate_alone():
    nets = expert_scene(*flat_pair())
    _, grads = first(get("mtt")(**ONE), nets, {})
    assert set(grads) == {"codes", "units"} and all(g.abs().sum() > 0 for g in grads.values())
    assert not nets.experts.weights.requires_grad and all(p.grad is None for p in nets.net.parameters())


def test_mtt_keeps_what_plain_sgd_passes_through():
    """The experts' weights are those of training by hand on the same batches."""
    table = Table(blobs(width=3, classes=2), classes=["a", "b"])
    nets = Nets(images=SynSet.noise((3,), 2, 1))
    torch.manual_seed(5)
    starts = [Chain() for _ in range(3)]
    queue = iter([*starts, *(Chain() for _ in range(3))])
    nets.factories["net"] = lambda: next(queue)
    method = get("mtt")(experts=2, epochs=2, every=0, inner_steps=2, match_epochs=1, max_start=1, augment=())
    by_hand = [Functional(s).flat() for s in starts]
    fit(method, nets, Batches(table, 20, seed=1), Plan(steps=2, seed=1))
    assert nets.experts.weights.shape == (2, 3, 26) and nets.experts.every == 3
    data = Batches(table, 20, seed=1)
    for expert in range(2):
        net, w = Chain(), by_hand[expert + 1]  # the first network only told the size
        Functional(net).load(w)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        points = [w]
        for _ in range(6):
            batch = next(data)
            optimizer.zero_grad()
            cross_entropy(net(batch["inputs"]), batch["labels"]).backward()
            optimizer.step()
            points.append(Functional(net).flat())
        torch.testing.assert_close(nets.experts.weights[expert], torch.stack(points[::3]))


def test_mtt_takes_all_images_before_any_twice():
    """Ten images, four a step: a pass is 4, 4 and 2 of them."""
    seen = []

    class Spy(Chain):
        def forward(self, x):
            seen.append(x[:, 0].tolist())
            return super().forward(x)

    images = torch.arange(10.0).view(10, 1).expand(10, 3)
    nets = expert_scene(*flat_pair(), images, [0, 1] * 5)
    nets.factories["net"] = Spy
    method = get("mtt")(**{**ONE, "inner_steps": 6, "batch_size": 4})
    method.setup(nets, {})
    next(iter(method.step(nets, {}, Clock(0, 1))))
    assert [len(s) for s in seen] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*seen[:3])) == sorted(chain(*seen[3:])) == list(range(10))


def test_mtt_asks_for_the_length_of_an_epoch():
    nets = Nets(images=SynSet.noise((3,), 2, 1))
    nets.factories["net"] = Chain
    with raises(BadInput, match="knob `every`"):
        fit(get("mtt")(experts=1), nets, iter([blobs(width=3)]), Plan(steps=1))


def test_mtt_ranges():
    with raises(ValueError, match="`epochs` must be >= match_epochs"):
        get("mtt")(epochs=2, match_epochs=3)


# ---------------------------------------------------------------- kip


@mark.parametrize("depth", ["1", "2"])
def test_kip_agrees_with_the_authors_code(depth):
    v = reference("kip")
    value, grads = first(get("kip")(depth=int(depth), learn_labels=True), *scene(v, None))
    wanted = v["depths"][depth]
    assert value == approx(wanted["value"], rel=1e-9)
    torch.testing.assert_close(grads["codes"], torch.tensor(wanted["grad"]), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(grads["labels"], torch.tensor(wanted["label_grad"]), rtol=1e-7, atol=1e-9)


def test_kip_is_0_when_the_support_is_the_target_and_nothing_is_regularised():
    batch = blobs(12)
    nets = Nets(images=SynSet(batch["inputs"], batch["labels"]))
    assert first(get("kip")(ridge=1e-13), nets, batch)[0] < 1e-15


def test_kip_prediction_is_linear_in_the_labels():
    method, x, inputs = get("kip")(), torch.randn(5, 4), torch.randn(7, 4)
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    both = method.predict(x, 2 * a - 3 * b, inputs)
    torch.testing.assert_close(both, 2 * method.predict(x, a, inputs) - 3 * method.predict(x, b, inputs))


def test_kip_solved_labels_are_a_minimum():
    batch = blobs(40)
    nets = Nets(images=SynSet(torch.randn(6, 2), torch.arange(3).repeat(2)))
    method = get("kip")(learn_labels=True)
    x = nets.images.codes.detach()
    targets = one_hot(batch["labels"], 3) - 1 / 3
    solved = label_solve(relu_kernels(x, depth=1)[1], relu_kernels(batch["inputs"], x, depth=1)[1], targets)
    nets.images = SynSet(x, solved, learn_labels=True)
    value, grads = first(method, nets, batch)
    assert grads["labels"].abs().max() < 1e-9
    worse = krr(method.kernel(x, x), method.kernel(batch["inputs"], x), solved + 0.01 * torch.randn(6, 3))
    assert value < 0.5 * (worse - targets).square().mean().item()


def test_kip_labels_are_learned_only_when_asked():
    for learn, wanted in ((False, {"codes"}), (True, {"codes", "labels"})):
        nets = Nets(images=SynSet(torch.randn(3, 2), torch.arange(3)))
        _, grads = first(get("kip")(learn_labels=learn), nets, blobs())
        assert set(grads) == wanted
        torch.testing.assert_close(nets.images()[1].detach(), torch.eye(3) - 1 / 3)


# ---------------------------------------------------------------- kill and resume


KNOBS = {
    "dm": {},
    "dc": {"outer": 3, "inner": 2},
    "mtt": {"experts": 2, "epochs": 2, "every": 3, "inner_steps": 3, "match_epochs": 1, "max_start": 1},
    "kip": {"learn_labels": True},
}


@mark.parametrize("name", sorted(KNOBS))
def test_a_killed_run_goes_on_bit_for_bit(name, tmp_path):
    """Images with momentum, in the middle of a network's life, with and without a signal."""

    def run(folder, stop=None, resume=False):
        nets = Nets(images=SynSet.noise((2,), 3, 2, seed=1))
        nets.factories["net"] = lambda: MLP()
        data = Batches(Table(blobs(), classes=list("abc")), per_class=4, seed=2)
        optimizer = {"images": {"sgd": {"lr": 0.1, "momentum": 0.9}}, "net": {"sgd": {"lr": 0.05, "momentum": 0.5}}}
        plan = Plan(steps=8, optimizers=optimizer, log_every=1, schedule="cosine", save_every=2)
        here = ({"mtt": 2}.get(name, 0), stop)
        sent = []

        def kill(event):
            if (event["stage"], event["t"]) == here and not sent:  # a second signal would end the process
                sent.append(signal.raise_signal(signal.SIGTERM))

        return fit(get(name)(**KNOBS[name]), nets, data, plan, folder=folder, resume=resume, on_event=kill)

    whole = run(tmp_path / "whole")
    with raises(Interrupted):
        run(tmp_path / "cut", stop=4)
    again = run(tmp_path / "cut", resume=True)
    for key, value in whole.nets.images.state_dict().items():
        assert torch.equal(value, again.nets.images.state_dict()[key]), key
    assert whole.turns == again.turns and len(whole.turns) >= 8
    assert not torch.equal(whole.nets.images.codes, SynSet.noise((2,), 3, 2, seed=1).codes)
