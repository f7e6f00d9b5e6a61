"""Checks of losses, functions and modules alike."""

import copy
import inspect
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from limbeck.conformance import toys, training, vectors
from limbeck.conformance.calling import build, loss, values
from limbeck.conformance.expect import close, concerns, expect, same_state
from limbeck.conformance.tensors import WHOLE, B, C, Inputs, T, change, fresh, leaves, permute, tensors
from limbeck.core import find
from limbeck.core.headloss import Head, Term, head_loss, route
from limbeck.core.reduce import mean
from limbeck.train.plain.distill import Distill

HALVES = (torch.bfloat16, torch.float16)
PLACED = ("student_logits", "student_hidden", "student_vocab_logits")  # a mask is about their places


def is_module(method: Any) -> bool:
    """Whether the loss owns weights or memory."""
    return inspect.isclass(method)


def per_element(method: Any) -> bool:
    """Whether the loss gives one value an element."""
    return values(method, tensors(method)).ndim > 0


def on_logits(method: Any) -> bool:
    """Whether the loss must serve images [B, C] and tokens [B, T, V] alike."""
    asked = set(find.needs(method))
    return asked <= {"student_logits", "teacher_logits", "labels", "mask", "teacher_ids", "teacher_logprobs"}


def in_training(method: Any, inputs: Inputs, **options: Any) -> tuple[Tensor, Inputs]:
    """The loss after its backward pass, and the inputs that now hold gradients."""
    inputs = fresh(inputs)
    total = loss(method, inputs, **options)
    expect(total.requires_grad, "the loss has no gradient")
    total.backward()
    return total, inputs


def settled(method: Any, **options: Any) -> nn.Module | None:
    """The module of a loss in double precision after a first call, which may set constants; None for functions."""
    if not is_module(method):
        return None
    first = fresh(tensors(method, seed=7, **options))
    module = build(method, first).double()
    loss(method, first, module=module)
    return module


def check_reference(name: str) -> None:
    """Value and gradient are those of the vector, in fp64."""
    method, vector = find.get(name), vectors.filled(name)
    further = [case for case in vector.values() if isinstance(case, dict) and {"inputs", "value"} <= case.keys()]
    for case in [vector, *further]:
        _reference(method, {**vector, "grad": None, "state_after": {}, **case})


def _reference(method: Any, vector: dict[str, Any]) -> None:
    inputs = vectors.inputs(vector)
    wanted: dict[str, Any] = vector["grad"] or {}
    knobs, module = dict(vector.get("knobs", {})), None
    if is_module(method):
        module = build(method, inputs, knobs, examples=vector.get("examples", _examples(inputs))).double()
        if vector.get("training") is False:
            module.eval()
        state = module.state_dict()
        given = vector.get("state", {})
        for key in given:
            expect(key in state, f"the vector sets {key!r}, which the module's state lacks; it has {', '.join(state)}")
        learned = [k for k, p in module.named_parameters() if k not in given]
        expect(not learned, f"the vector does not set the parameter {next(iter(learned), '')!r}")
        module.load_state_dict(
            {k: torch.tensor(given[k], dtype=torch.float64).to(v) if k in given else v for k, v in state.items()}
        )
    for key in wanted:
        for leaf in inputs[key] if isinstance(inputs[key], list) else [inputs[key]]:
            leaf.requires_grad_()
    out = values(method, inputs, knobs, module=module)
    reduce = vector.get("reduce", "mean")
    mask = inputs.get("mask")
    reduced = mean(out, mask)
    total = {"mean": reduced.value, "sum": reduced.total, "none": out}[reduce]
    close(total, torch.tensor(vector["value"], dtype=torch.float64), "the value", rtol=1e-9, atol=1e-12)
    end = module.state_dict() if module is not None else {}
    for key, after in vector["state_after"].items():
        ends = torch.tensor(after, dtype=torch.float64).to(end[key])
        close(end[key], ends, f"the state {key!r} after the call", rtol=1e-9, atol=1e-12)
    total.sum().backward()
    for key, grad in wanted.items():
        listed = isinstance(inputs[key], list)
        for i, leaf in enumerate(inputs[key] if listed else [inputs[key]]):
            number = torch.tensor(grad[i] if listed else grad, dtype=torch.float64)
            found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            close(
                found, number, f"the gradient with respect to {key}{f'[{i}]' if listed else ''}", rtol=1e-7, atol=1e-10
            )


