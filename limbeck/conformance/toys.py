"""Tiny worlds whose answer is known: one a folder of training methods, none a method.

Pictures of 8 x 8 in four classes, each a shape of its own, stand for everything that sees; texts of a Markov chain of
32 tokens, whose exact distribution is at hand, for everything that speaks; a Gaussian, whose score is known in closed
form, for everything that denoises. Networks have batch norm, or count their calls, so that whoever moves is seen.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.conformance import vectors
from limbeck.core import find
from limbeck.core.batches import Batches, Table
from limbeck.core.errors import BadInput
from limbeck.core.evaluate import kernel_logits
from limbeck.core.loop import Plan
from limbeck.core.maths import frechet_gaussians, kl
from limbeck.core.nets import Nets, evaluating, outputs
from limbeck.core.routing import Experts
from limbeck.core.sampler import EDM, Denoiser, GaussianDenoiser, generate
from limbeck.core.synset import SynSet
from limbeck.zoo.darts import darts

CLASSES, SIZE, EXAMPLES, BATCH = 4, 8, 96, 24


@dataclass
class Scene:
    """A method in its world.

    nets, data: what `fit` takes. plan: how long, and with which optimisers. score: how good the result is, higher is
    better. goal: the score of the known answer.
    """

    method: Any
    nets: Nets
    data: Any
    plan: Plan
    score: Callable[[Nets], float]
    goal: float = 1.0


def folder(name: str) -> str:
    """The folder of a training method, which decides its world: "plain", "samplers" ..."""
    parts = find.folder(name).split("/")
    return parts[1] if len(parts) > 1 else "plain"


def scene(name: str, **varied: Any) -> Scene:
    """The training method called `name`, with the knobs of its vector, in the world of its folder; see `place`."""
    return place(find.get(name)(**_tuples(vectors.read(name).get("knobs", {}))), folder(name), **varied)


def place(method: Any, where: str, *, norm: bool = True, mask: bool = False, batch: int = BATCH, **plan: Any) -> Scene:
    """A method in a freshly built world.

    norm: whether networks have batch norm. mask: whether some of the examples do not count. batch: examples a
    micro-batch. plan: changes to the world's plan.
    """
    if where not in WORLDS:
        raise BadInput(f"the suite has no world for train/{where}; add one to limbeck/conformance/toys.py")
    torch.manual_seed(0)
    made = WORLDS[where](World(method, norm, mask, batch))
    made.plan = replace(made.plan, **plan)
    return made


def _tuples(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Lists, which JSON has in the place of tuples, as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in knobs.items()}


@dataclass(frozen=True)
class World:
    """How a world is varied: see `scene`."""

    method: Any
    norm: bool
    mask: bool
    batch: int


# ---------------------------------------------------------------- pictures


class Eye(nn.Module):
    """A convolutional network: {"logits", "feats", "emb"} of pictures [B, 1, 8, 8]."""

    def __init__(self, width: int = 4, norm: bool = True, seed: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.blocks = nn.ModuleList([_block(1, width, 1, norm), _block(width, 2 * width, 2, norm)])
            self.head = nn.Linear(2 * width * 4, CLASSES)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        feats = []
        x = inputs
        for block in self.blocks:
            x = block(x)
            feats.append(x)
        emb = nn.functional.avg_pool2d(x, 2).flatten(1)
        return {"logits": self.head(emb), "feats": feats, "emb": emb}


def _block(takes: int, gives: int, stride: int, norm: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(takes, gives, 3, stride, 1), nn.BatchNorm2d(gives) if norm else nn.Identity(), nn.ReLU()
    )


def pictures(
    seed: int = 0, examples: int = EXAMPLES, *, mask: bool = False, classes: Iterable[int] = range(CLASSES)
) -> Table:
    """A lying bar, a standing bar, a frame or a dot in noise: what no flip or crop turns into another."""
    g = torch.Generator().manual_seed(seed)
    shapes = torch.zeros(CLASSES, SIZE, SIZE)
    shapes[0, 3:5] = shapes[1, :, 3:5] = shapes[3, 2:6, 2:6] = 1.0
    shapes[2] = 1.0
    shapes[2, 1:-1, 1:-1] = 0.0
    kinds = torch.tensor(list(classes))
    labels = kinds[torch.arange(examples) % len(kinds)]
    inputs = 2 * shapes[labels].unsqueeze(1) - 0.5 + 0.5 * torch.randn(examples, 1, SIZE, SIZE, generator=g)
    columns = {"inputs": inputs.to(torch.get_default_dtype()), "labels": labels}
    if mask:
        columns["mask"] = torch.rand(examples, generator=g) > 0.4
    return Table(columns, kind="images", classes=[str(c) for c in range(CLASSES)], mean=(0.0,), std=(1.0,))


@cache
def _teacher_state(kind: Callable[..., nn.Module], width: int, norm: bool) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        teacher = kind(width, norm, seed=7).float()
        table = pictures(5)
        optimizer = torch.optim.Adam(teacher.parameters(), 1e-2)
        for _ in range(40):
            loss = nn.functional.cross_entropy(teacher(table["inputs"].float())["logits"], table["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {k: v.detach().clone() for k, v in teacher.state_dict().items()}


def seeing_teacher(norm: bool, kind: Callable[..., nn.Module] = Eye, width: int = 8) -> nn.Module:
    """A network that knows the pictures."""
    teacher = kind(width, norm)
    teacher.load_state_dict(_teacher_state(kind, width, norm))
    return teacher


def accuracy(player: str) -> Callable[[Nets], float]:
    """Share of new pictures that a player names right."""

    def score(nets: Nets) -> float:
        table, net = pictures(99).to(nets.device), nets.find(player)
        training = net.training
        net.eval()
        with torch.no_grad():
            found = outputs(net, dict(table.columns))["logits"].argmax(-1)
        net.train(training)
        return float((found == table["labels"]).double().mean())

    return score


def _seeing(w: World, player: str = "student", **nets: nn.Module) -> Scene:
    made = Nets(**nets)
    for role, width in (("student", 4), ("peer", 4), ("assistant", 6), ("net", 4)):
        made.factories[role] = lambda width=width: Eye(width, w.norm)  # type: ignore[misc]
    data = Batches(pictures(mask=w.mask), w.batch, seed=3)
    fast = {"adam": {"lr": 1e-2}}  # papers have days, this has seconds
    plan = Plan(20, optimizer=fast, optimizers={"student": fast, "generator": fast}, log_every=1)
    return Scene(w.method, made, data, plan, accuracy(player))


def plain(w: World) -> Scene:
    """A teacher that knows, at hand or as a store of what it said, and a student that does not."""
    made = _seeing(w, teacher=seeing_teacher(w.norm), student=Eye(4, w.norm, seed=1))
    if not _accepts(made):
        table: Table = made.data.table
        with torch.no_grad():
            said = made.nets.teacher(table["inputs"])["logits"].log_softmax(-1).topk(CLASSES - 1)
        stored = {"teacher_ids": said.indices, "teacher_logprobs": said.values}
        made.data = Batches(replace(table, columns={**table.columns, **stored}), w.batch, seed=3)
    return made


def _accepts(made: Scene) -> bool:
    """Whether a method can be set up on batches that hold no signals of a teacher."""
    try:
        if hasattr(made.method, "setup"):
            made.method.setup(copy.deepcopy(made.nets), next(copy.deepcopy(made.data)))
    except BadInput:
        return False
    return True


def own(w: World) -> Scene:
    """The same; or a student in which an architecture is to be found, for a method that wants such a one."""
    made = plain(w)
    if _accepts(made):
        return made
    searched = _seeing(w, student=darts(classes=CLASSES, channels=1, width=4, cells=1))
    searched.nets.factories["student"] = lambda: darts(classes=CLASSES, channels=1, width=4, cells=1)
    searched.plan = replace(searched.plan, steps=60)
    return searched


def many(w: World) -> Scene:
    """The same with an assistant between the two."""
    assistants = nn.ModuleList([Eye(6, w.norm, seed=2)])
    return _seeing(w, teacher=seeing_teacher(w.norm), student=Eye(4, w.norm, seed=1), assistants=assistants)


def online(w: World) -> Scene:
    """Two peers, neither of whom knows."""
    return _seeing(w, "peers.0", peers=nn.ModuleList([Eye(4, w.norm, seed=1), Eye(5, w.norm, seed=2)]))


def _generator(reads: int) -> nn.Module:
    """Pictures from codes [B, reads], at the scale of real ones."""
    layers = (nn.Linear(reads, 32), nn.ReLU(), nn.Linear(32, SIZE * SIZE), nn.Unflatten(1, (1, SIZE, SIZE)))
    return nn.Sequential(*layers, nn.BatchNorm2d(1, affine=False))


def datafree(w: World) -> Scene:
    """A teacher, a student, and a generator of pictures from codes; the data only say how many."""
    latent = getattr(w.method, "latent", 8)
    made = _seeing(w, teacher=seeing_teacher(w.norm), student=Eye(4, w.norm, seed=1), generator=_generator(latent))
    made.plan = replace(made.plan, steps=240)
    return made


class Mosaic(nn.Module):
    """A transformer of 4 x 4 patches: {"logits", "feats", "emb"} of pictures [B, 1, 8, 8]."""

    def __init__(self, width: int, norm: bool = True, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.patches = nn.Conv2d(1, width, 2, 2)
            self.places = nn.Parameter(0.1 * torch.randn(16, width))
            blocks = (nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True) for _ in range(2))
            self.blocks = nn.ModuleList(blocks)
            self.norm = Witness() if norm else nn.Identity()
            self.head = nn.Linear(width, CLASSES)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x, feats = self.patches(inputs).flatten(2).mT + self.places, []
        for block in self.blocks:
            x = block(x)
            feats.append(x)
        emb = self.norm(x.mean(1))
        return {"logits": self.head(emb), "feats": feats, "emb": emb}


def masked(w: World) -> Scene:
    """A teacher and a student that see patches, of which a method may hide some."""
    made = _seeing(w, teacher=seeing_teacher(w.norm, Mosaic, 16), student=Mosaic(8, w.norm, seed=1))
    made.plan = replace(made.plan, steps=40)
    return made


def staged(w: World) -> Scene:
    """Who sees patches, in pools where a method wants several; texts for one that wants those."""
    table = pictures(mask=w.mask)
    pools = w.method.pools(table["labels"]) if hasattr(w.method, "pools") else {}
    if "texts" in pools:
        return pretrain(w)
    made = masked(w)
    if pools:
        made.data = {name: Batches(table.select(rows), w.batch, seed=3) for name, rows in pools.items()}
    return made


class Painter(nn.Module):
    """A convolutional network that makes `channels` of pictures [B, takes, 8, 8]: {"logits", "feats"}."""

    def __init__(self, takes: int, channels: int, width: int, stride: int, norm: bool, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList([_block(takes, width, stride, norm), _block(width, width, 1, norm)])
            self.head = nn.Conv2d(width, channels, 1)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x, feats = inputs, []
        for block in self.blocks:
            x = block(x)
            feats.append(x)
        return {"logits": self.head(x), "feats": feats}


def gans(w: World) -> Scene:
    """Pictures from their negatives; a wide generator, a small one, and who judges them."""
    made = _seeing(
        w,
        student=Painter(1, 1, 6, 1, w.norm, seed=1),
        generator=Painter(1, 1, 12, 1, w.norm, seed=2),
        discriminator=Painter(2, 1, 8, 2, w.norm, seed=3),
        features=seeing_teacher(w.norm),
    )
    table: Table = made.data.table
    columns = {**table.columns, "inputs": -table["inputs"], "labels": table["inputs"]}
    made.data = Batches(replace(table, columns=columns), w.batch, seed=3)
    made.plan = replace(made.plan, steps=60, optimizers=dict.fromkeys(("student", "generator"), made.plan.optimizer))
    made.score, made.goal = _likeness_of_pictures, 0.0
    return made


def _likeness_of_pictures(nets: Nets) -> float:
    """Minus the mean absolute error of what the student makes of new pictures in negative."""
    wanted = pictures(99).to(nets.device)["inputs"]
    with torch.no_grad(), evaluating(nets.student):
        return -float((nets.run("student", {"inputs": -wanted})["logits"] - wanted).abs().mean())


def continual(w: World) -> Scene:
    """Two tasks of two classes each, one after the other."""
    made = _seeing(w, student=Eye(4, w.norm, seed=1))
    halves = {f"task{i}": pictures(i, EXAMPLES // 2, mask=w.mask, classes=c) for i, c in enumerate(((0, 1), (2, 3)))}
    made.data = {name: Batches(table, w.batch, seed=3) for name, table in halves.items()}
    long = {"adam": {"lr": 3e-2}}  # enough of the second task to forget the first
    made.plan = replace(made.plan, steps=40, optimizers={"student": long})
    return made


def federated(w: World) -> Scene:
    """Two clients of whom each has seen little of two classes; a generator reads noise and a class."""
    latent = getattr(w.method, "latent", 8) + CLASSES
    made = _seeing(w, student=Eye(4, w.norm, seed=1), generator=_generator(latent))
    table: Table = made.data.table
    often = torch.rand(EXAMPLES, generator=torch.Generator().manual_seed(1)) < 0.8
    domain = torch.where(often, table["labels"] // 2, 1 - table["labels"] // 2)
    made.data = Batches(replace(table, columns={**table.columns, "domain": domain}), w.batch, seed=3)
    return made


def datasets(w: World) -> Scene:
    """Two pictures a class that begin as noise."""
    made = _seeing(w)
    made.nets.images = SynSet.noise((1, SIZE, SIZE), CLASSES, 2, seed=1)
    made.data = Batches(pictures(), per_class=w.batch // CLASSES, seed=3)
    made.plan = replace(made.plan, optimizers={"images": {"adam": {"lr": 0.1}}, "net": {"sgd": {"lr": 0.05}}})
    made.score = _taught
    return made


def _taught(nets: Nets) -> float:
    """Accuracy of kernel regression from the synthetic pictures."""
    table = pictures(99)
    with torch.no_grad():
        inputs, labels = nets.images()
        found = kernel_logits(inputs.cpu(), labels.cpu(), table).argmax(-1)
    return float((found == table["labels"]).double().mean())


# ---------------------------------------------------------------- a language


WORDS, LENGTH = 32, 6


class Witness(nn.Module):
    """Passes on what it gets and counts its calls in training mode, as batch norm does."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x


