"""Several processes: gradient sums, sharded (FSDP2) networks, and states gathered whole for checkpoints.

With one process every function here is a plain pass-through.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from limbeck.core.nets import Nets


@torch.no_grad()
def agree(nets: Nets, sharded: set[int]) -> None:
    """Give every process the networks of the first one: a stage may have made new ones from its own random numbers."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for module in nets.modules.values():
        if id(module) not in sharded:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, 0)


def prepare(nets: Nets, accelerator: Accelerator, done: set[int]) -> None:
    """Shard the networks that are trained, once each, when Accelerate was launched with FSDP2."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    for name, module in nets.modules.items():
        if id(module) not in done and name not in nets.frozen and any(p.requires_grad for p in module.parameters()):
            nets.modules[name] = accelerator.prepare_model(module)
            done.add(id(nets.modules[name]))


def factor(accelerator: Accelerator) -> float:
    """What to multiply a loss by: FSDP averages gradients over processes, and the loop wants their sum."""
    return float(accelerator.num_processes) if accelerator.distributed_type == DistributedType.FSDP else 1.0


def sum_gradients(params: list[nn.Parameter]) -> None:
    """Sum gradients over processes in flat buckets, a dtype each; sharded parameters were summed in backward."""
    plain = [p for p in params if not isinstance(p, DTensor)]
    if not plain:
        return
    there = torch.tensor([p.grad is not None for p in plain], dtype=torch.int32, device=plain[0].device)
    dist.all_reduce(there, dist.ReduceOp.MAX)  # a branch may be reached on one process only
    used = [p for p, yes in zip(plain, there.tolist(), strict=True) if yes]
    for dtype in {p.dtype for p in used}:
        group = [p for p in used if p.dtype == dtype]
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for p, piece in zip(group, flat.split([p.numel() for p in group]), strict=True):
            p.grad = piece.view_as(p)


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {k: _whole(v) for k, v in value.items()}
    return [_whole(v) for v in value] if isinstance(value, (list, tuple)) else value


def full(module: nn.Module) -> dict[str, Tensor]:
    """The state of a network with every shard gathered."""
    state: dict[str, Tensor] = _whole(dict(module.state_dict()))
    return state


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state into a network, sharded or not."""
    own = module.state_dict()
    module.load_state_dict({k: _like(v, own[k]) if k in own else v for k, v in state.items()})


def _like(value: Any, own: Any) -> Any:
    if isinstance(own, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value


def full_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser with every shard gathered."""
    state: dict[str, Any] = _whole(optimizer.state_dict())
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
