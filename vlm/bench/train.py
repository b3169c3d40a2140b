"""`vlm bench train`: captions learnt per second, beside transformers' Idefics and Blip2.

vlm bench train               ours and theirs
vlm bench train --switches    ours with one switch of `fast` changed at a time: what each of them gains

Every contestant is a process of its own with the same frozen parts, pictures and captions. They take
turns, one step each, so that whatever else the machine does falls on all alike. A step is forward,
backward, clipping and AdamW over the same pictures and all their captions. The plain contestants encode
the pictures in every step; the `warm` ones find features (and hidden states below the lowest block) kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlm.errors import VLMError
from vlm.options import add_idle, make_parser, positive

CONTESTANTS = {
    "flamingo warm": ("flamingo", True, True),
    "flamingo plain": ("flamingo", True, False),
    "idefics warm": ("flamingo", False, True),
    "idefics plain": ("flamingo", False, False),
    "qformer warm": ("qformer", True, True),
    "qformer plain": ("qformer", True, False),
    "blip2 warm": ("qformer", False, True),
    "blip2 plain": ("qformer", False, False),
}
"""Name -> adapter, whether it is ours, whether features are kept."""
SWITCHES: dict[str, dict[str, Any]] = {
    "ours": {},
    "shared_rows": {"shared_rows": False},
    "fused_loss": {"fused_loss": False},
    "length_groups": {"length_groups": False},
    "backward_cut": {"backward_cut": False},
    "lower_cache": {"lower_cache": 0},
    "int8": {"int8": True},
    "checkpointing": {"checkpointing": True},
    "compile": {"compile": "inductor"},
}
"""Switch of `fast` -> how a contestant differs from "ours", the Flamingo recipe with its features kept."""
UNASKED = ("compile",)
"""Switches that run only where `--only` names them: this one needs a C++ compiler."""
LOWER_CACHE = 512
"""Megabytes."""
PAIRS = (("flamingo", "idefics"), ("qformer", "blip2"))
CAPTIONS = 5
BATCHES = 4


def main(argv: list[str]) -> int:
    """Entry of `vlm bench train`."""
    parser = make_parser("vlm bench train", "Captions learnt per second, beside transformers' classes.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=positive, default=10, help="timed steps of each (default: 10)")
    parser.add_argument("--pictures", type=positive, default=12, help="pictures a step (default: 12)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="Flickr8k; default: drawn shapes, long captions"
    )
    parser.add_argument("--switches", action="store_true", help="what each switch of `fast` gains instead")
    parser.add_argument(
        "--only", nargs="+", choices=[*CONTESTANTS, *SWITCHES], metavar="NAME", help="some of the contestants"
    )
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of all alike")
    parser.add_argument("--threads", type=positive, default=None, metavar="N")
    add_idle(parser, "--offline", "--device", "--dtype")
    args = parser.parse_args(argv)
    known = [name for name in SWITCHES if name not in UNASKED] if args.switches else list(CONTESTANTS)
    names = args.only or known
    if not set(names) <= set(SWITCHES if args.switches else CONTESTANTS):
        parser.error("switches are measured with --switches, ours beside theirs without")
    result = measure(args, names)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return 0


def measure(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Lets the contestants take turns; their figures and ratios.

    Raises:
        VLMError: a contestant's process has ended.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    for name in names:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, name, vars(args)), daemon=True)
        process.start()
        there.close()  # else it would never be heard that the process has ended
        workers[name] = (process, here)
        heard(
            name, *workers[name]
        )  # one at a time: loading together would need the memory of all at its peak
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(args.steps + BATCHES):
        for name, worker in workers.items():
            seconds = heard(name, *worker, turn % BATCHES)
            if turn >= BATCHES:  # the first round fills the caches
                times[name].append(seconds)
    figures = {}
    for name, worker in workers.items():
        found = heard(name, *worker, None)
        worker[0].join()
        median = statistics.median(times[name])
        figures[name] = {
            "captions_per_second": args.pictures * CAPTIONS / median,
            "seconds_per_step": median,
            "spread": [min(times[name]), max(times[name])],
            **found,
        }
    return {
        "pictures": args.pictures,
        "captions": args.pictures * CAPTIONS,
        "steps": args.steps,
        "precision": args.precision,
        "figures": figures,
        "ratios": gains(figures) if args.switches else ratios(figures),
    }


def heard(name: str, process: Any, pipe: Connection, *said: int | None) -> Any:
    """What a contestant answers to what it is told.

    Raises:
        VLMError: its process has ended.
    """
    try:
        for word in said:
            pipe.send(word)
        return pipe.recv()
    except (EOFError, ConnectionError) as error:
        process.join()
        raise VLMError(
            f"the contestant {name!r} ended with exit code {process.exitcode}; its own message stands above"
        ) from error


def ratios(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours over theirs: as each is used (we keep features, they do not), and both without any cache."""
    found = {}
    for ours, theirs in PAIRS:
        for label, mine, other in (
            ("warm", f"{ours} warm", f"{theirs} plain"),
            ("features given to both", f"{ours} warm", f"{theirs} warm"),
            ("no caches", f"{ours} plain", f"{theirs} plain"),
        ):
            if mine in figures and other in figures:
                speed = figures[mine]["captions_per_second"] / figures[other]["captions_per_second"]
                found[f"{ours} / {theirs}, {label}"] = speed
                found[f"{ours} / {theirs}, {label}: memory"] = (
                    figures[mine]["peak_memory"] / figures[other]["peak_memory"]
                )
    return found


