"""Checks of training methods, driven by the one loop in the tiny world of their folder."""

import math
import signal
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.conformance import toys, vectors
from limbeck.conformance.expect import close, concerns, expect, same_state
from limbeck.conformance.toys import Scene, scene
from limbeck.core import optim
from limbeck.core.errors import Interrupted
from limbeck.core.loop import Clock, Fitted, Turn, fit
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import Part
from limbeck.report.runs import KNOWN

State = dict[str, Tensor]


def state_of(nets: Nets) -> State:
    """Every parameter and buffer of every network, copied, by its full name."""
    return {f"{n}.{k}": v.detach().cpu().clone() for n, m in nets.modules.items() for k, v in m.state_dict().items()}


def play(made: Scene, **options: Any) -> Fitted:
    """Run a scene from its start."""
    return fit(made.method, made.nets, made.data, made.plan, **options)


def roots(players: set[str]) -> set[str]:
    """The networks that players belong to: "peers.0" -> "peers"."""
    return {p.split(".")[0] for p in players}


class Watched:
    """A method under observation: what changes while it runs, whose turn it is, and what it leaves behind."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.given: set[str] = set()
        self.before: State = {}
        self.turn = ""
        self.trained: set[str] = set()
        self.averaged: set[str] = set()
        self.turns = self.afters = 0
        self.inside: set[tuple[int, str]] = set()
        self.by_stage: dict[int, set[str]] = {}
        self.early: set[str] | None = None
        self.pull: dict[tuple[str, str], bool] = {}
        self.problems: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("setup", "optimizers", "stages"):
            return getattr(self.method, name)
        raise AttributeError(name)

    def complain(self, problem: str) -> None:
        """Keep a problem, once; raising here would pass through the loop."""
        if problem not in self.problems:
            self.problems.append(problem)

    def changed(self, nets: Nets) -> set[str]:
        """Names that differ from the last look, or are new; and look again."""
        now = state_of(nets)
        moved = {k for k, v in now.items() if k not in self.before or not torch.equal(v, self.before[k])}
        self.before = now
        return moved

    def own(self, nets: Nets, player: str) -> set[str]:
        """Prefixes of the states that a player's turn may change."""
        return {player, *nets.companions.get(player, ())}

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """The method's step, watched at every yield."""
        if self.early is None:
            self.early = {name for name, m in nets.modules.items() if any(True for _ in m.parameters())} - self.given
        self.changed(nets)
        for player, parts in self.method.step(nets, batch, clock):
            self.trained |= self.own(nets, player)
            self.by_stage.setdefault(clock.stage, set()).update(self.own(nets, player))
            self._inside(nets, clock.stage)
            self._teachers(nets)
            self._apart(nets)
            self._parts(nets, player, parts)
            self.turn = player
            self.turns += 1
            yield player, parts
            self.changed(nets)  # what `after` did has been judged there
            for name, module in nets.modules.items():
                kept = [k for k, p in module.named_parameters() if p.grad is not None]
                if kept:
                    self.complain(f"after the turn of {player!r}, {name}.{kept[0]} still has a gradient")
        self._inside(nets, clock.stage)

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """Called by the loop right after an optimiser step: judge that step, then let the method act."""
        self.afters += 1
        mine = self.own(nets, player)
        for key in self.changed(nets):
            if not any(key == p or key.startswith(f"{p}.") for p in mine):
                self.complain(f"the turn of {player!r} changed {key!r}")
        if hasattr(self.method, "after"):
            self.method.after(nets, player, clock)
            moved = self.changed(nets)
            self.averaged |= {k.split(".")[0] for k in moved}
            bad = sorted(k for k in moved if k.startswith("teacher"))
            if bad:
                self.complain(f"`after` changed {bad[0]!r}: the teacher stays still")

    def _inside(self, nets: Nets, stage: int) -> None:
        """Note what changes while the method computes between two yields."""
        for key in self.changed(nets):
            root, _, rest = key.partition(".")
            is_weight = rest in dict(nets.modules[root].named_parameters())
            if is_weight or root in self.given:  # a module of its own may keep memory in buffers
                self.inside.add((stage, key))

    def verdict(self) -> list[str]:
        """What is wrong, after the run. Whoever has turns may be renewed, and see data, between them; nobody else."""
        bad = sorted(k for stage, k in self.inside if not any(k.startswith(f"{p}.") for p in self.by_stage[stage]))
        moved = [f"`step` changed {k!r}, which has no turn: averages move in `after`, others are frozen" for k in bad]
        return self.problems + moved

    def _teachers(self, nets: Nets) -> None:
        for player in nets.frozen:
            for name, module in nets.find(player).named_modules():
                if module.training:
                    self.complain(f"{player}{'.' + name if name else ''} is frozen and yet in training mode")
                    break
            loose = [k for k, p in nets.find(player).named_parameters() if p.requires_grad]
            if loose:
                self.complain(f"{player}.{loose[0]} is frozen and yet asks for a gradient")

    def _parts(self, nets: Nets, player: str, parts: Any) -> None:
        """Note which parts of a loss pull at their player."""
        params = nets.params(player)
        for key, part in parts.items() if isinstance(parts, dict) else [("loss", parts)]:
            value = part.value if isinstance(part, Part) else part.mean()
            grads = (
                torch.autograd.grad(value, params, retain_graph=True, allow_unused=True) if value.requires_grad else ()
            )
            pulls = any(g is not None and bool(g.any()) for g in grads)
            self.pull[player, key] = self.pull.get((player, key), False) or pulls

    def _apart(self, nets: Nets) -> None:
        owners: dict[int, str] = {}
        for root, module in nets.modules.items():
            parts = (
                {f"{root}.{i}": m for i, m in enumerate(module)}
                if isinstance(module, nn.ModuleList)
                else {root: module}
            )
            for player, part in parts.items():
                for key, p in part.named_parameters():
                    owner = owners.setdefault(p.data_ptr(), player) if p.numel() else player
                    if owner != player:
                        self.complain(f"{player}.{key} and {owner} are the same tensor")


