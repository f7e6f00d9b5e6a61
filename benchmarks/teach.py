"""Eight losses against torchdistill's: what does each cost a step in processor time and in memory?

`pip install torchdistill==1.1.5`, then `python benchmarks/teach.py` prints a table and writes
benchmarks/results/teach.json. ResNet-8 learns from ResNet-20 on 28x28 images, batch 128, fp32, one thread; both sides
read the same features, and own the same weights, banks and negatives where they own any. That value and gradient agree
is checked first. Then both take turns in short segments in one process, and a segment is compared with the mean of the
other side's before and after it: the loss alone (forward and backward, given the features), and a whole step of the
student (its forward, cross-entropy + the loss, backward). Memory is the most that was allocated at once during the
loss, above what was there before it. Waits are what makes a host wait for an accelerator: reading a value of a tensor,
or a shape that hangs on one; they are counted in one forward and backward of the loss.

torchdistill has no DKD and no OFA-KD: these two run against the papers' equations, written down below in plain torch.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from memory import memory
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.losses.attention.at import at
from limbeck.losses.contrast.crd import CRD
from limbeck.losses.features.ofa_kd import OFAKD
from limbeck.losses.features.reviewkd import ReviewKD
from limbeck.losses.logits.dist import dist
from limbeck.losses.logits.dkd import dkd
from limbeck.losses.logits.kd import kd
from limbeck.losses.relations.rkd import rkd
from limbeck.zoo.resnet import resnet

ROOT = Path(__file__).resolve().parent.parent
VERSION = "1.1.5"
BEGIN, END = "<!-- teach -->\n", "<!-- end of teach -->\n"
BAR = 1.0
SIDE, CLASSES, TEMPERATURE, EXAMPLES, WIDTH = 28, 10, 4.0, 50_000, 128
ALPHA, BETA = 1.0, 8.0  # of DKD
OUT = {"io": "output"}
# What reads a value of a tensor on the host: from Python, and inside an operation whose result hangs on one.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "multinomial", "_unique2", "unique_dim", "equal"}
Have = dict[str, Any]
Loss = Callable[[Have], Tensor]


@dataclass
class Case:
    """One method on both sides; `asks` are what it reads of the student, `owns` the weights of either side."""

    mine: Loss
    theirs: Loss
    against: str
    asks: tuple[str, ...]
    owns: tuple[nn.Module, nn.Module] = field(default_factory=lambda: (nn.Identity(), nn.Identity()))


# ---------------------------------------------------------------- the cases


def setting(batch: int, negatives: int) -> tuple[nn.Module, Have]:
    """The student, and everything that losses read: both networks' outputs, labels, index and negatives."""
    torch.manual_seed(0)
    teacher = resnet(classes=CLASSES, channels=1, depth=20).eval().requires_grad_(False)
    student = resnet(classes=CLASSES, channels=1, depth=8).train()
    inputs = torch.randn(batch, 1, SIDE, SIDE)
    have: Have = {"inputs": inputs, "labels": torch.randint(CLASSES, (batch,))}
    have["index"] = torch.randperm(EXAMPLES)[:batch]
    skip = torch.rand(batch, EXAMPLES - 1).topk(negatives).indices
    have["negatives"] = skip + (skip >= have["index"].unsqueeze(1))
    have["places"] = torch.cat([have["index"].unsqueeze(1), have["negatives"]], 1)
    for who, net in {"teacher": teacher, "student": student}.items():
        with torch.no_grad():
            said = net(inputs)
        have |= {f"{who}_{name}": said[name] for name in ("logits", "feats", "emb")}
    return student, have


