"""Plants faults in a copy of the package and shows that the suite catches every one: `python -m tests.faults [NAME]`.

A fault is a textual replacement that must apply exactly once. The methods concerned are checked in the copy, first as
they are and then with the fault; it is caught when a check fails that passed before. A suite that cannot fail is none.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Found = dict[str, dict[str, str]]  # who was checked -> check -> what is wrong, '' for nothing
LOOP = "the loop"


@dataclass(frozen=True)
class Fault:
    """What is planted where, and who has to notice.

    file: below limbeck/. right: the text that is replaced, found exactly once. wrong: by what. by: the methods whose
    checks must catch it, LOOP for the checks of the loop, or a file of tests.
    """

    name: str
    file: str
    right: str
    wrong: str
    by: tuple[str, ...]

    def apply(self, source: str) -> str:
        """The source with the fault in it."""
        count = source.count(self.right)
        if count != 1:
            raise ValueError(f"fault {self.name!r}: {self.right!r} is found {count} times in {self.file}, not once")
        return source.replace(self.right, self.wrong)


def _fault(name: str, file: str, right: str, wrong: str, *by: str) -> Fault:
    return Fault(name, file, right, wrong, by or (Path(file).stem,))


def _faults() -> Iterator[Fault]:
    # ---- losses ------------------------------------------------------------------------------------------------------
    kd, dkd, ce = (f"losses/logits/{n}.py" for n in ("kd", "dkd", "ce"))
    yield _fault("T**2 dropped", kd, "return temperature**2 * kl(", "return kl(")
    both = "kl(student_logits, teacher_logits.detach(), temperature)"
    yield _fault("KL turned round", kd, both, "kl(teacher_logits.detach(), student_logits, temperature)")
    yield _fault("teacher not detached", kd, "teacher_logits.detach()", "teacher_logits")
    yield _fault("teacher softened twice", kd, "teacher_logits.detach()", "teacher_logits.detach() / temperature")
    yield _fault("the loss takes its own mean", kd, both, f"{both}.mean()")
    yield _fault("the loss takes its own sum", kd, both, f"{both}.sum()")
    yield _fault("forward KL turned round", "losses/logits/forward_kl.py", "* maths.kl(", "* maths.reverse_kl(")
    yield _fault("reverse KL turned round", "losses/logits/reverse_kl.py", "* maths.reverse_kl(", "* maths.kl(")
    weighed = "temperature**2 * alpha, temperature**2 * beta"
    yield _fault("T**2 dropped in dkd", dkd, weighed, "alpha, beta")
    yield _fault("alpha and beta exchanged", dkd, weighed, "temperature**2 * beta, temperature**2 * alpha")
    yield _fault("dkd's teacher not detached", dkd, "teacher_logits.detach()", "teacher_logits")
    term = "Term(divergences.forward_kl, temperature, temperature**2)"
    yield _fault("the head form forgets T**2", kd, term, "Term(divergences.forward_kl, temperature)")
    yield _fault(
        "the target's share exchanged", "losses/tokens/skew_kl.py", "alpha, temperature)", "1 - alpha, temperature)"
    )
    yield _fault("t of TAID steps back", "losses/tokens/taid.py", "(self.t + stride)", "(self.t - stride)")
    summed = "others.logsumexp(-1, keepdim=True)"
    yield _fault(
        "log of summed exponentials", "core/maths.py", summed, "others.exp().sum(-1, keepdim=True).log()", "dkd"
    )
    shared = "torch.addcmul(to_each, q[..., :classes], to_all)"
    yield _fault("the others do not feel the label's loss", "core/maths.py", shared, "to_each.clone()", "dkd")
    again = "torch.autograd.grad(plain, student, grad, create_graph=True)"
    once = "torch.autograd.grad(plain, student, grad)"
    yield _fault("dkd cannot be differentiated twice", "core/maths.py", again, once, "tests/core/test_maths.py")
    responses = "core/responses.py"
    later = "(place >= labels.unsqueeze(-1))"
    yield _fault("the label among the others", responses, later, later.replace(">=", ">"), "nkd")
    yield _fault("label smoothing ignored", ce, ", label_smoothing=label_smoothing)", ")")
    fitnets, at = "losses/features/fitnets.py", "losses/attention/at.py"
    yield _fault("the hint not detached", fitnets, "teacher_feats[self.layer].detach()", "teacher_feats[self.layer]")
    hint = "student, hint = student_feats[self.layer]"
    yield _fault("another layer than asked for", fitnets, hint, hint.replace("self.layer", "0"))
    yield _fault(
        "projector never trained",
        "core/pair.py",
        "nets.companions[self.learner] = [self.losses]",
        "pass",
        "fitnets",
    )
    yield _fault("attention squares summed, not averaged", at, ".square().mean(1)", ".square().sum(1)")
    energy = "return squares(features, 1)"
    yield _fault("attention power ignored", "core/maths.py", energy, "return features.abs().sum(1)", "at")
    yield _fault("attention of the teacher not detached", at, "t.detach()", "t")
    rkd, crd = "losses/relations/rkd.py", "losses/contrast/crd.py"
    yield _fault("mean distance counts the diagonal", rkd, "d * n * (n - 1) / d.sum()", "d * n * n / d.sum()")
    yield _fault(
        "relations of the teacher not detached",
        rkd,
        "upcast(teacher_emb).flatten(1).detach()",
        "upcast(teacher_emb).flatten(1)",
    )
    yield _fault(
        "infinite gradient at equal points", "core/maths.py", "apart = length > 0", "apart = length >= 0", "rkd"
    )
    yield _fault("memory bank is no buffer", crd, "self.register_buffer(bank, ", "setattr(self, bank, ")
    yield _fault("bank updated in eval", crd, "learning = self.training and torch.is_grad_enabled()", "learning = True")
    yield _fault("bank rows lose unit length", crd, "bank[index] = F.normalize(", "bank[index] = (")
    yield _fault("the constant Z measured anew each time", crd, "self.log_z[side] = log_z", "pass")
    yield _fault("bank keeps the graph's teacher", crd, "teacher_emb.detach()", "teacher_emb")

    # ---- core: mathematics, reduction, state -------------------------------------------------------------------------
    maths, reduce, state = (f"core/{n}.py" for n in ("maths", "reduce", "state"))
    yield _fault(
        "half precision kept",
        maths,
        "return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x",
        "return x",
        "kd",
        "rkd",
    )
    softmax = "torch.log_softmax(upcast(logits) / temperature, -1)"
    yield _fault("softmax over the batch", maths, softmax, softmax.replace("-1", "0"), "kd")
    underflows = f"{softmax.replace('log_softmax', 'softmax')}.log()"
    yield _fault("log of a softmax that underflows", maths, softmax, underflows, "tests/core/test_maths.py")
    seen, all_seen = "on_places(teacher_mask, teacher_spans)", "on_places(None, teacher_spans)"
    yield _fault("padding chooses words", "losses/tokens/xtoken.py", seen, all_seen, "tests/test_two_tokenizers.py")
    codes = 'codes = torch.randn(len(batch["index"]), self.latent, device=nets.device)'
    looks = f'{codes} + batch["inputs"].mean()'
    yield _fault("a method without data looks at it", "train/datafree/zskt.py", codes, looks)
    masked = "torch.where(mask, values, torch.zeros_like(values)).sum()"
    yield _fault("mask ignored", reduce, masked, "values.sum()", LOOP)
    yield _fault("mask multiplied, nan spreads", reduce, masked, "(values * mask).sum()", LOOP)
    yield _fault("everything masked gives nan", reduce, "self.count.clamp_min(1)", "self.count", LOOP)
    yield _fault("sum for mean", reduce, "self.weight * self.total / count", "self.weight * self.total", "kd", LOOP)
    yield _fault(
        "mean over rows, not elements",
        reduce,
        "values.sum(), values.numel(), key",
        "values.sum(), len(values), key",
        LOOP,
    )
    yield _fault(
        "average moves the wrong way",
        state,
        "mine.lerp_(theirs.to(mine.dtype), 1 - decay)",
        "mine.lerp_(theirs.to(mine.dtype), decay)",
        LOOP,
    )
    yield _fault("average forgets statistics", state, "own.copy_(other)", "pass", LOOP)
    yield _fault(
        "the loop's average at a wrong rate",
        state,
        "mine.lerp_(now, 1 - self.decay)",
        "mine.lerp_(now, self.decay)",
        LOOP,
    )
    yield _fault(
        "queue overwrites its first rows only", state, "self.head.copy_((self.head + len(rows)) % size)", "pass", LOOP
    )
    match = "core/match.py"
    yield _fault(
        "mask does not reach the mean", match, 'mean(values, have.get("mask"))', "mean(values)", "distill", LOOP
    )
    yield _fault("weight of a loss ignored", match, "return weight * mean(", "return 1.0 * mean(", LOOP)
    yield _fault(
        "schedule of a knob stands still",
        match,
        "now = {k: schedule.value(v, progress)",
        "now = {k: schedule.value(v, 0.0)",
        LOOP,
    )

    # ---- core: the loop ----------------------------------------------------------------------------------------------
    loop, nets, save = (f"core/{n}.py" for n in ("loop", "nets", "checkpoint"))
    yield _fault(
        "learning rate off its schedule",
        loop,
        "(self.plan.schedule, clock.progress)",
        "(self.plan.schedule, 0.9 * clock.progress)",
        LOOP,
    )
    yield _fault("clipping ignored", loop, "nn.utils.clip_grad_norm_(params, self.plan.clip)", "pass", LOOP)
    mine = "keep = {id(p) for p in params}"
    yield _fault(
        "gradients kept for other players",
        loop,
        mine,
        "keep = {id(p) for m in self.nets.modules.values() for p in m.parameters()}",
        LOOP,
    )
    counted = "self.counts[g].append(parts[names[0]].count)"
    yield _fault("accumulation as a mean of means", loop, counted, "self.counts[g].append(self.references[g])", LOOP)
    yield _fault(
        "best weights not taken",
        loop,
        "            shard.load(self.nets.find(name), state)",
        "            pass",
        LOOP,
    )
    yield _fault("average not taken", loop, "self.nets.find(player).load_state_dict(ema.shadow)", "pass", LOOP)
    yield _fault(
        "optimiser state not restored",
        loop,
        "shard.load_optimizer(self._optimizer(player, nets.params(player)), saved)",
        "pass",
        LOOP,
    )
    yield _fault("random state not restored", loop, "_set_rng(state[", "id(state[", LOOP)
    yield _fault("numpy's random state not restored", loop, "np.random.set_state(", "id(", LOOP)
    yield _fault("place in the data not restored", loop, "self.pools[name].load_state_dict(position)", "pass", LOOP)
    yield _fault("place in plain data not restored", loop, 'range(state["drawn"].get(name, 0))', "range(0)", LOOP)
    yield _fault(
        "average not restored", loop, "self.emas[player].load(shard.share(shadow, nets.find(player)))", "pass", LOOP
    )
    yield _fault("best weights not restored", loop, 'self.best = state["best"]', "pass", LOOP)
    yield _fault("interrupted stage skipped", loop, 'index < state["stage"]', 'index <= state["stage"]', "ban", "takd")
    yield _fault("earlier stages run again", loop, 'index < state["stage"]', "False", "ban", "takd")
    yield _fault(
        "averaged networks not saved",
        loop,
        "self.initial.get(n) != _mark(nets.modules[n])",
        "n not in self.initial",
        "mkd_ocl",
    )
    yield _fault(
        "log not cut back on resume", loop, 'file.truncate(min(state["log"], path.stat().st_size))', "pass", LOOP
    )
    yield _fault("signals ignored", loop, "return bool(self.signal)", "return False", LOOP)
    yield _fault("after never called", loop, 'if hasattr(self.method, "after"):', "if False:", "mkd_ocl")
    yield _fault(
        "teacher in training mode",
        nets,
        "            self.find(player).eval()\n\n",
        "            pass\n\n",
        LOOP,
        "distill",
    )
    yield _fault("teacher not frozen", nets, 'if name.startswith("teacher"):', "if False:", LOOP)
    yield _fault(
        "companions not trained", nets, "*(self.find(c) for c in self.companions.get(player, ()))", "", "fitnets"
    )
    yield _fault("checksum unchecked", save, "if _sha256(path / name) != manifest[name]:", "if False:", LOOP)
    yield _fault("torn checkpoint ends the run", save, "for path in found:", "for path in found[:1]:", LOOP)
    yield _fault(
        "checkpoint written in place",
        save,
        'folder / f".draft-{step:08d}-{os.getpid()}"',
        'folder / f"step-{step:08d}"',
        LOOP,
    )
    yield _fault(
        "tuples come back as lists",
        save,
        "return tuple(_unpack(v, tensors) for v in body)",
        "return [_unpack(v, tensors) for v in body]",
        LOOP,
    )
    yield _fault(
        "batches one place off after a resume",
        "core/batches.py",
        '        self.position = int(state["position"])',
        '        self.position = int(state["position"]) + 1',
        LOOP,
    )

    # ---- training methods --------------------------------------------------------------------------------------------
    dml, ban, takd = "train/online/dml.py", "train/self/ban.py", "train/many/takd.py"
    yield _fault("peers in another order", dml, "players = members(nets)", "players = members(nets)[::-1]")
    yield _fault(
        "a generation too few",
        ban,
        'count = self.generations + ("teacher" not in nets)',
        "count = self.generations - 1",
    )
    yield _fault(
        "the generation before keeps learning",
        ban,
        'nets.retire("student", "generations")',
        "nets.generations.append(nets.student)",
    )
    yield _fault("assistant in training mode while it teaches", takd, "nets.freeze(pair.learner)", "pass")
    dafl, lwf, mkd = "train/datafree/dafl.py", "train/continual/lwf.py", "train/continual/mkd_ocl.py"
    yield _fault("turns swapped", dafl, 'yield "generator", self.realism(', 'yield "student", self.realism(')
    yield _fault("generator cut off from the teacher", dafl, ", through=True", "")
    yield _fault(
        "aliased networks: the old network is the new",
        lwf,
        "nets.teacher = copy.deepcopy(nets.student)",
        "nets.teacher = nets.student",
    )
    yield _fault("old tasks not kept", lwf, "if clock.stage and self.weight:", "if False:")
    yield _fault(
        "aliased networks: the average is the student",
        mkd,
        "nets.momentum = copy.deepcopy(nets.student)",
        "nets.momentum = nets.student",
    )
    update = "ema_update(nets.momentum, nets.student, 1 - self.rate)"
    yield _fault("stale average: never updated", mkd, update, "pass")
    taught = 'taught = nets.run("momentum", {"inputs": other})["logits"]'
    yield _fault("average moved inside the step", mkd, taught, f"{update}; {taught}")
    fedftg, gkd, fkd = "train/federated/fedftg.py", "train/policy/gkd.py", "train/plain/fkd.py"
    yield _fault(
        "clients do not begin at the average",
        fedftg,
        "client.load_state_dict(nets.student.state_dict())",
        "pass",
        "fedftg",
        "tests/test_train_invariants.py",
    )
    yield _fault(
        "server never averaged",
        fedftg,
        "average(nets.student, nets.clients, nets.federation.weights)",
        "pass",
        "fedftg",
        "tests/test_train_invariants.py",
    )
    yield _fault(
        "prompts count as completions",
        gkd,
        "mean(apart, mask)",
        "mean(apart)",
        "tests/test_train_invariants.py",
    )
    yield _fault("on-policy teacher learns", gkd, 'yield "student", mean(', 'yield "teacher", mean(')
    yield _fault(
        "stored labels not used",
        fkd,
        "-(p * log_probs(",
        "-(p.exp() * log_probs(",
        "tests/test_fkd.py",
        "tests/test_train_invariants.py",
    )
    cd, dmd2, reflow = (f"train/samplers/{n}.py" for n in ("consistency_distillation", "dmd2", "reflow"))
    yield _fault(
        "aliased networks: target is student",
        cd,
        "nets.target = copy.deepcopy(nets.student)",
        "nets.target = nets.student",
    )
    yield _fault(
        "boundary condition dropped",
        cd,
        "nets.student.boundary, nets.student.solver = True,",
        "nets.student.boundary, nets.student.solver = False,",
        "tests/core/test_shortening.py",
    )
    yield _fault(
        "stale target: average in the step",
        cd,
        "    target = (nets.target",
        "    ema_update(nets.target, nets.student, self.decay)\n            target = (nets.target",
    )
    yield _fault(
        "aliased networks: fake is real", dmd2, "nets.fake = copy.deepcopy(nets.teacher)", "nets.fake = nets.teacher"
    )
    yield _fault("gradient through the pseudo-target", dmd2, "(x - (x - g).detach())", "(x - (x - g))")
    yield _fault("real and fake exchanged", dmd2, "g = (d_fake - d_real)", "g = (d_real - d_fake)")
    yield _fault("generated data not detached", dmd2, "x = x.detach()", "x = x * 1")
    yield _fault(
        "student's turn at the wrong step", dmd2, "turn = clock.t % self.ratio == 0", "turn = clock.t % self.ratio == 1"
    )
    yield _fault("flow from data to noise", reflow, "(velocity - (z - x))", "(velocity - (x - z))")
    dc, dm, mtt, kip = (f"train/datasets/{n}.py" for n in ("dc", "dm", "mtt", "kip"))
    yield _fault("gradients pushed apart", dc, "(1 - (m * r)", "(1 + (m * r)")
    yield _fault("images are never given a turn", dc, 'yield "images", distance', 'yield "net", distance')
    yield _fault("one mean for all features", dm, "g.mean(0)", "g.mean().expand(2)")
    yield _fault(
        "expert's target is its start",
        mtt,
        "path[start], path[start + self.match_epochs]",
        "path[start], path[start] + 1",
    )
    yield _fault(
        "targets of the wrong sign",
        kip,
        '(self.predict(x, y, batch["inputs"]) - targets)',
        '(self.predict(x, y, batch["inputs"]) + targets)',
    )

    # ---- shape, data, measure ----------------------------------------------------------------------------------------
    surgery, choice = "core/surgery.py", "shape/layers/layer_choice.py"
    yield _fault("blocks off by one", choice, "if i % keep_every == 0", "if i % keep_every == 1")
    yield _fault(
        "copies share storage", surgery, "fresh = copy.deepcopy(module)", "fresh = copy.copy(module)", "layer_choice"
    )
    yield _fault(
        "students cannot be trained", surgery, "return fresh.requires_grad_(True)", "return fresh", "layer_choice"
    )
    yield _fault(
        "weakest channels kept",
        surgery,
        "scores.argsort(descending=True, stable=True)[:kept]",
        "scores.argsort(stable=True)[:kept]",
        "channel_pruning",
    )
    yield _fault(
        "slices are views of the teacher",
        surgery,
        "old.detach().index_select(dim, index.to(old.device))",
        "old.detach().narrow(dim, 0, len(index))",
        "weight_inheritance",
    )
    yield _fault(
        "trailing channels inherited",
        "shape/inherit/weight_inheritance.py",
        "return torch.arange(k)\n    if choose",
        "return torch.arange(n - k, n)\n    if choose",
    )
    yield _fault(
        "teacher quantised in place", "shape/quant/fake_quant.py", "student = copied(teacher)", "student = teacher"
    )
    herding, subset, words = (f"data/select/{n}.py" for n in ("herding", "random_subset", "quality_filter"))
    yield _fault("budget off by one", herding, "for _ in range(budget):", "for _ in range(budget - 1):")
    yield _fault("duplicates in a selection", herding, "free[nearest] = False", "pass")
    yield _fault("farthest for nearest", herding, "torch.inf).argmin()", "-torch.inf).argmax()")
    yield _fault("budget not checked", herding, "require(1 <= budget <= len(features)", "require(True")
    yield _fault("drawn with replacement", subset, "torch.randperm(n)[:budget]", "torch.randint(n, (budget,))")
    yield _fault("all rows read at once", words, "for row in rows:", "for row in list(rows):")
    yield _fault("provenance lost", words, "[*(before if isinstance(before, list) else [before]), ", "[")
    yield _fault(
        "a filter that keeps everything",
        words,
        "if rule := broken(row[field]):",
        "if (rule := broken(row[field])) and False:",
    )
    calibration, accuracy = "measure/calibrate/calibration.py", "measure/agree/accuracy.py"
    yield _fault("errors of bins cancel", calibration, "gap.abs().sum()", "gap.sum().abs()")
    yield _fault("a bin too many", calibration, "torch.linspace(0, 1, bins + 1", "torch.linspace(0, 1, bins + 2")
    yield _fault("top-1 for top-k", accuracy, "student_logits.topk(top)", "student_logits.topk(1)")
    yield _fault(
        "KL to the student",
        "measure/agree/agreement.py",
        "kl(student_logits.double(), teacher_logits.double())",
        "kl(teacher_logits.double(), student_logits.double())",
    )
    yield _fault("cross term of the distance once", maths, "- 2 * cross", "- cross", "frechet")
    yield _fault(
        "area over one severity too many", "measure/robust/corruption.py", "/ (severities - 1)", "/ severities"
    )

    # ---- data at the door --------------------------------------------------------------------------------------------
    yield _fault(
        "shift twice",
        "adapters/words.py",
        "return line[..., :-1], line[..., 1:]",
        "return line[..., :-1], line[..., 1:].roll(-1, -1)",
        "tests/test_data.py",
    )


FAULTS = list(_faults())


# ---- the copy, and a process for each look at it ---------------------------------------------------------------------
@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the package with its tests and vectors, to be altered at will."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("limbeck", "tests"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        yield root


def warm() -> None:
    """Load what takes long to load, once, before the forks."""
    import accelerate  # noqa: F401
    import sklearn  # noqa: F401
    import torch
    import torch._dynamo

    torch.set_num_threads(1)


def apart(root: Path, work: Callable[[], Any], limit: float = 300.0) -> Any:
    """What `work` returns, as JSON, in a process of its own that imports limbeck from `root`; None if it hangs or dies.

    A fork, since starting anew and importing torch would take longer than the work.
    """
    reader, writer = os.pipe()
    warm()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            for module in [m for m in sys.modules if m.split(".")[0] in ("limbeck", "tests")]:
                del sys.modules[module]
            sys.dont_write_bytecode = True  # a cached file of the same size and second would hide a fault
            sys.path.insert(0, str(root))
            os.chdir(root)
            os.setpgid(0, 0)
            with os.fdopen(writer, "w") as out:
                json.dump(work(), out)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    timer = _Alarm(child, limit)
    with os.fdopen(reader) as answer, timer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


class _Alarm:
    """Ends a child that takes too long."""

    def __init__(self, child: int, limit: float) -> None:
        import threading

        self.timer = threading.Timer(limit, lambda: os.kill(child, signal.SIGKILL))

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()


def check(root: Path, by: tuple[str, ...], *, known: Found | None = None, only: tuple[str, ...] = ()) -> Found | None:
    """Outcomes in the copy. known: what passes there without a fault; then the first new failure is enough."""

    def work() -> Found:
        import torch

        torch.set_num_threads(1)
        found: Found = {}
        for one in by:
            for key, message in _outcomes(one, only):
                found.setdefault(one, {})[key] = message
                if known is not None and message and known[one].get(key) == "":
                    return found
        return found

    return apart(root, work)


def _outcomes(one: str, only: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if one.endswith(".py"):
        yield one, _tests(one)
        return
    try:
        from limbeck import conformance

        if one == LOOP:
            for outcome in conformance.self_test():
                yield outcome.check, "" if outcome.passed else outcome.message
            return
        for key in conformance.checks(one):
            if not only or key in only:
                (outcome,) = conformance.run(one, only=key)
                yield key, "" if outcome.passed else outcome.message
    except ImportError as error:  # the fault broke an import: that is noticed at once
        yield "import", f"{type(error).__name__}: {error}"


def _tests(file: str) -> str:
    """What pytest says of a file of tests, '' when all pass."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    import pytest

    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()):
        code = pytest.main([file, "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line"])
    lines = [line for line in said.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "" if code == 0 else (lines or [f"pytest ends with {code}"])[0]


@dataclass(frozen=True)
class Verdict:
    """Whether a fault was caught, by which check, and what that check said."""

    fault: Fault
    caught: bool
    by: str
    message: str
    seconds: float


def judge(root: Path, fault: Fault, known: Found) -> Verdict:
    """Plant one fault in the copy, look, and take it out again."""
    file, began = root / "limbeck" / fault.file, time.monotonic()
    source = file.read_text(encoding="utf-8")
    file.write_text(fault.apply(source), encoding="utf-8")
    try:
        found = check(root, fault.by, known=known)
    finally:
        file.write_text(source, encoding="utf-8")
    seconds = time.monotonic() - began
    if found is None:
        return Verdict(fault, True, "a process of its own", "it hangs or dies", seconds)
    for one, outcomes in found.items():
        for key, message in outcomes.items():
            if message and known[one].get(key, "") == "":
                return Verdict(fault, True, f"{one}: {key}", message, seconds)
    return Verdict(fault, False, "", "", seconds)


def main(names: list[str]) -> int:
    """Plant the faults whose name or file contains one of `names` (all without any); 1 if one survives."""
    chosen = [f for f in FAULTS if not names or any(n in f.name or n in f.file or n in f.by for n in names)]
    if not chosen:
        print(f"no fault matches {' '.join(names)}; there are {len(FAULTS)}")
        return 2
    survived = []
    with copied() as root:
        known: Found = {}
        for one in dict.fromkeys(b for f in chosen for b in f.by):
            known |= check(root, (one,)) or {one: {}}
            broken = [k for k, message in known[one].items() if message]
            if broken or not known[one]:
                print(
                    f"note: without any fault {one} fails {', '.join(broken) or 'altogether'}; that counts for nothing"
                )
        for number, fault in enumerate(chosen, 1):
            verdict = judge(root, fault, known)
            survived += [] if verdict.caught else [fault.name]
            state = f"caught by {verdict.by}" if verdict.caught else "SURVIVES"
            print(f"{number:3}/{len(chosen)} {fault.name:48} {verdict.seconds:5.1f} s  {state}", flush=True)
            if verdict.caught and len(names) > 0:
                print(f"        {verdict.message[:200]}")
    print(
        f"{len(chosen) - len(survived)} of {len(chosen)} faults are caught"
        + "".join(f"\n  survives: {s}" for s in survived)
    )
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