def _examples(inputs: Inputs) -> int:
    return max((int(inputs[k].max()) + 1 for k in ("index", "negatives") if k in inputs), default=0)


def check_shape_of_value(name: str) -> None:
    """One value an element, or a single one; what could be given an element is not averaged over the batch."""
    method = find.get(name)
    inputs = tensors(method)
    lead = inputs["student_logits"].shape[:-1] if "student_logits" in inputs else (B,)
    out = values(method, inputs)
    expect(isinstance(out, Tensor), f"the loss returns {type(out).__name__}, not a tensor")
    ok = out.ndim == 0 or tuple(out.shape[: len(lead)]) == tuple(lead) or (out.shape[0] == B and out.ndim == 1)
    expect(
        ok, f"the loss has shape {list(out.shape)}; it must begin with {list(lead)}, or be [] when it relates examples"
    )
    if out.ndim:
        return
    try:  # a loss that relates examples says nothing, or something else, about one example alone
        alone = [values(method, _example(inputs, i)) for i in range(B)]
    except (ValueError, RuntimeError, IndexError):
        return
    singles = torch.stack(alone)
    for reduced, how in ((singles.mean(), "mean"), (singles.sum(), "sum")):
        apart = not torch.isclose(out, reduced, rtol=1e-9, atol=1e-12) or bool(singles.abs().max() < 1e-12)
        expect(apart, f"the loss is the {how} of one value an example: return those, core/reduce takes the mean")


def _example(inputs: Inputs, i: int) -> Inputs:
    return permute(inputs, torch.tensor([i]))


def check_without_the_optional(name: str) -> None:
    """It works without the tensors that it only takes when they are there."""
    method = find.get(name)
    total, _ = in_training(method, tensors(method, optional=False))
    expect(total.isfinite(), f"without {', '.join(find.wants(method))} the loss is {total.item()}")


def check_gradient(name: str) -> None:
    """A gradient reaches every student tensor that it asks for, and its own weights; none reaches the teacher."""
    method = find.get(name)
    inputs = fresh(tensors(method))
    module = build(method, inputs).double() if is_module(method) else None
    loss(method, inputs, module=module).backward()
    for name_, leaf in leaves(inputs, "teacher"):
        expect(leaf.grad is None, f"a gradient reaches {name_}: detach it")
    moved: dict[str, bool] = {}
    for name_, leaf in leaves(inputs, "student"):
        moved[name_] = moved.get(name_, False) or (leaf.grad is not None and bool(leaf.grad.abs().sum() > 0))
    for name_, yes in moved.items():
        expect(yes, f"no gradient reaches {name_}")
    for key, p in module.named_parameters() if module is not None else ():
        expect(p.grad is not None and bool(p.grad.isfinite().all()), f"no gradient reaches its own weight {key!r}")


def check_gradcheck(name: str) -> None:
    """Gradients are those of finite differences, in fp64, with respect to student tensors and its own weights."""
    method = find.get(name)
    given = tensors(method)
    names = list(dict.fromkeys(k for k, _ in leaves(given, "student")))
    module = settled(method)
    weights = dict(module.named_parameters()) if module is not None else {}
    points = [leaf.detach().clone().requires_grad_() for _, leaf in leaves(given, "student")]
    points += [w.detach().clone().requires_grad_() for w in weights.values()]

    def function(*at: Tensor) -> Tensor:
        rest = list(at)
        inputs = dict(given)
        for key in names:
            inputs[key] = [rest.pop(0) for _ in given[key]] if isinstance(given[key], list) else rest.pop(0)
        if module is None:
            return loss(method, inputs)
        held = {k: v.clone() for k, v in module.state_dict().items() if k not in weights}  # memory must not move
        call = _Reduced(module, method)
        state = {f"module.{k}": v for k, v in {**held, **dict(zip(weights, rest, strict=True))}.items()}
        out: Tensor = torch.func.functional_call(call, state, (inputs,))
        return out

    again = 1e-12  # two backward passes may differ in rounding: `head_loss` has the first one's gradients at hand
    expect(
        torch.autograd.gradcheck(
            function, points, atol=1e-6, rtol=1e-4, nondet_tol=again, fast_mode=True, raise_exception=True
        ),
        "the gradient is not that of finite differences",
    )


