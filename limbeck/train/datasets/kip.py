"""Images from which an infinitely wide network, that is kernel ridge regression, predicts the labels of real ones."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean
from limbeck.core.unroll import krr, relu_kernels


@method(
    paper="Nguyen, Chen and Lee 2021, eq. 4 and algorithm 1",
    year=2020,
    arxiv="2011.00050",
    code="google-research/google-research@077b0ff78887ff08e84a25ea385fb66633e4ba21:kip/KIP.ipynb",
    differs="Fully connected kernels only. Neither augmentation nor corruption.",
)
@dataclass(frozen=True)
class KIP:
    """0.5 |y_t - K_ts (K_ss + ridge I)^-1 y_s|**2, the mean over targets and classes; y is one-hot less 1 / classes.

    K is the neural tangent kernel of a ReLU network. In double precision, as the code: K_ss is ill-conditioned.

    depth: hidden layers of the network, >= 1. weight_std, bias_std: of its random weights, > 0 and >= 0.
    ridge: regulariser, in units of the mean diagonal of K_ss, >= 0.
    learn_labels: whether the labels y_s are learned with the images.

    *Needs*: nets.images (a SynSet); batches with labels, thousands if memory allows (5000 in the paper's code).
    *Relates to*: the closed form of what `mtt` unrolls; strongest when the set is used by kernel ridge itself.
    """

    depth: int = 1
    weight_std: float = math.sqrt(2)
    bias_std: float = 0.1
    ridge: float = 1e-6
    learn_labels: bool = False

    def __post_init__(self) -> None:
        require(self.depth >= 1, "depth", self.depth, ">= 1")
        require(self.weight_std > 0, "weight_std", self.weight_std, "> 0")
        require(self.bias_std >= 0, "bias_std", self.bias_std, ">= 0")
        require(self.ridge >= 0, "ridge", self.ridge, ">= 0")

    def optimizers(self) -> dict[str, dict[str, dict[str, float]]]:
        """That of the authors' code."""
        return {"images": {"adam": {"lr": 0.04}}}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Turn class labels into centred targets of regression."""
        classes = int(max(probe["labels"].max(), nets.images()[1].max())) + 1
        nets.images.soften(classes, learn=self.learn_labels, centred=True)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the images."""
        x, y = nets.images()
        classes = y.shape[1]
        targets = one_hot(batch["labels"], classes).double() - 1 / classes
        yield "images", mean(0.5 * (self.predict(x, y, batch["inputs"]) - targets).square())

    def predict(self, x: Tensor, y: Tensor, inputs: Tensor) -> Tensor:
        """Kernel ridge prediction [B, C] for `inputs` from the support x [N, ...] with labels y [N, C]."""
        with torch.autocast(x.device.type, enabled=False):
            x, y, inputs = x.double(), y.double(), inputs.double()
            return krr(self.kernel(x, x), self.kernel(inputs, x), y, self.ridge)

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Neural tangent kernel [A, B]."""
        _, ntk = relu_kernels(a, b, depth=self.depth, weight_std=self.weight_std, bias_std=self.bias_std)
        return ntk
