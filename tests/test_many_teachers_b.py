"""What the catalogue promises of several teachers: those with words of their own, and those that see less and less."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.adapters import files
from limbeck.adapters.pairing import retell
from limbeck.core.batches import Batches, Splits
from limbeck.core.dropping import block_at, distinct, losing, redundancy, relations_at
from limbeck.core.errors import BadInput
from limbeck.core.fusion import NOBODY, best, cost, heard, partners, pooled, reworded, top_logits
from limbeck.core.loop import Clock, Plan, fit
from limbeck.core.masked import draw, only
from limbeck.core.maths import log_probs
from limbeck.core.merging import average
from limbeck.core.nets import Nets
from limbeck.core.reduce import Part, mean
from limbeck.core.teachers import read_by
from limbeck.losses.logits.ce import ce
from limbeck.losses.tokens.infifusion import infifusion
from limbeck.losses.tokens.mined import mined
from limbeck.losses.tokens.uld import uld
from limbeck.train.many.fusellm import FuseLLM, fuse
from limbeck.train.many.pairwise_fusion import PairwiseFusion
from limbeck.train.many.unified_fusion import UnifiedFusion
from limbeck.train.masked.hybrid_distill import HybridDistill, features_apart
from limbeck.zoo.nets import build
from tests.networks import Speaker
from tests.numbers import FP64, close, grad, rand, vector

pytestmark = pytest.mark.usefixtures("one_thread")

CLOCK = Clock(0, 1)
TEXT = "the cats sat on the mats; then other cats sat there, and the dog sat on them. naïve café. " * 40


class Told(nn.Module):
    """Says what it was made with."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits


