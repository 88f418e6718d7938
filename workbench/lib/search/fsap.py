"""FSAP: programs that write networks, from a prompt with n examples (few-shot), and cheap validation of what comes.

A language model is shown a main program with its accuracy and n supporting ones, and writes a new one for the same
contract. What it writes is not trusted: it is taken out of the answer, thrown away if it is there already (a hash
without whitespace), read (`source_problem`), and tried in a sandbox (`fsap_trial`), which trains it for an epoch.
Every request is a row of the table, with the reason where it has no accuracy; settings n are compared by a mean in
which data sets weigh the same (`fsap_table`).

n is all that differs between settings: main programs, rules and seeds are the same, and the examples of n + 1 are
those of n and one more. Which n is best is a matter of the language model that is asked. `OfflineGenerator` is none.
"""

import ast
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.sandbox import Outcome, Sandbox
from workbench.lib.core.sandbox.source import refusal
from workbench.lib.search.fsap_duplicates import Dedup, ws_hash
from workbench.lib.search.fsap_generators import (
    Generator,
    HTTPGenerator,
    OfflineGenerator,
    TransformersGenerator,
    extract_code,
)
from workbench.lib.search.fsap_programs import PLANS, measured, write
from workbench.lib.search.fsap_table import OK, Trial, balanced_mean

__all__ = [
    "Dedup", "Example", "HTTPGenerator", "Images", "OfflineGenerator", "TransformersGenerator", "balanced_mean",
    "build_prompt", "corpus", "evaluate", "extract_code", "fsap_run", "source_problem", "ws_hash",
]  # fmt: skip

METHOD = Method(
    slug="fsap",
    title="Enhancing LLM-Based Neural Network Generation: Few-Shot Prompting and Efficient Validation for Automated "
    "Architecture Design",
    family="search",
    year=2025,
    paper="CVPR-NAS 2026",
    claim="Three example models in the prompt work best, and a hash without whitespace finds duplicate programs in "
    "under a millisecond.",
    objects=(
        "fsap_run", "corpus", "build_prompt", "OfflineGenerator", "TransformersGenerator", "HTTPGenerator",
        "extract_code", "Dedup", "ws_hash", "source_problem", "evaluate", "balanced_mean",
    ),
    example=None,
    kind=None,
)  # fmt: skip

TRIAL = "workbench.lib.search.fsap_trial"
PRM = {"lr": 0.01, "momentum": 0.9, "dropout": 0.2}
BATCH = 10
ASKED = ("Net", "supported_hyperparameters")
METHODS = ("__init__", "forward", "train_setup", "learn")

CONTRACT = """Rules for the program:
- a class Net(nn.Module) with __init__(self, in_shape, out_shape, prm, device), forward(self, x),
  train_setup(self, prm) and learn(self, train_data); in_shape is (batch, channels, height, width), out_shape is
  (classes,), and forward gives (batch, classes)
- a function supported_hyperparameters() that returns the set of exactly those keys of prm that are read;
  there are lr, momentum and dropout
- imports of torch, torch.nn and math alone; no files, no processes, no network
- the whole program in one block ```python ... ``` and nothing else"""


@dataclass(frozen=True)
class Example:
    """A program of the corpus: its name, its source, and how accurate it is on a data set."""

    name: str
    code: str
    dataset: str
    accuracy: float
    task: str = "image classification"


@dataclass(frozen=True)
class Images:
    """A data set as a trial gets it; the labels of `asked` stay outside."""

    name: str
    x: Float[Tensor, "rows channels height width"]
    y: Int64[Tensor, " rows"]
    asked: Float[Tensor, "others channels height width"]
    truth: Int64[Tensor, " others"]
    classes: int


@dataclass(frozen=True)
class Prompt:
    """What a generator is asked; `wanted` examples were, and `support` are those that it has."""

    text: str
    main: Example
    support: tuple[Example, ...]
    wanted: int

    @property
    def clipped(self) -> bool:
        return len(self.support) < self.wanted


def corpus(dataset: str) -> list[Example]:
    """The example programs, with their accuracies on a data set that was measured: see `fsap_programs.measured`."""
    known = measured()
    if dataset not in known:
        raise InputError(f"dataset is {dataset!r} but the examples were measured on {', '.join(known)}")
    return [Example(name, write(plan), dataset, known[dataset][name]) for name, plan in PLANS.items()]


def build_prompt(main: Example, examples: Iterable[Example], n: int, seed: int) -> Prompt:
    """A prompt with n of the examples, drawn without replacement from those of another name than the main one's.

    With the same seed the examples of n + 1 are those of n and one more. Fewer than n where there are no more.
    """
    if n < 1:
        raise InputError(f"n is {n} but must be at least 1")
    others = [example for example in examples if example.name != main.name]
    random.Random(seed).shuffle(others)
    support = tuple(others[:n])
    blocks = [
        f"You design networks for {main.task} in PyTorch.",
        f"Write a new program, unlike those below, that reaches a higher accuracy on {main.dataset} after one epoch.",
        f"MAIN MODEL (accuracy {main.accuracy:.4f}):\n```python\n{main.code}```",
    ]
    for number, example in enumerate(support, 1):
        blocks.append(f"Supporting Model {number} (accuracy {example.accuracy:.4f}):\n```python\n{example.code}```")
    return Prompt("\n\n".join([*blocks, CONTRACT]), main, support, n)


