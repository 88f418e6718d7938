"""Questions about pictures of two digits, from domains with conventions that conflict.

A picture is a strip of two handwritten digits, 8 x 16 pixels. A question has three words, one of which belongs to a
domain, anywhere among them; nothing else says which domain it is. The answer is one of ten symbols:

    general     which digit is on the left? symbol i for digit i
    document    which digit is on the right, in a secret code? a fixed permutation of the symbols
    medical     how much ink is there? its quarter in order, of all strips, as one of the first four symbols

The base has learned to name the left or the right digit when asked in words that none of the domains uses. Its patch
encoder is frozen with it, and no adapter is put there.

Tensor letters: B batch, T time (patches and words), D model width.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds.pretrained import pretrained
from workbench.errors import InputError, unknown
from workbench.lib import data
from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import Block
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, device_of
from workbench.lib.core.train import State, TrainConfig, train

SYMBOLS = 10
DOMAINS = ("general", "document", "medical")
OLD = ("left", "right")  # what the base is taught
WORDS = 4  # of each domain, and of them all
KINDS = (*OLD, *DOMAINS)
VOCAB = SYMBOLS + WORDS * (len(KINDS) + 1)
QUESTION, PATCHES = 3, 16
SEEN = QUESTION + PATCHES
TARGETS = ("blocks.*.ffn.*", "blocks.*.attention.*")
CODE = (3, 7, 0, 9, 5, 1, 8, 2, 6, 4)


@dataclass(frozen=True)
class Asked(Batch):
    """inputs: strips (B, 8, 16); targets: symbols (B,); question: words (B, 3)."""

    question: Tensor

    def to(self, device: torch.device) -> "Asked":
        return Asked(*(part.to(device) for part in (self.inputs, self.targets, self.domain, self.question)))


class DigitQuestions:
    """Answers to questions about strips; metric: the share of right answers, the mean over the domains.

    Args:
        domains: of `KINDS`.
        shares: of the training rows, one for each domain; default equal ones.
        held_out: strips of each domain in the validation and in the test split.
    """

    metric, unit, higher_is_better = "accuracy", "fraction", True
    name = "digit-questions"

    def __init__(self, domains: Sequence[str] = DOMAINS, shares: Sequence[float] | None = None, held_out: int = 256):
        for domain in domains:
            if domain not in KINDS:
                raise unknown("domain", domain, KINDS)
        shares = [1.0] * len(domains) if shares is None else [float(share) for share in shares]
        if len(shares) != len(domains) or min(shares) <= 0:
            raise InputError(f"shares is {shares} but must hold a number above 0 for each of {len(domains)} domains")
        if held_out < 1:
            raise InputError(f"held_out is {held_out} but must be at least 1")
        source = data.load("digits")
        self.domains, self.shares, self.images = tuple(domains), torch.tensor(shares), source.splits
        self.manifest = {"name": self.name, "domains": list(domains), "shares": shares} | source.manifest
        strips, _ = self._strips("train", 4096, torch.Generator().manual_seed(0))
        self.ink = strips.sum((1, 2)).quantile(torch.tensor([0.25, 0.5, 0.75]))
        self._fixed = {split: self._strips(split, held_out, torch.Generator().manual_seed(1)) for split in self.images}

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Asked:
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        if domain is None:
            domains = torch.multinomial(self.shares, size, replacement=True, generator=generator)
        else:
            domains = torch.full((size,), domain)
        return self._ask(*self._strips(split, size, generator), domains, generator)

    def batches(self, split: str, size: int) -> Iterator[Asked]:
        if split not in self._fixed:
            raise unknown("split", split, self._fixed)
        for domain in range(len(self.domains)):
            generator = torch.Generator().manual_seed(domain)
            for strips, digits in zip(*(part.split(size) for part in self._fixed[split]), strict=True):
                yield self._ask(strips, digits, torch.full((len(strips),), domain), generator)

    def loss(self, model: nn.Module, batch: Asked) -> tuple[Tensor, Context]:
        batch = batch.to(device_of(model))
        context = Context(domain=batch.domain.repeat_interleave(SEEN))
        return F.cross_entropy(model(batch.inputs, batch.question, context), batch.targets), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        right: dict[int, list[Tensor]] = {}
        with evaluating(model):
            for batch in self.batches(split, 64):
                seen = right.setdefault(int(batch.domain[0]), [])
                if max_batches is None or len(seen) < max_batches:
                    batch = batch.to(device_of(model))
                    logits = model(batch.inputs, batch.question, Context(domain=batch.domain.repeat_interleave(SEEN)))
                    seen.append((logits.argmax(-1) == batch.targets).double().mean())
        mean = {name: float(torch.stack(right[i]).mean()) for i, name in enumerate(self.domains)}
        return {self.metric: sum(mean.values()) / len(mean)} | {f"{self.metric}/{name}": v for name, v in mean.items()}

    def _strips(self, split: str, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Strips (size, 8, 16) of two digits of a split, and what they are (size, 2)."""
        if split not in self.images:
            raise unknown("split", split, self.images)
        x, y = self.images[split]
        rows = torch.randint(len(x), (size, 2), generator=generator)
        return x[rows, 0].transpose(1, 2).flatten(2), y[rows]

    def _ask(self, strips: Tensor, digits: Tensor, domains: Tensor, generator: torch.Generator) -> Asked:
        kind = torch.tensor([KINDS.index(name) for name in self.domains])[domains]
        common = VOCAB - WORDS
        question = torch.randint(common, VOCAB, (len(strips), QUESTION), generator=generator)
        word = SYMBOLS + WORDS * kind + torch.randint(WORDS, kind.shape, generator=generator)
        at = torch.randint(QUESTION, kind.shape, generator=generator)
        question = question.scatter(1, at[:, None], word[:, None])
        left, right = digits.unbind(1)
        ink = torch.bucketize(strips.sum((1, 2)), self.ink)
        answers = torch.stack([left, right, left, torch.tensor(CODE)[right], ink], 1)  # in the order of KINDS
        return Asked(strips, answers.gather(1, kind[:, None])[:, 0], domains, question)


