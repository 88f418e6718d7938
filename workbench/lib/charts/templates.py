"""One chart as a script of matplotlib, of base R or of pgfplots: templates that are filled from the metadata alone."""

from collections.abc import Sequence

from workbench.errors import unknown
from workbench.lib.charts.spec import COLOURS, LANGUAGES, PIE_TOTAL, TOP, ChartSpec

R_CORNER = {
    "upper left": "topleft",
    "upper right": "topright",
    "lower left": "bottomleft",
    "lower right": "bottomright",
}
LATEX_CORNER = {
    "upper left": "north west",
    "upper right": "north east",
    "lower left": "south west",
    "lower right": "south east",
}
LATEX_BARS = {"bar": ("ybar",), "grouped": ("ybar",), "barh": ("xbar",)}
LATEX_SPECIAL = "%&#$_"
WIDTH = 0.4
"""Of a bar in a group of two, in categories."""


def render(spec: ChartSpec, language: str) -> str:
    """The script, ending with a line feed. Of one spec there is one script in each language."""
    if language not in LANGUAGES:
        raise unknown("language", language, LANGUAGES)
    lines = {"python": python, "r": r, "latex": latex}[language](spec)
    return "".join(f"{line}\n" for line in lines)


def python(spec: ChartSpec) -> list[str]:
    """matplotlib; whoever runs it finds the figure open."""
    lines = ["import matplotlib.pyplot as plt", "fig, ax = plt.subplots()"]
    if spec.pie:
        names = _list([_quoted(s.name) for s in spec.series])
        colours = _list([f'"tab:{s.colour}"' for s in spec.series])
        lines.append(f"ax.pie({_list([s.values[0] for s in spec.series])}, labels={names}, colors={colours})")
        return [*lines, f"ax.set_title({_quoted(spec.title)})"]
    ticks, n = _list([_quoted(c) for c in spec.categories]), len(spec.categories)
    for i, s in enumerate(spec.series):
        style = f'color="tab:{s.colour}"' + (f", label={_quoted(s.name)}" if s.name else "")
        if spec.kind == "grouped":
            at = _list([f"{j + (i - 0.5) * WIDTH:.1f}" for j in range(n)])
            lines.append(f"ax.bar({at}, {_list(s.values)}, width={WIDTH}, {style})")
        elif spec.kind == "line":
            lines.append(f'ax.plot({ticks}, {_list(s.values)}, marker="o", {style})')
        elif spec.kind == "scatter":
            lines.append(f"ax.scatter({_list(s.x)}, {_list(s.values)}, {style})")
        else:
            lines.append(f"ax.{spec.kind}({ticks}, {_list(s.values)}, {style})")
    if spec.kind == "grouped":
        lines.append(f"ax.set_xticks({_list(range(n))}, {ticks})")
    lines += [f"ax.set_{axis}lim(0, {TOP})" for axis in value_axes(spec.kind)]
    lines += [f"ax.set_title({_quoted(spec.title)})"]
    lines += [f"ax.set_xlabel({_quoted(spec.x_label)})", f"ax.set_ylabel({_quoted(spec.y_label)})"]
    lines += [f'ax.legend(loc="{spec.legend}")'] if spec.legend else []
    return lines + (["ax.grid(True)"] if spec.grid else [])


def r(spec: ChartSpec) -> list[str]:
    """Base graphics; draws into chart.png."""
    colours = [f'"{COLOURS[s.colour].upper()}"' for s in spec.series]
    values = [_c(s.values) for s in spec.series]
    ticks = _c([f'"{c}"' for c in spec.categories])
    limits = ", ".join(f"{axis}lim=c(0, {TOP})" for axis in value_axes(spec.kind))
    lines = ['png("chart.png")']
    if spec.pie:
        slices, names = _c([s.values[0] for s in spec.series]), _c([f'"{s.name}"' for s in spec.series])
        lines += [f"pie({slices}, labels={names}, col={_c(colours)})", f'title(main="{spec.title}")', "dev.off()"]
        return lines
    if spec.kind in ("bar", "barh"):
        across = ", horiz=TRUE" if spec.kind == "barh" else ""
        lines.append(f"barplot({values[0]}, names.arg={ticks}, col={colours[0]}{across}, {limits})")
    elif spec.kind == "grouped":
        rows = f"rbind({', '.join(values)})"
        lines.append(f"barplot({rows}, beside=TRUE, names.arg={ticks}, col={_c(colours)}, {limits})")
    elif spec.kind == "line":
        lines.append(f'plot({values[0]}, type="o", pch=19, col={colours[0]}, xaxt="n", ann=FALSE, {limits})')
        lines += [f'lines({v}, type="o", pch=19, col={c})' for v, c in zip(values[1:], colours[1:], strict=True)]
        lines.append(f"axis(1, at={_c(range(1, len(spec.categories) + 1))}, labels={ticks})")
    else:
        x = [_c(s.x) for s in spec.series]
        lines.append(f"plot({x[0]}, {values[0]}, pch=19, col={colours[0]}, ann=FALSE, {limits})")
        lines += [f"points({x[i]}, {values[i]}, pch=19, col={colours[i]})" for i in range(1, len(x))]
    lines.append(f'title(main="{spec.title}", xlab="{spec.x_label}", ylab="{spec.y_label}")')
    if spec.legend:
        names = _c([f'"{s.name}"' for s in spec.series])
        lines.append(f'legend("{R_CORNER[spec.legend]}", legend={names}, fill={_c(colours)})')
    return [*lines, *(["grid()"] if spec.grid else []), "dev.off()"]


