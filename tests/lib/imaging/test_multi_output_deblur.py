"""Several outputs: what they cost, who is penalised, what is an oracle; and the network that they widen."""

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.core.nafnet import ChannelNorm, NAFBlock, NAFNet
from workbench.lib.core.observe import observing
from workbench.lib.core.routing import Context
from workbench.lib.core.task import psnr
from workbench.lib.imaging.multi_output_deblur import MultiOutput, output_report, winner_loss


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Heads(nn.Module):
    """Raw heads that are given, whatever the image."""

    def __init__(self, heads: torch.Tensor):
        super().__init__()
        self.raw = nn.Parameter(heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.raw.flatten(0, 1).expand(len(x), -1, -1, -1)


def test_one_head_is_one_output_and_its_psnr():
    torch.manual_seed(0)
    backbone = NAFNet(3, 8)
    x, y = images(4, 3, 16, 16), images(4, 3, 16, 16, seed=1)
    outputs = MultiOutput(backbone, 1)(x)
    assert torch.equal(outputs, (x + backbone(x))[:, None])
    assert torch.equal(outputs, MultiOutput(backbone, 1, multiplex=False)(x))
    loss, winner = winner_loss(outputs, y)
    torch.testing.assert_close(
        loss.double(), 10 * (outputs[:, 0] - y).double().square().flatten(1).mean(1).log10().mean()
    )
    assert not winner.any()
    own = torch.autograd.grad(loss, backbone.ending.weight, retain_graph=True)[0]
    squares = ((x + backbone(x)) - y).square().flatten(1).mean(1)
    plain = torch.autograd.grad((10 * (squares + 1e-8).log10()).mean(), backbone.ending.weight)[0]
    torch.testing.assert_close(own, plain)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_multiplexed_outputs_are_all_means_and_cost_nothing(heads):
    torch.manual_seed(0)
    backbone = NAFNet(2, 8, out_ch=2 * heads)
    many, plain = MultiOutput(backbone, heads), MultiOutput(backbone, heads, multiplex=False)
    x = images(2, 2, 9, 12)
    outputs, raw = many(x), plain(x)
    assert outputs.shape == (2, heads * (heads + 1) // 2, 2, 9, 12) and raw.shape == (2, heads, 2, 9, 12)
    own = many.pairs[:, 0] == many.pairs[:, 1]
    assert torch.equal(outputs[:, own], raw)
    for k, (i, j) in enumerate(many.pairs.tolist()):
        torch.testing.assert_close(outputs[:, k], (raw[:, i] + raw[:, j]) / 2)
    assert count_params(many) == count_params(plain) == count_params(NAFNet(2, 8)) + (heads - 1) * (9 * 8 * 2 + 2)


@pytest.mark.parametrize("kind", ["psnr", "charbonnier_edge"])
def test_only_the_heads_of_the_winner_get_a_gradient(kind):
    target = torch.full((1, 1, 8, 8), 0.5)
    raw = torch.stack([torch.full((1, 8, 8), value) for value in (0.4, -0.35, 2.0)])  # the mean of the first two wins
    model = MultiOutput(Heads(raw), 3)
    loss, winner = winner_loss(model(target), target, kind)
    assert sorted(model.pairs[winner.item()].tolist()) == [0, 1]
    loss.backward()
    first, second, third = model.backbone.raw.grad
    assert first.any() and torch.equal(first, second) and not third.any()

    alone = nn.Parameter((raw[:1] + raw[1:2]) / 2)
    winner_loss(target[:, None] + alone, target, kind)[0].backward()
    torch.testing.assert_close(first, alone.grad[0] / 2)


def test_each_image_has_its_own_winner_and_copies_change_nothing():
    outputs, target = images(3, 4, 1, 12, 12), images(3, 1, 12, 12, seed=1)
    for kind in ("psnr", "charbonnier_edge"):
        loss, winner = winner_loss(outputs, target, kind)
        apart = [winner_loss(outputs[[i]], target[[i]], kind) for i in range(3)]
        torch.testing.assert_close(loss, torch.stack([one for one, _ in apart]).mean())
        assert winner.tolist() == [int(one) for _, one in apart]
        twice, _ = winner_loss(outputs.repeat(2, 1, 1, 1, 1), target.repeat(2, 1, 1, 1), kind)
        torch.testing.assert_close(twice, loss)
        fixed = min(winner_loss(outputs[:, [k]], target, kind)[0] for k in range(4))
        assert loss <= fixed
        order = torch.tensor([2, 0, 3, 1])
        again, other = winner_loss(outputs[:, order], target, kind)
        assert again == loss and order[other].tolist() == winner.tolist()


def test_the_edge_loss_is_blind_to_what_is_smooth_and_sees_edges():
    target = torch.zeros(1, 1, 16, 16)
    shifted, checker = target + 0.1, 0.1 * (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).mul(2).sub(1)
    flat = winner_loss(shifted[:, None], target, "charbonnier_edge")[0]
    rough = winner_loss(checker.float()[None, None, None], target, "charbonnier_edge")[0]
    assert flat == pytest.approx(0.1 + 0.05 * 1e-3, abs=1e-3)  # the Laplacian of a constant is 0
    assert rough > flat + 0.004


def test_the_report_knows_the_oracle_from_what_can_be_used():
    x, target = images(5, 3, 1, 8, 8), images(5, 1, 8, 8, seed=1)
    found = output_report(x, target)
    each = torch.stack([psnr(x[:, k], target) for k in range(3)], 1)
    assert found.per_output == pytest.approx(each.mean(0).tolist())
    assert found.best_overall == pytest.approx(each.amax(1).mean().item())
    assert found.worst <= min(found.per_output) <= found.per_output[found.best_single] <= found.best_overall
    assert found.oracle_gap >= 0 and sum(found.usage) == pytest.approx(1)
    raw = MultiOutput(Heads(images(3, 1, 8, 8, seed=2) - 0.5), 3)
    plain = MultiOutput(raw.backbone, 3, multiplex=False)
    assert output_report(raw(target), target).best_overall >= output_report(plain(target), target).best_overall


def test_two_answers_are_found_where_the_label_is_one_of_two():
    """A target of +d or -d, at random: one output says their mean, two say both, and the mean of these is 0."""
    d, flips = 0.25, torch.Generator().manual_seed(0)
    target = torch.where(torch.rand(256, 1, 1, 1, generator=flips) < 0.5, d, -d).expand(-1, 1, 4, 4)

    def trained(heads: int) -> torch.Tensor:
        model = MultiOutput(
            Heads(0.05 * torch.randn(heads, 1, 4, 4, generator=torch.Generator().manual_seed(1))), heads
        )
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(300):
            errors = (model(torch.zeros_like(target)) - target[:, None]).square().flatten(2).mean(2)
            optimizer.zero_grad()
            errors.amin(1).mean().backward()
            optimizer.step()
        return model(torch.zeros(1, 1, 4, 4))[0].mean((1, 2, 3)).detach()

    (mean,) = trained(1)
    assert mean == pytest.approx(target.mean().item(), abs=1e-3)
    first, between, second = trained(2)
    assert sorted([first.item(), second.item()]) == pytest.approx([-d, d], abs=0.01)
    assert between == pytest.approx(0, abs=0.01)


def test_the_winner_is_announced_as_an_expert():
    model = MultiOutput(NAFNet(1, 4, out_ch=2), 2)
    with observing([model]) as seen:
        model.won(torch.tensor([0, 2, 2]), Context())
    routing, _ = seen[model][0]
    assert routing.expert.tolist() == [0, 2, 2] and routing.n_experts == 3 and routing.top_k == 1


def test_a_block_is_the_identity_at_first_and_the_norm_is_torchs():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 7)
    assert torch.equal(NAFBlock(8)(x), x)
    norm = ChannelNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = nn.functional.layer_norm(x.movedim(1, -1), (8,), norm.weight, norm.bias, norm.eps).movedim(-1, 1)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (15, 22), (1, 3)])
