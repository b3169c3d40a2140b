"""The model card: README.md of an adapter folder, filled from what its run wrote down.

    vlm train card OUT --reports dev.json questions.json --pictures sheet.png

Nothing in it is typed by hand but the recipe's `note` and the known failures (`--failures FILE`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.adapter_file import replace_files
from vlm.card import card_head, table
from vlm.checkpoint import adapter_folder, read_config
from vlm.data.readers import told_texts
from vlm.errors import DataError
from vlm.eval.abstain import require_same_adapter
from vlm.options import add_offline, make_parser
from vlm.train import wins
from vlm.train.curve import draw_risk, smoothed
from vlm.train.preflight import duration
from vlm.train.recipe import FREE
from vlm.train.record import CURVE, RISK, RUN, read_dev, read_log
from vlm.weights import PINS

DATA_LICENCES = {
    "flickr8k": "photographs of Flickr users, for non-commercial research and education only",
    "daquar": "NYU Depth v2 photographs and DAQUAR questions, for research",
    "easy-vqa": "MIT",
    "shapes": "drawn by this program",
}
_COUNTED = {"words": "picture", "preference": "pair"}
"""What the loss of an objective is a mean over, where it is not tokens."""


def main(argv: list[str]) -> int:
    """Entry of `vlm train card`."""
    parser = make_parser("vlm train card", "Write the model card of an adapter from its logs and reports.")
    parser.add_argument("out", type=Path, help="the adapter's folder")
    parser.add_argument(
        "--reports", type=Path, nargs="+", default=[], metavar="FILE", help="reports of `vlm eval`"
    )
    parser.add_argument(
        "--failures", type=Path, metavar="FILE", help="Markdown: what it is known to get wrong"
    )
    add_offline(parser)
    args = parser.parse_args(argv)
    try:
        failures = args.failures.read_text("utf-8") if args.failures else ""
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{args.failures} cannot be read: {problem}") from problem
    folder = adapter_folder(args.out, offline=True)
    for path in args.reports:
        require_same_adapter(_read(path), folder)
    write_card(folder, args.reports, failures)
    print(args.out / "README.md")
    return 0


def write_card(out: Path, reports: Sequence[Path] = (), failures: str = "") -> None:
    """Writes README.md, and the risk-coverage curve of the reports that have one, into an adapter's folder.

    Raises:
        WeightsError: the folder holds no adapter, or cannot be written.
        DataError: a report cannot be read, or holds no scores.
    """
    read = [_read(path) for path in reports]
    for path, found in zip(reports, read, strict=True):
        if found.get("reason"):  # of a split whose answers are not published
            raise DataError(f"{path} holds no scores: {found['reason']}")
    files = {"README.md": card(out, read, failures).encode()}
    if drawn := _calibrated(read):
        files[RISK] = draw_risk(drawn)
    replace_files(out, files)


def _calibrated(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reports on answers that are right or wrong; a caption is neither."""
    return [found for found in reports if found.get("calibration") and "cider" not in found["metrics"]]


def card(out: Path, reports: Sequence[dict[str, Any]] = (), failures: str = "") -> str:
    """The card's text."""
    config = read_config(out)
    facts = read_facts(out)
    recipe = facts.get("recipe", {})
    if recipe and "model" in facts:
        recipe = {**recipe, "model": facts["model"]}  # the sizes of the adapter that it started from
    parts = [
        _head(out, config, recipe),
        _training(facts, read_log(out), read_dev(out)) if facts else "",
        _curve(out),
        _data(facts, recipe) if facts else "",
        _preferences(out),
        _scores(reports),
        _risk(config, reports),
        _frozen(out, config),
        _limits(failures),
        _recipe(recipe) if recipe else "",
    ]
    return "\n".join(part.strip() + "\n" for part in parts if part.strip())


def read_facts(out: Path) -> dict[str, Any]:
    """What run.json says; nothing where there is none."""
    path = out / RUN
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise DataError(f"{path} cannot be read: {problem}") from problem
    if not isinstance(found, dict):
        raise DataError(f"{path} is no report")
    return found


