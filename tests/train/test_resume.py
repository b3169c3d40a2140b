"""Exact resume: whatever ends a run, the same command goes on as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from vlm.config import to_dict
from vlm.errors import WeightsError
from vlm.train import precision, state
from vlm.train.config import FastConfig, OptimConfig
from vlm.train.loop import TrainingError
from vlm.train.record import read_log, trim_log

ROOT = Path(__file__).resolve().parents[2]
# A bare clone is importable from its own folder only.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
KILLER = Path(__file__).parent / "killed.py"
STEPS = 21


def write_recipe(path: Path, config: Any) -> Path:
    """A recipe as a YAML file."""
    import yaml

    path.write_text(yaml.safe_dump(to_dict(config)))
    return path


def losses(out: Path | str) -> list[tuple[int, float]]:
    """(step, loss) of a log, to the last bit: JSON writes the shortest digits that give the float back."""
    return [(row["step"], row["loss"]) for row in read_log(Path(out))]


@pytest.fixture
def long_recipe(recipe: Callable[..., Any], preferring: Callable[..., Any]) -> Callable[..., Any]:
    """A run in which everything random is used: dropout, mirrored pictures, drawn answers, an average."""

    def make(**keys: Any) -> Any:
        defaults: dict[str, Any] = {
            "sizes": {"dropout": 0.2},
            "steps": STEPS,
            "save_every": 3,
            "keep": 2,
            "flip": 0.5,
            "micro": 3,
            "optim": OptimConfig(lr=3e-3, warmup=2, average=0.9),
        }
        of = preferring if keys.get("objective") == "preference" else recipe
        return of(**(defaults | keys))

    return make


def run_killed(recipe: Path, *arguments: object) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, str(KILLER), str(recipe), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=840,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ended")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("keys", "at"),
    [
        ({}, range(1, 21)),
        ({"fast": FastConfig(lower_cache=8)}, (5, 13)),
        ({"objective": "cider", "samples": 2}, (5, 13)),
        ({"objective": "preference"}, (2, 8, 13)),
    ],
    ids=["plain", "lower_cache", "cider", "preference"],
)
def test_killed_at_each_of_20_steps(
    long_recipe: Any, tmp_path: Path, keys: dict[str, Any], at: Sequence[int]
) -> None:
    whole = write_recipe(tmp_path / "whole.yaml", long_recipe(out=str(tmp_path / "whole"), **keys))
    broken = write_recipe(tmp_path / "broken.yaml", long_recipe(out=str(tmp_path / "broken"), **keys))
    assert run_killed(whole, "steps") == [["-", "0"]]
    ends = run_killed(broken, "steps", *at)
    assert ends == [*([str(n), str(-signal.SIGKILL)] for n in at), ["-", "0"]]
    assert [step for step, _ in losses(tmp_path / "whole")] == list(range(1, STEPS + 1))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_inside_a_save(long_recipe: Any, tmp_path: Path) -> None:
    whole = write_recipe(tmp_path / "whole.yaml", long_recipe(out=str(tmp_path / "whole"), save_every=1))
    broken = write_recipe(tmp_path / "broken.yaml", long_recipe(out=str(tmp_path / "broken"), save_every=1))
    run_killed(whole, "steps")
    ends = run_killed(broken, "calls", *range(9))
    killed = [code for _, code in ends[:-1]]
    assert killed.count(str(-signal.SIGKILL)) >= 6, ends
    assert ends[-1] == ["-", "0"]
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    left = {path.name for path in (tmp_path / "broken" / "state").iterdir()}
    assert left == {f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}", state.WRITTEN}


def command(recipe: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "vlm",
        "train",
        str(recipe),
        "--offline",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]


def test_sigterm_saves_and_says_so(long_recipe: Any, tmp_path: Path) -> None:
    config = long_recipe(out=str(tmp_path / "out"), steps=400, save_every=400)
    recipe = write_recipe(tmp_path / "recipe.yaml", config)
    process = subprocess.Popen(
        command(recipe), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    log = tmp_path / "out" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "the same command goes on" in said
    made = losses(tmp_path / "out")
    assert 3 <= len(made) < 400
    path, damaged = state.newest_valid(tmp_path / "out" / "state")
    assert damaged == []
    assert path is not None
    assert path.name == f"step-{len(made):08d}"
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


def test_sigterm_while_pictures_are_read_leaves_with_a_word(long_recipe: Any, tmp_path: Path) -> None:
    many = replace(long_recipe().sources[0], limit=1500)
    config = long_recipe(out=str(tmp_path / "out"), sources=(many,), feature_cache=str(tmp_path / "features"))
    recipe = write_recipe(tmp_path / "recipe.yaml", config)
    process = subprocess.Popen(command(recipe), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr is not None
    assert any(line.startswith("reading pictures") for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert said == f"stopped; the same command goes on: {config.out}\n"
    assert not (tmp_path / "out" / "adapter.safetensors").exists()


def test_a_state_holds_the_generators_of_every_process_and_its_gpu() -> None:
    part = torch.nn.Linear(2, 2)
    states = [torch.full((4,), number, dtype=torch.uint8) for number in range(4)]
    optimizer = torch.optim.AdamW(part.parameters())
    files = state.pack(part, optimizer, None, states[:2], {}, states[2:])
    tensors = load(files["state.safetensors"])
    found = {name: int(value[0]) for name, value in tensors.items() if name.startswith("random/")}
    assert found == {"random/torch": 0, "random/torch/1": 1, "random/cuda": 2, "random/cuda/1": 3}


def finish(trainer: Any, steps: list[Any], said: list[str] | None = None) -> list[float]:
    trainer.resume((said if said is not None else []).append)
    trainer.run()
    return [step.loss for step in steps]


def stopped_after(trainer_of: Any, config: Any, step: int) -> None:
    """A run that is stopped in good order after a step."""
    trainer, _ = trainer_of(config)
    trainer.report = lambda made: trainer.stop() if made.step == step else None
    trainer.run()


def test_a_flipped_bit_is_found_and_the_state_before_is_used(
    long_recipe: Any, trainer_of: Any, tmp_path: Path
) -> None:
    whole = finish(*trainer_of(long_recipe(out=str(tmp_path / "whole"), steps=9)))
    config = long_recipe(steps=9)
    stopped_after(trainer_of, config, 6)
    newest = state.saved_states(Path(config.out) / "state")[-1] / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    said: list[str] = []
    assert finish(*trainer_of(config), said) == whole[3:]
    assert any("step-00000006 is damaged" in line for line in said)
    assert state.whole(newest.parent), "the damaged state was not written anew"


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_state_with_a_file_missing_is_no_state(long_recipe: Any, trainer_of: Any, name: str) -> None:
    config = long_recipe(steps=6)
    trainer, _ = trainer_of(config)
    trainer.run()
    older, newer = state.saved_states(Path(config.out) / "state")
    (newer / name).unlink()
    assert state.newest_valid(Path(config.out) / "state") == (older, [newer])


def test_a_full_disk_keeps_the_old_state(
    long_recipe: Any, trainer_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = finish(*trainer_of(long_recipe(out=str(tmp_path / "whole"), steps=9)))
    config = long_recipe(steps=9)
    trainer, _ = trainer_of(config)
    honest, calls = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 5:  # the first save makes four
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(handle)

    with monkeypatch.context() as patch, pytest.raises(WeightsError, match="No space left"):
        patch.setattr(state.os, "fsync", fsync)
        trainer.run()
    left = list((Path(config.out) / "state").iterdir())
    assert [path.name for path in left] == ["step-00000003"]
    assert finish(*trainer_of(config)) == whole[3:]


def test_a_real_full_disk(long_recipe: Any, trainer_of: Any) -> None:
    """A write beyond the limit that the system sets for files fails like one on a full disk."""
    import resource

    config = long_recipe(steps=3)
    trainer, _ = trainer_of(config)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(WeightsError, match="cannot be written"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list((Path(config.out) / "state").iterdir()) == []


def test_another_recipe_is_refused(long_recipe: Any, trainer_of: Any) -> None:
    config = long_recipe(steps=6)
    stopped_after(trainer_of, config, 3)
    (source,) = config.sources
    for changed, named in (
        (replace(config, seed=1), "seed"),
        (replace(config, optim=replace(config.optim, lr=1.0)), "optim.lr"),
        (replace(config, sources=(replace(source, per_image=2),), batch=3), "batch, sources.0.per_image"),
    ):
        trainer, _ = trainer_of(changed)
        with pytest.raises(TrainingError, match=rf"is of another recipe \({named}\)"):
            trainer.resume()
    trainer, _ = trainer_of(replace(config, note="other words", log_every=2, keep=3))
    trainer.resume()
    assert trainer.step == 3


def test_other_data_is_refused(long_recipe: Any, trainer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.train import prepare, shapes

    config = long_recipe(steps=6)
    stopped_after(trainer_of, config, 3)
    monkeypatch.setattr(prepare, "shapes", lambda count, seed: shapes.shapes(count, seed + 1))
    trainer, _ = trainer_of(config)
    with pytest.raises(TrainingError, match="other pictures or answers"):
        trainer.resume()


def test_a_state_of_an_older_version_is_read_with_the_defaults(long_recipe: Any, trainer_of: Any) -> None:
    config = long_recipe(steps=6)
    stopped_after(trainer_of, config, 3)
    path = Path(config.out) / "state" / "step-00000003"
    meta = json.loads((path / "state.json").read_text())
    for key in ("fast", "smoothing"):
        meta["extra"]["config"].pop(key)
    for key in ("data", "threads", "micro", "seconds", "bad", "bf16"):
        meta["extra"].pop(key)
    files = {
        "state.json": json.dumps(meta).encode(),
        "state.safetensors": (path / "state.safetensors").read_bytes(),
    }
    for name in files:
        (path / name).unlink()
    state.save_state(path.parent, 3, files, keep=2)
    trainer, _ = trainer_of(config)
    trainer.resume()
    assert trainer.step == 3


def test_the_number_of_threads_is_part_of_the_state(long_recipe: Any, trainer_of: Any) -> None:
    config = long_recipe(steps=6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        stopped_after(trainer_of, config, 3)
        torch.set_num_threads(1)
        said: list[str] = []
        trainer, _ = trainer_of(config)
        trainer.resume(said.append)
        assert torch.get_num_threads() == 2
        assert any("2 threads" in line for line in said)
    finally:
        torch.set_num_threads(before)


def test_a_run_that_moves_to_another_processor_says_so(
    long_recipe: Any, trainer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = long_recipe(steps=6, precision="auto")
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: True)
    stopped_after(trainer_of, config, 3)
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: False)
    said: list[str] = []
    trainer, _ = trainer_of(config)
    trainer.resume(said.append)
    assert not trainer.bf16
    assert any("started in bfloat16 and goes on in float32" in line for line in said)


def test_a_finished_run_has_nothing_to_do(long_recipe: Any, trainer_of: Any) -> None:
    config = long_recipe(steps=3)
    finish(*trainer_of(config))
    assert finish(*trainer_of(config)) == []


def test_a_log_that_ran_ahead_is_cut(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": float(n)} for n in (1, 2, 3, 2, 3, 4)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo'
    (tmp_path / "log.jsonl").write_text(text)
    trim_log(tmp_path, 3)
    assert losses(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_damage_never_makes_a_start_from_nothing_silently(long_recipe: Any, trainer_of: Any) -> None:
    config = long_recipe(steps=3)
    finish(*trainer_of(config))
    (only,) = state.saved_states(Path(config.out) / "state")
    (only / "state.safetensors").write_bytes(b"")
    said: list[str] = []
    trainer, _ = trainer_of(config)
    trainer.resume(said.append)
    assert trainer.step == 0
    assert any("starting anew" in line for line in said)
