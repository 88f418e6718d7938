"""Digits to be drawn beside others that were looked up, and measures of what is drawn.

scikit-learn's digits (8 x 8, here -1 to 1) in parts that share no image, another division for each fold:

    embedder    250   an embedder is fitted on, and nothing else
    database    ~500  what is looked up
    train       ~500  what is drawn
    validation, test  10 % and 20 % of all, as in every task on these digits

The embedder is a PCA of 16 components, frozen. Neighbours are looked up once.

Tensor letters: B batch, k neighbours, E = 16 width of an embedding.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.diffusion import Discrete, add_noise
from workbench.lib.core.modes import evaluating
from workbench.lib.core.retrieval import RetrievalDatabase
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, device_of

EMBEDDED, WIDTH, SIDE = 250, 16, 8
LEVELS = 200
JUDGED = tuple(range(0, LEVELS, 25))


@dataclass(frozen=True)
class Part:
    """Images (rows, 1, 8, 8) of -1 to 1, and their digits (rows,)."""

    images: Tensor
    digits: Tensor

    def only(self, digits: Collection[int]) -> "Part":
        """The images of some digits."""
        kept = torch.isin(self.digits, torch.tensor(sorted(digits)))
        return Part(self.images[kept], self.digits[kept])


def parts(fold: int) -> dict[str, Part]:
    """The five parts of a fold."""
    splits = {name: Part(2 * x - 1, y) for name, (x, y) in data.load("digits", fold=fold).splits.items()}
    whole = splits.pop("train")
    order = torch.randperm(len(whole.images), generator=torch.Generator().manual_seed(fold))
    rest = order[EMBEDDED:]
    half = len(rest) // 2
    chosen = {"embedder": order[:EMBEDDED], "database": rest[:half], "train": rest[half:]}
    return {name: Part(whole.images[at], whole.digits[at]) for name, at in chosen.items()} | splits


class Embedder:
    """Principal components of the images that it was fitted on; it has nothing to train.

    Args:
        images: at least as many as `width`.
    """

    def __init__(self, images: Float[Tensor, "rows ..."], width: int = WIDTH):
        from sklearn.decomposition import PCA

        if not 1 <= width <= min(len(images), images[0].numel()):
            raise InputError(f"width is {width} but must be 1 to {min(len(images), images[0].numel())}")
        fitted = PCA(width, svd_solver="full").fit(images.flatten(1).double().numpy())
        self.mean, self.components = (torch.from_numpy(found) for found in (fitted.mean_, fitted.components_))

    def __call__(self, images: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows width"]:
        with torch.no_grad():
            return ((images.flatten(1).double() - self.mean) @ self.components.T).float()


def database(part: Part, embedder: Embedder, backend: str = "exact") -> RetrievalDatabase:
    """The images of a part, to be looked up."""
    return RetrievalDatabase(embedder(part.images), part.images, backend)


@dataclass(frozen=True)
class Beside(Batch):
    """inputs: noisy images; targets: their noise; time: levels (B,); shown (B, k, E) or None; dropped (B,) or None."""

    time: Tensor
    shown: Tensor | None
    dropped: Tensor | None

    def to(self, device: torch.device) -> "Beside":
        moved = (None if part is None else part.to(device) for part in (self.shown, self.dropped))
        return Beside(*(part.to(device) for part in (self.inputs, self.targets, self.domain, self.time)), *moved)


class DenoisingBeside:
    """Noise in images that are seen beside embeddings; metric: its mean square error over eight levels.

    Args:
        splits: split -> (images, what is shown beside each (rows, k, E)), or None where nothing is.
        p_uncond: the share of training images that are shown the null vector.
    """

    metric, unit, higher_is_better = "noise_error", "mean square", False
    domains = ("digits",)
    name = "digits-beside-others"

    def __init__(self, splits: dict[str, tuple[Tensor, Tensor | None]], schedule: Discrete, p_uncond: float = 0.0):
        self.splits, self.schedule, self.p_uncond = splits, schedule, p_uncond
        self.manifest = {"name": self.name, "rows": {split: len(x) for split, (x, _) in splits.items()}}

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Beside:
        images, shown = self.splits[split]
        rows = torch.randint(len(images), (size,), generator=generator)
        t = torch.randint(self.schedule.size, (size,), generator=generator)
        noise = torch.randn(size, *images.shape[1:], generator=generator)
        dropped = torch.rand(size, generator=generator) < self.p_uncond
        return self._beside(images[rows], None if shown is None else shown[rows], t, noise, dropped)

    def batches(self, split: str, size: int) -> Iterator[Beside]:
        """Every image at one of the judged levels, with noise of its own."""
        images, shown = self.splits[split]
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        t = torch.tensor(JUDGED).remainder(self.schedule.size).repeat(len(images) // len(JUDGED) + 1)[: len(images)]
        for start in range(0, len(images), size):
            at = slice(start, start + size)
            yield self._beside(images[at], None if shown is None else shown[at], t[at], noise[at], None)

    def loss(self, model: nn.Module, batch: Beside) -> tuple[Tensor, Context]:
        batch = batch.to(device_of(model))
        return F.mse_loss(model(batch.inputs, batch.time, batch.shown, dropped=batch.dropped), batch.targets), Context()

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        total, rows = 0.0, 0
        with evaluating(model):
            for number, batch in enumerate(self.batches(split, 256)):
                if max_batches is not None and number >= max_batches:
                    break
                total += float(self.loss(model, batch)[0]) * len(batch)
                rows += len(batch)
        return {self.metric: total / rows, f"{self.metric}/digits": total / rows}

    def _beside(self, images, shown, t, noise, dropped) -> Beside:
        noisy = add_noise(self.schedule, images, noise, t)
        domain = torch.zeros(len(t), dtype=torch.long)
        return Beside(noisy, noise, domain, t, shown, dropped if shown is not None else None)


# -- what is measured of images that were drawn


def mmd(a: Float[Tensor, "rows ..."], b: Float[Tensor, "others ..."]) -> float:
    """Squared maximum mean discrepancy, without bias (Gretton et al. 2012); 0 on average where both are of one kind.

    The kernel is a Gaussian of the pixels whose width is the median distance within b. It may be below 0.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    within = torch.cdist(b, b).square()
    scale = within[~torch.eye(len(b), dtype=torch.bool)].median()
    one, two, both = (torch.exp(-d / scale) for d in (torch.cdist(a, a).square(), within, torch.cdist(a, b).square()))
    apart = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (one, two)]
    return float(apart[0] + apart[1] - 2 * both.mean())


