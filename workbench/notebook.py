"""Run a notebook with parameters, checked before a kernel starts.

Papermill only warns about a parameter that the notebook does not have, and injects any value of any type. Here the
notebook's own ``parameters`` cell is the declaration, and everything is held against it first:

    preset: str = "small"  # one of: smoke, small, full
    seed: int = 0  # 0..2147483647
    temperature: float = 1.0  # 0.01..: of the router's softmax
    top_k: int | None = None  # 1..8: None leaves the recipe's own

A parameter is int, float, str or bool, by its annotation or else by its default, and ``| None`` admits none. The
comment may begin with the allowed values (``one of: a, b``) or with bounds (``LOW..HIGH``, either may be missing),
followed by a colon and a description. ``papermill`` itself runs the same notebooks, without these checks.
"""

import ast
import asyncio
import hashlib
import json
import math
import re
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from workbench.errors import InputError, unknown
from workbench.paths import shipped

FOLDER = shipped("notebooks")  # the workbench's own
TYPES = {"int": int, "float": float, "str": str, "bool": bool}
ANY = {"int": "a whole number", "float": "a finite number", "str": "text", "bool": "true or false"}

Value = int | float | str | bool | None
Progress = Callable[[int, int, str], None]


class NotebookError(RuntimeError):
    """A notebook that started and failed. ``output`` is the notebook as far as it came."""

    def __init__(self, message: str, output: Path):
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Parameter:
    """One assignment of a notebook's ``parameters`` cell."""

    name: str
    type: str  # int, float, str or bool
    default: Value
    optional: bool = False  # None is allowed
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    help: str = ""

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        elif self.low is None and self.high is None:
            words = ANY[self.type]
        else:
            kind = "a whole number" if self.type == "int" else "a number"
            bounds = (("at least", self.low), ("at most", self.high))
            words = f"{kind} of " + " and ".join(f"{text} {bound:.15g}" for text, bound in bounds if bound is not None)
        return words + " or none" * self.optional

    def as_dict(self) -> dict[str, Value]:
        """The declaration as plain values, for JSON."""
        names = ("name", "type", "default", "allowed", "help")
        return {name: getattr(self, name) for name in names}

    def coerce(self, value: Value) -> Value:
        """The value, or the text a shell gives for it, in the parameter's type; ``InputError`` if not allowed."""
        error = InputError(f"parameter {self.name} is {value!r} but must be {self.allowed}")
        if value is None or (
            isinstance(value, str) and value.lower() == "none" and (self.optional or self.type != "str")
        ):
            if not self.optional:
                raise error
            return None
        try:
            result = _convert(value, self.type)
        except ValueError:
            raise error from None
        if self.choices and str(result) not in self.choices:
            raise unknown(f"parameter {self.name}", result, self.choices)
        outside = (self.low is not None and not result >= self.low) or (
            self.high is not None and not result <= self.high
        )
        if outside or (isinstance(result, float) and not math.isfinite(result)):
            raise error
        return result


def _convert(value: Value, kind: str) -> Value:
    """``value`` as ``kind``; ValueError where that would change its meaning."""
    if kind == "bool":
        if isinstance(value, bool):
            return value
        words = {"true": True, "false": False}
        if not isinstance(value, str) or value.lower() not in words:
            raise ValueError
        return words[value.lower()]
    if isinstance(value, bool) or (kind != "str" and not isinstance(value, str | int | float)):
        raise ValueError
    if kind == "str":
        if not isinstance(value, str):
            raise ValueError
        return value
    if kind == "int" and isinstance(value, float):
        raise ValueError
    return TYPES[kind](value)


def names() -> list[str]:
    """The names of the workbench's own notebooks."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def find(name: str | Path) -> Path:
    """The notebook at a path, or the workbench's own of that name (``01_routing``), from any directory."""
    path = Path(name)
    candidates = [path, path.with_name(f"{path.name}.ipynb")] if path.name else []
    candidates += [FOLDER / f"{path.stem}.ipynb"] if path.parent == Path() else []
    for candidate in candidates:
        if candidate.suffix == ".ipynb" and candidate.is_file():
            return candidate
    raise unknown("notebook", str(name), names())


