"""Dense attention and the rotary code, and a decoder that takes any attention."""

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.attention import Attention, prefix_mask, rope
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Context


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


# -- a prefix that is read in both directions


def prefix_model(**options) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(50, 16, 2, 2, lambda layer: GLU(16, 16), seq_len=12, **options).double()


def with_prefix(model: nn.Module, tokens: torch.Tensor, *prefix: int) -> torch.Tensor:
    return model(tokens, Context(prefix=torch.tensor(prefix)))


def test_a_prefix_mask_is_causal_but_for_the_prefix():
    first, second = prefix_mask(torch.tensor([3, 0]), 4)[:, 0].int().tolist()
    assert first == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert second == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_prefix_of_at_most_one_token_is_causal(prefix: int):
    model, tokens = prefix_model(), torch.randint(50, (2, 12))
    torch.testing.assert_close(with_prefix(model, tokens, prefix, prefix), model(tokens))


def test_rows_with_a_prefix_are_those_of_attention_in_both_directions_and_of_causal_attention():
    """The whole row in both directions is what a model with `causal=False` says; each row has its own prefix."""
    model, tokens = prefix_model(), torch.randint(50, (2, 12))
    both = prefix_model(attention=lambda layer: Attention(16, 2, causal=False))
    both.load_state_dict(model.state_dict())
    found = with_prefix(model, tokens, 12, 1)
    torch.testing.assert_close(found[0], both(tokens)[0])
    torch.testing.assert_close(found[1], model(tokens)[1])


def test_who_sees_whom_by_gradients():
    """Each place of the prefix is moved by each other, and nothing after it by what follows."""
    model, prefix = prefix_model(), 5
    with torch.no_grad():
        x = torch.randn(1, 12, 16, dtype=torch.float64)
    for place in range(12):
        x = x.detach().requires_grad_()
        y, context = x, Context(prefix=torch.tensor([prefix]))
        for block in model.blocks:
            y = block(y, context)
        (gradient,) = torch.autograd.grad(y[0, place].sum(), x)
        seen = gradient[0].abs().sum(-1) > 0
        assert seen.tolist() == [other <= place or other < prefix > place for other in range(12)]


def test_what_cannot_be_a_prefix_is_refused():
    model, tokens = prefix_model(), torch.randint(50, (2, 12))
    for prefix in ((13, 1), (-1, 1)):
        with pytest.raises(InputError, match="between 0 and its 12 tokens"):
            with_prefix(model, tokens, *prefix)
    with pytest.raises(InputError, match="must have one of 2 rows"):
        with_prefix(model, tokens, 3)
    for other in (Attention(16, 2, causal=False), nn.Identity()):
        model.blocks[1].attention = other
        with pytest.raises(InputError, match=f"layer 1 has {type(other).__name__}: only Attention"):
            with_prefix(model, tokens, 3, 3)