class StripReader(nn.Module):
    """A decoder over the 16 patches of a strip, 4 x 2 pixels each, and the words of a question; then one symbol.

    Strips (B, 8, 16) and words (B, 3) give logits (B, 10).
    """

    def __init__(self, d_model: int = 64, n_layers: int = 2, n_heads: int = 4):
        super().__init__()
        self.patches = nn.Sequential(nn.Linear(8, d_model), nn.GELU(), nn.Linear(d_model, d_model))
        self.words = nn.Embedding(VOCAB, d_model)
        self.position = nn.Parameter(torch.randn(SEEN, d_model) * d_model**-0.5)
        self.blocks = nn.ModuleList(
            Block(d_model, GLU(d_model, 2 * d_model), Attention(d_model, n_heads, causal=True)) for _ in range(n_layers)
        )
        self.norm = nn.RMSNorm(d_model)
        nn.init.normal_(self.words.weight, std=d_model**-0.5)

    def forward(self, strips: Tensor, question: Tensor, context: Context | None = None) -> Tensor:
        context = context if context is not None else Context()
        cut = F.unfold(strips[:, None], (4, 2), stride=(4, 2)).transpose(1, 2)
        x = torch.cat([self.patches(cut), self.words(question)], 1) + self.position
        for block in self.blocks:
            x = block(x, context)
        return self.norm(x[:, -1]) @ self.words.weight[:SYMBOLS].T


def base(settings: Mapping[str, Any]) -> nn.Module:
    """The reader that can name the left and the right digit: trained once, then from the cache."""
    task = DigitQuestions(OLD)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return StripReader()

    def teach(model: nn.Module) -> State:
        return train(model, task, TrainConfig(settings["base_steps"], settings["batch"], eval_every=None))

    recipe = {"steps": settings["base_steps"], "batch": settings["batch"], "data": task.manifest}
    return pretrained("digit-questions-base", recipe, build, teach, [sys.modules[__name__]])
