"""The process that programs are forked from: a clean one, without the environment, files or network of its parent.

It loads torch and the trial once, so that a program costs a fork and not an import. It speaks with its parent over its
standard input and output: a line of JSON and the bytes that it announces, and a line back.
"""

import importlib
import json
import os
import sys
from typing import Any

from workbench.lib.core.sandbox import confine, inside


def main() -> None:
    """Serve until the parent closes; the first line says which module holds the trial."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    start = json.loads(requests.readline())
    separate = confine.separate()
    module = importlib.import_module(start["trial"])
    module.warm()
    "a".encode("idna")  # what a name of a host is looked up with: so that it comes to be looked up, and is refused
    walled = confine.missing() is None and _stands()
    _reply(replies, {"filter": walled, "namespaces": separate})
    while line := requests.readline():
        asked = json.loads(line)
        tensors = _tensors(requests.read(asked["bytes"]))
        _reply(replies, inside.run(asked["code"], module.trial, asked["job"], tensors, asked["limits"], walled))


def _tensors(data: bytes) -> dict[str, Any]:
    if not data:
        return {}
    from safetensors.torch import load

    return load(data)


def _stands() -> bool:
    """Whether the filter does what it is for: a process behind it that asks for a socket is stopped, and named."""
    limits = {"seconds": 120.0, "memory": 1 << 28, "modules": []}
    try:
        said = inside.run("", lambda load, job, tensors: confine.ask_for_socket(), {}, {}, limits, True)
    except OSError:
        return False
    return said.get("detail") == "system call socket"


def _reply(replies: Any, said: dict[str, Any]) -> None:
    replies.write(json.dumps(said).encode() + b"\n")
    replies.flush()