def read(path: Path) -> dict:
    """The notebook as nbformat reads it; ``InputError`` where the file is not one."""
    import nbformat

    try:
        found = nbformat.read(path, as_version=4)
    except Exception as error:  # it says in many ways that a file is none: with the error it stumbles on
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"notebook {path} cannot be read: {reason[:200]}") from None
    if wrong := _wrong(found):
        raise InputError(f"notebook {path} cannot be read: {wrong}")
    return found


def _wrong(found: dict) -> str | None:
    """What is not as everything here takes it to be; nbformat warns of it at most."""
    kernel = found.get("metadata", {}).get("kernelspec", {}) if isinstance(found.get("metadata", {}), dict) else None
    if not (isinstance(kernel, dict) and isinstance(kernel.get("name", ""), str)):
        return "its kernel has no name"
    cells = found.get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        return "it has no cells"
    for number, cell in enumerate(cells, 1):
        metadata = cell.get("metadata")
        tags = metadata.get("tags", []) if isinstance(metadata, dict) else None
        if not (isinstance(cell.get("source"), str) and isinstance(tags, list)):
            return f"cell {number} has no text, or tags that are none"
    return None


def parameters(path: Path) -> dict[str, Parameter]:
    """What the notebook's ``parameters`` cell declares, by name."""
    cells = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    if not cells:
        raise InputError(f"notebook {path} has no cell tagged 'parameters', so nothing in it can be set")
    source = cells[0].source
    lines = source.splitlines()
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or str(error) or "it is nested too deep"
        raise InputError(f"notebook {path}: its parameters cell is not plain Python: {reason}") from None
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            target, annotation = node.target, ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, annotation = node.targets[0], ""
        else:
            continue
        if isinstance(target, ast.Name):
            comment = (
                lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip().removeprefix("#").strip()
            )
            found[target.id] = _declare(path, target.id, annotation, node.value, comment)
    return found


def _declare(path: Path, name: str, annotation: str, value: ast.expr, comment: str) -> Parameter:
    where = f"notebook {path}: parameter {name}"
    try:
        default = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise InputError(f"{where} must have a literal default, not {_shown(value)}") from None
    kinds = annotation.split(" | ") if annotation else [type(default).__name__]
    optional = "None" in kinds
    kinds = [kind for kind in kinds if kind != "None"]
    if len(kinds) != 1 or kinds[0] not in TYPES:
        raise InputError(
            f"{where} is {annotation or kinds} but must be int, float, str or bool, or one of these | None"
        )
    constraint, described = _constraint(comment)
    parameter = Parameter(name, kinds[0], default, optional, help=described, **constraint)
    parameter.coerce(default)
    return parameter


def _shown(value: ast.expr) -> str:
    try:
        return ast.unparse(value)[:200]
    except (RecursionError, ValueError):
        return "this"


def _constraint(comment: str) -> tuple[dict, str]:
    """Choices or bounds at the start of a comment, and the description that is left."""
    if match := re.match(r"one of:?\s+([^:]+)(?::\s*(.*))?$", comment):
        return {"choices": tuple(word.strip() for word in match[1].split(","))}, match[2] or ""
    number = r"[-+]?\d[\d_]*(?:\.\d+)?(?:e[-+]?\d+)?"
    if match := re.match(rf"({number})?\.\.({number})?(?:\s*:\s*(.*))?$", comment):
        bounds = {key: float(text) for key, text in zip(("low", "high"), match.group(1, 2), strict=True) if text}
        return bounds, match[3] or ""
    return {}, comment


def check(path: Path, given: Mapping[str, Value]) -> dict[str, Value]:
    """The given parameters in the types that the notebook declares; ``InputError`` for the first that does not fit."""
    if not given:
        return {}
    declared = parameters(path)
    for name in given:
        if name not in declared:
            raise unknown(f"parameter of {path.stem}", name, declared)
    return {name: declared[name].coerce(value) for name, value in given.items()}


def default_output(path: Path, values: Mapping[str, Value]) -> Path:
    """``out/<notebook>-<hash>.ipynb`` below the current directory; the hash is of the notebook and the parameters."""
    digest = hashlib.sha256(path.read_bytes() + json.dumps(dict(values), sort_keys=True).encode()).hexdigest()
    return Path("out") / f"{path.stem}-{digest[:8]}.ipynb"


