"""Checks of shape methods: what they make of a small residual network."""

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.conformance import toys, vectors
from limbeck.conformance.expect import expect, same_state
from limbeck.core import find
from limbeck.core.batches import epoch
from limbeck.core.errors import BadInput


def make(name: str, teacher: nn.Module, *, batches: bool = True) -> nn.Module:
    """The student that the method makes, with the knobs of its vector; torch's generator begins at 0."""
    method = find.get(name)
    torch.manual_seed(0)
    knobs = {k: tuple(v) if isinstance(v, list) else v for k, v in vectors.read(name).get("knobs", {}).items()}
    asked = find.needs(method) + (find.wants(method) if batches else [])
    given: dict[str, Any] = {"teacher": teacher, "batches": list(epoch(toys.pictures(1), toys.BATCH))}
    made: nn.Module = method(
        *[given[n] for n in find.needs(method)], **{n: given[n] for n in asked if n != "teacher"}, **knobs
    )
    return made


def size(module: nn.Module) -> int:
    """How many parameters there are."""
    return sum(p.numel() for p in module.parameters())


def state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, copied."""
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """A teacher and the student made of it."""
    teacher = toys.Tower()
    return teacher, make(name, teacher)


def check_reference(name: str) -> None:
    """The student is that of the vector, as far as the vector says it in one of three ways.

    "blocks": n and "kept": of a tower of n blocks those stay. "inputs": {"weight": of a convolution} and "kept": those
    of its channels stay. "inputs": state of a perceptron and "value": state of the student. Further cases, each with a
    "source", may follow. Anything else that a vector holds is for tests of its own.
    """
    vector = vectors.filled(name)
    for case in [vector, *(v for v in vector.values() if isinstance(v, dict) and "source" in v)]:
        _reference(name, {**vector, **case})


def _reference(name: str, vector: dict[str, Any]) -> None:
    knobs, inputs = vector.get("knobs", {}), vector.get("inputs", {})
    method = find.get(name)
    if "blocks" in vector:
        teacher = toys.Tower(blocks=vector["blocks"])
        student: Any = method(teacher, **knobs)
        kept = vector["kept"]
        expect(len(student.blocks) == len(kept), f"{len(student.blocks)} blocks stay, the vector has {len(kept)}")
        for i, k in enumerate(kept):
            differs = same_state(student.blocks[i].state_dict(), teacher.blocks[k].state_dict())
            expect(not differs, f"block {i} of the student is not block {k} of the teacher")
    elif "kept" in vector and "weight" in inputs:
        weight = torch.tensor(inputs["weight"], dtype=torch.float64)
        gives, takes, *window = weight.shape
        first = nn.Conv2d(takes, gives, (window[0], window[1]))
        first.weight.data = weight
        student = method(nn.Sequential(first, nn.ReLU(), nn.Conv2d(gives, 1, 1)).double(), **knobs)
        same = torch.equal(student[0].weight, weight[vector["kept"]])
        expect(same, f"the channels that stay are not {vector['kept']}")
    elif isinstance(vector.get("value"), dict):
        states = [
            {k: torch.tensor(v, dtype=torch.float64) for k, v in vector[key].items()} for key in ("inputs", "value")
        ]
        places = sorted({int(k.split(".")[0]) for k in states[0]})
        stack = nn.Sequential()
        for i in range(places[-1] + 1):
            gives, takes = states[0][f"{i}.weight"].shape if i in places else (0, 0)
            stack.append(nn.Linear(takes, gives).double() if i in places else nn.ReLU())
        stack.load_state_dict(states[0])
        differs = same_state(method(stack, **knobs).state_dict(), states[1])
        expect(not differs, f"the student's {differs!r} is not that of the vector")


def check_smaller(name: str) -> None:
    """The student has fewer parameters than the teacher."""
    teacher, student = both(name)
    expect(size(student) < size(teacher), f"the student has {size(student)} parameters, the teacher {size(teacher)}")


def check_runs(name: str) -> None:
    """The student reads what the teacher reads and gives logits of the same classes, with batches and without."""
    inputs = toys.pictures(2)["inputs"][: toys.BATCH]
    for batches in (True, False):
        student = make(name, toys.Tower(), batches=batches).eval()
        with torch.no_grad():
            logits = student(inputs)["logits"]
        expect(
            tuple(logits.shape) == (toys.BATCH, toys.CLASSES), f"the student's logits have shape {list(logits.shape)}"
        )
        expect(bool(logits.isfinite().all()), "the student's logits are not finite")


def check_own_storage(name: str) -> None:
    """Student and teacher share no tensor and no module."""
    teacher, student = both(name)
    theirs = {v.data_ptr(): k for k, v in teacher.state_dict(keep_vars=True).items() if v.numel()}
    for key, value in student.state_dict(keep_vars=True).items():
        expect(
            not value.numel() or value.data_ptr() not in theirs,
            f"the student's {key!r} is the teacher's {theirs.get(value.data_ptr())!r}",
        )
        expect(
            value.untyped_storage().nbytes() <= 2 * value.nbytes,
            f"the student's {key!r} is a view that keeps a larger tensor alive",
        )
    shared = {id(m) for m in teacher.modules()} & {id(m) for m in student.modules()}
    expect(not shared, "student and teacher share a module")


def check_teacher_untouched(name: str) -> None:
    """The teacher stays as it was: weights, statistics, mode, hooks and whether it asks for gradients."""
    teacher = toys.Tower()
    for p in teacher.parameters():
        p.requires_grad_(False)
    before, modes = state(teacher), _modes(teacher)
    make(name, teacher)
    differs = same_state(teacher.state_dict(), before)
    expect(not differs, f"the teacher's {differs!r} changed")
    expect(_modes(teacher) == modes, "the teacher's modes, layers or hooks changed")
    expect(not any(p.requires_grad for p in teacher.parameters()), "the teacher asks for gradients afterwards")


def _modes(module: nn.Module) -> list[tuple[str, bool, int, int]]:
    """Each layer's name, mode and number of hooks."""
    layers = module.named_modules()
    return [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in layers]


