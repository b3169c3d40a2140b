"""An adapter on disk: `adapter.safetensors`, `config.json`, `README.md`; and a whole model from it.

Only the adapter is saved. The frozen parts are named by id and by the SHA-256 of their tensors, so that
an adapter never runs, unnoticed, on weights that it was not trained with.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlm import __version__
from vlm.adapter_file import file_content, read_adapter, renewed_card, replace_files
from vlm.adapters.positions import regrid
from vlm.config import AbstainConfig, ModelConfig, from_dict, to_dict
from vlm.errors import ConfigError, WeightsError
from vlm.guide import Guide
from vlm.known_answers import KnownAnswers
from vlm.language import LanguageModel
from vlm.model import VLM, fresh_adapter
from vlm.vision import load_encoder
from vlm.weights import resolve

FORMAT = 1
T = TypeVar("T")
FROZEN = ("encoder", "language_model")
ASSETS = Path(__file__).parent / "assets"


def adapter_folder(adapter: str | Path, *, offline: bool = False) -> Path:
    """The folder of a shipped adapter (`default`), a local one, or one on the Hugging Face hub (`ORG/NAME`).

    Raises:
        WeightsError: it is not there; the message names what is.
    """
    shipped = ASSETS / str(adapter)
    for folder in (shipped, Path(os.path.expanduser(adapter))):
        if all(os.path.isfile(folder / name) for name in ("config.json", "adapter.safetensors")):
            return folder
    known = sorted(folder.parent.name for folder in ASSETS.glob("*/config.json"))
    if str(adapter).partition("@")[0].count("/") == 1 and not os.path.exists(adapter):
        from vlm.weights_hub import fetch_adapter

        try:
            return fetch_adapter(str(adapter), offline=offline)
        except WeightsError as problem:
            raise WeightsError(f"there is no folder {adapter}; as a name on the hub: {problem}") from problem
    raise WeightsError(
        f"{adapter} is no adapter: give a folder with adapter.safetensors and config.json, "
        f"or one that ships ({', '.join(known) or 'none yet'})"
    )


def require_own_name(out: Path) -> None:
    """Raises:
    WeightsError: `out` would be taken for an adapter that ships wherever it is asked for.
    """
    if (ASSETS / str(out) / "config.json").is_file() and out.resolve() != (ASSETS / str(out)).resolve():
        raise WeightsError(f"{out} is the name of an adapter that ships: call this one otherwise")


def require_new(out: Path) -> None:
    """Sees to it before any work that an adapter can be written to a folder of its own.

    Raises:
        WeightsError: there is something already, the name is that of an adapter that ships, or the place
            cannot be written to.
    """
    require_own_name(out)
    try:
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise WeightsError(f"{out} is there already: name a new folder, or an empty one")
        with tempfile.TemporaryDirectory(
            dir=next(parent for parent in out.absolute().parents if parent.exists())
        ):
            pass
    except OSError as problem:
        raise WeightsError(f"{out} cannot be written: {problem.strerror or problem}") from problem


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's `config.json`.

    Raises:
        WeightsError: it cannot be read, lacks something, or comes from a later format.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise WeightsError(f"{path} cannot be read: {problem}") from problem
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise WeightsError(
            f"{path} is not of format {FORMAT}: install the version of vlm-adapters that made it"
        )
    hashes = values.get("hashes")
    if not isinstance(hashes, dict) or not hashes.keys() >= {"encoder", "language_model"}:
        raise WeightsError(f"{path} does not say which frozen parts the adapter was trained with")
    seen = values.get("features")
    if not isinstance(seen, dict) or not all(type(seen.get(key)) is int for key in ("tokens", "width")):
        raise WeightsError(f"{path} does not say which features the adapter reads (features: tokens, width)")
    return values


def model_config(folder: Path, values: Mapping[str, Any]) -> ModelConfig:
    """What the `config.json` of a folder says of the model.

    Raises:
        WeightsError: a key is missing, unknown or of the wrong type.
    """
    return _section(ModelConfig, folder, values, "model")


def abstain_config(folder: Path, values: Mapping[str, Any]) -> AbstainConfig | None:
    """When the adapter abstains, or None where nobody has fitted it.

    Raises:
        WeightsError: a key is missing, unknown or of the wrong type.
    """
    return _section(AbstainConfig, folder, values, "abstain") if "abstain" in values else None


def _section(kind: type[T], folder: Path, values: Mapping[str, Any], name: str) -> T:
    try:
        return from_dict(kind, values[name])
    except (KeyError, TypeError, ConfigError) as problem:
        raise WeightsError(f"{folder / 'config.json'} is not usable: {problem}") from problem


def save_abstain(folder: Path, fitted: AbstainConfig) -> None:
    """Writes into an adapter's `config.json` when it abstains; the rest stays as it is.

    Raises:
        WeightsError: the file cannot be read or written.
    """
    config = read_config(folder) | {"abstain": to_dict(fitted)}
    replace_files(folder, {"config.json": _json_bytes(config)})


def save_guide(folder: Path, guide: Guide, out: Path | None = None) -> None:
    """Writes what guides an adapter into its file, in place of a guide of the same kind; all else stays.

    Known answers take the threshold to abstain with them: other answers have other confidences.

    Args:
        out: write the adapter there instead, without its card, whose scores are of another one.

    Raises:
        WeightsError: a file cannot be read or written.
    """
    old, config, new = read_adapter(folder), read_config(folder), guide.tensors()
    others = {name: tensor for name, tensor in old.guides.items() if not name.startswith(guide.PREFIX)}
    content = file_content(old.stored, others | new)
    card = renewed_card(folder, old.sha256, content) if out is None else {}
    if isinstance(guide, KnownAnswers):
        config.pop("abstain", None)
    files = {"adapter.safetensors": content, "config.json": _json_bytes(config), **card}
    replace_files(out or folder, files)


def save_adapter(
    model: VLM, folder: Path, *, card: str = "", tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the adapter: a reader finds every file whole, the old one or the new.

    Args:
        card: text of README.md.
        tensors: instead of the adapter's own tensors (an average of them, say).

    Raises:
        WeightsError: the disk is full or the folder cannot be written.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in (tensors or model.adapter.state_dict()).items()}
    config = {
        "format": FORMAT,
        "version": __version__,
        "model": to_dict(model.config),
        "features": {"tokens": model.encoder.tokens, "width": model.encoder.width},
        "hashes": {part: model.hashes[part] for part in FROZEN if part in model.hashes},
    }
    write_adapter(folder, state, config, card)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: str) -> None:
    """Writes the three files of an adapter; none takes its place before all are on the disk.

    Raises:
        WeightsError: the disk is full (what was there stays) or the folder cannot be written.
    """
    files = {
        "adapter.safetensors": file_content(tensors, {}),
        "config.json": _json_bytes(config),
        "README.md": card.encode(),
    }
    replace_files(folder, files)


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def build_model(
    config: ModelConfig, *, device: str = "cpu", dtype: str = "float32", offline: bool = False
) -> VLM:
    """Frozen parts from their ids and a fresh adapter.

    Raises:
        WeightsError: a frozen part is missing or damaged.
        ConfigError: sizes that do not fit.
    """
    precision = getattr(torch, dtype, None)
    if precision not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype {dtype!r} is none of float32, bfloat16, float16")
    vision = resolve(config.vision.encoder, offline=offline)
    words = resolve(config.language_model, offline=offline)
    if vision.kind != "encoder" or words.kind != "language":
        raise ConfigError(
            f"{vision.id} is of kind {vision.kind} and {words.id} of kind {words.kind}: "
            f"vision.encoder wants an encoder, language_model a language model"
        )
    _read_ahead(words.path)
    encoder = load_encoder(config.vision, vision)
    language = LanguageModel.load(words.path, precision)
    adapter = fresh_adapter(config, encoder, language)
    hashes = {"encoder": vision.frozen_hash, "language_model": words.frozen_hash}
    model = VLM(config, encoder, language, adapter, hashes=hashes)
    return model.eval().to(device)


def _read_ahead(folder: Path) -> None:
    """Lets the system begin to read the large files while the encoder's libraries are imported."""
    if hasattr(os, "posix_fadvise"):
        for file in folder.glob("*.safetensors"):
            with open(file, "rb") as weights:
                os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def load_model(
    adapter: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    offline: bool = False,
    allow_different_frozen: bool = False,
    size: int = 0,
    guides: bool = True,
) -> VLM:
    """A whole model from an adapter; see `VLM.from_pretrained`.

    Args:
        size: side of the pictures in pixels, where it shall be another one than the adapter was trained with:
            its positions are interpolated, and what guides it, being of its own size, stays out.
        guides: whether what guides its captions and answers is loaded.
    """
    folder = adapter_folder(adapter, offline=offline)
    values = read_config(folder)
    config = model_config(folder, values)
    if size:
        config = replace(config, vision=replace(config.vision, size=size))
    abstain = abstain_config(folder, values)
    model = build_model(config, device=device, dtype=dtype, offline=offline)
    different = _check_frozen(model, values["hashes"], folder, allow_different_frozen)
    load_adapter(model, folder, values["features"]["tokens"] if size else 0, guides=guides and not size)
    if "language_model" in different:
        model.captioner = None  # it knows tokens, and those of another model may be other words
    model.adapter_name, model.abstain = str(adapter), abstain
    return model


