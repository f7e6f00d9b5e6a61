"""shorten: a few-step student of a many-step sampler; the control is the teacher itself at as few steps."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core import find, knobs
from limbeck.core.batches import Table, generator
from limbeck.core.errors import BadInput
from limbeck.core.maths import energy_distance
from limbeck.core.nets import Nets, device_of, outputs
from limbeck.core.sampler import Denoiser, generate
from limbeck.recipe import Recipe
from limbeck.report.grid import grid
from limbeck.verbs.setting import Outcome, Setting, batches_of, cost, figures_of, outcome_of, save_network
from limbeck.verbs.together import leads

SAMPLES = 2000
SHOWN = 36


def arms(recipe: Recipe) -> list[str]:
    """student, control (the teacher at the student's number of steps), teacher (at its own)."""
    return ["student", "control", "teacher"]


def control_recipe(recipe: Recipe) -> Recipe:
    """What decides the control: the teacher, the data and the number of steps."""
    return recipe.with_changes({"method": None, "train": None, "control": None})


def methods(recipe: Recipe) -> list[str]:
    """The method that distils the sampler."""
    return [knobs.split(recipe.method or "consistency_distillation")[0]]


def label(recipe: Recipe, arm: str) -> str:
    """A plain description of an arm."""
    plural = "" if recipe.steps == 1 else "s"
    return {
        "student": f"student by {methods(recipe)[0]}, {recipe.steps} step{plural}",
        "control": f"teacher, {recipe.steps} step{plural}",
        "teacher": f"teacher, {recipe.teacher_steps} steps",
    }[arm]


def run(setting: Setting, arm: str, seed: int, folder: Path) -> tuple[Outcome, nn.Module]:
    """Train one arm under one seed, sample from it, and compare the samples with the test data."""
    recipe, teacher = setting.recipe, setting.teacher
    if not isinstance(teacher, Denoiser):
        raise BadInput(f"shortening starts from a Denoiser, and the teacher is a {type(teacher).__name__}")
    torch.manual_seed(seed)
    told: dict[str, float] = {}
    seconds, module, steps = 0.0, teacher, recipe.teacher_steps if arm == "teacher" else recipe.steps
    if arm == "student":
        name, given = knobs.split(recipe.method or "consistency_distillation")
        method: Any = knobs.make(name, given)
        nets = Nets(teacher=teacher)
        nets.student = setting.build("student") if "student" in setting.builders else setting.build("teacher")
        if "student" not in setting.builders:  # start from the teacher, not from fresh weights
            nets.student.load_state_dict(teacher.state_dict())
        for role in recipe.nets:
            if role != "features":
                setattr(nets, role, setting.build(role))
        fitted = setting.fit(
            method, nets, recipe.train, batches_of(recipe, setting.splits.train, seed), seed=seed, folder=folder
        )
        module, seconds, told = nets.student, fitted.seconds, figures_of(method, nets)
        save_network(module, folder, setting.spec("student" if "student" in setting.builders else "teacher"))
    test = setting.splits.test
    samples = draw(module, test, steps, seed)
    if seed == recipe.seeds[0] and leads():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(samples[:SHOWN].clone(), folder / "samples.pt")
    metrics = compare(setting, samples, test["inputs"])
    noise = torch.randn(1, *test["inputs"].shape[1:])
    figures = cost(Sampling(module, steps), {"inputs": noise})
    return outcome_of(label(recipe, arm), metrics, figures, seconds, {**told, "steps": steps}), module


class Sampling(nn.Module):
    """A sampler as a network: noise in, data out."""

    def __init__(self, denoiser: Denoiser, steps: int) -> None:
        super().__init__()
        self.denoiser, self.steps = denoiser, steps

    def forward(self, inputs: Tensor) -> Tensor:
        """Unit noise [B, ...] -> data [B, ...]"""
        return generate(self.denoiser, inputs, self.steps)


def draw(module: Denoiser, test: Table, steps: int, seed: int) -> Tensor:
    """As many samples as the test set has examples (at most 2,000), from noise that all arms share."""
    count = min(SAMPLES, len(test))
    noise = torch.randn(count, *test["inputs"].shape[1:], generator=generator("samples", seed))
    return generate(module, noise.to(device_of(module)), steps, batch_size=500).cpu()


def compare(setting: Setting, samples: Tensor, real: Tensor) -> dict[str, float]:
    """Frechet distance in a classifier's embedding (or of plain values), and energy distance for low dimensions."""
    frechet = find.get("frechet")
    if "features" not in setting.builders:
        flat, fake = real.flatten(1), samples.flatten(1)
        out = {"frechet": float(frechet(flat, fake))}
        if flat.shape[1] <= 16:
            out = {"energy_distance": float(energy_distance(flat, fake)), **out}
        return out
    net = setting.build("features").eval()
    with torch.no_grad():
        embedded = [
            torch.cat([outputs(net, {"inputs": p})["emb"].flatten(1) for p in x.split(500)]) for x in (real, samples)
        ]
    return {"frechet": float(frechet(*embedded))}


def pictures(setting: Setting, folder: Path) -> list[dict[str, str]]:
    """Samples of all arms side by side, from the same noise."""
    if setting.splits.test.kind != "images":
        return []
    recipe, first = setting.recipe, folder / f"seed-{setting.recipe.seeds[0]}"
    shown = {}
    for arm in ("teacher", "", "control"):
        path = first / arm / "samples.pt"
        if path.exists():
            shown[label(recipe, arm or "student")] = torch.load(path, weights_only=True)
    if not shown:
        return []
    grid(shown, folder / "pictures" / "samples.png", columns=6)
    return [
        {
            "title": "Samples from the same noise",
            "file": "pictures/samples.png",
            "caption": "each place shows one noise",
        }
    ]