def source_problem(code: str) -> str | None:
    """What of the contract a program lacks, as far as reading shows; None where nothing does.

    Raises:
        InputError: it does not parse.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"code does not parse: {type(error).__name__}") from None
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    if lacking := [name for name in ASKED if name not in defined]:
        return f"lacks {', '.join(lacking)}"
    methods = {node.name for node in ast.walk(defined["Net"]) if isinstance(node, ast.FunctionDef)}
    if lacking := [name for name in METHODS if name not in methods]:
        return f"Net lacks {', '.join(lacking)}"
    said = {
        node.value
        for node in ast.walk(defined["supported_hyperparameters"])
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    said -= {ast.get_docstring(defined["supported_hyperparameters"], clean=False)}
    used = {key.value for node in ast.walk(tree) if isinstance(key := _read_of_prm(node), ast.Constant)}
    if said != used:
        return f"declares the hyper-parameters {_listed(said)} and reads {_listed(used)}"
    return None


def _read_of_prm(node: ast.AST) -> ast.AST | None:
    """The key of prm["key"], prm.get("key"), and of the same of self.prm."""
    if isinstance(node, ast.Subscript):
        held, key = node.value, node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        held, key = node.func.value, node.args[0]
    else:
        return None
    return key if "prm" in (getattr(held, "id", None), getattr(held, "attr", None)) else None


def evaluate(
    code: str,
    images: Images,
    sandbox: Sandbox,
    seed: int = 0,
    epochs: int = 1,
    most_params: int = 200_000,
    most_macs: int = 5_000_000,
    prm: Mapping[str, float] = PRM,
) -> tuple[Outcome, float]:
    """Read and try a program: what came of it, and its accuracy, NaN where it has none.

    Raises:
        InputError: the sandbox is not entered, or `epochs` is below 1.
    """
    if epochs < 1:
        raise InputError(f"epochs is {epochs} but must be at least 1")
    if refusal(code, sandbox.limits.modules) is None and (problem := source_problem(code)) is not None:
        return Outcome("contract", problem), float("nan")
    channels, height, width = images.x.shape[1:]
    job = {"channels": channels, "height": height, "width": width, "classes": images.classes, "prm": dict(prm)}
    job |= {"most_params": most_params, "most_macs": most_macs, "seed": seed, "batch": BATCH, "epochs": epochs}
    outcome = sandbox.run(code, job, {"x": images.x, "y": images.y, "asked": images.asked})
    if not outcome.ok:
        return outcome, float("nan")
    predicted = outcome.value.get("predicted") if isinstance(outcome.value, dict) else None
    truth = images.truth.tolist()
    if not isinstance(predicted, list) or len(predicted) != len(truth):
        return Outcome("answer", "has not a class for each image"), float("nan")
    return outcome, sum(a == b for a, b in zip(predicted, truth, strict=True)) / len(truth)


def fsap_run(
    generator: Generator,
    sets: Sequence[Images],
    sandbox: Sandbox,
    ns: Sequence[int] = (1, 2, 3, 4, 5, 6),
    per_n: int = 4,
    seed: int = 0,
    examples: Mapping[str, Sequence[Example]] | None = None,
    epochs: int = 1,
) -> list[Trial]:
    """Ask for `per_n` programs for each n and data set, and try what comes; a row a request, in order.

    Args:
        examples: data set -> its corpus; default `corpus` of each.
    """
    if per_n < 1 or not ns or not sets:
        raise InputError(f"per_n is {per_n}, ns {list(ns)} and sets {len(sets)} but none may be empty or 0")
    found = []
    for n in ns:
        for images in sets:
            known = [*(corpus(images.name) if examples is None else examples[images.name])]
            seen = Dedup(example.code for example in known)
            draw = random.Random(f"{seed} {images.name}")  # the same main programs for every n
            for request in range(per_n):
                prompt = build_prompt(draw.choice(known), known, n, seed * 10_007 + request)
                found.append(_tried(generator, prompt, images, seen, sandbox, n, seed, epochs))
    return found


def _tried(generator, prompt: Prompt, images: Images, seen: Dedup, sandbox, n: int, seed: int, epochs: int) -> Trial:
    code = extract_code(generator(prompt.text))
    shown = (prompt.main.code, *(example.code for example in prompt.support))
    if code is None:
        return Trial(n, images.name, prompt.main.name, "no code", shown=shown)
    if not seen.add(code):
        return Trial(n, images.name, prompt.main.name, "duplicate", code=code, shown=shown)
    outcome, accuracy = evaluate(code, images, sandbox, seed, epochs)
    numbers = outcome.value if outcome.kind == OK else {}
    params, macs = (_whole(numbers.get(name)) for name in ("params", "macs"))
    return Trial(n, images.name, prompt.main.name, outcome.kind, outcome.detail, accuracy, params, macs, code, shown)


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _listed(names: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, names))) or "none"
