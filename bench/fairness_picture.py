"""What the light owner sees: each of its requests a dot, over the time when it came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"fair queue": "#1f77b4", "common queue": "#7f7f7f", "llama.cpp's queue": "#d98c3f"}


def draw(figure: Figure, points: list[dict[str, Any]]) -> None:
    """The first tokens of all rounds; one panel for each point."""
    figure.set_size_inches(10, 4 * len(points))
    axes = figure.subplots(len(points), 1, squeeze=False)
    for point, axis in zip(points, axes.flat, strict=True):
        for name in point["servers"]:
            light = [dot for run in point["runs"] for dot in run[name]["light"]]
            median_ms = point["summary"][name]["light_first_token_p50_ms"]["median"]
            axis.scatter(
                [asked_s for asked_s, _ in light],
                [waited_ms for _, waited_ms in light],
                s=14,
                alpha=0.7,
                linewidths=0,
                color=_COLORS[name],
                label=f"{name}: median {median_ms:,.0f} ms",
            )
        axis.set_title(point["title"], fontsize=9, loc="left", pad=22)
        axis.set_xlabel("the light owner asks, seconds after the heavy one", fontsize=8)
        axis.set_ylabel("its first token, after ms", fontsize=8)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.grid(axis="y", alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
