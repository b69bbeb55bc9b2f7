"""Parts of a self-contained HTML page: the frame with its style, escaped text, tables, pictures, line charts.

A page asks nobody for anything: style inline, charts as inline SVG, pictures as data URIs, no script. Its content
security policy says so to the browser. Every function returns markup; whatever a user wrote goes through ``escape``.
"""

import base64
import html
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #ffffff; --ink: #1b1e23; --soft: #5a6069; --rule: #dfe0dc;
  --accent: #0b6e74; --raw: #0b6e7455; --good: #1c6b3c; --good-back: #e3f3e8; --bad: #a3261f; --bad-back: #fbe7e5; }
@media (prefers-color-scheme: dark) { :root { --page: #131518; --card: #1c1f24; --ink: #e8e9eb; --soft: #a4abb5;
  --rule: #343941; --accent: #57c5c7; --raw: #57c5c755; --good: #86d9a4; --good-back: #173524; --bad: #ff9d94;
  --bad-back: #45201d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; font-size: 1rem;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1.5rem; overflow-wrap: anywhere; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .25rem 0 .75rem; }
.overline { color: var(--accent); font-weight: 600; font-size: .875rem; margin: 0 0 .25rem; }
.soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .75rem; padding: 1rem 1.125rem; }
.grid { display: grid; gap: 1rem; margin: 0; padding: 0; list-style: none; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); }
.tiles .value { font-size: 1.75rem; font-weight: 650; line-height: 1.2; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tiles p { margin: 0; font-size: .875rem; }
.stages { grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 13.5rem), 1fr)); }
.scroll { overflow-x: auto; padding: .25rem 1.125rem; }
.note { font-size: .875rem; max-width: 44rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .55rem .4rem .55rem 1rem; border-top: 1px solid var(--rule); white-space: nowrap; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: .875rem; vertical-align: bottom;
  white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 600; }
.keep { white-space: nowrap; }
.bar { display: block; width: 100%; height: .625rem; }
td .bar { width: min(9rem, 100%); min-width: 4rem; margin: .125rem 0 0 auto; }
.track { fill: var(--rule); } .fill { fill: var(--accent); } .mark { fill: var(--ink); }
figure { margin: .75rem 0 0; }
figcaption { color: var(--soft); font-size: .8125rem; }
.chart { display: block; width: 100%; height: auto; font-size: 12px; }
.chart text { fill: var(--soft); font-family: inherit; }
.chart .rule { stroke: var(--rule); } .chart .raw { stroke: var(--raw); } .chart .line { stroke: var(--accent); }
.chart .raw, .chart .line { fill: none; stroke-width: 1.25; stroke-linejoin: round; stroke-linecap: round; }
.chart .line { stroke-width: 2.25; }
.chart .beside { fill: none; stroke: var(--soft); stroke-width: 1.75; stroke-dasharray: 6 4; }
.chart .dot { fill: var(--accent); }
.spot { opacity: 0; } .spot:hover { opacity: 1; } .spot rect { fill: transparent; } .spot line { stroke: var(--soft); }
.picture { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: .5rem;
  background: var(--page); margin: 0 0 .75rem; }