class _Reduced(nn.Module):
    """A loss module with its reduction, so that its weights can be replaced in one functional call."""

    def __init__(self, module: nn.Module, method: Any) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, inputs: Inputs) -> Tensor:
        return loss(self.method, inputs, module=self.module)


def check_precision(name: str) -> None:
    """bf16 and fp16 inputs, plain and under autocast, give a finite value within 1 % of fp64."""
    method = find.get(name)
    for dtype in HALVES:
        inputs = tensors(method, dtype=dtype)
        exact = change(inputs, lambda _, v: v.double() if v.is_floating_point() else v)
        module = build(method, inputs) if is_module(method) else None
        double = build(method, inputs).double() if is_module(method) else None
        wanted = loss(method, exact, module=double)
        for cast in (False, True):
            if module is not None and not cast:
                continue  # weights stay in fp32: their products with half inputs are autocast's business
            how = f"for {dtype} inputs{' under autocast' if cast else ''}"
            ours = fresh(inputs)
            with torch.autocast("cpu", dtype, enabled=cast):
                out = values(method, ours, module=module)
            expect(out.isfinite().all(), f"the loss is not finite {how}")
            expect(out.dtype == torch.float32, f"the loss is {out.dtype} {how}: compute it in fp32 (core/maths.upcast)")
            total = mean(out, ours.get("mask")).value
            gap = abs(total.item() - wanted.item()) / max(abs(wanted.item()), 1e-2)
            expect(gap < 0.01, f"the loss is off by {gap:.1%} {how}: {total.item():.6g} instead of {wanted.item():.6g}")
            total.backward()
            for key, leaf in leaves(ours, "student"):
                expect(leaf.grad is None or leaf.grad.isfinite().all(), f"the gradient of {key} is not finite {how}")


def check_extremes(name: str) -> None:
    """Inputs of 1e4, all zero, or all examples alike give a finite value and a finite gradient."""
    method = find.get(name)
    alike = lambda key, v: v if key in WHOLE or not v.is_floating_point() else v[:1].expand_as(v)
    kinds: list[tuple[str, Inputs]] = [
        ("inputs of 1e4", tensors(method, dtype=torch.float32, scale=1e4)),
        ("inputs of 1e4 in bf16", tensors(method, dtype=torch.bfloat16, scale=1e4)),
        ("inputs of 1e4 in fp64", tensors(method, scale=1e4)),
        ("inputs that are all zero", tensors(method, dtype=torch.float32, scale=0.0)),
        ("examples that are all alike", change(tensors(method, dtype=torch.float32), alike)),
    ]
    for what, inputs in kinds:
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in what):
            out = values(method, ours := fresh(inputs))
        expect(out.isfinite().all(), f"the loss is not finite for {what}")
        mean(out, ours.get("mask")).value.backward()
        for key, leaf in leaves(ours, "student"):
            expect(leaf.grad is None or leaf.grad.isfinite().all(), f"the gradient of {key} is not finite for {what}")


def _matched(method: Any, noise: float = 0.0, **options: Any) -> Inputs:
    """Inputs in which the student says what the teacher says, up to `noise`."""
    inputs = tensors(method, **options)
    for key in [k for k in inputs if k.startswith("student_")]:
        there = inputs.get("teacher_" + key.removeprefix("student_"))
        if there is not None:
            one = {"x": there}
            inputs[key] = change(one, lambda _, v: (v + noise * torch.randn(v.shape).to(v)) if noise else v)["x"]
    return fresh(inputs)


