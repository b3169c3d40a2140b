"""Features are the same with and without the cache, which stays within bounds and may be shared."""

from __future__ import annotations

import gc
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from vlm import features as module
from vlm.errors import DataError
from vlm.features import DAY, FeatureCache, Features
from vlm.images import Picture, open_picture
from vlm.vision import Encoder

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def encoder(make_tiny: Callable[..., VLM]) -> Encoder:
    return make_tiny("flamingo").encoder


class Counted(torch.nn.Module):
    """The encoder itself; only counts the pictures that reach it."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.inner, self.pictures = encoder, 0
        self.config, self.tokens, self.width = encoder.config, encoder.tokens, encoder.width
        self.preprocess, self.labels, self.label_size = encoder.preprocess, encoder.labels, 64

    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.pictures += len(pixels)
        return self.inner.look(pixels)


def pictures(draw: Draw, *seeds: int) -> list[Picture]:
    return [open_picture(draw(seed)) for seed in seeds]


def array(value: float, rows: int = 8, width: int = 64) -> np.ndarray:
    return np.full((rows, width), value, dtype=np.float16)


# --- features --------------------------------------------------------------------------------------------


def test_the_same_values_with_and_without_a_cache(encoder: Encoder, draw: Draw, tmp_path: Path) -> None:
    shown = pictures(draw, 1, 2, 3)
    plain = Features(encoder, "hash")(shown)
    assert plain.dtype == torch.float32
    assert torch.equal(plain, plain.half().float())
    cached = Features(encoder, "hash", FeatureCache(tmp_path / "cache"))
    assert torch.equal(cached(shown), plain)
    assert torch.equal(cached(shown), plain)
    again = Features(encoder, "hash", FeatureCache(tmp_path / "cache"))
    assert torch.equal(again(shown[::-1]), plain.flip(0))
    assert torch.equal(again.stored([again.key(p) for p in shown]), plain)


def test_each_picture_is_encoded_once(encoder: Encoder, draw: Draw, tmp_path: Path) -> None:
    counted = Counted(encoder)
    features = Features(counted, "hash", FeatureCache(tmp_path / "cache"))  # type: ignore[arg-type]
    one, two = pictures(draw, 1, 2)
    shown = features([one, two, one, one])
    assert counted.pictures == 2
    assert torch.equal(shown[0], shown[2])
    features([two, one])
    assert counted.pictures == 2
    features([one], "flip")
    assert counted.pictures == 3
    assert len(features(pictures(draw, *range(20, 40)))) == 20  # more than are encoded together
    assert counted.pictures == 23


def test_no_pictures(encoder: Encoder) -> None:
    assert Features(encoder, "hash")([]).shape == (0, encoder.tokens, encoder.width)


def test_a_key_covers_all_that_features_depend_on(encoder: Encoder, draw: Draw) -> None:
    one, two = pictures(draw, 1, 2)
    base = Features(encoder, "hash")
    keys = {base.key(one), base.key(two), base.key(one, "flip"), Features(encoder, "other").key(one)}
    before = encoder.config
    for changed in (replace(before, size=96), replace(before, stages=(3,)), replace(before, encoder="x")):
        encoder.config = changed
        keys.add(Features(encoder, "hash").key(one))
    encoder.config = before
    assert len(keys) == 7
    assert base.key(replace(one, name="another name")) == base.key(one)


def test_what_is_not_stored_is_told(encoder: Encoder, draw: Draw, tmp_path: Path) -> None:
    features = Features(encoder, "hash", FeatureCache(tmp_path / "cache"))
    (one,) = pictures(draw, 1)
    with pytest.raises(DataError, match="lost pictures"):
        features.stored([features.key(one)])
    with pytest.raises(DataError, match="lost pictures"):
        Features(encoder, "hash").stored(["key"])


def test_loud_features_stay_finite(encoder: Encoder, draw: Draw) -> None:
    class Loud(Counted):
        def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features, scores = super().look(pixels)
            return features * 1e9, scores

    values = Features(Loud(encoder), "hash")(pictures(draw, 1))  # type: ignore[arg-type]
    assert values.isfinite().all()
    assert values.abs().max() == 65504


def test_a_models_cache(make_tiny: Callable[..., VLM], draw: Draw, tmp_path: Path) -> None:
    model = make_tiny("flamingo")
    before = model.ask([draw(1)], "what?", max_new_tokens=6)
    model.features.cache = FeatureCache(tmp_path / "cache")
    assert model.ask([draw(1)], "what?", max_new_tokens=6).text == before.text
    assert len(model.features.cache) == 1  # no labels are told, so the classifier is not asked
    assert model.ask([draw(1)], "what?", max_new_tokens=6).logprob == pytest.approx(before.logprob, abs=1e-4)
    # A second model in the same process, with the same folder.
    other = make_tiny("qformer")
    other.features.cache = FeatureCache(tmp_path / "cache")
    assert other.ask([draw(1)], "what?", max_new_tokens=2).usage.images == 1
    assert len(other.features.cache) == 1


# --- the store -------------------------------------------------------------------------------------------


def test_values_come_back(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    assert cache.get("a") is None
    cache.put({"a": array(1.5), "b": np.zeros((0, 4), np.float16), "ü": array(-2, 1, 1)})
    for key, expected in (("a", array(1.5)), ("b", np.zeros((0, 4), np.float16)), ("ü", array(-2, 1, 1))):
        got = cache.get(key)
        assert got is not None
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.float16
        got[...] = 7  # the caller's own copy
    assert len(cache) == 3
    cache.close()
    reopened = FeatureCache(tmp_path / "cache")
    np.testing.assert_array_equal(reopened.get("a"), array(1.5))


def test_the_longest_unused_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000_000.0
    monkeypatch.setattr(module.time, "time", lambda: now)
    cache = FeatureCache(tmp_path / "cache", max_bytes=200_000)
    for i in range(7):
        now += DAY
        cache.put({f"{i}": array(i, 80, 128)})  # 20 kB each
    now += 2 * DAY
    assert cache.get("0") is not None  # used again: no longer the oldest
    for i in range(7, 12):
        now += 1
        cache.put({f"{i}": array(i, 80, 128)})
        assert cache.size() <= 200_000
    held = [i for i in range(12) if cache.get(f"{i}") is not None]
    assert 0 in held
    assert held[1:] == list(range(held[1], 12))
    assert 4 <= len(held) < 12
    for i in held:
        np.testing.assert_array_equal(cache.get(f"{i}"), array(i, 80, 128))


def test_a_read_writes_once_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000_000.0
    monkeypatch.setattr(module.time, "time", lambda: now)
    cache = FeatureCache(tmp_path / "cache")
    cache.put({"a": array(1)})
    written = cache._lmdb.info()["last_txnid"]
    now += DAY - 1
    cache.get("a")
    assert cache._lmdb.info()["last_txnid"] == written
    now += 2
    cache.get("a")
    cache.get("a")
    assert cache._lmdb.info()["last_txnid"] == written + 1


def test_bounds_that_hold_nothing(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", max_bytes=1000)
    cache.put({"a": array(1)})
    assert cache.get("a") is None
    assert len(cache) == 0


def test_a_thousand_values_in_a_small_store(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", max_bytes=500_000)
    for i in range(0, 1000, 8):
        cache.put({f"{k}": array(k % 100, 16, 64) for k in range(i, i + 8)})
        assert cache.size() <= 500_000
    assert cache.get("999") is not None
    assert (tmp_path / "cache" / "data.mdb").stat().st_size < 3_000_000


# --- shared ----------------------------------------------------------------------------------------------

WORKER = """
import sys, numpy as np
from pathlib import Path
from vlm.features import FeatureCache
cache = FeatureCache(Path(sys.argv[1]), max_bytes=int(sys.argv[3]))
name = sys.argv[2]
for i in range(150):
    key = f"{i % 40}"
    found = cache.get(key)
    if found is not None:
        assert (found == int(key)).all(), (key, found)
    else:
        own = np.full((4, 8), i, np.float16)
        cache.put({key: np.full((16, 64), int(key), np.float16), f"{name}-{i}": own})
