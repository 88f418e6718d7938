"""Charts as language-free metadata, and the same chart as scripts in Python, R and LaTeX (Chart2NCode, 2604.24559).

spec = sample_specs(1, seed=0)[0]
script = render(spec, "latex")
assert parse(script, "latex") == spec
verify(spec, render(spec, "python"), "python")   # runs it, and reads the figure it drew
"""

from workbench.lib.charts.grammar import parse
from workbench.lib.charts.sample import sample_specs
from workbench.lib.charts.spec import COLOURS, KINDS, LANGUAGES, LEGENDS, ChartSpec, Series, score
from workbench.lib.charts.templates import render
from workbench.lib.charts.verdict import Verdict, renderers, run_python, verify

__all__ = [
    "COLOURS",
    "KINDS",
    "LANGUAGES",
    "LEGENDS",
    "ChartSpec",
    "Series",
    "Verdict",
    "parse",
    "render",
    "renderers",
    "run_python",
    "sample_specs",
    "score",
    "verify",
]
