"""Synthetic sets: where they start, what is learned, what leaves; and the pieces that their methods share."""

import torch
from pytest import approx, mark, raises
from torch import nn

from limbeck.core.augment import Siamese
from limbeck.core.errors import BadInput
from limbeck.core.nets import Nets
from limbeck.core.synset import SynSet, Trajectories, by_class, hard, pick, renew, seal, siamese


def table(n=60, classes=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 4, 4, generator=g), torch.arange(n) % classes


# ---------------------------------------------------------------- beginnings


def test_real_start_is_the_random_subset_of_the_same_seed():
    x, y = table()
    rows = pick(y, 4, seed=7)
    images, labels = SynSet.real(x, y, 4, seed=7)()
    assert torch.equal(images, x[rows]) and torch.equal(labels, y[rows])
    assert len(rows.unique()) == 12 and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_the_seed_alone_decides_and_the_global_state_is_left_alone():
    y = table()[1]
    before = torch.get_rng_state()
    assert torch.equal(pick(y, 4, seed=1), pick(y, 4, seed=1)) and not torch.equal(
        pick(y, 4, seed=1), pick(y, 4, seed=2)
    )
    assert torch.equal(SynSet.noise((2,), 3, 2, seed=1).codes, SynSet.noise((2,), 3, 2, seed=1).codes)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_start_has_every_class():
    images, labels = SynSet.noise((1, 8, 8), 5, 40)()
    assert images.shape == (200, 1, 8, 8) and labels.bincount().tolist() == [40] * 5
    assert images.mean().item() == approx(0, abs=0.05) and images.std().item() == approx(1, abs=0.05)


def test_too_few_examples_of_a_class():
    with raises(BadInput, match="class 2 has 1 examples, fewer than the 2"):
        pick(torch.tensor([0, 0, 1, 1, 2]), 2)


@mark.parametrize("labels", [torch.zeros(3, dtype=torch.long), torch.zeros(0, dtype=torch.long)])
def test_one_label_a_code(labels):
    with raises(BadInput, match="one label a code"):
        SynSet(torch.zeros(2 if len(labels) else 0, 4), labels)


# ---------------------------------------------------------------- what is learned


def test_learns_codes_and_nothing_else():
    synset = SynSet.real(*table(), 2)
    assert [n for n, _ in synset.named_parameters()] == ["codes"] and "labels" in synset.state_dict()


def test_starting_values_are_copied():
    x, y = table()
    synset = SynSet(x, y)
    with torch.no_grad():
        synset.codes.zero_()
    assert x.abs().sum() > 0


def test_decoder_makes_several_inputs_of_a_code_and_is_learned():
    class Quarters(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, codes):  # [M, 1, 4, 4] -> [4 M, 1, 2, 2], the four of one code together
            return self.gain * codes.unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 1, 2, 2)

    x, y = table()
    synset = SynSet(x, y, decode=Quarters())
    images, labels = synset()
    assert images.shape == (240, 1, 2, 2) and torch.equal(labels, y.repeat_interleave(4))
    assert torch.equal(images[4:8].flatten(), x[1, 0].unfold(0, 2, 2).unfold(1, 2, 2).flatten())
    images[0].sum().backward()
    assert synset.codes.grad[0].abs().sum() > 0 and synset.codes.grad[1:].abs().sum() == 0
    assert synset.decode.gain.grad is not None and synset.bytes()["inputs"] == 60 * 16 * 4 + 4


def test_soft_labels():
    synset = SynSet.noise((2,), 4, 3)
    synset.soften(4, learn=True, centred=True)
    labels = synset()[1]
    assert (
        labels.shape == (12, 4)
        and labels.sum(1).abs().max() < 1e-6
        and torch.equal(hard(labels), torch.arange(4).repeat_interleave(3))
    )
    assert sorted(n for n, _ in synset.named_parameters()) == ["codes", "labels"]
    kept = labels.detach().clone()
    synset.soften(4, learn=False)
    assert torch.equal(synset.labels, kept) and [n for n, _ in synset.named_parameters()] == ["codes"]


def test_class_indices_cannot_be_learned():
    with raises(BadInput, match="soft labels"):
        SynSet(*table(), learn_labels=True)


def test_state_survives_save_and_load():
    sets = [SynSet.noise((2,), 3, 2, seed=s) for s in (0, 1)]
    for s in sets:
        s.soften(3, learn=True)
        s.learn_rate(0.05 + 0.1 * (s is sets[1]), 1e-3)
    sets[1].load_state_dict(sets[0].state_dict())
    assert torch.equal(sets[0]()[0], sets[1]()[0]) and sets[1].rate.item() == approx(0.05)