def load_adapter(model: VLM, folder: Path, tokens: int = 0, *, guides: bool = True) -> None:
    """Loads an adapter's tensors, all of them and no others, into a model built for them, and what guides it.

    Args:
        tokens: image tokens that its positions are of, where the model's may be others.
        guides: whether what guides it is loaded, too.

    Raises:
        WeightsError: names or shapes differ, or a number is none.
    """
    file, encoder = read_adapter(folder), model.encoder
    width, cells, labels = encoder.width, encoder.tokens, len(encoder.labels)
    consensus = file.consensus(width, labels) if guides else None
    captioner = file.captioner(width, cells, labels, model.language) if guides else None
    answers = file.known_answers(width, cells) if guides else None
    tensors = regrid(file.tensors, tokens, encoder.tokens) if tokens else file.tensors
    try:
        model.adapter.load_state_dict(tensors, strict=True)
    except RuntimeError as problem:
        reason = " ".join(str(problem).split())
        raise WeightsError(
            f"{folder / 'adapter.safetensors'} does not fit its config.json: {reason}"
        ) from problem
    model.hashes["adapter"] = file.sha256
    model.consensus, model.captioner, model.known_answers = consensus, captioner, answers


def _check_frozen(model: VLM, expected: Mapping[str, str], folder: Path, allowed: bool) -> list[str]:
    """Which frozen parts are others than the adapter was trained with.

    Raises:
        WeightsError: some are, and it is not allowed.
    """
    different = [part for part, digest in expected.items() if model.hashes.get(part) != digest]
    if not different:
        return []
    names = " and ".join(part.replace("_", " ") for part in sorted(different))
    message = f"{folder} was trained with another {names} than the one found"
    if not allowed:
        raise WeightsError(f"{message}; --allow-different-frozen goes on all the same")
    warnings.warn(f"{message}; its answers may be worse", stacklevel=3)
    return different
