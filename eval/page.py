"""The report as one HTML file that needs nothing else: pictures are inside it, curves are inline SVG."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.conversation import ImageSource
from vlm.data.example import Example
from vlm.eval import contamination, outputs, report
from vlm.eval.task import LOWER_IS_BETTER
from vlm.images import ImageError, open_picture

Grid = Sequence[Sequence[float]]

SHOWN = 12  # items at each end
THUMBNAIL = 224  # pixels, the longer side

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--bar:#3b7dd8;--soft:#9aa5b1}
body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}
h1{margin:0 0 .3rem}h2{margin:2.2rem 0 .6rem}.note{opacity:.8}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line)}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.items{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:1rem;padding:0}
.items li{list-style:none;border:1px solid var(--line);border-radius:.5rem;padding:.6rem}
.items li{overflow-wrap:anywhere}
.items img{width:100%;height:auto;border-radius:.3rem}.items p{margin:.3rem 0}
.seen{position:relative;display:block;line-height:0}.seen .map{position:absolute;inset:0;height:100%}
body:has(#maps:not(:checked)) .map{display:none}
.warn{color:#b3261e;font-weight:600}
svg{max-width:30rem;width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:currentColor}
.pair{display:flex;flex-wrap:wrap;gap:1rem}.pair svg{flex:1 1 16rem}td{overflow-wrap:anywhere}
pre{white-space:pre-wrap;border:1px solid var(--line);padding:.6rem;border-radius:.5rem}
"""


def write_page(path: Path) -> Path:
    """Writes REPORT.html beside REPORT.json and returns its path."""
    found, items = report.read_report(path, scored=False), report.read_items(path)
    page = path.with_suffix(".html")
    with outputs.writing(page):
        page.write_text(render(found, items), encoding="utf-8")
    return page


def render(found: dict[str, Any], items: Sequence[dict[str, Any]]) -> str:
    """The page of a report and its items."""
    title = f"{found['task']}, {found['split']}"
    main = found["main_metric"]
    limited = "" if found["comparable"] else _tag("p", "A limited run: not comparable.", "warn")
    told = contamination.warning(found.get("guide"))
    reason = found.get("reason")
    scale = "" if reason else " Scores are percentages with 95 % bootstrap intervals."
    parts = [
        f"<h1>{_safe(title)}</h1>",
        _tag("p", f"{found['n']} examples.{scale}", "note"),
        limited,
        _tag("p", f"{told}.", "warn") if told else "",
        "<h2>Scores</h2>",
        _tag("p", f"No scores: {reason}.", "warn") if reason else "",
        _scores(found),
        _controls(found, main),
        _breakdown(found, main),
        _contamination(found.get("contamination"), main),
        _calibration(found.get("calibration")),
        _items(items, main, max(SHOWN, found.get("maps") or 0)),
        _how(found),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_safe(title)}</title><style>{_STYLE}</style></head>\n<body><main>"
        + "\n".join(part for part in parts if part)
        + "</main></body></html>\n"
    )


def _safe(value: Any) -> str:
    return html.escape(str(value))


