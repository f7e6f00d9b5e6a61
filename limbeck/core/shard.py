"""Several processes: gradient sums, sharded (FSDP2) networks, and states gathered whole for checkpoints.

With one process every function here is a plain pass-through.
"""

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from limbeck.core.errors import BadInput
from limbeck.core.nets import Nets

CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # never called as a whole, so they cannot gather what is theirs


def check(nets: Nets, accelerator: Accelerator) -> None:
    """Refuse what would train wrongly: another owner of the gradients than the loop."""
    kind = accelerator.distributed_type
    sharded = kind == DistributedType.FSDP
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (sharded and not accelerator.is_fsdp2):
        found = "FSDP version 1" if sharded else kind.value
        raise BadInput(f"training does not work under {found}; launch with FSDP version 2, or with plain processes")
    for name, module in nets.modules.items():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise BadInput(
                f"{name!r} is wrapped in DistributedDataParallel; give the module inside: the loop sums gradients"
            )


@torch.no_grad()
def agree(nets: Nets) -> None:
    """Give every process the networks of the first one: a stage may have made new ones from its own random numbers,
    and batch-norm statistics are those of each process's share of the data."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for module in nets.modules.values():
        for tensor in (*module.parameters(), *module.buffers()):
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.data, 0)


def first(thing: Any) -> Any:
    """What the first process has: times and measurements differ a little, and all must decide alike."""
    if not (dist.is_available() and dist.is_initialized()):
        return thing
    box = [thing]
    dist.broadcast_object_list(box, 0)
    return box[0]


def prepare(nets: Nets, accelerator: Accelerator, plain: MutableMapping[nn.Module, nn.Module]) -> None:
    """Shard the networks that are trained, once each, when Accelerate was launched with FSDP2.

    plain: takes a copy of each, as it was before, for `restore`.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return

    def shard(module: nn.Module, player: str) -> nn.Module:
        if isinstance(module, CONTAINERS):
            for key, part in module.named_children():
                module._modules[key] = shard(part, f"{player}.{key}")
            return module
        trained = any(p.requires_grad for p in module.parameters())
        if isinstance(module, FSDPModule) or not trained or nets.is_frozen(player):
            return module
        before = copy.deepcopy(module)
        # Accelerate shards a network together with its optimiser; the loop builds its own, over the shards
        sharded: nn.Module = accelerator.prepare(module, torch.optim.SGD(module.parameters()))[0]
        plain[sharded] = before
        return sharded

    for name, module in nets.modules.items():
        nets.modules[name] = shard(module, name)


def restore(nets: Nets, plain: Mapping[nn.Module, nn.Module]) -> None:
    """Put plain networks with the whole weights in the place of sharded ones, so that what leaves is clean."""

    def unshard(module: nn.Module) -> nn.Module:
        if isinstance(module, CONTAINERS):
            for key, part in module.named_children():
                module._modules[key] = unshard(part)
        if module not in plain:
            return module
        before = plain[module].train(module.training)
        before.load_state_dict(full(module))
        for mine, its in zip(before.parameters(), module.parameters(), strict=True):
            mine.requires_grad_(its.requires_grad)
        return before

    if plain:
        for name, module in nets.modules.items():
            nets.modules[name] = unshard(module)


def reshard(nets: Nets, accelerator: Accelerator) -> None:
    """Let go of what forward passes have gathered, so that weights and gradients are those that the optimiser knows."""
    if accelerator.distributed_type == DistributedType.FSDP:
        for module in nets.modules.values():
            for layer in module.modules():
                if isinstance(layer, FSDPModule):
                    layer.reshard()


def factor(accelerator: Accelerator) -> float:
    """What to multiply a loss by: FSDP averages gradients over processes, and the loop wants their sum."""
    return float(accelerator.num_processes) if accelerator.distributed_type == DistributedType.FSDP else 1.0


def sum_gradients(params: list[nn.Parameter], factor: float = 1.0) -> None:
    """Sum gradients over processes in flat buckets, a dtype each; sharded parameters were summed in backward.

    factor: by which the losses were multiplied for the sake of the sharded ones.
    """
    plain = [p for p in params if not isinstance(p, DTensor)]
    if not plain:
        return
    there = torch.tensor([p.grad is not None for p in plain], dtype=torch.int32, device=plain[0].device)
    dist.all_reduce(there, dist.ReduceOp.MAX)  # a branch may be reached on one process only
    used = [p for p, yes in zip(plain, there.tolist(), strict=True) if yes]
    for dtype in dict.fromkeys(p.dtype for p in used):  # in one order everywhere
        group = [p for p in used if p.dtype == dtype]
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= factor
        for p, piece in zip(group, flat.split([p.numel() for p in group]), strict=True):
            p.grad = piece.view_as(p)


def whole(value: Any) -> Any:
    """A tree of tensors with every shard gathered; all processes must ask."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {k: whole(v) for k, v in value.items()}
    return [whole(v) for v in value] if isinstance(value, (list, tuple)) else value


def full(module: nn.Module) -> dict[str, Tensor]:
    """The state of a network with every shard gathered."""
    state: dict[str, Tensor] = whole(dict(module.state_dict()))
    return state


def share(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A whole state, cut as that of the network is."""
    own = module.state_dict()
    return {k: _like(v, own[k]) if k in own else v for k, v in state.items()}


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state into a network, sharded or not."""
    module.load_state_dict(share(state, module))


def _like(value: Any, own: Any) -> Any:
    if isinstance(own, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value


def full_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser with every shard gathered."""
    state: dict[str, Any] = whole(optimizer.state_dict())
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole optimiser state; moments are sharded as their parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in state["state"].items():
        state["state"][index] = {k: _like(v, params[index]) if getattr(v, "ndim", 0) else v for k, v in moments.items()}
    optimizer.load_state_dict(state)


def gather_objects(thing: Any) -> list[Any]:
    """One entry a process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [thing]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, thing)
    return out
