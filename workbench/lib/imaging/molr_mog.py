"""MoLR-MoG: a denoiser that is the score of low-rank mixtures of Gaussians in several subspaces (ICLR 2026).

    bases = fit_subspaces(images, labels, 12)                            # K of (D, 12), through the origin
    experts = [fit_modes(images[labels == k] @ a, n_modes=4, rank=6, seed=0) for k, a in enumerate(bases)]
    prior = MoLRMoG(bases, experts)
    train_dsm(prior, images, VP(), steps=400, lr=1e-2, generator=generator)
    sample(prior.predictor(VP()), (16, 64), VP(), 50, generator)

Data is a union of K subspaces, in each of them a mixture: p0 = sum_k w_k sum_l pi_kl N(A_k mu_kl, A_k U_kl U_kl' A_k' +
tau_k^2 I), with orthonormal A_k (D, d_k) and U = Q diag(v). Noised, x = s x_0 + g e, it stays such a mixture, and its
score is a gate over all (k, l) that weighs linear experts. With h^2 = s^2 tau^2 + g^2 and z = A'x, e = z - s mu:

    C^-1 e  = (e - Q diag(s^2 v^2 / (s^2 v^2 + h^2)) Q' e) / h^2
    log |C| = sum log(s^2 v^2 + h^2) + (d - r) log h^2

so that no covariance is ever formed or solved. `tau`, the isotropic floor, keeps modes of low rank from exploding at
small t; 0 is the model of the paper.

Tensor letters: B batch, D ambient dimension, d dimension of a subspace, r rank, n modes, K subspaces.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.diffusion import VP, Schedule
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="molr-mog",
    title="Multi-Subspace Multi-Modal Modeling for Diffusion Models: Estimation, Convergence and Mixture of Experts",
    family="imaging",
    year=2026,
    paper="ICLR 2026",
    claim="A denoiser of low-rank mixtures of Gaussians in each subspace gives clear images where one Gaussian per "
    "subspace does not.",
    objects=("MoLRMoG", "LowRankMoG", "fit_subspaces", "fit_modes", "train_dsm", "MoLRDenoiser"),
)


def example() -> nn.Module:
    """Three subspaces of two modes each, asked for the noise of tokens at one level."""
    bases = torch.linalg.qr(torch.randn(3, 32, 6)).Q
    prior = MoLRMoG([*bases], [LowRankMoG(6, n_modes=2, rank=3) for _ in bases])
    return MoLRDenoiser(prior, VP(), level=0.5)


METHODS = ("svd", "ksubspace")
LOG_2PI = math.log(2 * math.pi)


class LowRankMoG(nn.Module):
    """A mixture of n Gaussians of low rank in one subspace.

    Args:
        dim, n_modes, rank: d, n, r.
        centred: every mean is 0 and not trained, as in a mixture of zero-mean Gaussians.
        tau: the isotropic floor, a standard deviation, which is not trained.
    """

    def __init__(self, dim: int, n_modes: int, rank: int, centred: bool = False, tau: float = 0.0):
        super().__init__()
        if n_modes < 1:
            raise InputError(f"n_modes is {n_modes} but must be at least 1")
        if not 1 <= rank <= dim:
            raise InputError(f"rank is {rank} but must be from 1 to dim, {dim}")
        if not (math.isfinite(tau) and tau >= 0):
            raise InputError(f"tau is {tau} but must be a finite number, 0 or above")
        self.dim, self.n_modes, self.rank, self.tau = dim, n_modes, rank, tau
        self.mean = nn.Parameter(torch.zeros(n_modes, dim) if centred else torch.randn(n_modes, dim), not centred)
        self.frame = nn.Parameter(torch.randn(n_modes, dim, rank))
        self.log_scale = nn.Parameter(torch.zeros(n_modes, rank))
        self.log_weight = nn.Parameter(torch.zeros(n_modes))

    def set(
        self,
        mean: Float[Tensor, "n d"] | None = None,
        factor: Float[Tensor, "n d r"] | None = None,
        weight: Float[Tensor, " n"] | None = None,
    ) -> "LowRankMoG":
        """Give the modes their means, factors U (of which U U' counts) and weights; what is None stays."""
        with torch.no_grad():
            if mean is not None:
                self.mean.copy_(mean)
            if factor is not None:
                u, v, _ = torch.linalg.svd(factor, full_matrices=False)
                self.frame.copy_(u)
                self.log_scale.copy_(v.clamp(min=1e-6).log())
            if weight is not None:
                self.log_weight.copy_(weight.log())
        return self

    def parts(
        self, z: Float[Tensor, "B d"], s: Float[Tensor, " B"], g: Float[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B n d"], Float[Tensor, "B n"]]:
        """C_l^-1 e_l of every mode, and log pi_l + log N(z; s mu_l, C_l) without the constant of 2 pi."""
        s, g = s[:, None], g[:, None]
        floor = (s * self.tau).square() + g.square()  # (B, 1)
        q = torch.linalg.qr(self.frame).Q
        spread = s[..., None].square() * (2 * self.log_scale).exp()  # (B, n, r)
        e = z[:, None] - s[..., None] * self.mean
        along = torch.einsum("bnd,ndr->bnr", e, q)
        shrunk = along * spread / (spread + floor[..., None])
        solved = (e - torch.einsum("bnr,ndr->bnd", shrunk, q)) / floor[..., None]
        log_det = (spread + floor[..., None]).log().sum(-1) + (self.dim - self.rank) * floor.log()
        return solved, self.log_weight.log_softmax(0) - ((e * solved).sum(-1) + log_det) / 2

    def responsibilities(self, z: Float[Tensor, "B d"], s: Float[Tensor, " B"], g: Float[Tensor, " B"]):
        """(B, n): which mode a point is of."""
        return self.parts(z, s, g)[1].softmax(-1)

    def score(self, z: Float[Tensor, "B d"], s: Float[Tensor, " B"], g: Float[Tensor, " B"]) -> Float[Tensor, "B d"]:
        solved, logits = self.parts(z, s, g)
        return -(logits.softmax(-1)[..., None] * solved).sum(1)

    def log_prob(self, z: Float[Tensor, "B d"], s: Float[Tensor, " B"], g: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        return self.parts(z, s, g)[1].logsumexp(-1) - self.dim / 2 * LOG_2PI

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "B d"]:
        """Clean points, without the floor."""
        mode = torch.multinomial(self.log_weight.softmax(0), count, replacement=True, generator=generator)
        factor = torch.linalg.qr(self.frame).Q * self.log_scale.exp()[:, None]
        inner = torch.randn(count, self.rank, generator=generator, dtype=self.mean.dtype)
        return (self.mean[mode] + torch.einsum("bdr,br->bd", factor[mode], inner)).detach()


class MoLRMoG(nn.Module):
    """The noised density in the ambient space and its score.

    Args:
        bases: A_k (D, d_k), orthonormal columns; fixed.
        experts: a mixture for each, of its dimension.
        weights: w_k; even by default. Fixed.
    """

    def __init__(
        self,
        bases: Sequence[Float[Tensor, "D _"]],
        experts: Sequence[LowRankMoG],
        weights: Float[Tensor, " K"] | None = None,
    ):
        super().__init__()
        if not bases or len(bases) != len(experts):
            raise InputError(f"experts has {len(experts)} entries but bases has {len(bases)}: one each, at least one")
        for k, (basis, expert) in enumerate(zip(bases, experts, strict=True)):
            if basis.shape[1] != expert.dim:
                raise InputError(f"bases[{k}] has {basis.shape[1]} columns but its expert has dimension {expert.dim}")
            eye = torch.eye(basis.shape[1], dtype=basis.dtype)
            if not torch.allclose(basis.T @ basis, eye, atol=1e-4):
                raise InputError(f"bases[{k}] has columns that are not orthonormal")
        weights = torch.ones(len(bases)) if weights is None else weights
        if weights.shape != (len(bases),) or not bool((weights > 0).all()):
            raise InputError(f"weights is {weights.tolist()} but must be {len(bases)} numbers above 0")
        self.experts = nn.ModuleList(experts)
        for k, basis in enumerate(bases):
            self.register_buffer(f"basis{k}", basis.contiguous())
        self.register_buffer("log_weights", (weights / weights.sum()).log().to(bases[0].dtype))

    @property
    def bases(self) -> list[Float[Tensor, "D _"]]:
        return [getattr(self, f"basis{k}") for k in range(len(self.experts))]

    def _parts(self, x, s, g) -> Iterator[tuple[Tensor, LowRankMoG, Tensor, Tensor, Tensor]]:
        """Of each subspace: its basis and expert, C^-1 e (B, n, d), logits (B, n), the residual over h^2 (B, D)."""
        for basis, expert, log_weight in zip(self.bases, self.experts, self.log_weights, strict=True):
            z = x @ basis
            floor = ((s * expert.tau).square() + g.square())[:, None]
            off = x - z @ basis.T
            solved, logits = expert.parts(z, s, g)
            outside = off.square().sum(-1, keepdim=True) / floor + (len(basis) - expert.dim) * floor.log()
            yield basis, expert, solved, log_weight + logits - outside / 2, off / floor

    def responsibilities(
        self, x: Float[Tensor, "B D"], s: Float[Tensor, " B"], g: Float[Tensor, " B"]
    ) -> Float[Tensor, "B modes"]:
        """Of all modes of all subspaces, subspace by subspace."""
        return torch.cat([logits for _, _, _, logits, _ in self._parts(x, s, g)], -1).softmax(-1)

    def gate(self, x: Float[Tensor, "B D"], s: Float[Tensor, " B"], g: Float[Tensor, " B"]) -> Float[Tensor, "B K"]:
        """Which subspace a point is of."""
        logits = [logits.logsumexp(-1) for _, _, _, logits, _ in self._parts(x, s, g)]
        return torch.stack(logits, -1).softmax(-1)

    def score(self, x: Float[Tensor, "B D"], s: Float[Tensor, " B"], g: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
        parts = list(self._parts(x, s, g))
        shares = torch.cat([logits for _, _, _, logits, _ in parts], -1).softmax(-1)
        shares = shares.split([expert.n_modes for _, expert, *_ in parts], -1)
        total = torch.zeros_like(x)
        for (basis, _, solved, _, off), share in zip(parts, shares, strict=True):
            inside = (share[..., None] * solved).sum(1) @ basis.T
            total = total - inside - share.sum(-1, keepdim=True) * off
        return total

    def log_prob(self, x: Float[Tensor, "B D"], s: Float[Tensor, " B"], g: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        logits = torch.cat([logits for _, _, _, logits, _ in self._parts(x, s, g)], -1)
        return logits.logsumexp(-1) - x.shape[1] / 2 * LOG_2PI

    def predictor(self, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
        """The noise that the score says, as `workbench.lib.core.diffusion` asks for it."""

        def predict(x: Tensor, t: Tensor) -> Tensor:
            s, g = schedule.signal(t).to(x.dtype), schedule.noise(t).to(x.dtype)
            return -g[:, None] * self.score(x, s, g)

        return predict


class MoLRDenoiser(Announcing):
    """The noise that a prior sees in points, as a network of its parameters: x (B, D) or x and t (B, D + 1) -> (B, D).

    What it announces is the mode, of all of all subspaces, that a point is mostly of.

    Args:
        level: t of every point; None where the last column of the input says it.
    """

    top_k = 1

    def __init__(self, prior: MoLRMoG, schedule: VP, level: float | None = None):
        super().__init__()
        self.prior, self.schedule, self.level = prior, schedule, level
        self.n_experts = sum(expert.n_modes for expert in prior.experts)

    def forward(self, x: Float[Tensor, "B _"], context: Context | None = None) -> Float[Tensor, "B D"]:
        if self.level is None:
            x, t = x[:, :-1], x[:, -1]
        else:
            t = torch.full((len(x),), self.level)
        if self.observed:
            s, g = (part(t).to(x.dtype) for part in (self.schedule.signal, self.schedule.noise))
            shares = self.prior.responsibilities(x, s, g)
            weight, mode = shares.max(-1, keepdim=True)
            self.announce(Routing.fixed(mode, weight, self.n_experts, probs=shares), context or Context())
        return self.prior.predictor(self.schedule)(x, t)


def fit_subspaces(
    x: Float[Tensor, "B D"],
    labels: Int64[Tensor, " B"] | None,
    d: int,
    method: str = "svd",
    n_subspaces: int | None = None,
    generator: torch.Generator | None = None,
    rounds: int = 30,
    starts: int = 8,
) -> list[Float[Tensor, "D d"]]:
    """Bases of subspaces through the origin: nothing is centred.

    Args:
        labels: 0..K-1, a subspace for each ("svd"); None where they are not known ("ksubspace").
        n_subspaces, generator, rounds, starts: of "ksubspace": from random subspaces, a point goes to the nearest in
            each round; of several starts the one that keeps most of the points' squared length.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if not 1 <= d <= x.shape[1]:
        raise InputError(f"d is {d} but must be from 1 to the {x.shape[1]} dimensions of x")
    if not bool(x.isfinite().all()):
        raise InputError("x has entries that are not finite numbers")
    if method == "svd":
        if labels is None:
            raise InputError("labels is None but method 'svd' needs them; 'ksubspace' does not")
        return [_span(x, labels == k, d, k) for k in range(int(labels.max()) + 1)]
    if n_subspaces is None or n_subspaces < 1 or generator is None:
        raise InputError(f"n_subspaces is {n_subspaces} but method 'ksubspace' needs at least 1, and a generator")
    found = [_k_subspaces(x, d, n_subspaces, generator, rounds) for _ in range(starts)]
    return max(found, key=lambda bases: float(_inside(x, bases).amax(-1).sum()))


def fit_modes(
    z: Float[Tensor, "B d"], n_modes: int, rank: int, seed: int, centred: bool = False, tau: float = 0.0
) -> LowRankMoG:
    """A mixture begun at the k-means of points in a subspace, with each cluster's own principal directions."""
    from sklearn.cluster import KMeans  # not needed by who has a mixture already

    if len(z) < n_modes:
        raise InputError(f"n_modes is {n_modes} but z has {len(z)} points")
    found = LowRankMoG(z.shape[1], n_modes, rank, centred, tau).to(z.dtype)
    cluster = torch.from_numpy(KMeans(n_modes, n_init=4, random_state=seed).fit(z.numpy()).labels_).long()
    means, factors = torch.zeros(n_modes, z.shape[1], dtype=z.dtype), torch.zeros_like(found.frame)
    for mode in range(n_modes):
        mine = z[cluster == mode]
        if not centred:
            means[mode] = mine.mean(0)
        _, v, right = torch.linalg.svd((mine - means[mode]) / math.sqrt(len(mine)), full_matrices=False)
        held = min(rank, len(v))
        factors[mode, :, :held] = right[:held].T * v[:held]
    return found.set(means, factors, torch.bincount(cluster, minlength=n_modes).to(z.dtype) / len(z))


def dsm_loss(
    model: MoLRMoG, x: Float[Tensor, "B D"], t: Float[Tensor, " B"], noise: Float[Tensor, "B D"], schedule: Schedule
) -> Float[Tensor, ""]:
    """E |g score(s x + g e, t) + e|^2 / D: the error of the predicted noise."""
    s, g = schedule.signal(t).to(x.dtype), schedule.noise(t).to(x.dtype)
    predicted = -g[:, None] * model.score(s[:, None] * x + g[:, None] * noise, s, g)
    return (predicted - noise).square().mean()


def train_dsm(
    model: MoLRMoG,
    x: Float[Tensor, "B D"],
    schedule: VP,
    steps: int,
    lr: float,
    generator: torch.Generator,
    batch_size: int = 128,
) -> list[float]:
    """Denoising score matching with Adam, t even between the schedule's first level and 1; the loss of every step."""
    if steps < 1 or batch_size < 1:
        raise InputError(f"steps and batch_size are {steps} and {batch_size} but must be at least 1")
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    history = []
    for _ in range(steps):
        rows = x[torch.randint(len(x), (batch_size,), generator=generator)]
        t = schedule.first + (1 - schedule.first) * torch.rand(batch_size, generator=generator, dtype=x.dtype)
        loss = dsm_loss(model, rows, t, torch.randn(rows.shape, generator=generator, dtype=x.dtype), schedule)
        adam.zero_grad()
        loss.backward()
        adam.step()
        history.append(float(loss.detach()))
    return history


def _inside(x: Tensor, bases: Sequence[Tensor]) -> Float[Tensor, "B K"]:
    """The squared length of each point within each subspace."""
    return torch.stack([(x @ basis).square().sum(-1) for basis in bases], -1)


def _k_subspaces(x: Tensor, d: int, count: int, generator: torch.Generator, rounds: int) -> list[Float[Tensor, "D d"]]:
    bases = [*torch.linalg.qr(torch.randn(count, x.shape[1], d, generator=generator, dtype=x.dtype)).Q]
    for _ in range(rounds):
        nearest = _inside(x, bases).argmax(-1)
        # A subspace that lost its points keeps its place.
        bases = [
            _span(x, nearest == k, d, k) if int((nearest == k).sum()) >= d else basis for k, basis in enumerate(bases)
        ]
    return bases


def _span(x: Tensor, chosen: Tensor, d: int, k: int) -> Float[Tensor, "D d"]:
    """The d leading right singular vectors of the chosen points."""
    if int(chosen.sum()) < d:
        raise InputError(f"d is {d} but subspace {k} has {int(chosen.sum())} points")
    return torch.linalg.svd(x[chosen], full_matrices=False).Vh[:d].T.contiguous()
