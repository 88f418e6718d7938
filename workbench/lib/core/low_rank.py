"""A bank of low-rank experts: E updates B_e A_e of one linear layer, each token given its own mixture of them.

Tensor letters: N tokens, I input width, O output width, E experts, r rank, P routed pairs.
"""

from collections.abc import Sequence
from numbers import Integral

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError, unknown
from workbench.kernels.low_rank import low_rank
from workbench.lib.core.routing import Routing

PATHS = ("dense", "grouped")


class LowRankExperts(nn.Module):
    """y_n = sum_e g[n, e] s_e B_e A_e x_n for the gates g of a `Routing`, in the type of x.

    A bank with gates g equals one LoRA of rank E r whose rank vector is multiplied by g, each gate repeated r times.
    That is how the dense path computes it: all experts at once, nothing wider than (N, E r).

    Attributes:
        a: (E, r, I), initialised as `nn.Linear` is.
        b: (E, O, r), zero, so that a new bank changes nothing.
        scale: (E,) s_e = alpha / r, a buffer.
        turned: whether the weight of the layer that it is put on lies as (I, O), as in GPT-2's `Conv1D`.

    Args:
        alpha: numerator of the scale; default r, so that the scale is 1.
    """

    turned = False

    def __init__(self, n_experts: int, d_in: int, d_out: int, rank: int, alpha: float | None = None):
        super().__init__()
        if min(n_experts, d_in, d_out) < 1:
            raise InputError(f"n_experts, d_in, d_out are {n_experts}, {d_in}, {d_out} but must all be at least 1")
        check_rank(rank, d_in, d_out)
        self.a = nn.Parameter(torch.empty(n_experts, rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.b = nn.Parameter(torch.zeros(n_experts, d_out, rank))
        self.register_buffer("scale", torch.full((n_experts,), (rank if alpha is None else alpha) / rank))

    @classmethod
    def from_loras(cls, loras: Sequence[tuple[Tensor, Tensor, float]]) -> "LowRankExperts":
        """Experts from separate LoRAs (A (r, I), B (O, r), scale); lower ranks are padded with zeros, which stay zero.

        Raises:
            InputError: none is given, or their layers have different widths.
        """
        if not loras:
            raise InputError("loras is empty but must hold at least one (A, B, scale)")
        widths = {(a.shape[1], b.shape[0]) for a, b, _ in loras}
        if len(widths) > 1 or any(a.shape[0] != b.shape[1] for a, b, _ in loras):
            shapes = ", ".join(f"A {tuple(a.shape)} B {tuple(b.shape)}" for a, b, _ in loras)
            raise InputError(f"loras have shapes {shapes} but must be A (r, I), B (O, r) with the same I and O")
        (d_in, d_out), rank = widths.pop(), max(a.shape[0] for a, _, _ in loras)
        bank = cls(len(loras), d_in, d_out, rank)
        with torch.no_grad():
            bank.a.zero_(), bank.b.zero_()
            for e, (a, b, scale) in enumerate(loras):
                bank.a[e, : a.shape[0]], bank.b[e, :, : b.shape[1]], bank.scale[e] = a, b, scale
        return bank

    @classmethod
    def from_deltas(cls, deltas: Float[Tensor, "experts d_out d_in"], ranks: Sequence[int]) -> "LowRankExperts":
        """The best experts of the given ranks for full updates: their truncated SVD, sqrt(S) on either side."""
        if len(ranks) != deltas.shape[0]:
            raise InputError(f"ranks has {len(ranks)} entries but must have one for each of {deltas.shape[0]} deltas")
        loras = []
        for delta, rank in zip(deltas, ranks, strict=True):
            if not 1 <= rank <= min(delta.shape):
                raise InputError(f"ranks holds {rank} but each must be between 1 and {min(delta.shape)}")
            u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
            root = s[:rank].sqrt()
            loras.append(((root[:, None] * v[:rank]).to(delta.dtype), (u[:, :rank] * root).to(delta.dtype), 1.0))
        return cls.from_loras(loras)

    @property
    def n_experts(self) -> int:
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def d_in(self) -> int:
        return self.a.shape[2]

    @property
    def d_out(self) -> int:
        return self.b.shape[1]

    def forward(
        self, x: Float[Tensor, "tokens d_in"], routing: Routing, path: str | None = None
    ) -> Float[Tensor, "tokens d_out"]:
        """The update of each token.

        Args:
            path: "dense" computes all experts and multiplies by the gates, at 2 N E r (I + O) operations in two large
                products; "grouped" computes each pair alone, at 2 P r (I + O), and gathers its rows. Both agree.
                Default: whichever costs less, see `kernels.low_rank`.
        """
        if path is not None and path not in PATHS:
            raise unknown("path", path, PATHS)
        routing = routing.served()
        score = routing.weight * self.scale.index_select(0, routing.expert)
        of_token = {"tok_offs": routing.offsets} if routing.top_k is None else {"top_k": routing.top_k}
        score = score if score.dtype == torch.float32 else score.to(x.dtype)
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        return low_rank(x, a, b, routing.expert, score, **of_token, backend=path)

    def codes(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens experts rank"]:
        """A_e x_n for every token and expert."""
        return (x @ self.a.to(x.dtype).flatten(0, 1).T).unflatten(-1, self.a.shape[:2])

    def outputs(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens experts d_out"]:
        """s_e B_e A_e x_n for every token and expert: for rules that look at what each expert says."""
        codes = self.codes(x)
        scaled = (codes * self.scale[:, None]).to(codes.dtype)
        return torch.einsum("ner,eor->neo", scaled, self.b.to(codes.dtype))

    def gated(
        self, x: Float[Tensor, "tokens d_in"], gates: Float[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens d_out"]:
        """The update of each token for dense gates: the dense path's core."""
        codes = self.codes(x) * (gates * self.scale).to(x.dtype)[:, :, None]
        return codes.flatten(1) @ self.b.to(x.dtype).transpose(1, 2).flatten(0, 1)

    def delta(self, expert: int) -> Float[Tensor, "d_out d_in"]:
        """The full update s_e B_e A_e of one expert."""
        return self.scale[expert] * self.b[expert] @ self.a[expert]

    def merged(self, weights: Float[Tensor, "rows experts"]) -> tuple[Tensor, Tensor]:
        """Experts mixed in their parameters: A (M, r, I) = sum_e w A_e and B (M, O, r) = sum_e w s_e B_e.

        The product of the two has cross terms B_e A_f: it is another function than the mixture of outputs.
        """
        return torch.einsum("me,eri->mri", weights, self.a), torch.einsum("me,eor->mor", weights * self.scale, self.b)

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, d_in={self.d_in}, d_out={self.d_out}, rank={self.rank}"


class MadeFactors(nn.Module):
    """A and B of one update s B A that are made of other numbers, which are what is trained.

    Attributes:
        shape: (O, I) of the update.
        rank: r.
        scale: s = alpha / r.

    Args:
        alpha: default r, so that the scale is 1.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float | None = None):
        super().__init__()
        check_rank(rank, d_in, d_out)
        self.shape, self.rank, self.scale = (d_out, d_in), rank, (rank if alpha is None else alpha) / rank

    def forward(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        raise NotImplementedError(f"{type(self).__name__} makes no factors")

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The full update."""
        a, b = self()
        return self.scale * b @ a


def check_rank(rank: int, d_in: int, d_out: int) -> None:
    """Raises InputError where no update of a layer of these widths has the rank."""
    if not isinstance(rank, Integral) or not 1 <= rank <= min(d_in, d_out):
        raise InputError(
            f"rank is {rank!r} but must be between 1 and the layer's smaller width, {min(d_in, d_out)}, and whole"
        )


def fitting_rank(rank: int | None, layer: nn.Linear, default: int = 8) -> int:
    """The rank asked for, or where none is the default as far as the layer's smaller width allows it."""
    return min(default, layer.in_features, layer.out_features) if rank is None else rank
