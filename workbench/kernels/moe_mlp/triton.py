"""The expert layer in Triton: what is gathered, activated or summed happens inside the products.

Forward: `up_forward` gathers rows of X, multiplies by W1 and activates; `grouped_rows` multiplies by W2; `gather_sum`
combines. Backward, with the formulas of `reference`: `down_dgrad` makes dZ, score * A and the parts of dscore in one
pass from Z and dO[tok] W2; `score_grad` adds the parts; `wgrad` makes both weight gradients, `bias_grad` those of the
biases; `grouped_rows` makes the rows of dX, which `gather_sum` adds. A, Y and gathered rows of X are never kept.

Grouped rows are cut into tiles of one expert (`RoutePlan.tiles`). The kernels are in `triton_kernels`; two runs agree
bit for bit.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.gather_sum.triton import gather_sum
from workbench.kernels.moe_mlp import triton_kernels as kernels
from workbench.kernels.plan import RoutePlan

if TYPE_CHECKING:
    from workbench.kernels.static import Launch


class Tile(NamedTuple):
    """Rows and columns of a program's output, how much it contracts at a time, and the launch's warps and stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def sizes(self) -> dict[str, int]:
        """The compile-time arguments; a length of 0 is one that the kernel does not have."""
        return {f"BLOCK_{name}": size for name, size in zip("MNK", self[:3], strict=True) if size}


