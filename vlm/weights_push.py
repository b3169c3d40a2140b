"""`vlm weights push`: an adapter's files, and no others, to a repository of the Hugging Face hub.

A run's folder also holds its training state, its log and its trackers' events, which are large or private:
what is pushed is a list of names, not what a pattern leaves over. All files go in one commit, so that
nobody loads half an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm.errors import WeightsError
from vlm.weights_hub import ADAPTER_FILES, REPOSITORY, hub_failures, reason_of

RUN_FILES = ["run.json", "curve.png", "risk.png"]
"""What a run leaves that its card shows or is filled from."""


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: of the commit.
        commit: its hash; `ORG/NAME@COMMIT` loads exactly these files.
        files: names of the files, as they are in the repository.
    """

    url: str
    commit: str
    files: tuple[str, ...]


def adapter_files(folder: Path) -> list[Path]:
    """The files of a sound adapter that are pushed: the adapter itself, its card, its run and its curve.

    Raises:
        WeightsError: the folder holds no adapter, or a damaged one.
    """
    from vlm.adapter_file import read_adapter
    from vlm.checkpoint import model_config, read_config

    if not folder.is_dir():
        raise WeightsError(f"{folder} is no folder")
    for name in ("adapter.safetensors", "config.json"):
        if not (folder / name).is_file():
            raise WeightsError(f"{folder} holds no adapter: {name} is missing")
    values = read_config(folder)
    model_config(folder, values)
    file, sizes = read_adapter(folder), values["features"]
    width, cells = int(sizes["width"]), int(sizes["tokens"])
    file.consensus(width)
    file.captioner(width, cells)
    file.known_answers(width, cells)
    return [folder / name for name in (*ADAPTER_FILES, *RUN_FILES) if (folder / name).is_file()]


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str = "",
    message: str = "",
    offline: bool = False,
) -> Pushed:
    """Uploads an adapter in one commit; makes the repository, and the branch, where they are not there yet.

    Args:
        folder: the adapter's.
        repository: `ORG/NAME`.
        private: make the repository private; one that is there and public is refused.
        revision: branch; empty: the main one.
        message: of the commit.

    Raises:
        WeightsError: no adapter, no token, no network, no right to write there, or a card that is refused.
    """
    match = REPOSITORY.fullmatch(repository)
    if match is None or match["revision"]:
        raise WeightsError(f"{repository!r} is not of the form ORG/NAME (a branch is given with --revision)")
    files = adapter_files(folder)
    if offline:
        raise WeightsError("the network is off (--offline or HF_HUB_OFFLINE): nothing is pushed")
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise WeightsError(
            "the hub wants to know who pushes: run `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    api = HfApi(library_name="vlm-adapters")
    operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
    failures: tuple[type[Exception], ...] = (*hub_failures(), ValueError, RuntimeError)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        # The hub ignores `private` for a repository that is there already.
        if private and not api.model_info(repository).private:
            raise WeightsError(f"{repository} is there already and is public: nothing is pushed")
        if revision and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repository,
            operations,
            commit_message=message or f"Adapter {folder.resolve().name}",
            revision=revision or None,
        )
    except failures as problem:
        raise WeightsError(f"{folder} could not be pushed to {repository}: {reason_of(problem)}") from problem
    return Pushed(commit.commit_url, commit.oid, tuple(path.name for path in files))
