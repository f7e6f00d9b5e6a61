"""Methods that learn without labels before a task: further pre-training, similar pictures of a batch, two networks."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.dino import Centres, MLPHead, Said, TransformerHead, across_views, agreement, search, warm
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Fitted, Plan, Stage, Turn, fit
from limbeck.core.masked import patchify, unseen
from limbeck.core.nets import Batch, Nets
from limbeck.core.pretext import answer, cut, rising, standardised
from limbeck.train.pretrain.selfdist_further_pretrain import SelfDistFurtherPretrain, apart
from limbeck.train.staged.mokd import MoKD
from limbeck.train.staged.selfkd_ssl_covid import SelfKDSSLCovid, ensembled, far, sharpened
from limbeck.zoo import nets as zoo
from tests.numbers import rand, vector

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.usefixtures("double")]

State = dict[str, Tensor]
SMALL = {"small": 2, "prototypes": 6, "hidden": 8, "bottleneck": 4, "width": 8, "heads": 2}


def alike(found: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    given = torch.as_tensor(found, dtype=torch.float64).detach()
    torch.testing.assert_close(given, wanted, rtol=tolerance, atol=1e-12)


def numbers(name: str, part: str) -> dict[str, Any]:
    """A part of a vector, its lists as tensors."""
    return {k: torch.tensor(v) if isinstance(v, list) else v for k, v in vector(name, part).items()}


def state(module: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def same(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


class Diary:
    """A method that is followed: states at the start of every stage and after every step; each stage has its seed."""

    def __init__(self, method: Any, *seeds: int) -> None:
        self.method, self.seeds = method, seeds
        self.begins: list[dict[str, State]] = []
        self.lengths: list[int] = []
        self.after_steps: list[tuple[str, dict[str, State]]] = []

    def told(self, nets: Nets) -> dict[str, State]:
        return {name: state(module) for name, module in nets.modules.items()}

    def setup(self, nets: Nets, probe: Batch) -> None:
        self.method.setup(nets, probe)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        for k, stage in enumerate(self.method.stages(nets, steps)):
            self.begins.append(self.told(nets))
            self.lengths.append(stage.steps)
            torch.manual_seed(self.seeds[k] if k < len(self.seeds) else 0)
            yield stage

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        return iter(self.method.step(nets, batch, clock))

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        if hasattr(self.method, "after"):
            self.method.after(nets, player, clock)
        self.after_steps.append((player, self.told(nets)))


def texts(count: int = 6) -> Batch:
    tokens = torch.randint(2, 20, (count, 5), generator=torch.Generator().manual_seed(1))
    tokens[:, 3:] = torch.where(torch.arange(count)[:, None] % 2 == 0, 0, tokens[:, 3:])
    return {"inputs": tokens, "labels": torch.arange(count) % 3, "attention_mask": tokens != 0}


def pictures(count: int = 6) -> Batch:
    return {"inputs": rand(count, 1, 8, 8, seed=2), "labels": torch.arange(count) % 4}


def reader() -> nn.Module:
    torch.manual_seed(3)
    net = {"net": "text_encoder", "width": 8, "heads": 2, "length": 5, "dropout": 0.0, "masked": True}
    return zoo.build(net, classes=3, vocab=20)


def vit() -> nn.Module:
    torch.manual_seed(4)
    return zoo.build(
        {"net": "vit_tiny", "patch": 2, "width": 8, "layers": 2, "heads": 2}, classes=4, channels=1, size=8
    )


def cnn() -> nn.Module:
    torch.manual_seed(5)
    return zoo.build({"net": "resnet8", "width": 4}, classes=4, channels=1, size=8)


def run(method: Any, nets: Nets, batch: Batch, steps: int = 4, **plan: Any) -> Fitted:
    options: dict[str, Any] = {"optimizer": {"sgd": {"lr": 0.1}}, "log_every": 1} | plan
    return fit(method, nets, {name: [batch] * steps for name in ("seen", "task")}, Plan(steps, **options))


# ---- selfdist_further_pretrain


def test_the_distance_is_that_of_the_authors() -> None:
    given = numbers("selfdist_further_pretrain", "distance")
    student, teacher = given["student"].requires_grad_(), given["teacher"].requires_grad_()
    value = apart(student, teacher).mean()
    alike(value, given["value"])
    slopes = torch.autograd.grad(value, [student, teacher], allow_unused=True)
    assert slopes[0] is not None and slopes[1] is None
    alike(slopes[0], given["grad"], 1e-7)


def test_pixels_are_told_as_in_the_authors_masked_autoencoder() -> None:
    given = numbers("selfdist_further_pretrain", "pixels")
    told = given["told"].requires_grad_()
    value = unseen(told, standardised(patchify(given["pictures"], 2)), given["shown"]).mean()
    alike(value, given["value"])
    alike(torch.autograd.grad(value, told)[0], given["grad"], 1e-7)


def test_the_distance_is_0_when_networks_agree_and_padding_has_no_part_in_it() -> None:
    x = rand(2, 3, 4)
    assert apart(x, x.clone()).tolist() == [0, 0] and (apart(x, x + 1) == 4).all()
    real = torch.tensor([[True, True, False], [True, False, False]])
    other = torch.where(real.unsqueeze(2), x + 1, x + 100)
    alike(apart(x, other, real), [4.0, 4.0])


@pytest.mark.parametrize(("make", "batch"), [(reader, texts()), (vit, pictures())])
def test_each_round_begins_where_the_first_did_and_is_taught_by_the_one_before(make: Any, batch: Batch) -> None:
    diary = Diary(SelfDistFurtherPretrain(rounds=2, share=0.75, hidden=0.4, decoder_width=8, decoder_heads=2))
    nets = Nets(student=make())
    start = state(nets.student)
    fitted = run(diary, nets, batch, 8)
    assert diary.lengths == [2, 2, 2, 2] and len(diary.begins) == 4
    learners = {"student", "pretext"} & set(diary.begins[0])
    assert learners == ({"student"} if make is reader else {"student", "pretext"})
    for begin in diary.begins[1:3]:
        assert all(same(begin[name], diary.begins[0][name]) for name in learners) and same(begin["student"], start)
    ends = [told for _, told in diary.after_steps[1::2]]
    for k in (1, 2):
        assert same(diary.begins[k]["teacher_before"], ends[k - 1]["student"])
        assert same(ends[k]["teacher_before"], ends[k - 1]["student"])  # it stays as it is
    assert same(diary.begins[3]["student"], ends[2]["student"])  # the task goes on from the last round
    assert [sorted(parts) for *_, parts in fitted.turns[::2]] == [["masked"], *[["distance", "masked"]] * 2, ["ce"]]
    assert not any(p.requires_grad for p in nets.teacher_before.parameters())
    if make is vit:
        task = [told["pretext"] for _, told in diary.after_steps[6:]]
        assert all(same(told, ends[2]["pretext"]) for told in task)


@pytest.mark.parametrize("make", [reader, vit])
def test_without_weight_a_round_is_plain_further_pretraining(make: Any) -> None:
    batch = texts() if make is reader else pictures()
    ends = []
    for weight in (0.0, 1.0):
        method = SelfDistFurtherPretrain(weight=weight, rounds=1, share=0.8, decoder_width=8, decoder_heads=2)
        diary = Diary(method, 7, 7)
        run(diary, Nets(student=make()), batch, 10)
        ends.append([told["student"] for _, told in diary.after_steps])
    plain, taught = ends
    assert same(plain[3], plain[7]) and same(plain[3], taught[3])
    assert not same(taught[3], taught[7])


def test_shares_of_all_and_of_nothing() -> None:
    turns = {
        share: run(SelfDistFurtherPretrain(share=share, rounds=0), Nets(student=reader()), texts()).turns
        for share in (0.0, 0.5, 1.0)
    }
    assert {s: ["".join(parts) for *_, parts in found] for s, found in turns.items()} == {
        0.0: ["ce"] * 4,
        0.5: ["masked", "masked", "ce", "ce"],
        1.0: ["masked"] * 4,
    }


@pytest.mark.parametrize(("share", "steps", "told"), [(0.1, 4, "mccc"), (0.9, 4, "mmmc"), (0.6, 1, "c")])
def test_neither_the_rounds_nor_the_task_go_without_a_step(share: float, steps: int, told: str) -> None:
    fitted = run(SelfDistFurtherPretrain(share=share, rounds=0), Nets(student=reader()), texts(), steps)
    assert [next(iter(parts))[0] for *_, parts in fitted.turns] == list(told)


@pytest.mark.parametrize("method", [SelfKDSSLCovid(), MoKD(**SMALL)])
def test_the_only_step_of_a_run_is_one_of_the_task(method: Any) -> None:
    nets = Nets(student=cnn())
    nets.factories["peer"] = cnn
    fitted = run(method, nets, pictures(), 1)
    assert [list(parts) for *_, parts in fitted.turns] == [["ce"]] * len(fitted.turns) and not nets.companions


def test_only_labelled_examples_belong_to_the_task() -> None:
    pools = SelfDistFurtherPretrain().pools(torch.tensor([2, -100, 0, -100]))
    assert pools["task"].tolist() == [0, 2] and pools["seen"].tolist() == [0, 1, 2, 3]


def test_the_vector_of_the_head_may_be_compared() -> None:
    nets = Nets(student=vit())
    nets.teacher_before = copy.deepcopy(nets.student)
    feature = SelfDistFurtherPretrain(compare="emb").feature(nets, "teacher_before", pictures())
    assert feature.shape == (6, 8) and not feature.requires_grad


def test_networks_that_can_tell_nothing_hidden_are_refused() -> None:
    plain = zoo.build({"net": "text_encoder", "width": 8, "heads": 2, "length": 5}, classes=3, vocab=20)
    with pytest.raises(BadInput, match="which word is hidden"):
        run(SelfDistFurtherPretrain(), Nets(student=plain), texts())
    with pytest.raises(BadInput, match="square pictures"):
        run(SelfDistFurtherPretrain(entry="blocks.1"), Nets(student=cnn()), pictures())


# ---- selfkd_ssl_covid


def test_soft_targets_and_both_losses_are_those_by_hand() -> None:
    given = numbers("selfkd_ssl_covid", "reference")
    said = sharpened(given["teacher"], given["temperature"]).softmax(-1)
    targets = ensembled(said, given["features"], given["ensembling"], given["nearness"])
    alike(targets, given["targets"])
    student = given["student"].requires_grad_()
    views = far(student, given["teacher"])
    alike(views, given["views"])
    alike(torch.autograd.grad(views.mean(), student)[0], given["grad_views"], 1e-7)
    log_p = sharpened(student, given["temperature"]).log_softmax(-1)
    similar = (targets * (targets.log() - log_p)).sum(1)
    alike(similar, given["similar"])
    alike(torch.autograd.grad(similar.mean(), student)[0], given["grad_similar"], 1e-7)


def test_parallel_vectors_are_alike() -> None:
    q = rand(4, 3)
    alike(far(q, 5 * q), torch.zeros(4))
    alike(far(q, -q), torch.full((4,), 4.0))


def test_without_ensembling_the_targets_are_what_was_said() -> None:
    said = rand(5, 4).softmax(-1)
    assert torch.equal(ensembled(said, rand(5, 3, seed=1), 0.0, 0.1), said)
    mixed = ensembled(said, rand(5, 3, seed=1), 0.6, 0.1)
    alike(mixed.sum(1), torch.ones(5))
    assert (mixed - said).abs().max() > 0.01


def test_targets_have_no_gradient_and_no_part_in_those_that_do_not_count() -> None:
    said, features = rand(4, 3).softmax(-1).requires_grad_(), rand(4, 2, seed=1).requires_grad_()
    assert not ensembled(said, features, 0.5, 0.2).requires_grad
    assert not far(rand(4, 3), rand(4, 3, seed=1).requires_grad_()).requires_grad
    mask = torch.tensor([True, True, False, True])
    changed = torch.where(mask.unsqueeze(1), features, 9.0), torch.where(mask.unsqueeze(1), said, 1 / 3)
    whole = ensembled(said, features, 0.5, 0.2, mask)[mask]
    alike(whole, ensembled(changed[1], changed[0], 0.5, 0.2, mask)[mask])
    alike(whole, ensembled(said[mask], features[mask], 0.5, 0.2))
    alone = ensembled(said[:1], features[:1], 0.5, 0.2)
    assert torch.equal(alone, said[:1].detach())


def test_what_is_similar_is_learned_from_the_other_view_and_byol_is_without() -> None:
    for weight, wanted in ((0.0, ["views"]), (2.0, ["similar", "views"])):
        method = SelfKDSSLCovid(weight=weight, hidden=6, width=5)
        fitted = run(method, Nets(student=cnn()), pictures())
        assert [sorted(parts) for *_, parts in fitted.turns] == [wanted, wanted, ["ce"], ["ce"]]


def test_each_view_is_held_against_the_average_of_the_other() -> None:
    batch, method = pictures(), SelfKDSSLCovid(weight=2.0, ensembling=0.3, temperature=0.2, hidden=6, width=5)
    nets = Nets(student=cnn())
    method.setup(nets, batch)
    torch.manual_seed(1)
    found = {name: float(part) for name, part in method.alike(nets, batch).items()}
    torch.manual_seed(1)
    views = [cut(batch["inputs"], method.area, method.augment) for _ in range(2)]
    emb = [nets.student(view)["emb"] for view in views]  # the average is still a copy
    z = [nets.pretext["projector"](e) for e in emb]
    q = [nets.pretext["predictor"](v) for v in z]
    alike(found["views"], (far(q[0], z[1]) + far(q[1], z[0])).mean())
    similar = torch.zeros(())
    for i, j in ((0, 1), (1, 0)):
        target = ensembled(sharpened(z[j], 0.2).softmax(-1), emb[j], 0.3, method.nearness)
        similar = similar + (target * (target.log() - sharpened(q[i], 0.2).log_softmax(-1))).sum(1).mean()
    alike(found["similar"], 2 * similar)


def test_byols_average_follows_by_its_rising_decay_and_gets_no_gradient() -> None:
    diary = Diary(SelfKDSSLCovid(decay=0.9, share=0.6, hidden=6, width=5))
    nets = Nets(student=cnn())
    run(diary, nets, pictures(), 5)
    old = diary.begins[0]["average"]
    for t, (_, told) in enumerate(diary.after_steps[:3]):
        decay = 1 - 0.1 * (1 + torch.tensor(torch.pi * t / 2).cos()) / 2
        for name, _ in nets.average.named_parameters():
            part, key = name.split(".", 1)
            source = told["student"][key] if part == "student" else told["pretext"][name]
            alike(told["average"][name], decay * old[name] + (1 - decay) * source)
        old = told["average"]
    assert same(old, diary.after_steps[-1][1]["average"])  # the task leaves it alone
    assert same(diary.after_steps[2][1]["pretext"], diary.after_steps[-1][1]["pretext"])
    assert all(p.grad is None and not p.requires_grad for p in nets.average.parameters())


def test_a_probe_moves_the_head_alone() -> None:
    for probe in (True, False):
        diary = Diary(SelfKDSSLCovid(probe=probe, hidden=6, width=5))
        run(diary, Nets(student=cnn()), pictures())
        before, end = diary.begins[1]["student"], diary.after_steps[-1][1]["student"]
        moved = {name for name in end if not torch.equal(before[name], end[name])}
        assert moved == {"head.weight", "head.bias"} if probe else "stem.weight" in moved or len(moved) > 5


def test_a_probe_says_what_the_network_would_and_needs_a_head() -> None:
    nets = Nets(student=cnn().eval())
    alike(answer(nets, "student", pictures(), probe=True), answer(nets, "student", pictures()))
    with pytest.raises(BadInput, match="`emb` and `head`"):
        answer(Nets(student=nn.Flatten()), "student", pictures(), probe=True)


def test_views_are_boxes_of_the_part_that_is_asked_for() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(500, 1, 64, 64).contiguous()
    for low, high in ((0.05, 0.4), (0.4, 1.0)):
        torch.manual_seed(0)
        across = cut(ramp, (low, high), ())
        torch.manual_seed(0)
        down = cut(ramp.mT.contiguous(), (low, high), ())
        width = (across[:, 0, 0].amax(1) - across[:, 0, 0].amin(1)) / 2
        height = (down[:, 0, :, 0].amax(1) - down[:, 0, :, 0].amin(1)) / 2
        area = width * height
        assert low - 0.03 < area.min() and area.max() < high + 0.03
        assert area.max() - area.min() > 0.7 * (high - low)


# ---- mokd


def test_dinos_loss_and_centre_are_those_of_the_authors() -> None:
    given = numbers("mokd", "dino")
    student, teacher = given["student"].requires_grad_(), given["teacher"]
    centres = Centres(6)
    centres.mlp.copy_(given["centre"])
    said = Said(teacher, teacher, teacher)
    value = across_views(student, centres.taken(said, "mlp"), given["temperature"], given["teacher_temperature"]).mean()
    alike(value, given["value"])
    alike(torch.autograd.grad(value, student)[0], given["grad"], 1e-7)
    centres.update(said, given["centring"])
    alike(centres.mlp, given["centre_after"])


def renamed(theirs: dict[str, Any], names: dict[str, str], drop: tuple[str, ...] = ()) -> State:
    """The authors' weights under our names."""
    out = {}
    for key, value in theirs.items():
        for old, new in names.items():
            key = key.replace(old, new)
        if key not in drop:
            out[key] = torch.tensor(value, dtype=torch.float64)
    return out


