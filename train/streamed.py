"""Training on more than memory holds: shards are read, encoded and learnt window by window.

Every process reads its own share of the shards and nothing else. A window is a small data set of its own: its
pictures are encoded, it is cut into batches of like length, and hints are swapped within it. A state says for
every process where its window begins and how many of its batches are learnt; a run that goes on reads that
window again, and continues with the very next example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vlm.data.collate import Group, Source, all_fitting, epoch_batches, group_by_image, group_name
from vlm.data.example import Example
from vlm.data.laps import Place, find_laps
from vlm.data.readers import BAD_SHARE
from vlm.data.rows import BadRow, TextRow
from vlm.data.text import all_spoken
from vlm.errors import ConfigError, DataError
from vlm.model import VLM
from vlm.train.config import TrainConfig
from vlm.train.loop import Step, Trainer, TrainingError
from vlm.train.prepare import MEMORY, FeatureStore
from vlm.train.processes import Processes

BATCHES = 16
"""Batches in a window, where memory holds as many."""
ENOUGH = 1000
"""Rows after which the share of unusable ones is judged; before that, at the end of a lap."""


class Feed:
    """One process's part of the recipe's shards, window by window.

    Attributes:
        place: where the window begins.
        used: batches of the window that have been given out.
        rows, bad: rows that were read since the run's first step, and those that cannot be used.
        texts: rows about no picture, which count among neither.

    Raises:
        ConfigError: fewer pictures a step than processes.
        DataError: the source is not in shards.
    """

    def __init__(self, config: TrainConfig, model: VLM, processes: Processes, *, offline: bool) -> None:
        if not config.sources:
            raise ConfigError("the recipe names no sources")
        self.config, self.model, self.source = config, model, config.sources[0]
        if config.batch < processes.count:
            raise ConfigError(f"batch={config.batch} leaves some of {processes.count} processes nothing")
        self.rank = processes.rank
        shard = (processes.rank, processes.count)
        self.laps = find_laps(_place_of(config), self.source.split, shard, config.seed)
        if offline and (remote := next((file for file in self.laps.files if "://" in file), "")):
            raise DataError(f"{remote} is not on this machine, and the network is off")
        self.size = config.batch // processes.count + (processes.rank < config.batch % processes.count)
        views = 2 if config.flip else 1
        held = MEMORY // (2 * views * model.encoder.tokens * model.encoder.width)
        self.most = max(self.size, min(BATCHES * self.size, held // 2))
        self.place, self.after, self.used = Place(), Place(), 0
        self.rows = self.bad = self.rows_after = self.bad_after = 0
        self.texts = self.texts_after = 0
        model.encoder.to(processes.accelerator.device)

    def window(self) -> tuple[list[Group], FeatureStore]:
        """The groups of the window at `place`, and their features; windows without a picture are passed by.

        Raises:
            DataError: more than 1 % of the rows cannot be used, or the share holds nothing.
        """
        began = self.place.lap
        while True:
            examples, bad, count, texts = self._read()
            source = Source(examples, self.source.per_image, self.source.weight)
            features, hints = self.model.features, self.model.config.hints
            groups = group_by_image([source])
            store = FeatureStore(features, groups, self.config.flip, hints, lambda *_: None)
            self.rows_after = self.rows + count
            self.bad_after = self.bad + len(bad) + len(store.bad)
            self.texts_after = self.texts + texts
            self._judge([str(row) for row in bad] + [str(problem) for problem in store.bad.values()])
            if usable := store.usable(groups):
                return usable, store
            if self.after.lap > began + 1:
                raise DataError(f"process {self.rank} finds nothing to learn in its share of the shards")
            self.advance()

    def _read(self) -> tuple[list[Example], list[BadRow], int, int]:
        """(examples, unusable rows, number of rows, rows about no picture) from `place` on; sets `after`."""
        examples: list[Example] = []
        bad: list[BadRow] = []
        names: set[str] = set()
        pictures = count = texts = 0
        for after, found in self.laps.rows(self.place):
            about_none = any(isinstance(item, TextRow) for item in found)
            count, texts = count + (not about_none), texts + about_none
            said, silent = all_spoken(item for item in found if isinstance(item, Example))
            said, unfit = all_fitting(said, self.model.processor)
            bad += [*(item for item in found if isinstance(item, BadRow)), *silent, *unfit]
            examples += said
            for example in said:
                if (name := group_name(example.images)) not in names:
                    names.add(name)
                    pictures += len(example.images)
            if pictures >= self.most:
                self.after = after
                return examples, bad, count, texts
        self.after = Place(self.place.lap + 1)
        return examples, bad, count, texts

    def _judge(self, bad: Sequence[str]) -> None:
        done = self.rows_after >= ENOUGH or self.after.lap > self.place.lap
        if done and self.bad_after > BAD_SHARE * self.rows_after:
            named = f": {'; '.join(bad[:5])}" if bad else ""
            raise DataError(
                f"{self.bad_after} of {self.rows_after} rows cannot be used (at most {BAD_SHARE:.0%} may be)"
                + named
            )

    def advance(self) -> None:
        """Leaves the window behind."""
        self.place, self.used = self.after, 0
        self.rows, self.bad, self.texts = self.rows_after, self.bad_after, self.texts_after

    def state(self) -> list[int]:
        """Where this process stands, in numbers."""
        place = self.place
        return [place.lap, place.part, place.row, self.used, self.rows, self.bad, self.texts]

    def restore(self, state: Sequence[int]) -> None:
        """Goes to where a process stood."""
        # States of runs that did not count rows about no picture have six numbers.
        lap, part, row, self.used, self.rows, self.bad, self.texts = (*state, 0)[:7]
        self.place = Place(lap, part, row)


def _place_of(config: TrainConfig) -> str:
    """The shards' name: below `data` where they are there, else as it is."""
    name = config.sources[0].name or config.data
    if not name:
        raise ConfigError("say where the shards are: data=FOLDER")
    below = Path(config.data) / name if config.data else Path(name)
    return str(below) if "://" not in name and below.exists() else name


