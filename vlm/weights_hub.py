"""Model ids that name other people's weights: `timm:`, `open_clip:` and Hugging Face repositories.

The Hugging Face cache comes before the hub, and the hub only where the network is allowed. Nothing but
safetensors, configuration and tokenizer files is ever fetched.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from vlm.errors import WeightsError
from vlm.weights import PINS, Origin, Resolved, folder_model, require_safetensors

REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
LANGUAGE_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
ENCODER_FILES = ["model.safetensors", "config.json"]
ADAPTER_FILES = ["adapter.safetensors", "config.json", "README.md"]
ELSEWHERE = ["*/*", "consolidated*"]  # other formats of the same weights


def resolve_hub(model_id: str, *, offline: bool) -> Resolved:
    """`vlm.weights.resolve` for ids that are neither pinned nor a folder."""
    if model_id.startswith("timm:"):
        return _timm(model_id, model_id.removeprefix("timm:"), offline)
    if model_id.startswith("open_clip:"):
        return _open_clip(model_id, model_id.removeprefix("open_clip:"), offline)
    match = REPOSITORY.fullmatch(model_id)
    if match is None:
        raise WeightsError(
            f"there is no model {model_id!r}: use {', '.join(PINS)}, a local folder, timm:NAME, "
            f"open_clip:MODEL/PRETRAINED, or ORG/NAME of the Hugging Face hub."
        )
    path, origin = _snapshot(model_id, match["repo"], match["revision"], LANGUAGE_FILES, offline)
    found = folder_model(model_id, path, origin)
    if found.kind != "language":
        raise WeightsError(f"{model_id} is an image encoder: call it timm:{found.model}.")
    return found


def fetch_adapter(repository: str, *, offline: bool = False) -> Path:
    """The folder of an adapter in a Hugging Face repository, `ORG/NAME` or `ORG/NAME@REVISION`.

    Raises:
        WeightsError: no such repository, no network, or it holds no adapter.
    """
    match = REPOSITORY.fullmatch(repository)
    if match is None:
        raise WeightsError(f"{repository!r} is neither an adapter's folder nor ORG/NAME of the hub.")
    folder, _ = _snapshot(repository, match["repo"], match["revision"], ADAPTER_FILES, offline)
    for name in ("adapter.safetensors", "config.json"):
        if not (folder / name).is_file():
            raise WeightsError(f"{repository} holds no adapter: {name} is missing.")
    return folder


def _timm(model_id: str, name: str, offline: bool) -> Resolved:
    folder = Path(name).expanduser()
    if folder.is_dir():
        found = folder_model(model_id, folder)
        if found.kind != "encoder":
            raise WeightsError(f"{folder} holds a language model, not a timm encoder.")
        return found
    if (match := REPOSITORY.fullmatch(name)) is not None:
        path, origin = _snapshot(model_id, match["repo"], match["revision"], ENCODER_FILES, offline)
        return folder_model(model_id, path, origin)
    import timm

    architecture = name.partition(".")[0]
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(architecture) else None
    if config is None:
        near = timm.list_models(f"*{architecture[:8]}*")[:3] if architecture else []
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise WeightsError(f"timm has no model {name!r}{hint}.")
    if not config.hf_hub_id:
        raise WeightsError(f"timm has no weights on the hub for {name!r}: give a folder, timm:FOLDER.")
    path, origin = _snapshot(model_id, config.hf_hub_id, None, ENCODER_FILES, offline)
    require_safetensors(path)
    return Resolved(model_id, "encoder", path, "timm", architecture, origin)


def _open_clip(model_id: str, name: str, offline: bool) -> Resolved:
    model, _, weights = name.partition("/")
    if not model or not weights:
        raise WeightsError(f"{model_id!r} names no weights: write open_clip:MODEL/PRETRAINED or MODEL/PATH.")
    local = Path(weights).expanduser()
    if local.exists():
        return Resolved(model_id, "encoder", _safetensors_file(local), "open_clip", model)
    if local.suffix or local.is_absolute():
        raise WeightsError(f"there is no file {weights}.")
    import open_clip

    if model not in open_clip.list_models():
        raise WeightsError(f"open_clip has no model {model!r}.")
    config = open_clip.get_pretrained_cfg(model, weights)
    if not config:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise WeightsError(f"open_clip has no weights {weights!r} for {model} (it has: {tags}).")
    hub = str(config.get("hf_hub") or "")
    if not hub:
        raise WeightsError(f"{model_id} is published as a pickle only, and a pickle can run code.")
    owner, repository, file = (*hub.split("/", 2), "")[:3]
    wanted = Path(file).with_suffix(".safetensors").name if file else "open_clip_model.safetensors"
    path, origin = _snapshot(model_id, f"{owner}/{repository}", None, [wanted], offline)
    if not (path / wanted).is_file():
        raise WeightsError(f"{owner}/{repository} holds no {wanted}, and pickles are refused.")
    return Resolved(model_id, "encoder", path / wanted, "open_clip", model, origin)


def _safetensors_file(path: Path) -> Path:
    """The file itself, or the one in a folder."""
    if path.is_dir():
        named = path / "open_clip_model.safetensors"
        found = [named] if named.is_file() else require_safetensors(path)
        if len(found) > 1:
            raise WeightsError(f"{path} holds {len(found)} safetensors files: name one of them.")
        return found[0]
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path} is no safetensors file, and a pickle can run code: convert it first.")
    return path


def _snapshot(
    model_id: str, repository: str, revision: str | None, files: list[str], offline: bool
) -> tuple[Path, Origin]:
    """The folder of a repository's files in the Hugging Face cache, fetched if need be and allowed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    fetch = partial(
        snapshot_download, repository, revision=revision, allow_patterns=files, ignore_patterns=ELSEWHERE
    )
    try:
        cached = Path(fetch(local_files_only=True))
        require_safetensors(cached)  # an interrupted download leaves part of the files
        return cached, "hf-cache"
    except HFValidationError as problem:
        raise WeightsError(f"{model_id!r} is no repository name.") from problem
    except (LocalEntryNotFoundError, WeightsError) as problem:
        if offline:
            raise WeightsError(
                f"{model_id} is not on this machine, and the network is off: run "
                f"`vlm weights get {model_id}` without --offline."
            ) from problem
    try:
        return Path(fetch()), "hub"
    except hub_failures() as problem:
        raise WeightsError(
            f"{model_id} could not be fetched from the Hugging Face hub: {reason_of(problem)}"
        ) from problem


def hub_failures() -> tuple[type[Exception], ...]:
    """What a call to the hub raises: no network, no such repository, no right to it, a disk that is full."""
    from huggingface_hub.errors import HfHubHTTPError

    # With the client library's own base class: which library it is depends on the version.
    bases = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return (OSError, *(kind for kind in bases if issubclass(kind, Exception)))


def reason_of(problem: Exception) -> str:
    """A failure's first line that says something."""
    return str(problem).strip().split("\n")[0][:200] or type(problem).__name__