def _head(out: Path, config: dict[str, Any], recipe: dict[str, Any]) -> str:
    sets = sorted({source["name"] or "own pictures" for source in recipe.get("sources", [])})
    made = f", trained on {', '.join(sets)}" if sets else ""
    return card_head(out, config, made, recipe.get("note", ""))


def _training(facts: dict[str, Any], log: Sequence[dict[str, Any]], dev: dict[str, Any] | None) -> str:
    recipe, plan, machine = facts["recipe"], facts["preflight"], facts["machine"]
    per = _COUNTED.get(recipe["objective"], "token")
    losses = smoothed([row["loss"] for row in log if row["loss"] is not None])
    rows = [
        ("steps", f"{facts.get('steps_done', 0)} of {recipe['steps']}, {recipe['batch']} pictures each"),
        ("seed", recipe["seed"]),
        ("trained parameters", f"{plan['trained']:,} (frozen: {plan['frozen']:,})"),
        ("time", f"{duration(facts.get('seconds', 0))} of steps; predicted {duration(plan['seconds'])}"),
        (
            "memory",
            f"{facts.get('peak_memory', 0) / 1e9:.1f} GB at most; predicted {plan['memory'] / 1e9:.1f} GB",
        ),
        ("loss", f"{losses[-1]:.3f} nats per {per} (moving average at the end)" if losses else "-"),
        *([("loss of pictures set aside", _dev_loss(dev))] if dev else []),
        ("steps skipped for a loss that was no number", facts.get("skipped", 0)),
        ("started from", Path(recipe["start"]).name or "fresh weights"),
        ("objective", recipe["objective"]),
        ("precision", machine.get("precision", recipe["precision"])),
        (
            "machine",
            f"{machine['system']}, {machine['processes']} process(es) of {machine['threads']} threads"
            + (f", {', '.join(machine['gpus'])}" if machine["gpus"] else ", no GPU"),
        ),
        (
            "versions",
            f"vlm {machine['vlm']}, torch {machine['torch']}, transformers {machine['transformers']}",
        ),
        ("date", facts["date"]),
    ]
    return "## Training\n\n" + table(("", ""), rows)


def _dev_loss(dev: dict[str, Any]) -> str:
    return f"{dev['loss']:.3f} nats per token, {dev['pictures']} pictures"


def _curve(out: Path) -> str:
    return f"![Loss and learning rate]({CURVE})" if (out / CURVE).is_file() else ""


def _data(facts: dict[str, Any], recipe: dict[str, Any]) -> str:
    rows: list[Sequence[object]] = []
    if recipe["objective"] == "preference":
        name = f"preference pairs ({Path(recipe['data']).name})"
        rows.append((name, "all", "chosen beside rejected answers", 1.0, "as their owner says"))
    for source in recipe["sources"]:
        kind = "questions made from its captions" if source["questions"] else "as it is"
        licence = DATA_LICENCES.get(source["name"], "as its owner says")
        rows.append((_name(source, recipe), source["split"], kind, source["weight"], licence))
    plan, read = facts["preflight"], facts.get("streamed")
    seen = (
        f"{read['rows']:,} rows read from shards ({read['unusable']:,} of no use), {read['laps']} whole laps"
        if read
        else f"{plan['pictures']:,} pictures, {plan['answers']:,} answers"
    )
    rest = [
        f"{seen}; hash `{facts['data_hash'][:16]}`.",
        f"{facts['held_out']} pictures were set aside." if facts.get("held_out") else "",
        f"{facts['unreadable']} could not be read and were left out." if facts.get("unreadable") else "",
        f"{told_texts(facts['without_picture'])}." if facts.get("without_picture") else "",
    ]
    head = ("data", "part", "use", "weight", "licence")
    return "## Data\n\n" + table(head, rows) + "\n" + " ".join(filter(None, rest))


def _preferences(out: Path) -> str:
    path = out / wins.FILE
    if not path.is_file():
        return ""
    found = _read(path)
    counts = found["pairs"]
    return (
        f"## Preferences\n\nDirect Preference Optimization, beta {found['beta']}: {counts['trained']} pairs "
        f"learnt, {counts['held_out']} set aside for these figures, {counts['unused']} opinions unused.\n\n"
        + table(("score", "before", "after"), wins.rows(found))
    )