class Speaker(nn.Module):
    """A language model that looks one token back: {"logits", "hidden"} of token ids [B, T]."""

    def __init__(self, width: int, *, norm: bool = True, seed: int = 0, spread: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.words, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.norm = Witness() if norm else nn.Identity()
        with torch.no_grad():
            self.head.weight *= spread

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.words(inputs))
        return {"logits": self.head(hidden), "hidden": hidden}


class Chorus(Speaker):
    """A speaker that asks two of four experts at each place."""

    def __init__(self, width: int, *, norm: bool = True, seed: int = 0, spread: float = 1.0) -> None:
        super().__init__(width, norm=norm, seed=seed, spread=spread)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.experts = Experts(width, 2 * width, 4, 2)
            nn.init.normal_(self.experts.router.weight)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.words(inputs))
        hidden = hidden + self.experts(hidden)
        return {"logits": self.head(hidden), "hidden": hidden}


def language(w: World) -> Scene:
    """The teacher is the very Markov chain that wrote the texts, with experts where a method needs them."""
    made = _speaking(w, Speaker(4, norm=w.norm, seed=7, spread=3.0))
    return made if _accepts(made) else _speaking(w, Chorus(4, norm=w.norm, seed=7, spread=3.0))


def _speaking(w: World, teacher: Speaker) -> Scene:
    """Texts of a teacher, and a student that begins with none of what it knows."""
    g = torch.Generator().manual_seed(0)
    chances = teacher(torch.arange(WORDS))["logits"].detach().softmax(-1)
    text = torch.randint(WORDS, (EXAMPLES, 1), generator=g)
    for _ in range(LENGTH):
        text = torch.cat([text, torch.multinomial(chances[text[:, -1]], 1, generator=g)], 1)
    mask = (
        (torch.arange(LENGTH) >= torch.randint(1, LENGTH, (EXAMPLES, 1), generator=g))
        if w.mask
        else (torch.arange(LENGTH) > 0).expand(EXAMPLES, -1)
    )
    table = Table({"inputs": text[:, :-1], "labels": text[:, 1:], "mask": mask}, kind="tokens")
    nets = Nets(teacher=teacher, student=Speaker(8, norm=w.norm, seed=1))
    nets.factories["student"] = lambda: Speaker(8, norm=w.norm, seed=2)
    plan = Plan(40, optimizer={"adam": {"lr": 0.05}}, log_every=1)
    return Scene(w.method, nets, Batches(table, w.batch, seed=3), plan, _understanding, goal=0.0)


