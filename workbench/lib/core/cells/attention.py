"""Cells in which every place of a map sees every other."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.cells.convolution import check

HEAD = 8
MLP = 4


class TransformerCell(nn.Module):
    """x + attention(norm x), then x + MLP(norm x), over the H W places of a map as tokens; softmax over all of them.

    Where it comes from a map of another size or width, a 3 x 3 convolution and a norm lead to it. Its position code is
    a bias for each head and each difference of places, within a map of `side` x `side`; at 0, as at the start, what
    it does commutes with permutations of the tokens. 12 d^2 weights, and norms, biases and position code.

    Args:
        d_in, d_out: channels.
        stride: 1 or 2, of the convolution that leads to it.
        head: width of a head, which divides d_out.
        side: largest height and width of its maps.
        still: the last layers of both parts start at 0, so that the cell starts as the identity where nothing leads to
            it.
    """

    def __init__(self, d_in: int, d_out: int, stride: int = 1, head: int = HEAD, side: int = 16, still: bool = False):
        super().__init__()
        check(d_in, d_out, stride)
        if d_out % head:
            raise InputError(f"d_out is {d_out} but must be a multiple of head, {head}")
        same = stride == 1 and d_in == d_out
        lead = (nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False), nn.BatchNorm2d(d_out))
        self.lead = nn.Identity() if same else nn.Sequential(*lead)
        self.heads, self.side = d_out // head, side
        self.norm, self.qkv, self.out = nn.LayerNorm(d_out), nn.Linear(d_out, 3 * d_out), nn.Linear(d_out, d_out)
        self.mlp = nn.Sequential(
            nn.LayerNorm(d_out), nn.Linear(d_out, MLP * d_out), nn.GELU(), nn.Linear(MLP * d_out, d_out)
        )
        self.position = nn.Parameter(torch.zeros(self.heads, 2 * side - 1, 2 * side - 1))
        if still:
            for layer in (self.out, self.mlp[-1]):
                nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch d_out h2 w2"]:
        x = self.lead(x)
        height, width = x.shape[2:]
        if max(height, width) > self.side:
            raise InputError(f"maps are {height} x {width} but must be at most side, {self.side}, for this cell")
        tokens = x.flatten(2).mT
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(height, width).to(q.dtype))
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        tokens = tokens + self.mlp(tokens)
        return tokens.mT.unflatten(2, (height, width)).contiguous()

    def bias(self, height: int, width: int) -> Float[Tensor, "heads n n"]:
        """What is added to the scores of each two places of a map."""
        rows, columns = torch.arange(height), torch.arange(width)
        down = (rows[:, None] - rows + self.side - 1)[:, None, :, None].expand(-1, width, -1, width)
        right = (columns[:, None] - columns + self.side - 1)[None, :, None, :].expand(height, -1, height, -1)
        return self.position[:, down, right].flatten(3, 4).flatten(1, 2)


def transformer_macs(d_in: int, d_out: int, height: int, width: int) -> int:
    """Of what leads to it, a 3 x 3 convolution, where widths differ."""
    places = height * width
    lead = places * 9 * d_in * d_out if d_in != d_out else 0
    return lead + places * 12 * d_out**2 + 2 * places**2 * d_out
