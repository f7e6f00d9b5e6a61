"""Mixtures of experts: the layer, steering it from outside, and the two methods that teach from all experts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.conformance.toys import scene
from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.core.loop import fit
from limbeck.core.nets import Nets
from limbeck.core.routing import Experts, Router, every, imbalance, renormalised, routed, routers, sampled
from limbeck.train.policy.moe_augmented import MoEAugmented
from limbeck.train.policy.student_aware_router import StudentAwareRouter
from limbeck.zoo.nets import build
from tests.numbers import reference

VECTORS = Path(__file__).parent / "vectors"


def number(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def same(a: Tensor, b: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, number(b), rtol=tolerance, atol=tolerance)


class Given(nn.Module):
    """A mixture whose router says `scores` and whose experts say `experts`, whatever it reads."""

    def __init__(self, scores: Tensor, experts: Tensor) -> None:
        super().__init__()
        places, count = scores.shape
        self.router = Router(places, count, 1)
        self.router.weight = nn.Parameter(scores.T.clone())
        self.experts = experts

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        eye = torch.eye(len(self.experts), dtype=torch.float64)
        _, gates, chosen = self.router(eye)
        said = self.experts[torch.arange(len(chosen))[:, None], chosen]
        return {"logits": (gates.unsqueeze(-1) * said).sum(1).unsqueeze(0)}


class Fixed(nn.Module):
    """The same logits for everything."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits.unsqueeze(0)}


def lm(**knobs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build({"net": "tiny_moe_lm", "vocab": 11, "width": 16, "layers": 2, "heads": 2, "experts": 4, **knobs})
    for router in routers(model).values():
        nn.init.normal_(router.weight)  # type: ignore[arg-type]
    return model.eval()


TEXT = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- the layer


def test_a_layer_is_the_gated_sum_of_its_chosen_experts() -> None:
    torch.manual_seed(0)
    layer, x = Experts(6, 5, 4, 2).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    nn.init.normal_(layer.router.weight)
    found = layer(x)
    for b in range(2):
        for t in range(3):
            p = (layer.router.weight @ x[b, t]).softmax(0)
            best = p.argsort(descending=True)[:2].tolist()
            wanted = sum(p[n] / p[best].sum() * layer.experts[n](x[b, t]) for n in best)
            torch.testing.assert_close(found[b, t], wanted, rtol=1e-10, atol=1e-12)


def test_one_expert_of_weight_one_is_a_dense_layer() -> None:
    layer, x = Experts(6, 5, 3, 1), torch.randn(4, 6)
    for expert in layer.experts[1:]:
        expert.load_state_dict(layer.experts[0].state_dict())
    torch.testing.assert_close(layer(x), layer.experts[0](x))


def test_the_balance_evens_out_the_load() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 8) + 1.0
    loads = []
    for balance in (0.0, 0.003):
        router = Router(8, 4, 1, balance)
        with torch.no_grad():
            router.weight[0] += 0.1  # the first expert gets nearly everything
        for _ in range(600):
            chosen = router(x)[2]
        loads.append(chosen.flatten().bincount(minlength=4).max().item() / 512)
    assert loads[0] > 0.7 and loads[1] < 0.35
    before = router.bias.clone()
    router.eval()(x)
    assert torch.equal(router.bias, before)


def test_the_language_model_is_causal_and_trains_every_part() -> None:
    model = lm(balance=0.0)
    other = TEXT.clone()
    other[:, 4:] = 0
    torch.testing.assert_close(model(TEXT)["logits"][:, :4], model(other)["logits"][:, :4])
    model(TEXT)["logits"].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------- steering


def test_gates_over_the_active_experts_sum_to_1() -> None:
    p = torch.rand(50, 6).softmax(-1)
    for chosen in (every(p), sampled(p, 5, 0.0), sampled(p, 5, 1.0)):
        gates = renormalised(p, chosen)
        torch.testing.assert_close(gates.sum(-1), torch.ones(50))
        assert all(len(set(row)) == len(row) for row in chosen.tolist())


def test_the_top_is_what_the_model_does_by_itself() -> None:
    model = lm(top=2)
    with routed(model, lambda p: sampled(p, 2, 0.0)) as seen:
        torch.testing.assert_close(model(TEXT)["logits"], lm(top=2)(TEXT)["logits"])
    assert len(seen) == 2 and all(p.shape == (21, 4) for p in seen.values())
    with routed(model, every):
        steered = model(TEXT)["logits"]
    torch.testing.assert_close(steered, lm(top=4)(TEXT)["logits"])
    torch.testing.assert_close(model(TEXT)["logits"], lm(top=2)(TEXT)["logits"])  # as before, afterwards
    assert not torch.allclose(steered, model(TEXT)["logits"])


def test_experts_are_drawn_in_proportion_to_their_gates() -> None:
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).expand(40000, 4)
    first = sampled(p, 1, 1.0).squeeze(1).bincount(minlength=4) / 40000
    torch.testing.assert_close(first, p[0], atol=0.01, rtol=0)
    often = (sampled(p, 3, 0.4) != 3).all(1).double().mean()  # the least likely stays out unless it is drawn
    out = sum(_out(order) for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)))
    assert abs(often - (0.6 + 0.4 * out)) < 0.01