def cases(have: Have) -> dict[str, Case]:
    losses = torchdistill("losses.mid_level")
    wrapper = torchdistill("models.wrapper")
    logits = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in {"path": "logits", "io": "output"}.items()
    }
    found: dict[str, Case] = {}

    soft = losses.KDLoss(**logits, temperature=TEMPERATURE, beta=1.0)  # without labels it leaves out T^2
    found["kd"] = Case(
        lambda h: kd(h["student_logits"], h["teacher_logits"], temperature=TEMPERATURE).mean(),
        lambda h: TEMPERATURE**2 * soft(said(h, "student", "logits"), said(h, "teacher", "logits")),
        "KDLoss",
        ("student_logits",),
    )
    found["dkd"] = Case(
        lambda h: dkd(h["student_logits"], h["teacher_logits"], h["labels"], alpha=ALPHA, beta=BETA).mean(),
        lambda h: dkd_by_hand(h["student_logits"], h["teacher_logits"], h["labels"]),
        "by hand",
        ("student_logits",),
    )
    correlated = losses.DISTLoss(**logits)
    found["dist"] = Case(
        lambda h: dist(h["student_logits"], h["teacher_logits"]),
        lambda h: correlated(said(h, "student", "logits"), said(h, "teacher", "logits")),
        "DISTLoss",
        ("student_logits",),
    )
    related = losses.RKDLoss("emb", "emb", 25.0, 50.0, "mean")
    found["rkd"] = Case(
        lambda h: rkd(h["student_emb"], h["teacher_emb"], distance_weight=25.0, angle_weight=50.0),
        lambda h: related(said(h, "student", "emb"), said(h, "teacher", "emb")),
        "RKDLoss",
        ("student_emb",),
    )
    levels = range(len(have["student_feats"]))
    looks = losses.ATLoss(
        {str(i): {who: OUT | {"path": f"feats.{i}"} for who in ("student", "teacher")} for i in levels}
    )
    found["at"] = Case(
        lambda h: at(h["student_feats"], h["teacher_feats"]).mean(),
        lambda h: looks(said(h, "student", "feats"), said(h, "teacher", "feats")),
        "ATLoss",
        ("student_feats",),
    )
    found["crd"] = contrast(have, losses, wrapper)
    found["reviewkd"] = review(have, losses, wrapper)
    found["ofa_kd"] = one_for_all(have)
    return found


def contrast(have: Have, losses: Any, wrapper: Any) -> Case:
    """CRD with given negatives: torchdistill takes them from the data set, its own draw reads what is not there."""
    mine = CRD(
        tuple(have["student_emb"].shape), tuple(have["teacher_emb"].shape), (EXAMPLES,), width=WIDTH, temperature=0.07
    )
    count = have["negatives"].shape[1]
    theirs: Any = nn.Module()
    theirs.nce = losses.CRDLoss("norm", "empty", "norm", WIDTH, EXAMPLES, count, EXAMPLES, temperature=0.07)
    theirs.student, theirs.teacher = (
        wrapper.Normalizer4CRD(copy.deepcopy(embed)) for embed in (mine.student_embed, mine.teacher_embed)
    )
    theirs.nce.memory_v1.copy_(mine.student_bank)
    theirs.nce.memory_v2.copy_(mine.teacher_bank)

    def loss(h: Have) -> Tensor:
        sets = {"input": {"pos_idx": h["index"], "contrast_idx": h["places"]}}
        student = {"norm": {"output": theirs.student(h["student_emb"])}, "empty": sets}
        value: Tensor = theirs.nce(student, {"norm": {"output": theirs.teacher(h["teacher_emb"])}})
        return value.squeeze()

    return Case(
        lambda h: mine(h["student_emb"], h["teacher_emb"], h["index"], negatives=h["negatives"]).mean(),
        loss,
        "CRDLoss",
        ("student_emb",),
        (mine, theirs),
    )


def review(have: Have, losses: Any, wrapper: Any) -> Case:
    shapes = [[tuple(f.shape) for f in have[f"{who}_feats"]] for who in ("student", "teacher")]
    mine = ReviewKD(*shapes)
    students, teachers = ([s[1] for s in side] + [side[-1][1]] for side in shapes)
    names = [*(f"feats.{i}" for i in range(len(shapes[0]))), "pooled"]
    widths = zip(names, students, teachers, strict=True)
    middle = students[-1]
    fusions = [
        OUT | {"path": name, "kwargs": {"in_channels": s, "mid_channels": middle, "out_channels": t}}
        for name, s, t in widths
    ]
    sizes = [1, *(s[2] for s in reversed(shapes[0]))]
    theirs = wrapper.Student4KnowledgeReview(nn.Identity(), fusions, torch.device("cpu"), [], False, sizes)
    blocks: Any = reversed(mine.blocks)
    for ours, other in zip(blocks, theirs.abf_modules, strict=True):
        other.conv1.load_state_dict(ours.enter.state_dict())
        other.conv2.load_state_dict(ours.leave.state_dict())
        if ours.gates is not None:
            other.attention_conv[0].load_state_dict(ours.gates.state_dict())
    fused: dict[str, dict[str, Any]] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda module, given, output: fused.update({name: {"output": output}})

    contexts = []
    for name, module in zip(reversed(names), theirs.abf_modules, strict=True):
        module.register_forward_hook(remember(name))
        contexts.append(losses.HierarchicalContextLoss(name, "output", name, "output"))

    def loss(h: Have) -> Tensor:
        student, teacher = said(h, "student", "feats"), said(h, "teacher", "feats")
        for side in (student, teacher):
            side["pooled"] = {"output": F.adaptive_avg_pool2d(side[names[-2]]["output"], 1)}
        theirs.secondary_forward(student)
        total = sum(context(fused, teacher) for context in contexts)
        fused.clear()
        assert isinstance(total, Tensor)
        return total

    return Case(
        lambda h: mine(h["student_feats"], h["teacher_feats"]).mean(),
        loss,
        "HierarchicalContextLoss",
        ("student_feats",),
        (mine, theirs),
    )


