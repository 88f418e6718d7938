"""DCN-V2: every layer multiplies the input by a learned map of what has become of it (Wang et al. 2020).

"DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems" (arXiv:2008.13535).
x_0 (d,) are the embeddings of a row's fields side by side, and its numbers. Layer l makes, * elementwise,

    full       x_{l+1} = x_0 * (W x_l + b) + x_l                                        W (d, d)
    low_rank   x_{l+1} = x_0 * (U V^T x_l + b) + x_l                                    U, V (d, r)
    mix        x_{l+1} = sum_i g_i(x_l) x_0 * (U_i a(C_i a(V_i^T x_l)) + b) + x_l       K experts, a = tanh
    v1         x_{l+1} = x_0 (w . x_l) + b + x_l                                        w (d,), of the first DCN

so that L layers are a polynomial of degree L + 1 in x_0 (all but mix, for its tanh and its gate). A gate of mix is a
softmax of its layer's own input; every expert runs. The bias of mix is each expert's own. Two public libraries share
one gate between all layers, which is another network.

A cross network stands before a perceptron ("stacked") or beside it ("parallel"). Embeddings start small, uniform within
0.05: x_0 enters cubed.

Tensor letters: B rows, F fields, d width, r rank, K experts, L layers.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.kernels import Lookups, hashed_lookup
from workbench.kernels.hashed_lookup import BY_ID
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="dcn-v2",
    title="DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems",
    family="features",
    year=2020,
    paper="arXiv:2008.13535",
    claim="Matrix-valued cross layers learn feature crosses with far fewer parameters than a ReLU network, and their "
    "low-rank mixture is cheaper still.",
    objects=(
        "CrossNetwork",
        "CrossLayer",
        "CrossMixLayer",
        "VectorCrossLayer",
        "FieldEmbeddings",
        "DCNV2",
        "block_norms",
    ),
)

KINDS = ("full", "low_rank", "mix", "v1")
STRUCTURES = ("stacked", "parallel")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "identity": lambda x: x}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}
SMALL = 0.05  # of an embedding at the start


def example() -> nn.Module:
    """Two layers of four experts of rank 8 on rows of width 32."""
    return CrossNetwork(32, 2, "mix", rank=8, n_experts=4)


def _matrix(*shape: int) -> nn.Parameter:
    """Matrices (..., out, in), each with the variance 1 / in, by itself: a stack's fans would be of all of it."""
    return nn.Parameter(torch.randn(shape) * (1.0 / shape[-1]) ** 0.5)


