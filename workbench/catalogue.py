"""The catalogue: seventy published systems, which of them stand, and where their parts are.

A system that stands registers itself from its own file; there is no list to edit:

    # workbench/lib/routing/rmoe.py
    from workbench.catalogue import Method

    METHOD = Method(
        slug="rmoe",
        title="RMoE: Layerwise Recurrent Router for Mixture-of-Experts",
        family="routing",
        year=2024,
        paper="arXiv:2408.06793",
        claim="One sentence: what the paper says is better than what.",
        objects=("RecurrentRouter",),
    )

    class RecurrentRouter(nn.Module): ...

    def example() -> nn.Module:
        return MoELayer(RecurrentRouter(32, n_experts=4, top_k=2), DenseExperts(4, 32, 64))

What makes a row whole (each line is held by a test):

- The file is ``workbench/lib/<family>/<slug with _ for ->.py`` and ``METHOD`` is assigned at module level with literal
  keyword arguments. Listing the catalogue reads them from the source, so it never imports torch.
- ``objects`` are public names of that file, the one to start with first.
- ``example()`` takes no argument and returns a small instance of the system, by its ``kind`` (see below); its only
  randomness is torch's global generator. tests/test_common.py holds every example to the contract of its kind;
  ``method(slug)`` prints its source as the way to build the system. A system of no kind below says ``example=None``.
- A system that `workbench.adapt` puts on any model names its `Adapter` as ``ADAPTER``, and
  tests/lib/core/adapt/test_every_adapter.py runs it on many.
- A system that `workbench.merge` takes names its `Merger` as ``MERGER``.
- A system that `workbench simulate` runs on a machine of a user's own has ``simulate(hardware, workload)`` among its
  objects; `workbench.lib.core.simulation.workload` has what it is given and what it returns.
- ``workbench/studies/<family>/<slug with _>.py`` defines ``STUDY``.
- ``notebooks/NN_<family>.ipynb`` has a markdown heading with the slug in backticks: "## A memory over depth: `rmoe`".
- Its row is gone from ``catalogue_planned.csv``, the plain table of the systems that do not stand yet.

What ``example()`` returns, and what is tested of it (tests/kinds.py), for each ``kind``; "layer" is the default:

- ``layer``: an ``nn.Module`` (under 100,000 parameters, float32, CPU) that maps tokens (N, 32) to (N, 32). Every
  trained parameter gets a gradient. Saved and loaded, it computes the same. One seed gives the same bits, and nothing
  is random in evaluation mode.
- ``images``: the same for a module that maps images (B, 3, 16, 16) to one row an image, (B, ...). In evaluation mode, a
  batch is its images one by one.
- ``merge``: ``merge(base, experts)`` makes one state dict of a state dict and a list of them. It keeps names, shapes,
  dtypes, and the integers of the base. It changes no input and gives the same bits again. Of copies of the base it
  makes the base, and of experts that differ something else.
- ``optimiser``: ``make(params)`` makes a ``torch.optim.Optimizer`` with a learning rate at which 100 steps at least
  halve the loss of a linear regression. It takes matrices and vectors, leaves alone what has no gradient, and reads
  "lr" from its groups at each step: 0 changes nothing. From its state dict it goes on bit for bit.
- ``simulator``: ``simulate(seed)`` makes a dict or a dataclass of plain values, as JSON has them. The seed is all its
  randomness. Numbers are finite, and what is called "...seconds" is there and not negative.
- ``data mixture``: ``mix(score, domains, seed)`` makes weights (domains,), none negative and of sum 1, for which
  ``score(weights)``, a float, is small as far as it can find out by asking. It asks for such weights only. The seed is
  all its randomness. It beats the even mixture where the score is a bowl about another one, and takes a score that is
  the same everywhere.
"""

import ast
import csv
import html
import importlib
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from workbench.errors import InputError, unknown

PACKAGE = Path(__file__).parent
PLANNED = PACKAGE / "catalogue_planned.csv"