def transformer(theirs: dict[str, Any], width: int, places: int) -> TransformerHead:
    names = {
        "patch_embed": "enter",
        "pos_embed": "places",
        "attn.qkv.": "self_attn.in_proj_",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc": "linear",
        "last_layer.weight_v": "prototypes.weight",
    }
    weights = renamed(theirs, names, ("last_layer.weight_g",))
    head = TransformerHead(width, places, 4, 2, 2, 6)
    assert weights.keys() == head.state_dict().keys()
    head.load_state_dict({k: v.view_as(head.state_dict()[k]) for k, v in weights.items()})
    return head


def test_the_mlp_head_is_that_of_the_authors() -> None:
    given = vector("mokd", "mlp")
    head = MLPHead(5, 7, 3, 6)
    names = {"mlp.": "layers.", "last_layer.weight_v": "prototypes.weight"}
    head.load_state_dict(renamed(given["state"], names, ("last_layer.weight_g",)))
    alike(head(torch.tensor(given["emb"])), given["value"])


def test_transformer_heads_and_what_they_find_are_those_of_the_authors() -> None:
    given = vector("mokd", "heads")
    of_cnn, of_vit = transformer(given["cnn"], 3, 4), transformer(given["vit"], 4, 9)
    maps, tokens, small_maps, small_tokens = (
        torch.tensor(given[name]) for name in ("maps", "tokens", "small_maps", "small_tokens")
    )
    alike(of_cnn(maps), given["of_maps"])
    alike(of_vit(tokens), given["of_tokens"])
    alike(of_cnn.asked(small_maps), given["query_of_maps"])
    for head, feature, query, name in (
        (of_cnn, maps, of_vit.asked(small_tokens), "found_in_maps"),
        (of_vit, tokens, of_cnn.asked(small_maps), "found_in_tokens"),
    ):
        heads: Any = nn.ModuleDict({"transformer": head})
        heads.transformer = head
        found = search(heads, feature, query, 2)
        alike(found, given[name])
        assert not found.requires_grad
    wanted = numbers("mokd", "search")
    student, found = wanted["student"].requires_grad_(), torch.tensor(given["found_in_tokens"])
    value = agreement(student, found, wanted["temperature"], wanted["teacher_temperature"]).mean()
    alike(value, wanted["value"])
    alike(torch.autograd.grad(value, student)[0], wanted["grad"], 1e-7)


