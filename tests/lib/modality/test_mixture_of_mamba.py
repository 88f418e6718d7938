"""Mixture-of-Mamba against its equations token by token, against the dense block, and across modalities."""

import copy
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from workbench.errors import InputError
from workbench.lib.core.budget import count_params, measure_budget
from workbench.lib.core.mamba import MambaBlock
from workbench.lib.core.observe import announcing, observing
from workbench.lib.core.routing import Context
from workbench.lib.core.task import ArrayTask
from workbench.lib.modality.mixture_of_mamba import PROJECTIONS, MixtureOfMambaBlock, mamba_decoder, step_sizes

B, T, D, N, M = 3, 14, 8, 5, 3
SPLITS = [(), *((name,) for name in PROJECTIONS), *combinations(PROJECTIONS, 2), PROJECTIONS]


def block(split=PROJECTIONS, n_modalities=M, seed=0):
    torch.manual_seed(seed)
    return MixtureOfMambaBlock(D, n_modalities, d_state=N, split=split).double()


def dense(seed=0):
    torch.manual_seed(seed)
    return MambaBlock(D, d_state=N).double()


def inputs(n_modalities=M, seed=1):
    """Tokens, and modalities that change at every token, after runs, and never, a row each."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(B, T, D, generator=generator, dtype=torch.float64).requires_grad_()
    t = torch.arange(T)
    return u, torch.stack([t % n_modalities, t // 5 % n_modalities, 0 * t + n_modalities - 1])


def told(modality):
    return Context(modality=modality.flatten())


def spread(plain: MambaBlock, made: MixtureOfMambaBlock) -> MixtureOfMambaBlock:
    """The weights of a dense block in every part of one that is split."""
    for name in PROJECTIONS:
        projection = getattr(made, f"{name}_proj")
        for part in projection.parts if name in made.split else [projection]:
            part.load_state_dict(getattr(plain, f"{name}_proj").state_dict())
    rest = {name: value for name, value in plain.state_dict().items() if "_proj." not in name}
    made.load_state_dict(rest, strict=False)
    return made


def by_hand(made: MixtureOfMambaBlock, u, modality):
    """The paper's equations, token by token."""

    def apply(name, m, x):
        projection = getattr(made, f"{name}_proj")
        part = projection.parts[m] if name in made.split else projection
        y = part.weight @ x
        return y if part.bias is None else y + part.bias

    rank, channels, k = made.sizes[0], len(made.D), made.conv1d.kernel_size[0]
    rows = []
    for row, kinds in zip(u, modality.tolist(), strict=True):
        state, before, outs = torch.zeros(channels, N, dtype=u.dtype), [torch.zeros(channels, dtype=u.dtype)] * k, []
        for token, m in zip(row, kinds, strict=True):
            x, z = apply("in", m, token).chunk(2)
            before = [*before[1:], x]
            x = F.silu((made.conv1d.weight[:, 0] * torch.stack(before, 1)).sum(1) + made.conv1d.bias)
            r, b, c = apply("x", m, x).split([rank, N, N])
            delta = F.softplus(apply("dt", m, r))
            state = torch.exp(-delta[:, None] * made.A_log.exp()) * state + (delta * x)[:, None] * b
            outs.append(apply("out", m, (state @ c + made.D * x) * F.silu(z)))
        rows.append(torch.stack(outs))
    return torch.stack(rows)


@pytest.mark.parametrize("split", SPLITS)
def test_outputs_and_gradients_are_those_of_the_equations(split):
    made = block(split)
    u, modality = inputs()
    grad = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for found, wanted in zip(
        *(
            [y, *torch.autograd.grad(y, [u, *made.parameters()], grad)]
            for y in (made(u, told(modality)), by_hand(made, u, modality))
        ),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("split", SPLITS)
def test_with_one_modality_it_is_the_dense_block_bit_for_bit(split):
    made, plain = spread(dense(), block(split, n_modalities=1)), dense()
    u, modality = inputs(1)
    assert torch.equal(made(u, told(modality)), plain(u))
    assert count_params(made) == count_params(plain)


@pytest.mark.parametrize("split", SPLITS)
def test_with_equal_parts_it_is_the_dense_block_and_gradients_add_up(split):
    plain = dense(seed=3)
    made = spread(plain, block(split))
    u, modality = inputs()
    out, wanted = made(u, told(modality)), plain(u)
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-11)
    out.sin().sum().backward()
    wanted.sin().sum().backward()
    for name, parameter in plain.named_parameters():
        owner, _, key = name.rpartition(".")
        found = made.get_submodule(owner)
        parts = found.parts if owner.removesuffix("_proj") in split else [found]
        total = sum(getattr(part, key).grad for part in parts)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-9, atol=1e-9)