@concerns(lambda method: method.card.zero_at_match)
def check_zero_at_match(name: str) -> None:
    """The loss and its gradient are 0 when the student says what the teacher says."""
    method = find.get(name)
    for scale in (1.0, 10.0):
        inputs = _matched(method, scale=scale)
        out = values(method, inputs)
        expect(out.abs().max() < 1e-9, f"the loss is {out.abs().max().item():.3g} at student = teacher")
        mean(out, inputs.get("mask")).value.backward()
        for key, leaf in leaves(inputs, "student"):
            steep = 0.0 if leaf.grad is None else leaf.grad.abs().max().item()
            expect(steep < 1e-6, f"the gradient of {key} is {steep:.3g} at student = teacher")


@concerns(lambda method: method.card.zero_at_match)
def check_never_negative(name: str) -> None:
    """What is 0 at its best is never below, in fp32, near the match and far from it."""
    method = find.get(name)
    for noise in (1e-7, 1e-4, 1e-2, 1.0):
        for scale in (1.0, 30.0):
            lowest = values(method, _matched(method, noise, dtype=torch.float32, scale=scale)).min().item()
            expect(lowest >= 0, f"the loss is {lowest:.3g} at {noise:g} from student = teacher")


def check_batch_order(name: str) -> None:
    """Another order of the examples gives the same values, in that order."""
    method = find.get(name)
    inputs = tensors(method)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    first, second = values(method, inputs), values(method, permute(inputs, order))
    wanted = first if first.ndim == 0 else first[order]
    close(second, wanted, "the loss after the examples changed places", rtol=1e-9, atol=1e-12)


def check_mask(name: str) -> None:
    """Masked places have no influence on value or gradient; with nothing left the loss is 0."""
    method = find.get(name)
    takes = "mask" in find.needs(method) + find.wants(method)
    inputs = tensors(method)
    if values(method, inputs).ndim == 0 and not takes:
        return  # relates examples and has no mask: there is nothing to mask
    leads: list[tuple[int, ...] | None] = (
        [(B,), (B, T)] if on_logits(method) and "tokens" not in method.__module__ else [None]
    )
    for lead in leads:
        inputs = tensors(method, lead=lead)
        shape = next((inputs[k].shape[:-1] for k in PLACED if k in inputs), (B,))
        mask = torch.arange(torch.Size(shape).numel()).view(shape) % 3 != 1
        runs = []
        for filler in (0.0, 1e3):
            spoiled = change(inputs, lambda key, v: _spoil(key, v, mask, filler))  # noqa: B023
            runs.append(in_training(method, {**spoiled, "mask": mask}, module=settled(method, lead=lead)))
        close(runs[1][0], runs[0][0], "the loss, when only masked places change,", rtol=1e-9, atol=1e-12)
        for (key, a), (_, b) in zip(leaves(runs[0][1], "student"), leaves(runs[1][1], "student"), strict=True):
            if a.grad is None or b.grad is None:
                continue
            close(b.grad, a.grad, f"the gradient of {key}, when only masked places change,", rtol=1e-9, atol=1e-12)
            if a.shape[: mask.ndim] == mask.shape:
                expect(not a.grad[~mask].any(), f"masked places of {key} have a gradient")
        module = settled(method, lead=lead)
        nothing, left = in_training(method, {**inputs, "mask": torch.zeros_like(mask)}, module=module)
        expect(nothing == 0, f"the loss is {nothing.item()} when everything is masked, not 0")
        for key, leaf in leaves(left, "student"):
            expect(leaf.grad is None or not leaf.grad.any(), f"{key} has a gradient when everything is masked")


def _spoil(key: str, value: Tensor, mask: Tensor, filler: float) -> Tensor:
    if key in WHOLE or key == "mask" or not value.is_floating_point() or value.shape[: mask.ndim] != mask.shape:
        return value
    out = value.clone()
    out[~mask] = out[~mask] + filler
    return out


@concerns(lambda method: not is_module(method) and on_logits(method) and per_element(method))
def check_leading_dimensions(name: str) -> None:
    """[B, T, V] gives what its rows give as [B * T, V]: one loss serves images and tokens."""
    method = find.get(name)
    inputs = tensors(method, lead=(B, T))
    flat = change(inputs, lambda _, v: v.flatten(0, 1))
    close(values(method, inputs).flatten(), values(method, flat), "the loss of [B, T, V]", rtol=1e-12, atol=1e-14)