#: grouped rows of a tile, by bytes a number: the same for every kernel that goes by tiles
ROWS = {2: 128, 4: 64}
#: (kernel, bytes a number) -> tile. `up` has two accumulators of m x n. No spills on the targets.
TILES = {
    ("up", 2): Tile(ROWS[2], 64, 64, 8, 4),
    ("down", 2): Tile(ROWS[2], 128, 64, 8, 4),
    ("down_dgrad", 2): Tile(ROWS[2], 64, 64, 8, 4),
    ("up_dgrad", 2): Tile(ROWS[2], 128, 64, 8, 4),
    ("wgrad", 2): Tile(128, 128, 64, 8, 3),
    ("score_grad", 2): Tile(ROWS[2], 0, 64, 8, 1),
    ("bias_grad", 2): Tile(0, 64, 64, 4, 1),
    ("up", 4): Tile(ROWS[4], 32, 32, 8, 2),
    ("down", 4): Tile(ROWS[4], 32, 32, 8, 2),
    ("down_dgrad", 4): Tile(ROWS[4], 64, 32, 8, 2),
    ("up_dgrad", 4): Tile(ROWS[4], 64, 32, 8, 2),
    ("wgrad", 4): Tile(64, 64, 32, 8, 2),
    ("score_grad", 4): Tile(ROWS[4], 0, 64, 8, 1),
    ("bias_grad", 4): Tile(0, 64, 64, 4, 1),
}


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    plan: RoutePlan,
    score: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.forward`.

    Raises:
        InputError: x is float64.
    """
    if x.dtype == torch.float64:
        raise InputError("backend is 'triton' but x is torch.float64; it must be float32, bfloat16 or float16")
    tiles = plan.tiles(ROWS[x.element_size()])
    z = x.new_empty(plan.n_pairs, w1.shape[1]) if save else None
    a = x.new_empty(plan.n_pairs, w2.shape[2])
    count, (dim, hidden) = tiles[0].shape[0], w2.shape[1:]
    blocks, grid = _blocks("up", x, count, hidden)
    kernels.up_forward[grid](
        x, w1, w1 if b1 is None else b1, plan.tok, plan.offs, *tiles, a if z is None else z, a,
        dim, hidden, count, x.stride(0),
        GLU=activation == "swiglu", BIASED=b1 is not None, SAVE=save, **blocks,
    )  # fmt: skip
    return gather_sum(_product("down", a, w2, b2, plan, tiles), plan, score), z


def backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    plan: RoutePlan,
    score: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `reference.backward`. `grad` is contiguous."""
    tiles = plan.tiles(ROWS[x.element_size()])
    count, (dim, hidden) = tiles[0].shape[0], w2.shape[1:]
    dz, scaled = torch.empty_like(z), x.new_empty(plan.n_pairs, hidden)
    blocks, grid = _blocks("down_dgrad", x, count, hidden)
    columns = triton.cdiv(hidden, blocks["BLOCK_N"])
    parts = x.new_empty(plan.n_pairs, columns, dtype=torch.float32)
    kernels.down_dgrad[grid](
        grad, w2, z, score, plan.order, plan.tok, plan.offs, *tiles, dz, scaled, parts, dim, hidden, count,
        GLU=activation == "swiglu", **blocks,
    )  # fmt: skip
    dscore = torch.empty_like(score)
    blocks, _ = _blocks("score_grad", x)
    kernels.score_grad[(count,)](
        parts, grad, grad if b2 is None else b2, plan.order, plan.tok, plan.offs, *tiles, dscore, columns, dim,
        BIASED=b2 is not None, **blocks,
    )  # fmt: skip
    dw2 = _weight_grad(grad, scaled, w2, plan, gather_left=True)
    del scaled
    dw1 = _weight_grad(dz, x, w1, plan, gather_left=False)
    db1 = None if b1 is None else _column_sums(dz, None, b1, plan)
    db2 = None if b2 is None else _column_sums(grad, score, b2, plan)
    dx = gather_sum(_product("up_dgrad", dz, w1, None, plan, tiles), plan, None)
    return dx, dw1, dw2, dscore, db1, db2


def _product(
    kernel: str, left: Tensor, w: Tensor, bias: Tensor | None, plan: RoutePlan, tiles: tuple[Tensor, Tensor]
) -> Tensor:
    """`left` (P, I) times W2 (E, H, I) transposed for "down", (P, 2I or I) times W1 (E, 2I or I, H) for "up_dgrad"."""
    transposed = kernel == "down"
    inner, width = left.shape[1], w.shape[1 if transposed else 2]
    out = left.new_empty(plan.n_pairs, width)
    count = tiles[0].shape[0]
    blocks, grid = _blocks(kernel, left, count, width)
    kernels.grouped_rows[grid](
        left, w, w if bias is None else bias, plan.offs, *tiles, out, inner, width, count,
        TRANSPOSED=transposed, BIASED=bias is not None, **blocks,
    )  # fmt: skip
    return out


def _weight_grad(left: Tensor, right: Tensor, w: Tensor, plan: RoutePlan, gather_left: bool) -> Tensor:
    out = torch.empty_like(w)
    height, width = w.shape[1:]
    tile = TILES["wgrad", w.element_size()]
    blocks, grid = _blocks("wgrad", w, plan.n_experts * triton.cdiv(height, tile.m), width)
    kernels.wgrad[grid](
        left, right, plan.tok, plan.offs, out, height, width, left.stride(0), right.stride(0),
        GATHER_LEFT=gather_left, **blocks,
    )  # fmt: skip
    return out


def _column_sums(rows: Tensor, score: Tensor | None, bias: Tensor, plan: RoutePlan) -> Tensor:
    out = torch.empty_like(bias)
    blocks, grid = _blocks("bias_grad", bias, plan.n_experts, bias.shape[1])
    kernels.bias_grad[grid](
        rows, rows if score is None else score, plan.order, plan.tok, plan.offs, out, bias.shape[1],
        GATHERED=score is not None, **blocks,
    )  # fmt: skip
    return out


def _blocks(kernel: str, like: Tensor, tiles: int = 1, width: int = 1) -> tuple[dict[str, int], tuple[int]]:
    """Block sizes and launch options of a kernel, and its grid: `tiles` times the tiles of `width` columns."""
    tile = TILES[kernel, like.element_size()]
    stages = tile.stages if torch.version.hip is None else min(tile.stages, 2)  # 64 KiB of shared memory there
    columns = triton.cdiv(width, tile.n) if tile.n else 1
    return tile.sizes() | {"num_warps": tile.warps, "num_stages": stages}, (tiles * columns,)


def launches() -> "list[Launch]":
    """What is compiled ahead of time: every kernel for SwiGLU, and for a perceptron with biases where it differs.

    In bfloat16 and float16. Each serves every model whose widths are multiples of 16, such as (H, I) = (768, 256),
    (1536, 256), (4096, 512) and (4096, 1536), so its "shape" is the variant. Strides are 32-bit, as Triton passes them
    while they fit; offsets are 64-bit all the same.
    """
    return [launch for dtype in ("bf16", "fp16") for launch in _launches(dtype)]


def _launches(dtype: str) -> "list[Launch]":
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    types = dict.fromkeys(("order", "tok", "offs", "tile_expert", "tile_row"), "*i32")
    types |= dict.fromkeys(("dim", "hidden", "inner", "width", "height", "tiles", "columns"), "i32")
    types |= dict.fromkeys(("stride_x", "stride_left", "stride_right"), "i32")
    types |= dict.fromkeys(("score", "parts", "dscore"), "*fp32")

    def launch(kernel, function, note, **constants):
        tile = TILES[kernel, 2]
        constants |= tile.sizes()
        names = [name for name in function.arg_names if name not in constants]
        return Launch(
            kernel=f"moe_mlp/{kernel}",
            function=function,
            signature={name: types.get(name, f"*{dtype}") for name in names},
            constants=constants,
            divisible=tuple(name for name in names if name not in ("tiles", "columns")),
            num_warps=tile.warps,
            num_stages=tile.stages,
            dtype=dtype,
            shape=note,
            gemm=kernel not in ("score_grad", "bias_grad"),
        )

    return [
        launch("up", kernels.up_forward, "SwiGLU, training", GLU=True, BIASED=False, SAVE=True),
        launch("up", kernels.up_forward, "SwiGLU, inference", GLU=True, BIASED=False, SAVE=False),
        launch("up", kernels.up_forward, "SwiGLU, biases, training", GLU=True, BIASED=True, SAVE=True),
        launch("up", kernels.up_forward, "ReLU, biases, training", GLU=False, BIASED=True, SAVE=True),
        launch("down", kernels.grouped_rows, "no bias", TRANSPOSED=True, BIASED=False),
        launch("down", kernels.grouped_rows, "bias", TRANSPOSED=True, BIASED=True),
        launch("down_dgrad", kernels.down_dgrad, "SwiGLU", GLU=True),
        launch("down_dgrad", kernels.down_dgrad, "ReLU", GLU=False),
        launch("score_grad", kernels.score_grad, "no bias", BIASED=False),
        launch("score_grad", kernels.score_grad, "bias", BIASED=True),
        launch("wgrad", kernels.wgrad, "W2", GATHER_LEFT=True),
        launch("wgrad", kernels.wgrad, "W1", GATHER_LEFT=False),
        launch("bias_grad", kernels.bias_grad, "b1", GATHERED=False),
        launch("bias_grad", kernels.bias_grad, "b2", GATHERED=True),
        launch("up_dgrad", kernels.grouped_rows, "rows of dX", TRANSPOSED=False, BIASED=False),
    ]
