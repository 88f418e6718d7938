"""Operators close to the hardware: timings against bounds and peers, kept bytes, wasted rows, what the compiler says.

Speeds are drawn as ratios measured in one process. What a GPU would do without one being there is either read from the
compiler (`static_treemap`, `static_table`) or a model, and then its figure says so (`roofline`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.basic import bars, lines, matrix
from workbench.figures.theme import blank, colour_bar, null_line, rgba, sequential, theme_named

OURS = "workbench"
REGISTERS = 255  # the most a thread can address on NVIDIA's GPUs
COLUMNS = {  # of `static_table`: key in a row -> heading
    "kernel": "kernel",
    "shape": "shape",
    "dtype": "type",
    "target": "target",
    "registers": "regs",
    "spills": "spills",
    "shared": "KiB",
    "wgmma": "wgmma",
    "tma": "TMA",
    "cp_async": "cp.async",
    "occupancy": "occupancy",
}
CHARACTER = 6.3  # pixels of a character in `static_table`, on average
BESIDE = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}  # a legend that may be long


def bench_ratios(
    rows: Sequence[Mapping],
    *,
    threads: int,
    direction: str = "forward+backward",
    limit: str = "dense GEMMs of the same FLOPs",
    theme: str = "light",
) -> go.Figure:
    """Time over the time of the bound, one group of bars a case, one colour an implementation.

    ``rows`` are those of ``workbench bench``; shown are those of this direction and number of threads that have a
    bound. 1 is the bound, lower is better; the axis is logarithmic.
    """
    chosen = _chosen(rows, threads, direction)
    cases, names = _in_order(row["case"] for row in chosen), _in_order(row["implementation"] for row in chosen)
    ratio = {(row["case"], row["implementation"]): row["ratio_to_limit"] for row in chosen}
    figure = bars(
        cases,
        {name: [_number(ratio.get((case, name))) for case in cases] for name in names},
        title="Time over the bound",
        subtitle=f"bound: {limit} · {direction}, {_threads(threads)} · median of paired ratios · lower is better",
        x_title="case",
        y_title="time ÷ bound",
        null=(1.0, "bound"),
        theme=theme,
    )
    return _on_a_log_axis(figure).update_layout(legend=BESIDE, showlegend=True)


def bench_speedups(
    rows: Sequence[Mapping],
    *,
    threads: int,
    direction: str = "forward+backward",
    ours: str = OURS,
    theme: str = "light",
) -> go.Figure:
    """How many times as fast as each peer we are, one group of bars a case, one colour a peer.

    ``rows`` are those of ``workbench bench``. 1 is as fast, higher is better; the axis is logarithmic.
    """
    chosen = [row for row in _chosen(rows, threads, direction) if row["implementation"] == ours]
    if not chosen:
        raise InputError(f"ours is {ours!r} but no row of {direction}, {_threads(threads)} is of that implementation")
    cases, peers = [row["case"] for row in chosen], _in_order(peer for row in chosen for peer in row["speedup_over"])
    figure = bars(
        cases,
        {peer: [_number(row["speedup_over"].get(peer)) for row in chosen] for peer in peers},
        title="Speed-up over peers",
        subtitle=f"{direction}, {_threads(threads)} · median of paired ratios · higher is better",
        x_title="case",
        y_title="peer's time ÷ ours",
        null=(1.0, "as fast"),
        theme=theme,
    )
    return _on_a_log_axis(figure).update_layout(legend=BESIDE, showlegend=True)


def kept_bytes(top_k: Sequence[int], kept: Mapping[str, Sequence[float]], *, theme: str = "light") -> go.Figure:
    """Bytes kept for the backward pass by each layer, ``kept[name]`` (K,), at finer and finer experts."""
    figure = lines(
        list(top_k),
        {name: np.asarray(values, dtype=np.float64) / 2**20 for name, values in kept.items()},
        title="Kept for the backward pass",
        subtitle="one expert layer, hidden width × K held fixed, weights left out",
        x_title="experts per token, K (finer experts to the right)",
        y_title="MiB",
        theme=theme,
    )
    figure.update_xaxes(type="log", tickvals=list(top_k), ticktext=[str(k) for k in top_k])
    figure.update_yaxes(rangemode="tozero")
    return figure


def waste_map(cells: Sequence[Mapping], *, tile: int, what: str = "tc", theme: str = "light") -> go.Figure:
    """Padded rows in percent of the rows there are, experts down and K across, for tiles of ``tile`` rows.

    ``cells`` are the entries n_experts, top_k, tile, n_tokens, tc, rounding, changed of the study of SonicMoE; ``what``
    is "tc", "rounding" or "changed" (rows that rounding adds or drops, in percent too). Cells not measured stay empty.
    """
    titles = {
        "tc": "Rows padded by token choice",
        "rounding": "Rows padded after rounding",
        "changed": "Rows that rounding adds or drops",
    }
    if what not in titles:
        raise InputError(f"what is {what!r} but must be one of {', '.join(titles)}")
    chosen = {(cell["n_experts"], cell["top_k"]): cell for cell in cells if cell["tile"] == tile}
    if not chosen:
        raise InputError(f"tile is {tile} but cells are of {sorted({cell['tile'] for cell in cells})}")
    experts, top_k = (sorted({key[i] for key in chosen}) for i in (0, 1))
    values = np.array([[100 * chosen[e, k][what] if (e, k) in chosen else np.nan for k in top_k] for e in experts])
    n_tokens = sorted({cell["n_tokens"] for cell in chosen.values()})
    figure = matrix(
        values,
        [str(e) for e in experts],
        [str(k) for k in top_k],
        title=titles[what],
        subtitle=f"tiles of {tile} rows, {', '.join(map(str, n_tokens))} tokens, trained routers",
        x_title="experts per token, K",
        y_title="experts, E",
        unit="% of rows",
        theme=theme,
    )
    return figure.update_traces(zmin=0, zmax=np.nanmax(values) or 1.0)


def static_treemap(rows: Sequence[Mapping], *, target: str = "sm_90", theme: str = "light") -> go.Figure:
    """What each compiled kernel takes of a multiprocessor: area is shared memory a block, colour registers a thread.

    ``rows`` hold kernel, shape, dtype, target, registers, spills, shared (bytes), see `static_table`. Every block takes
    1 KiB more than it asks for, so no area is nothing. Kernels of one operator ("operator/kernel") stand together.
    """
    chosen = [row for row in rows if row["target"] == target]
    if not chosen:
        raise InputError(f"target is {target!r} but rows are of {', '.join(sorted({row['target'] for row in rows}))}")
    colours = theme_named(theme)
    # A root of our own: plotly's would be grey in any theme where a colour scale is used.
    ids, labels, parents, registers, notes = [target], [target], [""], [0], [f"{len(chosen)} configurations"]
    areas = [sum(row["shared"] + 1024 for row in chosen)]
    for operator in _in_order(row["kernel"].split("/")[0] for row in chosen):
        own = [row for row in chosen if row["kernel"].split("/")[0] == operator]
        ids.append(operator)
        labels.append(operator)
        parents.append(target)
        areas.append(sum(row["shared"] + 1024 for row in own))
        registers.append(max(row["registers"] for row in own))
        notes.append(f"{len(own)} configurations, at most {registers[-1]} registers")
        for number, row in enumerate(own):
            name = row["kernel"].removeprefix(f"{operator}/")
            ids.append(f"{operator}/{number}")
            labels.append(f"{name}<br>{row['dtype']}<br>{row['shape']}")
            parents.append(operator)
            areas.append(row["shared"] + 1024)
            registers.append(row["registers"])
            notes.append(f"{row['registers']} registers, {row['shared'] / 1024:.1f} KiB, {row['spills']} spills")
    figure = blank(
        theme,
        f"What a block takes on {target}",
        "area: shared memory a block · colour: registers a thread · from the compiler, nothing was run",
        margin={"l": 14, "r": 14, "t": 60, "b": 14},
        xaxis={"visible": False},
        yaxis={"visible": False},
    )
    figure.add_treemap(
        ids=ids,
        labels=labels,
        parents=parents,
        values=areas,
        branchvalues="total",
        customdata=notes,
        hovertemplate="%{label}<br><b>%{customdata}</b><extra></extra>",
        marker={
            "colors": registers,
            "colorscale": sequential(theme),
            "cmin": 0,
            "cmax": REGISTERS,
            "colorbar": colour_bar(unit="registers"),
            "line": {"color": colours.card, "width": 1},
        },
        pathbar={"visible": False},
        tiling={"pad": 2},
        textfont={"size": 11},
    )
    return figure


def static_table(rows: Sequence[Mapping], *, theme: str = "light") -> go.Figure:
    """What the compiler says of every kernel, configuration and target: a table, rows that spill marked.

    ``rows`` hold the keys of `COLUMNS`: kernel, shape, dtype, target, registers (a thread), spills (bytes or
    instructions; must be 0), shared (bytes a block), wgmma, tma and cp_async (instructions), occupancy (of the warps).
    None stands for what a target does not have.
    """
    colours = theme_named(theme)
    columns = [[_cell(key, row[key]) for row in rows] for key in COLUMNS]
    # A table breaks no word, so each column is as wide as its longest text.
    longest = [max(map(len, (name, *cells))) + 3 for name, cells in zip(COLUMNS.values(), columns, strict=True)]
    warned = [bool(row["spills"]) for row in rows]
    figure = blank(
        theme,
        "Static figures of the kernels",
        "compiled ahead of time, nothing was run · registers a thread · KiB of shared memory a block · occupancy: "
        "resident warps over the most there can be",
        margin={"l": 14, "r": 14, "t": 60, "b": 8},
        height=110 + 24 * (len(rows) + 1),
        width=max(700, CHARACTER * sum(longest)),
        xaxis={"visible": False},
        yaxis={"visible": False},
    )
    figure.add_table(
        columnwidth=longest,
        header={
            "values": [f"<b>{heading}</b>" for heading in COLUMNS.values()],
            "fill_color": colours.grid,
            "font": {"color": colours.ink, "size": 10},
            "align": ["left"] * 4 + ["right"] * (len(COLUMNS) - 4),
            "line_color": colours.grid,
        },
        cells={
            "values": columns,
            "fill_color": [[rgba(colours.cycle[1], 0.25) if bad else colours.card for bad in warned]] * len(COLUMNS),
            "font": {"color": colours.ink, "size": 11},
            "align": ["left"] * 4 + ["right"] * (len(COLUMNS) - 4),
            "line_color": colours.grid,
            "height": 24,
        },
    )
    return figure


def numerics(
    errors: Mapping[str, Mapping[str, float]],
    *,
    tolerance: float | None = None,
    floor: float = 1e-17,
    subtitle: str = "largest difference from the float64 reference ÷ largest value",
    theme: str = "light",
) -> go.Figure:
    """Relative error of each path, ``errors[path][quantity]``, on a log axis; the output and every gradient apart.

    A difference of exactly 0 is drawn at ``floor``, hollow. ``tolerance`` is what the tests allow.
    """
    colours = theme_named(theme)
    quantities = _in_order(quantity for path in errors.values() for quantity in path)
    figure = blank(theme, "Numerics error by path", subtitle, x="quantity", y="relative error")
    shades = colours.nominal(len(errors))
    for i, ((path, found), shade) in enumerate(zip(errors.items(), shades, strict=True)):
        aside = 0.12 * (i - (len(errors) - 1) / 2)
        values = [_number(found.get(quantity)) for quantity in quantities]
        figure.add_scatter(
            x=np.arange(len(quantities)) + aside,
            y=[max(value, floor) for value in values],
            name=path,
            mode="markers",
            marker={
                "size": 10,
                "color": shade,
                "symbol": ["circle-open" if value == 0 else "circle" for value in values],
            },
            text=quantities,
            customdata=["exact" if value == 0 else f"{value:.2g}" for value in values],
            hovertemplate=f"{path} · %{{text}}<br><b>%{{customdata}}</b><extra></extra>",
        )
    if tolerance is not None:
        null_line(figure, theme, tolerance, "allowed")
        figure.layout.annotations[-1].y = np.log10(tolerance)  # an annotation on a log axis stands at the logarithm
    ends = [-0.5, len(quantities) - 0.5]
    figure.update_xaxes(tickvals=list(range(len(quantities))), ticktext=quantities, range=ends, showgrid=False)
    figure.update_yaxes(type="log", exponentformat="power")
    return figure


def roofline(
    kernels: Sequence[Mapping],
    *,
    peak: float,
    bandwidth: float,
    device: str = "H100 SXM, bf16",
    theme: str = "light",
) -> go.Figure:
    """The bound of a roofline MODEL for each kernel: min(peak, bandwidth × intensity). Nothing in it was timed.

    Args:
        kernels: name, flops, bytes (moved between the chip and its memory, by the model) of each.
        peak: FLOP/s.
        bandwidth: bytes/s.
        device: whose figures these are.
    """
    colours = theme_named(theme)
    intensity = np.array([kernel["flops"] / kernel["bytes"] for kernel in kernels])
    bound = np.minimum(peak, bandwidth * intensity) / 1e12
    ridge = peak / bandwidth
    ends = np.array([min(intensity.min(), ridge) / 4, ridge, max(intensity.max(), ridge) * 4])
    figure = blank(
        theme,
        "Roofline model",
        f"<b>a model, not a measurement</b> · {device}: {peak / 1e12:,.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s, "
        f"ridge at {ridge:.0f} FLOP/byte",
        x="FLOP per byte moved",
        y="bound (TFLOP/s)",
    )
    figure.add_scatter(
        x=ends,
        y=np.minimum(peak, bandwidth * ends) / 1e12,
        name="roof",
        mode="lines",
        line={"color": colours.null, "width": 1.6, "dash": "dash"},
        hoverinfo="skip",
    )
    shades = colours.nominal(len(kernels))
    for kernel, x, y, shade in zip(kernels, intensity, bound, shades, strict=True):
        side = "memory" if x < ridge else "arithmetic"
        figure.add_scatter(
            x=[x],
            y=[y],
            name=kernel["name"],
            mode="markers",
            marker={"size": 11, "color": shade},
            hovertemplate=f"{kernel['name']}<br>%{{x:.3g}} FLOP/byte, bound by {side}<br><b>%{{y:.3g}}</b> TFLOP/s"
            "<extra></extra>",
        )
    figure.add_vline(x=ridge, line={"color": colours.grid, "width": 1.2})
    figure.update_xaxes(type="log", dtick=1)
    figure.update_yaxes(type="log", dtick=1)
    return figure


def attention_speedup(
    lengths: Sequence[int],
    speedup: Mapping[str, Sequence[float]],
    *,
    peer: str = "scaled_dot_product_attention, causal",
    threads: int = 1,
    theme: str = "light",
) -> go.Figure:
    """How many times as fast as full attention each sparse setting is, ``speedup[name]`` (T,), over the length T."""
    figure = lines(
        list(lengths),
        speedup,
        title="Speed-up of sparse attention",
        subtitle=f"over {peer} · {_threads(threads)} · median of paired ratios",
        x_title="sequence length, T",
        y_title="peer's time ÷ ours",
        null=(1.0, "as fast"),
        theme=theme,
    )
    figure.update_xaxes(type="log", tickvals=list(lengths), ticktext=[_short(length) for length in lengths])
    figure.update_yaxes(rangemode="tozero")
    return figure


def _on_a_log_axis(figure: go.Figure) -> go.Figure:
    """Bars of ratios around a line at 1: twice and half are equally far from it."""
    values = np.array([value for bar in figure.data for value in bar.y], dtype=np.float64)
    low, high = np.nanmin(values), np.nanmax(values)
    figure.update_yaxes(type="log", dtick="D2", range=np.log10([min(low, 1) * 0.8, max(high, 1) * 1.25]).tolist())
    for annotation in figure.layout.annotations:  # on a log axis plotly places texts by the exponent
        annotation.y = 0
    return figure


def _chosen(rows: Sequence[Mapping], threads: int, direction: str) -> list[Mapping]:
    """The rows of one direction and thread count: timings of different ones never stand side by side."""
    chosen = [row for row in rows if row["threads"] == threads and row["direction"] == direction]
    if not chosen:
        there = sorted({(row["direction"], row["threads"]) for row in rows})
        raise InputError(f"direction is {direction!r} and threads is {threads} but rows are of {there}")
    return chosen


def _in_order(names) -> list[str]:
    """Each name once, in the order of its first appearance."""
    return list(dict.fromkeys(names))


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _cell(key: str, value: object) -> str:
    if value is None:
        return "–"
    if key == "occupancy":
        return f"{100 * value:.0f} %"
    return f"{value / 1024:.1f}" if key == "shared" else str(value)
