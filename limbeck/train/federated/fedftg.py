"""Clients train on data that never leave them; the server repairs their average on pictures that it makes itself."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import one_hot

from limbeck.core.card import method, require
from limbeck.core.ensemble import mean_logits
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import pairwise_distances, reverse_kl
from limbeck.core.nets import Batch, Nets, evaluating, read_by
from limbeck.core.partition import Clients
from limbeck.core.reduce import mean
from limbeck.core.state import average
from limbeck.losses.logits.ce import ce


@method(
    paper="Zhang et al. 2022, section 3",
    year=2022,
    arxiv="2203.09249",
    differs="every client takes part in every round; while it is repaired the average keeps its batch-norm statistics",
)
@dataclass(frozen=True)
class FedFTG:
    """A round is `local` steps of every client, the average w = sum_k n_k / n w_k, and `server` repairs of it.

    Pictures are x = G(z, y) with noise z and y ~ sum_k n_k^y; clients count by a_k^y = n_k^y / sum_j n_j^y. A repair is
    one turn of the generator, which minimises -L_md + label CE(sum_k a_k^y D(x; w_k), y)
    + diversity exp(-mean_ij |x_i - x_j| |z_i - z_j|), and `tuning` turns of the server, which minimises on new pictures
    L_md = sum_k a_k^y KL(D(x; w) || D(x; w_k)).

    clients: how many to make from the student when the recipe does not give them, >= 1.
    alpha: > 0, where the batch has no `domain`: each class is shared out over the clients by a Dirichlet(alpha) draw,
        the more unevenly the smaller it is; the paper takes 0.3 and 0.6.
    local: steps a round, >= 1.
    server: repairs a round, >= 0; 0 is plain federated averaging.
    tuning: turns of the server in a repair, >= 1.
    label: weight >= 0 of the pictures' class. diversity: weight >= 0 of their difference.
    latent: numbers of noise, >= 1; the generator reads [B, latent + C], the noise and the class as one-hot.

    *Needs*: nets.student (the server), nets.generator unless server is 0, batches with labels and with `domain`, the
    client of each example, or `index`, by which they are shared out. *Relates to*: with server 0 it is federated
    averaging, its control; use `distill` where the data may be pooled.
    *Differs*: see the card. Rates of server and generator are not in the paper. The diversity is e to the minus of a
    product of whole distances, so that it says nothing about any but tiny pictures.
    """

    clients: int = 10
    alpha: float = 0.3
    local: int = 10
    server: int = 5
    tuning: int = 5
    label: float = 1.0
    diversity: float = 1.0
    latent: int = 100

    def __post_init__(self) -> None:
        for name, least in (("clients", 1), ("local", 1), ("server", 0), ("tuning", 1), ("latent", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f">= {least}")
        require(self.alpha > 0, "alpha", self.alpha, "> 0")
        for name in ("label", "diversity"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """Clients as in the paper."""
        clients, server = {"sgd": {"lr": 0.1, "weight_decay": 1e-3}}, {"sgd": {"lr": 0.01}}
        return {"clients": clients, "student": server, "generator": {"adam": {"lr": 1e-3}}}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Copy the server to the clients, and see to it that every example belongs to one."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise BadInput("`fedftg` holds all clients in one process; start it without a launcher")
        if "clients" not in nets:
            nets.clients = nn.ModuleList(copy.deepcopy(nets.student) for _ in range(self.clients))
        if "domain" in probe and int(probe["domain"].max()) >= (count := len(nets.clients)):
            raise BadInput(f"`domain` must be in [0, {count}), the clients, got {int(probe['domain'].max())}")
        with torch.no_grad(), evaluating(nets.student):
            classes = nets.run("student", probe)["logits"].shape[-1]
        nets.federation = Clients(len(nets.clients), classes, self.alpha)
        if self.server:
            read_by(nets.generator, self.latent + classes, "noise and class (`latent` + C)", nets.device)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of each client that has data in the batch; at the end of a round those of generator and server."""
        whose = nets.federation.meet(batch)
        if clock.t % self.local == 0:
            for client in nets.clients:
                client.load_state_dict(nets.student.state_dict())
        for k in whose.unique().tolist():
            own = {name: batch[name][whose == k] for name in ("inputs", "labels")}
            yield f"clients.{k}", mean(ce(nets.run(f"clients.{k}", own)["logits"], own["labels"]))
        if (clock.t + 1) % self.local and clock.t + 1 < clock.steps:
            return
        average(nets.student, nets.clients, nets.federation.weights)
        with evaluating(nets.student, nets.clients):
            for _ in range(self.server):
                yield "generator", self.hardness(nets, *self.imagine(nets, len(batch["labels"])))
                for _ in range(self.tuning):
                    with torch.no_grad():
                        _, x, y = self.imagine(nets, len(batch["labels"]))
                    yield "student", self.discrepancy(nets, x, y)[0]

    def imagine(self, nets: Nets, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noise z [B, latent], pictures x [B, ...] and their classes y [B]."""
        totals = nets.federation.counts.sum(0)
        y = torch.multinomial(totals, count, replacement=True)
        z = torch.randn(count, self.latent, device=totals.device)
        return z, nets.generator(torch.cat([z, one_hot(y, len(totals)).to(z)], 1)), y

    def discrepancy(self, nets: Nets, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """L_md [] and the log of the clients' joint prediction [B, C]."""
        share = nets.federation.knowledge[:, y]
        server = nets.run("student", {"inputs": x})["logits"]
        with torch.set_grad_enabled(x.requires_grad):  # to the pictures it flows through the clients, too
            clients = torch.stack([nets.run(f"clients.{k}", {"inputs": x})["logits"] for k in range(len(share))])
        return (share * reverse_kl(server, clients)).sum(0).mean(), mean_logits(clients, share)

    def hardness(self, nets: Nets, z: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The generator's loss: pictures that server and clients see differently, of their class, and different."""
        discrepancy, joint = self.discrepancy(nets, x, y)
        apart = pairwise_distances(x.flatten(1)) * pairwise_distances(z)
        spread = torch.exp(-apart.mean())
        return {"hard": -discrepancy, "label": self.label * ce(joint, y).mean(), "diversity": self.diversity * spread}
