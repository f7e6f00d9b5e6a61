"""limbeck's losses inside `transformers.Trainer`, for those who live there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.adapters.words import next_tokens
from limbeck.core.errors import BadInput, MissingExtra
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all

try:
    from transformers import Trainer
except ImportError:
    raise MissingExtra("transformers", "text") from None

__all__ = ["DistillationTrainer", "shifted"]

IGNORED = -100  # what the library's collators put where a token is no target


def shifted(inputs: Mapping[str, Any]) -> Batch:
    """A batch of the library's collators, whose labels stand beside their own tokens, as one of ours.

    input_ids [B, T + 1], labels alike (input_ids where there are none), attention_mask -> inputs, labels, mask,
    attention_mask [B, T]; the mask is False at labels of -100 and at padding.
    """
    read, said = next_tokens(inputs["input_ids"])
    _, labels = next_tokens(inputs.get("labels", inputs["input_ids"]))
    mask = labels != IGNORED
    batch: Batch = {"inputs": read, "labels": torch.where(mask, labels, said)}
    if "attention_mask" in inputs:
        batch["attention_mask"], real = next_tokens(inputs["attention_mask"])
        mask = mask & real.bool()
    return {**batch, "mask": mask}


class DistillationTrainer(Trainer):  # type: ignore[misc]  # the library has no types here
    """A `transformers.Trainer` whose loss is the weighted sum of limbeck's losses against a teacher.

    teacher: a causal language model over the student's vocabulary; None where no loss asks for one. match: losses as
    in a recipe, such as ["ce", {"forward_kl": {"weight": 2}}]; losses that own weights need `limbeck.teach`. Other
    arguments go to the Trainer. The mean is over all tokens that count in an optimiser step, over micro-batches and
    processes; a loss of whole texts or batches is weighed by the tokens of its micro-batch. No logits are built where
    the losses can do without, except in evaluation.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, teacher: nn.Module | None, match: Sequence[Any] = ("ce", "forward_kl"), **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the tokens of a whole step
        self._loss_shifts_labels = True
        self.pair = Pair("student", "teacher", parse_all(match))
        owning = [m.name for m in self.pair.matches if m.is_module]
        if owning:
            raise BadInput(f"`{owning[0]}` has weights or memory of its own, which a Trainer would lose; use teach")
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval().requires_grad_(False)
        self._nets: tuple[nn.Module, Nets] | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: what it adds to the mean of its optimiser step."""
        batch = shifted(inputs)
        nets = self._known(model, batch)
        parts = self.pair.parts(nets, batch, self.state.global_step / max(1, self.state.max_steps))
        total = sum((p.value for p in parts.values()), torch.zeros((), device=batch["inputs"].device))
        if num_items_in_batch is None:
            loss = total / getattr(self, "current_gradient_accumulation_steps", 1)
        else:
            loss = total * batch["mask"].sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:  # the count is over all processes, gradients are averaged
                loss = loss * self.accelerator.num_processes
        if not return_outputs:
            return loss
        whole: Batch = {**inputs, "inputs": inputs["input_ids"]}
        return loss, {"loss": loss, "logits": nets.run("student", whole)["logits"]}  # a place for each of the labels

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """How many tokens count in a step: those of `shifted`, where padding never counts and labels may be missing."""
        masks = [nn.functional.pad(shifted(batch)["mask"], (1, 0)) for batch in batch_samples]  # the first is no target
        return super()._get_num_items_in_batch([{"labels": torch.where(m, 0, IGNORED)} for m in masks], device)

    def _known(self, model: nn.Module, batch: Batch) -> Nets:
        """Student and teacher by name, checked once against the losses."""
        if self._nets is None or self._nets[0] is not model:
            nets = Nets() if self.teacher is None else Nets(teacher=self.teacher)
            nets.modules["student"] = model
            nets.device = batch["inputs"].device
            self.pair.build(nets, batch)
            self._nets = model, nets
        return self._nets[1]