class CrossLayer(nn.Module):
    """x_0 * (W x + diag_scale x + b) + x, with W of a rank or full.

    Args:
        d: width.
        rank: r of W = U V^T; None: a full matrix.
        diag_scale: added to the diagonal of W, at least 0.
    """

    def __init__(self, d: int, rank: int | None = None, diag_scale: float = 0.0):
        super().__init__()
        _check(d, rank)
        if not diag_scale >= 0:
            raise InputError(f"diag_scale is {diag_scale} but must be at least 0")
        self.diag_scale = diag_scale
        self.bias = nn.Parameter(torch.zeros(d))
        if rank is None:
            self.weight = _matrix(d, d)
        else:
            self.u, self.v = _matrix(d, rank), _matrix(rank, d)

    def matrix(self) -> Float[Tensor, "d d"]:
        """W, whole."""
        return self.weight if hasattr(self, "weight") else self.u @ self.v

    def forward(self, x0: Float[Tensor, "batch d"], x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        mapped = x @ self.weight.T if hasattr(self, "weight") else (x @ self.v.T) @ self.u.T
        if self.diag_scale:
            mapped = mapped + self.diag_scale * x
        return torch.addcmul(x, x0, mapped + self.bias)


class VectorCrossLayer(nn.Module):
    """The first DCN's layer, x_0 (w . x) + b + x: a matrix of rank one whose rows are all the same."""

    def __init__(self, d: int):
        super().__init__()
        _check(d, None)
        self.weight, self.bias = _matrix(1, d), nn.Parameter(torch.zeros(d))

    def forward(self, x0: Float[Tensor, "batch d"], x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        return torch.addcmul(x + self.bias, x0, x @ self.weight.T)


class CrossMixLayer(Announcing):
    """A gated sum of K low-rank crosses, and the residual. It announces its gates as a routing to all experts.

    Args:
        d: width.
        rank: r of every expert.
        n_experts: K.
        activation: one of `ACTIVATIONS`; "identity" makes it a mixture of low-rank layers.
        gate: one of `GATES`; sigmoids do not sum to one.
    """

    def __init__(self, d: int, rank: int, n_experts: int, activation: str = "tanh", gate: str = "softmax"):
        super().__init__()
        _check(d, rank)
        if n_experts < 1:
            raise InputError(f"n_experts is {n_experts} but must be at least 1")
        for name, value, allowed in (("activation", activation, ACTIVATIONS), ("gate", gate, GATES)):
            if value not in allowed:
                raise unknown(name, value, allowed)
        self.n_experts = self.top_k = n_experts
        self.activation, self.gate = activation, gate
        self.u, self.v = _matrix(n_experts, d, rank), _matrix(n_experts, rank, d)
        self.c, self.bias = _matrix(n_experts, rank, rank), nn.Parameter(torch.zeros(n_experts, d))
        self.gates = nn.Linear(d, n_experts, bias=False)

    def forward(
        self, x0: Float[Tensor, "batch d"], x: Float[Tensor, "batch d"], context: Context | None = None
    ) -> Float[Tensor, "batch d"]:
        act, logits = ACTIVATIONS[self.activation], self.gates(x)
        weight = GATES[self.gate](logits)
        hidden = act(torch.einsum("kri,bi->bkr", self.v, x))
        hidden = act(torch.einsum("krs,bks->bkr", self.c, hidden))
        # the gates go in before the last product, so that nothing of (B, K, d) is made
        mapped = torch.einsum("kdr,bkr->bd", self.u, hidden * weight[:, :, None]) + weight @ self.bias
        if self.observed:
            index = torch.arange(self.n_experts, device=x.device).expand(len(x), -1)
            probs = weight.detach() / weight.detach().sum(-1, keepdim=True)
            said = Routing.fixed(index, weight.detach(), self.n_experts, probs=probs)
            self.announce(said, Context() if context is None else context)
        return torch.addcmul(x, x0, mapped)


class CrossNetwork(nn.Module):
    """L layers of one kind, each with parameters of its own: (B, d) -> (B, d).

    Args:
        d: width.
        n_layers: L; 0 gives x_0 back.
        kind: one of `KINDS`.
        rank: r of "low_rank" and "mix"; None: d / 4, one at least.
        n_experts: K of "mix".
        options: of the layer: `diag_scale`, or `activation` and `gate`.
    """

    def __init__(
        self, d: int, n_layers: int, kind: str = "full", rank: int | None = None, n_experts: int = 4, **options
    ):
        super().__init__()
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
        if n_layers < 0:
            raise InputError(f"n_layers is {n_layers} but must be at least 0")
        self.d, self.kind = d, kind
        rank = max(1, d // 4) if rank is None else rank
        make: dict[str, Callable[[], nn.Module]] = {
            "full": lambda: CrossLayer(d, None, **options),
            "low_rank": lambda: CrossLayer(d, rank, **options),
            "mix": lambda: CrossMixLayer(d, rank, n_experts, **options),
            "v1": lambda: VectorCrossLayer(d, **options),
        }
        self.layers = nn.ModuleList(make[kind]() for _ in range(n_layers))

    def forward(self, x0: Float[Tensor, "batch d"], context: Context | None = None) -> Float[Tensor, "batch d"]:
        x = x0
        for layer in self.layers:
            x = layer(x0, x, context) if isinstance(layer, CrossMixLayer) else layer(x0, x)
        return x


class FieldEmbeddings(nn.Module):
    """An embedding for each field, side by side: ids (B, F) -> (B, F width).

    Args:
        sizes: ids of each field.
        width: of every embedding.
    """

    def __init__(self, sizes: Sequence[int], width: int = 16):
        super().__init__()
        if not sizes or min(sizes) < 1 or width < 1:
            raise InputError(
                f"sizes is {tuple(sizes)} and width {width} but all must be at least 1, one field at least"
            )
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for table in self.tables:
            nn.init.uniform_(table.weight, -SMALL, SMALL)
        self.widths = (width,) * len(self.tables)
        fields, zeros = tuple(range(len(sizes))), (0,) * len(sizes)
        self._lookups = Lookups(fields, zeros, tuple(sizes), (BY_ID,) * len(sizes), fields, fields)

    def forward(self, ids: Int64[Tensor, "batch fields"]) -> Float[Tensor, "batch d"]:
        """Raises `InputError` where an id is no row of its table: 0 is for what a vocabulary does not have."""
        if ids.shape[1] != len(self.tables):
            raise InputError(f"ids have {ids.shape[1]} fields but must have {len(self.tables)}")
        return hashed_lookup([table.weight for table in self.tables], ids, self._lookups)


class DCNV2(nn.Module):
    """Embeddings, a cross network and a perceptron, to one logit a row.

    Args:
        embedding: ids (B, F) -> (B, D), with `widths`, the D by field.
        cross: of width D + n_dense.
        n_dense: numbers of a row beside its ids.
        deep: hidden widths of the perceptron; () has none.
        structure: "stacked": the perceptron sees what the cross network says; "parallel": it sees x_0, and the logit
            both.
    """

    def __init__(
        self,
        embedding: nn.Module,
        cross: CrossNetwork,
        n_dense: int = 0,
        deep: Sequence[int] = (64, 32),
        structure: str = "stacked",
    ):
        super().__init__()
        if structure not in STRUCTURES:
            raise unknown("structure", structure, STRUCTURES)
        d = sum(embedding.widths) + n_dense
        if cross.d != d:
            raise InputError(f"cross is {cross.d} wide but embeddings and {n_dense} numbers together are {d}")
        self.embedding, self.cross, self.n_dense, self.structure = embedding, cross, n_dense, structure
        widths = (d, *deep)
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.deep = nn.Sequential(*layers)
        self.logit = nn.Linear(widths[-1] + (d if structure == "parallel" else 0), 1)

    def forward(
        self,
        ids: Int64[Tensor, "batch fields"],
        context: Context | None = None,
        dense: Float[Tensor, "batch numbers"] | None = None,
    ) -> Float[Tensor, " batch"]:
        given = 0 if dense is None else dense.shape[1]
        if given != self.n_dense:
            raise InputError(f"dense has {given} numbers a row but must have {self.n_dense}")
        if dense is not None and not bool(dense.isfinite().all()):
            raise InputError("dense holds NaN or infinity but must be finite")
        x0 = self.embedding(ids)
        x0 = x0 if dense is None else torch.cat([x0, dense], 1)
        crossed = self.cross(x0, context)
        if self.structure == "parallel":
            return self.logit(torch.cat([crossed, self.deep(x0)], 1))[:, 0]
        return self.logit(self.deep(crossed))[:, 0]


def block_norms(weight: Float[Tensor, "d d"], widths: Sequence[int]) -> Float[Tensor, "fields fields"]:
    """The Frobenius norm of each block of W: how strongly a layer crosses field i with field j.

    Args:
        weight: as `CrossLayer.matrix()` gives it.
        widths: of the fields, of sum d.
    """
    if sum(widths) != len(weight):
        raise InputError(f"widths are {tuple(widths)}, {sum(widths)} together, but must be the {len(weight)} of weight")
    rows = [torch.stack([block.norm() for block in part.split(list(widths), 1)]) for part in weight.split(list(widths))]
    return torch.stack(rows)


def _check(d: int, rank: int | None) -> None:
    if d < 1 or (rank is not None and not 1 <= rank <= d):
        raise InputError(f"d is {d} and rank {rank}: d must be at least 1, and a rank from 1 to d")