def test_unit_makes_one_optimiser_the_papers_two():
    synset = SynSet.noise((2,), 2, 1).double()
    synset.learn_rate(0.01, 1e-4)
    own = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    joint = torch.optim.SGD(synset.parameters(), lr=1000.0, momentum=0.5)
    alone = torch.optim.SGD([own], lr=1e-5, momentum=0.5)
    for _ in range(5):
        for optimizer, rate in ((joint, synset.rate), (alone, own)):
            optimizer.zero_grad()
            (3 * rate - rate**2 + 0 * synset.codes.sum()).backward()
            optimizer.step()
    assert synset.rate.item() == approx(own.item(), rel=1e-9) and own.item() != 0.01


def test_no_rate_unless_asked_for():
    assert SynSet.noise((2,), 2, 1).rate is None


# ---------------------------------------------------------------- what leaves


def test_export_is_plain_and_apart():
    synset = SynSet.real(*table(), 2)
    images, labels = synset.export()
    assert not images.requires_grad and images.is_contiguous() and images.data_ptr() != synset.codes.data_ptr()
    images.zero_()
    assert synset.codes.abs().sum() > 0 and torch.equal(labels, synset.labels)


def test_bytes():
    synset = SynSet.real(*table(), 2)
    assert synset.bytes() == {"inputs": 6 * 16 * 4, "labels": 6, "total": 6 * 16 * 4 + 6}
    synset.soften(3, learn=False)
    assert synset.bytes()["labels"] == 6 * 3 * 4
    many = SynSet(torch.zeros(2, 3), torch.tensor([0, 999]))
    assert many.bytes()["labels"] == 4


# ---------------------------------------------------------------- shared pieces


def test_by_class_whatever_the_order():
    pairs = list(by_class(torch.tensor([2, 0, 2, 5, 0]), torch.tensor([0, 2])))
    assert [(a.tolist(), b.tolist()) for a, b in pairs] == [([1, 4], [0]), ([0, 2], [1])]


def test_by_class_misses_one():
    with raises(BadInput, match="no example of class 1"):
        list(by_class(torch.tensor([0, 0]), torch.tensor([0, 1])))


def test_siamese_treats_both_sides_alike():
    x = table()[0]
    torch.manual_seed(0)
    a, b = siamese(Siamese(ops=("rotate",)), x[:3], torch.cat([x[:3], x[5:6]]))
    torch.testing.assert_close(a, b[:3])
    assert (a - x[:3]).abs().max() > 0.01


def test_siamese_each_its_own():
    x = table()[0][:1].expand(8, -1, -1, -1)
    torch.manual_seed(0)
    (a,) = siamese(Siamese(ops=("rotate",)), x, alike=False)
    assert (a[0] - a[1]).abs().max() > 0.01


def test_siamese_draws_from_the_global_generator_and_leaves_vectors_alone():
    x = torch.randn(4, 2)
    before = torch.get_rng_state()
    assert siamese(Siamese(), x)[0] is x and torch.equal(before, torch.get_rng_state())
    siamese(Siamese(), table()[0])
    assert not torch.equal(before, torch.get_rng_state())


def test_seal_has_the_gradient_of_one_input_alone():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    loss = (w * x.sin()).sum() ** 2
    (wanted,) = torch.autograd.grad(loss, x, retain_graph=True)
    sealed = 2 * seal(loss, x)
    sealed.backward()
    assert sealed.item() == approx(2 * loss.item()) and w.grad is None
    torch.testing.assert_close(x.grad, 2 * wanted)


def test_renew_keeps_the_parameters_of_the_optimiser():
    nets = Nets(net=nn.Linear(3, 2))
    nets.factories["net"] = lambda: nn.Linear(3, 2)
    before, weight = nets.net.weight.detach().clone(), nets.net.weight
    renew(nets, "net")
    assert nets.net.weight is weight and not torch.equal(weight, before)


def test_trajectories():
    path = Trajectories(torch.zeros(2, 3, 4), todo=2, every=5)
    path.put(1, 2, torch.ones(4, requires_grad=True))
    assert path.state_dict()["weights"][1, 2].tolist() == [1] * 4 and path.weights.sum() == 4
    with raises(BadInput, match=r"\[experts, points, parameters\]"):
        Trajectories(torch.zeros(3, 4))
