"""What the catalogue promises of networks that teach and learn at once: adapters, partners, twins, shared layers."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core import knobs
from limbeck.core.batches import Batches, Table
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Fitted, Plan, fit
from limbeck.core.mutual import facing
from limbeck.core.nested import Around, common
from limbeck.core.nets import Nets, outputs
from limbeck.core.noise import WordNoise, closed_up, dropping, in_order, neighbour, put_back
from limbeck.core.reduce import mean
from limbeck.losses.logits.kd import kd
from limbeck.losses.logits.pesf_kd import PESFKD
from limbeck.train.online.ctcd import CTCD
from limbeck.train.policy.noisy_self_kd_summ import NoisySelfKDSumm
from limbeck.train.self.tsjt_multicap import TSJTMulticap
from limbeck.zoo.transformer import LanguageModel, text_encoder, tiny_lm, vit_tiny

CLASSES, WIDTH, EXAMPLES, SIZE, WORDS = 4, 6, 40, 8, 12
NOW = Clock(0, 10)


pytestmark = pytest.mark.usefixtures("one_thread")


class Mlp(nn.Module):
    """Two layers: {"logits", "feats", "emb", "head", "head_bias"} of vectors."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, width), nn.Linear(width, CLASSES)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        emb = self.first(inputs).relu()
        head = {"head": self.head.weight, "head_bias": self.head.bias}
        return {"logits": self.head(emb), "feats": [emb], "emb": emb, **head}


def points() -> Table:
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(EXAMPLES) % CLASSES
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=g)
    return Table({"inputs": centres[labels] + torch.randn(EXAMPLES, WIDTH, generator=g), "labels": labels})


def texts(examples: int = 6, length: int = 7) -> dict[str, Tensor]:
    """Each text has a prompt of four words, the last of which is 2."""
    words = torch.randint(3, WORDS, (examples, length + 1))
    words[:, 3] = 2
    return {
        "inputs": words[:, :-1],
        "labels": words[:, 1:],
        "mask": (torch.arange(length) >= 3).expand(examples, -1),
    }


def speaker(layers: int = 1, width: int = 8) -> LanguageModel:
    return tiny_lm(vocab=WORDS, width=width, layers=layers, heads=2)


def run(method: Any, nets: Nets, **plan: Any) -> Fitted:
    options: dict[str, Any] = {"steps": 6, "optimizer": {"sgd": {"lr": 0.1}}, "log_every": 1} | plan
    return fit(method, nets, Batches(points(), SIZE, seed=3), Plan(**options))


def first_batch() -> dict[str, Tensor]:
    return next(Batches(points(), SIZE, seed=3))


def vector(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / f"{name}.json").read_text())
    return found


def exact(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def total(parts: Any) -> Tensor:
    return sum((part.value for part in parts.values()), torch.zeros(()))


# ---------------------------------------------------------------- pesf_kd: an adapter goes to meet the student


def test_pesf_adapter_gets_the_gradient_worked_by_hand() -> None:
    case = vector("pesf_kd")
    given = {name: exact(value) for name, value in case["inputs"].items()}
    given["labels"] = given["labels"].long()
    loss = PESFKD(given["teacher_emb"].shape, given["teacher_head"].shape, **case["knobs"]).double()
    loss.load_state_dict({name: exact(value) for name, value in case["state"].items()})
    mean(loss(**given)).value.backward()
    for name, parameter in loss.named_parameters():
        assert torch.allclose(parameter.grad, exact(case["adapter_grad"][name]), rtol=1e-9, atol=1e-12), name


def test_pesf_teacher_speaks_at_first_as_it_always_did() -> None:
    teacher, inputs = Mlp(), first_batch()["inputs"]
    told = teacher(inputs)
    loss = PESFKD(told["emb"].shape, told["head"].shape)
    assert torch.allclose(loss.adapted(told["emb"], told["head"], told["head_bias"]), told["logits"], atol=1e-6)


def test_pesf_with_a_still_adapter_teaches_as_kd() -> None:
    teacher, batch = Mlp(), first_batch()
    told = teacher(batch["inputs"])
    logits = torch.randn(SIZE, CLASSES, requires_grad=True)
    loss = PESFKD(told["emb"].shape, told["head"].shape, temperature=3.0, pull=0.0).requires_grad_(False)
    found = loss(logits, batch["labels"], told["emb"], told["head"], told["head_bias"])
    constant = F.cross_entropy(told["logits"], batch["labels"], reduction="none")
    wanted = kd(logits, told["logits"], temperature=3.0)
    assert torch.allclose(found, wanted + constant, atol=1e-5)
    grads = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (found, wanted)]
    assert torch.allclose(*grads, atol=1e-6) and grads[0].any()


