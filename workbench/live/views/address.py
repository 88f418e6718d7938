"""What a page of `panel serve` shows, in its address: read when it is opened, kept up to date as one chooses."""

from collections.abc import Collection, Mapping
from urllib.parse import urlencode

import panel as pn

from workbench.errors import InputError, unknown
from workbench.figures.theme import THEMES
from workbench.live import guard


def chosen(known: Mapping[str, Collection[str]]) -> tuple[dict[str, str], str]:
    """What the address chooses of the known values, by name, with its theme; and in words what is unknown in it."""
    try:
        asked = guard.asked()
    except InputError as error:
        return {}, str(error)
    every = {**known, "theme": THEMES}
    given = {name: asked[name] for name, values in every.items() if asked.get(name) in values}
    wrong = [unknown(name, asked[name], known[name]) for name in known if name in asked and name not in given]
    return given, "; ".join(str(error) for error in wrong)


def keep(controls: Mapping[str, pn.widgets.Widget], dark: pn.widgets.Toggle, **fixed: str) -> None:
    """Keep what is chosen in the address: the values of the controls and of what stays, and a dark theme."""

    def follow(*_) -> None:
        query = fixed | {name: control.value for name, control in controls.items()}
        if dark.value:
            query["theme"] = "dark"
        if pn.state.location is not None:
            pn.state.location.search = f"?{urlencode(query)}"

    for control in (*controls.values(), dark):
        control.param.watch(follow, "value")
