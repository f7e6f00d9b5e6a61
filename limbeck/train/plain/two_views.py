"""The student sees every picture twice, as it comes and strongly augmented, and is asked about both views."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from limbeck.core import augment as augmentation
from limbeck.core.card import method
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pairs import Losses, Pairs, own, students

ONE_LEVEL = {"batch_weight": 0.0, "class_weight": 0.0}


@method(
    paper="Jin et al. 2023, Multi-level Logit Distillation, CVPR, two views",
    year=2023,
    code="Jin-Ying/Multi-Level-Logit-Distillation@5ee473f:mdistiller/distillers/KD_ours.py",
    differs="the strong view is the weak one augmented once more, by differentiable operations, not by RandAugment. "
    "The code has two slips which the lists can repeat: weak mlkd at weight 0.45, and T = 2 and 6 of the strong "
    "instance term on the weak view",
    row="mlkd",
)
@dataclass(frozen=True)
class TwoViews:
    """Losses on the batch plus losses on its strong view; student and teacher see the same view.

    The two go through the network one after the other, so that batch norm sees each on its own.

    weak: losses on the view that the data brings, augmented as the recipe says.
    strong: losses on the strong view; by default the labels and the instance level of `mlkd`.
    augment: what makes the strong view of the other, as in a recipe's `data: augment`; leave "flip" out for digits.

    *Needs*: nets.student, nets.teacher at hand (a store knows nothing of the strong view), pictures [B, C, H, W].
    *Relates to*: `mlkd` in `distill` for one view. Compare with `weak` and `strong` of ce and kd: twice the passes help
        by themselves. *Differs*: see the card.
    """

    weak: Losses = ({"ce": 0.1}, {"mlkd": 0.9})
    strong: Losses = ({"ce": 0.1}, {"mlkd": {"weight": 0.9, **ONE_LEVEL}})
    augment: tuple[Any, ...] = ({"siamese": {"ops": ["color", "crop", "rotate", "cutout"], "every": True}},)

    @cached_property
    def pairs(self) -> Pairs:
        """Student and teacher on either view."""
        return students(weak=self.weak, strong=self.strong)

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check the losses on one batch of either view, and build those that own weights."""
        own(nets, self.pairs, self.views(probe))

    def views(self, batch: Batch) -> dict[str, Batch]:
        """The batch as it is, and with its pictures augmented once more by torch's generator."""
        images: Tensor = batch["inputs"]
        if images.ndim != 4:
            raise BadInput(f"two_views augments pictures [B, C, H, W], but inputs are {list(images.shape)}")
        change = augmentation.build(self.augment, images.shape[-1])
        if change is None:
            raise BadInput("`augment` is empty: name at least one operation that makes the strong view")
        stored = {name for name in batch if name.startswith("teacher_")}
        seen = {name: value for name, value in batch.items() if name not in stored}
        seen["inputs"] = change.apply(images, change.draw(torch.default_generator, len(images)))
        return {"weak": batch, "strong": seen}

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student on both views."""
        views = self.views(batch)
        yield (
            "student",
            {
                f"{view}_{name}": part
                for view, pair in self.pairs.items()
                for name, part in pair.parts(nets, views[view], clock.progress).items()
            },
        )