def latex(spec: ChartSpec) -> list[str]:
    """pgfplots, or pgf-pie for a pie."""
    lines = ["\\documentclass{standalone}", f"\\usepackage{{{'pgf-pie' if spec.pie else 'pgfplots'}}}"]
    for i, s in enumerate(spec.series):
        lines.append(f"\\definecolor{{c{i}}}{{RGB}}{{{','.join(map(str, rgb(s.colour)))}}}")
    lines += ["\\begin{document}", "\\begin{tikzpicture}"]
    end = ["\\end{tikzpicture}", "\\end{document}"]
    if spec.pie:
        colours = ", ".join(f"c{i}" for i in range(len(spec.series)))
        slices = ", ".join(f"{s.values[0]}/{{{_tex(s.name)}}}" for s in spec.series)
        lines += [
            f"\\pie[sum={PIE_TOTAL}, color={{{colours}}}]{{{slices}}}",
            f"\\node at (0,4) {{{_tex(spec.title)}}};",
        ]
        return lines + end
    labels = zip(("title", "xlabel", "ylabel"), (spec.title, spec.x_label, spec.y_label), strict=True)
    options = [*LATEX_BARS.get(spec.kind, ()), *(f"{key}={{{_tex(text)}}}" for key, text in labels)]
    options += [f"{axis}min=0, {axis}max={TOP}" for axis in value_axes(spec.kind)]
    if spec.categories:
        axis = "y" if spec.kind == "barh" else "x"
        options.append(f"{axis}tick={{{', '.join(map(str, range(len(spec.categories))))}}}")
        options.append(f"{axis}ticklabels={{{', '.join(f'{{{_tex(c)}}}' for c in spec.categories)}}}")
    options += [f"legend pos={LATEX_CORNER[spec.legend]}"] if spec.legend else []
    options += ["grid=major"] if spec.grid else []
    lines.append(f"\\begin{{axis}}[{', '.join(options)}]")
    for i, s in enumerate(spec.series):
        x = s.x or range(len(s.values))
        pairs = zip(s.values, x, strict=True) if spec.kind == "barh" else zip(x, s.values, strict=True)
        lines.append(
            f"\\addplot[{_paint(spec.kind)}=c{i}] coordinates {{{' '.join(f'({a}, {b})' for a, b in pairs)}}};"
        )
        lines += [f"\\addlegendentry{{{_tex(s.name)}}}"] if s.name else []
    return [*lines, "\\end{axis}", *end]


def value_axes(kind: str) -> tuple[str, ...]:
    """The axes that run from 0 to TOP."""
    return {"barh": ("x",), "scatter": ("x", "y"), "pie": ()}.get(kind, ("y",))


def rgb(colour: str) -> tuple[int, int, int]:
    code = COLOURS[colour]
    return tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))


def _paint(kind: str) -> str:
    return {"line": "mark=*, color", "scatter": "only marks, color"}.get(kind, "fill")


def _quoted(text: str) -> str:
    """A string for matplotlib, which reads mathematics between two dollars."""
    return '"' + text.replace("$", "\\\\$") + '"'


def _tex(text: str) -> str:
    return "".join(f"\\{c}" if c in LATEX_SPECIAL else c for c in text)


def _list(items: Sequence) -> str:
    return f"[{', '.join(map(str, items))}]"


def _c(items: Sequence) -> str:
    return f"c({', '.join(map(str, items))})"
