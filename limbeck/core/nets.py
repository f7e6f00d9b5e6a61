"""Named networks. Whoever a method yields is trained; everyone else stays bit for bit the same."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput, nearest
from limbeck.core.taps import Taps, untap, unwrap

Batch = dict[str, Any]

# What a batch holds of a text in the teacher's own tokens, where it has another tokenizer than the student.
RETOLD = ("inputs", "labels", "mask", "attention_mask", "spans", "words")


def retold(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch as the teacher reads it: in the tokens of its own tokenizer where it has one, else the same."""
    if "teacher_inputs" not in batch:
        return batch
    rest = {k: v for k, v in batch.items() if k not in RETOLD}
    return rest | {k: batch[f"teacher_{k}"] for k in RETOLD if f"teacher_{k}" in batch}


def outputs(module: nn.Module, batch: Mapping[str, Any], *, logits: bool = True) -> dict[str, Any]:
    """Run a network on a batch and name what it returns: {"logits": ..., "feats": [...], ...}, without prefix.

    A tensor is taken as logits, a mapping as named tensors. A module that lists `reads = ("inputs", "edges")` gets
    those entries of the batch; a transformers model gets its main input and the attention mask, and gives its hidden
    states, its head and embedding and, when its configuration says `output_attentions`, its attention maps; others get
    `inputs`. logits: False spares a language model those over its vocabulary, where it can do without.
    """
    inner: Any = unwrap(module)
    reads = getattr(inner, "reads", None)
    config = getattr(inner, "config", None)
    if reads is not None:
        out = module(*[batch[name] for name in reads])
    elif config is not None and hasattr(inner, "main_input_name"):
        asked = {str(inner.main_input_name): batch["inputs"], "output_hidden_states": True}
        if "segments" in batch:
            asked |= apart(batch["segments"])
        elif "attention_mask" in batch:
            asked["attention_mask"] = batch["attention_mask"]
        if not logits:
            asked["logits_to_keep"] = 1
        out = module(**asked)
    elif "segments" in batch:
        raise BadInput(f"{type(inner).__name__} cannot keep texts that share a row apart; leave `pack` out of the data")
    else:
        out = module(batch["inputs"]) if logits else module(batch["inputs"], logits=False)
    if isinstance(out, Tensor):
        return {"logits": out}
    if hasattr(out, "hidden_states") and out.hidden_states is not None:
        hidden = list(out.hidden_states)
        told: dict[str, Any] = {"tokens": hidden[0], "feats": hidden[1:], "hidden": hidden[-1]}
        told |= heads(inner)
        if logits and getattr(out, "logits", None) is not None:
            told["logits"] = out.logits
        if getattr(out, "attentions", None):
            told["attn"] = list(out.attentions)
        return told
    if isinstance(out, Mapping):
        return dict(out)
    if hasattr(out, "logits"):
        return {"logits": out.logits}
    raise BadInput(
        f"{type(inner).__name__} returns {type(out).__name__}; a network must return a tensor of logits or a dict of "
        "named tensors such as {'logits': ..., 'feats': [...]}"
    )


def apart(segments: Tensor) -> dict[str, Tensor]:
    """What keeps the texts of a row from seeing one another: attention_mask [B, 1, T, T], True where the place may be
    looked at, and position_ids [B, T] that begin anew with each text. segments [B, T]: see core/names."""
    t = segments.shape[1]
    place = torch.arange(t, device=segments.device)
    same = segments[:, :, None] == segments[:, None, :]
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = torch.where(begins, place, 0).cummax(1).values
    return {"attention_mask": (same & (place[:, None] >= place)).unsqueeze(1), "position_ids": place - start}


def can_spare_logits(module: nn.Module) -> bool:
    """Whether a language model can be asked for its hidden states without its logits."""
    inner: Any = unwrap(module)
    asked = getattr(inner.get_base_model() if hasattr(inner, "get_base_model") else inner, "forward", None)
    known = inspect.signature(asked).parameters if asked is not None else {}
    return "logits_to_keep" in known or "logits" in known


