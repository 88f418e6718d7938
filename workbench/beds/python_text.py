"""Python sources byte by byte, and the small decoder that learns them: where the studies of routing put their layers.

Settings are those of a study: "cap" bytes of text, rows of "seq_len"; "d_model", "n_layers", "n_heads" of the model.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from workbench.lib import data
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.task import LanguageModelling
from workbench.lib.data.types import TextDomains


def text(cap: int) -> TextDomains:
    """The first `cap` bytes of the sources, in three splits."""
    return data.load("text-domains", domains=("python",), cap=cap)


def python_text(settings: Mapping[str, Any]) -> LanguageModelling:
    """The task: the next byte; metric: bits per byte."""
    return LanguageModelling(text(settings["cap"]), settings["seq_len"])


def decoder(settings: Mapping[str, Any], ffn: Callable[[int], nn.Module] = lambda _: nn.Identity()) -> DecoderLM:
    """The model with the feed-forward module `ffn(layer)` in each block; by default places to put one into."""
    shape = (LanguageModelling.vocab, settings["d_model"], settings["n_layers"], settings["n_heads"])
    return DecoderLM(*shape, ffn, settings["seq_len"])