def gains(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Each switch on over the same switch off, everything else as it is: speed, and peak memory."""
    found = {}
    for name, changes in SWITCHES.items():
        if not changes or name not in figures or "ours" not in figures:
            continue
        switched_on = bool(changes[name])
        on, off = (name, "ours") if switched_on else ("ours", name)
        speed = figures[on]["captions_per_second"] / figures[off]["captions_per_second"]
        found[f"{name}, on / off"] = speed
        found[f"{name}, on / off: memory"] = figures[on]["peak_memory"] / figures[off]["peak_memory"]
    return found


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['pictures']} pictures, {result['captions']} captions a step")
    for column in ("", "captions/s", "s/step", "peak memory", "trained"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in result["figures"].items():
        table.add_row(
            name,
            f"{row['captions_per_second']:.1f}",
            f"{row['seconds_per_step']:.2f}",
            f"{row['peak_memory'] / 1e9:.2f} GB",
            f"{row['trained'] / 1e6:.1f} M",
        )
    console = Console()
    console.print(table)
    for name, value in result["ratios"].items():
        console.print(f"{name}: {value:.2f}")


# --- one contestant ---------------------------------------------------------------------------------------


def work(pipe: Connection, name: str, options: dict[str, Any]) -> None:
    """A contestant's process: makes the step it is asked for, and says how long that took."""
    import torch

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    contestant: Contestant
    if options["switches"]:
        contestant = Switched(name, options)
    else:
        adapter, ours, warm = CONTESTANTS[name]
        contestant = (Ours if ours else Theirs)(adapter, warm, options)
    pipe.send("ready")
    while (batch := pipe.recv()) is not None:
        began = time.perf_counter()
        contestant.step(batch)
        pipe.send(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send({"peak_memory": peak, "trained": contestant.trained, "losses": contestant.losses})
    pipe.close()


def captioned(options: dict[str, Any]) -> list[Any]:
    """Pictures with five captions each, enough for every batch."""
    from vlm.data.sources import read_dataset
    from vlm.data.text import spoken
    from vlm.train.shapes import shapes

    count = options["pictures"] * BATCHES
    if options["data"]:
        return [spoken(example) for example in read_dataset("flickr8k", options["data"])[:count]]
    endings = (
        "on a plain wall",
        "in the middle of it all",
        "near the edge",
        "with nothing around",
        "by itself",
    )
    return [
        replace(e, answers=tuple(f"{e.answers[0]} is shown here {end} of the picture" for end in endings))
        for e in shapes(count)
        if e.id.endswith("/0")
    ]


class Contestant:
    """What both kinds share: the frozen parts, the pictures, the optimizer."""

    def __init__(self, adapter: str, warm: bool, options: dict[str, Any]) -> None:
        import torch

        from vlm.checkpoint import build_model
        from vlm.images import open_picture
        from vlm.train.recipe import read_recipe

        torch.manual_seed(0)
        self.recipe = read_recipe(f"flickr8k-{adapter}")
        self.warm, self.narrow = warm, options["precision"] == "bf16"
        self.model = build_model(options.get("model") or self.recipe.model, offline=True)
        self.examples = captioned(options)
        self.size: int = options["pictures"]
        self.pictures = [open_picture(example.images[0]) for example in self.examples]
        self.kept: dict[int, Any] = {}
        self.losses: list[float] = []

    def optimise(self, parameters: list[Any]) -> None:
        """Makes the optimizer, once it is known what is trained."""
        import torch

        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        self.trained = sum(p.numel() for p in parameters)

    def features(self, batch: int, repeat: int = 1) -> Any:
        """(P * repeat, N, D_v) features of a batch's pictures, encoded now or kept."""
        import torch

        if batch not in self.kept:
            first = batch * self.size
            # Each row brings its own picture, as those classes' processors hand it over.
            part = [
                p for p in self.pictures[first : first + self.size] for _ in range(1 if self.warm else repeat)
            ]
            pixels = torch.stack([self.model.encoder.preprocess(picture) for picture in part])
            with torch.no_grad():
                made = torch.cat([self.model.encoder(piece) for piece in pixels.split(8)])
            if not self.warm:
                return made
            self.kept[batch] = made
        return self.kept[batch].repeat_interleave(repeat, dim=0) if self.warm else self.kept[batch]

    def step(self, batch: int) -> None:
        """Forward, backward, clip, AdamW."""
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
            loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))

    def loss(self, batch: int) -> Any:
        """Mean loss of a batch."""
        raise NotImplementedError


