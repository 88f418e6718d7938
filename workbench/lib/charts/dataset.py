"""Aligned charts: one picture, one metadata, three scripts, and nothing kept that was not verified."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.charts.grammar import parse
from workbench.lib.charts.sample import sample_specs
from workbench.lib.charts.spec import KINDS, LANGUAGES, ChartSpec
from workbench.lib.charts.templates import render
from workbench.lib.charts.verdict import MISSING, renderers, run_python, verify
from workbench.lib.data.cache import cached


@dataclass(frozen=True, eq=False)
class AlignedCharts:
    """n charts.

    Attributes:
        specs: the metadata of each.
        images: (n, 3, size, size), drawn by matplotlib from the Python script.
        manifest: how each language was verified, and what was dropped.
    """

    specs: tuple[ChartSpec, ...]
    images: UInt8[Tensor, "n 3 size size"]
    manifest: dict

    def scripts(self, i: int) -> dict[str, str]:
        """Language -> script of chart i, all three from its one metadata."""
        return {language: render(self.specs[i], language) for language in LANGUAGES}


def build_aligned_dataset(n: int, kinds: Sequence[str] = KINDS, seed: int = 0, size: int = 64) -> AlignedCharts:
    """n verified charts, rendered once and then taken from the cache.

    A chart is kept if the figure its Python script draws says exactly its metadata, and its R and LaTeX scripts parse
    to it. Where Rscript or pdflatex is installed, one chart of each kind is rendered there too.

    Args:
        size: of the images in pixels, a multiple of 32.

    Raises:
        InputError: matplotlib is missing, or a chart is not what it should be: an error in the templates.
    """
    try:
        packages = [version("matplotlib"), version("scikit-learn")]
    except PackageNotFoundError as error:
        raise InputError(MISSING) from error
    raw = json.dumps([n, list(kinds), seed, size, packages, renderers(), _code()])

    def build() -> tuple[dict[str, Tensor], dict]:
        specs = sample_specs(n, seed, kinds)
        drawings = run_python([render(spec, "python") for spec in specs], size)
        wrong = [
            f"{spec}: {drawing.error or 'draws another chart'}"
            for spec, drawing in zip(specs, drawings, strict=True)
            if drawing.spec != spec or any(parse(render(spec, name), name) != spec for name in ("r", "latex"))
        ]
        for spec in {spec.kind: spec for spec in specs}.values():
            verdicts = {name: verify(spec, render(spec, name), name) for name in ("r", "latex")}
            wrong += [f"{spec} in {name}: {v.reason}" for name, v in verdicts.items() if not v.ok]
        if wrong:
            raise InputError(f"{len(wrong)} of {n} charts do not verify, the first one: {wrong[0]}")
        images = torch.stack([torch.from_numpy(drawing.image).permute(2, 0, 1) for drawing in drawings])
        manifest = {"verified": renderers(), "specs": [spec.to_json() for spec in specs]}
        return {"images": images.contiguous()}, manifest

    tensors, manifest = cached("aligned-charts", raw, build)
    specs = tuple(ChartSpec.from_json(text) for text in manifest["specs"])
    return AlignedCharts(specs, tensors["images"], {"verified": manifest["verified"], "n": n, "seed": seed})


@cache
def _code() -> str:
    """A digest of this package's source."""
    value = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        value.update(path.read_bytes())
    return value.hexdigest()
