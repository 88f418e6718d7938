"""Tokens by kind: the dispatch against a loop over tokens, and what it refuses."""

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.modality import ByModality, InTurns, ModalityLinear, by_modality, modality_of
from workbench.lib.core.routing import Context

N, D, OUT, M = 13, 5, 3, 3


def layer(n_modalities: int = M, bias: bool = True) -> ModalityLinear:
    torch.manual_seed(0)
    return ModalityLinear(D, OUT, n_modalities, bias).double()


def tokens(*modalities: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that want a gradient, and a modality for each among those given, every one of them present."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, dtype=torch.float64, generator=generator).requires_grad_()
    drawn = torch.tensor(modalities)[torch.randint(len(modalities), (N - len(modalities),), generator=generator)]
    return x, torch.cat([torch.tensor(modalities), drawn]).flip(0)


def value_and_gradients(made: nn.Module, x, compute):
    y = compute()
    return y, torch.autograd.grad(y.sin().sum(), [x, *made.parameters()], materialize_grads=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("modalities", [(0, 1, 2), (0, 2), (1,)])
def test_the_dispatch_is_a_loop_over_tokens_in_value_and_gradients(modalities, bias):
    made = layer(bias=bias)
    x, modality = tokens(*modalities)
    found = value_and_gradients(made, x, lambda: made(x, modality))
    naive = value_and_gradients(
        made, x, lambda: torch.stack([made.parts[m](row) for row, m in zip(x, modality.tolist(), strict=True)])
    )
    torch.testing.assert_close(found, naive, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in made.parameters()) == M * OUT * (D + bias)


def test_one_modality_is_the_plain_layer_bit_for_bit():
    made = layer(1)
    x, modality = tokens(0)
    assert torch.equal(made(x, modality), made.parts[0](x))


def test_equal_parts_are_one_layer_and_their_gradients_add_up_to_its_own():
    made, plain = layer(), layer(1).parts[0]
    for part in made.parts:
        part.load_state_dict(plain.state_dict())
    x, modality = tokens(0, 1, 2)
    torch.testing.assert_close(made(x, modality), plain(x), rtol=1e-12, atol=1e-12)
    made(x, modality).sin().sum().backward()
    plain(x).sin().sum().backward()
    torch.testing.assert_close(sum(part.weight.grad for part in made.parts), plain.weight.grad)
    torch.testing.assert_close(sum(part.bias.grad for part in made.parts), plain.bias.grad)


def test_other_numbers_for_the_modalities_change_no_bit():
    made = layer()
    x, modality = tokens(0, 1, 2)
    numbers = torch.tensor([2, 0, 1])  # what modality m is called now
    renamed = layer()
    for m, number in enumerate(numbers.tolist()):
        renamed.parts[number].load_state_dict(made.parts[m].state_dict())
    assert torch.equal(renamed(x, numbers[modality]), made(x, modality))


def test_the_other_modalities_tokens_change_no_bit():
    made = layer()
    x, modality = tokens(0, 1, 2)
    other = x.detach().clone()
    other[modality != 1] += 1
    assert torch.equal(made(other, modality)[modality == 1], made(x, modality)[modality == 1])


def test_a_modality_without_tokens_gets_no_gradient():
    made = layer()
    x, modality = tokens(0, 2)
    made(x, modality).sum().backward()
    assert [part.weight.grad is None for part in made.parts] == [False, True, False]


def test_batches_are_taken_by_rows_and_an_empty_one_keeps_its_width():
    made = layer()
    x, modality = tokens(0, 1)
    x, modality = x[:12], modality[:12]
    assert torch.equal(made(x.view(3, 4, D), modality), made(x, modality).view(3, 4, OUT))
    assert made(x[:0], modality[:0]).shape == (0, OUT)


def test_sorted_once_serves_every_layer():
    x, modality = tokens(0, 1, 2)
    groups = ByModality.of(modality, M)
    assert groups.counts == tuple(modality.bincount(minlength=M).tolist()) and groups.present == (0, 1, 2)
    assert torch.equal(modality[groups.order], modality.sort().values)
    assert torch.equal(layer()(x, groups), layer()(x, modality))


def test_a_context_is_sorted_once_and_again_where_it_tells_something_else():
    _, modality = tokens(0, 1, 2)
    context = Context(modality=modality)
    groups = ByModality.told(context, M)
    assert groups.counts == ByModality.of(modality, M).counts and ByModality.told(context, M) is groups
    assert ByModality.told(context, M + 1).counts == (*groups.counts, 0)
    context.modality = modality.flip(0)
    assert torch.equal(ByModality.told(context, M).order, ByModality.of(modality.flip(0), M).order)
    with pytest.raises(InputError, match="modality is None"):
        ByModality.told(Context(), M)


def test_parts_of_any_kind_are_called_with_their_own_tokens_only():
    x, modality = tokens(0, 1)
    called = {}
    y = by_modality(x, modality, [lambda rows, m=m: called.setdefault(m, rows) * (m + 1) for m in range(M)])
    assert {m: len(rows) for m, rows in called.items()} == {m: int((modality == m).sum()) for m in (0, 1)}
    assert torch.equal(y, x * (modality[:, None] + 1))


def test_masks_say_the_same_as_ids():
    _, modality = tokens(0, 2)
    assert torch.equal(modality_of(modality == torch.arange(M)[:, None]), modality)


def test_tokens_without_modalities_are_given_them_in_turns():
    class Told(nn.Module):
        def forward(self, x, context):
            assert x.shape == (1, N, D)
            return x + context.modality[None, :, None]

    turns = torch.tensor([0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 0])
    assert torch.equal(InTurns(Told(), M, run=2)(torch.zeros(N, D)), turns[:, None].expand(N, D).float())


def test_wrong_ids_are_refused_by_name(unchecked):
    x, modality = tokens(0, 1, 2)
    made = layer()
    with pytest.raises(InputError, match=r"modality is None but must be the modality of each token"):
        made(x, None)
    for wrong in (-1, M):
        with pytest.raises(InputError, match=rf"modality holds {wrong} but every id must be 0 to 2"):
            made(x, torch.cat([modality[1:], torch.tensor([wrong])]))
    for ids in (torch.zeros(13), torch.zeros(13, dtype=torch.bool), torch.zeros(1, 13, dtype=torch.long)):
        with pytest.raises(InputError, match="must be the id of each token"):
            ByModality.of(ids, M)
    with pytest.raises(InputError, match="modality has 12 ids but must have one for each of 13 tokens"):
        made(x, modality[1:])
    with pytest.raises(InputError, match="sorted by 2 modalities but there are 3 parts"):
        made(x, ByModality.of(modality.clamp(max=1), 2))
    with pytest.raises(InputError, match="d_in, d_out, n_modalities are 5, 3, 0 but must all be at least 1"):
        ModalityLinear(D, OUT, 0)


def test_masks_that_overlap_or_leave_tokens_out_are_refused(unchecked):
    masks = torch.tensor([[True, False, True], [False, True, False]])
    with pytest.raises(InputError, match=r"masks hold token 1 in more than one of 2 modalities \(1 such tokens\)"):
        modality_of(masks | torch.tensor([False, True, False]))
    for wrong in (masks.long(), masks[0]):
        with pytest.raises(InputError, match=r"masks is .* but must be bool \(modalities, tokens\)"):
            modality_of(wrong)
    with pytest.raises(InputError, match=r"masks hold token 2 in none of 2 modalities"):
        modality_of(masks & torch.tensor([True, True, False]))