@concerns(lambda method: method.card.head is not None)
def check_head_form(name: str) -> None:
    """From hidden states and heads, with the factor it names, it gives the value and gradients of the loss on logits.

    A form may be None for knobs that no term serves, but not for all.
    """
    method = find.get(name)
    compared = False
    for knobs in ({}, _other_knobs(method)):
        term = method.card.head(**knobs)
        for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            if term is not None:
                _same_without_logits(method, term, knobs, dtype, rtol)
                compared = True
    expect(compared, "the head form is None at its defaults and at other knobs: take `head` off the card")


def _other_knobs(method: Any) -> dict[str, Any]:
    """Every knob at another value than its own, of those that the loss takes."""
    knobs: dict[str, Any] = {}
    inputs = tensors(method)
    for key, p in inspect.signature(method).parameters.items():
        if p.kind != inspect.Parameter.KEYWORD_ONLY:
            continue
        options = get_args(get_type_hints(method)[key]) or (
            (not p.default,) if isinstance(p.default, bool) else (1.7, 0.37)
        )
        for option in options:
            if option == p.default:
                continue
            try:
                values(method, inputs, {**knobs, key: option})
            except (ValueError, TypeError):
                continue
            knobs[key] = option
            break
    return knobs


def _same_without_logits(method: Any, term: Term, knobs: dict[str, Any], dtype: torch.dtype, rtol: float) -> None:
    draw = torch.Generator().manual_seed(11)
    shapes = {"hidden": (B, T, 4), "head": (C, 4), "head_bias": (C,)}
    student, teacher = (
        {k: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) for k, shape in shapes.items()}
        for _ in range(2)
    )
    toys = change(tensors(method, lead=(B, T)), lambda _, v: v.to(dtype) if v.is_floating_point() else v)
    stored = {k: v for k, v in toys.items() if k in ("teacher_ids", "teacher_logprobs", "teacher_weights")}
    if "teacher_weights" in stored:  # those of draws sum to 1
        stored["teacher_weights"] = stored["teacher_weights"] / stored["teacher_weights"].sum(-1, keepdim=True)
    given = {k: v for k, v in toys.items() if k in ("labels", "mask")} | stored
    mask = given.get("mask", torch.arange(B * T).view(B, T) % 4 != 1)
    found: list[tuple[Tensor, Inputs]] = []
    for by_head in (True, False):
        ours, theirs = fresh(student), fresh(teacher)
        if by_head:
            heads = [Head(side["hidden"], side["head"], side["head_bias"]) for side in (ours, theirs)]
            said = route.teacher_of(stored) or heads[1]
            (out,) = head_loss(heads[0], said, [term], labels=given.get("labels"), mask=mask)
            out = term.weight * out
        else:
            logits = [side["hidden"] @ side["head"].T + side["head_bias"] for side in (ours, theirs)]
            told = {f"{who}_{k}": v for who, side in (("student", ours), ("teacher", theirs)) for k, v in side.items()}
            told |= {"student_logits": logits[0], "teacher_logits": logits[1]}
            out = values(method, {**given, **told}, knobs)
            out = torch.where(mask, out, 0.0)
        mean(out, mask).value.backward()
        found.append((out, ours))
        for key, leaf in theirs.items():
            expect(leaf.grad is None or not leaf.grad.any(), f"a gradient reaches the teacher's {key}")
    with_knobs = f" with {knobs} in {str(dtype).removeprefix('torch.')}"
    close(found[0][0], found[1][0], f"the head form{with_knobs}", rtol=rtol, atol=rtol)
    for key in shapes:
        what = f"the head form's gradient of the {key}{with_knobs}"
        close(found[0][1][key].grad, found[1][1][key].grad, what, rtol=rtol, atol=rtol)