def _understanding(nets: Nets) -> float:
    """Minus KL(language || student) in nats a token, over all 32 contexts."""
    words = torch.arange(WORDS, device=nets.device)[:, None]
    with torch.no_grad():
        student, teacher = (nets.find(n)(words)["logits"][:, 0].double() for n in ("student", "teacher"))
    return -kl(student, teacher).mean().item()


class Reader(nn.Module):
    """Looks at the mean of a text beside each word, and says the class, or the words: {"logits", "hidden", "feats"}."""

    def __init__(self, width: int, *, norm: bool = True, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.words, self.body, self.head = (
                nn.Embedding(WORDS + 1, width),
                nn.Linear(width, width),
                nn.Linear(width, 2),
            )
        self.norm = Witness() if norm else nn.Identity()
        self.mask, self.tells_words = WORDS, False

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x = self.words(inputs)
        hidden = self.norm(x + self.body(x.mean(1, keepdim=True)))
        told = hidden @ self.words.weight[:-1].mT if self.tells_words else self.head(hidden.mean(1))
        return {"logits": told, "hidden": hidden, "feats": [hidden]}


def _sentences(seed: int, examples: int) -> Table:
    """Words of the lower or of the upper half of the vocabulary; every third text has no label."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (examples,), generator=g)
    text = torch.randint(2, WORDS // 2, (examples, LENGTH), generator=g) + WORDS // 2 * labels[:, None]
    known = (torch.arange(examples) % 3 > 0) | (seed > 0)
    return Table({"inputs": text, "labels": torch.where(known, labels, -100)}, kind="tokens", classes=["low", "high"])


def pretrain(w: World) -> Scene:
    """Texts of two sorts, few of them labelled; a teacher of words, and a student of both."""
    table = _sentences(0, 2 * EXAMPLES)
    nets = Nets(teacher=Reader(8, norm=w.norm, seed=7), student=Reader(8, norm=w.norm, seed=1))
    data = {
        name: Batches(table.select(rows), w.batch, seed=3) for name, rows in w.method.pools(table["labels"]).items()
    }
    return Scene(w.method, nets, data, Plan(60, optimizer={"adam": {"lr": 0.03}}, log_every=1), _sorting)


def _sorting(nets: Nets) -> float:
    """Share of new texts that the student sorts right."""
    table = _sentences(99, 200).to(nets.device)
    with torch.no_grad(), evaluating(nets.student):
        found = nets.student(table["inputs"])["logits"].argmax(-1)
    return float((found == table["labels"]).double().mean())


def augmented(w: World) -> Scene:
    """Pictures; or, for a method that reads texts alone, two sorts of these and a teacher that knows them."""
    made = plain(w)
    if _accepts(made):
        return made
    nets = Nets(teacher=_librarian(w.norm), student=Reader(8, norm=w.norm, seed=1))
    plan = Plan(60, optimizer={"adam": {"lr": 0.03}}, log_every=1)
    return Scene(w.method, nets, Batches(_sentences(1, EXAMPLES), w.batch, seed=3), plan, _sorting)


def _librarian(norm: bool) -> Reader:
    """A reader that adds up to which half of the vocabulary the words belong."""
    made = Reader(4, norm=norm, seed=7)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
        made.words.weight[:, 0] = torch.where(torch.arange(WORDS + 1) < WORDS // 2, -1.0, 1.0)
        made.head.weight[:, 0] = torch.tensor([-2.0, 2.0])
    return made


# ---------------------------------------------------------------- noise to data


MEAN, SPREAD, NOISE = (1.0, -0.5), (0.5, 0.8), EDM(t_min=0.02, t_max=10.0)


class Field(nn.Module):
    """A small network of points [B, 2] and times [B]; with `features` its inner layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), Witness(), nn.Linear(32, 32), nn.SiLU())
            self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, features: bool = False) -> Tensor:
        inner: Tensor = self.body(torch.cat([x, t.view(-1, 1).to(x)], 1))
        out: Tensor = self.head(inner)
        return inner if features else out


