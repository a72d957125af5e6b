"""Accuracy against tokens per forward, one curve for each sweep; bars; rooflines. Needs matplotlib (extra `eval`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.files import write_whole
from fewstep.measure.roofline import KINDS, Kind, Rates, Setting, Sizes, pass_work, pays_up_to, tokens_per_second

_MARKERS = "osD^vP*X"
_FORMATS = ("png", "svg")
_NUM_COLOURS = 10  # of matplotlib's cycle
_MOST_INSIDE = 5  # curves whose legend finds room among them
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "fontsize": "x-small"}
_LONG_NAME = 40  # characters from which two names do not fit side by side


def plot_accuracy(series: Mapping[str, Sequence[Mapping[str, Any]]], stem: Path, *, title: str = "") -> list[Path]:
    """Write `stem`.png and `stem`.svg and return their paths.

    `series` names curves; each is a list of reports as in `eval --json` (a single report is a point), joined in the
    order of tokens per forward. Bars are the 95 % intervals. FewstepError without matplotlib or with nothing to draw.
    """
    if not any(series.values()):
        raise FewstepError("there is nothing to plot: give at least one report")
    num_columns = 1 if max(map(len, series)) >= _LONG_NAME else 2
    height = 4.5 if len(series) <= _MOST_INSIDE else 4.5 + 0.2 * len(series) / num_columns
    figure = _figure(7, height)
    axes = figure.add_subplot()
    for index, (name, reports) in enumerate(series.items()):
        points = sorted(reports, key=lambda report: float(report["tokens_per_forward"]))
        accuracy = [100 * report["accuracy"] for report in points]
        lows = [100 * report["accuracy_ci95"][0] for report in points]
        highs = [100 * report["accuracy_ci95"][1] for report in points]
        axes.errorbar(
            [report["tokens_per_forward"] for report in points],
            accuracy,
            yerr=[
                [max(0.0, value - low) for value, low in zip(accuracy, lows, strict=True)],
                [max(0.0, high - value) for value, high in zip(accuracy, highs, strict=True)],
            ],
            label=name,
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            linestyle="-" if index < _NUM_COLOURS else "--",
            linewidth=1.5,
            capsize=2.5,
            elinewidth=0.8,
        )
        for report, height in zip(points, accuracy, strict=True):
            if len(points) > 1:
                axes.annotate(_swept(report), (report["tokens_per_forward"], height), (4, 4), **_BESIDE)
    axes.set_xlabel("tokens per forward")
    axes.set_ylabel("problems solved, % (95 % interval)")
    axes.set_title(title)
    axes.set_xlim(left=0)
    axes.grid(visible=True, alpha=0.3)
    if len(series) > _MOST_INSIDE:
        figure.legend(loc="outside lower center", ncols=num_columns, frameon=False, fontsize="small")
    else:
        axes.legend(frameon=False)
    return [_save(figure, stem.with_name(f"{stem.name}.{suffix}")) for suffix in _FORMATS]


def plot_bars(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str], stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg and return their paths: for each key of `titles` its figures as bars.

    A row names its "contender". FewstepError without matplotlib or with nothing to draw.
    """
    if not rows:
        raise FewstepError("there is nothing to plot: give at least one row")
    figure = _figure(9, 0.8 + 0.35 * len(rows))
    names = [row["contender"] for row in rows]
    of_keys = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axes, (key, title) in zip(of_keys, titles.items(), strict=True):
        bars = axes.barh(names, [row[key] for row in rows])
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.12)
    of_keys[0].invert_yaxis()
    return [_save(figure, stem.with_name(f"{stem.name}.{suffix}")) for suffix in _FORMATS]


_BATCHES = tuple(1 << power for power in range(11))  # what curves over batch sizes show
_KIND_OF_DECODER: dict[str, Kind] = {"autoregressive": "causal", "block": "block", "diffusion": "full canvas"}


