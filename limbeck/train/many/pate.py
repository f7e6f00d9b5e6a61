"""Teachers that each saw another part of private data vote, with noise, on public examples; only the votes get out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.group import companions
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.partition import by_client, only, quiet
from limbeck.core.privacy import Ledger, epsilon
from limbeck.core.reduce import labelled, mean
from limbeck.core.views import another
from limbeck.losses.logits.ce import ce


@method(
    paper="Papernot et al. 2016 (PATE), sections 2 and 3; 2018 for Gaussian noise",
    year=2016,
    arxiv="1610.05755",
    code="tensorflow/privacy@3d038a4:research/pate_2018/core.py",
    differs="the student learns from labelled queries alone: the generative network that PATE-G trains on the other "
    "public examples is left out; privacy is counted at Renyi orders, which gives the same epsilon as the moments do",
)
@dataclass(frozen=True)
class PATE:
    """label(x) = argmax_j (n_j(x) + noise), n_j the votes of networks that were trained on disjoint private parts.

    First every voter minimises CE(labels) on its own part. Then the student minimises CE(label(x)) on public examples;
    each is voted on once, when it first comes, until there have been `queries` of them. Their own labels are not read.

    voters: how many private parts, >= 2; the paper has 250. public: the part of all examples that is public, in (0, 1).
    queries: how many labels are bought at most, >= 1.
    noise: "laplace" (LNMax) or "gaussian" (GNMax). scale: of it in votes, >= 0: 1 / gamma, the paper's is 20, or the
        deviation; 0 is the plurality, without any privacy.
    delta: chance in (0, 1) that privacy fails, for which `figures` tells epsilon.
    augment: of the pictures that the student sees again and again; as in `data: augment`.

    *Needs*: labels, one an example; `index`; a factory "peer" of voters, or else "student"; no teacher. Which part an
        example belongs to hangs on its index alone. *Relates to*: with noise 0 it is bagging and hard labels.
    *Differs*: see the card. `figures` tells the cost: `epsilon` holds whatever was voted and may be published, while
        `epsilon_of_votes`, which is smaller, hangs on private data itself and is for those who know them.
    """

    voters: int = 50
    public: float = 0.2
    queries: int = 200
    noise: Literal["laplace", "gaussian"] = "laplace"
    scale: float = 20.0
    delta: float = 1e-5
    augment: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        require(self.voters >= 2, "voters", self.voters, ">= 2")
        require(0 < self.public < 1, "public", self.public, "in (0, 1)")
        require(self.queries >= 1, "queries", self.queries, ">= 1")
        require(self.noise in ("laplace", "gaussian"), "noise", self.noise, '"laplace" or "gaussian"')
        require(self.scale >= 0, "scale", self.scale, ">= 0")
        require(0 < self.delta < 1, "delta", self.delta, "in (0, 1)")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Build the voters, and the ledger of what they have been asked."""
        if "index" not in probe or probe["labels"].ndim != 1:
            raise BadInput("pate needs `index` and one label an example in its batches")
        nets.voters = companions(nets, self.voters)
        nets.ledger = Ledger(int(probe.get("examples") or probe["index"].max() + 1), probe["inputs"], self.queries)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The voters, side by side; then the student."""
        yield Stage(steps, "voters", until=0.5, validated=False)
        nets.freeze("voters")
        yield Stage(steps, "student")

    def whose(self, index: Tensor) -> Tensor:
        """The voter [B] to whom each example belongs, always the same; those of `voters` itself are public."""
        shares = [(1 - self.public) / self.voters] * self.voters + [self.public]
        return by_client(index, torch.zeros_like(index), torch.tensor([shares]))

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of each voter, or of the student."""
        whose, counts = self.whose(batch["index"]), labelled(batch)
        if not clock.stage:
            for k in range(self.voters):
                own = only(batch, (whose == k) & counts)
                with quiet(nets.voters[k], own):
                    said = nets.run(f"voters.{k}", own)["logits"]
                yield f"voters.{k}", {"ce": mean(ce(said, own["labels"]), own.get("mask"))}
            return
        self.ask(nets, batch, (whose == self.voters) & batch.get("mask", torch.ones_like(counts)).bool())
        ledger = nets.ledger
        slots = ledger.draw(len(whose))
        inputs, labels, mask = ledger.inputs[slots], ledger.labels[slots], None
        if not len(slots):  # not even in a place that does not count is anything private read
            inputs = torch.zeros_like(batch["inputs"][:1])
            labels, mask = torch.zeros_like(whose[:1]), torch.zeros_like(counts[:1])
        with quiet(nets.student, {"inputs": inputs}):
            said = nets.run("student", {"inputs": another(inputs, self.augment)})["logits"]
        yield "student", {"ce": mean(ce(said, labels), mask)}

    @torch.no_grad()
    def ask(self, nets: Nets, batch: Batch, public: Tensor) -> None:
        """Let all voters vote on those public examples of a batch that are new."""
        new = nets.ledger.new(batch["index"], public)
        if len(new):
            inputs = batch["inputs"][new]
            with evaluating(nets.voters):
                said = [nets.run(f"voters.{k}", {"inputs": inputs})["logits"] for k in range(self.voters)]
            counts = torch.stack([nn.functional.one_hot(z.argmax(-1), z.shape[-1]) for z in said]).sum(0)
            nets.ledger.ask(batch["index"][new], inputs, counts, self.noise, self.scale)

    def figures(self, nets: Nets) -> dict[str, float]:
        """Labels that were voted, and the epsilon at `delta` that they cost."""
        ledger = nets.ledger
        costs = {"epsilon": ledger.free, "epsilon_of_votes": ledger.spent}
        return {"labels_voted": float(ledger.asked)} | {
            k: epsilon(v, ledger.orders, self.delta) for k, v in costs.items()
        }