def samplers(w: World) -> Scene:
    """The teacher denoises a Gaussian exactly; the student is a network that knows nothing."""
    mean, spread = torch.tensor(MEAN), torch.tensor(SPREAD)
    data = mean + spread * torch.randn(EXAMPLES, 2, generator=torch.Generator().manual_seed(0))
    nets = Nets(teacher=GaussianDenoiser(mean, spread, NOISE), student=Denoiser(Field(1), NOISE, "edm"))
    nets.factories["student"] = lambda: Denoiser(Field(2), NOISE, "edm")
    table = Table({"inputs": data.to(torch.get_default_dtype()), "labels": torch.zeros(EXAMPLES, dtype=torch.long)})
    plan = Plan(100, optimizer={"adam": {"lr": 5e-2}}, optimizers={"student": {"adam": {"lr": 5e-3}}}, log_every=1)
    return Scene(w.method, nets, Batches(table, w.batch, seed=3), plan, _likeness, goal=0.0)


def _likeness(nets: Nets) -> float:
    """Minus the Frechet distance between what the student makes in one step and the Gaussian."""
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(9))
    made = generate(nets.student, noise.to(nets.device), 1).double().cpu()
    wanted = torch.tensor(MEAN).double(), torch.tensor(SPREAD).double().square().diag()
    return -frechet_gaussians(made.mean(0), made.T.cov(), *wanted).item()