def test_a_view_is_not_held_against_itself() -> None:
    student, teacher = rand(3, 2, 5).requires_grad_(), rand(1, 2, 5, seed=1)
    slope = torch.autograd.grad(across_views(student, teacher, 0.1, 0.04).sum(), student)[0]
    assert slope[0].abs().max() == 0 and (slope[1:].abs().amax((1, 2)) > 0).all()


def test_the_teachers_temperature_warms_up() -> None:
    assert [round(warm(0.04, 0.08, p, 0.5), 6) for p in (0.0, 0.25, 0.5, 1.0)] == [0.04, 0.06, 0.08, 0.08]
    assert warm(0.04, 0.08, 0.0, 0.0) == 0.08


def couple() -> Nets:
    nets = Nets(student=vit())
    nets.factories["peer"] = cnn
    return nets


def alone(player: str, heads: State, net: nn.Module, batch: Batch, method: MoKD, steps: int) -> State:
    """DINO by itself, step by step: both networks are built, and one of them learns."""
    nets = couple()
    method.setup(nets, batch)
    nets.heads.load_state_dict(heads)
    head, mean_net, mean_head = nets.heads[player], copy.deepcopy(net), copy.deepcopy(nets.heads[player])
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1)
    centres = {"mlp": torch.zeros(6), "transformer": torch.zeros(6)}
    torch.manual_seed(9)
    for t in range(steps):
        areas = [method.large_area] * 2 + [method.small_area] * method.small
        views = [cut(batch["inputs"], area, method.augment) for area in areas]
        with torch.no_grad():
            aims = mean_head(mean_net(torch.cat(views[:2])), 2)
        parts = [head(net(torch.cat(some)), len(some)) for some in (views[:2], views[2:])]
        loss = torch.zeros(())
        for name in centres:
            said, aim = torch.cat([getattr(part, name) for part in parts]), getattr(aims, name)
            target = ((aim - centres[name]) / 0.04).softmax(-1)
            terms = [
                -(target[i] * (said[j] / 0.1).log_softmax(-1)).sum(-1).mean()
                for i in range(2)
                for j in range(len(views))
                if i != j
            ]
            loss = loss + sum(terms) / len(terms)
            centres[name] = 0.9 * centres[name] + 0.1 * aim.flatten(0, 1).mean(0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = rising(method.decay, t / (steps - 1))
        for mean_of, of in ((mean_net, net), (mean_head, head)):
            for mine, its in zip(mean_of.parameters(), of.parameters(), strict=True):
                mine.data.mul_(decay).add_((1 - decay) * its.data)
    return state(net)


@pytest.mark.parametrize(("player", "make"), [("student", vit), ("peer", cnn)])
def test_without_weight_each_learns_as_by_dino_alone(player: str, make: Any) -> None:
    batch = pictures()
    for weight in (0.0, 1.0):
        method = MoKD(weight=weight, share=0.75, decay=0.5, **SMALL)
        diary = Diary(method, 9)
        run(diary, couple(), batch, 4)
        found = [told[player] for p, told in diary.after_steps if p == player][2]
        wanted = alone(player, diary.begins[0]["heads"], make(), batch, method, 3)
        apart = max(float((found[k] - wanted[k]).abs().max()) for k in wanted)
        assert apart < 1e-10 if weight == 0 else apart > 1e-4


def test_each_learns_from_the_average_of_the_other_and_asks_it() -> None:
    batch, nets = pictures(), couple()
    method = MoKD(weight=0.5, **SMALL)
    method.setup(nets, batch)
    nets.centres["peer"].mlp.copy_(rand(6, scale=0.1))
    centre = nets.centres["peer"].mlp.clone()
    torch.manual_seed(2)
    losses = method.views(nets, batch, Clock(0, 10))["student"]
    found = {name: float(part) for name, part in losses.items()}
    torch.manual_seed(2)
    large = [cut(batch["inputs"], method.large_area, method.augment) for _ in range(2)]
    small = [cut(batch["inputs"], method.small_area, method.augment) for _ in range(2)]
    mine = [nets.heads["student"](nets.student(torch.cat(views)), 2) for views in (large, small)]
    its = nets.heads["peer"](nets.peer(torch.cat(large)), 2)  # the average is still a copy
    spoken = torch.cat([mine[0].mlp, mine[1].mlp])
    alike(found["cross"], 0.5 * across_views(spoken, its.mlp - centre, 0.1, 0.04).mean())
    queries = nets.heads["student"].transformer.asked(mine[1].feature).chunk(2)
    target = [nets.heads["peer"].transformer(its.feature[: len(queries[0])], query) for query in queries]
    searched = agreement(mine[1].transformer, torch.stack(target), 0.1, 0.04).mean()
    alike(found["search"], 0.5 * searched)
    alike(nets.centres["peer"].mlp, 0.9 * centre + 0.1 * its.mlp.flatten(0, 1).mean(0))


def test_averages_follow_get_no_gradient_and_are_what_the_task_begins_with() -> None:
    diary = Diary(MoKD(share=0.5, decay=0.8, **SMALL))
    nets = couple()
    run(diary, nets, pictures(), 4)
    old = diary.begins[0]["averages"]
    for (player, told), decay in zip(diary.after_steps[:4], (0.8, 0.8, 1.0, 1.0), strict=True):
        for name, _ in nets.averages.named_parameters():
            who, kind, key = name.split(".", 2)
            if who == player:
                source = told[player][key] if kind == "net" else told["heads"][f"{player}.{key}"]
                alike(told["averages"][name], decay * old[name] + (1 - decay) * source)
            else:
                assert torch.equal(told["averages"][name], old[name])
        old = told["averages"]
    for player in ("student", "peer"):
        average = {k.removeprefix(f"{player}.net."): v for k, v in old.items() if k.startswith(f"{player}.net.")}
        assert same(diary.begins[1][player], average)
    assert all(p.grad is None and not p.requires_grad for p in nets.averages.parameters())
    assert same(diary.after_steps[-1][1]["heads"], diary.after_steps[3][1]["heads"])  # dropped


def test_both_speak_before_either_is_updated() -> None:
    said = []
    for rate in (0.0, 0.5):
        plan = {"optimizers": {"student": {"sgd": {"lr": rate}}, "peer": {"sgd": {"lr": 0.1}}}}
        turns = run(MoKD(**SMALL), couple(), pictures(), 4, **plan).turns
        assert [player for _, _, player, _ in turns] == ["student", "peer"] * 4
        said.append([parts for _, _, player, parts in turns if player == "peer"])
    assert sorted(said[0][0]) == ["cross", "mlp", "search", "transformer"] and sorted(said[0][-1]) == ["ce"]
    assert said[0][0] == said[1][0] and said[0][1] != said[1][1]


def test_what_is_no_part_of_a_picture_or_of_the_steps_is_refused() -> None:
    for method in (MoKD, SelfKDSSLCovid):
        with pytest.raises(ValueError, match="`share` must be in"):
            method(share=1.0)
    with pytest.raises(ValueError, match="`small_area` must be two parts"):
        MoKD(small_area=(0.4, 0.1))
    with pytest.raises(ValueError, match="a multiple of 3 heads"):
        MoKD(heads=3)
