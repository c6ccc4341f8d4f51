"""Results as people read them: Markdown tables, and a picture for each group."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fairness_picture
from metrics import Metric, metrics_of
from points import OWN_GROUPS, POINTS, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = {point.name: point for point in POINTS}
_GROUPS = [*dict.fromkeys(point.group for point in POINTS), *OWN_GROUPS]

_HEADINGS = {
    "fan-out": "Many readers of one stream",
    "burst": "As fast as it can",
    "streams": "Many streams",
    "stalled": "Readers that don't read",
    "replay": "A finished log",
    "reattach": "Coming back",
    "upstream": "With a real upstream",
    "crowd": "A crowd",
    "event-loop": "With uvloop",
    "proxy": "In front of llama.cpp",
    "ancestor": "Beside llama.cpp's own resumable streams",
    "fairness": "A light owner beside a heavy one",
    "batch": "A model in Python, in batches",
    "core": "The core",
}

_COLORS = {
    "pyserve": "#1f77b4",
    "pyserve+upstream": "#1f77b4",
    "pyserve+llama.cpp": "#1f77b4",
    "bare": "#7f7f7f",
    "nginx": "#2ca02c",
}
_OTHER_COLOR = "#d98c3f"


def write_report(directory: Path, only: Sequence[str]) -> str:
    """Write README.md and a picture for each group of which there are results.

    Returns:
        The tables of the groups in `only`.
    """
    results = {
        group: json.loads(path.read_text())
        for group in _GROUPS
        if (path := directory / f"{group}.json").exists()
    }
    sections = {}
    for group, result in results.items():
        sections[group] = f"## {_HEADINGS[group]}\n\n{_section(group, result)}"
        if draw := _PICTURES.get(group, _draw_bars):
            _save_picture(group, draw, result["points"], directory / f"{group}.svg")
            sections[group] += f"\n![{_HEADINGS[group]}]({group}.svg)\n"
    intro = "# What the bench found\n\n" + _METHOD
    directory.joinpath("README.md").write_text("\n".join([intro, *sections.values()]))
    return "\n".join(sections[group] for group in results if group in only)


_METHOD = """\
Made by `make bench`. The servers of a point take turns within one run; a figure is the median of
the rounds, and in brackets stands what pyserve took in the same round for each 1 that this server
took: below 1 pyserve is the cheaper or faster one. CPU is that of the server process, all threads,
user and system. Every byte was checked at every reader.

- **aiohttp**: a coroutine for each reader and a write for each event, as one writes it by hand
- **bare**: an epoll server in C++ that does nothing else, and merges what is late
- **nginx**: the same bytes as a static file
- **+upstream**: the events come from another process over HTTP, instead of a producer inside
- **+uvloop**: uvloop instead of asyncio's own loop
- **fair queue**: pyserve knows who asks, and decides who gets the four slots of llama.cpp
- **common queue**: all requests are one owner's to pyserve: first come, first served
- **llama.cpp's queue**: the owners ask llama.cpp itself
- **llama.cpp**: a tiny model, so that the server's own work is what is seen
"""


def _section(group: str, result: dict[str, Any]) -> str:
    told = result["machine"]
    where = f"{told['cpu']}, {told['cores']} cores, Linux {told['kernel']}, Python"
    where += f" {told['python']}, aiohttp {told['aiohttp']}, {told['when']},"
    where += f" {result['rounds']} rounds.\n\n"
    if group in OWN_GROUPS:
        return where + _row_table(result["points"])
    return where + "\n".join(_point_table(point) for point in result["points"])


def _row_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | | |", "| --- | ---: | --- |"]
    lines += [f"| {row['title']} | {_number(row['value'])} | {row['unit']} |" for row in rows]
    return "\n".join(lines) + "\n"


def _point_table(point: dict[str, Any]) -> str:
    known = [metric for metric in metrics_of(_point(point)) if _any_has(point, metric.key)]
    lines = [
        f"| {point['title']} | " + " | ".join(metric.title for metric in known) + " |",
        "| --- |" + " ---: |" * len(known),
    ]
    for name, figures in point["summary"].items():
        cells = [_cell(figures.get(metric.key)) for metric in known]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + _ingest_share(point)


def _point(told: dict[str, Any]) -> Point:
    return Point(**{name: told[name] for name in Point.__dataclass_fields__})


def _any_has(point: dict[str, Any], key: str) -> bool:
    return any(key in figures for figures in point["summary"].values())


def _cell(figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    ratio = figure.get("first_over_it")
    return _number(figure["median"]) + (f" ({ratio:.2f})" if ratio is not None else "")


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _ingest_share(point: dict[str, Any]) -> str:
    """How much of the CPU time an upstream over HTTP is, beside a producer inside."""
    lines = []
    for name in ("pyserve", "aiohttp"):
        figures = [point["summary"].get(each) for each in (f"{name}+upstream", name)]
        if None in figures:
            continue
        outer, inner = (figure["cpu_us_per_event"]["median"] for figure in figures)
        each_us = (outer - inner) * point["readers"] / point["streams"]
        share = 100 * (outer - inner) / outer
        told = f"adds {each_us:.1f} µs, {share:.0f} % of its CPU" if share > 0 else "adds nothing"
        lines.append(f"\n{name}: taking an event in over HTTP {told}.")
    return "\n".join(lines) + "\n" if lines else ""


Draw = Callable[["Figure", list[dict[str, Any]]], None]


def _save_picture(group: str, draw: Draw, points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": group}  # small, and always the same
    figure = Figure(layout="constrained")
    draw(figure, points)
    figure.savefig(path, metadata={"Date": None})


def _draw_bars(figure: Figure, points: list[dict[str, Any]]) -> None:
    """The first two figures of each point as bars, each in a panel of its own."""
    panels = list(_panels(points))
    heights = [len(point["servers"]) + 1.2 for point, _ in panels[::2]]
    figure.set_size_inches(10, 0.4 + 0.38 * sum(heights))
    axes = figure.subplots(len(points), 2, squeeze=False, height_ratios=heights)
    for number, ((point, metric), axis) in enumerate(zip(panels, axes.flat, strict=True)):
        names = [name for name in point["servers"] if metric.key in point["summary"][name]]
        values = [point["summary"][name][metric.key]["median"] for name in names]
        colors = [_COLORS.get(name, _OTHER_COLOR) for name in names]
        title = "" if number % 2 else point["title"]
        _draw_panel(axis, names, values, colors, f"{title}\n{metric.title}")


def _draw_rows(figure: Figure, rows: list[dict[str, Any]]) -> None:
    """Figures of one unit as bars."""
    figure.set_size_inches(10, 0.8 + 0.38 * len(rows))
    titles, values = [row["title"] for row in rows], [row["value"] for row in rows]
    colors = [_COLORS["pyserve"]] * len(rows)
    _draw_panel(figure.subplots(), titles, values, colors, rows[0]["unit"])


def _draw_panel(
    axis: Axes, names: list[str], values: list[float], colors: list[str], title: str
) -> None:
    bars = axis.barh(names, values, color=colors)
    axis.bar_label(bars, [_number(value) for value in values], padding=3, fontsize=8)
    axis.set_title(title, fontsize=8, loc="left")
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_visible(False)


def _panels(points: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Metric]]:
    for point in points:
        for metric in metrics_of(_point(point))[:2]:
            yield point, metric


#: Groups whose picture is another than bars; None where figures of many units stand side by side.
_PICTURES: dict[str, Draw | None] = {
    "fairness": fairness_picture.draw,
    "batch": _draw_rows,
    "core": None,
}
