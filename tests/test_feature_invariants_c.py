"""What the papers say must hold exactly of sp, pkt, nst, cckd, ickd, fsp, ofd, reviewkd, mgd, vid, ab and ft."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.conformance import toys
from limbeck.core.errors import BadInput
from limbeck.core.features import patches
from limbeck.core.find import get
from limbeck.core.layerwise import counted, paired, summed
from limbeck.core.loop import fit
from limbeck.losses.features.ofd import margin
from limbeck.losses.features.reviewkd import hierarchical
from limbeck.train.plain.ft import Factors
from tests.numbers import FP64, VECTORS, close, made, rand, rotation

order = torch.tensor([3, 0, 4, 1, 2])


# ---- sp, pkt: examples among each other --------------------------------------------------------------------------
def test_sp_ignores_rotation_and_scale_of_either_feature():
    t = rand(5, 6)
    close(get("sp")([-3.0 * t @ rotation(6)], [t]), 0.0)
    s = rand(5, 4, seed=1)
    close(get("sp")([2.0 * s @ rotation(4)], [t]), get("sp")([s], [t]))


def test_sp_and_pkt_do_not_see_the_order_of_the_batch_nor_anything_in_one_example():
    s, t = rand(5, 4, seed=1), rand(5, 6, seed=2)
    close(get("sp")([s[order]], [t[order]]), get("sp")([s], [t]))
    close(get("pkt")(s[order], t[order]), get("pkt")(s, t))
    assert get("sp")([s[:1]], [t[:1]]) == 0 and get("pkt")(s[:1], t[:1]) == 0
    assert get("sp")([s], [t]) > 1e-3 and get("pkt")(s, t) > 1e-4


def test_pkt_ignores_rotation_and_the_length_of_each_embedding():
    t = rand(5, 6)
    length = rand(5, 1, seed=1).abs() + 0.5
    close(get("pkt")(length * t @ rotation(6), t), 0.0, 1e-9)


def test_pkt_is_the_divergence_between_rows_that_sum_to_one():
    s, t = rand(5, 3, seed=1), rand(5, 4, seed=2)
    rows = []
    for x in (t, s):
        kernel = (F.normalize(x) @ F.normalize(x).T + 1) / 2
        rows.append(kernel / kernel.sum(1, keepdim=True))
        close(rows[-1].sum(1), torch.ones(5))
    divergence = (rows[0] * (rows[0] / rows[1]).log()).sum(1)
    close(get("pkt")(s, t), divergence.sum() / 25, 1e-7)


def test_masked_examples_leave_no_trace_in_batch_relations():
    s, t, mask = rand(5, 4, seed=1), rand(5, 6, seed=2), torch.tensor([True, False, True, True, False])
    close(get("sp")([s], [t], mask), get("sp")([s[mask]], [t[mask]]))
    close(get("pkt")(s, t, mask), get("pkt")(s[mask], t[mask]))
    tokens = torch.stack([mask, torch.zeros(5, dtype=torch.bool)], 1)
    close(get("sp")([s], [t], tokens), get("sp")([s], [t], mask))


# ---- nst, ickd, fsp: channels among each other ---------------------------------------------------------------------
@pytest.mark.parametrize("kernel", ["polynomial", "linear", "gaussian"])
def test_nst_sees_channels_as_a_set_of_directions(kernel):
    t = rand(2, 3, 4, 4)
    scale = rand(1, 3, 1, 1, seed=1).abs() + 0.5
    shuffled = (scale * t)[:, [2, 0, 1]]
    close(get("nst")([shuffled], [t], kernel=kernel), torch.zeros(2))
    close(get("nst")([torch.cat([t, t], 1)], [t], kernel=kernel), torch.zeros(2))
    other = get("nst")([rand(2, 5, 4, 4, seed=2)], [t], kernel=kernel)
    assert (other > 1e-3).all()


def test_nst_takes_tokens_like_the_map_that_they_come_from():
    s, t = rand(2, 3, 4, 4, seed=1), rand(2, 5, 4, 4, seed=2)
    tokens = [x.flatten(2).mT for x in (s, t)]
    close(get("nst")(tokens[:1], tokens[1:]), get("nst")([s], [t]))


def identity(connector):
    """Make a connector hand on what it gets, in eval mode."""
    with torch.no_grad():
        connector.linear.weight.copy_(torch.eye(len(connector.linear.weight)))
    connector.eval()
    connector.norm.eps = 0.0


def test_ickd_ignores_rotation_over_the_places_and_scale():
    t = rand(2, 3, 4, 4)
    s = -2.0 * (t.flatten(2) @ rotation(16)).unflatten(2, (4, 4))
    loss = made("ickd", [s], [t])
    identity(loss.connector)
    close(loss([s], [t]), torch.zeros(2))
    assert (loss([rand(2, 3, 4, 4, seed=5)], [t]) > 1e-3).all()
    close(loss._correlation(t).square().sum(-1), torch.ones(2, 1, 3))


def test_ickd_does_not_see_the_order_of_the_places_but_a_grid_does():
    s, t = rand(2, 3, 4, 4, seed=1), rand(2, 5, 4, 4)
    places = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = s.flatten(2)[:, :, places].unflatten(2, (4, 4))
    whole = made("ickd", [s], [t])
    close(whole([moved], [t]), whole([s], [t]))
    grid = made("ickd", [s], [t], grid=2)
    assert not torch.allclose(grid([moved], [t]), grid([s], [t]))


def test_patches_of_a_map_hold_neighbouring_places():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert patches(x, 2)[0, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    with pytest.raises(BadInput, match="`grid` 3 does not divide a map of 4 x 4"):
        patches(x, 3)


def test_fsp_is_zero_for_equal_features_and_the_same_for_moved_pixels_and_a_turned_flow():
    t = [rand(2, 3, 4, 4), rand(2, 5, 4, 4, seed=1)]
    s = [rand(2, 3, 4, 4, seed=2), rand(2, 5, 4, 4, seed=3)]
    loss = made("fsp", s, t)
    assert not list(loss.parameters())
    close(loss(t, t), torch.zeros(2))
    moved = [x.flip(2).transpose(2, 3) for x in s]
    close(loss(moved, t), loss(s, t))
    close(made("fsp", s, t, flows=((1, 0),))(s, t), loss(s, t))
    assert (loss(s, t) > 1e-2).all()


def test_fsp_sums_the_squares_over_all_pairs_of_channels():
    s, t = [torch.ones(1, 2, 2, 2, dtype=FP64)] * 2, [torch.zeros(1, 2, 2, 2, dtype=FP64)] * 2
    close(made("fsp", s, t)(s, t), [4.0])


def test_fsp_wants_two_layers():
    with pytest.raises(BadInput, match="at least two layers"):
        made("fsp", [rand(2, 3, 4, 4)], [rand(2, 3, 4, 4)])


# ---- cckd ----------------------------------------------------------------------------------------------------------
def test_cckd_is_zero_for_equal_gram_matrices():
    t = rand(5, 6)
    loss = made("cckd", t, t, width=0)
    close(loss(2.0 * t @ rotation(6), t), 0.0)
    assert loss(rand(5, 6, seed=1), t) > 1e-3


def test_cckd_series_of_first_order_and_its_limit():
    unit, gamma = F.normalize(rand(5, 4)), 0.4
    first = made("cckd", unit, unit, order=1, width=0)._correlation(unit)
    close(first, math.exp(-2 * gamma) * (1 + 2 * gamma * unit @ unit.T))
    limit = made("cckd", unit, unit, order=30, width=0)._correlation(unit)
    close(limit, torch.exp(-gamma * torch.cdist(unit, unit).square()), 1e-9)


# ---- ofd, ab: before the ReLU ----------------------------------------------------------------------------------------
def test_ofd_margin_is_the_mean_negative_response():
    close(margin(torch.ones(1, dtype=FP64), torch.zeros(1, dtype=FP64)), [-math.sqrt(2 / math.pi)])
    scale, shift = torch.tensor([-0.7, 2.0], dtype=FP64), torch.tensor([0.4, -1.0], dtype=FP64)
    x = shift + scale * rand(400_000, 2)
    sampled = torch.where(x < 0, x, 0.0).sum(0) / (x < 0).sum(0)
    close(margin(scale, shift), sampled, 5e-3)
    rare = margin(torch.tensor([0.5], dtype=FP64), torch.tensor([3.0], dtype=FP64))
    close(rare, [-1.5])
    assert (margin(rand(50, seed=1), rand(50, seed=2, scale=3.0)) < 0).all()


def ofd_at(s, t):
    """The loss of one layer whose connector hands on what it gets, with the margin -0.79788."""
    stats = [torch.ones(s.shape[1], dtype=FP64)], [torch.zeros(s.shape[1], dtype=FP64)]
    loss = made("ofd", [s], [t], *stats)
    identity(loss.connectors[0])
    return loss([s], [t], *stats)


def test_ofd_leaves_the_student_free_below_a_negative_teacher_and_nowhere_else():
    t = rand(2, 3, 2, 2)
    close(ofd_at(t.clamp_min(-0.7), t.clamp_min(-0.7)), torch.zeros(2))
    negative = -t.abs() - 1.0  # all below the margin, which takes their place
    close(ofd_at(negative - 5.0, negative), torch.zeros(2))
    m = -math.sqrt(2 / math.pi)
    close(ofd_at(torch.zeros_like(t), negative), [12 * m**2] * 2)
    close(ofd_at(-torch.ones_like(t), torch.ones_like(t)), [12 * 4.0] * 2)


def test_ab_counts_sides_not_strength():
    t = rand(2, 3, 2, 2)
    loss = made("ab", [t], [t])
    assert not list(loss.parameters())
    close(loss([t.sign() * (1 + t.abs())], [t]), torch.zeros(2))
    s = rand(2, 3, 2, 2, seed=1)
    close(loss([s], [100 * t]), loss([s], [t]))
    close(loss([torch.zeros_like(t)], [t]), [12.0] * 2)
    close(made("ab", [t, t], [t, t])([0 * t, 0 * t], [t, t]), [18.0] * 2)  # the shallower counts half


# ---- reviewkd, mgd, vid --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 3, 8, 32])
def test_hierarchical_distance_of_a_constant_offset_is_its_square_at_any_size(size):
    t = rand(2, 3, size, size)
    close(hierarchical(t, t), torch.zeros(2))
    close(hierarchical(t + 0.3, t), [0.09] * 2)
    s = rand(2, 3, 1, 1, seed=1)
    close(hierarchical(s, t[:, :, :1, :1]), (s - t[:, :, :1, :1]).square().mean((1, 2, 3)))


def test_reviewkd_lets_deep_features_answer_to_shallow_levels_of_the_teacher():
    s = [rand(2, 3, 8, 8).requires_grad_(), rand(2, 4, 4, 4, seed=1).requires_grad_()]
    t = [rand(2, 5, 8, 8, seed=2), rand(2, 6, 4, 4, seed=3)]
    loss = made("reviewkd", s, t, pooled=False)
    block, below = loss.blocks[1](s[1], None, t[1].shape[2:])
    shallow, _ = loss.blocks[0](s[0], below, t[0].shape[2:])
    assert block.shape == t[1].shape and shallow.shape == t[0].shape
    assert torch.autograd.grad(hierarchical(shallow, t[0]).sum(), s[1])[0].abs().sum() > 0
    with_mean = made("reviewkd", s, t)
    assert len(with_mean.blocks) == 3 and with_mean.blocks[2].gates is None


def test_mgd_without_holes_and_generator_is_the_sum_of_squares():
    s, t = rand(2, 3, 4, 4), rand(2, 3, 4, 4, seed=1)
    loss = made("mgd", [s], [t], masked=0.0)
    loss.generators[0] = nn.Identity()
    loss.generators[0].register_parameter("one", nn.Parameter(torch.ones(1, dtype=FP64)))
    close(loss([s], [t]), (s - t).square().sum((1, 2, 3)))
    close(loss([t], [t]), torch.zeros(2))


@pytest.mark.parametrize("holes", ["place", "channel"])
def test_mgd_masks_that_share_and_draws_anew(holes):
    s = torch.ones(64, 16, 16, 16, dtype=FP64)
    loss = made("mgd", [s], [s], masked=0.65, holes=holes)
    first, second = loss._mask(s), loss._mask(s)
    assert abs(float(first.mean()) - 0.35) < 0.03
    assert not torch.equal(first, second)


def test_vid_with_unit_variance_is_half_the_squared_error():
    s, t = [rand(2, 3, 4, 4)], [rand(2, 5, 4, 4, seed=1)]
    loss = made("vid", s, t, variance=1.0)
    error = (loss.means[0](s[0]) - t[0]).square().mean((1, 2, 3))
    close(loss(s, t), error / 2, 1e-7)  # the variance starts in single precision


def test_vid_is_least_where_the_variance_is_the_mean_squared_residual():
    s, t = [rand(2, 3, 4, 4)], [rand(2, 5, 4, 4, seed=1)]
    loss = made("vid", s, t)
    residual = (loss.means[0](s[0]) - t[0]).square().mean((0, 2, 3)).detach()
    with torch.no_grad():
        loss.spreads[0].copy_(torch.log(torch.expm1(residual - 1e-5)))
    (slope,) = torch.autograd.grad(loss(s, t).mean(), loss.spreads[0])
    close(slope, torch.zeros(5))
    with torch.no_grad():
        loss.spreads[0] += 0.1
    (slope,) = torch.autograd.grad(loss(s, t).mean(), loss.spreads[0])
    assert (slope > 0).all()


# ---- ft, stagewise -------------------------------------------------------------------------------------------------
def factors(seed=0):
    numbers = json.loads((VECTORS / "ft.json").read_text())["factors"]
    feats = {k: [torch.tensor(x, dtype=FP64) for x in v] for k, v in numbers["inputs"].items()}
    module = Factors(*([tuple(x.shape) for x in v] for v in feats.values()), rate=0.5, layer=-1).double()
    module.load_state_dict({k: torch.tensor(v, dtype=FP64) for k, v in numbers["state"].items()})
    return module, feats["student_feats"], feats["teacher_feats"], numbers


def test_ft_factors_are_those_of_the_official_code():
    module, student, teacher, numbers = factors()
    student[0].requires_grad_()
    loss = module(student, teacher).mean()
    loss.backward()
    close(loss, numbers["value"], 1e-9)
    close(student[0].grad, numbers["grad"]["student_feats"][0], 1e-7)
    close(module.reconstruction(teacher).mean(), numbers["reconstruction"], 1e-9)


def test_ft_teaches_the_translator_and_not_the_paraphraser():
    module, student, teacher, _ = factors()
    module(student, teacher).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.translator.parameters())
    assert all(p.grad is None for p in module.paraphraser.parameters())


def test_ft_with_nothing_to_paraphrase_compares_directions_of_features():
    module, student, teacher, _ = factors()
    one = nn.Parameter(torch.ones((), dtype=FP64))
    module.translator = module.paraphraser["encoder"] = Through(one)
    close(module([3.0 * teacher[0]], teacher), torch.zeros(3))
    s, t = (F.normalize(x.flatten(1)) for x in (student[0][:, :3], teacher[0][:, :3]))
    close(module(student, [teacher[0][:, :3]]), (s - t).abs().mean(1))


class Through(nn.Module):
    """Hands on what it gets."""

    def __init__(self, one):
        super().__init__()
        self.one = one

    def forward(self, x):
        return x


def test_ft_learns_to_restore_the_feature_before_the_student_moves():
    made = toys.place(get("ft")(pretraining=1.0), "plain", steps=25, optimizer={"adam": {"lr": 3e-3}})
    turns = fit(made.method, made.nets, made.data, made.plan).turns
    restored = [parts["loss"] for stage, _, _, parts in turns if stage == 0]
    assert len(restored) == 25 and restored[-1] < 0.7 * restored[0]
    assert {player for stage, _, player, _ in turns if stage == 1} == {"student"}


def test_stagewise_leaves_the_head_alone_until_its_second_stage():
    made = toys.scene("stagewise", steps=4)
    before = made.nets.student.head.weight.detach().clone()
    seen = []

    class Spy:
        def __getattr__(self, name):
            return getattr(made.method, name)

        def step(self, nets, batch, clock):
            seen.append((clock.stage, torch.equal(nets.student.head.weight, before)))
            yield from made.method.step(nets, batch, clock)

    fit(Spy(), made.nets, made.data, made.plan)
    assert seen == [(0, True), (0, True), (1, True), (1, False)]


def test_stagewise_trains_projectors_of_a_stage_in_that_stage_only():
    method = get("stagewise")(first=("fitnets",), match=("ce", "vid"), share=0.5)
    made = toys.place(method, "plain", steps=4)
    states = []

    class Spy:
        def __getattr__(self, name):
            return getattr(method, name)

        def step(self, nets, batch, clock):
            states.append({k: v.clone() for k, v in nets.losses.named_parameters()})
            yield from method.step(nets, batch, clock)

    fit(Spy(), made.nets, made.data, made.plan)
    states.append(dict(made.nets.losses.named_parameters()))
    for key in states[0]:
        mine = (0, 2) if key.startswith("stage0") else (2, 4)
        other = (2, 4) if key.startswith("stage0") else (0, 2)
        assert not torch.equal(states[mine[0]][key], states[mine[1]][key]), key
        assert torch.equal(states[other[0]][key], states[other[1]][key]), key


# ---- what they share -----------------------------------------------------------------------------------------------
def test_layers_are_paired_by_place_and_chosen_from_either_end():
    student, teacher = [(2, 3)], [(2, 4), (2, 5)]
    assert paired(student, teacher, (-1,)) == [((2, 3), (2, 5))]
    assert paired(student, teacher) == [((2, 3), (2, 5))]
    with pytest.raises(BadInput, match="1 is none of the 1 features of the student"):
        paired(student, teacher, (1,))


def test_layers_of_unlike_depth_are_paired_by_relative_depth_and_the_last_with_the_last():
    two, three, six = list("ab"), list("ABC"), list("uvwxyz")
    assert paired(two, six) == [("a", "w"), ("b", "z")]
    assert paired(six, three) == [("v", "A"), ("x", "B"), ("z", "C")]
    assert paired(two, three) == [("a", "A"), ("b", "C")]


def test_sums_over_layers_keep_tokens_only_where_all_layers_have_them():
    tokens, examples = rand(2, 3), rand(2)
    close(summed([tokens, tokens]), 2 * tokens)
    close(summed([tokens, examples]), tokens.mean(1) + examples)
    assert counted(torch.tensor([[True, False], [False, False]]), examples).tolist() == [True, False]