def heads(model: Any) -> dict[str, Any]:
    """Token embedding and vocabulary head of a transformers model, by name; without a head where it has none.

    head [V, D], head_bias [V], head_scale and head_softcap (numbers), head_lora: (A, B, s) of an adapter on the head.
    """
    found: dict[str, Any] = {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is not None:
        found["embedding"] = embedding.weight
    if head is None:
        return found
    found["head"] = head.weight
    if getattr(head, "bias", None) is not None:
        found["head_bias"] = head.bias
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    if scale != 1:
        found["head_scale"] = float(scale)
    if getattr(config, "final_logit_softcapping", None):
        found["head_softcap"] = float(config.final_logit_softcapping)
    for name in getattr(head, "active_adapters", ()):
        if name in getattr(head, "lora_A", ()):
            found["head_lora"] = head.lora_A[name].weight, head.lora_B[name].weight, float(head.scaling[name])
    return found


def device_of(module: nn.Module) -> torch.device:
    """Where a network's weights are; the CPU when it has none."""
    parameter = next(module.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Inside, every layer of the modules is in eval mode; afterwards each is in the mode that it was in."""
    modes = [(layer, layer.training) for module in modules for layer in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def read_by(generator: nn.Module, numbers: int, what: str, device: torch.device) -> Tensor:
    """What a generator makes of two codes of that many numbers; one clear sentence when it reads others."""
    try:
        with torch.no_grad(), evaluating(generator):
            made: Tensor = generator(torch.randn(2, numbers, device=device))
    except RuntimeError as error:
        raise BadInput(f"the generator does not read {what} of {numbers} numbers: {error}") from error
    return made


def reinitialised(module: nn.Module) -> nn.Module:
    """A trainable copy with new random weights from the global generator, by each layer's own `reset_parameters`."""
    fresh = copy.deepcopy(module)
    untap(fresh)
    for name, layer in fresh.named_modules():
        own = list(layer.parameters(recurse=False)) + list(layer.buffers(recurse=False))
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        elif own:
            where = f"{name} ({type(layer).__name__})" if name else type(layer).__name__
            raise BadInput(f"{where} cannot be initialised anew: it has no reset_parameters; give a factory instead")
    return fresh.requires_grad_(True)


class Nets:
    """A namespace of modules: `nets.student`, `nets.peers[0]`; assign to add one, such as a copy made in `setup`.

    frozen: players that are in eval mode, ask for no gradient and run under no_grad in `run`, such as "fake" or
    "assistants.0"; every name that starts with "teacher" is frozen from the start. companions: player -> others whose
    parameters train with it (the projectors of losses). factories: name -> how to build a fresh, randomly initialised
    network. taps: player -> Taps. logit_free: players whose logits can be made from their hidden states and head.
    """

    modules: dict[str, nn.Module]
    frozen: set[str]
    companions: dict[str, list[str]]
    factories: dict[str, Callable[[], nn.Module]]
    taps: dict[str, Taps]
    logit_free: set[str]
    device: torch.device

    _known: Any
    _modes: list[tuple[nn.Module, bool]]

    _OWN = frozenset(
        {"modules", "frozen", "companions", "factories", "taps", "logit_free", "device", "_known", "_modes"}
    )

    def __init__(self, **modules: nn.Module) -> None:
        self.modules, self.frozen, self.companions, self.factories, self.taps = {}, set(), {}, {}, {}
        self.logit_free, self.device = set(), torch.device("cpu")
        self._known, self._modes = None, []
        for name, module in modules.items():
            setattr(self, name, module)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("modules", {})
        if name not in modules:
            raise AttributeError(f"there is no network {name!r}{nearest(name, modules)}")
        return modules[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
            return
        self.modules[name] = value.to(self.device) if isinstance(value, nn.Module) else value
        if name.startswith("teacher"):
            self.freeze(name)

    def __contains__(self, name: str) -> bool:
        return name in self.modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def find(self, player: str) -> nn.Module:
        """The module behind a player's name: "student", "peers.0"."""
        root, _, rest = player.partition(".")
        module: nn.Module = getattr(self, root)
        for part in filter(None, rest.split(".")):
            module = module[int(part)] if part.isdigit() else getattr(module, part)  # type: ignore[index]
        return module

    def params(self, player: str) -> list[nn.Parameter]:
        """Trainable parameters of a player and its companions, each once."""
        modules = [self.find(player), *(self.find(c) for c in self.companions.get(player, ()))]
        return list({id(p): p for m in modules for p in m.parameters() if p.requires_grad}.values())

    def freeze(self, *players: str) -> None:
        """Eval mode, no gradients, and never trained unless a method thaws it."""
        for player in players:
            self.frozen.add(player)
            self.find(player).eval().requires_grad_(False)

    def thaw(self, *players: str) -> None:
        """Undo `freeze`."""
        for player in players:
            self.frozen.discard(player)
            self.find(player).train().requires_grad_(True)

    def is_frozen(self, player: str) -> bool:
        """Whether a player, or a network that it is a part of, is frozen."""
        return any(player == f or player.startswith(f"{f}.") for f in self.frozen)

    def fresh(self, name: str) -> nn.Module:
        """A new network with random weights from the global generator; it is not registered.

        Without a factory it is a copy of the network of that name, initialised anew by its own layers.
        """
        if name in self.factories:
            return self.factories[name]().to(self.device)
        if name in self.modules:
            return reinitialised(self.modules[name])
        known = {*self.factories, *self.modules}
        raise BadInput(f"nobody said how to build a fresh {name!r}{nearest(name, known)}")

    def retire(self, name: str, to: str) -> None:
        """Move the network `name` to the end of the frozen list `to`; a fresh one, tapped alike, takes its place."""
        old, retired, fresh = self.modules[name], self.modules[to], self.fresh(name)
        assert isinstance(retired, nn.ModuleList)
        if name in self.taps:
            taps = self.taps[name]
            self.taps[f"{to}.{len(retired)}"] = taps
            self.taps[name] = Taps(fresh, {n: p[0] if n in taps.single else p for n, p in taps.paths.items()})
        retired.append(old)
        setattr(self, name, fresh)
        self.freeze(to)

    def run(
        self, player: str, batch: Mapping[str, Any], *, through: bool = False, logits: bool = True
    ) -> dict[str, Any]:
        """Outputs of a network on a batch, with its taps, by name and without prefix; no gradient when frozen.

        through: let the gradient flow through a frozen network to what it is given, such as a generator's images.
        logits: False spares those over a vocabulary, where the network can do without.
        """
        grad = torch.is_grad_enabled() and (through or not self.is_frozen(player))
        with torch.set_grad_enabled(grad):
            seen = retold(batch) if player.startswith("teacher") else batch
            out = outputs(self.find(player), seen, logits=logits)
        if player in self.taps:
            out |= self.taps[player].read()
        return out

    def train(self) -> None:
        """Training mode for all but the frozen; for next to nothing while nobody has changed networks or modes."""
        known = set(self.frozen), [(module, len(module._modules)) for module in self.modules.values()]
        if known == self._known and all(layer.training is mode for layer, mode in self._modes):
            return
        for module in self.modules.values():
            module.train()
        for player in self.frozen:
            self.find(player).eval()

        self._known = known
        self._modes = [(layer, layer.training) for module in self.modules.values() for layer in module.modules()]

    def to(self, device: torch.device) -> None:
        """Move every network."""
        self.device = device
        for module in self.modules.values():
            module.to(device)