def run(
    notebook: str | Path,
    given: Mapping[str, Value] | None = None,
    output: Path | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Execute a notebook with parameters and return where the executed one is.

    Args:
        notebook: a path, or the name of one of the workbench's own (``01_routing``).
        given: parameters by name; text is converted to the declared type.
        output: where to write; ``out/<notebook>-<hash>.ipynb`` unless given.
        progress: called as progress(cells done, cells in all, first line of the cell that begins).

    Raises:
        InputError: before anything runs: the notebook, a parameter or the output cannot be used.
        NotebookError: a cell failed; the notebook is kept at ``output`` as far as it came, with the error in it.
        KeyboardInterrupt: it was interrupted, and is kept in the same way.
    """
    path = find(notebook)
    values = check(path, given or {})
    output = default_output(path, values) if output is None else Path(output)
    kernel = kernel_of(path)
    if output.suffix != ".ipynb":
        raise InputError(f"output {output} must end in .ipynb")
    if output.resolve() == path.resolve():
        raise InputError(f"output {output} is the notebook itself; name another file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    except OSError as error:
        raise InputError(f"output {output} cannot be written: {error.strerror}") from None
    try:
        _execute(path, values, output, kernel, progress)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{path.stem} is kept at {output}, as far as it came") from stop
    return output


def kernel_of(path: Path) -> str:
    """The name of the notebook's kernel; ``InputError`` where it is not installed."""
    from jupyter_client.kernelspec import KernelSpecManager

    name = read(path).metadata.get("kernelspec", {}).get("name", "python3")
    installed = KernelSpecManager().find_kernel_specs()
    if name not in installed:
        raise unknown(f"kernel of {path}", name, installed)
    return name


def _execute(path: Path, values: dict[str, Value], output: Path, kernel: str, progress: Progress | None) -> None:
    import papermill  # after the checks: a wrong name is told in a moment
    from jupyter_client.manager import AsyncKernelManager
    from nbclient.exceptions import CellControlSignal, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source, target = (str(name).replace("{", "{{").replace("}", "}}") for name in (path, output))  # it formats paths
    with TemporaryFile() as log, _CtrlC() as ctrl_c:

        class QuietKernel(AsyncKernelManager):
            """A kernel whose process does not write between the lines of this one; cells' output is not touched."""

            async def start_kernel(self, **options: Any) -> None:
                await super().start_kernel(stdout=log, stderr=log, **options)
                ctrl_c.kernel = self

        total = len(read(path).cells) + bool(values)  # the values are a cell, too

        def begins(cell: Mapping[str, Any], cell_index: int) -> None:
            if ctrl_c.pressed:  # between two cells, or the last one did not mind
                raise _Interrupted
            if progress:
                progress(cell_index, total, next(iter(cell["source"].strip().splitlines()), ""))

        options = {"kernel_name": kernel, "kernel_manager_class": QuietKernel, "on_cell_start": begins}
        try:
            papermill.execute_notebook(source, target, values, progress_bar=False, **options)
        except _Interrupted:
            raise KeyboardInterrupt from None
        except PapermillExecutionError as error:
            if error.ename == "KeyboardInterrupt":
                raise KeyboardInterrupt from error
            raise NotebookError(f"In [{error.exec_count}]: {error.ename}: {error.evalue}".strip(), output) from error
        except (DeadKernelError, CellControlSignal) as error:
            log.seek(0)
            last = log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise NotebookError(": ".join([f"the kernel ended: {error}", *last]), output) from error


class _Interrupted(Exception):
    """Ends the execution before a cell. A KeyboardInterrupt would tear down the event loop with the kernel in it."""


class _CtrlC:
    """While open, Ctrl-C interrupts the running cell, as in Jupyter; a second one ends this process at once.

    The kernel is in a session of its own, which the terminal does not tell.
    """

    def __init__(self):
        self.kernel: Any = None
        self.pressed = False

    def __enter__(self) -> "_CtrlC":
        self._before = signal.getsignal(signal.SIGINT)
        self._ours = threading.current_thread() is threading.main_thread() and callable(self._before)
        if self._ours:
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: object) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if self.pressed or self.kernel is None or loop is None:
            self._before(number, frame)
        self.pressed = True
        loop.call_soon_threadsafe(lambda: loop.create_task(self.kernel.interrupt_kernel()))
