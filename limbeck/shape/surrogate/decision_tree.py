"""The student is one decision tree, fitted to what the network says: every decision can be read as a path."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.maths import log_probs
from limbeck.core.nets import Batch, device_of, evaluating, outputs


class Tree(nn.Module):
    """{"logits": log of the leaf's mean probabilities} of inputs that are flattened to [B, F].

    At node i an example goes to `left` if its number `feature` is <= `threshold`, else to `right`; leaves lead to
    themselves. `value` [nodes, C] are probabilities, `importance` [F] the share of each number in what splits gain.
    All of it is buffers, and weights of a tree of any size can be loaded.
    """

    feature: Tensor
    threshold: Tensor
    left: Tensor
    right: Tensor
    value: Tensor
    importance: Tensor

    def __init__(self, depth: int, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.depth = depth
        for name, part in parts.items():
            self.register_buffer(name, part)

    def sizes(self) -> dict[str, float]:
        """How large it is to a reader."""
        leaves = int((self.left == torch.arange(len(self.left), device=self.left.device)).sum())
        return {"nodes": len(self.left), "leaves": leaves}

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """[B, ...] -> {"logits": [B, C]}, normalised."""
        x = inputs.flatten(1).to(self.threshold)
        at = torch.zeros_like(x[:, 0], dtype=torch.long)
        for _ in range(self.depth):
            goes = x.gather(1, self.feature[at].unsqueeze(1)).squeeze(1) <= self.threshold[at]
            at = torch.where(goes, self.left[at], self.right[at])
        said = self.value[at].clamp_min(torch.finfo(torch.float32).tiny).log()
        return {"logits": said.to(inputs)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the shapes that come: how many nodes there are was learned, too."""
        for name, buffer in list(self.named_buffers()):
            if name in state_dict and state_dict[name].ndim == buffer.ndim:
                setattr(self, name, buffer.new_empty(state_dict[name].shape))
        return super().load_state_dict(state_dict, strict, assign)


@method(
    paper="Liu et al. 2018, section 3",
    year=2018,
    arxiv="1812.10924",
    row="dnn_to_decision_tree",
    exceptions={
        "runs": "it is fitted to examples, so without batches there is no tree",
        "trainable": "a tree has thresholds and no gradient: it is fitted, not trained",
    },
)
def decision_tree(
    teacher: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    depth: int = 8,
    temperature: float = 1.0,
    soft: float = 1.0,
    leaf: int = 1,
) -> nn.Module:
    """A regression tree on (x, q), q = soft softmax(teacher(x) / T) + (1 - soft) onehot(label): -> module of [B, C].

    Each node is split by the number of the input and the threshold that leave the least sum over both sides of
    n sum_c Var(q_c); a leaf says the mean q of its examples. Soft targets tell it how near an example is to another
    class, so at equal depth it is more accurate than one fitted to labels.

    depth: of the tree, >= 1; what keeps it readable. 3 to 12.
    temperature: T > 0 of the teacher.
    soft: share of the teacher in the target, in [0, 1]; 0 is the control, a tree on labels.
    leaf: fewest examples a leaf, >= 1.

    *Needs*: enough batches to fill the leaves, since a tree sees nothing else; inputs as numbers (images are
        flattened). `do: shape` gives it every training example, and augmented ones as often as `train` would.
    *Relates to*: nothing is left to be trained afterwards, so there is no `match`. Compare `accuracy` and `agreement`
        by depth; `importance` says which numbers it looks at.
    """
    from sklearn.tree import DecisionTreeRegressor  # slow to import

    require(depth >= 1, "depth", depth, ">= 1")
    require(temperature > 0, "temperature", temperature, "> 0")
    require(0 <= soft <= 1, "soft", soft, "in [0, 1]")
    require(leaf >= 1, "leaf", leaf, ">= 1")
    x, q = _told(teacher, batches or (), temperature, soft)
    found = DecisionTreeRegressor(max_depth=depth, min_samples_leaf=leaf, random_state=0).fit(x.numpy(), q.numpy())
    tree = found.tree_
    ends = torch.as_tensor(tree.children_left.copy()) < 0
    here = torch.arange(tree.node_count)
    parts = {
        "feature": torch.where(ends, 0, torch.as_tensor(tree.feature.copy())),
        "threshold": torch.as_tensor(tree.threshold.copy()),
        "left": torch.where(ends, here, torch.as_tensor(tree.children_left.copy())),
        "right": torch.where(ends, here, torch.as_tensor(tree.children_right.copy())),
        "value": torch.as_tensor(tree.value[:, :, 0].copy()),
        "importance": torch.as_tensor(found.feature_importances_),
    }
    return Tree(depth, parts).to(device_of(teacher))


@torch.no_grad()
def _told(teacher: nn.Module, batches: Iterable[Batch], temperature: float, soft: float) -> tuple[Tensor, Tensor]:
    """All inputs [N, F] and what is to be said of them [N, C]."""
    rows: list[tuple[Tensor, Tensor]] = []
    where = device_of(teacher)
    with evaluating(teacher):
        for batch in batches:
            seen = {k: v.to(where) if isinstance(v, Tensor) else v for k, v in batch.items()}
            q = log_probs(outputs(teacher, seen)["logits"], temperature).double().exp()
            if soft < 1:
                label = nn.functional.one_hot(seen["labels"], q.shape[-1])
                q = soft * q + (1 - soft) * label
            rows.append((batch["inputs"].flatten(1).float().cpu(), q.cpu()))
    if not rows:
        raise BadInput("`decision_tree` is fitted to examples, and there is no batch of them")
    return torch.cat([x for x, _ in rows]), torch.cat([q for _, q in rows])