def test_pesf_narrows_the_gap_in_sharpness_and_leaves_the_teacher_alone() -> None:
    teacher, student = Mlp(8), Mlp()
    with torch.no_grad():
        teacher.head.weight.mul_(8)  # far too sure
    before, gaps = weights(teacher), []
    for pull in (0.0, 1.0):
        nets = Nets(teacher=teacher, student=copy.deepcopy(student))
        adapt = {"temperature": 2.0, "pull": pull, "weight": 0.9}
        run(
            knobs.make("distill", {"match": [{"ce": 0.1}, {"pesf_kd": adapt}]}),
            nets,
            steps=15,
            optimizer={"adam": {"lr": 0.03}},
        )
        told, adapter = teacher(first_batch()["inputs"]), nets.losses["pesf_kd"]
        adapted = adapter.adapted(told["emb"], told["head"], told["head_bias"])
        mine = nets.student(first_batch()["inputs"])["logits"]
        gaps.append((adapted.logsumexp(-1) - mine.logsumexp(-1)).abs().mean().item())
        assert same(weights(teacher), before) and bool(adapter.up.weight.any())
    assert gaps[1] < 0.6 * gaps[0]


# ---------------------------------------------------------------- ctcd: a large and a small network, side by side


def both() -> nn.ModuleList:
    return nn.ModuleList([Mlp(3), Mlp(8)])


def turns(method: Any, nets: Nets, clock: Clock = NOW) -> dict[str, Any]:
    return dict(method.step(nets, first_batch(), clock))


def test_ctcd_parts_and_gradients_are_those_of_the_equations() -> None:
    nets, batch, w, t = Nets(peers=both().double()), first_batch(), (0.7, 1.3), (2.0, 3.0)
    batch["inputs"] = batch["inputs"].double()
    method = CTCD(
        ({"ce": 0.5}, {"kd": {"temperature": t[0], "weight": w[0]}}),
        ("ce", {"kd": {"temperature": t[1], "weight": w[1]}}),
    )
    method.setup(nets, batch)
    said = [net(batch["inputs"])["logits"].detach().numpy() for net in nets.peers]
    labels = batch["labels"].numpy()

    def soft(z: Any, temperature: float) -> Any:
        e = np.exp(z / temperature)
        return e / e.sum(-1, keepdims=True)

    for k, (player, parts) in enumerate(method.step(nets, batch, NOW)):
        z, other = said[k], said[1 - k]
        p, q = soft(other, t[k]), soft(z, t[k])
        ce = -np.log(soft(z, 1.0)[np.arange(SIZE), labels]).mean() * (0.5, 1.0)[k]
        apart = w[k] * t[k] ** 2 * (p * np.log(p / q)).sum(-1).mean()
        assert player == f"peers.{k}"
        assert [float(parts["ce"]), float(parts["kd"])] == pytest.approx([ce, apart], rel=1e-9)
        (bias,) = torch.autograd.grad(total(parts), nets.peers[k].head.bias)
        error = (0.5, 1.0)[k] * (soft(z, 1.0) - np.eye(CLASSES)[labels]) + w[k] * t[k] * (q - p)
        assert np.allclose(bias, error.mean(0), atol=1e-12)


