"""Programs of the contract: the small grammar that the examples are written in, written out and read back.

A network is a list of stages, a pooling and a head:

    conv 16 3 /2 norm relu      a convolution of width 16 and kernel 3 with stride 2, a norm, an activation
    skip 16 3 norm gelu         the same with stride 1 and the width that comes in, added to what came in

`write` makes the whole program of the contract, `read` takes the stages of such a program out of its syntax tree. It
reads no other program: to understand any is what a language model is for.
"""

import ast
import json
from dataclasses import dataclass
from functools import cache

from workbench.catalogue import PACKAGE
from workbench.errors import InputError, unknown

ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "elu": "ELU"}
POOLS = {"mean": "AdaptiveAvgPool2d", "max": "AdaptiveMaxPool2d"}
WIDTHS = (4, 6, 8, 12, 16, 24, 32)
KERNELS = (1, 3, 5)
MOST_STAGES = 5
RECORD = PACKAGE / "lib" / "search" / "fsap_corpus.json"


@dataclass(frozen=True)
class Stage:
    """A convolution and what follows it."""

    width: int
    kernel: int = 3
    stride: int = 1
    norm: bool = True
    activation: str = "relu"
    skip: bool = False  # only where stride is 1 and the width is that of the stage before


@dataclass(frozen=True)
class Plan:
    """A network: its stages, how the map is pooled to `side` x `side`, and a hidden layer of the head, 0 for none."""

    stages: tuple[Stage, ...]
    pool: str = "mean"
    side: int = 1
    hidden: int = 0

    def __post_init__(self):
        if not 1 <= len(self.stages) <= MOST_STAGES:
            raise InputError(f"stages are {len(self.stages)} but must be 1 to {MOST_STAGES}")
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)
        before = None
        for stage in self.stages:
            if stage.skip and (stage.stride != 1 or stage.width != before):
                raise InputError(f"{stage} is added to what comes in, so it must have stride 1 and width {before}")
            before = stage.width


def mended(stages: list[Stage]) -> tuple[Stage, ...]:
    """The stages with no skip where none can be."""
    found: list[Stage] = []
    for stage in stages:
        skip = stage.skip and bool(found) and stage.stride == 1 and stage.width == found[-1].width
        found.append(Stage(stage.width, stage.kernel, stage.stride, stage.norm, stage.activation, skip))
    return tuple(found)


def write(plan: Plan) -> str:
    """The program."""
    lines, passes, before = [], [], "in_shape[1]"
    for number, stage in enumerate(plan.stages, 1):
        layers = [
            f"nn.Conv2d({before}, {stage.width}, {stage.kernel}, stride={stage.stride}, padding={stage.kernel // 2})"
        ]
        layers += [f"nn.BatchNorm2d({stage.width})"] if stage.norm else []
        layers.append(f"nn.{ACTIVATIONS[stage.activation]}()")
        lines.append(f"self.stage{number} = nn.Sequential({', '.join(layers)})")
        passes.append(f"x = x + self.stage{number}(x)" if stage.skip else f"x = self.stage{number}(x)")
        before = str(stage.width)
    width = plan.stages[-1].width * plan.side**2
    head = f"nn.Linear({width}, out_shape[0])"
    if plan.hidden:
        head = f"nn.Sequential(nn.Linear({width}, {plan.hidden}), nn.ReLU(), nn.Linear({plan.hidden}, out_shape[0]))"
    lines.append(f"self.pool = nn.{POOLS[plan.pool]}({plan.side})")
    return _PROGRAM.format(lines="\n        ".join(lines), head=head, passes="\n        ".join(passes))


def read(code: str) -> Plan | None:
    """The plan that `write` makes this program of, up to whitespace and comments; None if it is no such program."""
    try:
        tree = ast.parse(code)
        assigned = {
            node.targets[0].attr: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)
        }
        skips = {
            node.right.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.BinOp)
            and isinstance(node.right, ast.Call)
            and isinstance(node.right.func, ast.Attribute)
        }
        names = sorted(name for name in assigned if name.startswith("stage"))
        stages = tuple(_stage(assigned[name], name in skips) for name in names)
        pool = {layer: name for name, layer in POOLS.items()}[assigned["pool"].func.attr]
        linears = [
            node for node in ast.walk(assigned["head"]) if isinstance(node, ast.Call) and _called(node) == "Linear"
        ]
        hidden = int(ast.literal_eval(linears[0].args[1])) if len(linears) > 1 else 0
        plan = Plan(stages, pool, int(ast.literal_eval(assigned["pool"].args[0])), hidden)
        same = ast.dump(ast.parse(write(plan))) == ast.dump(tree)
    except (SyntaxError, ValueError, KeyError, AttributeError, IndexError, TypeError, RecursionError):
        return None
    return plan if same else None


def _stage(value: ast.AST, skip: bool) -> Stage:
    convolution, *rest = value.args
    width, kernel = (int(ast.literal_eval(part)) for part in convolution.args[1:])
    stride = int(ast.literal_eval(convolution.keywords[0].value))
    activation = {layer: name for name, layer in ACTIVATIONS.items()}[_called(rest[-1])]
    return Stage(width, kernel, stride, len(rest) == 2, activation, skip)


def _called(call: ast.Call) -> str:
    return call.func.attr


PLANS = {
    "plain": Plan((Stage(8), Stage(16, stride=2)), hidden=0),
    "wide": Plan((Stage(24, kernel=5),), side=2),
    "deep": Plan((Stage(8), Stage(8, skip=True), Stage(16, stride=2), Stage(16, skip=True))),
    "bare": Plan((Stage(12, norm=False), Stage(24, stride=2, norm=False)), pool="max", side=2),
    "hidden": Plan((Stage(8, kernel=5, stride=2), Stage(16)), side=2, hidden=32),
    "narrow": Plan((Stage(4), Stage(6, stride=2), Stage(8, stride=2)), side=2),
    "smooth": Plan((Stage(12, activation="gelu"), Stage(12, activation="gelu", skip=True), Stage(24, stride=2))),
    "pointwise": Plan((Stage(16, kernel=3), Stage(32, kernel=1, activation="silu")), pool="max"),
    "elu": Plan((Stage(16, activation="elu", norm=False), Stage(16, 5, 2, activation="elu")), side=2),
    "long": Plan((Stage(8), Stage(8, skip=True), Stage(8, skip=True), Stage(16, stride=2)), pool="max", hidden=16),
}
"""The example programs by name; how well each does is in `fsap_corpus.json`."""


@cache
def measured() -> dict[str, dict[str, float]]:
    """Data set -> program -> its accuracy, as `python -m workbench.beds.programs` measured it."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["accuracy"]


_PROGRAM = """import torch
import torch.nn as nn


def supported_hyperparameters():
    return {{"lr", "momentum", "dropout"}}


class Net(nn.Module):
    def __init__(self, in_shape, out_shape, prm, device):
        super().__init__()
        self.device = device
        {lines}
        self.drop = nn.Dropout(prm["dropout"])
        self.head = {head}

    def forward(self, x):
        {passes}
        return self.head(self.drop(self.pool(x).flatten(1)))

    def train_setup(self, prm):
        self.to(self.device)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=prm["lr"], momentum=prm["momentum"])

    def learn(self, train_data):
        self.train()
        for images, labels in train_data:
            self.optimizer.zero_grad()
            loss = self.criterion(self(images.to(self.device)), labels.to(self.device))
            loss.backward()
            self.optimizer.step()
"""