.tiny { image-rendering: pixelated; }
.sample { display: flex; flex-direction: column; padding: .75rem; }
.sample .question { font-weight: 600; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.sample dl { display: grid; grid-template-columns: auto 1fr; gap: .125rem .75rem; margin: 0 0 .75rem; }
.sample dt { color: var(--soft); } .sample dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.badge { align-self: flex-start; margin-top: auto; border-radius: 1rem; padding: .125rem .75rem; font-size: .875rem;
  font-weight: 600; }
.good { color: var(--good); background: var(--good-back); } .bad { color: var(--bad); background: var(--bad-back); }
pre { overflow: auto; max-height: 40rem; margin: .75rem 0 0; font-size: .8125rem; line-height: 1.45;
  font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", Consolas, monospace; }
summary { cursor: pointer; font-weight: 600; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (max-width: 30rem) { main { padding: 1.25rem .75rem 3rem; } h1 { font-size: 1.5rem; }
  .samples { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .625rem; } .tiles { gap: .625rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); } .tiles .value { font-size: 1.375rem; }
  .tiles li:first-child { grid-column: span 2; } .chart { font-size: 14px; }
  .scroll { padding: .25rem .75rem; } table { font-size: .875rem; }
  th, td { padding: .5rem .1rem .5rem .6rem; } thead th { font-size: .75rem; } }
@media print { body { background: none; } .card { break-inside: avoid; } }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PNG = b"\x89PNG\r\n\x1a\n"
LONGEST_SIDE = 448  # pixels a picture is cut down to, so that a page with many photographs still opens
TINY = 128  # below this, pixels are shown as squares instead of being smeared

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 60, 24, 12, 42
POINTS_DRAWN, SPOTS = 600, 80
LOG_FROM = 30  # largest over smallest value from which a logarithmic axis reads better


def escape(text: Any) -> str:
    """Text that means nothing to HTML, in an element or in a quoted attribute."""
    return html.escape(str(text), quote=True)


def document(title: str, body: str) -> str:
    """The whole page around ``body`` (markup)."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n"
        "</html>\n"
    )


def table(label: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways by itself; header and cells are markup, the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="card scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def bar(fraction: float | int, mark: float | int | None = None) -> str:
    """A horizontal bar of [0, 1] with an optional tick; decoration beside a number, so hidden from screen readers."""
    length = 100 * min(1.0, max(0.0, fraction))
    tick = f'<rect class="mark" x="{100 * mark - 0.75:.2f}" y="0" width="1.5" height="12"/>' if mark is not None else ""
    return (
        '<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" y="2" width="100" height="8"/><rect class="fill" y="2" width="{length:.2f}" height="8"/>'
        f"{tick}</svg>"
    )


def _png(image: Any) -> tuple[bytes, int]:
    """PNG bytes no larger than the page needs, and the picture's longest side in pixels."""
    import numpy as np
    import PIL.Image
    import PIL.ImageOps

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"a picture array must be uint8 in 0..255, not {image.dtype}; convert it first")
        opened = PIL.Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    elif isinstance(image, PIL.Image.Image):
        opened = image
    elif isinstance(image, bytes | bytearray | str | os.PathLike):
        data = bytes(image) if isinstance(image, bytes | bytearray) else Path(image).read_bytes()
        opened = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
        if data.startswith(PNG) and max(opened.size) <= LONGEST_SIDE:
            return data, max(opened.size)
    else:
        raise TypeError(f"a picture must be bytes, a path, a uint8 array or a PIL image, not {type(image).__name__}")
    opened = opened.convert("RGB")
    opened.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    out = io.BytesIO()
    opened.save(out, "PNG", optimize=True)
    return out.getvalue(), max(opened.size)


def picture(image: Any, alt: str) -> str:
    """An inline picture from image bytes, a path, a uint8 array [height, width, 3] or a PIL image."""
    data, longest = _png(image)
    kind = "picture tiny" if longest < TINY else "picture"
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img class="{kind}" src="data:image/png;base64,{encoded}" alt="{escape(alt)}" loading="lazy">'


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover [low, high] in about ``count`` steps."""
    if high <= low:
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    return [step * i for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten (and 2 and 5 times them on a short axis) that cover [low, high]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    below = max(tick for tick in ticks if tick <= low * (1 + 1e-9))
    above = min(tick for tick in ticks if tick >= high * (1 - 1e-9))
    return sorted({below, *inside, above})


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _smooth(values: Sequence[float], reach: int) -> list[float]:
    """Centred moving mean over ``reach`` neighbours on each side."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def _thinned(items: list, most: int) -> list:
    """At most ``most`` items at even distances, the last always among them."""
    stride = -(-len(items) // most)
    return items[::stride] if (len(items) - 1) % stride == 0 else [*items[::stride], items[-1]]


def _axes(x_ticks: list[float], y_ticks: list[float], x_at: Any, y_at: Any, names: tuple[str, str]) -> list[str]:
    """Grid lines, tick labels and axis names."""
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y_ticks:
        y = y_at(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in x_ticks:
        x = x_at(tick)
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{tick:,.0f}</text>')
    middle = (TOP + floor) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(names[0])}</text>')
    turned = f'transform="rotate(-90 11 {middle})"'
    parts.append(f'<text x="11" y="{middle}" text-anchor="middle" {turned}>{escape(names[1])}</text>')
    return parts


def _spots(points: Sequence[tuple[float, float, str]], x_at: Any, y_at: Any) -> list[str]:
    """What appears where the pointer rests: a vertical line, a dot on the curve, the note as a tooltip."""
    height = HEIGHT - TOP - BOTTOM
    half = (WIDTH - LEFT - RIGHT) / max(1, len(points) - 1) / 2 + 0.5
    parts = []
    for x, y, note in points:
        at = x_at(x)
        parts.append(
            f'<g class="spot"><title>{escape(note)}</title>'
            f'<rect x="{at - half:.1f}" y="{TOP}" width="{2 * half:.1f}" height="{height}"/>'
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{TOP + height}"/>'
            f'<circle class="dot" cx="{at:.1f}" cy="{y_at(y):.1f}" r="4"/></g>'
        )
    return parts


Points = Sequence[tuple[float | int, float | int, str]]
"""(x, y, note) of a curve."""


def line_chart(points: Points, beside: Points = (), *, label: str, x_name: str, y_name: str) -> str:
    """One curve with axes as an inline SVG figure, and perhaps another to compare it with.

    points: (x, y, note), x increasing; the note is shown when the pointer rests there. Values that are not finite are
        left out and counted under the chart. Long noisy curves are drawn faint with a moving mean on top; the y axis
        is logarithmic where the values span a factor of 30 or more.
    beside: a second curve, drawn dashed, without notes.
    label: one sentence for those who do not see the chart.
    """
    drawn = [(float(x), float(y), note) for x, y, note in points if math.isfinite(x) and math.isfinite(y)]
    missing = len(points) - len(drawn)
    remarks = [f"{missing} of {len(points)} values are not finite and are left out."] if missing else []
    if not drawn:
        return f"<figure><figcaption>{escape(' '.join(['Nothing to draw.', *remarks]))}</figcaption></figure>"
    other = [(float(x), float(y)) for x, y, _ in beside if math.isfinite(x) and math.isfinite(y)]
    xs, ys = [x for x, _, _ in drawn], [y for _, y, _ in drawn]
    heights, first, last = [*ys, *(y for _, y in other)], *_span([*xs, *(x for x, _ in other)])
    log = min(heights) > 0 and max(heights) / min(heights) >= LOG_FROM
    scale = math.log10 if log else float
    y_ticks = _log_ticks(*_span(heights)) if log else _ticks(*_span(heights), 5)
    x_ticks = [tick for tick in _ticks(first, last, 5) if first <= tick <= last and tick == int(tick)]
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    bottom, span = scale(y_ticks[0]), scale(y_ticks[-1]) - scale(y_ticks[0])

    def x_at(x: float) -> float:
        return LEFT + (width * (x - first) / (last - first) if last > first else width / 2)

    def y_at(y: float) -> float:
        return TOP + height * (1 - (scale(y) - bottom) / span)

    def path(kind: str, curve: list[tuple[float, float]]) -> str:
        where = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in _thinned(curve, POINTS_DRAWN))
        return f'<polyline class="{kind}" points="{where}"/>'

    parts = _axes(x_ticks, y_ticks, x_at, y_at, (x_name, f"{y_name} (log scale)" if log else y_name))
    if other:
        parts.append(path("beside", other))
    if len(drawn) == 1:
        parts.append(f'<circle class="dot" cx="{x_at(xs[0]):.1f}" cy="{y_at(ys[0]):.1f}" r="4"/>')
    elif len(drawn) <= SPOTS:
        parts.append(path("line", list(zip(xs, ys))))
    else:
        smooth = _smooth(ys, max(1, len(ys) // 60))
        parts += [path("raw", list(zip(xs, ys))), path("line", list(zip(xs, smooth)))]
        remarks.insert(0, "Faint: every logged value. Strong: moving mean.")
    parts += _spots(_thinned(drawn, SPOTS), x_at, y_at)
    caption = f"<figcaption>{escape(' '.join(remarks))}</figcaption>" if remarks else ""
    return (
        f'<figure><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        + "\n".join(parts)
        + f"</svg>{caption}</figure>"
    )
