"""The style sheets of the live views: colours as variables set once at the root, and one sheet for each kind of part.

Panel draws every component in a shadow tree of its own, so a sheet must be given to each; custom properties pass
through all of them, which is why switching the theme only changes the class of the root.
"""

from workbench.figures.theme import FONT, THEMES, Theme, rgba

GOOD = {"light": "#00775a", "dark": "#33c79b"}
BAD = {"light": "#b3261e", "dark": "#ff8a80"}
WARN = {"light": "#9a6200", "dark": "#edb53c"}


def _variables(theme: Theme) -> str:
    values = {
        "page": theme.page,
        "card": theme.card,
        "ink": theme.ink,
        "muted": theme.muted,
        "line": theme.grid,
        "accent": theme.accent,
        "soft": rgba(theme.accent, 0.14),
        "good": GOOD[theme.name],
        "bad": BAD[theme.name],
        "warn": WARN[theme.name],
    }
    return " ".join(f"--wb-{name}: {value};" for name, value in values.items())


# Panel holds a row at the width of all that is in it, and what holds the row, too: wider than a cell of a notebook
NARROW = "min-width: 0 !important;"

ROOT = f"""
:host(.wb-light) {{ {_variables(THEMES["light"])} color-scheme: light; }}
:host(.wb-dark) {{ {_variables(THEMES["dark"])} color-scheme: dark; }}
:host {{
  background: var(--wb-page); color: var(--wb-ink); font-family: {FONT}; font-size: 13px;
  padding: 8px 10px; box-sizing: border-box; gap: 7px; {NARROW}
}}
:host(.wb-page) {{ min-height: 100vh; }}
"""

BAR = f"""
:host {{
  background: var(--wb-card); border: 1px solid var(--wb-line); border-radius: 8px; {NARROW}
  padding: 4px 10px; gap: 6px 12px; align-items: center; box-sizing: border-box; flex-wrap: wrap;
}}
"""

CLEAR_BAR = f":host {{ gap: 6px 12px; align-items: center; flex-wrap: wrap; padding: 0 2px; {NARROW} }}"

# cards say how many of the twelve columns they take; where there is little room, as in a notebook, it is half or all
GRID = """
:host { display: grid; grid-template-columns: repeat(12, minmax(0, 1fr)); gap: 7px; container-type: inline-size; }
@container (max-width: 1020px) { div:not(.wide) { grid-column: span 6 !important; } }
@container (max-width: 640px) { div { grid-column: span 12 !important; } }
"""

CARD = """
:host {
  background: var(--wb-card); border: 1px solid var(--wb-line); border-radius: 8px;
  overflow: hidden; box-sizing: border-box; min-width: 0;
}
"""

TEXT = f"""
:host {{ font-family: {FONT}; font-size: 12.5px; line-height: 1.45; color: var(--wb-ink); margin: 0; }}
.bk-clearfix {{ display: block; }}
.brand {{ font-weight: 700; font-size: 15px; letter-spacing: -0.01em; white-space: nowrap; }}
.brand span {{ color: var(--wb-accent); }}
.status {{ display: flex; flex-wrap: wrap; gap: 0 12px; align-items: baseline; white-space: nowrap;
  color: var(--wb-muted); font-variant-numeric: tabular-nums; }}
.status b {{ color: var(--wb-ink); font-weight: 600; }}
.chip {{ border-radius: 10px; padding: 1px 9px; font-weight: 600; font-size: 12px; color: var(--wb-muted);
  border: 1px solid currentColor; }}
.chip.running {{ color: var(--wb-good); }}
.chip.paused {{ color: var(--wb-warn); }}
.chip.finished, .chip.stopped {{ color: var(--wb-accent); }}
.chip.failed, .chip.died, .chip.damaged {{ color: var(--wb-bad); }}
.good {{ color: var(--wb-good); }}
.bad {{ color: var(--wb-bad); font-weight: 600; }}
.muted {{ color: var(--wb-muted); }}
.empty {{ display: flex; flex-direction: column; align-items: center; justify-content: center; height: 100%;
  box-sizing: border-box; text-align: center; color: var(--wb-muted); padding: 16px 28px; }}
.empty b {{ color: var(--wb-ink); font-size: 14px; margin-bottom: 4px; }}
.scroll {{ height: 100%; overflow: auto; }}
.step {{ font-variant-numeric: tabular-nums; white-space: nowrap; color: var(--wb-muted); }}
.step b {{ color: var(--wb-ink); }}
details {{ border-top: 1px solid var(--wb-line); padding: 0 14px; color: var(--wb-muted); font-size: 12px; }}
summary {{ cursor: pointer; padding: 3px 0; user-select: none; }}
summary:hover, details[open] summary {{ color: var(--wb-ink); }}
details p {{ margin: 0 0 8px; max-width: 80ch; }}
table {{ border-collapse: collapse; width: 100%; font-size: 12px; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: 700; font-size: 14px; padding: 10px 14px 4px; }}
caption small {{ display: block; font-weight: 400; font-size: 11.5px; color: var(--wb-muted); }}
th {{ text-align: right; font-weight: 500; color: var(--wb-muted); padding: 4px 14px 4px 0; border-bottom: 1px solid
  var(--wb-line); }}
td {{ text-align: right; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--wb-line); }}
th:first-child, td:first-child {{ text-align: left; padding-left: 14px; }}
.words td, .words th {{ text-align: left; }}
"""

