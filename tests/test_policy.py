"""On-policy language distillation: numbers of the official implementations, and what must hold of every method."""

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core import knobs
from limbeck.core.batches import Batches, Table
from limbeck.core.errors import BadInput, Interrupted
from limbeck.core.generate import sample
from limbeck.core.loop import Clock, Plan, fit
from limbeck.core.maths import kl, label_logprobs, reverse_kl
from limbeck.core.nets import Batch, Nets
from limbeck.core.partition import rows
from limbeck.core.policy import (
    Replay,
    completions,
    divergence,
    either,
    remaining,
    rollout,
    share,
    starts,
    to_go,
    whiten,
)
from limbeck.core.reduce import mean
from tests import networks
from tests.numbers import reference

VECTORS = Path(__file__).parent / "vectors"
WORDS, LENGTH, EXAMPLES = 6, 5, 24


def tensor(value: Any) -> Tensor:
    made = torch.tensor(value)
    return torch.tensor(value, dtype=torch.float64) if made.is_floating_point() else made


def same(found: Tensor, wanted: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found.detach().double(), tensor(wanted).double(), rtol=tolerance, atol=tolerance * 1e-3)


def gradient(value: Tensor, at: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(value, at)
    return grad


Speaker = partial(networks.Speaker, words=WORDS)


def table() -> Table:
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(WORDS, (EXAMPLES, LENGTH + 1), generator=g)
    mask = torch.arange(1, LENGTH + 1) >= torch.randint(1, 4, (EXAMPLES, 1), generator=g)
    return Table({"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "mask": mask}, "tokens")


def batch() -> Batch:
    return next(Batches(table(), 12, seed=1))


def pair(spread: float = 4.0) -> Nets:
    return Nets(teacher=Speaker(1, spread=spread), student=Speaker(2, spread=spread))


def losses(name: str, nets: Nets, given: dict[str, Any], clock: Clock | None = None) -> list[dict[str, float]]:
    """The parts of every turn of one step, without an update in between."""
    method: Any = knobs.make(name, given)
    if hasattr(method, "setup"):
        method.setup(nets, batch())
    turns = [parts for _, parts in method.step(nets, batch(), clock or Clock(0, 10))]
    return [{k: float(v) for k, v in (p.items() if isinstance(p, dict) else [("loss", p)])} for p in turns]


# ---------------------------------------------------------------- prompts, rollouts, replay


def test_completions_begin_where_the_mask_or_the_prompt_says():
    b = batch()
    begun = starts(b, 2)
    assert torch.equal(begun, (b["mask"].int().argmax(1) + 1).clamp_min(2))
    assert torch.equal(completions(b, 2), b["mask"] & (torch.arange(1, LENGTH + 1) >= begun[:, None]))
    none = {**b, "mask": torch.zeros_like(b["mask"])}
    assert starts(none).eq(LENGTH + 1).all() and not completions(none).any()


def test_a_rollout_keeps_prompts_and_forgets_what_was_said_of_the_old_text():
    nets, b = pair(), batch() | {"teacher_ids": torch.zeros(12, LENGTH, 2), "attention_mask": torch.ones(12, LENGTH)}
    new = rollout(b, lambda p, n, *, lengths, end: sample(nets.student, p, n, lengths=lengths, end=end), prompt=2)
    given = torch.arange(LENGTH) < starts(b, 2)[:, None]
    assert torch.equal(new["inputs"][given], b["inputs"][given]) and not torch.equal(new["inputs"], b["inputs"])
    assert torch.equal(new["inputs"][:, 1:], new["labels"][:, :-1])
    assert torch.equal(new["mask"], completions(b, 2)) and "teacher_ids" not in new
    assert not new["inputs"].requires_grad
    with pytest.raises(BadInput, match="teacher with the student's tokenizer"):
        rollout(b | {"teacher_inputs": b["inputs"]}, lambda *a, **k: sample(nets.student, *a, **k))


def test_examples_are_chosen_and_repeated_together():
    b = batch()
    twice = rows(b, torch.tensor([3, 3, 0]))
    assert torch.equal(twice["inputs"], b["inputs"][[3, 3, 0]]) and torch.equal(twice["index"], b["index"][[3, 3, 0]])
    other = {**b, "inputs": 1 - b["inputs"]}
    first = torch.arange(12) < 5
    mixed = either(first, b, other)["inputs"]
    assert torch.equal(mixed[:5], b["inputs"][:5]) and torch.equal(mixed[5:], other["inputs"][5:])


def test_the_replay_buffer_is_first_in_first_out_and_never_over_its_capacity():
    replay = Replay(5, batch())
    with pytest.raises(BadInput, match="empty"):
        replay.draw(2)
    for i in range(4):
        b = rows(batch(), torch.arange(2))
        replay.add({**b, "inputs": torch.full_like(b["inputs"], i)})
        assert len(replay) == min(5, 2 * (i + 1))
    assert sorted(replay.of_inputs[:, 0].tolist()) == [1, 2, 2, 3, 3]  # eight came, the first three left
    assert len({tuple(x.tolist()) for x in replay.draw(5)["labels"]}) <= 5
    assert replay.draw(3)["mask"].dtype == torch.bool and len(replay.draw(9)["inputs"]) == 9
    replay.add(rows(batch(), torch.arange(12)))  # more than fits: its last five stay
    assert {tuple(x) for x in replay.of_inputs.tolist()} == {tuple(x) for x in batch()["inputs"][7:].tolist()}
    again = Replay(5, batch())
    again.load_state_dict(replay.state_dict())
    torch.manual_seed(3)
    first = replay.draw(4)["inputs"]
    torch.manual_seed(3)
    assert torch.equal(again.draw(4)["inputs"], first)


def test_sums_lengths_and_whitening_by_hand():
    values, mask = torch.tensor([[1.0, 2.0, 4.0, 9.0]]), torch.tensor([[True, True, True, False]])
    assert to_go(values, mask).tolist() == [[7, 6, 4, 0]]
    assert to_go(values, mask, 0.5).tolist() == [[3, 4, 4, 0]]
    assert to_go(values, mask, 0.0).tolist() == [[1, 2, 4, 0]]
    assert remaining(mask).tolist() == [[3, 2, 1, 1]]
    white = whiten(values, mask)
    assert white[0, 3] == 0 and abs(white.sum()) < 1e-6 and abs(white.square().sum() / 3 - 1) < 1e-6


def test_shares_of_data_are_the_papers():
    assert share("exponential", 0) == share("linear", 0) == share("data", 0.7) == 1
    assert math.isclose(share("exponential", 1), 1 / 200) and share("linear", 1) == share("student", 0) == 0
    assert math.isclose(share("sigmoid", 0.5), 0.5) and share("sigmoid", 0) > 0.9999
    with pytest.raises(ValueError, match="one of linear, exponential"):
        share("cubic", 0.5)


# ---------------------------------------------------------------- gkd against TRL


def trl() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((VECTORS / "gkd.json").read_text())["trl"]["cases"]
    return found


@pytest.mark.parametrize("case", trl(), ids=lambda c: f"beta={c['beta']} T={c['temperature']}")
def test_gkd_is_what_trl_computes_with_masks(case: dict[str, Any]):
    inputs = json.loads((VECTORS / "gkd.json").read_text())["trl"]["inputs"]
    student, teacher, mask = (tensor(inputs[n]) for n in ("student", "teacher", "mask"))
    student.requires_grad_()
    method = knobs.make("gkd", {"beta": case["beta"], "temperature": case["temperature"]})
    part = mean(method.divergence(student, teacher), mask)
    same(part.value, case["value"])
    same(gradient(part.value, student), case["grad"], 1e-7)
    same(part.total / 20, case["over_twenty"])  # the count of a whole step is the loop's business


# ---------------------------------------------------------------- mini_llm


def test_mini_llm_has_the_official_numbers():
    ref = reference("mini_llm")
    now, old, teacher, labels, mask = (tensor(ref["inputs"][n]) for n in ("now", "old", "teacher", "labels", "mask"))
    method, everywhere = knobs.make("mini_llm", ref["knobs"]), torch.ones_like(mask)
    log_q, log_p = label_logprobs(old, labels), label_logprobs(teacher, labels)
    rewards = method.rewards(log_q, log_p)
    same(rewards, ref["rewards"])
    assert rewards.abs().max() == 1.5  # the bound is met
    same(method.weights(log_q, log_p), ref["weights"])
    advantages = method.advantages(rewards, everywhere)
    same(advantages, ref["advantages"])
    same(to_go(rewards, mask) / remaining(mask), torch.where(mask, tensor(ref["returns"]), 0.0).tolist())
    now.requires_grad_()
    policy = mean(
        method.policy(label_logprobs(now, labels), log_q, method.weights(log_q, log_p), advantages), mask
    ).value
    same(policy, ref["policy"])
    same(gradient(policy, now), ref["policy_grad"], 1e-7)
    single = mean(reverse_kl(now, teacher), mask).value
    same(single, ref["single"])
    same(gradient(single, now), ref["single_grad"], 1e-7)
    plain = mean(method.plainly(now, teacher, labels), mask).value
    same(plain, ref["plain"])
    same(gradient(plain, now), ref["plain_grad"], 1e-7)


def test_mini_llm_has_nothing_to_gain_from_itself_and_bounded_weights():
    method = knobs.make("mini_llm", {"mix": 0.2})
    log_q, log_p = -torch.rand(3, 4), -10 * torch.rand(3, 4)
    assert not method.rewards(log_q, log_q).any()
    assert torch.equal(method.weights(log_q, log_q), torch.ones(3, 4))
    assert method.weights(log_q, log_p).max() <= 1 / 0.8
    assert torch.equal(knobs.make("mini_llm", {"mix": 0.0}).weights(log_q, log_p), torch.ones(3, 4))
    assert torch.equal(knobs.make("mini_llm", {"mix": 0.0}).weights(log_q - 200, log_p), torch.ones(3, 4))
    nets = pair()
    nets.student = copy.deepcopy(nets.teacher).train().requires_grad_(True)
    found = losses("mini_llm", nets, {"epochs": 1, "plain": 0.0})[0]
    assert abs(found["policy"]) < 1e-6 and abs(found["single"]) < 1e-6


def test_the_score_has_expectation_zero_under_a_constant_reward():
    student = Speaker(2, spread=4.0).double()
    logits = student(torch.tensor([[1, 2]]))[0, -1]
    p = logits.softmax(-1)
    grads = [torch.autograd.grad(logits.log_softmax(-1)[v], logits, retain_graph=True)[0] for v in range(WORDS)]
    assert sum(p[v].detach() * g for v, g in enumerate(grads)).abs().max() < 1e-12


# ---------------------------------------------------------------- on-policy distillation


@pytest.mark.parametrize(
    "case", reference("on_policy_distillation")["cases"], ids=lambda c: f"discount={c['discount']}"
)
def test_on_policy_distillation_has_the_official_advantages(case: dict[str, Any]):
    inputs = reference("on_policy_distillation")["inputs"]
    log_q, log_p, mask = (tensor(inputs[n]) for n in ("log_q", "log_p", "mask"))
    method = knobs.make("on_policy_distillation", {k: case[k] for k in ("coefficient", "discount")})
    # at places that do not count the code leaves the sum of later rewards, which its loss masks
    wanted = torch.where(mask, tensor(case["advantages"]), 0.0)
    same(method.advantages(log_q, log_p, mask), wanted.tolist())
    assert not method.advantages(log_q, log_q, mask).any()


def test_on_policy_distillation_is_the_reverse_kl_in_expectation():
    torch.manual_seed(0)
    student, teacher = (2 * torch.randn(WORDS, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    method, every = knobs.make("on_policy_distillation", {}), torch.arange(WORDS)
    log_q, log_p = (x.detach().log_softmax(-1)[every][None] for x in (student, teacher))
    advantages = method.advantages(log_q, log_p, torch.ones(1, WORDS, dtype=torch.bool))
    loss = method.loss(student.log_softmax(-1)[None], log_q, advantages)
    wanted = reverse_kl(student, teacher)
    total = (log_q.exp() * loss).sum()
    same(total, float(wanted.detach()))
    same(gradient(total, student), gradient(wanted, student).tolist(), 1e-8)


def test_samples_are_written_for_each_prompt():
    method: Any = knobs.make("on_policy_distillation", {"samples": 3, "updates": 2})
    turns = list(method.step(pair(), batch(), Clock(0, 1)))
    assert [player for player, _ in turns] == ["student"] * 2
    assert turns[0][1].count == 3 * completions(batch()).sum()


# ---------------------------------------------------------------- distillm and distillm2


def test_distillm_has_the_official_numbers():
    ref = reference("distillm")
    student, teacher, mask = (tensor(ref["inputs"][n]) for n in ("student", "teacher", "mask"))
    student.requires_grad_()
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    for name, forward, rest in (("skewed_forward_kl", 1.0, mean(entropy, mask).value), ("skewed_reverse_kl", 0.0, 0.0)):
        value = mean(
            knobs.make("distillm", {**ref["knobs"], "forward": forward}).divergence(student, teacher), mask
        ).value
        same(value + rest, ref[name]["value"])
        same(gradient(value, student), ref[name]["grad"], 1e-7)


def test_skewed_divergences_at_their_ends_and_bound():
    student, teacher = 9 * torch.randn(40, WORDS), 9 * torch.randn(40, WORDS)
    plain = knobs.make("distillm", {"alpha": 0.0, "forward": 1.0}).divergence(student, teacher)
    torch.testing.assert_close(plain, kl(student, teacher))
    skewed = knobs.make("distillm", {"alpha": 0.1, "forward": 1.0}).divergence(student, teacher)
    assert skewed.max() <= -math.log(0.1) and skewed.min() >= 0 and plain.max() > 5


def test_phi_grows_when_held_out_texts_become_harder():
    nets, method = pair(), knobs.make("distillm", {"margin": 0.1, "held": 4})
    method.setup(nets, batch())
    seen = []
    for i in range(6):
        nets.student.head.bias.data[0] = 1.0 * i  # ever further from the teacher
        method.validate(nets)
        seen.append(round(float(nets.validation.phi), 6))
    assert seen[0] == 0 and seen == sorted(seen) and seen[-1] > 0.2
    nets.validation.phi.fill_(0.95)
    nets.validation.before.fill_(-1e3)
    method.validate(nets)
    assert float(nets.validation.phi) == 1.0


def test_distillm_trains_on_no_text_that_it_validates_on():
    nets, method = pair(), knobs.make("distillm", {"held": 4, "prompt": 1})
    method.setup(nets, batch())
    (_, part), *_ = method.step(nets, batch(), Clock(1, 9))
    held = torch.isin(batch()["index"], nets.validation.index)
    assert held.sum() == 4 and part.count == completions(batch())[~held].sum()


def test_distillm_replays_when_the_buffer_is_full():
    nets, method = pair(), knobs.make("distillm", {"share": 1.0, "capacity": 12})
    method.setup(nets, batch())
    fresh = method.texts(
        nets, {**batch(), "mask": completions(batch())}, 1.0
    )  # not full: written, although progress is 1
    assert len(nets.replay) == 12
    again = method.texts(nets, batch(), 1.0)
    assert {tuple(x) for x in again["inputs"].tolist()} <= {tuple(x) for x in fresh["inputs"].tolist()}
    assert torch.equal(
        knobs.make("distillm", {"share": 0.0}).divergence(torch.ones(2, 3), torch.ones(2, 3)), torch.zeros(2)
    )


@pytest.mark.parametrize("case", reference("distillm2")["cases"], ids=lambda c: f"m={c['teacher']}")
def test_distillm2_has_the_official_numbers(case: dict[str, Any]):
    inputs = reference("distillm2")["inputs"]
    student, teacher, labels, mask = (tensor(inputs[n]) for n in ("student", "teacher", "labels", "mask"))
    student.requires_grad_()
    method = knobs.make("distillm2", {})
    per_text = lambda x: torch.where(mask, x, 0.0).sum(1) / mask.sum(1)
    p, q = (per_text(label_logprobs(x.detach(), labels)).exp() for x in (teacher, student))
    for name, ahead, m in (("pull", p - q, case["teacher"]), ("push", q - p, case["student"])):
        skew = method.skew(ahead, torch.tensor(float("nan") if m is None else m, dtype=torch.float64))
        assert not skew.requires_grad and skew.min() >= 0.01 and skew.max() <= 0.1
        value = per_text(getattr(method, name)(student, teacher, skew))
        same(value, case[name])
        same(gradient(value.sum(), student), case[f"{name}_grad"], 1e-7)


def test_distillm2_on_one_text_without_skew_is_both_kls():
    student, teacher = torch.randn(2, 3, WORDS), torch.randn(2, 3, WORDS)
    method, none = knobs.make("distillm2", {}), torch.zeros(2)
    torch.testing.assert_close(method.pull(student, teacher, none), kl(student, teacher))
    torch.testing.assert_close(method.push(student, teacher, none), reverse_kl(student, teacher))


def test_distillm2_keeps_the_reference_of_its_first_batch():
    nets, method = pair(), knobs.make("distillm2", {})
    method.setup(nets, batch())
    assert nets.reference.teacher.isnan()
    list(method.step(nets, batch(), Clock(0, 9)))
    first = nets.reference.teacher.clone(), nets.reference.student.clone()
    assert all(x.isfinite() for x in first)
    list(method.step(nets, batch(), Clock(1, 9)))
    assert torch.equal(nets.reference.teacher, first[0]) and torch.equal(nets.reference.student, first[1])


# ---------------------------------------------------------------- imitkd


@pytest.mark.parametrize("case", reference("imitkd")["cases"], ids=lambda c: f"candidates={c['candidates']}")
def test_imitkd_has_the_official_numbers(case: dict[str, Any]):
    inputs = reference("imitkd")["inputs"]
    student, teacher = (tensor(inputs[n]) for n in ("student", "teacher"))
    student.requires_grad_()
    value = knobs.make("imitkd", {"candidates": case["candidates"]}).loss(student, teacher).mean()
    best = teacher.topk(case["candidates"] or WORDS, -1).values
    entropy = -(best.softmax(-1) * best.log_softmax(-1)).sum(-1).mean()
    same(value - entropy, case["value"])
    same(gradient(value, student), case["grad"], 1e-7)


def test_imitkd_goes_from_the_data_to_the_student():
    nets, b = pair(), batch()
    assert knobs.make("imitkd", {"schedule": "data"}).mixed(nets, b, 0.9) is b
    own = knobs.make("imitkd", {"schedule": "student"}).mixed(nets, b, 0.0)
    greedy = rollout(b, lambda p, n, *, lengths, end: sample(nets.student, p, n, 0.0, lengths=lengths))
    assert torch.equal(own["inputs"], greedy["inputs"])
    half = knobs.make("imitkd", {"schedule": "linear"}).mixed(nets, b, 0.5)
    from_data = (half["inputs"] == b["inputs"]).all(1) & (half["labels"] == b["labels"]).all(1)
    assert 0 < from_data.sum() < 12
    found = losses("imitkd", nets, {"schedule": "data", "candidates": 0})[0]["loss"]
    student, teacher = nets.student(b["inputs"]), nets.teacher(b["inputs"])
    word_level = mean(-(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1), b["mask"])
    assert math.isclose(found, float(word_level), rel_tol=1e-6)


# ---------------------------------------------------------------- skd, distillspec, sdft, mgsr


def test_skd_lets_everything_pass_or_only_the_teachers_word():
    nets, b = pair(), batch()
    prompts, begun = torch.cat([b["inputs"], b["labels"][:, -1:]], 1)[:, :3], torch.tensor([3, 2, 1] * 4)
    wide = knobs.make("skd_speculative", {"top_k": WORDS, "sampling": 1.0, "top_p": 1.0})
    torch.manual_seed(4)
    found = wide.write(nets, prompts, 4, begun, None)
    torch.manual_seed(4)
    assert torch.equal(found, sample(nets.student, prompts, 4, 1.0, lengths=begun))
    narrow = knobs.make("skd_speculative", {"top_k": 1, "sampling": 1.0, "top_p": 1.0, "teacher_sampling": 0.0})
    assert torch.equal(
        narrow.write(nets, prompts, 4, begun, None), sample(nets.teacher, prompts, 4, 0.0, lengths=begun)
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_sdft_has_the_numbers_of_trl(beta: float):
    ref = reference("sdft")
    case = next(c for c in ref["cases"] if c["beta"] == beta)
    student, teacher = (tensor(ref["inputs"][n]) for n in ("student", "teacher"))
    student.requires_grad_()
    value = divergence(student, teacher, beta)
    same(value, case["value"])
    same(gradient(value.sum(), student), case["grad"], 1e-7)


class LastWord(nn.Module):
    """Looks at the last word alone, so that what comes before a prompt tells it nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.table(tokens)
        return out


def test_sdft_of_a_demonstration_that_says_nothing_is_zero():
    torch.manual_seed(0)
    for net, zero in ((LastWord(), True), (Speaker(2, spread=4.0), False)):
        found = losses("sdft", Nets(student=net), {"between": (0, 1)})[0]["loss"]
        assert (abs(found) < 1e-6) == zero


def test_sdft_shows_the_same_completion_after_the_demonstration():
    method, nets, b = knobs.make("sdft", {"between": (4, 5), "skip": 1}), Nets(student=Speaker(2)), batch()
    method.setup(nets, b)
    new = rollout(b, lambda *a, **k: sample(nets.student, *a, **k))
    shown = method.shown(
        b | {"attention_mask": torch.ones(12, LENGTH)}, new | {"attention_mask": torch.ones(12, LENGTH)}
    )
    assert torch.equal(shown["inputs"][:, -LENGTH:], new["inputs"])
    assert torch.equal(shown["inputs"][:, :LENGTH], b["inputs"])
    assert shown["inputs"][:, LENGTH].equal(b["labels"][:, -1]) and shown["inputs"][
        0, LENGTH + 1 : -LENGTH
    ].tolist() == [4, 5]
    assert shown["attention_mask"].shape == shown["inputs"].shape
    assert torch.equal(method.counted(new).sum(1), completions(new).sum(1) - 1)


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_sdft_moves_the_average_and_keeps_it_out_of_the_gradient(rate: float):
    nets = Nets(student=Speaker(2, spread=4.0))
    before = copy.deepcopy(nets.student.head.weight.detach())
    method = knobs.make("sdft", {"rate": rate})
    fit(method, nets, Batches(table(), 12), Plan(1, optimizer={"sgd": {"lr": 1.0}}))
    assert not torch.equal(nets.student.head.weight, before) and not nets.wiser.head.weight.requires_grad
    torch.testing.assert_close(nets.wiser.head.weight, torch.lerp(before, nets.student.head.weight.detach(), rate))


def test_distillspec_asks_the_writer_that_is_drawn():
    nets, b = pair(), batch()
    for given, writer in (({"draft": 1.0}, nets.student), ({"draft": 0.0, "target": 1.0}, nets.teacher)):
        found = knobs.make("distillspec", {**given, "sampling": 0.0}).texts(nets, b)
        wanted = rollout(b, lambda p, n, *, lengths, end, w=writer: sample(w, p, n, 0.0, lengths=lengths))
        assert torch.equal(found["inputs"], wanted["inputs"])
    plain = knobs.make("distillspec", {"draft": 0.0, "prompt": 3}).texts(nets, b)
    assert torch.equal(plain["inputs"], b["inputs"]) and torch.equal(plain["mask"], completions(b, 3))
    with pytest.raises(ValueError, match="`target` must be at most 1 - draft"):
        knobs.make("distillspec", {"draft": 0.7, "target": 0.5})
    found = losses("distillspec", nets, {"draft": 0.0, "match": ("ce", {"forward_kl": {"weight": 2.0}})})[0]
    student, teacher = nets.student(b["inputs"]), nets.teacher(b["inputs"])
    assert math.isclose(found["forward_kl"], 2 * float(mean(kl(student, teacher), b["mask"])), rel_tol=1e-5)


def test_mgsr_corrects_the_first_bad_mistake_and_nothing_before_it():
    nets, b = pair(8.0), batch()
    method, begun = knobs.make("mgsr_llm", {"threshold": 0.3}), starts(b, 1)
    torch.manual_seed(0)
    new = rollout(b, lambda *a, **k: sample(nets.student, *a, **k))
    logits = nets.teacher(new["inputs"])
    first = method.faults(logits, new["labels"], completions(new))
    fixed = method.corrected(nets, new, begun)
    p = logits.softmax(-1)
    gap = p.amax(-1) - p.gather(-1, new["labels"][..., None])[..., 0]
    assert (first < LENGTH).sum() > 0 and torch.equal(fixed["mask"], new["mask"])
    for i, at in enumerate(first.tolist()):
        before = completions(new)[i, :at]
        assert (gap[i, :at][before] <= 0.3).all()
        assert torch.equal(fixed["labels"][i, :at], new["labels"][i, :at])
        if at < LENGTH:
            assert gap[i, at] > 0.3 and fixed["labels"][i, at] == p[i, at].argmax()
        else:
            assert torch.equal(fixed["labels"][i], new["labels"][i])
    never = knobs.make("mgsr_llm", {"threshold": 1.0})
    assert torch.equal(never.corrected(nets, new, begun)["labels"], new["labels"])


# ---------------------------------------------------------------- all of them

METHODS = {
    "gkd": {"on_policy": 1.0},
    "imitkd": {"schedule": "linear", "sampling": 1.0},
    "skd_speculative": {"top_k": 2, "block": 2},
    "mini_llm": {"epochs": 2},
    "on_policy_distillation": {"samples": 2},
    "distillm": {"share": 0.7, "capacity": 12, "every": 2, "held": 2},
    "distillm2": {"grow": 0.5},
    "sdft": {},
    "distillspec": {"draft": 0.5, "target": 0.5},
    "mgsr_llm": {"threshold": 0.2},
}


def small() -> Nets:
    return Nets(teacher=Speaker(1, spread=4.0), student=Speaker(2))


@pytest.mark.parametrize("name", METHODS)
def test_only_the_student_learns_and_losses_are_finite(name: str):
    nets = small()
    still = copy.deepcopy(nets.teacher.state_dict())
    fitted = fit(knobs.make(name, METHODS[name]), nets, Batches(table(), 12, seed=2), Plan(4, log_every=1))
    assert all(math.isfinite(v) for *_, parts in fitted.turns for v in parts.values())
    assert all(torch.equal(v, still[k]) for k, v in nets.teacher.state_dict().items())
    assert {player for _, _, player, _ in fitted.turns} == {"student"}
    with pytest.raises(ValueError, match="`prompt` must be >= 1"):
        knobs.make(name, {"prompt": 0})


@pytest.mark.parametrize("name", ["distillm", "distillm2", "mini_llm", "sdft"])
def test_killed_and_resumed_it_ends_with_the_same_bits_buffers_included(name: str, tmp_path: Path):
    def run(folder: Path, resume: bool = False, stop: int = -1) -> Nets:
        nets = small() if name != "sdft" else Nets(student=Speaker(2, spread=4.0))

        def note(event: dict[str, Any]) -> None:
            if event.get("t") == stop and "player" in event:
                raise Interrupted("killed")

        plan = Plan(8, save_every=3, log_every=1, optimizer={"adam": {"lr": 1e-2}})
        data = Batches(table(), 12, seed=2)
        try:
            fit(knobs.make(name, METHODS[name]), nets, data, plan, folder=folder, resume=resume, on_event=note)
        except Interrupted:
            assert stop >= 0
        return nets

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop=5)
    again = run(tmp_path / "cut", resume=True)
    for player, module in whole.modules.items():
        theirs = again.modules[player].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value.nan_to_num(-1.0), theirs[key].nan_to_num(-1.0)), f"{player}.{key}"
    if name == "distillm":
        assert len(whole.replay) == 12 and int(whole.replay.head) == int(again.replay.head)