def test_ctcd_without_divergences_is_two_trainings() -> None:
    start = both()
    nets = Nets(peers=copy.deepcopy(start))
    run(CTCD(("ce",), ("ce",)), nets)
    for k, alone in enumerate(start):
        single = Nets(student=copy.deepcopy(alone))
        run(knobs.make("distill", {"match": ["ce"]}), single)
        assert same(weights(single.student), weights(nets.peers[k]))


def test_ctcd_one_way_lets_the_large_one_learn_as_if_alone_and_the_small_one_from_its_words_of_now() -> None:
    start = both()
    nets = Nets(peers=copy.deepcopy(start))
    run(CTCD(back=("ce",)), nets, steps=3)
    small, large = copy.deepcopy(start)
    stream = Batches(points(), SIZE, seed=3)
    for _ in range(3):
        batch = next(stream)
        mine, its = small(batch["inputs"])["logits"], large(batch["inputs"])["logits"]
        learned = F.cross_entropy(mine, batch["labels"]) + kd(mine, its, temperature=1.0).mean()
        for net, loss in ((small, learned), (large, F.cross_entropy(its, batch["labels"]))):
            net.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
    for k, by_hand in enumerate((small, large)):
        for key, value in weights(by_hand).items():
            assert torch.allclose(nets.peers[k].state_dict()[key], value, atol=1e-6), key


def test_ctcd_no_gradient_crosses() -> None:
    nets = Nets(peers=both())
    method = CTCD(("ce", "kd", {"fitnets": 0.5}), ("ce", "kd", {"fitnets": 0.5}))
    method.setup(nets, first_batch())
    assert nets.companions == {"peers.0": ["losses.small"], "peers.1": ["losses.large"]}
    for player, parts in method.step(nets, first_batch(), NOW):
        other = nets.find("peers.1" if player == "peers.0" else "peers.0")
        theirs = torch.autograd.grad(total(parts), list(other.parameters()), allow_unused=True, retain_graph=True)
        assert all(g is None for g in theirs)
        assert all(g is not None for g in torch.autograd.grad(total(parts), nets.params(player)))


def test_the_other_is_a_constant_to_every_loss() -> None:
    said = {
        "logits": torch.randn(2, 3, requires_grad=True),
        "feats": [torch.randn(2, 4, requires_grad=True)],
        "head_scale": 2,
    }
    have = facing({"labels": torch.zeros(2), "teacher_logits": torch.zeros(2)}, said, said)
    assert have["student_logits"] is said["logits"] and have["teacher_head_scale"] == 2
    assert torch.equal(have["teacher_logits"], said["logits"]) and not have["teacher_logits"].requires_grad
    assert not have["teacher_feats"][0].requires_grad and have["student_feats"][0].requires_grad


def test_ctcd_compares_real_words_alone_where_heads_differ() -> None:
    batch = {k: v[:, :4] for k, v in texts().items()} | {"words": torch.tensor(WORDS)}
    peers = [nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, WORDS + more)) for more in (2, 6)]
    said = [net(batch["inputs"])[..., :WORDS] for net in peers]
    nets, method = Nets(peers=nn.ModuleList(peers)), CTCD(match=("ce", {"kd": {"temperature": 1.0}}, "uld"))
    with pytest.warns(UserWarning, match=f"rows for {WORDS} words"):
        method.setup(nets, batch)
    for k, (_, parts) in enumerate(method.step(nets, batch, NOW)):
        wanted = kd(said[k], said[1 - k], temperature=1.0)[batch["mask"]].mean()
        assert float(parts["kd"]) == pytest.approx(wanted.item(), rel=1e-5)
        assert ("uld" in parts) == (k == 0)


@pytest.mark.parametrize("loss", ["kd", "dist"])
def test_ctcd_has_nothing_to_say_to_its_equal(loss: str) -> None:
    one = Mlp()
    nets = Nets(peers=nn.ModuleList([one, copy.deepcopy(one)]))
    method = CTCD(("ce", loss), ("ce", loss))
    method.setup(nets, first_batch())
    for parts in turns(method, nets).values():
        assert abs(float(parts[loss])) < 1e-5 < float(parts["ce"])