def check_descent(name: str) -> None:
    """Thirty steps of Adam on student tensors and its own weights go down, and nothing else is touched."""
    method = find.get(name)
    inputs = fresh(tensors(method))
    before: Inputs = fresh(inputs, grad=False)
    module = build(method, inputs).double() if is_module(method) else None
    movable = [leaf for _, leaf in leaves(inputs, "student")] + list(module.parameters() if module is not None else ())
    optimizer = torch.optim.Adam(movable, lr=0.05)
    seen: list[float] = []
    for step in range(30):
        total = loss(method, inputs, module=module)
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            for key, value in inputs.items():
                pairs = zip(value, before[key], strict=True) if isinstance(value, list) else [(value, before[key])]
                same = all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
                expect(same, f"the loss changes its input {key!r} in place")
        optimizer.step()
        seen.append(total.item())
    expect(seen[-1] < seen[0], f"thirty steps of Adam take the loss from {seen[0]:.6g} to {seen[-1]:.6g}")
    teachers = zip(leaves(inputs, "teacher"), leaves(before, "teacher"), strict=True)
    expect(all(torch.equal(a, b) for (_, a), (_, b) in teachers), "the loss changes what the teacher said")


@concerns(is_module)
def check_state(name: str) -> None:
    """A module that is saved and loaded goes on exactly as if nothing had happened."""
    method = find.get(name)
    first = _Trained(method, seed=0)
    first.go(3)
    second = _Trained(method, seed=5)
    second.module.load_state_dict({k: v.clone() for k, v in first.module.state_dict().items()})
    second.optimizer_from(first)
    second.steps = first.steps
    expect(first.go(3) == second.go(3), "a loaded module goes on differently: its memory must be registered buffers")
    differs = same_state(second.module.state_dict(), first.module.state_dict())
    expect(not differs, f"after loading, {differs!r} goes another way")


class _Trained:
    """A loss module in training on other toy tensors each step."""

    def __init__(self, method: Any, seed: int) -> None:
        self.method, self.steps = method, 0
        self.module = build(method, tensors(method, dtype=torch.float32), seed=seed)
        weights = list(self.module.parameters())
        # a small rate, since some losses are sums
        self.optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.9) if weights else None

    def optimizer_from(self, other: "_Trained") -> None:
        if self.optimizer and other.optimizer:
            self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))

    def go(self, steps: int) -> list[float]:
        seen = []
        for _ in range(steps):
            self.steps += 1
            inputs = fresh(tensors(self.method, dtype=torch.float32, seed=self.steps))
            total = loss(self.method, inputs, module=self.module, seed=self.steps)
            total.backward()
            if self.optimizer:
                self.optimizer.step()
                self.optimizer.zero_grad()
            seen.append(total.item())
        return seen


@concerns(is_module)
def check_evaluation_leaves_no_trace(name: str) -> None:
    """In eval mode a call changes neither memory nor statistics."""
    method = find.get(name)
    inputs = tensors(method, dtype=torch.float32)
    module = build(method, inputs)
    values(method, inputs, module=module)
    module.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad():
        values(method, inputs, module=module, seed=3)
    differs = same_state(module.state_dict(), before)
    expect(not differs, f"a call in eval mode changes {differs!r}")


def _plays_along(method: Any) -> bool:
    """Whether a world has networks that give what the loss asks for."""
    there = {"labels", "index", "mask", *(f"{s}_{k}" for s in ("student", "teacher") for k in _given(method))}
    return set(find.needs(method)) <= there


def _given(method: Any) -> tuple[str, ...]:
    return ("logits", "hidden") if ".tokens." in method.__module__ else ("logits", "feats", "emb")


@concerns(_plays_along)
def check_in_training(name: str) -> None:
    """In the plain scheme its own weights are trained with the student, and what it remembers survives a stop."""
    method = find.get(name)
    where = "policy" if ".tokens." in method.__module__ else "plain"

    def make(**plan: Any) -> toys.Scene:
        return toys.place(Distill(match=(name,)), where, steps=4, **plan)

    start, end = (training.play(made).nets for made in (make(optimizers={"student": {"sgd": {"lr": 0.0}}}), make()))
    before, after = training.state_of(start), training.state_of(end)
    for root in ("student", *(["losses"] if is_module(method) else [])):
        for key, _ in end.modules[root].named_parameters():
            moved = not torch.equal(before[f"{root}.{key}"], after[f"{root}.{key}"])
            expect(moved or root == "student", f"its own weight {key!r} is not trained")
    expect(
        any(not torch.equal(v, after[k]) for k, v in before.items() if k.startswith("student.")),
        "the student does not move",
    )
    if is_module(method):
        training.resumes(make)