def watch(name: str, **options: Any) -> tuple[Watched, Scene, State]:
    """A short run under observation: the observer, the scene after it, and the state before it."""
    made = scene(name, **options)
    watched = Watched(made.method)
    made.method = watched
    watched.given = set(made.nets.modules)
    before = state_of(made.nets)
    play(made)
    return watched, made, before


STEPS = 6


def check_turns(name: str) -> None:
    """Players take turns in the order of the vector."""
    vector = vectors.filled(name)
    wanted: list[str] = vector["turns"]
    steps = int(vector.get("steps", len(wanted)))
    found = [player for _, _, player, _ in play(scene(name, steps=steps)).turns]
    expect(len(found) >= len(wanted), f"in {steps} steps there are {len(found)} turns, the vector has {len(wanted)}")
    for i, (a, b) in enumerate(zip(found, wanted, strict=False)):
        expect(a == b, f"turn {i} is that of {a!r}, the vector says {b!r}; found {found[: len(wanted)]}")


def check_only_those_with_a_turn_change(name: str) -> None:
    """Whoever has no turn stays bit for bit the same, batch-norm statistics included, and keeps no gradient."""
    watched, made, before = watch(name, steps=STEPS)
    expect(watched.turns > 0, "the method takes no turn")
    problems = watched.verdict()
    expect(not problems, "; ".join(problems[:3]))
    after = state_of(made.nets)
    idle = watched.given - roots(watched.trained) - watched.averaged
    for key, value in before.items():
        if key.split(".")[0] in idle and not hasattr(made.method.method, "stages"):
            expect(torch.equal(value, after[key]), f"{key!r} changed, and yet it has no turn")
        if key.startswith("teacher"):
            expect(torch.equal(value, after[key]), f"{key!r} changed: the teacher stays still")
    for player in watched.trained:
        start = {k: v for k, v in before.items() if k.startswith(f"{player}.")}
        expect(
            not start or any(k not in after or not torch.equal(v, after[k]) for k, v in start.items()),
            f"{player!r} has turns and did not move",
        )