def test_ctcd_lets_the_small_ones_word_fade() -> None:
    nets = Nets(peers=both())
    method = CTCD(back=("ce", {"kd": {"temperature": 1.0, "weight": {"linear": [1, 0]}}}))
    method.setup(nets, first_batch())
    found = [float(turns(method, nets, Clock(t, 11))["peers.1"]["kd"]) for t in (0, 5, 10)]
    assert found[1] == pytest.approx(found[0] / 2, rel=1e-5) and found[2] == 0 < found[0]


def test_ctcd_is_for_two() -> None:
    with pytest.raises(ValueError, match="2 networks"):
        CTCD().setup(Nets(peers=nn.ModuleList([Mlp(), Mlp(), Mlp()])), first_batch())


# ---------------------------------------------------------------- noisy_self_kd_summ: a twin with dropout on


class Said(nn.Module):
    """Says the same logits to whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.words = nn.Parameter(logits), nn.Embedding(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits[: len(inputs), : inputs.shape[1]]


def test_noisy_value_and_gradient_are_those_of_the_official_code() -> None:
    case = vector("noisy_self_kd_summ")["reference"]
    nets = Nets(student=Said(exact(case["student_logits"])), teacher=Said(exact(case["teacher_logits"])))
    labels = torch.tensor(case["labels"])
    batch = {"inputs": labels, "labels": labels, "mask": torch.tensor(case["mask"]).bool()}
    method = NoisySelfKDSumm(weight=case["weight"], teacher_dropout=0.0, drop=0.0, shuffle=0, replace=0.0)
    ((player, parts),) = method.step(nets, batch, NOW)
    value = total(parts)
    (grad,) = torch.autograd.grad(value, nets.student.logits)
    assert player == "student"
    assert value.item() == pytest.approx(case["value"], rel=2e-6)  # the code adds 1e-5 to the number of tokens
    assert torch.allclose(grad, exact(case["grad"]), rtol=1e-5, atol=1e-8)


def test_noise_of_sources_is_that_of_the_official_code() -> None:
    for case in vector("noisy_self_kd_summ")["reference"]["noise"]:
        ids, draws = torch.tensor([case["ids"]]), exact([case["draws"]])
        if case["drop"]:
            lost = draws[:, : ids.shape[1]] <= case["drop"]
            found = closed_up(ids, lost)[0, : ids.shape[1] - int(lost.sum())]
        else:
            last = ids == 1011
            sentences = int(last.sum()) + 1
            jitter = (case["shuffle"] + 1) * draws[:, sentences : 2 * sentences]  # the first ones drop none
            found = in_order(ids, torch.ones_like(last), last.cumsum(1) - last.long(), jitter)[0]
        assert found.tolist() == case["out"] != case["ids"]


def test_noisy_at_weight_0_is_plain_training() -> None:
    batch, student = texts(), speaker()
    method = NoisySelfKDSumm(weight=0.0, drop=0.9, replace=0.9)  # there is neither noise nor a teacher
    ((_, parts),) = method.step(Nets(student=student), batch, NOW)
    logits = student(batch["inputs"])["logits"]
    assert list(parts) == ["ce"]
    assert float(parts["ce"]) == pytest.approx(
        F.cross_entropy(logits[:, 3:].flatten(0, 1), batch["labels"][:, 3:].flatten()).item()
    )


@pytest.mark.parametrize("kind", ["own layers", "none of its own"])
def test_a_frozen_teacher_draws_anew_while_dropout_is_on_and_only_then(kind: str) -> None:
    inputs = texts()["inputs"]
    net = text_encoder(classes=3, vocab=WORDS, width=8, dropout=0.5) if kind == "own layers" else speaker(2)
    nets = Nets(teacher=net)
    before = nets.teacher(inputs)["logits"]
    for chance, alike in ((0.0, True), (0.3, False)):
        with dropping(nets.teacher, chance):
            said = [nets.run("teacher", {"inputs": inputs})["logits"] for _ in range(2)]
        assert torch.equal(*said) is alike and torch.equal(said[0], before) is alike
    assert torch.equal(nets.teacher(inputs)["logits"], before)
    assert not any(layer.training or layer._forward_hooks for layer in net.modules())
    assert all(layer.p == 0.5 for layer in net.modules() if isinstance(layer, nn.Dropout))


def test_dropout_needs_a_place() -> None:
    with pytest.raises(BadInput, match="neither dropout nor token embeddings"), dropping(Mlp(), 0.1):
        pass


def test_no_noise_changes_nothing() -> None:
    batch = texts() | {"attention_mask": torch.ones(6, 7, dtype=torch.long)}
    new, moved = WordNoise(ends=(5,), special=(2,)).on(batch, None)
    assert not moved.any() and all(torch.equal(value, batch[name]) for name, value in new.items())


def test_words_are_lost_from_prompts_alone_and_the_rest_is_read_as_it_would_be() -> None:
    batch, net = texts(40), speaker(2)
    batch["inputs"][:, 0] = 2
    real = torch.ones_like(batch["inputs"])
    new, moved = WordNoise(drop=0.5, special=(2,)).on(batch | {"attention_mask": real}, None)
    assert set(moved.tolist()) == {0, 1, 2} and torch.equal(new["labels"], batch["labels"])
    said = put_back(net(new["inputs"])["logits"], moved)
    for row, gone in enumerate(moved.tolist()):
        old, left = batch["inputs"][row].tolist(), new["inputs"][row].tolist()
        kept = left[: 7 - gone]
        assert kept[0] == 2 and kept[3 - gone :] == old[3:] and left[7 - gone :] == [0] * gone
        assert new["attention_mask"][row].tolist() == [1] * (7 - gone) + [0] * gone
        alone = net(torch.tensor([kept]))["logits"][0, 3 - gone :]
        assert torch.allclose(said[row, 3:], alone, atol=1e-5)


@pytest.mark.parametrize("reach", [1, 2])
def test_no_sentence_moves_further_than_it_may(reach: int) -> None:
    sentences = [[10 * s + w for w in range(1 + s % 3)] + [9] for s in range(1, 8)]
    prompt = [1, *[word for sentence in sentences for word in sentence], 2]
    words = torch.tensor([[*prompt, 500, 501]] * 200)
    batch = {"inputs": words[:, :-1], "labels": words[:, 1:]}
    batch["mask"] = torch.arange(words.shape[1] - 1) >= len(prompt) - 1
    batch["mask"] = batch["mask"].expand(len(words), -1)
    new, moved = WordNoise(shuffle=reach, ends=(9,), special=(1, 2)).on(batch, None)
    furthest = 0
    for row in new["inputs"].tolist():
        assert row[0] == 1 and row[len(prompt) - 1 :] == [2, 500] and sorted(row) == sorted(words[0, :-1].tolist())
        order = [word // 10 for word in row[1 : len(prompt) - 1] if word % 10 == 0]
        assert sorted(order) == list(range(1, 8))
        furthest = max(furthest, *(abs(place - s) for place, s in enumerate(order, 1)))
    assert furthest == reach and not moved.any()


def test_sentences_end_where_they_were_written_to_end() -> None:
    embedding = torch.eye(10).repeat_interleave(2, 0)  # 2 i and 2 i + 1 become one another: 10, which ends, and 11
    words = torch.tensor([[1, 4, 11, 10, 6, 7, 10, 8, 5, 10, 2, 17]] * 50)
    batch = {"inputs": words, "mask": (torch.arange(12) >= 10).expand(50, -1)}
    noise = WordNoise(shuffle=2, replace=1.0, ends=(10,), special=(0, 1, 2))
    found = {tuple(row) for row in noise.on(batch, embedding)[0]["inputs"].tolist()}
    assert len(found) > 1 and {(row[0], *row[10:]) for row in found} == {(1, 2, 17)}
    for row in found:
        assert sorted(row[k : k + 3] for k in (1, 4, 7)) == [(5, 10, 11), (7, 6, 11), (9, 4, 11)]


def test_words_become_their_neighbours() -> None:
    embedding = torch.randn(WORDS, 5)
    words = torch.arange(3, WORDS).repeat(50)
    found = neighbour(words, embedding, 2, special=(0, 2))
    alike = (embedding @ embedding.T).numpy()
    for word in range(3, WORDS):
        best = [v for v in np.argsort(-alike[word]) if v not in (word, 0, 2)][:2]
        assert set(found[words == word].tolist()) == set(best)
    batch = texts(100)
    new, _ = WordNoise(replace=0.5, neighbours=3, special=(2,)).on(batch, embedding)
    changed = (new["inputs"] != batch["inputs"]).float().mean(0)
    assert (changed[:3] > 0.3).all() and (changed[:3] < 0.7).all() and not changed[3:].any()


def test_noisy_teacher_reads_noise_of_its_own() -> None:
    heard: list[Tensor] = []
    nets, batch = Nets(student=speaker(), teacher=speaker()), texts(30)
    for net in (nets.teacher, nets.student):
        net.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    for noisy in (False, True):
        heard.clear()
        list(NoisySelfKDSumm(drop=0.5, replace=0.0, special=(2,), noisy_teacher=noisy).step(nets, batch, NOW))
        teacher, student = heard
        assert torch.equal(teacher, batch["inputs"]) is not noisy
        assert not torch.equal(student, batch["inputs"]) and not torch.equal(student, teacher)


# ---------------------------------------------------------------- tsjt_multicap: the small one lies in the large one


def nested(small: int = 1, large: int = 3, **given: Any) -> tuple[TSJTMulticap, Nets]:
    nets = Nets(student=speaker(small))
    nets.factories["peer"] = lambda: speaker(large)
    method = TSJTMulticap(**given)
    method.setup(nets, texts())
    return method, nets


class Only:
    """A method that is set up already."""

    def __init__(self, method: Any) -> None:
        self.step = method.step


PLAIN: dict[str, Any] = {"match": ("ce",), "back": ("ce",), "alone": 0.0}


def test_layers_in_common_exist_once_and_the_student_stays_plain() -> None:
    _, nets = nested()
    mine, rest = nets.student, nets.around
    assert nets.student.state_dict().keys() == speaker().state_dict().keys()
    assert not {id(p) for p in mine.parameters()} & {id(p) for p in rest.parameters()}
    together = sum(p.numel() for p in [*mine.parameters(), *rest.parameters()])
    assert together == sum(p.numel() for p in speaker(3).parameters())
    before = rest(texts()["inputs"])["feats"][0]
    with torch.no_grad():
        mine.blocks[0].up.weight.add_(0.5)
    inputs = torch.arange(3, 9)[None]
    assert torch.equal(rest(inputs)["feats"][0], mine(inputs)["feats"][0]) and before.shape[-1] == 8
    assert len(rest(inputs)["feats"]) == 3


def test_large_path_hears_of_the_small_one_through_shared_layers_alone() -> None:
    method, nets = nested(**PLAIN)
    batch = texts()
    ((player, parts),) = method.step(nets, batch, NOW)
    rest = list(nets.around.parameters())
    joint = torch.autograd.grad(total(parts), rest, retain_graph=True)
    alone = torch.autograd.grad(parts["ce_large"].value, rest, retain_graph=True)
    assert player == "student" and all(torch.equal(a, b) for a, b in zip(joint, alone, strict=True))
    assert all(
        g is None for g in torch.autograd.grad(parts["ce_small"].value, rest, allow_unused=True, retain_graph=True)
    )
    shared = nets.student.blocks[0].up.weight
    grads = [
        torch.autograd.grad(v, shared, retain_graph=True)[0] for v in (total(parts), *[p.value for p in parts.values()])
    ]
    assert torch.allclose(grads[0], grads[1] + grads[2], atol=1e-6) and grads[1].any() and grads[2].any()


def test_divergences_treat_the_other_path_as_a_constant() -> None:
    method, nets = nested(alone=0.0)
    ((_, parts),) = method.step(nets, texts(), NOW)
    rest = list(nets.around.parameters())
    assert all(g is None for g in torch.autograd.grad(parts["kd_small"].value, rest, allow_unused=True))
    assert all(g is not None for g in torch.autograd.grad(parts["kd_large"].value, rest))


def test_equal_capacities_say_the_same_and_have_nothing_to_learn_of_one_another() -> None:
    method, nets = nested(2, 2, alone=0.0)
    inputs = texts()["inputs"]
    assert not list(nets.around.parameters())
    assert torch.equal(nets.student(inputs)["logits"], nets.around(inputs)["logits"])
    ((_, parts),) = method.step(nets, texts(), NOW)
    assert abs(float(parts["kd_small"])) < 1e-6 and abs(float(parts["kd_large"])) < 1e-6 < float(parts["ce_small"])


@pytest.mark.parametrize("first", ["both", "small"])
def test_each_learns_for_itself_before_they_meet(first: Any) -> None:
    method, nets = nested(alone=0.5, first=first)
    kinds = [set(dict(method.step(nets, texts(), Clock(t, 5)))["student"]) for t in range(5)]
    early = {"ce_small", "ce_large"} if first == "both" else {"ce_small"}
    assert kinds[:2] == [early] * 2 and kinds[2:] == [{"ce_small", "ce_large", "kd_small", "kd_large"}] * 3
    fresh = Nets(student=speaker())
    fresh.factories["peer"] = lambda: speaker(3)
    table, plan = Table(texts(24), kind="tokens"), Plan(1, optimizer={"sgd": {"lr": 0.1}})
    method = TSJTMulticap(alone=0.9, first=first)
    method.setup(fresh, texts())
    before = [weights(net) for net in (fresh.student, fresh.around)]
    fit(Only(method), fresh, Batches(table, 6, seed=0), plan)
    still = [same(weights(net), b) for net, b in zip((fresh.student, fresh.around), before, strict=True)]
    assert still == [False, first == "small"]


def test_who_shares_what_is_said_by_paths() -> None:
    small, large = speaker(1), speaker(3)
    assert {path.split(".")[0] for path in common(small, large)} == {"embed", "blocks", "norm", "head"}
    assert all(path.startswith("blocks.0.") for path in common(small, large, ["blocks"]))
    with pytest.raises(BadInput, match="did you mean .embed"):
        common(small, large, ["embd"])
    with pytest.raises(BadInput, match="in common"):
        common(small, speaker(1, width=16))
    method, nets = nested(shared=("embed", "blocks.0"), **PLAIN)
    assert nets.around.network.norm is not nets.student.norm
    assert nets.around.network.embed is nets.student.embed
    ((_, parts),) = method.step(nets, texts(), NOW)
    own = torch.autograd.grad(parts["ce_large"].value, nets.student.norm.weight, allow_unused=True)
    assert own == (None,)


def test_places_that_no_layer_holds_are_shared_too() -> None:
    small, large = (vit_tiny(classes=3, channels=1, size=8, width=8, layers=n, heads=2) for n in (1, 2))
    assert "places" in common(small, large) and common(small, large, ["places"]) == ["places"]
    around = Around(large, small, common(small, large))
    assert large.places is small.places and not any(p is small.places for p in around.parameters())
    assert {p.shape for p in around.parameters()} == {p.shape for p in large.blocks[1].parameters()}
    assert "places" not in common(small, vit_tiny(classes=3, channels=1, size=16, patch=2, width=8, heads=2))


def test_the_large_network_may_be_the_student() -> None:
    method, nets = nested(3, 1, **PLAIN)
    inputs = texts()["inputs"]
    assert not list(nets.around.parameters()) and len(outputs(nets.around.network, {"inputs": inputs})["feats"]) == 1
    ((_, parts),) = method.step(nets, texts(), NOW)
    assert all(g is not None for g in torch.autograd.grad(total(parts), list(nets.student.parameters())))