def loss(method: Any, nets: Nets, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Part]]:
    """The sum of the parts of the one turn of a step, and the parts."""
    ((_, parts),) = method.step(nets, batch, CLOCK)
    return sum((p.value for p in parts.values()), start=torch.tensor(0.0)), parts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """A text in three tokenizers: the student's, and those of two teachers."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    other = {"name": str(path), "kind": "language", "tokenizer": "bpe:290"}
    plain = {"name": str(path), "kind": "language", "length": 24, "tokenizer": "bpe:275"}
    return files.load({**plain, "retold": ["bytes", other]})


def speakers(**other: nn.Module) -> Nets:
    """A student of 275 words, and teachers of 257 and 290."""
    teachers = nn.ModuleList([Speaker(1, 257, spread=3.0), Speaker(2, 290, spread=3.0)])
    return Nets(student=Speaker(0, 275), teachers=teachers, **other)


# ---------------------------------------------------------------- several tokenizers in a batch


def test_each_teacher_reads_the_text_in_its_own_tokens(texts: Splits) -> None:
    batch = next(Batches(texts.train, 4, seed=0))
    plain = {k: v for k, v in texts.train.columns.items() if not k.startswith("teachers.")}
    for k, tokenizer in enumerate(("bytes", "bpe:290")):
        seen = read_by(f"teachers.{k}", batch)
        words = files.words.make(tokenizer, [TEXT[: int(0.8 * len(TEXT))]], size=512, language=True)
        both, _ = retell(type(texts.train)(plain, "tokens", tokenizer=texts.train.tokenizer), words)
        for name in ("teacher_inputs", "teacher_labels", "teacher_mask", "teacher_spans", "student_spans"):
            assert torch.equal(seen[name], both.columns[name][batch["index"]]), (k, name)
        assert seen["nearest_words"].shape == (words.size,)
        assert not any(name.startswith("teachers.") for name in seen)
    assert "teacher_inputs" not in batch and not any("." in name for name in texts.test.columns)
    assert torch.equal(read_by("teachers.7", batch)["inputs"], batch["inputs"])


def test_a_teacher_without_tokens_of_its_own_reads_those_of_the_student() -> None:
    batch = {"inputs": torch.zeros(1, 2), "teachers.0.teacher_inputs": torch.ones(1, 3)}
    assert set(read_by("teachers.1", batch)) == {"inputs"}
    assert set(read_by("teachers.0", batch)) == {"inputs", "teacher_inputs"}


def test_only_texts_are_retold(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="`retold` is of texts"):
        files.load({"name": "fashion_mnist_small", "size": 4, "limit": 10, "retold": ["bytes"]})


def test_who_says_what_is_asked_by_name(texts: Splits) -> None:
    nets = speakers()
    batch = next(Batches(texts.train, 4, seed=0))
    for k, told in enumerate(heard(nets, batch, "here")):
        wanted = nets.teachers[k](batch[f"teachers.{k}.teacher_inputs"])
        assert torch.equal(told["teacher_logits"], wanted) and not told["teacher_logits"].requires_grad
    with pytest.raises(BadInput, match="here needs nets.teachers"):
        heard(Nets(student=nets.student), batch, "here")


def test_a_text_costs_as_many_nats_whatever_its_tokens_are() -> None:
    # 3 tokens of the student and 2 of the teacher, in two stretches; the third place of the teacher is no text of ours
    logits = rand(1, 3, 5, seed=3)
    labels = torch.tensor([[1, 4, 2]])
    batch = {"labels": torch.zeros(1, 3, dtype=torch.long), "teacher_inputs": labels, "teacher_labels": labels}
    batch |= {"student_spans": torch.tensor([[0, 0, 1]]), "teacher_spans": torch.tensor([[0, 1, -1]])}
    nats = -logits.log_softmax(-1)[0, [0, 1], [1, 4]]
    close(cost(logits, batch), nats.sum()[None] / 3)
    batch["teacher_mask"] = torch.tensor([[True, False, True]])  # then the second stretch does not count
    close(cost(logits, batch), nats[:1] / 2)
    assert cost(logits, batch | {"student_spans": torch.full((1, 3), -1)}).isinf().all()
    plain = {"labels": labels, "mask": torch.tensor([[True, True, False]])}
    close(cost(logits, plain), nats.mean()[None])


# ---------------------------------------------------------------- fusellm


def test_fusion_as_its_authors_code_does_it() -> None:
    told = vector("fusellm", "fused")
    given = {k: torch.tensor(v, dtype=torch.long if k == "labels" else FP64) for k, v in told["inputs"].items()}
    batch = {"inputs": torch.zeros(4, 3), "labels": given["labels"], "mask": given["mask"].bool()}
    for fusion in ("min_ce", "avg_ce"):
        nets = Nets(student=Told(given["own"]), teachers=nn.ModuleList([Told(s) for s in given["sources"]]))
        method = FuseLLM(fusion=fusion, **told["knobs"])
        method.setup(nets, batch)
        nets.student = Told(given["student"])
        value, _ = loss(method, nets, batch)
        close(value, told[fusion]["value"], 1e-9)
        close(torch.autograd.grad(value, nets.student.logits)[0], torch.tensor(told[fusion]["grad"], dtype=FP64), 1e-9)
    close(cost(given["own"], batch), torch.tensor(told["costs"], dtype=FP64)[0])


def test_words_go_where_the_authors_code_puts_them() -> None:
    told = vector("fusellm", "reworded")
    z = top_logits(torch.tensor(told["logits"], dtype=FP64), told["top"])
    mine = reworded(z, torch.tensor(told["nearest_words"]), told["words"])
    for place, theirs in told["places"].items():
        logits, words = told["value"][place]
        wanted = torch.full((told["words"],), NOBODY, dtype=FP64).scatter(
            0, torch.tensor(words), torch.tensor(logits, dtype=FP64)
        )
        close(mine[theirs], wanted)


def test_min_ce_picks_the_source_that_costs_a_text_least() -> None:
    matrices, costs = rand(3, 5, 2, 4).softmax(-1), rand(3, 5, seed=1).abs()
    picked = fuse(matrices, costs, "min_ce")
    for b in range(5):
        close(picked[b], matrices[min(range(3), key=lambda m: costs[m, b]), b])
    weights = torch.softmax(torch.exp(-costs), 0)
    close(fuse(matrices, costs, "avg_ce"), torch.einsum("mb,mbtv->btv", weights, matrices))


@pytest.mark.parametrize("fusion", ["min_ce", "avg_ce"])
def test_rows_of_what_is_fused_sum_to_one(texts: Splits, fusion: Any) -> None:
    nets, batch = speakers(), next(Batches(texts.train, 6, seed=0))
    method = FuseLLM(fusion=fusion, top=5)
    method.setup(nets, batch)
    target = method.fused(nets, batch, 275)
    assert target.shape == (6, 24, 275) and (target >= 0).all()
    close(target.sum(-1), torch.ones(6, 24), 1e-5)
    assert (target > 0).sum(-1).max() <= (5 if fusion == "min_ce" else 15)


def test_with_all_weight_on_labels_it_is_continued_training(texts: Splits) -> None:
    nets, batch = speakers(), next(Batches(texts.train, 6, seed=0))
    method = FuseLLM(weight=1.0)
    method.setup(nets, batch)
    value, parts = loss(method, nets, batch)
    assert list(parts) == ["labels"]
    close(value, mean(ce(nets.student(batch["inputs"]), batch["labels"]), batch["mask"]).value)


def test_one_source_alone_is_mined_up_to_the_teachers_entropy(texts: Splits) -> None:
    nets, batch = speakers(), next(Batches(texts.train, 6, seed=0))
    method = FuseLLM(weight=0.0, own=False, top=10**6)
    told = heard(nets, batch, "here")[1]
    target = method.matrix(told, 275)
    z = nets.student(batch["inputs"])
    names = ("labels", "student_spans", "teacher_spans", "nearest_words")
    wanted = mined(z, told["teacher_logits"], *[told[n] for n in names], told["mask"], told["teacher_mask"])
    entropy = torch.special.entr(target).sum(-1)
    close(-(target * log_probs(z)).sum(-1) - entropy, wanted, 1e-4)
    alike, _ = partners(told["student_spans"], told["teacher_spans"], told["mask"], told["teacher_mask"])
    assert 0.3 < alike.float().mean() < 1  # both kinds of places are there


def test_the_student_as_it_was_speaks_for_itself(texts: Splits) -> None:
    nets, batch = speakers(), next(Batches(texts.train, 6, seed=0))
    method = FuseLLM(weight=0.0)
    method.setup(nets, batch)
    start = {k: v.clone() for k, v in nets.teacher_own.state_dict().items()}
    fit(method, nets, Batches(texts.train, 6, seed=0), Plan(3, optimizer={"adam": {"lr": 0.1}}))
    assert all(torch.equal(v, start[k]) for k, v in nets.teacher_own.state_dict().items())
    assert not all(torch.equal(v, start[k]) for k, v in nets.student.state_dict().items())


def test_other_words_without_alignment_are_refused() -> None:
    nets = Nets(student=Told(rand(2, 3, 5)), teachers=nn.ModuleList([Told(rand(2, 3, 7))]))
    batch = {"inputs": torch.zeros(2, 3), "labels": torch.zeros(2, 3, dtype=torch.long)}
    with pytest.raises(BadInput, match="knows 7 words and the student 5: add `retold`"):
        FuseLLM().setup(nets, batch)


# ---------------------------------------------------------------- infifusion


def test_scale_and_shift_of_logits_do_not_matter() -> None:
    z = rand(2, 3, 9)
    assert infifusion(2.5 * z[..., :7] - 4, z[..., :7], top=4).abs().max() < 1e-6
    assert infifusion(2.5 * z[..., :7] - 4, z[..., :7], top=4, standardize=False).min() > 1e-2


def test_neither_order_of_words_matters() -> None:
    mine, its = rand(2, 3, 9), rand(2, 4, 7, seed=1)
    value = infifusion(mine, its, top=4)
    close(infifusion(mine[..., torch.randperm(9)], its, top=4), value)
    close(infifusion(mine, its[..., torch.randperm(7)], top=4), value)


def test_with_all_words_as_they_are_it_is_uld() -> None:
    mine, its = rand(2, 3, 9), rand(2, 4, 7, seed=1)
    masks = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool(), torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0]]).bool()
    close(infifusion(mine, its, *masks, top=9, standardize=False), uld(mine, its, *masks))
    close(
        grad(lambda z: infifusion(z, its, *masks, top=9, standardize=False, temperature=2.0), mine),
        grad(lambda z: uld(z, its, *masks, temperature=2.0), mine),
    )


def test_unified_fusion_is_the_mean_over_sources(texts: Splits) -> None:
    nets, batch = speakers(), next(Batches(texts.train, 6, seed=0))
    method = UnifiedFusion(match=("ce", {"infifusion": {"top": 5, "weight": 0.5}}))
    method.setup(nets, batch)
    _, parts = loss(method, nets, batch)
    z, sources = nets.student(batch["inputs"]), heard(nets, batch, "here")
    each = [infifusion(z, s["teacher_logits"], s["mask"], s["teacher_mask"], top=5) for s in sources]
    close(parts["infifusion"].value, 0.5 * torch.stack([mean(v, batch["mask"]).value for v in each]).mean(), 1e-5)
    close(parts["ce"].value, mean(ce(z, batch["labels"]), batch["mask"]).value, 1e-6)


def test_unified_fusion_may_ask_the_best_source_of_each_text(texts: Splits) -> None:
    nets, batch = speakers(), next(Batches(texts.train, 6, seed=0))
    nets.teachers[1] = Speaker(5, 290, spread=0.1)
    nets.freeze("teachers")
    method = UnifiedFusion(match=({"infifusion": {"top": 5}},), choose="best")
    method.setup(nets, batch)
    value, _ = loss(method, nets, batch)
    z, sources = nets.student(batch["inputs"]), heard(nets, batch, "here")
    each = torch.stack([infifusion(z, s["teacher_logits"], s["mask"], s["teacher_mask"], top=5) for s in sources])
    costs = torch.stack([cost(s["teacher_logits"], s) for s in sources])
    wanted = each[costs.argmin(0), torch.arange(6)]
    close(value, mean(wanted, batch["mask"]).value, 1e-5)
    assert abs(float(value.detach() - mean(each[0].detach(), batch["mask"]).value)) > 1e-3  # not all from one


def test_masks_of_the_best_part_the_texts_among_sources() -> None:
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    first, second = best(torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, torch.inf]]), mask)
    assert first.tolist() == [[True, False], [False, False], [True, True]]
    assert torch.equal(first ^ second, mask)
    parts = [0.5 * mean(torch.tensor([1.0, 2.0])), 0.5 * mean(torch.tensor([6.0]))]
    assert float(pooled(parts)) == pytest.approx(1.5)


def test_a_source_of_unified_fusion_has_weights_of_its_own(texts: Splits) -> None:
    nets, batch = speakers(), next(Batches(texts.train, 6, seed=0))
    nets.teachers = nn.ModuleList([build("tiny_lm", vocab=v).eval() for v in (257, 290)])
    nets.student = build({"net": "tiny_lm", "width": 16, "layers": 1}, vocab=275)
    method = UnifiedFusion(match=("ce", "dskd"))
    method.setup(nets, batch)
    assert {"source0", "source1"} <= set(nets.losses) and {"losses.source0", "losses.source1"} <= set(
        nets.companions["student"]
    )
    fit(method, nets, Batches(texts.train, 6, seed=0), Plan(1))


def test_pairwise_fusion_merges_what_each_source_taught(texts: Splits) -> None:
    method = PairwiseFusion(match=("ce", {"infifusion": {"top": 5}}))
    nets = speakers()
    plan = Plan(3, optimizer={"adam": {"lr": 0.01}}, log_every=1)
    played = fit(method, nets, Batches(texts.train, 6, seed=0), plan)
    assert [player for _, _, player, _ in played.turns] == ["branches.0", "branches.1"] * 3
    wanted = average({}, [b.state_dict() for b in nets.branches])
    for key, value in nets.student.state_dict().items():
        assert torch.equal(value, wanted[key])
        assert not torch.equal(nets.branches[0].state_dict()[key], nets.branches[1].state_dict()[key])
    alone = speakers()
    alone.teachers = nn.ModuleList(list(alone.teachers)[:1])  # the first copy learned from the first source alone
    fit(method, alone, Batches(texts.train, 6, seed=0), plan)
    for key, value in alone.student.state_dict().items():
        assert torch.equal(value, nets.branches[0].state_dict()[key])


# ---------------------------------------------------------------- hybrid_distill


def pictures(batch: int = 3) -> dict[str, Tensor]:
    return {"inputs": rand(batch, 1, 8, 8).float(), "labels": torch.arange(batch) % 4}


def vit(width: int, layers: int, **options: Any) -> nn.Module:
    return build(
        {"net": "vit_tiny", "width": width, "layers": layers, "patch": 2, "heads": 4, "attn": True, **options},
        classes=4, channels=1, size=8,
    )  # fmt: skip


def hybrid(**knobs: Any) -> tuple[HybridDistill, Nets, dict[str, Tensor]]:
    nets = Nets(teacher=vit(32, 4), teacher_masked=vit(24, 6), student=vit(16, 3))
    method, batch = HybridDistill(**knobs), pictures()
    method.setup(nets, batch)
    return method, nets, batch


def test_redundant_tokens_are_those_like_the_rest() -> None:
    x = rand(2, 5, 4)
    x[:, 3] = x[:, 1] * 2  # of one direction
    similar = torch.stack([F.cosine_similarity(x[:, [t]], x, dim=-1).sum(1) - 1 for t in range(5)], 1) / 4
    close(redundancy(x), similar)
    kept = distinct(x, 3)
    for b in range(2):
        assert sorted(similar[b].argsort()[:3].tolist()) == kept[b].tolist()
    assert redundancy(torch.zeros(1, 1, 3)).tolist() == [[0.0]]


def test_student_and_both_teachers_lose_the_same_tokens() -> None:
    method, nets, batch = hybrid(drops=(0.0, 0.5), keep=0.75, layers=(1.0,))
    seen: dict[str, Tensor] = {}
    places: dict[str, list[Tensor]] = {}
    for name, module in nets.modules.items():
        if name in ("student", "teacher", "teacher_masked"):
            numbers = torch.arange(16.0).view(1, 16, 1).expand(3, -1, 1)

            def mark(_m: nn.Module, inputs: tuple[Tensor], name: str = name, numbers: Tensor = numbers) -> tuple[Any]:
                seen[name] = inputs[0].detach()
                return (torch.cat([numbers.expand(3, -1, 1), inputs[0][..., 1:]], -1),)

            module.blocks[0].register_forward_pre_hook(mark)
            for block in module.blocks:  # the first channel carries a token's number through
                block.attention.out.weight.data[0].zero_()
                block.attention.out.bias.data[0] = 0
                block.down.weight.data[0].zero_()
                block.down.bias.data[0] = 0
            places[name] = []
            module.blocks[-1].register_forward_hook(
                lambda _m, _i, out, name=name: places[name].append(out[0][..., 0].detach())
            )
    method.told(nets, batch)
    left = [p[-1] for p in places.values()]
    assert all(torch.equal(left[0], other) for other in left[1:])
    assert left[0].shape == (3, 9)  # 16, 12, 9
    assert (left[0].diff(dim=1) > 0).all() and len({tuple(row) for row in left[0].tolist()}) > 1


def test_without_relations_it_is_feature_distillation_from_the_first_teacher() -> None:
    method, nets, batch = hybrid(beta=0.0, drops=())
    parts = method.hybrid(nets, batch)
    assert list(parts) == ["features"]
    mine = nets.pretext["projector"](nets.student(batch["inputs"])["feats"][-1])
    aim = nets.teacher(batch["inputs"])["feats"][-1]
    aim = (aim - aim.mean(-1, keepdim=True)) / (aim.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    far = (mine - aim).abs()
    smooth = torch.where(far < 2, far**2 / 4, far - 1)
    close(parts["features"].value, smooth.mean(), 1e-6)


def test_relations_take_heads_of_other_widths_but_as_many() -> None:
    def said(width: int, heads: int, layers: int, seed: int) -> dict[str, list[Tensor]]:
        scores = [rand(2, heads, 5, 5, seed=seed + i) for i in range(layers)]
        return {
            "attn": [s.softmax(-1) for s in scores],
            "values": [rand(2, 5, width, seed=9 + i) for i in range(layers)],
        }

    mine, its = said(8, 2, 3, 0), said(12, 2, 6, 50)
    found = relations_at(mine, its, (2 / 3,))
    wanted = torch.zeros(2, dtype=FP64)
    for h in range(2):  # block 1 of 3 meets block 3 of 6
        p, q = its["attn"][3][:, h], mine["attn"][1][:, h]
        wanted += (p * (p / q).log()).sum(-1).mean(1) / 2
        v, w = its["values"][3][..., 6 * h : 6 * h + 6], mine["values"][1][..., 4 * h : 4 * h + 4]
        r, s = (v @ v.mT / 6**0.5).softmax(-1), (w @ w.mT / 4**0.5).softmax(-1)
        wanted += (r * (r / s).log()).sum(-1).mean(1) / 2
    close(found, wanted, 1e-9)
    assert relations_at(mine, mine, (0.5, 1.0)).abs().max() < 1e-9
    with pytest.raises(BadInput, match="heads|layers have"):
        relations_at(mine, said(12, 3, 6, 50), (1.0,))


def test_layers_meet_at_equal_shares_of_the_depth_after_equal_drops() -> None:
    for count in range(1, 25):
        for i in range(1, 101):
            layer = block_at(i / 100, count)
            assert 0 <= layer < count and layer < i / 100 * count <= layer + 1 + 1e-9
            for j in range(i):  # a drop at a smaller share comes before
                assert int(j / 100 * count + 1e-9) <= layer
    with pytest.raises(BadInput, match="compare layers farther below a drop"):
        hybrid(drops=(0.5,), layers=(0.5,))


def test_a_drop_by_lot_is_what_only_does() -> None:
    net, batch = vit(16, 2), pictures()
    shown = draw(3, 16, 12, torch.device("cpu")).sort().values
    with losing(net, "blocks", (0.0,), 0.75, 16, [shown]):
        mine = net(batch["inputs"])["feats"]
    with only(net, "blocks.0", shown, 16):
        close(mine[-1], net(batch["inputs"])["feats"][-1])
    assert net(batch["inputs"])["feats"][-1].shape[1] == 16  # nothing is left behind


def test_both_teachers_pull_and_stay_still() -> None:
    method, nets, _ = hybrid(share=0.5)
    before = {n: {k: v.clone() for k, v in nets.find(n).state_dict().items()} for n in ("teacher", "teacher_masked")}
    batch = pictures(8)
    for name, value in method.hybrid(nets, batch).items():
        pulls = torch.autograd.grad(
            value.value, list(nets.student.blocks[0].parameters()), retain_graph=True, allow_unused=True
        )
        assert any(g is not None and bool(g.any()) for g in pulls), name
    table = files.Table(batch, kind="images", classes=list("abcd"))
    played = fit(method, nets, Batches(table, 4, seed=0), Plan(4, log_every=1))
    assert [sorted(parts) for _, _, _, parts in played.turns] == [["features", "relations"]] * 2 + [["ce"]] * 2
    for name, state in before.items():
        assert all(torch.equal(v, state[k]) for k, v in nets.find(name).state_dict().items())


def test_what_is_missing_is_said() -> None:
    with pytest.raises(BadInput, match="asks nets.teacher_masked"):
        HybridDistill().setup(Nets(teacher=vit(16, 2), student=vit(16, 2)), pictures())
    with pytest.raises(BadInput, match="needs `attn` and `values` of the student: `attn: true`"):
        nets = Nets(teacher=vit(16, 2), teacher_masked=vit(16, 2), student=vit(16, 2, attn=False))
        HybridDistill().setup(nets, pictures())
    nets = Nets(teacher=vit(16, 2), teacher_masked=vit(16, 2, patch=4), student=vit(16, 2))
    with pytest.raises(BadInput, match="as many patches"):
        HybridDistill().setup(nets, pictures())
    with pytest.raises(ValueError, match="beta"):
        HybridDistill(alpha=0.0, beta=0.0)


def test_a_class_token_more_is_left_out() -> None:
    mine, its = rand(2, 4, 6), rand(2, 5, 6, seed=1)
    close(features_apart(mine, its, 2.0), features_apart(mine, its[:, 1:], 2.0))
