"""The one reduction: which parts are known to share their count."""

import torch

from limbeck.core.reduce import mean


def test_parts_of_one_mask_share_their_key() -> None:
    mask, values = torch.tensor([True, False, True]), torch.arange(3.0)
    assert mean(values, mask).key == mean(values + 1, mask).key
    assert hash(mean(values, mask).key) == hash(mean(values + 1, mask).key)
    assert mean(values, mask).key != mean(values, mask.clone()).key
    assert mean(values, mask).key != mean(torch.ones(3, 2), mask).key


def test_a_mask_that_is_gone_lends_its_key_to_no_other() -> None:
    values = torch.arange(3.0)
    keys = set()
    for count in range(50):  # each mask would be freed, and the next one often made in its place
        keys.add(mean(values, torch.arange(3) < count % 3).key)
    assert len(keys) == 50
