"""NEAS: genomes, the gate at the split, multiplications, inherited weights."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import InputError
from workbench.lib.core.observe import observing
from workbench.lib.core.search.genomes import SKIP, EnsembleGenome, PathSpace, sample_genome
from workbench.lib.data.types import Arrays
from workbench.lib.search.neas import (
    EnsembleClassification,
    EnsembleNet,
    GradScale,
    KPathSupernet,
    build_standalone,
)

SPACE = PathSpace(1, 20, 5, widths=(4, 4, 8, 8), strides=(1, 1, 2, 1), stem=4, head=8)
IMAGES = PathSpace(3, 8, 5, widths=(4, 6), strides=(2, 1), stem=4, head=8, dims=2)
PUBLISHED = {  # split and genes of the three released networks
    20: "20 2 0 0 -1 0 2 0 0 2 -1 0 -1 0 3 2 4 0 2 5 0 4 3 0 0",
    16: "16 2 0 3 2 0 2 5 0 -1 3 0 2 0 0 3 5 4 0 5 0 5 4 0 3 5 2 5 0",
    -16: "16 2 0 5 5 1 3 5 1 3 4 1 2 5 4 1 3 3 1 3 1 5 1 0 5 4 4 3 0",
}


def drawn(n: int, k: int = 2, space: PathSpace = SPACE) -> list[EnsembleGenome]:
    generator = torch.Generator().manual_seed(0)
    return [sample_genome(space.everything, k, generator) for _ in range(n)]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_genome_comes_back_from_its_genes(k: int):
    for genome in drawn(20, k):
        genes = genome.encode()
        assert EnsembleGenome.decode(genes) == genome
        assert len(genes) == 2 + (genome.split + 1) + k * (SPACE.n_layers + 1 - genome.split)


@pytest.mark.parametrize(("split", "genes"), PUBLISHED.items())
def test_the_released_networks_are_read(split: int, genes: str):
    genes = [int(gene) for gene in genes.split()]
    genome = EnsembleGenome.decode(genes)
    assert (genome.split, genome.k, len(genome.paths[0])) == (abs(split), 2, 20)
    assert genome.encode() == genes and len(genes) == (25 if split == 20 else 29)


NO_GENES = ([], [1, 2, 0, 1], [0, 2, 0, 1, 0, 1], [0, 1, 3, 0], [1, 2, 0, 5, 1, 0, 1, 1], [-1, 1, 0, 0])


@pytest.mark.parametrize("genes", NO_GENES)
def test_genes_that_are_none_are_refused(genes: list[int]):
    with pytest.raises(InputError, match="genes is"):
        EnsembleGenome.decode(genes)


def test_a_genome_outside_the_space_is_refused():
    with pytest.raises(InputError, match="gene of layer 2 is -1 but must be one of"):
        EnsembleGenome(0, ((0, 0, SKIP, 0),)).validate(SPACE)
    with pytest.raises(InputError, match="paths have 3 genes but the space has 4 layers"):
        build_standalone(EnsembleGenome(0, ((0, 0, 0),)), SPACE)
    with pytest.raises(InputError, match="paths differ before the split"):
        EnsembleGenome(1, ((0, 1), (1, 1)))
    with pytest.raises(InputError, match="split is 3"):
        EnsembleGenome(3, ((0, 1),))
    with pytest.raises(InputError, match="size is 3 but must be at least 4"):
        PathSpace(1, 3, 5, (4, 4), (2, 2))
    with pytest.raises(InputError, match="as many of both"):
        PathSpace(1, 8, 5, (4, 4), (2,))
    with pytest.raises(InputError, match="x has shape"):
        KPathSupernet(SPACE)(torch.zeros(2, 19))


def test_the_gate_scales_the_gradient_alone():
    x = torch.randn(3, requires_grad=True)
    y = GradScale.apply(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.tensor([1.0, 2, 3])).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.25, 0.5, 0.75]))


def test_with_identical_branches_the_trunk_learns_as_that_of_one_network():
    two = EnsembleNet(EnsembleGenome(2, ((0, 1, 2, 3),) * 2), SPACE).double()
    one = EnsembleNet(EnsembleGenome(2, ((0, 1, 2, 3),)), SPACE).double()
    two.heads[1].load_state_dict(two.heads[0].state_dict())
    two.branches[1].load_state_dict(two.branches[0].state_dict())
    one.load_state_dict({name: value for name, value in two.state_dict().items() if name in one.state_dict()})
    x, y = torch.randn(6, 20, dtype=torch.float64), torch.arange(6) % 5
    for net in (one, two):
        sum(F.cross_entropy(logits, y) for logits in net(x).unbind(1)).backward()
    for part in ("stem", "trunk"):  # the mean of two equal gradients
        for a, b in zip(getattr(one, part).parameters(), getattr(two, part).parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(one.branches[0].parameters(), two.branches[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)  # not scaled


def test_the_trunk_has_the_mean_of_what_different_branches_send_back():
    net = EnsembleNet(EnsembleGenome(1, ((0, 1, 2, 3), (0, 4, 0, SKIP))), SPACE).double()
    x, y, sent = torch.randn(6, 20, dtype=torch.float64), torch.arange(6) % 5, []
    weight = next(net.trunk.parameters())
    for path in range(2):
        net.zero_grad()
        F.cross_entropy(net(x)[:, path], y).backward()
        sent.append(2 * weight.grad.clone())  # without the gate
    net.zero_grad()
    sum(F.cross_entropy(logits, y) for logits in net(x).unbind(1)).backward()
    torch.testing.assert_close(weight.grad, (sent[0] + sent[1]) / 2)


@pytest.mark.parametrize("space", [SPACE, IMAGES])
def test_multiplications_are_those_that_are_counted(space: PathSpace):
    x = torch.randn(1, space.channels, *[space.size] * space.dims)
    for genome in drawn(4, space=space):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            build_standalone(genome, space).eval()(x)
        assert counter.get_total_flops() == 2 * genome.macs(space)


def test_multiplications_fall_with_the_split():
    path = (0, 3, 5, 1)
    macs = [EnsembleGenome(split, (path, path)).macs(SPACE) for split in range(5)]
    assert macs == sorted(macs, reverse=True) and len(set(macs)) == 5
    single = EnsembleGenome(4, (path,)).macs(SPACE)
    assert macs[4] == single + SPACE.head_macs()


@pytest.mark.parametrize("space", [SPACE, IMAGES])
def test_a_network_inherits_from_the_supernet(space: PathSpace):
    supernet = KPathSupernet(space)
    x = torch.randn(8, space.channels, *[space.size] * space.dims)
    for _ in range(3):
        supernet(x)  # statistics that are not the initial ones
    supernet.eval()
    for genome in drawn(10, space=space):
        net = build_standalone(genome, space, supernet).eval()
        torch.testing.assert_close(net(x), supernet(x, None, genome), rtol=0, atol=1e-6)


def test_equal_paths_with_tied_heads_are_one_path():
    supernet = KPathSupernet(SPACE).eval()
    supernet.heads[1].load_state_dict(supernet.heads[0].state_dict())
    x, path = torch.randn(4, 20), (0, SKIP, 2, 3)
    one = supernet(x, None, EnsembleGenome(4, (path,)))
    for split in range(5):
        both = supernet(x, None, EnsembleGenome(split, (path, path)))
        assert torch.equal(both[:, 0], both[:, 1]) and torch.equal(both[:, 0], one[:, 0])


def test_draws_are_of_what_is_kept_and_evaluation_draws_nothing():
    supernet = KPathSupernet(SPACE, splits=(2,))
    supernet.kept = kept = ((1, 4), (SKIP, 5), (0, 2), (3,))
    assert supernet.kept == kept
    assert (
        KPathSupernet(SPACE).load_state_dict(supernet.state_dict()) and supernet.form_now()["kept operators"].sum() == 7
    )
    generator = torch.Generator().manual_seed(0)
    genomes = [sample_genome(kept, 2, generator, (2,)) for _ in range(200)]
    assert {genome.split for genome in genomes} == {2}
    for layer, ops in enumerate(kept):
        assert {path[layer] for genome in genomes for path in genome.paths} == set(ops)
    state, x = torch.get_rng_state(), torch.randn(3, 20, generator=generator)
    supernet.eval()
    assert torch.equal(supernet(x), supernet(x)) and torch.equal(torch.get_rng_state(), state)


def test_paths_are_announced_as_a_routers_experts():
    supernet = KPathSupernet(SPACE)
    genome = EnsembleGenome(1, ((0, SKIP, 2, 3), (0, 4, 2, 5)))
    with observing(supernet.layers) as seen:
        supernet(torch.randn(6, 20), None, genome)
    loads = [[routing.counts.tolist() for routing, _ in seen[layer]] for layer in supernet.layers]
    assert loads == [[[6, 0, 0, 0, 0, 0, 0]], [[0, 0, 0, 0, 6, 0, 6]], [[0, 0, 6, 0, 0, 0, 0]], [[0, 0, 0, 6, 0, 6, 0]]]


def test_each_path_is_trained_for_itself_and_the_mean_of_logits_answers():
    x, y = torch.randn(10, 20), torch.arange(10) % 5
    splits = dict.fromkeys(("train", "validation", "test"), (x, y))
    task = EnsembleClassification(Arrays("made", splits, tuple("abcde"), {"made": {}}))
    net = build_standalone(drawn(1)[0], SPACE).eval().requires_grad_(False)
    batch = next(task.batches("test", 10))
    loss, _ = task.loss(net, batch)
    logits = net(x)
    assert float(loss) == pytest.approx(sum(float(F.cross_entropy(one, y)) for one in logits.unbind(1)), rel=1e-6)
    members = [float(F.cross_entropy(one, y)) for one in logits.unbind(1)]
    assert float(F.cross_entropy(logits.mean(1), y)) <= sum(members) / 2 + 1e-6  # convex in the logits
    hits = (logits.mean(1).argmax(-1) == y).double().mean()
    assert task.evaluate(net, "test")["accuracy"] == pytest.approx(float(hits))
