"""Checkpoints: atomic, complete, checksummed, without pickle. A torn one is detected and the one before is used."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.core.errors import BadCheckpoint, LimbeckError

FILES = ("tensors.safetensors", "state.json")


def _pack(tree: Any, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    if isinstance(tree, Tensor):
        if id(tree) not in seen:  # tied tensors are stored once
            seen[id(tree)] = str(len(tensors))
            tensors[seen[id(tree)]] = tree.detach().cpu().contiguous().clone()
        return {"$tensor": seen[id(tree)]}
    if isinstance(tree, dict):
        return {"$dict": [[_pack(k, tensors, seen), _pack(v, tensors, seen)] for k, v in tree.items()]}
    if isinstance(tree, tuple):
        return {"$tuple": [_pack(v, tensors, seen) for v in tree]}
    if isinstance(tree, list):
        return [_pack(v, tensors, seen) for v in tree]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"a checkpoint cannot hold {type(tree).__name__}")


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(v, tensors) for v in tree]
    if isinstance(tree, dict):
        ((kind, body),) = tree.items()
        if kind == "$tensor":
            return tensors[body]
        if kind == "$tuple":
            return tuple(_unpack(v, tensors) for v in body)
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in body}
    return tree


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, step: int, tree: Any, *, keep: int = 2) -> Path:
    """Write `tree` (dicts, lists, tuples, tensors, plain values) as folder/step-XXXXXXXX, whole or not at all.

    keep: how many of the newest stay. A full disk raises LimbeckError and leaves the earlier checkpoints as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    packed = _pack(tree, tensors, {})
    target, draft = folder / f"step-{step:08d}", folder / f".draft-{step:08d}-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        save_file(tensors, draft / FILES[0])
        (draft / FILES[1]).write_text(json.dumps(packed))
        (draft / "manifest.json").write_text(json.dumps({name: _sha256(draft / name) for name in FILES}))
        for name in (*FILES, "manifest.json"):
            _sync(draft / name)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "space left" in str(error)
        reason = "the disk is full" if full else str(error)
        raise LimbeckError(
            f"could not save the checkpoint {target}: {reason}; earlier checkpoints are intact"
        ) from error
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load(path: Path) -> Any:
    """Read one checkpoint back. Raises BadCheckpoint when a file is missing, truncated or altered."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in FILES:
            if _sha256(path / name) != manifest[name]:
                raise BadCheckpoint(
                    f"{path / name} does not match its checksum: the checkpoint is corrupt or truncated"
                )
        return _unpack(json.loads((path / FILES[1]).read_text()), load_file(path / FILES[0]))
    except BadCheckpoint:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BadCheckpoint(f"{path} is not a whole checkpoint: {error}") from error


def latest(folder: Path) -> tuple[Any, Path] | None:
    """The newest checkpoint that is whole, and where it lies; None when there is none at all.

    Raises BadCheckpoint when there are some and all of them are torn.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    problem: BadCheckpoint | None = None
    for path in found:
        try:
            return load(path), path
        except BadCheckpoint as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names and bytes of a module's state: tells whether two runs start from the same network."""
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        digest.update(key.encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            if tensor.ndim
            else str(tensor.item()).encode()
        )
    return digest.hexdigest()
