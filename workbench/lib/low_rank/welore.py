"""WeLore: one threshold on the spectra of all matrices gives each its rank; only those that became low-rank are tuned.

Jaiswal et al. 2024, "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients"
(arXiv:2407.11239); public code: VITA-Group/welore. Of a trained model, without data:

    z_k = (s_k - s_n) / (s_1 - s_n)            of each matrix by itself
    r_W = #{k : z_k >= tau}                    one tau for all, such that sum r_W = (1 - reduction) sum n_W

A matrix that loses more than `rho` of its rank is a low-rank component (LRC) and becomes two, U V with the root of S on
either side; the others (N-LRC) stay dense. Tuned are the LRCs' factors alone: embeddings, norms, biases and N-LRCs are
frozen. The paper's code has rho = 0.4999 for tuning, so that square matrices get no larger, and 0 where all are to be
factored; and a table of thresholds by hand for two models, where `solve_threshold` finds them.

The threshold sees the share of a matrix's own largest value, and not how large that is, nor what runs through it. So a
weight that holds query, key and value has to be taken apart first: as one matrix the large values of the first two cut
the ranks that the third needs.

Tensor letters: O output width, I input width, n = min(O, I), r rank.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.budget import count_params
from workbench.lib.core.factored import LowRankLinear, Replaced, factorise, find_linears
from workbench.lib.core.train import Hook, State

METHOD = Method(
    slug="welore",
    title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    family="low_rank",
    year=2024,
    paper="arXiv:2407.11239",
    claim="Ranks chosen by one threshold on the spectra lose less than uniform ranks, and tuning only the low-rank "
    "layers is enough.",
    objects=("apply_welore", "solve_threshold", "uniform_ranks", "spectra", "GradientSubspaceTracker", "WeLoreReport"),
)

Spectra = Mapping[str, Float64[Tensor, " n"]]
"""The singular values of each matrix, descending, by the name of its layer."""

Axis = Callable[[Float64[Tensor, " n"]], Float64[Tensor, " n"]]
"""What a threshold is laid on: a spectrum -> n numbers from 1 down to 0 or more, the first of them 1."""

TUNED = ("lrc", "nlrc", "all")


def example() -> nn.Module:
    """Two layers at half of their ranks: one with a spectrum that decays, which is cut, and one that hardly does."""
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    for layer, values in ((model[0], 0.8 ** torch.arange(32.0)), (model[2], torch.linspace(2, 1, 32))):
        nn.init.orthogonal_(layer.weight)
        layer.weight.data *= values[:, None]
    apply_welore(model, solve_threshold(spectra(model), 0.5).ranks)
    return model


def spectra(model: nn.Module, targets: str | Sequence[str] = "*") -> dict[str, Float64[Tensor, " n"]]:
    """The singular values of the linear layers whose names match, in float64.

    Raises:
        InputError: as `find_linears`; or a weight is not finite.
    """
    found = {}
    for name, layer in find_linears(model, targets)[0].items():
        try:
            found[name] = spectrum(layer.weight)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return found


def spectrum(weight: Float[Tensor, "d_out d_in"]) -> Float64[Tensor, " n"]:
    """The singular values of one matrix, in float64; an `InputError` where it is not finite."""
    if not weight.isfinite().all():
        raise InputError(f"the weight {tuple(weight.shape)} is not finite, so it has no spectrum")
    return torch.linalg.svdvals(weight.detach().double()).cpu()


def by_size(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """WeLore's axis, z_k. A flat spectrum, of which nothing is less than the rest, is 1; of zeros only the first."""
    low, high = values[-1], values[0]
    if high == low:
        return torch.ones_like(values) if high > 0 else (torch.arange(len(values)) == 0).double()
    return (values - low) / (high - low)