# ---------------------------------------------------------------- networks to be made smaller


class Residual(nn.Module):
    """x + f(x), of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.last = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.relu(self.norm(self.first(x)))
        return nn.functional.relu(x + self.last(self.second(inner)))


class Tower(nn.Module):
    """A residual network: {"logits", "feats", "emb"} of pictures [B, 1, 8, 8]; its statistics are those of data."""

    def __init__(self, width: int = 8, blocks: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            self.blocks = nn.ModuleList(Residual(width) for _ in range(blocks))
            self.head = nn.Linear(width, CLASSES)
            self.train()
            with torch.no_grad():
                for _ in range(3):
                    self(pictures(5)["inputs"])
        self.eval()

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x = self.stem(inputs)
        feats = []
        for block in self.blocks:
            x = block(x)
            feats.append(x)
        emb = x.mean((2, 3))
        return {"logits": self.head(emb), "feats": feats, "emb": emb}


WORLDS: dict[str, Callable[[World], Scene]] = {
    "plain": plain,
    "self": own,
    "augmented": augmented,
    "many": many,
    "online": online,
    "datafree": datafree,
    "masked": masked,
    "staged": staged,
    "pretrain": pretrain,
    "gans": gans,
    "continual": continual,
    "datasets": datasets,
    "federated": federated,
    "samplers": samplers,
    "policy": language,
}