def one_for_all(have: Have) -> Case:
    """OFA-KD; both sides have the same exits, so that what differs is the loss on what they say."""
    mine = OFAKD([tuple(f.shape) for f in have["student_feats"]], tuple(have["teacher_logits"].shape))
    theirs = copy.deepcopy(mine.exits)
    return Case(
        lambda h: mine(h["student_logits"], h["student_feats"], h["teacher_logits"], h["labels"]).mean(),
        lambda h: ofa_by_hand(
            [h["student_logits"], *(leave(f) for leave, f in zip(theirs, h["student_feats"], strict=True))],
            h["teacher_logits"],
            h["labels"],
        ),
        "by hand",
        ("student_logits", "student_feats"),
        (mine, theirs),
    )


def dkd_by_hand(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Zhao et al. 2022, eq. 7: the label against the rest, and the rest among themselves."""
    label = F.one_hot(labels, student.shape[1]).to(student)
    p, q = (F.softmax(z / TEMPERATURE, 1) for z in (teacher, student))
    p_label, q_label = ((x * label).sum(1) for x in (p, q))
    p_two, q_two = (torch.stack([x, 1 - x], 1) for x in (p_label, q_label))
    first = F.kl_div(q_two.log(), p_two, reduction="batchmean")
    p_rest = F.softmax(teacher / TEMPERATURE - 1000 * label, 1)
    q_rest = F.log_softmax(student / TEMPERATURE - 1000 * label, 1)
    return TEMPERATURE**2 * (ALPHA * first + BETA * F.kl_div(q_rest, p_rest, reduction="batchmean"))


def ofa_by_hand(exits: list[Tensor], teacher: Tensor, labels: Tensor, gamma: float = 1.0) -> Tensor:
    """Hao et al. 2023, eq. 7, at temperature 1, summed over the output and the exits."""
    label = F.one_hot(labels, teacher.shape[1]).to(teacher)
    weights = (F.softmax(teacher, 1) + label) ** gamma - label
    return torch.stack([-(weights * F.log_softmax(z, 1)).sum(1).mean() for z in exits]).sum()


def said(have: Have, who: str, what: str) -> dict[str, dict[str, Any]]:
    """Outputs in the form in which torchdistill's losses read them."""
    value = have[f"{who}_{what}"]
    if isinstance(value, list):
        return {f"{what}.{i}": {"output": v} for i, v in enumerate(value)}
    return {what: {"output": value}}


def torchdistill(module: str) -> Any:
    try:
        return importlib.import_module(f"torchdistill.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torchdistill":
            raise
        raise SystemExit(f"this benchmark compares with torchdistill: pip install torchdistill=={VERSION}") from error


# ---------------------------------------------------------------- what is measured


def given(have: Have, asks: tuple[str, ...]) -> tuple[Have, list[Tensor]]:
    """Fresh leaves in the place of what the student said, and all of them."""
    leaves: list[Tensor] = []

    def fresh(x: Tensor) -> Tensor:
        leaves.append(x.detach().clone().requires_grad_())
        return leaves[-1]

    new = {n: [fresh(x) for x in have[n]] if isinstance(have[n], list) else fresh(have[n]) for n in asks}
    return have | new, leaves


def once(loss: Loss, have: Have, leaves: list[Tensor]) -> None:
    """Forward and backward of the loss; gradients are dropped, as before each step."""
    loss(have).backward()
    for leaf in leaves:
        leaf.grad = None


def step(loss: Loss, have: Have, student: nn.Module, owned: list[Tensor]) -> None:
    """Forward, cross-entropy + loss, backward."""
    now = {f"student_{k}": v for k, v in student(have["inputs"]).items()}
    (F.cross_entropy(now["student_logits"], have["labels"]) + loss(have | now)).backward()
    for weight in owned:
        weight.grad = None


def apart(case: Case, have: Have) -> dict[str, float]:
    """Relative distance of the two values and of the two gradients to what the student said."""
    values, grads = [], []
    for loss in (case.mine, case.theirs):
        now, leaves = given(have, case.asks)
        value = loss(now)
        values.append(float(value.detach()))
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)]))
    mine, theirs = grads
    return {
        "value": abs(values[0] - values[1]) / abs(values[1]),
        "gradient": float((mine - theirs).norm() / theirs.norm()),
    }


