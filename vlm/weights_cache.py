"""The verified cache: folders that appear whole or not at all, each with a manifest of hashes.

    ~/.cache/vlm/weights/NAME/manifest.json   {key, frozen_hash, files: {name: {size, mtime_ns, sha256}}}

A folder is written beside its place, synced and renamed, under a lock that other processes wait for.
A start compares sizes and times with the manifest (milliseconds); only `vlm weights verify`, or a file
whose time has changed (a copied cache), is hashed again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_root() -> Path:
    """`VLM_CACHE`, or `vlm` in the user's cache folder."""
    try:
        if chosen := os.environ.get("VLM_CACHE"):
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlm"
    except RuntimeError as problem:
        raise WeightsError(
            "this user has no home folder: set VLM_CACHE to a folder for weights."
        ) from problem


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def frozen_hash(named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Identity of a frozen network: SHA-256 over sorted names, shapes and float32 bytes.

    It is the same for a file saved as float32 and for the loaded module, on any device. Integer tensors
    (a batch norm's step counter) take no part: no answer depends on them.
    """
    digest = hashlib.sha256()
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    for name, tensor in sorted(pairs, key=lambda pair: pair[0]):
        _add(digest, name, tensor)
    return digest.hexdigest()


def frozen_hash_of_files(files: Iterable[Path]) -> str:
    """`frozen_hash` of all the tensors in some safetensors files, one in memory at a time."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        names = [(name, i) for i, handle in enumerate(opened) for name in handle.keys()]  # noqa: SIM118
        for name, file in sorted(names):
            _add(digest, name, opened[file].get_tensor(name))
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    import torch

    if not tensor.is_floating_point():
        return
    digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
    flat = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1)
    digest.update(flat.numpy().data)


def remembered_hash(path: Path, compute: Callable[[Path], str]) -> str:
    """`compute(path)`, noted in the cache for as long as the files' sizes and times stay the same.

    Hashing takes seconds a gigabyte, and every start of a model asks for it.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    note = cache_root() / "hashes" / hashlib.sha256(json.dumps(states).encode()).hexdigest()
    with suppress(OSError, ValueError):
        noted = note.read_text("ascii")
        if len(noted) == 64:
            return noted
    value = compute(path)
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        write_synced(note.with_suffix(f".{os.getpid()}"), value.encode())
        os.replace(note.with_suffix(f".{os.getpid()}"), note)
    return value


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a cached folder holds. `key` names the source and the conversion that made it."""

    key: str
    frozen_hash: str
    files: Mapping[str, Mapping[str, Any]]

    @property
    def sha256s(self) -> dict[str, str]:
        """File name -> hex SHA-256."""
        return {name: str(entry["sha256"]) for name, entry in self.files.items()}

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The folder's manifest, or None where there is none that can be read."""
        try:
            stored = json.loads((folder / MANIFEST).read_text("utf-8"))
            manifest = cls(str(stored["key"]), str(stored["frozen_hash"]), dict(stored["files"]))
            manifest.sha256s  # noqa: B018  (every entry has its hash, or the manifest is damaged)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return manifest

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest in one step."""
        body = {"key": self.key, "frozen_hash": self.frozen_hash, "files": self.files}
        write_synced(folder / (MANIFEST + ".new"), json.dumps(body, indent=1, sort_keys=True).encode())
        os.replace(folder / (MANIFEST + ".new"), folder / MANIFEST)


def damage(folder: Path, manifest: Manifest, *, rehash: bool = False) -> str | None:
    """What is wrong with a cached folder, in a few words, or None.

    A file whose size and time stand in the manifest is taken as sound unless `rehash`.
    """
    touched = False
    for name, entry in manifest.files.items():
        try:
            state = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if state.st_size != entry.get("size"):
            return f"{name} has {state.st_size} bytes instead of {entry.get('size')}"
        if rehash or state.st_mtime_ns != entry.get("mtime_ns"):
            if sha256_file(folder / name) != entry["sha256"]:
                return f"{name} has the wrong SHA-256"
            touched = True
    if touched:
        # Times differ in a copied cache: note the new ones, so that the next start is quick again.
        with suppress(OSError):  # a read-only cache hashes at every start
            Manifest(manifest.key, manifest.frozen_hash, _entries(folder, manifest.sha256s)).write(folder)
    return None


def _entries(folder: Path, sha256s: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    states = {name: (folder / name).stat() for name in sha256s}
    return {
        name: {"size": states[name].st_size, "mtime_ns": states[name].st_mtime_ns, "sha256": digest}
        for name, digest in sha256s.items()
    }


def install(folder: Path, key: str, size: int, build: Callable[[Path], str]) -> Manifest:
    """Have `build(temporary folder) -> frozen hash` fill `folder`, unless another process just did.

    Args:
        folder: the place in the cache.
        key: what must stand in the manifest of a finished folder.
        size: bytes that the build needs, checked first.

    Raises:
        WeightsError: no space, or no right to write there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            done = Manifest.read(folder)
            if done is not None and done.key == key and damage(folder, done) is None:
                return done
            _sweep(folder)
            free = shutil.disk_usage(folder.parent).free
            if free < size:
                raise OSError(errno.ENOSPC, f"{free >> 20} MB free")
            return _build(folder, key, build)
    except OSError as problem:
        raise explain(problem, folder, size) from problem


def explain(problem: OSError, folder: Path, size: int) -> WeightsError:
    """An `OSError` while writing the cache, said in one line that names the fix."""
    if problem.errno in FULL:
        return WeightsError(
            f"the disk is full: {folder} needs {size >> 20} MB; free some space or set VLM_CACHE to a "
            f"folder on another disk."
        )
    reason = problem.strerror or str(problem)
    return WeightsError(
        f"cannot write the weights cache {folder} ({reason}); set VLM_CACHE to a folder you may write to."
    )


def _build(folder: Path, key: str, build: Callable[[Path], str]) -> Manifest:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        identity = build(temporary)
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        for path in files:
            path.chmod(0o644)
            _sync(path)
        manifest = Manifest(key, identity, _entries(temporary, {p.name: sha256_file(p) for p in files}))
        manifest.write(temporary)
        temporary.chmod(0o755)
        _sync(temporary)
        if folder.exists():  # damaged, or made by an older conversion
            aside = tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent)
            os.rename(folder, Path(aside) / "old")
        os.rename(temporary, folder)
        _sync(folder.parent)
        _sweep(folder)
        return manifest
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sweep(folder: Path) -> None:
    """Remove what killed builds left behind; the lock is held, so nobody is using it."""
    for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock

    with FileLock(str(folder.parent / f".{folder.name}.lock")):
        yield


def _sync(path: Path) -> None:
    """Have the kernel write a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file and have it on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
