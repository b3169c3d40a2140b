"""A run's state on disk: whole or not there at all, and exact to the last bit.

Each save is a folder `state/step-N` with the tensors and a manifest of their hashes; it is written under
another name, flushed, then renamed. The newest one whose hashes hold is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlm.errors import WeightsError
from vlm.train.optim import Average

PREFIX = "step-"


def _pack(
    adapter: torch.nn.Module, optimizer: torch.optim.Optimizer, average: Average | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"adapter/{k}": v for k, v in adapter.state_dict().items()}
    state = optimizer.state_dict()
    for index, slots in state["state"].items():
        for name, value in slots.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    if average is not None:
        tensors |= {f"average/{k}": v for k, v in average.state_dict().items()}
    tensors["random/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"groups": state["param_groups"]}


def save_state(
    folder: Path,
    step: int,
    adapter: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `folder/step-N` atomically, then drops all but the last `keep`.

    Raises:
        WeightsError: the disk is full or cannot be written; older states stay.
    """
    target = folder / f"{PREFIX}{step:08d}"
    staging = folder / f".{target.name}.saving"
    tensors, meta = _pack(adapter, optimizer, average)
    files = {"state.safetensors": save(tensors), "state.json": json.dumps(meta | {"extra": extra}).encode()}
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["manifest.json"] = json.dumps(manifest).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for name, content in files.items():
            with open(staging / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staging, target)
    except OSError as problem:
        shutil.rmtree(staging, ignore_errors=True)
        raise WeightsError(f"{target} cannot be written: {problem.strerror or problem}") from problem
    for old in saved_states(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def saved_states(folder: Path) -> list[Path]:
    """Saved states, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*"))


def newest_valid(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest state whose hashes hold, and the damaged ones that were passed over."""
    damaged = []
    for path in reversed(saved_states(folder)):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            fine = all(
                hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
                for name, digest in manifest.items()
            )
        except (OSError, ValueError):
            fine = False
        if fine:
            return path, damaged
        damaged.append(path)
    return None, damaged


def load_state(
    path: Path, adapter: torch.nn.Module, optimizer: torch.optim.Optimizer, average: Average | None
) -> dict[str, Any]:
    """Puts everything back where `save_state` found it; returns its `extra`.

    Raises:
        WeightsError: the state belongs to another recipe.
    """
    try:
        tensors = load((path / "state.safetensors").read_bytes())
        meta = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as problem:
        raise WeightsError(f"{path} cannot be read: {problem}") from problem

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer/").items():
        index, slot = name.split("/")
        slots.setdefault(int(index), {})[slot] = value
    try:
        adapter.load_state_dict(part("adapter/"), strict=True)
        optimizer.load_state_dict({"state": slots, "param_groups": meta["groups"]})
    except (RuntimeError, ValueError, KeyError) as problem:
        raise WeightsError(f"{path} belongs to another recipe: {problem}") from problem
    if average is not None:
        average.load_state_dict(part("average/"))
    torch.set_rng_state(tensors["random/torch"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    extra: dict[str, Any] = meta["extra"]
    return extra
