"""`vlm train captioner`: a small network learns to caption; it speaks with the adapter's language model.

    vlm train captioner ADAPTER SRC [--out DIR]    half an hour for Flickr8k; SRC is anything with captions

The frozen features and labels of every picture and of its mirror image are looked up or computed, and a
network of seven million numbers learns what is said of them (`vlm.train.caption_net`), of all but `dev`.
Then pictures of `dev` are captioned without it and with it: if that is not better, nothing is written.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlm.adapter_file import read_adapter
from vlm.captioner import Captioner, CaptionNet
from vlm.checkpoint import save_guide
from vlm.conversation import ImageSource
from vlm.data.mirror import mirrored
from vlm.data.remember import captions_by_picture
from vlm.errors import DataError
from vlm.eval.metrics.captions import score_captions
from vlm.images import open_picture
from vlm.language import LanguageModel
from vlm.model import VLM
from vlm.options import add_common, apply_common, keep_memory, make_parser
from vlm.train.caption_net import Lessons, Text, teach
from vlm.train.opened import opened
from vlm.train.place import add_place, place, without_guides
from vlm.train.screen import Screen
from vlm.vision import VIEWS

SAID = 3
"""Times that a token must be said to be known."""
FEWEST, MOST, HELD = 500, 20_000, 200
"""Of fewer pictures nothing is learnt, of more a random part; so many of `dev`, at random, are captioned
without it and with it."""

Captions = dict[str, tuple[Tensor, list[str], list[str]]]
"""By picture: (V, C) label probabilities in each view, the feature cache's keys, and its captions."""


def captioned(source: str | Path, split: str, most: int) -> dict[str, tuple[ImageSource, list[str]]]:
    """At most so many captioned pictures of a part, at random where there are more.

    Raises:
        DataError: the part cannot be read or holds no captions.
    """
    found = captions_by_picture(source, split, divide=True)
    names = list(found) if len(found) <= most else random.Random(0).sample(list(found), most)
    return {name: found[name] for name in names}


def looked_at(model: VLM, found: Mapping[str, tuple[ImageSource, list[str]]], screen: Screen) -> Captions:
    """What captioned pictures show, those that can be read."""
    seen: Captions = {}
    for some in opened({name: image for name, (image, _) in found.items()}, screen):
        pictures = list(some.values())
        scores = torch.stack([model.features.see(pictures, view).scores for view in VIEWS], dim=1)
        for name, picture, said in zip(some, pictures, scores, strict=True):
            keys = [model.features.key(picture, view) for view in VIEWS]
            seen[name] = said.clone(), keys, found[name][1]
    return seen


def known_tokens(language: LanguageModel, captions: Sequence[Sequence[str]]) -> list[int]:
    """The end, and the tokens that are said often enough."""
    counts = Counter(token for texts in captions for text in texts for token in language.encode_text(text))
    del counts[language.frame.end]
    return [language.frame.end, *sorted(token for token, count in counts.items() if count >= SAID)]


def lessons(model: VLM, seen: Captions, tokens: Sequence[int]) -> Lessons:
    """What a network learns from: captions of the pictures, and of their mirror images."""
    places = {token: place for place, token in enumerate(tokens)}

    def heard(texts: Sequence[str | None]) -> list[Text]:
        ids = [model.language.encode_text(text) for text in texts if text is not None]
        return [[places[token] for token in text if token in places] for text in ids]

    held = list(seen.values())
    told = [captions for _, _, captions in held]
    scores = torch.stack([said for said, _, _ in held])

    def see(view: int, pictures: Tensor) -> tuple[Tensor, Tensor]:
        keys = [held[place][1][view] for place in pictures.tolist()]
        return model.features.stored(keys), scores[pictures, view]

    texts = [[heard(captions) for captions in told]]
    texts.append([heard(list(map(mirrored, captions))) for captions in told])
    return Lessons(see, texts)


def learn(model: VLM, source: str | Path, screen: Screen) -> tuple[Captioner, float, float]:
    """A captioner, and CIDEr of pictures of `dev` without it and with it.

    Raises:
        DataError: too few pictures, or captions are no better with it.
    """
    held = captioned(source, "dev", HELD)
    images = {name: image for name, (image, _) in held.items()}
    dev = [held[name] for some in opened(images, screen, "opening pictures of dev") for name in some]
    if not dev:
        raise DataError(f"no picture of the dev part of {source} can be read")
    seen = looked_at(model, captioned(source, "train-rest", MOST), screen)
    if len(seen) < FEWEST:
        raise DataError(f"{len(seen)} captioned pictures are too few to learn from: {FEWEST} are needed")
    tokens = known_tokens(model.language, [captions for _, _, captions in seen.values()])
    screen.say(f"{len(seen)} captioned pictures, {len(tokens)} tokens are known")
    encoder = model.encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = CaptionNet(
            tokens=len(tokens),
            wide=model.language.width,
            cells=encoder.tokens,
            channels=encoder.width,
            labels=len(encoder.labels),
        )
    net.hear(model.language.embeddings[torch.tensor(tokens)])
    captioner = Captioner.of(teach(net, lessons(model, seen, tokens), screen.progress), tokens)
    _forget_told(model, [image for image, _ in dev], screen)
    screen.say(f"{len(dev)} pictures of dev are captioned without it and with it")
    before, after = (_cider(model, each, dev) for each in (None, captioner))
    if not after > before:
        raise DataError(
            f"captions of pictures set aside have CIDEr {after:.1f} with what was learnt, {before:.1f} "
            "without: nothing is written"
        )
    return captioner, before, after


def _forget_told(model: VLM, images: Sequence[ImageSource], screen: Screen) -> None:
    """Leaves out a guide that was told what is said of the pictures set aside: it would judge by that."""
    if model.consensus is not None:
        seen = model.look([open_picture(image) for image in images])
        if model.consensus.fitted_to(seen).any():
            model.consensus = None
            screen.say("the adapter's guide was told captions of dev: it is left out of this comparison")


def _cider(
    model: VLM, captioner: Captioner | None, captioned: Sequence[tuple[ImageSource, Sequence[str]]]
) -> float:
    model.captioner = captioner
    said = [answer.text for answer in model.caption([image for image, _ in captioned])]
    return score_captions(said, [captions for _, captions in captioned], java=False).metrics["cider"]


def main(argv: list[str]) -> int:
    """Entry of `vlm train captioner`."""
    parser = make_parser(
        "vlm train captioner", "Teach a small captioner; it says captions with an adapter's language model."
    )
    add_place(parser)
    parser.add_argument("source", metavar="SRC", help="captioned pictures: a folder, table, public set")
    add_common(parser)
    args = parser.parse_args(argv)
    apply_common(args)
    keep_memory()
    folder, out = place(args)
    model = without_guides(folder, args)
    model.consensus = read_adapter(folder).consensus(model.encoder.width, len(model.encoder.labels))
    with Screen() as screen:
        captioner, before, after = learn(model, args.source, screen)
    save_guide(folder, captioner, out)
    print(
        f"CIDEr of captions of pictures set aside: {after:.1f}, {before:.1f} without; {out or folder} has a "
        "captioner now"
    )
    return 0