def test_other_numbers_for_the_modalities_change_no_bit():
    made = block()
    u, modality = inputs()
    numbers = torch.tensor([2, 0, 1])
    renamed = copy.deepcopy(made)
    for name in PROJECTIONS:
        for m, number in enumerate(numbers.tolist()):
            old, new = (getattr(b, f"{name}_proj").parts for b in (made, renamed))
            new[number].load_state_dict(old[m].state_dict())
    assert torch.equal(renamed(u, told(numbers[modality])), made(u, told(modality)))


def test_a_token_is_computed_by_its_own_modality():
    """With everything else held, another modality for the last token changes the last output, and no other."""
    made = block()
    u, modality = inputs()
    other = modality.clone()
    other[:, -1] = (other[:, -1] + 1) % M
    change = (made(u, told(other)) - made(u, told(modality))).abs().amax(-1)
    assert (change[:, :-1] < 1e-12).all() and (change[:, -1] > 1e-6).all()  # groups of other sizes round otherwise


@pytest.mark.parametrize("parts", [[1] * T, [2, 1, 4, 7], [5, 9]])
def test_decoding_is_the_whole_across_changes_of_modality(parts):
    made = block()
    u, modality = inputs()
    whole, outs, cache = made(u, told(modality)), [], None
    for tokens, kinds in zip(u.split(parts, 1), modality.split(parts, 1), strict=True):
        if tokens.shape[1] == 1 and cache is not None:
            out, cache = made.step(tokens[:, 0], cache, Context(modality=kinds[:, 0]))
            out = out[:, None]
        else:
            out, cache = made.prefill(tokens, told(kinds), cache)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-12, atol=1e-12)