def check_networks_of_its_own(name: str) -> None:
    """A network that the method adds is trained, averaged, or called teacher: a copy that never moves is forgotten."""
    watched, _, _ = watch(name, steps=STEPS)
    for root in sorted(watched.early or ()):
        moves = root in roots(watched.trained) | watched.averaged or root.startswith("teacher")
        expect(
            moves, f"the method adds {root!r}, which is neither trained nor averaged; a frozen one is called teacher"
        )


def check_every_part_pulls(name: str) -> None:
    """Every part of a loss sends a gradient to the player whose turn it is: none is detached by mistake."""
    watched, _, _ = watch(name, steps=STEPS)
    dead = [f"part {part!r} of {player!r}" for (player, part), pulls in watched.pull.items() if not pulls]
    expect(not dead, f"{' and '.join(dead)} never sends a gradient")


@concerns(lambda method: hasattr(method, "optimizers"))
def check_optimizers(name: str) -> None:
    """The optimisers of the paper exist, and belong to players."""
    method = scene(name).method
    players = set(vectors.filled(name)["turns"])
    for player, spec in method.optimizers().items():
        optim.check(spec)
        expect(player in players | roots(players), f"the method names an optimiser for {player!r}, who has no turn")


@concerns(lambda method: getattr(method, "dataless", False))
def check_without_data(name: str) -> None:
    """The run is the same, bit for bit, on batches that hold no pictures, but only how many there are to make."""
    usual, blind = scene(name, steps=STEPS), scene(name, steps=STEPS)
    blind.data = [
        {k: torch.full_like(v, torch.nan) if k == "inputs" else v for k, v in batch.items() if k in ("index", "inputs")}
        for batch in islice(blind.data, STEPS)
    ]
    usual.data = list(islice(usual.data, STEPS))
    runs = play(usual), play(blind)
    differs = same_state(state_of(runs[0].nets), state_of(runs[1].nets))
    expect(not differs, f"the method is `dataless`, and yet what is in its batches changes {differs!r}")


def check_same_seed(name: str) -> None:
    """The same seed gives the same run, bit for bit, and all values are finite."""
    runs = [play(scene(name, steps=STEPS)) for _ in range(2)]
    for _, t, player, parts in runs[0].turns:
        for part, value in parts.items():
            expect(math.isfinite(value), f"{part!r} of {player!r} is {value} at step {t}")
    expect(runs[0].turns == runs[1].turns, "two runs with the same seed log different values")
    differs = same_state(state_of(runs[0].nets), state_of(runs[1].nets))
    expect(not differs, f"two runs with the same seed differ in {differs!r}")


def check_resume(name: str) -> None:
    """Stopped by a signal and resumed, in any stage, the run ends bit for bit as if nothing had happened."""
    resumes(lambda: scene(name, steps=STEPS, schedule="cosine", clip=10.0))


def resumes(make: Callable[[], Scene]) -> None:
    """Raise `Broken` unless a run of what `make` builds survives a stop in the middle of its stages."""
    with tempfile.TemporaryDirectory() as root:
        whole = play(make(), folder=Path(root) / "whole")
        moments = {stage: [t for s, t, _, _ in whole.turns if s == stage] for stage, _, _, _ in whole.turns}
        stages = sorted(moments)
        for stage in stages if len(stages) < 3 else (stages[1], stages[-1]):
            middle = max(moments[stage]) // 2
            folder = Path(root) / f"cut{stage}"
            cut = _interrupted(make(), folder, stage, middle)
            expect(cut, f"a signal at step {middle} of stage {stage} does not stop the run")
            again = play(make(), folder=folder, resume=True)
            where = f"stopped after step {middle} of stage {stage} and resumed, the run"
            differs = same_state(state_of(again.nets), state_of(whole.nets))
            expect(not differs, f"{where} ends with another {differs!r}")
            expect(again.turns == whole.turns, f"{where} logs other values")
            expect(again.steps == whole.steps, f"{where} counts {again.steps} steps instead of {whole.steps}")
            expect(_counted(again) == _counted(whole), f"{where} counts other turns")
            expect(_figures(again, make) == _figures(whole, make), f"{where} tells other figures: keep them in buffers")
            expect(_log(folder) == _log(Path(root) / "whole"), f"{where} writes another log")