# the tabs of a page, which take a second line where there is no room
TABS = f"""
:host {{ max-width: 100%; height: auto !important; {NARROW} }}
.bk-btn-group {{ flex-wrap: wrap; height: auto; width: 100%; }}
:host .bk-btn-group .bk-btn {{ flex: 1 0 90px; width: auto; }}
"""

_CARET = (  # grey enough for both themes; the browser's own arrow is black in the dark one
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='10' height='6'%3E"
    "%3Cpath d='M1 1l4 4 4-4' fill='none' stroke='%238590a0' stroke-width='1.6'/%3E%3C/svg%3E"
)

WIDGET = f"""
:host {{ font-family: {FONT}; font-size: 12.5px; color: var(--wb-ink); margin: 0; }}
.bk-input-group {{ flex-direction: row !important; align-items: center; gap: 6px; width: 100%; }}
.bk-input-group > label, .bk-input-group > .bk-label {{ color: var(--wb-muted); white-space: nowrap; margin: 0;
  font-size: 12px; padding: 0; }}
.bk-input-container {{ flex: 1; min-width: 0; }}
.bk-input, select.bk-input {{
  background-color: var(--wb-page); color: var(--wb-ink); border: 1px solid var(--wb-line); border-radius: 6px;
  min-height: 0; height: 28px; padding: 2px 8px; font-size: 12.5px; font-family: inherit; width: 100%;
}}
select.bk-input {{ padding-right: 22px; text-overflow: ellipsis; appearance: none;
  background: url("{_CARET}") no-repeat right 7px center / 10px 6px var(--wb-page) !important; }}
.bk-input::placeholder {{ color: var(--wb-muted); opacity: 0.8; }}
.bk-input:focus, .bk-btn:focus-visible {{ border-color: var(--wb-accent); outline: 2px solid var(--wb-soft);
  box-shadow: none; }}
.bk-input:disabled, .bk-btn:disabled {{ opacity: 0.45; cursor: default; background-color: var(--wb-page) !important; }}
:host .bk-btn, :host(.solid) .bk-btn.bk-btn-default {{
  background-color: var(--wb-page); color: var(--wb-ink); border: 1px solid var(--wb-line); border-radius: 6px;
  height: 28px; min-height: 0; padding: 0 10px; font-size: 12.5px; font-family: inherit; font-weight: 500;
  line-height: 1; box-shadow: none; width: 100%; white-space: nowrap;
}}
:host .bk-btn:not(:disabled):hover {{ border-color: var(--wb-accent); }}
:host .bk-btn.bk-active, :host(.solid) .bk-btn.bk-btn-default.bk-active,
:host(.solid) .bk-btn-group .bk-btn.bk-btn-default.bk-active {{
  background-color: var(--wb-soft); color: var(--wb-accent); border-color: var(--wb-accent); box-shadow: none;
}}
.bk-btn-group {{ display: flex; gap: 4px; height: 28px; }}
.noUi-target {{ background: var(--wb-line); border: none; box-shadow: none; height: 5px; border-radius: 3px; }}
.noUi-connect, .noUi-connects .noUi-connect {{ background: var(--wb-accent) !important; }}
.noUi-handle, .noUi-horizontal .noUi-handle {{ background: var(--wb-card); border: 2px solid var(--wb-accent);
  box-shadow: none; border-radius: 50%; width: 15px !important; height: 15px !important; top: -6px !important;
  right: -8px !important; cursor: grab; }}
.noUi-handle::before, .noUi-handle::after {{ display: none; }}
"""

PAGE = f"""
html, body {{ margin: 0; background: {THEMES["light"].page}; }}
html:has(.wb-dark), body:has(.wb-dark) {{ background: {THEMES["dark"].page}; }}
"""