def _tag(name: str, text: Any, kind: str = "") -> str:
    return f'<{name} class="{kind}">{_safe(text)}</{name}>' if kind else f"<{name}>{_safe(text)}</{name}>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers stand right; everything is escaped."""
    top = "".join(f'<th scope="col">{_safe(cell)}</th>' for cell in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="n">{cell:.2f}</td>' if isinstance(cell, float) else f"<td>{_safe(cell)}</td>"
            for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _ends(ends: Sequence[float] | None) -> str:
    return f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else ""


def _scores(found: dict[str, Any]) -> str:
    published: dict[str, list[str]] = {}
    for figure in found["published"]:
        published.setdefault(figure["metric"], []).append(f"{figure['value']:g} ({figure['source']})")
    rows: list[tuple[Any, ...]] = [
        (_named(name), float(value), _ends(found["intervals"].get(name)), "; ".join(published.get(name, ())))
        for name, value in (found["metrics"] or {}).items()
    ]
    rows += [(name, "-", "", f"not computed: {why}") for name, why in found["skipped"].items()]
    rows += [(f"{name} answers, %", float(value), "", "") for name, value in found["rates"].items()]
    return _table(("metric", "score", "95 %", "published"), rows)


def _named(metric: str) -> str:
    return f"{metric} (lower is better)" if metric in LOWER_IS_BETTER else metric


def _controls(found: dict[str, Any], main: str) -> str:
    if not found["controls"] or found.get("reason"):  # where the answers have no score, neither have they
        return ""
    rows: list[tuple[Any, ...]] = [("the model", float(found["metrics"][main]), "", "")]
    for name, block in found["controls"].items():
        value = (block["metrics"] or {}).get(main)
        number = "-" if value is None else float(value)
        rows.append((name, number, block.get("about", ""), block.get("reason") or ""))
    bars = [(str(row[0]), row[1]) for row in rows if isinstance(row[1], float)]
    best = found.get("text_only")
    note = f"Best without looking: {best['value']:.2f} ({best['control']})." if best else ""
    return f"<h2>Without looking</h2><p>{_safe(note)}</p>{_bars(bars)}" + _table(
        ("control", main, "what it is", "why not"), rows
    )


def _bars(bars: Sequence[tuple[str, float]]) -> str:
    top = max([value for _, value in bars] + [1.0])
    rows = []
    for number, (name, value) in enumerate(bars):
        y, width = 24 * number, 240 * max(value, 0.0) / top
        colour = "var(--bar)" if number == 0 else "var(--soft)"
        rows.append(
            f'<text x="0" y="{y + 15}">{_safe(name)}</text><rect x="90" y="{y + 3}" width="{width:.1f}" '
            f'height="16" rx="2" fill="{colour}"/><text x="{96 + width:.1f}" y="{y + 15}">{value:.1f}</text>'
        )
    name = 'role="img" aria-label="the model and its controls"'
    return f'<svg viewBox="0 0 400 {24 * len(bars)}" {name}>{"".join(rows)}</svg>'


def _breakdown(found: dict[str, Any], main: str) -> str:
    table = {kind: row for kind, row in found["breakdown"].items() if main in row}
    if not table:
        return ""
    metrics = [name for name in next(iter(table.values())) if name != "n"]
    rows: list[tuple[Any, ...]] = [
        (kind, str(round(row["n"])), *(float(row[name]) if name in row else "-" for name in metrics))
        for kind, row in table.items()
    ]
    return "<h2>By kind</h2>" + _table(("kind", "examples", *metrics), rows)


def _contamination(seen: dict[str, Any] | None, main: str) -> str:
    if not seen:
        return ""
    words = "".join(_tag("p", line) for line in contamination.lines(seen, main))
    pairs = _table(("evaluated", "in training"), seen["pairs"]) if seen["pairs"] else ""
    return f"<h2>Seen in training</h2>{words}{pairs}"


def _calibration(curves: dict[str, Any] | None) -> str:
    if not curves:
        return ""
    return (
        "<h2>Does it know when it knows?</h2><p>First: score against the answer's probability per token, "
        'in ten equal groups. Second: score of the surest share of the answers.</p><div class="pair">'
        + _curve(curves["curve"], "probability per token, %", "calibration")
        + _curve(curves["risk"], "share answered, %", "score of the surest answers")
        + "</div>"
    )


def _curve(points: Sequence[Sequence[float]], label: str, name: str) -> str:
    top = max(100.0, max(y for _, y in points))
    dots = [(40 + 2.2 * x, 170 - 150 * y / top) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
    circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--bar)"/>' for x, y in dots)
    return (
        f'<svg viewBox="0 0 290 205" role="img" aria-label="{_safe(name)}">'
        '<path d="M40 20V170H265" fill="none" stroke="currentColor" stroke-opacity=".5"/>'
        f'<polyline points="{line}" fill="none" stroke="var(--bar)" stroke-width="2"/>{circles}'
        f'<text x="4" y="24">{top:.0f}</text><text x="22" y="174">0</text><text x="40" y="186">0</text>'
        f'<text x="248" y="186">100</text><text x="40" y="201">{_safe(label)}</text></svg>'
    )


def _items(items: Sequence[dict[str, Any]], main: str, count: int) -> str:
    shown = report.shown(items, main, count)
    parts = []
    if any(items[number].get("maps") for number in itertools.chain(*shown.values())):
        parts.append(
            '<p><label><input type="checkbox" id="maps" checked> Show what the answers lean on: gradient '
            "times input of the picture's cells, the strongest cell brightest.</label></p>"
        )
    for title, chosen in shown.items():
        if chosen:
            cards = "".join(_card(items[number], main) for number in chosen)
            parts.append(f'<h2>{_safe(title)}</h2><ul class="items">{cards}</ul>')
    return "".join(parts)


def _card(row: dict[str, Any], main: str) -> str:
    pictures = row["thumbnails"] if "thumbnails" in row else list(map(thumbnail, row["images"]))
    picture = "".join(itertools.starmap(_picture, itertools.zip_longest(pictures, row.get("maps", ()))))
    references = " · ".join(dict.fromkeys(row["references"][:5]))
    score = row["scores"].get(main)
    return (
        f"<li>{picture}<p><b>{_safe(row['question'])}</b></p><p>{_safe(row['answer']) or '<i>nothing</i>'}"
        f'{"" if score is None else f" ({score:.0f})"}</p><p class="note">{_safe(references)}</p></li>'
    )


def keep_pictures(rows: Sequence[dict[str, Any]], examples: Sequence[Example], main: str, count: int) -> None:
    """Gives the rows that the page shows their pictures as `thumbnails`, where these are no files."""
    for number in itertools.chain(*report.shown(rows, main, max(SHOWN, count)).values()):
        images = examples[number].images
        if not all(isinstance(image, str | Path) for image in images):
            rows[number]["thumbnails"] = list(map(thumbnail, images))


def _picture(shown: str | None, grid: Grid | None) -> str:
    """A thumbnail (base64), with its map over it where there is one."""
    if not shown:
        return ""
    picture = f'<img alt="" src="data:image/jpeg;base64,{_safe(shown)}">'
    return f'<span class="seen">{picture}{_overlay(grid)}</span>' if grid else picture


def _overlay(grid: Grid) -> str:
    """A map as a PNG of one pixel for each cell, which the browser stretches over the whole picture."""
    cells = Image.new("RGBA", (len(grid[0]), len(grid)))
    # From clear to a warm, mostly opaque yellow: what matters most stays recognisable below it.
    cells.putdata([(255, round(220 * cell), 0, round(190 * cell)) for line in grid for cell in line])
    stored = io.BytesIO()
    cells.save(stored, "PNG")
    inside = base64.b64encode(stored.getvalue()).decode()
    return f'<img class="map" alt="where the model looked" src="data:image/png;base64,{inside}">'


def thumbnail(source: ImageSource) -> str:
    """The picture as a small JPEG in base64; nothing where it is not on this machine."""
    if isinstance(source, str | Path) and not Path(source).is_file():
        return ""
    try:
        pixels = open_picture(source).pixels.copy()
    except ImageError:
        return ""
    pixels.thumbnail((THUMBNAIL, THUMBNAIL))
    stored = io.BytesIO()
    pixels.save(stored, "JPEG", quality=80)
    return base64.b64encode(stored.getvalue()).decode()


def _how(found: dict[str, Any]) -> str:
    rows = [(name, value) for name, value in found["hashes"].items()]
    decoding = ", ".join(f"{k} {v}" for k, v in found.get("decoding", {}).items() if v is not None)
    parts = ["<h2>How it was made</h2>"]
    if "prompt" in found:
        parts.append(f"<p>The first prompt:</p><pre>{_safe(found['prompt'])}</pre>")
    if decoding:
        parts.append(_tag("p", f"Decoding: {decoding}. Adapter: {found.get('adapter')}."))
    return "".join(parts) + _table(("SHA-256 of", "value"), rows)
