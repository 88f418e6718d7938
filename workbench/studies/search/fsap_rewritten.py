"""Programs written again: as the same network, or as another one, and which keys take them for the same.

The same network comes back in another layout, with comments, spelled by another printer, or with other names. Another
network is one that was changed, or one in which a statement has moved out of its loop: the latter has the letters of
the former in their order, and differs in whitespace alone.
"""

import ast
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from workbench.lib.search.fsap import Example, build_prompt, extract_code
from workbench.lib.search.fsap_duplicates import KEYS
from workbench.lib.search.fsap_generators import Generator, laid_out
from workbench.lib.search.fsap_programs import WIDTHS, mended, read, write

Rewriting = Callable[[str, random.Random], str]


def commented(code: str, draw: random.Random) -> str:
    """With a comment over one of its lines."""
    lines = code.splitlines()
    at = draw.choice([place for place, line in enumerate(lines) if line.strip()])
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    return "\n".join([*lines[:at], f"{indent}# as in example {draw.randrange(9)}", *lines[at:]]) + "\n"


def spelled(code: str, draw: random.Random) -> str:
    """As Python prints its tree: other quotes, no blank lines, no brackets that are not needed."""
    return ast.unparse(ast.parse(code)) + "\n"


def renamed(code: str, draw: random.Random) -> str:
    """With other names for what is local, and for the stages."""
    for old, new in {"loss": "error", "images": "inputs", "labels": "targets"}.items():
        code = re.sub(rf"\b{old}\b", new, code)
    return re.sub(r"\bstage(\d)", r"part\1", code)


def changed(code: str, draw: random.Random) -> str:
    """Of one stage another width, in another layout."""
    plan = read(code)
    at = draw.randrange(len(plan.stages))
    width = draw.choice([width for width in WIDTHS if width != plan.stages[at].width])
    stages = [replace(stage, width=width) if place == at else stage for place, stage in enumerate(plan.stages)]
    return laid_out(write(replace(plan, stages=mended(stages))), draw)


def moved(code: str, draw: random.Random) -> str:
    """With its last statement, a step of the optimiser, behind the loop and no more inside it."""
    lines = code.rstrip("\n").split("\n")
    loop = next(line for line in reversed(lines) if line.lstrip().startswith("for "))
    lines[-1] = loop[: len(loop) - len(loop.lstrip())] + lines[-1].lstrip()
    return "\n".join(lines) + "\n"


SAME: dict[str, Rewriting] = {"layout": laid_out, "comments": commented, "spelled": spelled, "renamed": renamed}
OTHER: dict[str, Rewriting] = {"changed": changed, "moved": moved}


def found_again(
    generator: Generator, examples: Sequence[Example], n: int, probes: int, seed: int
) -> dict[tuple[str, str], float]:
    """(rewriting, key) -> the share of programs that the key takes for the one they were made of.

    Programs are those that the generator writes for prompts of n examples.
    """
    draw = random.Random(f"{seed} {n}")
    again = {(kind, key): 0 for kind in (*SAME, *OTHER) for key in KEYS}
    for probe in range(probes):
        prompt = build_prompt(draw.choice(list(examples)), examples, n, seed * 10_007 + probe)
        code = write(read(extract_code(generator(prompt.text))))
        before = {key: make(code) for key, make in KEYS.items()}
        for kind, rewrite in (SAME | OTHER).items():
            other = rewrite(code, draw)
            for key, make in KEYS.items():
                again[kind, key] += make(other) == before[key]
    return {pair: count / probes for pair, count in again.items()}
