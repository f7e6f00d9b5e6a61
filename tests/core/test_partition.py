"""Shares of tasks and clients: complete, disjoint, repeatable, in the proportions asked for."""

import numpy as np
import torch

from limbeck.core.partition import by_class, by_client, mixed


def test_every_row_belongs_to_one_task():
    labels = torch.randint(7, (200,), generator=torch.Generator().manual_seed(0))
    pools = by_class(labels, 3)
    assert list(pools) == ["task0", "task1", "task2"]
    assert torch.equal(torch.cat(list(pools.values())).sort().values, torch.arange(200))
    classes = [set(labels[rows].tolist()) for rows in pools.values()]
    assert classes == [{0, 1, 2}, {3, 4}, {5, 6}]


def test_the_client_of_an_example_depends_on_it_alone():
    labels = torch.arange(4).repeat(1000)
    shares = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5], [0.2, 0.2, 0.6], [0, 0, 1.0]])
    index = torch.arange(4000)
    whole = by_client(index, labels, shares)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(by_client(index[order], labels[order], shares), whole[order])
    for c in range(4):
        found = torch.bincount(whole[labels == c], minlength=3) / 1000
        assert (found - shares[c]).abs().max() < 4 * 0.5 / 1000**0.5
        assert (found[shares[c] == 0] == 0).all()


def test_mixed_numbers_look_random_and_depend_on_every_part():
    x = mixed(3, np.arange(20000)[:, None], np.arange(2)[None])
    assert x.shape == (20000, 2) and len(np.unique(x)) == 40000
    bits = np.unpackbits(x.view(np.uint8)).mean()
    assert abs(bits - 0.5) < 4 * 0.5 / x.size**0.5 / 8
    unit = x[:, 0] / 2.0**64
    assert abs(unit.mean() - 0.5) < 4 * 0.29 / 20000**0.5
    assert abs(np.corrcoef(unit, x[:, 1] / 2.0**64)[0, 1]) < 4 / 20000**0.5
    assert mixed(3, 0, 0) != mixed(4, 0, 0) and mixed(3, 1, 0) != mixed(3, 0, 1)
    assert np.array_equal(mixed(3, 5, 1), x[5, 1])
