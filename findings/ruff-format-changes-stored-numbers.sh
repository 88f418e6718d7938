#!/usr/bin/env bash
# ruff 0.17.6: formatting a notebook's code changes numbers in its stored outputs.
#
# `ruff format` reads a notebook as JSON and writes the whole of it anew where a code cell has to be formatted. Some of the
# floating point numbers in outputs (figures, arrays) come back as the neighbouring number: they are read without correct
# rounding. Whoever compares stored outputs, or their digest, sees results that no run has produced. A notebook in which
# no code changes is not written, and keeps its numbers; so does `ruff check --fix` without a fix.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ruff==0.17.6 nbformat==5.10.4
cat >"$folder/stored.py" <<'PYTHON'
import sys
from pathlib import Path
from subprocess import run

import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

NUMBERS = [0.9999812841415405, 0.24325866997241974, 0.46835464239120483, 0.1, 0.5]


def after_format(source):
    output = new_output("execute_result", {"application/json": {"y": NUMBERS}}, execution_count=1)
    book = new_notebook(cells=[new_code_cell(source, execution_count=1, outputs=[output])])
    book.metadata = {"language_info": {"name": "python"}}
    nbformat.write(book, "book.ipynb")
    run([Path(sys.executable).with_name("ruff"), "format", "--quiet", "book.ipynb"], check=True)
    return nbformat.read("book.ipynb", as_version=4).cells[0].outputs[0].data["application/json"]["y"]


kept, written = after_format("x = 1"), after_format("x  =  1")
print("code that stays: ", kept == NUMBERS)
for before, after in zip(NUMBERS, written):
    print("code that changes:", before, "->", after)
assert kept == NUMBERS
assert [a == b for a, b in zip(NUMBERS, written)] == [False, False, False, True, True]
assert all(abs(a - b) < 1e-15 for a, b in zip(NUMBERS, written))
PYTHON
cd "$folder"
"$folder/venv/bin/python" stored.py
# Seen on Python 3.11, Linux:
#   code that stays:  True
#   code that changes: 0.9999812841415405 -> 0.9999812841415404
#   code that changes: 0.24325866997241974 -> 0.24325866997241977
#   code that changes: 0.46835464239120483 -> 0.4683546423912048
#   code that changes: 0.1 -> 0.1
#   code that changes: 0.5 -> 0.5