def plot_roofline(
    figures: Sequence[Mapping[str, Any]], stem: Path, *, sizes: Sizes, setting: Setting, rates: Rates, title: str = ""
) -> list[Path]:
    """Write `stem`.png and `stem`.svg and return their paths: causal, block and full-canvas decoding over batch sizes.

    Curves are what the arithmetic and the memory allow: operations per byte, operations a second, tokens a second.
    Points are measured: reports as in `bench --json`. FewstepError without matplotlib.
    """
    figure = _figure(13, 4.6)
    over_batches, roofline, tokens = figure.subplots(1, 3)
    for index, kind in enumerate(KINDS):
        works = [pass_work(kind, sizes, setting, batch) for batch in _BATCHES]
        style: dict[str, Any] = {"color": f"C{index}", "label": kind}
        over_batches.plot(_BATCHES, [work.intensity for work in works], **style)
        reached = [work.flops / work.floor_seconds(rates) / 1e12 for work in works]
        roofline.plot([work.intensity for work in works], reached, marker=".", linewidth=0, **style)
        bound = [tokens_per_second(kind, sizes, setting, batch, rates) for batch in _BATCHES]
        tokens.plot(_BATCHES, bound, **style)
    _draw_roof(roofline, rates)
    over_batches.axhline(rates.ridge, color="grey", linestyle="--", linewidth=1)
    over_batches.annotate("below: waits for the memory", (40, rates.ridge), (0, -10), color="grey", **_BESIDE)
    pays = pays_up_to("block", sizes, setting, rates)
    if pays is not None and pays <= _BATCHES[-1]:
        tokens.axvline(pays, color="grey", linestyle="--", linewidth=1)
        tokens.annotate(f"block pays up to {pays}", (pays, bound[0]), (3, 0), color="grey", **_BESIDE)
    for report in figures:
        kind_of = _KIND_OF_DECODER.get(report["decoder"])
        colour = "black" if kind_of is None else f"C{KINDS.index(kind_of)}"
        point: dict[str, Any] = {"color": colour, "marker": "o" if report["engine"] != "off" else "x", "markersize": 6}
        intensity = report["flops"] / report["bytes_read"]
        over_batches.plot(report["batch_size"], intensity, **point)
        roofline.plot(intensity, report["flops"] / report["step_ms_median"] / 1e9, **point)
        tokens.plot(report["batch_size"], report["tokens_per_second"], **point)
    for axes, x, y in (
        (over_batches, "requests at once", "operations per byte read"),
        (roofline, "operations per byte read", "TFLOP/s"),
        (tokens, "requests at once", "tokens per second"),
    ):
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        axes.grid(visible=True, alpha=0.3)
    over_batches.legend(frameon=False, fontsize="small")
    figure.suptitle(f"{title}; curves: at most, points: measured (x: plain path)", fontsize=10)
    return [_save(figure, stem.with_name(f"{stem.name}.{suffix}")) for suffix in _FORMATS]


def _draw_roof(axes: Any, rates: Rates) -> None:
    """What a device reaches at most at each intensity."""
    ends = (0.1, rates.ridge, 100 * rates.ridge)
    roof = [min(one * rates.bytes_per_second, rates.flops_per_second) / 1e12 for one in ends]
    axes.plot(ends, roof, color="grey", linewidth=1)
    axes.annotate(
        f"{rates.bytes_per_second / 1e9:,.0f} GB/s, {rates.flops_per_second / 1e12:,.3g} TFLOP/s",
        (rates.ridge, roof[1]), (-60, 6), color="grey", **_BESIDE,
    )  # fmt: skip


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise FewstepError("Plots need matplotlib: pip install 'fewstep[eval]'.") from None
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _swept(report: Mapping[str, Any]) -> str:
    """What tells a point of a sweep from the others: its threshold, or its steps."""
    value = report.get("threshold") if report.get("steps") is None else report["steps"]
    return "" if value is None else f"{value:g}"


def _save(figure: Any, path: Path) -> Path:
    with write_whole(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."))
    return path