#: Family -> what it is about. The order is the order of the notebooks: routing is 01.
FAMILIES = {
    "routing": "which expert takes a token",
    "sharing": "parameters used at several depths",
    "subspaces": "tasks that share one space and conflict in it",
    "lora_experts": "mixtures of low-rank experts",
    "adapters": "small updates to a large model",
    "low_rank": "weights and optimiser states of low rank",
    "merging": "several fine-tuned models made one",
    "modality": "experts for text, images and sound",
    "attention": "routing inside attention",
    "data_mixtures": "what to train on, and in which proportion",
    "distributed": "experts on many devices",
    "serving": "experts that do not fit in memory",
    "features": "crosses and embeddings for recommendation",
    "search": "architectures found or arranged",
    "imaging": "experts and subspaces for images",
    "dynamics": "learned time series and signals",
    "kernels": "operators close to the hardware",
}
STATUSES = ("ready", "planned")
KINDS = ("layer", "images", "merge", "optimiser", "simulator", "data mixture")


@dataclass(frozen=True, repr=False)
class Method:
    """One published system: a row of the catalogue. Printing it says what it is, how to build it, where to read on."""

    slug: str
    title: str
    family: str
    year: int
    paper: str  # "arXiv:2408.06793", or the venue where there is no preprint
    claim: str  # the paper's claim in one line
    objects: tuple[str, ...] = ()  # public names in the system's own file, the one to start with first
    example: str | None = "example"  # the function in that file that builds a small instance
    status: str = "ready"
    kind: str | None = "layer"  # one of KINDS: the contract of `example`; None while the system is planned

    @property
    def ready(self) -> bool:
        return self.status == "ready"

    @property
    def module(self) -> str:
        """The module that holds the system: workbench.lib.<family>.<slug with _>."""
        return f"workbench.lib.{self.family}.{self.slug.replace('-', '_')}"

    @property
    def path(self) -> Path:
        """The system's own file (of a planned system: where it will be)."""
        return PACKAGE / "lib" / self.family / f"{self.slug.replace('-', '_')}.py"

    @property
    def object(self) -> str | None:
        """What to call, as ``module:name``; None while the system is planned."""
        return f"{self.module}:{self.objects[0]}" if self.objects else None

    @property
    def study(self) -> str | None:
        """The module whose ``STUDY`` runs the paper's claim; None while the system is planned."""
        return f"workbench.studies.{self.family}.{self.slug.replace('-', '_')}" if self.ready else None

    @property
    def notebook(self) -> str | None:
        """The family's notebook, relative to the repository; None while the system is planned."""
        return f"notebooks/{notebook_name(self.family)}.ipynb" if self.ready else None

    @property
    def adapts(self) -> bool:
        """Whether `workbench.adapt` takes it: its file assigns ``ADAPTER``."""
        return self.ready and assigned(self.path, "ADAPTER") is not None

    @property
    def merges(self) -> bool:
        """Whether `workbench.merge` takes it: its file assigns ``MERGER``."""
        return self.ready and assigned(self.path, "MERGER") is not None

    @property
    def simulates(self) -> bool:
        """Whether `workbench simulate` takes it: among its objects is ``simulate(hardware, workload)``."""
        if not (self.ready and "simulate" in self.objects):
            return False
        functions = (
            node for node in ast.parse(self.path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
        )
        found = next((node for node in functions if node.name == "simulate"), None)
        return found is not None and [argument.arg for argument in found.args.args] == ["hardware", "workload"]

    def resolve(self) -> dict[str, Any]:
        """Import the system and return its public objects by name (empty while it is planned)."""
        if not self.ready:
            return {}
        module = importlib.import_module(self.module)
        return {name: getattr(module, name) for name in self.objects}

    def build_example(self) -> Any:
        """A small instance, as the system's own ``example()`` builds it."""
        if not (self.ready and self.example):
            raise InputError(f"slug {self.slug} is {self.status} and has no example to build")
        return getattr(importlib.import_module(self.module), self.example)()

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""
        names = ("slug", "title", "family", "year", "paper", "claim", "status", "kind", "object", "study", "notebook")
        return {name: getattr(self, name) for name in names} | {"objects": list(self.objects)}

    def example_source(self) -> str | None:
        """The source of ``example()``, or None where the system has none."""
        if not (self.ready and self.example):
            return None
        source = self.path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name == self.example:
                return ast.get_source_segment(source, node)
        return None

    def __repr__(self) -> str:
        facts = (self.family, self.kind, str(self.year), self.paper, self.status)
        lines = [f"{self.title}  [{self.slug}]", ", ".join(filter(None, facts)), ""]
        lines += textwrap.wrap(f"Claim: {self.claim}", 100)
        if not self.ready:
            return "\n".join([*lines, "", f"It does not stand yet; it will be {self.object_path()}."])
        build = [f"from {self.module} import {', '.join(self.objects)}"]
        if source := self.example_source():
            build += ["", *source.splitlines()]
        lines += ["", "How to build it", *(f"    {line}".rstrip() for line in build)]
        lines += ["", "Where to read on"]
        lines += [f"    the method    {self.object_path()}", f"    the notebook  {self.notebook}"]
        lines += [f"    the study     workbench study {self.slug} --preset small"]
        return "\n".join(lines)

    def object_path(self) -> str:
        """The system's own file, relative to the repository."""
        return self.path.relative_to(PACKAGE.parent).as_posix()

    def _repr_markdown_(self) -> str:
        head, _, rest = repr(self).partition("\n")
        return f"**{head}**\n\n```\n{rest}\n```"


class MethodTable(list[Method]):
    """A list of methods that shows itself as a table."""

    def __repr__(self) -> str:
        width = max((len(row.slug) for row in self), default=4)
        rows = [f"{row.slug:<{width}}  {row.family:<13}  {row.year}  {row.status:<7}  {row.title}" for row in self]
        ready = sum(row.ready for row in self)
        return "\n".join([*rows, f"{len(self)} methods, {ready} ready"])

    def _repr_html_(self) -> str:
        def cells(tag: str, values: list[Any]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values) + "</tr>"

        names = ["slug", "family", "year", "status", "title", "claim"]
        body = "".join(cells("td", [getattr(row, name) for name in names]) for row in self)
        return f"<table><thead>{cells('th', names)}</thead><tbody>{body}</tbody></table>"


def notebook_name(family: str) -> str:
    """The name of a family's notebook: ``01_routing``."""
    return f"{list(FAMILIES).index(family) + 1:02d}_{family}"


def methods(family: str | None = None, status: str | None = None) -> MethodTable:
    """All systems in the order of their families, or those of one family or status."""
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    if status is not None and status not in STATUSES:
        raise unknown("status", status, STATUSES)
    return MethodTable(row for row in _rows() if family in (None, row.family) and status in (None, row.status))


def method(slug: str) -> Method:
    """The system called ``slug``. An unknown slug raises ``InputError`` with the nearest names."""
    rows = {row.slug: row for row in _rows()}
    if slug not in rows:
        raise unknown("slug", slug, rows)
    return rows[slug]


@cache
def _rows() -> tuple[Method, ...]:
    order = list(FAMILIES)
    rows = [*read_registered(), *read_planned()]
    return tuple(sorted(rows, key=lambda row: (order.index(row.family), row.slug)))


def read_planned(path: Path = PLANNED) -> list[Method]:
    """The rows of the plain table of systems that do not stand yet."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    return [Method(**{**row, "year": int(row["year"])}, status="planned", kind=None, example=None) for row in rows]


def read_registered(lib: Path = PACKAGE / "lib") -> list[Method]:
    """The ``METHOD`` of every system's file under ``lib``, read from the source without importing it."""
    files = [path for family in FAMILIES for path in sorted((lib / family).glob("*.py"))]
    return [row for path in files if (row := read_method(path)) is not None]


def read_method(path: Path) -> Method | None:
    """The ``METHOD`` that one file assigns, or None where it assigns none (a part that several systems share)."""
    value = assigned(path, "METHOD")
    if value is None:
        return None
    try:
        return Method(**{keyword.arg: ast.literal_eval(keyword.value) for keyword in value.keywords})
    except (ValueError, TypeError, AttributeError) as error:
        raise TypeError(f"{path}: METHOD must be Method(...) with literal keyword arguments: {error}") from None


def assigned(path: Path, name: str) -> ast.expr | None:
    """What a file assigns to a name at module level, read from the source; None where it assigns nothing."""
    source = path.read_text(encoding="utf-8")
    if name not in source:
        return None
    for node in ast.parse(source, filename=str(path)).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value
    return None
