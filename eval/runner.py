"""Runs a model over a task's examples: in batches of like length, resumable, any error ends the run.

Answers go to an append-only file as they come, so a run that was killed continues where it was. With several
processes (`accelerate launch`) each answers every n-th item into a file of its own; the first process gathers
these files into one, before the work and after it, so another number of processes continues as well.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.conversation import Conversation
from vlm.errors import DataError, VLMError
from vlm.eval.predictions import AnswerFile, Prediction
from vlm.eval.task import picture_names

if TYPE_CHECKING:
    from vlm.model import VLM

BATCHES_BETWEEN_WRITES = 2
MINUTE = 60.0
PATIENCE = timedelta(days=7)  # of a process for the slowest other one

Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What one pass over the examples needs.

    Attributes:
        ids: of the items, in the order of `conversations`.
        candidates: for multiple choice by likelihood, every item's choices.
        generation: fields of `GenerationConfig`.
        header: what identifies the run; a file with another header is not continued.
    """

    ids: Sequence[str]
    conversations: Sequence[Conversation]
    generation: Mapping[str, Any]
    header: Mapping[str, Any]
    candidates: Sequence[Sequence[str]] | None = None


def rank_and_world() -> tuple[int, int]:
    """This process's number and their count, as `accelerate launch` tells them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def answer_all(model: VLM, work: Work, path: Path, title: str, say: Say) -> list[Prediction]:
    """Every item's answer, in the order of `work.ids`; what the file holds already is not asked again.

    Raises:
        DataError: an item could not be answered; its id is named.
    """
    rank, world = rank_and_world()
    if rank == 0:
        _gather(path, work)
    meet()
    done = AnswerFile(path, work.header).load()
    if strange := done.keys() - set(work.ids):
        raise DataError(f"{path} holds an answer to {min(strange)}, which is not among the items")
    file = AnswerFile(path if world == 1 else path.with_suffix(f".{rank}of{world}.jsonl"), work.header)
    file.load()
    todo = [n for n in range(rank, len(work.ids), world) if work.ids[n] not in done]
    if done and todo:
        say(f"{title}: {len(done)} answers are there already, {len(todo)} to go")
    # Questions about the same pictures are read together, and equal lengths side by side waste no padding;
    # the longest come first and show at once whether memory holds.
    pictures = {n: picture_names(work.conversations[n].images) for n in todo}
    lengths: Counter[tuple[str, ...]] = Counter()
    for n in todo:
        lengths[pictures[n]] += _length(work.conversations[n])
    todo.sort(key=lambda n: (-(lengths[pictures[n]] // 32), pictures[n], n))
    size = int(work.generation.get("batch_size", 16)) * BATCHES_BETWEEN_WRITES
    clock = _Clock(len(todo), title, say)
    for start in range(0, len(todo), size):
        group = todo[start : start + size]
        file.append(_answer(model, work, group))
        clock.tick(len(group))
    meet()
    if rank:
        return []
    done = _gather(path, work)
    return [done[id] for id in work.ids]


def _length(conversation: Conversation) -> int:
    return sum(len(turn.text) + 256 * (len(turn.parts) - 1) for turn in conversation.turns)


def _answer(model: VLM, work: Work, group: Sequence[int]) -> list[Prediction]:
    """The answers of some items; on an error the one item that has it is looked for and named."""
    with _naming(work.ids[n] for n in group):
        try:
            return _ask(model, work, group)
        except VLMError:
            for n in group:
                try:
                    _ask(model, work, [n])
                except VLMError as error:
                    raise DataError(f"item {work.ids[n]}: {error}") from error
            raise


@contextmanager
def _naming(ids: Iterator[str]) -> Iterator[None]:
    """Adds to any other error which items were at work."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, VLMError):
            error.add_note(f"while these items were answered: {', '.join(ids)}")
        raise


def _ask(model: VLM, work: Work, group: Sequence[int]) -> list[Prediction]:
    conversations = [work.conversations[n] for n in group]
    if work.candidates is None:
        answers = model.ask_batch(conversations, **work.generation)
        return [
            Prediction(work.ids[n], a.text, a.logprob, a.usage.completion_tokens, a.finish_reason, a.margin)
            for n, a in zip(group, answers, strict=True)
        ]
    listed = [work.candidates[n] for n in group]
    rows = model.score(conversations, listed)
    found = []
    for n, options, scores in zip(group, listed, rows, strict=True):
        ranked = sorted(range(len(options)), key=lambda option: -scores[option])
        best = ranked[0]
        margin = scores[best] - scores[ranked[1]] if len(ranked) > 1 else None
        found.append(Prediction(work.ids[n], options[best], scores[best], 0, "choice", margin))
    return found


class _Clock:
    """Says after the first minute how long the run will take, and how far it is every five."""

    def __init__(self, total: int, title: str, say: Say) -> None:
        self.total, self.title, self.say = total, title, say
        self.start, self.done, self.next = time.monotonic(), 0, MINUTE

    def tick(self, count: int) -> None:
        self.done += count
        spent = time.monotonic() - self.start
        if spent >= self.next and self.done < self.total:
            left = spent / self.done * (self.total - self.done) / MINUTE
            rate = self.done / spent
            self.say(f"{self.title}: {self.done}/{self.total}, {rate:.1f} items/s, {left:.1f} minutes to go")
            self.next = spent + 5 * MINUTE


def meet() -> None:
    """Lets all processes come to this point. Gloo, whatever the device: all that is needed is a meeting.

    Raises:
        VLMError: another process has ended.
    """
    if rank_and_world()[1] == 1:
        return
    import torch.distributed as group

    try:
        if not group.is_initialized():
            group.init_process_group("gloo", timeout=PATIENCE)
        group.barrier()
    except RuntimeError as error:
        raise VLMError("another process of this run has ended; what it said tells why") from error


def leave() -> None:
    """Ends what `meet` began, if it did."""
    if rank_and_world()[1] > 1:
        import torch.distributed as group

        if group.is_initialized():
            group.destroy_process_group()


def parts(path: Path) -> list[Path]:
    """The files that several processes have left of one file of answers, whatever their number was."""
    form = re.compile(re.escape(path.stem) + r"\.\d+of\d+\.jsonl")
    return sorted(each for each in path.parent.glob("*.jsonl") if form.fullmatch(each.name))


def forget(path: Path) -> None:
    """Drops a file of answers and its parts; only the first process may, before the others have begun."""
    for each in (path, *parts(path)):
        each.unlink(missing_ok=True)


def _gather(path: Path, work: Work) -> dict[str, Prediction]:
    """All answers that are there, in one file; only the first process does this, while no other one writes.

    The parts go only after their answers are on the disk in the whole: a kill in between loses none.

    Raises:
        ConfigError: one of the files is another run's.
    """
    left = parts(path)
    found = [AnswerFile(part, work.header).load() for part in left]
    whole = AnswerFile(path, work.header)
    done = whole.load()
    for answers in found:
        whole.append(each for id, each in answers.items() if id not in done)
        done |= answers
    for part in left:
        part.unlink()
    return done