def test_it_is_causal_and_the_state_carries_text_to_images():
    made = block(n_modalities=2)
    u, _ = inputs()
    modality = (torch.arange(T) >= T // 2).long().repeat(B, 1)  # text, then an image
    (grad,) = torch.autograd.grad(made(u, told(modality))[:, -1].sum(), u)
    assert (grad[:, : T // 2].abs().sum(-1) > 0).all()  # of every token of text, further back than the convolution
    (grad,) = torch.autograd.grad(made(u, told(modality))[:, 5].sum(), u)
    assert (grad[:, 6:] == 0).all() and (grad[:, :6].abs().sum(-1) > 0).all()


def test_an_absent_modality_gets_no_gradient_and_what_is_shared_does():
    made = block()
    u, modality = inputs(2)
    made(u, told(modality)).sum().backward()
    absent = {name for name, p in made.named_parameters() if p.grad is None}
    assert absent == {name for name, _ in made.named_parameters() if ".parts.2." in name} != set()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters() if p.grad is not None)


@pytest.mark.parametrize("split", [PROJECTIONS, ("in", "x", "out")])
def test_the_bias_of_the_step_enters_once_whether_it_is_split_or_not(split):
    made = block(split)
    u, modality = inputs()
    parts = made.dt_proj.parts if "dt" in split else [made.dt_proj] * M
    biases = torch.stack([part.bias for part in parts])
    at_rest = F.softplus(biases)
    assert at_rest.min() >= 1e-3 * 0.999 and at_rest.max() <= 0.1 * 1.001
    assert ("dt" not in split) == torch.equal(biases[0], biases[1])
    torch.testing.assert_close(
        made.form_now()["step at rest"], at_rest.median(1).values[: len(made.dt_proj.parts) if "dt" in split else 1]
    )
    with torch.no_grad():
        for part in set(parts):
            part.weight.zero_()
    (found,) = step_sizes(made, lambda: made(u, told(modality))).values()
    torch.testing.assert_close(found, at_rest[modality.flatten()])


def test_step_sizes_are_what_the_scan_is_given_block_by_block():
    model = nn.ModuleDict({"a": block(), "b": block(seed=5)})
    u, modality = inputs()
    found = step_sizes(model, lambda: model["b"](model["a"](u, told(modality)), told(modality)))
    assert set(found) == {"a", "b"} and found["a"].shape == (B * T, 2 * D)
    with torch.no_grad():  # the delta that makes the state after one token what it is: delta x b
        one = u[:, :1]
        _, cache = model["a"].prefill(one, told(modality[:, :1]))
        x = F.silu(cache.conv[:, :, -1] * model["a"].conv1d.weight[:, 0, -1] + model["a"].conv1d.bias)
        xs = model["a"].x_proj(x, told(modality[:, :1]))
        b = xs[:, model["a"].sizes[0] :][:, :N]
        delta = found["a"].view(B, T, -1)[:, 0]
    torch.testing.assert_close(cache.state, (delta * x)[:, :, None] * b[:, None])


@pytest.mark.parametrize("split", SPLITS)
def test_parameters_are_as_many_as_the_paper_says(split):
    channels, rank, k = 2 * D, 1, 4
    sizes = {
        "in": 2 * channels * D,
        "x": channels * (rank + 2 * N),
        "dt": rank * channels + channels,
        "out": channels * D,
    }
    shared = channels * (k + 1) + channels * N + channels
    times = {name: M if name in split else 1 for name in PROJECTIONS}
    assert count_params(block(split)) == shared + sum(times[name] * size for name, size in sizes.items())


class Told(ArrayTask):
    """Two rows of five tokens, of which the loss is the mean output."""

    metric, unit, higher_is_better = "mean", "", False

    def __init__(self):
        super().__init__("told", {"train": {"all": (torch.zeros(2, 5), torch.zeros(2))}}, {})

    def loss(self, model, batch):
        context = Context(modality=torch.tensor([0, 1, 2, 0, 1] * 2))
        return model(batch, context).mean(), context


def test_a_token_uses_the_parameters_of_the_dense_block():
    tokens = torch.zeros(2, 5, dtype=torch.long)
    made = mamba_decoder(11, D, 1, 5, lambda: MixtureOfMambaBlock(D, M, d_state=N))
    plain = mamba_decoder(11, D, 1, 5, lambda: MixtureOfMambaBlock(D, M, d_state=N, split=()))
    found, wanted = measure_budget(made, Told(), tokens), measure_budget(plain, Told(), tokens)
    assert found.active_params == wanted.active_params == wanted.params < found.params
    assert found.flops == wanted.flops > 0


def test_it_announces_the_modalities_where_something_is_split():
    u, modality = inputs()
    for split in (PROJECTIONS, ("dt",), ()):
        made = block(split)
        with observing(announcing(made)) as seen:
            made(u, told(modality))
        if not split:
            assert seen[made] == []
            continue
        ((routing, _),) = seen[made]
        assert torch.equal(routing.expert, modality.flatten()) and routing.top_k == 1
        assert routing.counts.tolist() == modality.flatten().bincount(minlength=M).tolist()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint_it_announces_once_and_learns_the_same(reentrant):
    made = block()
    u, modality = inputs()
    grad = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = torch.autograd.grad(made(u, told(modality)), [u, *made.parameters()], grad)
    with observing(announcing(made)) as seen:
        checkpoint(made, u, told(modality), use_reentrant=reentrant).backward(grad)
    assert len(seen[made]) == 1
    for found, one in zip((u.grad, *(p.grad for p in made.parameters())), wanted, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-12, atol=1e-12)


def test_sequences_shorter_than_the_convolution_and_batches_of_one_modality():
    made = block()
    u, modality = inputs()
    for length in (1, 2):
        torch.testing.assert_close(
            made(u[:, :length], told(modality[:, :length])), made(u, told(modality))[:, :length], rtol=1e-12, atol=1e-12
        )
    one = torch.full_like(modality, 1)
    torch.testing.assert_close(made(u, told(one)), by_hand(made, u, one), rtol=1e-10, atol=1e-10)


def test_wrong_input_is_refused_by_name():
    made = block()
    u, modality = inputs()
    for context in (None, Context()):
        with pytest.raises(InputError, match="modality is None but must be the modality of each token"):
            made(u, context)
    with pytest.raises(InputError, match="modality holds 3 but every id must be 0 to 2"):
        made(u, told(modality + 1))
    with pytest.raises(InputError, match="modality has 39 ids but must have one for each of 42 tokens"):
        made(u, told(modality[:, 1:]))
    _, cache = made.prefill(u, told(modality))
    with pytest.raises(InputError, match=r"cache.conv is .* but must be .* of shape \(2, 16, 3\)"):
        made.step(u[:2, 0], cache, told(modality[:2, 0]))
    with pytest.raises(InputError, match="projection 'conv' is unknown"):
        block(("in", "conv"))
    with pytest.raises(InputError, match="n_modalities is 0 but must be at least 1"):
        block(n_modalities=0)
    assert block(()).forward(u).shape == u.shape  # with nothing split it asks for no modality
