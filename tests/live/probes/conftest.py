"""What the tests of the probes share: a small model that draws random numbers, its task, and a foreign MoE block."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.task import LanguageModelling
from workbench.lib.data.types import TextDomains

E, K, D = 4, 2, 16


class Noisy(nn.Module):
    """A shared block that draws random numbers, so that a disturbed generator shows in the weights."""

    def __init__(self):
        super().__init__()
        self.glu, self.dropout = GLU(D, 8), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.glu(x))


def make_layer(top_k: int = K, shared: nn.Module | None = None, capacity: float | None = None) -> MoELayer:
    router = LinearRouter(D, E, top_k, coefficients={"lbl": 0.01}, bias_rate=0.01)
    return MoELayer(router, GLUExperts(E, D, 8), shared, capacity)


def make_model(n_layers: int = 3, **options) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(256, D, n_layers, 2, lambda _: make_layer(shared=Noisy(), **options), seq_len=8)


class TinyTopKRouter(nn.Module):
    """The shape of a router in transformers 5."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.top_k = E, K
        self.weight = nn.Parameter(torch.randn(E, D))

    def forward(self, x):
        logits = F.linear(x.reshape(-1, D), self.weight)
        weights, indices = logits.softmax(-1).topk(K, -1)
        return logits, weights, indices


class NewBlock(nn.Module):
    """The shape of a block in transformers 5."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts, self.top_k = TinyTopKRouter(), nn.Linear(D, D), K

    def forward(self, x):
        self.gate(x)
        return x + self.experts(x)


@pytest.fixture(scope="session")
def layer() -> Callable[..., MoELayer]:
    """layer(top_k=2, shared=None, capacity=None): a mixture of four experts on tokens of width 16."""
    return make_layer


@pytest.fixture(scope="session")
def model() -> Callable[..., DecoderLM]:
    """model(n_layers=3, capacity=None): the same small language model at every call."""
    return make_model


@pytest.fixture(scope="session")
def foreign() -> type[nn.Module]:
    """The class of a block as another library has it."""
    return NewBlock


@pytest.fixture(scope="session")
def task() -> LanguageModelling:
    """Rows of eight letters from three domains."""
    generator = torch.Generator().manual_seed(0)
    letters = {"a": (97, 105), "b": (101, 110), "c": (65, 70)}
    splits = {
        split: {
            name: torch.randint(*span, (900,), generator=generator).to(torch.uint8) for name, span in letters.items()
        }
        for split in ("train", "validation", "test")
    }
    return LanguageModelling(TextDomains("letters", tuple(letters), splits, {}), seq_len=8)