class Waiting(TorchDispatchMode):
    """Counts operations that make the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.count += masks or name in WAITS
        return func(*args, **(kwargs or {}))


@contextmanager
def reading() -> Iterator[dict[str, int]]:
    """Counts calls from Python that bring a tensor's value to the host."""
    counts: dict[str, int] = {}

    def counted(name: str) -> Callable[..., Any]:
        plain = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return plain(self, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in READS:
            stack.enter_context(patch.object(Tensor, name, counted(name)))
        yield counts


def waits(run: Callable[[], None]) -> dict[str, Any]:
    """How often `run` reads a value: calls from Python by name, and operations (an `item` is one of each)."""
    with reading() as calls, Waiting() as mode:
        run()
    return {"calls": calls, "operations": mode.count}


def alternate(mine: Callable[[], None], theirs: Callable[[], None], pairs: int, segment: float) -> dict[str, Any]:
    """Both in turns for segments of about `segment` processor seconds, and at least one run."""
    both = {"limbeck": mine, "other": theirs}
    each = {}
    for name, run in both.items():
        run()
        began = time.process_time()
        run()
        each[name] = max(1, round(segment / max(time.process_time() - began, 1e-5)))
    times: dict[str, list[float]] = {"limbeck": [], "other": []}
    for name in ["other", *["limbeck", "other"] * pairs]:
        run, count = both[name], each[name]
        began = time.process_time()
        for _ in range(count):
            run()
        times[name].append((time.process_time() - began) / count)
    ours, others = times["limbeck"], times["other"]
    ratios = [m / ((before + after) / 2) for m, before, after in zip(ours, others, others[1:], strict=False)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "median_ratio_of_pairs": middle,
        "quartiles_of_pairs": [low, high],
        "pairs": ratios,
        "seconds": {name: statistics.median(t) for name, t in times.items()},
    }


def measure(case: Case, have: Have, student: nn.Module, pairs: int, segment: float) -> dict[str, Any]:
    far = apart(case, have)
    now, leaves = given(have, case.asks)
    ways = {"limbeck": (case.mine, case.owns[0]), "other": (case.theirs, case.owns[1])}
    alone: dict[str, Callable[[], None]] = {}
    whole: dict[str, Callable[[], None]] = {}
    for name, (loss, owns) in ways.items():
        held: list[Tensor] = list(owns.parameters())
        alone[name] = lambda loss=loss, held=held: once(loss, now, [*leaves, *held])  # type: ignore[misc]
        whole[name] = lambda loss=loss, held=held: step(  # type: ignore[misc]
            loss, have, student, [*student.parameters(), *held]
        )
    for run in alone.values():
        run()
    found: dict[str, Any] = {
        "against": case.against,
        "apart": far,
        "waits": {name: waits(run) for name, run in alone.items()},
        "peak_bytes": {name: memory(run) for name, run in alone.items()},
        "alone": alternate(alone["limbeck"], alone["other"], pairs, segment),
        "step": alternate(whole["limbeck"], whole["other"], pairs, 0.0),
    }
    share = found["alone"]["seconds"]["other"] / found["step"]["seconds"]["other"]
    found["step"]["ratio_by_the_loss"] = 1 + (found["alone"]["median_ratio_of_pairs"] - 1) * share
    return found


def line(name: str, found: dict[str, Any]) -> str:
    cells = [f"{name:<9}{found['against']:<24}"]
    for what, digits in (("alone", 2), ("step", 1)):
        part = found[what]
        low, high = part["quartiles_of_pairs"]
        mine, theirs = (1000 * part["seconds"][way] for way in ("limbeck", "other"))
        cells.append(
            f"{mine:>9.{digits}f} {theirs:>9.{digits}f} {part['median_ratio_of_pairs']:>6.3f}x {low:.3f}-{high:.3f}"
        )
    mine, theirs = (found["peak_bytes"][way] / 2**20 for way in ("limbeck", "other"))
    ours, others = (found["waits"][way]["operations"] for way in ("limbeck", "other"))
    return "  ".join([*cells, f"{mine:>8.2f} {theirs:>8.2f} {mine / theirs:>6.2f}x", f"{ours:>3} {others:>3}"])


def rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """The table of the README."""
    yield ["loss", "against", "alone", "a whole step, quartiles", "step by the loss", "peak memory", "waits"]
    yield ["---"] * 7
    for name, found in result["methods"].items():
        times = []
        for what in ("alone", "step"):
            mine, theirs = (f"{1000 * found[what]['seconds'][way]:.3g}" for way in ("limbeck", "other"))
            times.append(f"{found[what]['median_ratio_of_pairs']:.2f}x ({mine} and {theirs} ms)")
        low, high = found["step"]["quartiles_of_pairs"]
        mine, theirs = (found["peak_bytes"][way] / 2**20 for way in ("limbeck", "other"))
        ours, others = (found["waits"][way]["operations"] for way in ("limbeck", "other"))
        memory = f"{mine / theirs:.2f}x ({mine:.3g} and {theirs:.3g} MiB)"
        step = f"{times[1]}, {low:.2f} to {high:.2f}"
        by = f"{found['step']['ratio_by_the_loss']:.3f}x"
        yield [f"`{name}`", found["against"], times[0], step, by, memory, f"{ours} and {others}"]


def publish(result: dict[str, Any]) -> None:
    page = ROOT / "benchmarks" / "README.md"
    before, rest = page.read_text().split(BEGIN)
    versions = (
        f"\nWith torch {result['torch']} and Python {result['python']}, {result['setting']['pairs']} pairs each; load "
        f"average {result['load']:.1f} on {result['processors']} processors.\n"
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows(result))
    page.write_text(before + BEGIN + table + "\n" + versions + END + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="segments of each side that count")
    parser.add_argument("--segment", type=float, default=0.04, help="processor seconds of a segment of a loss alone")
    parser.add_argument("--batch", type=int, default=128, help="examples a step")
    parser.add_argument("--negatives", type=int, default=4096, help="of crd, of 50,000 examples")
    parser.add_argument("--only", nargs="*", default=[], help="these methods; writes nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "teach.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    student, have = setting(args.batch, args.negatives)
    found: dict[str, Any] = {}
    methods = cases(have)
    print(f"{'':<33}{'the loss alone, ms':^39}  {'a whole step, ms':^39}  {'peak, MiB':^25}  waits")
    for name, case in methods.items():
        if args.only and name not in args.only:
            continue
        found[name] = measure(case, have, student, args.pairs, args.segment)
        print(line(name, found[name]), flush=True)
        far = found[name]["apart"]
        if far["value"] > 1e-3 or far["gradient"] > 1e-2:
            raise SystemExit(f"{name}: the two sides do different work, they are {far} apart")
        if name == "crd":
            given_none = have | {"negatives": None}
            found[name]["waits"]["own draw"] = waits(
                lambda case=case, h=given_none: case.owns[0](  # type: ignore[misc]
                    h["student_emb"], h["teacher_emb"], h["index"], h["labels"]
                )
            )
            print(f"{'':<9}drawing its negatives itself, with labels: {found[name]['waits']['own draw']}")
    if args.only:
        return
    slow = [name for name, f in found.items() if round(f["step"]["median_ratio_of_pairs"], 2) > BAR]
    ours = {name: [w for way, w in f["waits"].items() if way != "other"] for name, f in found.items()}
    waiting = [name for name, seen in ours.items() if any(w["operations"] or w["calls"] for w in seen)]
    result = {
        "methods": found,
        "bar": BAR,
        "slower": slow,
        "waiting": waiting,
        "setting": {"pairs": args.pairs, "batch": args.batch, "negatives": args.negatives, "threads": 1},
        "load": os.getloadavg()[2],
        "processors": os.cpu_count(),
        "torchdistill": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(f"a step takes at most {BAR:.2f}x: {'NOT held by ' + ', '.join(slow) if slow else 'held by all'}")
    print(f"no loss waits for a value: {'NOT held by ' + ', '.join(waiting) if waiting else 'held by all'}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    publish(result)
    if slow or waiting:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
