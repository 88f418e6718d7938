"""What a live matplotlib figure shows, read off its objects: the metadata of the script that drew it."""

from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.lib.charts.spec import COLOURS, PIE_TOTAL, TOP, ChartSpec, Series
from workbench.lib.charts.templates import WIDTH, value_axes


def extract_spec(figure: Any) -> ChartSpec:
    """The chart in a matplotlib `Figure` of one axes.

    The kind follows from the objects: wedges, collections of points, lines, or rectangles, which stand where they all
    begin at 0 vertically, and lie where they do so horizontally.

    Raises:
        InputError: it holds something that no `ChartSpec` says: other objects, colours, axis limits, values off the
            grid.
    """
    from matplotlib.patches import Wedge

    if len(figure.axes) != 1:
        raise InputError(f"figure has {len(figure.axes)} axes but must have one")
    ax = figure.axes[0]
    wedges = [patch for patch in ax.patches if isinstance(patch, Wedge)]
    if wedges:
        return _pie(ax, wedges)
    found = [(kind, part) for kind, part in (("bar", _bars), ("line", _lines), ("scatter", _points)) if (part(ax))]
    if len(found) != 1 or ax.images or ax.texts:
        raise InputError(f"figure shows {[kind for kind, _ in found] or 'nothing'} but must show one kind of chart")
    kind, series = found[0][0], found[0][1](ax)
    if kind == "bar":
        kind, series, categories = _which_bars(ax, series)
    else:
        categories = _ticks(ax.xaxis) if kind == "line" else ()
    for axis in value_axes(kind):
        limits = getattr(ax, f"get_{axis}lim")()
        if tuple(map(float, limits)) != (0.0, float(TOP)):
            raise InputError(f"the {axis} axis runs over {limits} but must run from 0 to {TOP}")
    legend, names = _legend(ax)
    if [s.name for s in series if s.name] != names:
        raise InputError(f"the legend says {names} but the series are {[s.name for s in series]}")
    labels = (_plain(ax.get_title()), _plain(ax.get_xlabel()), _plain(ax.get_ylabel()))
    grid = bool(ax.xaxis.get_gridlines()[0].get_visible() and ax.yaxis.get_gridlines()[0].get_visible())
    return ChartSpec(kind, *labels, categories, tuple(series), legend, grid)


def _bars(ax: Any) -> list:
    return list(ax.containers)


def _lines(ax: Any) -> list[Series]:
    return [
        Series(_name(line.get_label()), _colour(line.get_color()), _whole(line.get_ydata())) for line in ax.get_lines()
    ]


def _points(ax: Any) -> list[Series]:
    return [
        Series(
            _name(cloud.get_label()),
            _colour(cloud.get_facecolor()[0]),
            _whole(cloud.get_offsets()[:, 1]),
            _whole(cloud.get_offsets()[:, 0]),
        )
        for cloud in ax.collections
    ]


def _which_bars(ax: Any, containers: list) -> tuple[str, list[Series], tuple[str, ...]]:
    stand = all(patch.get_y() == 0 for container in containers for patch in container)
    series, starts = [], []
    for container in containers:
        sizes = [patch.get_height() if stand else patch.get_width() for patch in container]
        colours = {_colour(patch.get_facecolor()) for patch in container}
        if len(colours) != 1:
            raise InputError(f"bars of one series have the colours {sorted(colours)} but must have one")
        series.append(Series(_name(container.get_label()), colours.pop(), _whole(sizes)))
        across = [(p.get_x(), p.get_width()) if stand else (p.get_y(), p.get_height()) for p in container]
        starts.append([start + width / 2 for start, width in across])
        thick = WIDTH if len(containers) > 1 else 0.8
        if not np.allclose([width for _, width in across], thick):
            raise InputError(f"bars are {across[0][1]} thick but must be {thick}")
    kind = "grouped" if len(containers) > 1 else "bar" if stand else "barh"
    for i, centres in enumerate(starts):
        shift = (i - 0.5) * WIDTH if kind == "grouped" else 0.0
        if not np.allclose(centres, np.arange(len(centres)) + shift):
            raise InputError(f"bars stand at {centres} but must stand at 0, 1, ... plus {shift}")
    return kind, series, _ticks(ax.xaxis if stand else ax.yaxis)


def _pie(ax: Any, wedges: list) -> ChartSpec:
    shares = _whole([PIE_TOTAL * (w.theta2 - w.theta1) / 360 for w in wedges])
    names = [_plain(text.get_text()) for text in ax.texts]
    slices = zip(names, (_colour(w.get_facecolor()) for w in wedges), shares, strict=True)
    return ChartSpec("pie", _plain(ax.get_title()), "", "", (), tuple(Series(n, c, (v,)) for n, c, v in slices))


def _ticks(axis) -> tuple[str, ...]:
    return tuple(_plain(label.get_text()) for label in axis.get_majorticklabels())


def _legend(ax: Any) -> tuple[str, list[str]]:
    legend = ax.get_legend()
    if legend is None:
        return "", []
    corner = {code: name for name, code in legend.codes.items()}.get(legend._loc, str(legend._loc))
    return corner, [_plain(text.get_text()) for text in legend.get_texts()]


def _colour(colour) -> str:
    from matplotlib.colors import to_hex

    code = to_hex(colour)
    for name, known in COLOURS.items():
        if known == code:
            return name
    raise InputError(f"a colour is {code} but must be one of {', '.join(COLOURS.values())}")


def _whole(values) -> tuple[int, ...]:
    rounded = np.rint(np.asarray(values, dtype=float))
    if not np.allclose(values, rounded, atol=1e-3):
        raise InputError(f"values are {list(values)} but must be whole")
    return tuple(int(v) for v in rounded)


def _name(label: str) -> str:
    return "" if label.startswith("_") else _plain(label)


def _plain(text: str) -> str:
    return text.replace("\\$", "$")