class StreamTrainer(Trainer):
    """A run whose every process has a feed of its own."""

    def __init__(
        self,
        model: VLM,
        config: TrainConfig,
        feed: Feed,
        report: Callable[[Step], None],
        accelerator: Accelerator | None = None,
    ) -> None:
        self.feed = feed
        groups, store = feed.window()
        super().__init__(model, config, groups, store, report, accelerator)
        self.data_hash = feed.laps.fingerprint()

    def batches(self) -> Iterator[tuple[int, list[Group]]]:
        """(lap, this process's pictures of a step) from the next step on."""
        feed, config = self.feed, self.config
        while True:
            lap = feed.place.lap
            cut = epoch_batches(self.groups, feed.size, config.seed, lap, config.fast.length_groups)
            while feed.used < len(cut):
                feed.used += 1
                yield lap, [self.groups[i] for i in cut[feed.used - 1]]
            feed.advance()
            self.groups, self.store = feed.window()

    def mine(self, groups: Sequence[Group]) -> list[Group]:
        """All of them: the feed has divided the data already."""
        return list(groups)

    def progress(self) -> dict[str, Any]:
        """Where every process stands in its share."""
        return {"feeds": self.processes.gather(self.feed.state())}

    def continue_from(self, extra: dict[str, Any]) -> None:
        """Goes to where this process stood.

        Raises:
            TrainingError: there were more or fewer processes.
        """
        feeds = extra["feeds"]
        if len(feeds) != self.processes.count:
            raise TrainingError(
                f"the run was begun by {len(feeds)} processes, each with its share of the shards: "
                f"go on with as many, or give --fresh"
            )
        self.feed.restore(feeds[self.processes.rank])
        self.groups, self.store = self.feed.window()

    def counted(self) -> dict[str, Any]:
        """Rows that the processes have read for the steps so far; every process calls it."""
        feed = self.feed
        rows, bad, texts = map(int, self.processes.sums([feed.rows_after, feed.bad_after, feed.texts_after]))
        found = {"rows": rows, "unusable": bad, "laps": feed.place.lap}
        return {"streamed": found, "without_picture": texts}