def _interrupted(made: Scene, folder: Path, stage: int, t: int) -> bool:
    """Whether a signal during step `t` of a stage stops the run."""
    sent: list[int] = []

    def stop(event: dict[str, Any]) -> None:
        if (event["stage"], event["t"]) == (stage, t) and not sent:
            sent.append(t)
            signal.raise_signal(signal.SIGTERM)

    try:
        play(made, folder=folder, on_event=stop)
    except Interrupted:
        return True
    return False


def _figures(fitted: Fitted, make: Callable[[], Scene]) -> dict[str, float]:
    """What a method tells of a run, asked of a method that has not seen it."""
    method = make().method
    return method.figures(fitted.nets) if hasattr(method, "figures") else {}


def _counted(fitted: Fitted) -> list[Any]:
    """The record of turns without its seconds."""
    return [
        (s.name, s.steps, {p: (t.turns, t.first, t.last, t.parts, t.optimizer, t.lr) for p, t in s.players.items()})
        for s in fitted.trained
    ]


def _log(folder: Path) -> list[str]:
    return [line.split(', "seconds"')[0] for line in (folder / "log.jsonl").read_text().splitlines()]


@concerns(lambda method: method.card.exact_accumulation)
def check_accumulation(name: str) -> None:
    """Two half-batches give the step of one batch, with a mask that falls unevenly on the two."""
    standard = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ends = []
        for parts in (1, 2):
            made = scene(
                name,
                norm=False,
                mask=True,
                batch=toys.BATCH // parts,
                steps=3,
                accumulate=parts,
                optimizer={"sgd": {"lr": 0.1}},
            )
            ends.append(state_of(play(made).nets))
    finally:
        torch.set_default_dtype(standard)
    for key, value in ends[0].items():
        close(ends[1][key], value, f"{key!r} after three steps in halves", rtol=1e-8, atol=1e-10)


@concerns(lambda method: method.card.exact_accumulation and toys.folder(method.__module__.split(".")[-1]) != "policy")
def check_mask(name: str) -> None:
    """Examples that do not count have no influence."""
    ends = []
    for filler in (0.0, 5.0):
        made = scene(name, norm=False, mask=True, steps=3)
        for pool in made.data.values() if isinstance(made.data, dict) else [made.data]:
            table = pool.table
            table["inputs"][~table["mask"]] += filler
        ends.append(state_of(play(made).nets))
    for key, value in ends[0].items():
        close(ends[1][key], value, f"{key!r}, when only masked examples change,", rtol=1e-4, atol=1e-6)


def check_after(name: str) -> None:
    """`after` is called once an optimiser step, also when a step has several micro-batches."""
    watched, _, _ = watch(name, steps=2, accumulate=2, batch=toys.BATCH // 2)
    expect(
        watched.turns == 2 * watched.afters, f"{watched.turns // 2} optimiser steps, {watched.afters} calls of `after`"
    )


@concerns(lambda method: hasattr(method, "figures"))
def check_figures(name: str) -> None:
    """What it tells of a run are numbers, whose names nothing else in the report has."""
    made = scene(name, steps=STEPS)
    play(made)
    for key, value in made.method.figures(made.nets).items():
        expect(type(value) is float and not math.isnan(value), f"figure {key!r} is {value!r}, not a float")
        expect(key.isidentifier() and key not in KNOWN, f"no figure can be called {key!r}: the report has that already")


def check_half_precision(name: str) -> None:
    """Under bf16 autocast it runs, and its values are finite."""
    for _, t, player, parts in play(scene(name, steps=2, precision="bf16")).turns:
        bad = [part for part, value in parts.items() if not math.isfinite(value)]
        expect(not bad, f"{bad[:1]} of {player!r} is not finite at step {t} in bf16")


def check_gain(name: str) -> None:
    """In the world of its folder, whose answer is known, it comes at least half of the way from its start."""
    made = scene(name)
    start = made.score(made.nets)
    play(made)
    end = made.score(made.nets)
    wanted = start + (made.goal - start) / 2
    expect(end >= wanted, f"its score goes from {start:.3f} to {end:.3f}; the known answer is {made.goal:.3f}")