class Ours(Contestant):
    """A picture's captions share a row; the switches are those of the recipes, but for `changes`."""

    changes: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, adapter: str, warm: bool, options: dict[str, Any]) -> None:
        super().__init__(adapter, warm, options)
        from vlm.train import fast
        from vlm.train.config import FastConfig

        if self.narrow:
            self.model.language.halve()
        keeps = warm and adapter == "flamingo"
        self.fast = FastConfig(**{"lower_cache": LOWER_CACHE if keeps else 0, **self.changes})
        self.of = fast.prepare(self.model, self.fast)
        self.model.train()
        self.optimise(self.model.trainable())

    def loss(self, batch: int) -> Any:
        from vlm.data.collate import rows_of

        processor, first = self.model.processor, batch * self.size
        rows = []
        for example in self.examples[first : first + self.size]:
            told = [(processor.tokens(example, answer), 1.0) for answer in example.answers]
            rows += rows_of(told, processor, self.fast.shared_rows)
        made = processor.batch(rows)
        features = self.features(batch, len(rows) // self.size)
        return self.of(made, features, 0.0) / made.label_weights.sum()


class Switched(Ours):
    """The Flamingo recipe with its features kept, and one switch changed."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.changes = SWITCHES[name]
        super().__init__("flamingo", True, options)
        if self.fast.length_groups:
            order = sorted(range(len(self.examples)), key=lambda i: sum(map(len, self.examples[i].answers)))
            self.examples = [self.examples[i] for i in order]
            self.pictures = [self.pictures[i] for i in order]


class Theirs(Contestant):
    """One row a caption, padded on the right, as those classes take them."""

    def __init__(self, adapter: str, warm: bool, options: dict[str, Any]) -> None:
        super().__init__(adapter, warm, options)
        from vlm.bench.peers import peer_of

        self.peer = peer_of(self.model)
        self.peer.train()
        self.optimise(self.peer.trainable())

    def loss(self, batch: int) -> Any:
        import torch

        first = batch * self.size
        told = [
            self.model.processor.tokens(example, answer)
            for example in self.examples[first : first + self.size]
            for answer in example.answers
        ]
        codes = [[code for code in tokens.codes if code >= 0] for tokens in told]
        longest = max(map(len, codes))
        ids = torch.zeros(len(told), longest, dtype=torch.long)
        attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (tokens, code) in enumerate(zip(told, codes, strict=True)):
            learnt = [s for s, c in zip(tokens.supervised, tokens.codes, strict=True) if c >= 0]
            ids[row, : len(code)] = torch.tensor(code)
            attention[row, : len(code)] = 1
            labels[row, : len(code)] = torch.where(torch.tensor(learnt), torch.tensor(code), -100)
        return self.peer.loss(self.features(batch, CAPTIONS), ids, attention, labels)
