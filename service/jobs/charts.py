"""Charts as inline SVG: lines, histograms, heat maps, scatter plots.

Made here and not by matplotlib, which was measured: it costs the API 40 MB and 0.4 s at start, a
scatter of 2,000 points is 230 kB and a matrix of 50 classes 420 kB (here 30 kB and 60 kB), and its
colours cannot follow the reader's light or dark scheme.

Every chart is 320 units wide: on the narrowest phone that is one pixel each, so no text is smaller
than 11 pixels. Colours are classes of the page's style sheet. Names are escaped.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup

from service.jobs.numerals import MINUS, number

WIDTH = 320
HEIGHT = 180
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 24
BAR_HEIGHT = 18
SHADES = 8
NUMBERED_CLASSES = 10
NAMED_CLASSES = 20
NAME_LENGTH = 11
COLOURS = 7
MARKERS = 3
STYLES = COLOURS * MARKERS
"""Classes that a scatter plot can tell apart."""
NEUTRAL = STYLES
"""Style of a point without a class of its own."""

_MARKERS = {"round": "h0", "cross": "m-2-2l4 4m0-4l-4 4", "square": "h0"}
_MARKS = tuple(_MARKERS.values())


def line_chart(
    steps: Sequence[float], values: Sequence[float | None], *, name: str, along: str = "step"
) -> Markup:
    """Return one series over steps, or along something else; a missing value is a gap.

    Raises:
        ValueError: there is no value.
    """
    points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
    if not points:
        raise ValueError(f"the series {name!r} has no value")
    low, high = min(v for _, v in points), max(v for _, v in points)
    y = _Axis(low, high, HEIGHT - BOTTOM, TOP)
    x = _Axis(steps[0], steps[-1], LEFT, WIDTH - RIGHT, exact=True)
    if all(isinstance(step, int) for step in steps):
        x.ticks = [tick for tick in x.ticks if tick == round(tick)]
    curve, dots, run = [], [], []
    for step, value in [*zip(steps, values, strict=True), (0, None)]:
        if value is not None:
            run.append(f"{x.at(step):.1f} {y.at(value):.1f}")
            continue
        if len(run) == 1:
            dots.append(f"M{run[0]}h0")
        elif run:
            curve.append(f"M{'L'.join(run)}")
        run = []
    body = Markup('<path class="curve" d="{}"/><path class="curve dots" d="{}"/>').format(
        "".join(curve), "".join(dots)
    )
    return _picture(_grid(x, y) + body, HEIGHT, series_in_words(name, points, along))


def series_in_words(name: str, points: Sequence[tuple[float, float]], along: str) -> str:
    """Return what a curve shows, for those who do not see it."""
    told = [f"{number(value)} at {along} {number(step)}" for step, value in (points[0], points[-1])]
    if len(points) == 1:
        return f"{name}: {told[0]}"
    low, high = (f(value for _, value in points) for f in (min, max))
    return f"{name}: {', '.join(told)}; lowest {number(low)}, highest {number(high)}"


def bar_chart(labels: Sequence[str], values: Sequence[float | None], *, name: str) -> Markup:
    """Return one horizontal bar per label, from zero."""
    known = [value for value in values if value is not None]
    x = _Axis(min([0.0, *known]), max([0.0, *known]), 96, WIDTH - 52, exact=True)
    body = Markup("")
    for row, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = 4 + row * BAR_HEIGHT
        body += _text(92, y + 13, _short(label), "tick end")
        body += _text(WIDTH - 46, y + 13, number(value), "tick")
        if value is not None:
            body += Markup('<path class="s5" d="M{:.1f} {}H{:.1f}v12H{:.1f}z"/>').format(
                x.at(0), y + 3, x.at(value), x.at(0)
            )
    pairs = zip(labels, values, strict=True)
    told = f"{name}: {', '.join(f'{label} {number(value)}' for label, value in pairs)}"
    return _picture(body, 8 + len(labels) * BAR_HEIGHT, told)


def histograms(
    parts: Sequence[Sequence[int]], *, lowest: float, highest_share: float, words: str
) -> Markup:
    """Return histograms laid over each other, each as shares of its own sum.

    Args:
        parts: counts of equal bins on [-1, 1]; the first is drawn in the first colour.
        lowest: where the axis begins, so that several charts can share it; it ends at 1.
        highest_share: the largest share that the axis holds.
        words: what the picture shows.
    """
    x = _Axis(lowest, 1.0, LEFT, WIDTH - RIGHT, exact=True)
    y = _Axis(0.0, highest_share, HEIGHT - BOTTOM, TOP, exact=True)
    body = Markup("")
    for place, counts in enumerate(parts):
        total = sum(counts) or 1
        path = [f"M{LEFT} {y.at(0):.1f}"]
        for n, count in enumerate(counts, start=1):
            edge = -1 + 2 * n / len(counts)
            if edge > lowest:
                path.append(f"V{y.at(count / total):.1f}H{x.at(edge):.1f}")
        path.append(f"V{y.at(0):.1f}Z")
        body += Markup('<path class="area c{}" d="{}"/>').format(place, "".join(path))
    return _picture(_grid(x, y, as_percent=True) + body, HEIGHT, words)


def heat_map(matrix: Sequence[Sequence[int]], names: Sequence[str], *, words: str) -> Markup:
    """Return counts [C, C], rows true and columns predicted, shaded by the share of their row."""
    C = len(matrix)
    named = C <= NAMED_CLASSES
    left = 92 if named else 26
    side = min(40.0, (WIDTH - left - 4) / C)
    top = 18
    shades: list[list[str]] = [[] for _ in range(SHADES + 1)]
    labels = Markup("")
    for row, counts in enumerate(matrix):
        total = sum(counts) or 1
        for column, count in enumerate(counts):
            place = (left + column * side, top + row * side)
            shade = math.ceil(SHADES * count / total)
            size = f"h{side:.1f}v{side:.1f}h-{side:.1f}z"
            shades[shade].append(f"M{place[0]:.1f} {place[1]:.1f}{size}")
            if count and C <= NUMBERED_CLASSES:
                labels += _text(
                    place[0] + side / 2,
                    place[1] + side / 2 + 4,
                    str(count) if count < 10_000 else f"{count // 1000}k",
                    "cell dark" if shade > SHADES / 2 else "cell",
                )
    cells = Markup("").join(
        Markup('<path class="s{}" d="{}"/>').format(shade, "".join(paths))
        for shade, paths in enumerate(shades)
        if shade and paths
    )
    ticks = _heat_map_ticks(C, names if named else None, left=left, top=top, side=side)
    frame = Markup('<path class="frame" d="M{} {}h{:.1f}v{:.1f}h-{:.1f}z"/>').format(
        left, top, side * C, side * C, side * C
    )
    return _picture(cells + frame + ticks + labels, math.ceil(top + side * C + 4), words)


def _heat_map_ticks(
    C: int, names: Sequence[str] | None, *, left: float, top: float, side: float
) -> Markup:
    """Return names at the rows where there is room, and at the columns where they are short."""
    ticks = Markup("")
    every = 1 if side >= 16 else 5
    terse = names is not None and all(len(name) <= 2 for name in names)
    for n in range(C):
        middle = (n + 0.5) * side
        shown = n % every == 0
        place = str(n + 1)
        if names is not None:
            row = names[n] if terse else f"{_short(names[n])} {n + 1}"
            ticks += _text(left - 4, top + middle + 4, row, "tick end")
            place = names[n] if terse else place
        elif shown:
            ticks += _text(left - 4, top + middle + 4, place, "tick end")
        if shown:
            ticks += _text(left + middle, top - 5, place, "tick middle")
    return ticks


def scatter(
    points: Sequence[tuple[int, int]], styles: Sequence[int], *, side: int, words: str
) -> Markup:
    """Return points of a square 0 ... side; `styles` 0 ... NEUTRAL give colour and marker."""
    scale = (WIDTH - 16) / side
    paths: dict[int, list[str]] = {}
    for (x, y), style in zip(points, styles, strict=True):
        mark = _MARKS[style // COLOURS] if style < NEUTRAL else _MARKS[0]
        place = f"M{8 + x * scale:.1f} {8 + (side - y) * scale:.1f}"
        paths.setdefault(style, []).append(place + mark)
    drawn = sorted(paths.items(), reverse=True)  # points without a class lie below the others
    body = Markup("").join(
        Markup('<path class="{}" d="{}"/>').format(style_class(style), "".join(path))
        for style, path in drawn
    )
    frame = Markup('<path class="frame" d="M1 1h{0}v{0}h-{0}z"/>').format(WIDTH - 2)
    return _picture(frame + body, WIDTH, words)


def swatch(style: int) -> Markup:
    """Return the marker of a style, for a legend."""
    mark = _MARKS[style // COLOURS] if style < NEUTRAL else _MARKS[0]
    return Markup(
        '<svg class="swatch" viewBox="0 0 12 12" aria-hidden="true"><path class="{}" d="M6 6{}"/>'
        "</svg>"
    ).format(style_class(style), mark)


def style_class(style: int) -> str:
    """Return the classes of the style sheet that draw a marker."""
    if style >= NEUTRAL:
        return "mark round neutral"
    return f"mark {[*_MARKERS][style // COLOURS]} c{style % COLOURS}"


def bar(share: float, before: float | None = None) -> Markup:
    """Return a bar of a share in [0, 1], with a stroke where it was before; numbers stand by it."""
    stroke = Markup("")
    if before is not None:
        stroke = Markup('<path class="was" d="M{:.1f} 0v12"/>').format(100 * before)
    return Markup(
        '<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        '<path class="rest" d="M0 2h100v8h-100z"/>'
        '<path class="share" d="M0 2h{0:.1f}v8h-{0:.1f}z"/>{1}</svg>'
    ).format(100 * share, stroke)


class _Axis:
    """A linear scale from values to units of the picture, with round values for its grid."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, exact: bool = False
    ) -> None:
        if high <= low:
            pad = abs(low) * 0.1 or 1.0
            low, high = (low, low + 1.0) if exact else (low - pad, high + pad)
        self.ticks = round_values(low, high)
        self._low, self._high, self._start, self._end = low, high, start, end

    def label(self, value: float) -> str:
        """Return a tick as text, with as many decimals as set it apart from the next."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(value)
        decimals = 0 if step == 0 else max(0, -math.floor(math.log10(step * 1.001)))
        if decimals > 4 or abs(value) >= 1e6:
            return number(value)
        if max(abs(tick) for tick in self.ticks) >= 10_000:
            return f"{value / 1000:,g}k".replace("-", MINUS)
        return f"{value:,.{decimals}f}".replace("-", MINUS)

    def at(self, value: float) -> float:
        """Return where a value lies."""
        share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)


def round_values(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round values inside [low, high], low < high, in rising order."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)] or [low]


def _grid(x: _Axis, y: _Axis, *, as_percent: bool = False) -> Markup:
    lines, texts = [], Markup("")
    for value in y.ticks:
        lines.append(f"M{LEFT} {y.at(value):.1f}H{WIDTH - RIGHT}")
        shown = f"{100 * value:.3g} %" if as_percent else y.label(value)
        texts += _text(LEFT - 5, y.at(value) + 4, shown, "tick end")
    for value in x.ticks:
        place = min(max(x.at(value), LEFT + 4), WIDTH - RIGHT - 4)
        texts += _text(place, HEIGHT - 6, x.label(value), "tick middle")
    return Markup('<path class="grid" d="{}"/>').format("".join(lines)) + texts


def _text(x: float, y: float, text: str, classes: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(classes, x, y, text)


def _picture(body: Markup, height: int, words: str) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(WIDTH, height, words, body)


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