def _name(source: dict[str, Any], recipe: dict[str, Any]) -> str:
    return str(source["name"] or f"own pictures ({Path(recipe['data']).name})")


def _scores(reports: Sequence[dict[str, Any]]) -> str:
    if not reports:
        return "## Scores\n\nNone yet: `vlm train card OUT --reports REPORT.json ...` fills this part.\n"
    parts = ["## Scores\n"]
    for found in reports:
        main = found["main_metric"]
        rows: list[Sequence[object]] = []
        for name, value in found["metrics"].items():
            low, high = found["intervals"].get(name, (None, None))
            rows.append((name, f"{value:.1f}", f"{low:.1f} to {high:.1f}" if low is not None else ""))
        for name, control in found["controls"].items():
            value = (control["metrics"] or {}).get(main)
            shown = f"{value:.1f}" if value is not None else f"({control.get('reason', '-')})"
            rows.append((f"{main}, control: {name}", shown, ""))
        note = "" if found["comparable"] else "; limited, not comparable with published figures"
        parts.append(
            f"### {found['task']}, {found['split']} ({found['n']:,} examples{note})\n\n"
            + table(("score", "value", "95 % interval"), rows)
            + f"\nDecoding: {_decoding(found['decoding'])}. "
            + f"Adapter file: `{found['hashes'].get('adapter', '')[:16]}`.\n"
        )
    return "\n".join(parts)


def _risk(config: dict[str, Any], reports: Sequence[dict[str, Any]]) -> str:
    if not _calibrated(reports):
        return ""
    text = (
        f"### Answering only where it is sure\n\n![Score of the surest answers over their share]({RISK})\n\n"
        "Every answer has a confidence; the surest are right more often (El-Yaniv and Wiener 2010)."
    )
    if fitted := config.get("abstain"):
        text += (
            f" With `--abstain` it answers at a confidence of {fitted['threshold']:.2f} or more: "
            f"{100 * fitted['coverage']:.0f} % of the questions of {fitted['task']}, {fitted['split']}, "
            f"{100 * fitted['accuracy']:.0f} % of them right."
        )
    return text


def _decoding(options: dict[str, Any]) -> str:
    said = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
    return said or "greedy"


def _frozen(out: Path, config: dict[str, Any]) -> str:
    digest = hashlib.sha256((out / "adapter.safetensors").read_bytes()).hexdigest()
    model, hashes = config["model"], config["hashes"]
    rows = []
    for what, model_id, key in (
        ("image encoder", model["vision"]["encoder"], "encoder"),
        ("language model", model["language_model"], "language_model"),
    ):
        pin = PINS.get(model_id)
        rows.append(
            (what, f"`{model_id}`", pin.licence if pin else "see its own card", f"`{hashes.get(key, '')}`")
        )
    rows.append(("this adapter", "`adapter.safetensors`", "Apache-2.0", f"`{digest}`"))
    return "## Parts and hashes\n\n" + table(("part", "id", "licence", "SHA-256"), rows)


def _limits(failures: str) -> str:
    text = failures.strip() or (
        "A small model: it names things that often stand together with what is there, miscounts, mixes up "
        "left and right, and answers in the manner of its training data whatever it is shown. Do not rely on "
        "it where a wrong answer does harm."
    )
    return f"## Known failures\n\n{text}\n"


def _recipe(recipe: dict[str, Any]) -> str:
    import yaml

    # Where things lay on one machine is nobody else's business.
    shown = {key: value for key, value in recipe.items() if key not in FREE or key in ("note", "answers")}
    shown["start"] = Path(shown["start"]).name
    chosen = {"vision", "language_model", "hints", "adapter", shown["model"]["adapter"]}
    shown["model"] = {key: value for key, value in shown["model"].items() if key in chosen}
    return "## Recipe\n\n```yaml\n" + yaml.safe_dump(shown, sort_keys=False) + "```\n"
