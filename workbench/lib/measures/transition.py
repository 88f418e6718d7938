"""From the experts of one layer to the experts of the next, on the same token.

Counts T_ij are the tokens with expert i in layer l and expert j in layer l + 1, (E_l, E_{l+1}); every token gives
K_l * K_{l+1} pairs. The two choices share no slots, so here the null of lift is 1.
"""

from jaxtyping import Bool, Float64, Int64, Num
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.measures.coactivation import pair_sums
from workbench.lib.measures.information import Information, mutual_information


def transition_counts(
    mask: Bool[Tensor, "tokens experts"], next_mask: Bool[Tensor, "next_tokens next_experts"]
) -> Int64[Tensor, "experts next_experts"]:
    """Tokens with expert i here and expert j in the next layer, from the two (N, E) selections of the same tokens."""
    if mask.shape[0] != next_mask.shape[0]:
        raise InputError(f"next_mask has {next_mask.shape[0]} tokens but must have those of mask, {mask.shape[0]}")
    return pair_sums(mask, next_mask)


def transition_probability(
    counts: Num[Tensor, "*batch experts next_experts"], next_top_k: float = 1
) -> Float64[Tensor, "*batch experts next_experts"]:
    """P(j active in layer l + 1 | i active in layer l) = T_ij K_{l+1} / sum_j T_ij.

    Rows sum to K_{l+1}; rows of unused experts are NaN; with uniform routing every cell is K_{l+1} / E_{l+1}.
    """
    counts = counts.double()
    return counts * next_top_k / counts.sum(-1, keepdim=True)


def transition_lift(
    counts: Num[Tensor, "*batch experts next_experts"],
) -> Float64[Tensor, "*batch experts next_experts"]:
    """T_ij sum(T) / (sum_j T_ij sum_i T_ij): 1 where the layers are independent; NaN for unused experts."""
    counts = counts.double()
    expected = counts.sum(-1, keepdim=True) * counts.sum(-2, keepdim=True)
    return counts * counts.sum((-2, -1), keepdim=True) / expected


def cross_layer_information(
    counts: Num[Tensor, "*batch experts next_experts"], top_k: float = 1, next_top_k: float = 1, null: str = "exact"
) -> Information:
    """I(route_l; route_{l+1}) in nats, with its value when the tokens of one layer are shuffled.

    0 .. min(H(route_l), H(route_{l+1})); see `mutual_information` for the null. For a variable number of experts per
    token give the means and null="first_order".
    """
    return mutual_information(counts, row_k=top_k, column_k=next_top_k, null=null)