def test_images_of_any_size_come_back_as_large(size):
    torch.manual_seed(0)
    assert NAFNet(3, 4, (1, 1, 1), 1, (1, 1, 1))(torch.rand(2, 3, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: MultiOutput(NAFNet(1, 4), 0), "heads is 0 but must be at least 1"),
        (lambda: MultiOutput(NAFNet(1, 4, out_ch=3), 2)(images(2, 1, 8, 8)), "must make 2 heads of 1 channels"),
        (lambda: NAFNet(1, 4)(images(2, 3, 8, 8)), r"x has shape \(2, 3, 8, 8\) but must be \(B, 1, H, W\)"),
        (lambda: NAFNet(0, 4), "in_ch is 0 but must be at least 1"),
        (lambda: NAFNet(1, 4, (1, 1), 1, (1,)), "must be as many"),
        (lambda: winner_loss(images(2, 3, 1, 8, 8), images(2, 1, 8, 9)), "outputs, target have shapes"),
        (lambda: winner_loss(images(0, 3, 1, 8, 8), images(0, 1, 8, 8)), "not empty"),
        (lambda: winner_loss(images(2, 3, 1, 8, 8) / 0, images(2, 1, 8, 8)), "outputs has numbers that are not finite"),
        (lambda: winner_loss(images(2, 3, 1, 8, 8), images(2, 1, 8, 8), "l1"), "kind 'l1'"),
    ],
)
def test_what_does_not_fit_is_named(act, words):
    with pytest.raises(InputError, match=words):
        act()