def check_deterministic(name: str) -> None:
    """The same teacher and seed give the same student."""
    first, second = (state(both(name)[1]) for _ in range(2))
    differs = same_state(first, second)
    expect(not differs, f"two students of one teacher differ in {differs!r}")


def check_trainable(name: str) -> None:
    """The student can be trained as a whole: every weight asks for a gradient and gets one."""
    teacher = toys.Tower().requires_grad_(False)
    student = make(name, teacher).train()
    fixed = [k for k, p in student.named_parameters() if not p.requires_grad]
    expect(not fixed, f"the student's {fixed[:1]} asks for no gradient")
    student(toys.pictures(2)["inputs"])["logits"].square().mean().backward()
    for key, p in student.named_parameters():
        expect(p.grad is not None and bool(p.grad.isfinite().all()), f"the student's {key!r} gets no finite gradient")


def check_refuses_what_it_cannot_shape(name: str) -> None:
    """A network without the layers that it works on is refused with one sentence."""
    try:
        make(name, nn.Sequential(nn.Flatten(), nn.Tanh()), batches=False)
    except BadInput as error:
        expect(len(str(error)) > 10, "it refuses a network without saying why")
    else:
        expect(False, "a network without any weights is not refused")


def check_inherits(name: str) -> None:
    """The student starts from what the teacher knows: its weights are values of the teacher's, not random numbers."""
    teacher, student = both(name)
    known = torch.cat([v.flatten() for v in teacher.state_dict().values() if v.is_floating_point()]).unique()
    for key, value in student.named_parameters():
        found = torch.isin(value.detach().flatten(), known).double().mean().item()
        expect(found > 0.9, f"only {found:.0%} of the student's {key!r} are values of the teacher")
