"""Gates over environments that see only the context: one that is refitted, one that learns, an oracle.

The refitted gate is G = softmax(W^T [xi; 1]), and its largest entry takes all. No gradient reaches W. It is made anew
of the contexts and of the losses L (environments, experts) that each expert has alone:

    clusters    K-means of the contexts by the L1 distance, from the centroids of the last time
    S[j, m]     the median of L over the environments of cluster j
    assignment  one expert for each cluster, by S
    W           the least squares of [xi; 1] W = one-hot of the assigned expert

Least squares on one-hot targets masks a cluster that lies between others on a line: its column is nowhere the largest.
A fit says of which clusters that is so.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.errors import InputError, unknown
from workbench.lib.core.routing import Routing

ASSIGNMENTS = ("greedy", "hungarian")
NOISE, START, STILL, ROUNDS = 1e-4, 1e-3, 1e-4, 20
WORST = 1e30
"""The loss of an expert that leaves the finite numbers: more than any other, and still one to compare."""


@dataclass(frozen=True)
class GateFit:
    """What became of one refit.

    Attributes:
        updated: False where a cluster was empty or the centroids still moved: the gate is then as it was.
        clusters: of each environment.
        centroids: of each cluster; None where it was not updated.
        assignment: the expert of each cluster; None where it was not updated.
        masked: clusters of which the new gate gives no environment to their expert.
        agreement: share of the environments that the new gate gives to the expert of their cluster.
    """

    updated: bool
    clusters: Int64[Tensor, " environments"]
    centroids: Float[Tensor, "experts context"] | None = None
    assignment: Int64[Tensor, " experts"] | None = None
    masked: tuple[int, ...] = ()
    agreement: float = 0.0


class ContextGate(nn.Module):
    """The refitted gate.

    Args:
        d_xi: size of a context.
        n_experts: M.
    """

    def __init__(self, d_xi: int, n_experts: int):
        super().__init__()
        if min(d_xi, n_experts) < 1:
            raise InputError(f"d_xi and n_experts are {d_xi} and {n_experts} but must be at least 1")
        self.d_xi, self.n_experts = d_xi, n_experts
        bound = (d_xi + 1) ** -0.5
        self.register_buffer("weight", torch.empty(d_xi + 1, n_experts).uniform_(-bound, bound))
        self.register_buffer("centroids", torch.full((n_experts, d_xi), torch.nan))  # of the last fit that held
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64))  # fits, of them skipped, of them masked

    def forward(
        self, xi: Float[Tensor, "environments context"], environment: Int64[Tensor, " environments"]
    ) -> Routing:
        probs = (ones(xi.detach()) @ self.weight).softmax(-1)
        expert = probs.argmax(-1, keepdim=True)
        return Routing.fixed(expert, torch.ones_like(expert, dtype=xi.dtype), self.n_experts, probs=probs)

    def assign(self, xi: Float[Tensor, "environments context"]) -> Int64[Tensor, " environments"]:
        """The expert of each context."""
        return (ones(xi.detach()) @ self.weight).argmax(-1)

    @torch.no_grad()
    def fit(
        self,
        xi: Float[Tensor, "environments context"],
        expert_losses: Float[Tensor, "environments experts"],
        assignment: str = "greedy",
    ) -> GateFit:
        """Refit the gate; what is drawn is drawn from torch's global generator.

        Args:
            assignment: "greedy": each cluster in turn takes its best expert that is left, as in the paper;
                "hungarian": the permutation of the smallest sum.
        """
        check_fit(xi, expert_losses, self.d_xi, self.n_experts, assignment)
        self.counts[0] += 1
        start = self.centroids
        if not bool(start.isfinite().all()):
            start = torch.empty_like(start).uniform_(-START, START)
        clusters, centroids, still = kmeans_l1(xi, start)
        if not still:
            self.centroids.fill_(torch.nan)
            self.counts[1] += 1
            return GateFit(False, clusters)
        losses = expert_losses.nan_to_num(WORST, WORST).clamp(max=WORST)
        scores = cluster_scores(losses, clusters, self.n_experts)
        experts = assigned(scores, assignment)
        noisy, target = xi + NOISE * torch.randn_like(xi), experts[clusters]
        self.weight.copy_(least_squares(noisy, target, self.n_experts))
        self.centroids.copy_(centroids)
        agrees = self.assign(xi) == target
        masked = tuple(j for j in range(self.n_experts) if not bool(agrees[clusters == j].any()))
        self.counts[2] += bool(masked)
        return GateFit(True, clusters, centroids, experts, masked, float(agrees.double().mean()))

    def form_now(self) -> dict[str, float]:
        """Refits so far, and of how many it was skipped or masked a cluster, for the live page."""
        fits, skipped, masked = self.counts.tolist()
        return {"fits": float(fits), "skipped": float(skipped), "masked": float(masked)}


class SoftmaxGate(nn.Module):
    """The gate of a plain mixture: it learns by the gradient through the weight of the expert that it chooses.

    Args:
        balance: weight of the importance loss, the squared coefficient of variation of the mean probabilities.
    """

    def __init__(self, d_xi: int, n_experts: int, balance: float = 1e-2):
        super().__init__()
        self.n_experts, self.balance = n_experts, balance
        bound = (d_xi + 1) ** -0.5
        self.weight = nn.Parameter(torch.empty(d_xi + 1, n_experts).uniform_(-bound, bound))

    def forward(
        self, xi: Float[Tensor, "environments context"], environment: Int64[Tensor, " environments"]
    ) -> Routing:
        probs = (ones(xi) @ self.weight).softmax(-1)
        weight, expert = probs.max(-1, keepdim=True)
        mean = probs.mean(0)
        losses = {"balance": mean.var(correction=0) / mean.mean().square()}
        return Routing.fixed(expert, weight, self.n_experts, probs=probs, losses=losses)


class OracleGate(nn.Module):
    """The expert of each environment is given."""

    def __init__(self, expert: Int64[Tensor, " environments"], n_experts: int):
        super().__init__()
        self.n_experts = n_experts
        self.register_buffer("expert", expert)

    def forward(
        self, xi: Float[Tensor, "environments context"], environment: Int64[Tensor, " environments"]
    ) -> Routing:
        expert = self.expert[environment][:, None]
        return Routing.fixed(expert, torch.ones_like(expert, dtype=xi.dtype), self.n_experts)


def ones(xi: Tensor) -> Tensor:
    """[xi; 1]"""
    return torch.cat([xi, xi.new_ones(len(xi), 1)], 1)


def check_fit(xi: Tensor, losses: Tensor, d_xi: int, n_experts: int, assignment: str) -> None:
    if xi.shape[1] != d_xi or losses.shape != (len(xi), n_experts):
        raise InputError(
            f"xi is {tuple(xi.shape)} and expert_losses is {tuple(losses.shape)} but they must be "
            f"(environments, {d_xi}) and (environments, {n_experts})"
        )
    if len(xi) < n_experts:
        raise InputError(f"xi has {len(xi)} environments but must have at least one for each of {n_experts} experts")
    if assignment not in ASSIGNMENTS:
        raise unknown("assignment", assignment, ASSIGNMENTS)


def kmeans_l1(
    xi: Float[Tensor, "environments context"], centroids: Float[Tensor, "clusters context"]
) -> tuple[Int64[Tensor, " environments"], Float[Tensor, "clusters context"], bool]:
    """K-means by the mean absolute difference, from these centroids; each becomes the mean of its cluster.

    Returns:
        Clusters, centroids, and whether they stand still: False where a cluster is empty, or they moved in all of
        `ROUNDS` rounds.
    """
    for _ in range(ROUNDS):
        clusters = (xi[:, None] - centroids).abs().mean(-1).argmin(1)
        members = torch.nn.functional.one_hot(clusters, len(centroids)).to(xi.dtype)
        sizes = members.sum(0)
        if not bool(sizes.all()):
            return clusters, centroids, False
        before, centroids = centroids, members.T @ xi / sizes[:, None]
        if bool(((centroids - before).abs() < STILL).all()):
            return clusters, centroids, True
    return clusters, centroids, False


def cluster_scores(
    losses: Float[Tensor, "environments experts"], clusters: Int64[Tensor, " environments"], n_clusters: int
) -> Float[Tensor, "clusters experts"]:
    """The median loss of each expert on each cluster."""
    return torch.stack([losses[clusters == j].quantile(0.5, dim=0) for j in range(n_clusters)])


def assigned(scores: Float[Tensor, "clusters experts"], assignment: str = "greedy") -> Int64[Tensor, " clusters"]:
    """One expert for each cluster, each expert once."""
    if assignment == "hungarian":
        from scipy.optimize import linear_sum_assignment

        return torch.from_numpy(linear_sum_assignment(scores.double().numpy())[1])
    left, found = scores.clone(), []
    for row in left:
        found.append(int(row.argmin()))
        left[:, found[-1]] = torch.inf
    return torch.tensor(found)


def least_squares(
    xi: Float[Tensor, "environments context"], target: Int64[Tensor, " environments"], n_experts: int
) -> Float[Tensor, "inputs experts"]:
    """W of the smallest norm with the least || [xi; 1] W - one-hot of target ||."""
    one_hot = torch.nn.functional.one_hot(target, n_experts).double()
    return torch.linalg.lstsq(ones(xi.double()), one_hot, driver="gelsd").solution.to(xi.dtype)
