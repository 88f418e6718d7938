"""What a server of the pages answers: requests by its own name, and commands with its token.

A page of any site may make a browser ask this machine, and may have its own name lead here. But the browser says what
was asked for (Host) and which page asks (Origin), and lets no page say otherwise. So a server answers where Host is a
name of its own and Origin, if there is one, that of a page from here: `refusal`, for pages, files and websockets alike.
Another user of this machine is no page and may say anything: against that there is the token. It is made anew with
every server, and only who knows it can command a trainer.

Importing this module is light.
"""

import hmac
import secrets
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workbench.errors import InputError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""The names of this machine that lead nowhere else, on any port: a tunnel may have brought the request."""

TOKEN = "token"
"""Its name in an address."""

shown: dict[str, Path] = {}
"""Runs that are not among the user's own and may be shown all the same, by what an address calls them."""

_token = ""


def new_token() -> None:
    """Make the token of a server that is about to start."""
    global _token
    _token = secrets.token_urlsafe(24)


def token() -> str:
    """The token of the server."""
    return _token


def may_control(given: str | None) -> bool:
    """Whether this is the token of the server."""
    return bool(_token and given) and hmac.compare_digest(given.encode(), _token.encode())


def refusal(headers: Mapping[str, str], names: Collection[str]) -> str | None:
    """Why a request is not answered, or None. `names` are further hosts of the server, as bokeh's allow list has them.

    Without a Host it is no browser, and without an Origin it is one that opens a page or loads a part of one.
    """
    host, origin = headers.get("Host", "").lower(), headers.get("Origin", headers.get("Sec-Websocket-Origin"))
    if not _is_own(host, names):
        return f"the host {host!r} is no name of this server (allowed: {', '.join((*LOOPBACK, *sorted(names)))})"
    if origin is None:
        return None
    try:
        page = urlsplit(origin).netloc.lower()
    except ValueError:  # half an IPv6 address
        page = ""
    if page == host or (page and _listed(page, names)):
        return None
    return f"the page that asks is from {origin!r}, not from this server"


def _is_own(host: str, names: Collection[str]) -> bool:
    name, _, port = host.rpartition(":")
    if host in LOOPBACK or (name in LOOPBACK and port.isascii() and port.isdigit()):
        return True
    return bool(host) and _listed(host, names)


def _listed(host: str, names: Collection[str]) -> bool:
    from bokeh.server.util import check_allowlist

    return check_allowlist(host, names)


def guard_servers() -> None:
    """From now on every Bokeh server of this process refuses what `refusal` does, whatever is asked for.

    `panel serve` makes its server before a page of ours runs and hands it to nobody, so it is the class that learns.
    """
    from bokeh.server.tornado import BokehTornado

    BokehTornado.find_handler = _find_handler


def _find_handler(application: Any, request: Any, **more: Any) -> Any:
    """The handler of a request: what Tornado asks of an application for each, before anything else."""
    from tornado.web import Application, RequestHandler

    status, reason = 403, refusal(request.headers, application.websocket_origins)
    if reason is None:
        try:
            _as_text(request.arguments)
        except InputError as error:  # Panel itself reads some of it
            status, reason = 400, str(error)
        else:
            return Application.find_handler(application, request, **more)

    class Refuse(RequestHandler):
        def prepare(self) -> None:
            self.set_status(status)
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(f"workbench: refused: {reason}\n")

    return application.get_handler_delegate(request, Refuse)


def enter() -> bool:
    """For a page, before it shows anything: guard its server. False where this session is to show nothing.

    That is the first one of a `panel serve` that goes by a name of its own: whether it may is only known to the server,
    which is guarded from the next request on.
    """
    import panel as pn
    from bokeh.server.tornado import BokehTornado

    if BokehTornado.find_handler is _find_handler:
        return True
    guard_servers()
    new_token()
    print(f"workbench: the pages are read-only; with {TOKEN}={token()} in the address they control runs", flush=True)
    context = pn.state.curdoc and pn.state.curdoc.session_context
    host = getattr(
        context and context.request, "host", None
    )  # what was asked; its headers may be the session's own word
    if host is None or _is_own(host.lower(), ()):  # none: nobody asked, as with --warm
        return True
    pn.pane.HTML("Load this page again.").servable()
    return False


def asked() -> dict[str, str]:
    """What the address of this session asks for, by name; InputError where it is not UTF-8."""
    import panel as pn

    return _as_text(pn.state.session_args)


def _as_text(arguments: Mapping[str, Sequence[bytes]]) -> dict[str, str]:
    """The last value of each argument of an address."""
    try:
        return {name: values[-1].decode() for name, values in arguments.items() if values}
    except UnicodeDecodeError:
        raise InputError("the address is not UTF-8") from None
