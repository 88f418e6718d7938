"""STABLE-RPS: the weights of a network looked up, by a hash, in one array that is a fraction of their number.

Desai and Shrivastava 2023, "In defense of parameter sharing for model-compression" (arXiv:2310.11611); public code:
apd10/FakeRoast. The n weights of all shared layers, one after the other, are made of m <= n stored numbers M:

    theta_i = lambda_l g_i M[h(i)]     i-th of all weights, in layer l; g_i a hashed sign
    lambda_l = sigma_l / s             sigma_l the size of the layer's weights, s that of the numbers in M

Biases and norms are not shared. How h is made is what the schemes differ in (the store is `core.shared_store`, the
layers `core.shared_layers`):

- `HashMapper` (HashedNet, Chen et al. 2015): every weight for itself; how many weights a number has is Poisson.
- `RoastTileMapper` (ROAST, Desai et al. 2022): a tile of a matrix is one run of M, from a hashed start.
- `RandomFoldMapper` (STABLE-RPS): every m weights in a row are M once, turned by a hashed shift. A number has n / m
  weights, rounded up or down; for m = n the network is the dense one in another order.

The gradient of a number is a sum over its weights, each times lambda. So the smaller s the larger the step, by s^-2:
ROAST learns or diverges by the scale its array happened to start at. `GradScaler` divides the gradient of M[j] by

    Gamma_j = (sum over the weights i of j of lambda_i)^2 / n_j      "mean", v1 of the code; n_j their number
    Gamma_j = sum over i of lambda_i^2                               "squares", v5: the same where lambda is one

Under SGD the weights of a number then move by the mean of their gradients, whatever s is, and momentum and weight decay
mean what they mean in a dense network: the decay of the optimizer comes after the scaling, and M -> (1 - a) M is theta
-> (1 - a) theta. (A decay that is part of the loss would be scaled with it and depend on s.) Adam divides by the size
of the gradient itself: for it the scaling changes nothing, and s stays in what a step does to theta, lambda times the
rate. Gradients are clipped before the scaling unless `GradScaler.apply_` is called by hand, before the clipping.

Where the printed text and the code leave it open: M is normal with standard deviation s (the code's U(-s, s) has
s / sqrt 3, and theta as much too small), sigma_l is the root mean square of the weights the layer had.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.shared_layers import (
    Compressed,
    SharedConv2d,
    SharedEmbedding,
    SharedLinear,
    compress_model,
    expand,
)
from workbench.lib.core.shared_store import (
    FORMS,
    HashMapper,
    RandomFoldMapper,
    RoastTileMapper,
    SharedParameterStore,
)

__all__ = [
    "METHOD",
    "Compressed",
    "GradScaler",
    "HashMapper",
    "RandomFoldMapper",
    "RoastTileMapper",
    "SharedConv2d",
    "SharedEmbedding",
    "SharedLinear",
    "SharedParameterStore",
    "compress_model",
    "example",
    "expand",
]

METHOD = Method(
    slug="stable-rps",
    title="In Defense of Parameter Sharing for Model Compression (STABLE-RPS)",
    family="sharing",
    year=2023,
    paper="arXiv:2310.11611",
    claim="Hashed parameter sharing, made stable, is at least as good as pruning at initialisation at every memory "
    "budget and loses nothing at zero compression.",
    objects=(
        "compress_model",
        "GradScaler",
        "expand",
        "SharedParameterStore",
        "SharedLinear",
        "SharedConv2d",
        "SharedEmbedding",
        "RandomFoldMapper",
        "RoastTileMapper",
        "HashMapper",
    ),
)


def example() -> nn.Module:
    """A perceptron of 4,096 weights in 409 numbers."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    return compress_model(model, 0.1).model


class GradScaler:
    """Divides the gradients of a model's stores by Gamma.

    Args:
        model: whose stores are looked for.
        form: "mean" or "squares", see the head of this file.
    """

    def __init__(self, model: nn.Module, form: str = "mean"):
        if form not in FORMS:
            raise unknown("form", form, FORMS)
        self.stores = [module for module in model.modules() if isinstance(module, SharedParameterStore)]
        if not self.stores:
            raise InputError(f"model is a {type(model).__name__} without a SharedParameterStore")
        self.form = form
        self._kept: dict[SharedParameterStore, tuple[list[tuple[Tensor, int]], Tensor]] = {}

    @torch.no_grad()
    def apply_(self) -> None:
        """Divide what is in `.grad` now, once for each backward pass."""
        for store in self.stores:
            if store.weight.grad is not None:
                store.weight.grad /= self.gamma(store)

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Divide before each step of an optimizer; `remove()` what is returned to end that.

        A step with a closure is refused: its gradients would come after.
        """

        def before(_: torch.optim.Optimizer, args: tuple, options: dict) -> None:
            if options.get("closure") is not None or any(callable(arg) for arg in args[1:]):
                raise InputError("closure is given, and makes gradients after the scaling, but must be None")
            self.apply_()

        return optimizer.register_step_pre_hook(before)

    def gamma(self, store: SharedParameterStore) -> Float[Tensor, " m"]:
        """Gamma of a store, made anew where its seed or a scale was loaded or moved."""
        made_of = [(t, t._version) for t in (store.seed, *(weight.scale for weight in store.weights))]
        kept = self._kept.get(store)
        if (
            kept is None
            or kept[1].dtype != store.weight.dtype
            or kept[1].device != store.weight.device
            or any(a is not b or v != w for (a, v), (b, w) in zip(kept[0], made_of, strict=True))
        ):
            self._kept[store] = kept = made_of, store.scaling(self.form)
        return kept[1]
