"""Training pictures that stand in the evaluation set, and the scores with and without them.

Look-alikes are found by perceptual hash and then confirmed by the distance of their frozen features. Equal
questions about other pictures are counted, not removed: most benchmarks repeat their questions. What an
adapter's guide was fitted to is known without the training pictures: it holds what it compares others with
(a captioner holds nothing of the kind; `vlm train captioner` teaches it nothing of `dev`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.conversation import ImageSource
from vlm.data.convert.common import IMAGE_SUFFIXES
from vlm.data.duplicates import Print, leaks, print_of
from vlm.data.example import Example
from vlm.data.remember import TOGETHER
from vlm.errors import DataError
from vlm.eval import report
from vlm.eval.task import picture_names, question
from vlm.images import open_picture

if TYPE_CHECKING:
    from vlm.eval.session import Session
    from vlm.model import VLM

NEAR = 0.9  # cosine of two pictures' mean features, from which they are the same picture


def overlap(session: Session, train: Path, answers: Sequence[str]) -> dict[str, Any]:
    """The report's part on contamination by the pictures below a training folder.

    Returns:
        how many pictures of the evaluation stand in the training folder, which, how many examples show one,
        the scores without these, and the share of questions that training asks too (None without a training
        split).

    Raises:
        DataError: no pictures below the folder, or one that cannot be read.
    """
    files = sorted(path for path in train.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{train} holds no training pictures")
    names = [picture_names(example.images) for example in session.examples]
    held = _pictures(session.examples)
    pairs = leaks(
        [_print(str(path), path) for path in files], [_print(n, image) for n, image in held.items()]
    )
    found = {
        one.name: other.name
        for one, other in pairs
        if one.sha256 == other.sha256 or same(session.model, held[one.name], other.name)
    }
    clean = [number for number, each in enumerate(names) if found.keys().isdisjoint(each)]
    return {
        "training_pictures": len(files),
        "pictures": len(found),
        "examples": len(names) - len(clean),
        "pairs": sorted(found.items())[:100],
        "without": _without(session, answers, clean) if found and clean else None,
        "questions_seen": _seen(session),
    }


def fitted(session: Session) -> dict[str, Any] | None:
    """How many of the evaluated pictures the task's guide was fitted to; None where nothing guides.

    Returns:
        `pictures` that it was fitted to, `of` how many, and the command that fitted it.
    """
    model = session.model
    guide = model.consensus if session.task.captions else model.known_answers
    if guide is None or session.likelihood:
        return None
    images, known = list(_pictures(session.examples).values()), 0
    for begin in range(0, len(images), TOGETHER):
        seen = model.look([open_picture(image) for image in images[begin : begin + TOGETHER]])
        known += int(guide.fitted_to(seen).sum())
    return {"pictures": known, "of": len(images), "command": guide.COMMAND}


def warning(found: Mapping[str, Any] | None) -> str:
    """What `fitted` found in words; empty where every picture is new."""
    if not found or not found["pictures"]:
        return ""
    return (
        f"{found['pictures']} of {found['of']} pictures are among those that the guide of this adapter was "
        f"fitted to (`{found['command']}`): of these the scores tell what it was told, not what it sees"
    )


def _pictures(examples: Sequence[Example]) -> dict[str, ImageSource]:
    """The examples' pictures, each once, by their names."""
    return {
        name: image
        for example in examples
        for name, image in zip(picture_names(example.images), example.images, strict=True)
    }


def lines(found: Mapping[str, Any], main: str) -> list[str]:
    """The part in words, for people: what was seen, then the score without it."""
    said = [
        f"{found['pictures']} pictures of {found['examples']} examples are among "
        f"{found['training_pictures']} training pictures"
    ]
    clean = found["without"]
    if clean and main in (clean["metrics"] or ()):
        ends = clean["intervals"].get(main)
        between = f" (95 % {ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
        said.append(f"{main} of the {clean['n']} other examples: {clean['metrics'][main]:.2f}{between}")
    elif found["examples"] and clean is None:
        said.append("no other example is left to score")
    if found["questions_seen"] is not None:
        said.append(f"{found['questions_seen']:.1f} % of the questions are asked in training, word for word")
    return said


def _print(name: str, source: ImageSource) -> Print:
    picture = open_picture(source)
    return print_of(name, picture.sha256, picture.pixels)


def same(model: VLM, one: ImageSource, other: ImageSource) -> bool:
    """Whether the frozen features of two pictures, averaged over their places, all but coincide."""
    import torch

    first, second = (model.encode([open_picture(source)])[0].mean(dim=0) for source in (one, other))
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0)) >= NEAR


def _without(session: Session, answers: Sequence[str], clean: Sequence[int]) -> dict[str, Any]:
    kept: list[Example] = [session.examples[n] for n in clean]
    scores = session.task.scores(kept, [answers[n] for n in clean], java=False)
    block = report.scores_block(scores)
    return {"n": len(kept), "metrics": block["metrics"], "intervals": block["intervals"]}


def _seen(session: Session) -> float | None:
    """Percent of the questions whose very words stand in the training split."""
    try:
        asked = {question(example).lower() for example in session.train()}
    except DataError:
        return None
    return 100 * sum(question(e).lower() in asked for e in session.examples) / len(session.examples)