def _out(order: tuple[int, ...]) -> float:
    p, left, chance = (0.5, 0.3, 0.15, 0.05), 1.0, 1.0
    for n in order:
        chance, left = chance * p[n] / left, left - p[n]
    return chance


def test_who_has_no_experts_is_told() -> None:
    with pytest.raises(BadInput, match="tiny_moe_lm"):
        routers(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Olmoe"])
def test_models_of_transformers_are_steered_alike(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "num_local_experts" if kind == "Mixtral" else "num_experts": 4}
    if kind == "Qwen2Moe":
        sizes |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "norm_topk_prob": True}
    if kind == "Olmoe":
        sizes |= {"norm_topk_prob": True}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for router in routers(model).values():
        nn.init.normal_(router.weight)
    assert len(routers(model)) == 2
    plain = model(TEXT).logits
    with routed(model, lambda p: sampled(p, 2, 0.0)):
        torch.testing.assert_close(model(TEXT).logits, plain)
    with routed(model, every) as seen:
        steered = model(TEXT).logits
    assert not torch.allclose(steered, plain) and all(p.shape == (21, 4) for p in seen.values())
    steered.square().mean().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in routers(model).values())


def test_masked_places_do_not_count_as_load() -> None:
    torch.manual_seed(0)
    p, mask = torch.rand(6, 3).softmax(-1), torch.tensor([[True, False, True], [True, True, False]])
    torch.testing.assert_close(imbalance(p, mask), imbalance(p[mask.flatten()]))
    assert imbalance(torch.full((5, 3), 1 / 3)) == 0


# ---------------------------------------------------------------- knowledge augmentation


def test_augmented_reference() -> None:
    ref = reference("moe_augmented")
    teacher, method = Given(number(ref["scores"]), number(ref["experts"])), MoEAugmented(passes=2, chance=0.0)
    nets = Nets(teacher=teacher, student=Fixed(number(ref["student"])))
    said = method.said(nets, {"inputs": torch.zeros(1, 3, dtype=torch.long)})
    assert len(said) == 2
    same(said[0][0], ref["mixed"])
    student = number(ref["student"]).requires_grad_()
    value = method.loss(student, [said[0][0], number(ref["second_pass"])])
    same(value.detach(), ref["value"])
    value.mean().backward()
    assert student.grad is not None
    same(student.grad, ref["grad_of_mean"], 1e-7)


def test_without_chance_the_passes_are_the_same() -> None:
    batch = {"inputs": TEXT}
    for chance, alike in ((0.0, True), (1.0, False)):
        first, second = MoEAugmented(chance=chance).said(Nets(teacher=lm()), batch)
        assert torch.equal(first, second) is alike
    (top,) = MoEAugmented(passes=1, chance=0.0, left_out=2).said(Nets(teacher=lm(top=2)), batch)
    torch.testing.assert_close(top, lm(top=2)(TEXT)["logits"])  # N - left_out = k: the teacher as it is


def test_more_left_out_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="left_out"):
        MoEAugmented(left_out=4).setup(Nets(teacher=lm()), {})


# ---------------------------------------------------------------- the student-aware router


def test_router_reference() -> None:
    ref = reference("student_aware_router")
    guide, method = Given(number(ref["scores"]), number(ref["experts"])), StudentAwareRouter(balance=ref["balance"])
    nets = Nets(student=Fixed(number(ref["student"])), guide=guide)
    tokens = torch.zeros(1, 3, dtype=torch.long)
    batch = {"inputs": tokens, "labels": tokens, "mask": torch.ones(1, 3, dtype=torch.bool)}
    parts = method.towards(nets, batch)
    value = parts["divergence"].value + parts["balance"]  # type: ignore[union-attr]
    same(value.detach(), ref["value"])
    same(parts["balance"].detach(), ref["balance"] * ref["imbalance"])  # type: ignore[union-attr]
    value.backward()
    assert guide.router.weight.grad is not None and nets.student.logits.grad is None
    same(guide.router.weight.grad.T, ref["grad_scores"], 1e-7)


def test_the_first_turn_changes_router_parameters_only() -> None:
    made = scene("student_aware_router", steps=1)
    before = {n: copy.deepcopy(m.state_dict()) for n, m in made.nets.modules.items()}
    turns = []

    class Halved:
        setup = made.method.setup

        def step(self, nets: Nets, batch: Any, clock: Any) -> Any:
            turn = next(made.method.step(nets, batch, clock))
            turns.append(turn[0])
            yield turn

    fit(Halved(), made.nets, made.data, made.plan)
    assert turns == ["guide"]
    after = made.nets.guide.state_dict()
    moved = {k for k, v in before["teacher"].items() if not torch.equal(v, after[k])}
    assert moved == {"experts.router.weight"}
    for name in ("teacher", "student"):
        now = made.nets.find(name).state_dict()
        assert all(torch.equal(v, now[k]) for k, v in before[name].items() if not k.endswith("calls"))


def test_the_guide_comes_nearer_to_the_student() -> None:
    made = scene("student_aware_router", steps=1)
    made.method.setup(made.nets, {})
    table: Table = made.data.table
    batch = dict(table.columns)
    method = StudentAwareRouter(balance=0.0)
    optimizer = torch.optim.Adam(made.nets.params("guide"), 0.05)
    values = []
    for _ in range(20):
        loss = method.towards(made.nets, batch)["divergence"].value  # type: ignore[union-attr]
        values.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < values[0] - 0.05