def by_energy(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """The share of the squares that a value and those after it have: a threshold keeps the same share everywhere."""
    energy = values.square().flip(0).cumsum(0).flip(0)
    return energy / energy[0] if energy[0] > 0 else (torch.arange(len(values)) == 0).double()


@dataclass(frozen=True)
class Threshold:
    """Where the threshold is, and the rank it leaves each matrix."""

    tau: float
    ranks: Mapping[str, int]


def solve_threshold(spectra: Spectra, reduction: float, axis: Axis = by_size) -> Threshold:
    """The smallest threshold that takes at least `reduction` of all ranks together, by bisection.

    Every matrix keeps a rank of at least 1. More than `reduction` goes where values are equal.

    Raises:
        InputError: `reduction` is below 0, or more than any threshold takes.
    """
    keep = kept_ranks(spectra, reduction)
    axes = {name: axis(values) for name, values in spectra.items()}
    ascending = torch.cat([*axes.values()]).sort().values

    def kept(tau: float) -> int:
        return len(ascending) - int(torch.searchsorted(ascending, torch.tensor(tau, dtype=torch.float64)))

    low, high = 0.0, 1.0
    if kept(high) > keep:
        raise InputError(
            f"reduction is {reduction} but the ranks of {len(spectra)} matrices can be cut by at most "
            f"{1 - kept(high) / len(ascending):.4f}: each keeps what is as large as its largest"
        )
    if kept(low) <= keep:
        high = low
    while low < (middle := (low + high) / 2) < high:  # until the two are neighbours
        low, high = (low, middle) if kept(middle) <= keep else (middle, high)
    return Threshold(high, {name: int((values >= high).sum()) for name, values in axes.items()})


def uniform_ranks(spectra: Spectra, reduction: float) -> dict[str, int]:
    """The same share of every matrix's rank, with the same sum as `solve_threshold` may keep.

    What rounding leaves goes to those that lost most by it.
    """
    keep, sizes = kept_ranks(spectra, reduction), {name: len(values) for name, values in spectra.items()}
    share = keep / sum(sizes.values())
    ranks = {name: max(1, math.floor(share * n + 1e-9)) for name, n in sizes.items()}
    by_loss = sorted(sizes, key=lambda name: ranks[name] - share * sizes[name])
    for name in by_loss[: max(0, keep - sum(ranks.values()))]:
        ranks[name] += 1
    for _ in range(sum(ranks.values()) - keep):  # a rank of 1 may be more than a small matrix's share
        ranks[max((name for name in ranks if ranks[name] > 1), key=lambda name: ranks[name] - share * sizes[name])] -= 1
    return ranks


def kept_ranks(spectra: Spectra, reduction: float) -> int:
    """How many singular triplets are left of all; an `InputError` where that is less than one a matrix."""
    total = sum(map(len, spectra.values()))
    keep = math.floor((1 - reduction) * total + 1e-9) if math.isfinite(reduction) else 0
    if not spectra or reduction < 0 or keep < len(spectra):
        most = 1 - len(spectra) / total if spectra else 0.0
        raise InputError(
            f"reduction is {reduction} but must be between 0 and {most:.4f}: each of {len(spectra)} matrices keeps "
            "a rank of at least 1"
        )
    return keep


def is_low_rank(rank: int, n: int, rho: float) -> bool:
    """Whether a matrix of n singular values that keeps `rank` of them is an LRC."""
    return 1 - rank / n > rho


@dataclass(frozen=True)
class WeLoreReport:
    """What was done to a model.

    Attributes:
        replaced: the LRCs that were put in.
        lrc, nlrc: names of the low-rank components, and of the matrices that stay dense.
        params_before, params_after: of the model.
    """

    replaced: Replaced
    lrc: list[str]
    nlrc: list[str]
    params_before: int
    params_after: int

    def tune(self, tuned: str) -> int:
        """Freeze the model but for the matrices of its LRCs, its N-LRCs or both, and say how many numbers train.

        Args:
            tuned: of `TUNED`.
        """
        if tuned not in TUNED:
            raise unknown("tuned", tuned, TUNED)
        model, trained = self.replaced.model.requires_grad_(False), 0
        for name in (*(self.lrc if tuned != "nlrc" else ()), *(self.nlrc if tuned != "lrc" else ())):
            layer = model.get_submodule(name)
            for p in (layer.u, layer.v) if isinstance(layer, LowRankLinear) else (layer.weight,):
                trained += p.requires_grad_().numel()
        return trained


def apply_welore(
    model: nn.Module, ranks: Mapping[str, int], rho: float = 0.5, targets: str | Sequence[str] = "*"
) -> WeLoreReport:
    """Put two factors in the place of each matrix that keeps little of its rank, and freeze everything else.

    Args:
        model: changed in place.
        ranks: of each matrix, by the name of its layer, as `solve_threshold` gives them.
        rho: a matrix that loses more than this share of its rank is an LRC. Parameters never grow from
            1 - max(O, I) / (O + I) on, which is 0.5 for a square matrix and less for others.
        targets: patterns among which the names in `ranks` are.

    Raises:
        InputError: `rho` is not at least 0 and below 1; a name that is no linear layer, a rank above its width; or no
            matrix is an LRC.
    """
    if not 0 <= rho < 1:
        raise InputError(f"rho is {rho} but must be at least 0 and below 1")
    linears, _ = find_linears(model, targets)
    if missing := [name for name in ranks if name not in linears]:
        raise unknown("name in ranks", missing[0], linears)
    sizes = {name: min(linears[name].weight.shape) for name in ranks}
    lrc = [name for name, rank in ranks.items() if is_low_rank(rank, sizes[name], rho)]
    if not lrc:
        raise InputError(f"rho is {rho} but no matrix loses more than that of its rank, so none becomes two")
    before = count_params(model)
    replaced = factorise(model, {name: ranks[name] for name in lrc}, targets)
    report = WeLoreReport(replaced, lrc, [name for name in ranks if name not in lrc], before, count_params(model))
    report.tune("lrc")
    return report


class GradientSubspaceTracker(Hook):
    """How much the gradients of a layer point the same way at two times of a training, as the paper looks at them.

    Attributes:
        steps: at which it looked.

    Args:
        layers: names of parameters, matrices.
        every: steps between two looks.
        rank: r of the subspace of the first right singular vectors.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], every: int = 10, rank: int = 4):
        if every < 1:
            raise InputError(f"every is {every} but must be at least 1")
        parameters = dict(model.named_parameters())
        for name in layers:
            if name not in parameters:
                raise unknown("layer", name, parameters)
            if parameters[name].ndim != 2 or not 1 <= rank <= min(parameters[name].shape):
                shape = tuple(parameters[name].shape)
                raise InputError(f"rank is {rank} but {name}, of shape {shape}, has no such subspace")
        self.parameters = {name: parameters[name] for name in layers}
        self.every, self.rank, self.steps = every, rank, []
        self._gradients: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._bases: dict[str, list[Tensor]] = {name: [] for name in layers}

    def before_update(self, state: State) -> None:
        if state.step % self.every:
            return
        self.steps.append(state.step)
        for name, p in self.parameters.items():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad.detach()
            gradient = gradient.double().cpu()
            if not (gradient.isfinite().all() and gradient.any()):  # it points nowhere
                self._gradients[name].append(torch.full_like(gradient.flatten(), torch.nan))
                self._bases[name].append(gradient.new_full((self.rank, gradient.shape[1]), torch.nan))
                continue
            self._gradients[name].append(gradient.flatten() / gradient.norm())
            self._bases[name].append(torch.linalg.svd(gradient, full_matrices=False).Vh[: self.rank])

    def cosines(self, name: str) -> Float64[Tensor, "looks looks"]:
        """The cosine of the whole gradients at each two looks; NaN with one that is zero or not finite."""
        flat = torch.stack(self._gradients[name])
        return flat @ flat.T

    def overlaps(self, name: str) -> Float64[Tensor, "looks looks"]:
        """||Q_t Q_s^T||_F^2 / r of the subspaces, 1 for the same one, r / I for two that were drawn; NaN likewise."""
        bases = torch.stack(self._bases[name])
        return torch.einsum("tri,sqi->tsrq", bases, bases).square().sum((-2, -1)) / self.rank
