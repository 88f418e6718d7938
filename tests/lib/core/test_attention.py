"""Dense attention and the rotary code, and a decoder that takes any attention."""

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.attention import Attention, rope
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM


def test_rope_turns_each_pair_by_its_angle():
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    turned = rope(x, offset=4)
    for t in range(7):
        for i in range(3):
            angle = (t + 4) * 10000.0 ** (-2 * i / 6)
            pair = torch.complex(x[..., t, i], x[..., t, i + 3]) * torch.exp(
                torch.tensor(1j * angle, dtype=torch.complex128)
            )
            torch.testing.assert_close(torch.complex(turned[..., t, i], turned[..., t, i + 3]), pair)


def test_rope_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    scores = [(rope(q, offset=i + 5) @ rope(k, offset=i).T).item() for i in (0, 3, 100)]
    assert scores == pytest.approx([scores[0]] * 3)


@pytest.mark.parametrize("with_rope", [False, True])
def test_attention_equals_the_formula_head_by_head(with_rope):
    torch.manual_seed(0)
    attention = Attention(12, 3, causal=True, rope=with_rope).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = attention.qkv(x).chunk(3, -1)
    outputs = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        a, b = (rope(y[..., part]) if with_rope else y[..., part] for y in (q, k))
        scores = (a @ b.transpose(-1, -2) / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ v[..., part])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(outputs, -1)))
    torch.testing.assert_close(attention(x[0]), attention(x)[0])  # one sequence is a batch of one


def test_wrong_widths_are_refused():
    with pytest.raises(InputError, match="d_model is 12 but must be divisible by n_heads = 5"):
        Attention(12, 5, causal=True)
    with pytest.raises(InputError, match="d_model / n_heads is 3 but must be even with rope"):
        Attention(12, 4, causal=True, rope=True)


def test_a_decoder_takes_any_attention_and_knows_positions_only_through_it():
    class Past(nn.Module):
        def forward(self, x, context):
            return x.cumsum(1) * 0.1

    torch.manual_seed(0)
    kinds = [Attention(16, 2, causal=True, rope=True), Past()]
    model = DecoderLM(20, 16, 2, 2, lambda layer: GLU(16, 8), 32, attention=kinds.__getitem__, learned_positions=False)
    assert model.position is None and [block.attention for block in model.blocks] == kinds
    assert model(torch.randint(20, (2, 9))).shape == (2, 9, 20)
