"""CPU paths in C: compiled once for the processor at hand, by the system's own compiler, and called without the GIL.

They do what separate operators of torch cannot: rows are gathered, multiplied, put through the exponential and summed
while they are in registers and the first level of cache. Each is a `native.c` beside the operator's other paths, for
float32; `tile.h` here is what they share. Where there is no C compiler, the operators take their path "cpu".

    python -m workbench.kernels.native --sanitize [--shapes N] [--seed S]

builds them with the address and undefined-behaviour sanitizers of gcc and runs N calls, of random shapes and with
arguments that cannot be; it says how many there were and what was found (see `sanitize`).

What is compiled is kept, and is run by every process that finds it. So it is written aside and flushed, its name has a
digest of its content, which is looked at before it is loaded, and nothing is taken from a folder that others may write.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from workbench.errors import InputError
from workbench.paths import home
from workbench.sealed import sealed_file

HEADER = Path(__file__).parent / "tile.h"
# No option that lets the compiler assume that there is no NaN, or add in another order.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
PROCESSOR = ("-march=native", "-mcpu=native")  # the first that the compiler takes
SECONDS = 120  # a compiler that takes longer is given up


class NoCompiler(InputError):
    """A native path was asked for and cannot be built here."""


@functools.cache
def obstacle(source: Path) -> str | None:
    """Why the native path of this C file cannot be built here; None where it can, and then it is. Asked once."""
    try:
        library(source)
    except NoCompiler as error:
        return str(error)
    return None


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """The functions of a C file, from ``$WORKBENCH_HOME/native``, where they are kept once compiled (a few seconds).

    Raises:
        NoCompiler: there is no C compiler, or it does not take the file.
    """
    compiler, flags = _flags()
    parts = [HEADER.read_bytes(), source.read_bytes(), repr((compiler, flags, _processor())).encode()]
    name, cache = f"{source.parent.name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}", home() / "native"
    private = _private(cache)
    if private and (kept := _kept(cache, name)) is not None:
        with suppress(OSError):  # it is in a folder from which nothing may be run
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / f"{name}.so"
        _compile(compiler, flags, source, built)
        if private:
            _keep(built, cache)
        try:
            return ctypes.CDLL(str(built))
        except OSError as error:
            raise NoCompiler(f"what the C compiler built cannot be loaded: {error}") from error


def _private(cache: Path) -> bool:
    """Whether nobody else can write to the folder, if it is there: code in it is going to run in this process."""
    try:
        found = cache.stat()
    except OSError:
        return True
    if hasattr(os, "geteuid") and (
        found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        warnings.warn(
            f"{cache} belongs to another person or may be written by others, so no compiled code is taken from it and "
            "each process compiles its own; delete the folder, and it is made anew",
            stacklevel=2,
        )
        return False
    return True


def _kept(cache: Path, name: str) -> Path | None:
    """The library of this name that is, byte for byte, what was kept. What is not is removed: it would end the process
    that runs it, without a word.
    """
    for path in cache.glob(f"{name}-*.so"):
        with suppress(OSError):
            if path.name == _kept_name(path, name):
                return path
            path.unlink()
    return None


def _keep(built: Path, cache: Path) -> None:
    """In a home that cannot be written nothing is kept: each process compiles it."""
    with suppress(OSError):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with sealed_file(cache / _kept_name(built, built.stem)) as copy:
            shutil.copyfile(built, copy)
            copy.chmod(0o600)


def _kept_name(path: Path, name: str) -> str:
    """Known by what it was made from, and by what it is."""
    return f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.so"


def compiler() -> str | None:
    """The C compiler that native paths are built with, and the processor it takes; None without one."""
    try:
        path, (processor, *_) = _flags()
    except NoCompiler:
        return None
    return f"{path} {processor}"


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's first element is, to hand to C."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def _flags() -> tuple[str, tuple[str, ...]]:
    """The compiler and the options it takes."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NoCompiler(f"there is no C compiler {os.environ.get('CC', 'cc')!r} on the path; CC names another one")
    with tempfile.TemporaryDirectory() as scratch:
        line = Path(scratch) / "line.c"
        line.write_text("#include <stdint.h>\nint32_t one(void) { return 1; }\n")
        for processor in PROCESSOR:
            flags = (processor, *FLAGS)
            try:
                _compile(compiler, flags, line, line.with_suffix(".so"))
            except NoCompiler as error:
                refused = error
            else:
                return compiler, flags
    raise refused


def _compile(compiler: str, flags: tuple[str, ...], source: Path, to: Path) -> None:
    command = [compiler, *flags, f"-I{HEADER.parent}", str(source), "-lm", "-o", str(to)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompiler(f"the C compiler did not run: {error}") from error
    if done.returncode:
        raise NoCompiler(f"the C compiler failed ({' '.join(command)}): {done.stderr.strip()[-500:]}")


def _processor() -> str:
    """What "native" stands for: a home may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