print("done", len(cache))
"""


@pytest.mark.parametrize("bound", [50_000_000, 60_000])
def test_processes_at_once(bound: int, tmp_path: Path) -> None:
    """They read, write and make room in one folder at the same time."""
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", WORKER, str(folder)]
    started = [
        subprocess.Popen(
            [*command, name, str(bound)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name in ("one", "two")
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert out.startswith("done"), err
    cache = FeatureCache(folder, bound)
    assert cache.size() <= bound + 20_000
    for key in range(40):
        found = cache.get(f"{key}")
        if bound > 1_000_000:
            assert found is not None
        if found is not None:
            np.testing.assert_array_equal(found, array(key, 16, 64))


def test_a_process_that_is_killed_leaves_a_whole_store(tmp_path: Path) -> None:
    code = (
        "import os, sys, numpy as np\nfrom pathlib import Path\nfrom vlm.features import FeatureCache\n"
        "cache = FeatureCache(Path(sys.argv[1]))\ncache.put({'a': np.ones((8, 64), np.float16)})\n"
        "with cache._lmdb.begin(write=True) as write:\n"
        "    write.put(b'b', b'half', db=cache._values)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cache")], cwd=ROOT, timeout=120)
    assert done.returncode == -9
    cache = FeatureCache(tmp_path / "cache")
    np.testing.assert_array_equal(cache.get("a"), array(1))
    assert cache.get("b") is None
    cache.put({"b": array(2)})
    np.testing.assert_array_equal(cache.get("b"), array(2))


def test_a_folder_opened_twice_and_closed_once(tmp_path: Path) -> None:
    one, two = FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "cache")
    one.put({"a": array(1)})
    one.close()
    np.testing.assert_array_equal(two.get("a"), array(1))
    two.close()
    three = FeatureCache(tmp_path / "cache")
    np.testing.assert_array_equal(three.get("a"), array(1))
    del three
    gc.collect()
    assert not [place for place in module._OPEN if place[1] == (tmp_path / "cache").resolve()]


# --- damage ----------------------------------------------------------------------------------------------


def filled(folder: Path, values: int = 60) -> Path:
    cache = FeatureCache(folder)
    for i in range(values):
        cache.put({f"{i}": array(i, 81, 1280)})  # 200 kB
    cache.close()
    return folder / "data.mdb"


@pytest.mark.parametrize("damage", ["garbage", "empty file", "cut off", "a file"])
def test_damaged_folders_are_one_clear_line(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    data = filled(folder)
    if damage == "garbage":
        data.write_bytes(os.urandom(1 << 16))
    elif damage == "empty file":
        data.write_bytes(b"")
        cache = FeatureCache(folder)  # as good as new
        assert cache.get("1") is None
        return
    elif damage == "cut off":
        with data.open("r+b") as file:
            file.truncate(data.stat().st_size // 2)
    else:
        folder = tmp_path / "file"
        folder.write_text("no folder")
    with pytest.raises(DataError, match="cannot be opened") as caught:
        FeatureCache(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_damaged_value_is_made_anew(encoder: Encoder, draw: Draw, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    features = Features(encoder, "hash", cache)
    (one,) = pictures(draw, 1)
    good = features([one])
    for bad in (b"", b"abc", struct.pack("<ii", 4, 96) + b"short", struct.pack("<ii", -1, 96) + b"xx"):
        with cache._lmdb.begin(write=True) as write:
            write.put(features.key(one).encode(), bad, db=cache._values)
        assert torch.equal(features([one]), good)
        assert torch.equal(features.stored([features.key(one)]), good)


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk's end."""
    code = (
        "import resource, signal, sys, numpy as np\nfrom pathlib import Path\n"
        "from vlm.errors import DataError\nfrom vlm.features import FeatureCache\n"
        "cache = FeatureCache(Path(sys.argv[1]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "try:\n"
        "    for i in range(10): cache.put({str(i): np.zeros((81, 1280), np.float16)})\n"
        "except DataError as problem: print('told', problem)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("told the feature cache"), done.stderr
    assert done.stdout.count("\n") == 1
