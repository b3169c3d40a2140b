"""A run's state on disk: whole or not there at all, and exact to the last bit.

Each save is a folder `state/step-N` with the tensors and a manifest of their hashes; it is written under
another name, flushed, then renamed. The newest one whose hashes hold is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlm.errors import WeightsError
from vlm.train.optim import Average

PREFIX = "step-"
STAGING = ".saving"
WRITTEN = "adapter-step"


def pack(
    adapter: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    randoms: Sequence[Tensor],
    extra: Mapping[str, Any],
    devices: Sequence[Tensor] = (),
) -> dict[str, bytes]:
    """The files of a state.

    Args:
        randoms: the state of every process's random generator, this one's first.
        devices: the same of their GPUs' generators, where they run on GPUs.
    """
    tensors = {f"adapter/{k}": v for k, v in adapter.state_dict().items()}
    state = optimizer.state_dict()
    for index, slots in state["state"].items():
        for name, value in slots.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    if average is not None:
        tensors |= {f"average/{k}": v for k, v in average.state_dict().items()}
    for kind, states in (("torch", randoms), ("cuda", devices)):
        tensors |= {random_name(kind, rank): state for rank, state in enumerate(states)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    meta = {"groups": state["param_groups"], "extra": dict(extra)}
    return {"state.safetensors": save(tensors), "state.json": json.dumps(meta).encode()}


def random_name(kind: str, rank: int) -> str:
    """What the state of a process's generator (`torch` or `cuda`) is called among a state's tensors."""
    return f"random/{kind}/{rank}" if rank else f"random/{kind}"


def processes_of(tensors: Mapping[str, Tensor]) -> int:
    """How many processes saved a state."""
    return sum(name.startswith(random_name("torch", 0)) for name in tensors)


def save_state(folder: Path, step: int, files: Mapping[str, bytes], keep: int) -> Path:
    """Writes `folder/step-N` atomically, then drops all but the last `keep`.

    Raises:
        WeightsError: the disk is full or cannot be written; older states stay.
    """
    target = folder / f"{PREFIX}{step:08d}"
    staging = folder / f".{target.name}{STAGING}"
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files = {**files, "manifest.json": json.dumps(manifest).encode()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f".*{STAGING}"):
            shutil.rmtree(old)
        staging.mkdir()
        for name, content in files.items():
            with open(staging / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        # A whole state of this step is the same state: there is no moment without one.
        if not whole(target):
            shutil.rmtree(target, ignore_errors=True)
            os.replace(staging, target)
            _flush(folder)
    except OSError as problem:
        raise WeightsError(f"{target} cannot be written: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in saved_states(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _flush(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def saved_states(folder: Path) -> list[Path]:
    """Saved states, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*"))


def step_of(path: Path) -> int:
    """The step after which a state was saved."""
    return int(path.name.removeprefix(PREFIX))


def note_written(folder: Path, step: int) -> None:
    """Notes beside the states that the adapter of a step has been written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WRITTEN).write_text(str(step), encoding="utf-8")


def written_step(folder: Path) -> int | None:
    """The step whose adapter was written last; None where nobody knows."""
    try:
        return int((folder / WRITTEN).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def whole(path: Path) -> bool:
    """Whether a state's files are there and have the hashes of its manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return set(manifest) == {"state.safetensors", "state.json"} and all(
            hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
            for name, digest in manifest.items()
        )
    except (OSError, ValueError, TypeError):
        return False


def newest_valid(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest state whose hashes hold, and the damaged ones that were passed over."""
    damaged: list[Path] = []
    for path in reversed(saved_states(folder)):
        if whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state's tensors, and its `groups` and `extra`.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        return load((path / "state.safetensors").read_bytes()), json.loads((path / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as problem:
        raise WeightsError(f"{path} cannot be read: {problem}") from problem


def restore(
    path: Path,
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
    adapter: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    rank: int = 0,
) -> None:
    """Puts everything back where `pack` found it; a process that was not there keeps its random generators.

    Raises:
        WeightsError: the state belongs to another recipe.
    """

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer/").items():
        index, slot = name.split("/")
        slots.setdefault(int(index), {})[slot] = value
    try:
        adapter.load_state_dict(part("adapter/"), strict=True)
        optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if average is not None:
            average.load_state_dict(part("average/"))
        if rank < processes_of(tensors):
            torch.set_rng_state(tensors[random_name("torch", rank)])
    except (RuntimeError, ValueError, KeyError) as problem:
        raise WeightsError(f"{path} belongs to another recipe: {problem}") from problem
    device = tensors.get(random_name("cuda", rank))
    if device is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(device)