def nearest(a: Float[Tensor, "rows ..."], b: Float[Tensor, "others ..."]) -> Float[Tensor, " rows"]:
    """The distance of each row of a from the nearest of b, in pixels."""
    return torch.cdist(a.flatten(1).double(), b.flatten(1).double()).min(1).values


def precision_recall(drawn: Float[Tensor, "rows ..."], real: Float[Tensor, "others ..."], k: int = 3):
    """The share of what is drawn that lies within reach of real images, and the reverse (1904.06991).

    The reach of an image is the distance to the k-th nearest of its own kind.
    """
    drawn, real = drawn.flatten(1).double(), real.flatten(1).double()

    def share(of: Tensor, within: Tensor) -> float:
        reach = torch.cdist(within, within).kthvalue(k + 1, dim=1).values  # its own distance, 0, is the first
        return float((torch.cdist(of, within) <= reach).any(1).double().mean())

    return share(drawn, real), share(real, drawn)


def reader(part: Part):
    """A classifier of digits (scikit-learn), to judge what was drawn by: images (rows, 1, 8, 8) -> digits (rows,)."""
    from sklearn.svm import SVC

    fitted = SVC().fit(part.images.flatten(1).double().numpy(), part.digits.numpy())
    return lambda images: torch.from_numpy(fitted.predict(images.flatten(1).double().numpy()))
