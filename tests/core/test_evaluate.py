"""Judging networks and training sets: what is counted, what is kept equal, what is left alone."""

from itertools import pairwise

import torch
from pytest import approx, mark, raises
from torch import nn

from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.core.evaluate import Budget, accuracy, hits, improvement, judge, kernel_logits, logits, train
from limbeck.core.unroll import krr, relu_kernels


def blobs(n=90, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centres = torch.tensor([[3.0, 0.0], [-2.0, 2.0], [-2.0, -2.0]])
    return Table({"inputs": centres[y] + 0.5 * torch.randn(n, 2, generator=g), "labels": y})


class Known(nn.Module):
    """Says class inputs[0] for sure; counts whether it was asked in training mode."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x):
        self.asked.append(self.training)
        return {"logits": nn.functional.one_hot(x[..., 0].long(), 3).float()}


def mlp():
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))


FAST = Budget(epochs=40, optimizer={"sgd": {"lr": 0.1, "momentum": 0.9}})


def test_accuracy_counts_right_ones_over_short_batches():
    table = Table(
        {"inputs": torch.tensor([[0.0], [1.0], [2.0], [2.0], [0.0]]), "labels": torch.tensor([0, 1, 2, 0, 1])}
    )
    net = Known().train()
    assert accuracy(net, table, batch_size=2) == approx(3 / 5)
    assert net.training and net.asked == [False] * 3
    assert logits(net, table, batch_size=3).shape == (5, 3)


def test_accuracy_of_tokens_is_over_the_mask():
    inputs = torch.tensor([[[0.0], [1.0]], [[2.0], [0.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    table = Table({"inputs": inputs, "labels": torch.tensor([[0, 0], [2, 1]]), "mask": mask})
    assert accuracy(Known(), table) == approx(2 / 3)


def test_train_learns_and_leaves_global_state_alone():
    net, before = mlp(), torch.get_rng_state()
    table = blobs()
    train(net, table["inputs"], table["labels"], FAST)
    assert torch.equal(before, torch.get_rng_state())
    assert not net.training and accuracy(net, blobs(seed=1)) > 0.95


def test_judging_is_a_function_of_the_seed():
    small, test = blobs(12), blobs(seed=1)
    before = torch.get_rng_state()
    scores = [judge(mlp, small["inputs"], small["labels"], test, FAST, seeds=(3, 4)) for _ in range(2)]
    assert scores[0] == scores[1] and list(scores[0]) == ["net"] and len(scores[0]["net"]) == 2
    assert torch.equal(before, torch.get_rng_state())


def test_two_sets_are_judged_from_the_same_initial_weights():
    seen = []

    def factory():
        seen.append(mlp())
        seen.append([p.detach().clone() for p in seen[-1].parameters()])
        return seen[-2]

    for seed in (0, 1):
        judge(factory, blobs(12, seed)["inputs"], blobs(12)["labels"], blobs(), Budget(epochs=1), seeds=(5,))
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[3], strict=True))


def test_several_architectures():
    small = blobs(12)
    nets = {"mlp": mlp, "linear": lambda: nn.Linear(2, 3)}
    scores = judge(nets, small["inputs"], small["labels"], blobs(seed=1), FAST, seeds=(0,))
    assert set(scores) == set(nets) and all(len(v) == 1 for v in scores.values())


def test_soft_labels_say_the_same_as_the_classes_they_stand_for():
    small, ends = blobs(12), []
    for labels in (small["labels"], nn.functional.one_hot(small["labels"], 3).float()):
        torch.manual_seed(0)
        ends.append(train(mlp(), small["inputs"], labels, Budget(epochs=3))[0].weight)
    torch.testing.assert_close(ends[0], ends[1])


def test_regression_targets_need_soft_labels():
    small = blobs(12)
    labels = nn.functional.one_hot(small["labels"], 3) - 1 / 3
    net = train(mlp(), small["inputs"], labels, Budget(epochs=60, loss="mse", optimizer={"adam": {"lr": 0.02}}))
    assert accuracy(net, blobs(seed=1)) > 0.9
    with raises(BadInput, match="soft labels"):
        train(mlp(), small["inputs"], small["labels"], Budget(epochs=1, loss="mse"))


def test_the_rate_falls_as_the_budget_says():
    small, moves = blobs(12), []
    budget = Budget(
        epochs=4, batch_size=6, optimizer={"sgd": {"lr": 1.0}}, schedule={"step": {"at": [0.5], "factor": 0.1}}
    )
    net = nn.Linear(2, 3)
    net.register_forward_pre_hook(lambda m, _: moves.append(m.weight.detach().clone()))
    one = small["inputs"][:1].expand(12, 2).clone()
    train(net, one, torch.zeros(12, dtype=torch.long), budget)
    steps = [(b - a).norm().item() for a, b in pairwise(moves)]
    assert len(moves) == 8 and steps[4] < 0.3 * steps[3]  # the gradient changes slowly, the rate at once


def test_weights_are_chosen_on_validation_data():
    class Getting(nn.Module):
        """Right on everything until the third epoch, wrong afterwards."""

        def __init__(self):
            super().__init__()
            self.age = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            out = nn.functional.one_hot((x[:, 0] > 0).long(), 2).float()
            return (out if self.age.item() > -3.5 else out.flip(1)) + 0 * self.age + self.age * torch.tensor([1.0, 1.0])

    x = torch.tensor([[1.0], [-1.0]])
    table = Table({"inputs": x, "labels": torch.tensor([1, 0])})

    budget = Budget(epochs=6, optimizer={"sgd": {"lr": 1.0}}, schedule="constant")
    net = Getting()
    net.age.register_hook(lambda g: torch.ones_like(g))  # every step makes it a step older
    assert accuracy(train(net, x, table["labels"], budget), table) == 0.0
    net = Getting()
    net.age.register_hook(lambda g: torch.ones_like(g))
    assert accuracy(train(net, x, table["labels"], budget, validation=table, check_every=1), table) == 1.0


def test_augmentation_is_drawn_anew_and_repeatable():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 1, 8, 8, generator=g), torch.arange(8) % 2
    make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

    def end(augment):
        torch.manual_seed(0)
        return train(make(), x, y, Budget(epochs=2, augment=augment))[1].weight

    assert torch.equal(end(("crop", "flip")), end(("crop", "flip"))) and not torch.equal(end(("crop",)), end(()))


def test_improvement_is_the_mean_of_paired_differences():
    assert improvement({"a": [0.5, 0.7], "b": [0.6, 0.4]}, {"a": [0.4, 0.4], "b": [0.6, 0.2]}) == approx(0.15)
    with raises(ValueError):
        improvement({"a": [0.5, 0.7]}, {"a": [0.4]})


def test_kernel_logits_are_kernel_ridge():
    small, test = blobs(12), blobs(7, seed=1)
    found = kernel_logits(small["inputs"], small["labels"], test, depth=2, batch_size=3)
    x, t = small["inputs"].double(), test["inputs"].double()
    y = nn.functional.one_hot(small["labels"], 3) - 1 / 3
    wanted = krr(relu_kernels(x, depth=2)[1], relu_kernels(t, x, depth=2)[1], y.double())
    torch.testing.assert_close(found, wanted.float())
    torch.testing.assert_close(kernel_logits(small["inputs"], y, test, depth=2), found)
    assert hits(kernel_logits(small["inputs"], small["labels"], blobs(seed=1)), blobs(seed=1)) > 0.95


@mark.parametrize("knob", ["epochs", "batch_size"])
def test_budget_ranges(knob):
    with raises(BadInput, match=f"`{knob}` must be >= 1"):
        Budget(**{knob: 0})


def test_budget_names_the_nearest_optimizer():
    with raises(BadInput, match="did you mean `sgd`"):
        Budget(optimizer={"sdg": {"lr": 0.1}})
