"""A dense feed-forward block cut into experts: all of them together are the block, some of them are cheaper.

LLaMA-MoE (Zhu et al. 2024, 2406.16554). Of a SwiGLU block of f hidden neurons every expert has f / E, each with its row
of gate and up and its column of down. The sum over all neurons is the sum over the experts, so

    FFN(x) = sum_e FFN_e(x)        and of K chosen experts with weights w that sum to one   y = sum_k w_k E FFN_k(x)

which is (E / K) times their sum where the weights are equal, and with K = E then the block itself. The factor E lies in
the columns of down. Which neurons go together is drawn, or found by k-means of their rows of gate and up; LLaMA-MoE saw
no gain of the latter.

Tensor letters: D model width, f hidden width of the block, E experts, h = f / E.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter

WAYS = ("random", "kmeans")


def split_glu(
    block: GLU, n_experts: int, top_k: int, *, method: str = "random", seed: int = 0, **options: object
) -> MoELayer:
    """The block as a mixture of E slices of it, with a new router.

    Args:
        block: is left as it is.
        n_experts: E, which divides the hidden width.
        top_k: K. For K = 1 the usual router's weight is a probability, which does not sum to one.
        method: "random", or "kmeans" for slices of like neurons.
        seed: of the slices; the router is drawn from torch's global generator.
        options: of the router, see `TopKRouter`.
    """
    slices = neuron_slices(block, n_experts, method, seed).to(block.down.weight.device)
    layer = MoELayer(
        LinearRouter(block.down.out_features, n_experts, top_k, **options),
        GLUExperts(n_experts, block.down.out_features, slices.shape[1]),
    ).to(block.down.weight)
    with torch.no_grad():
        gate, up = block.gate_up.weight.chunk(2)
        layer.experts.gate_up.copy_(torch.cat([gate[slices], up[slices]], 1))
        layer.experts.down.copy_(n_experts * block.down.weight[:, slices].movedim(1, 0))
    return layer.train(block.training)


def neuron_slices(block: GLU, n_experts: int, method: str = "random", seed: int = 0) -> Int64[Tensor, "experts slice"]:
    """The hidden neurons of each expert, in ascending order: f / E for every one, and every neuron once."""
    width = block.down.in_features
    if n_experts < 1 or width % n_experts:
        raise InputError(f"n_experts is {n_experts} but must divide the block's hidden width, {width}")
    if method == "random":
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
        return order.view(n_experts, -1).sort(1).values
    if method == "kmeans":
        return _alike(block.gate_up.weight.detach().unflatten(0, (2, -1)).transpose(0, 1).flatten(1), n_experts, seed)
    raise unknown("method", method, WAYS)


def _alike(rows: Float[Tensor, "neurons both"], n_experts: int, seed: int) -> Int64[Tensor, "experts slice"]:
    """Balanced k-means: the centres of k-means, and then the cheapest assignment that gives each its share."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans  # heavy

    rows = rows.double().cpu()
    centres = torch.from_numpy(KMeans(n_experts, n_init=1, random_state=seed).fit(rows.numpy()).cluster_centers_)
    costs = torch.cdist(rows, centres).square().repeat_interleave(len(rows) // n_experts, 1)  # a column a place
    place = torch.from_numpy(linear_sum_assignment(costs.numpy())[1])
    return place.argsort().view(n_experts, -1).sort(1).values
