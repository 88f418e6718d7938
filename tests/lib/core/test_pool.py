"""A pool is held by many layers and is one: for optimisers, gradients, files, and copies."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from workbench.errors import InputError
from workbench.lib.core.experts import GLUExperts, MLPExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.pool import ExpertPool, assign_pools
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context
from workbench.lib.core.train import TrainConfig, make_optimizer

WIDTH, EXPERTS, LAYERS = 8, 4, 4


def stack(group: int | None = None, seed: int = 0) -> DecoderLM:
    """A small language model whose layers have a pool for every `group` of them."""
    torch.manual_seed(seed)
    pools = assign_pools(LAYERS, lambda: GLUExperts(EXPERTS, WIDTH, 16), group)
    return DecoderLM(32, WIDTH, LAYERS, 2, lambda i: MoELayer(LinearRouter(WIDTH, EXPERTS, 2), pools[i]), seq_len=6)


def tokens() -> torch.Tensor:
    return torch.randint(32, (3, 6), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(tokens(), Context()).square().mean()


@pytest.mark.parametrize(("group", "pools"), [(None, 1), (LAYERS, 1), (2, 2), (1, LAYERS)])
def test_every_group_of_layers_holds_one_pool(group: int | None, pools: int):
    model = stack(group)
    held = [block.ffn.experts for block in model.blocks]
    size = LAYERS if group is None else group
    assert all((held[a] is held[b]) == (a // size == b // size) for a in range(LAYERS) for b in range(LAYERS))
    experts = sum(p.numel() for pool in {id(p): p for p in held}.values() for p in pool.parameters())
    assert experts == pools * EXPERTS * 3 * WIDTH * 16
    kept = [name for name in model.state_dict() if ".experts." in name]
    assert len(kept) == pools * 2 == len([n for n, _ in model.named_parameters() if ".experts." in n])


def test_an_optimiser_gets_every_weight_once():
    model = stack()
    given = [p for group in make_optimizer(model, TrainConfig(1)).param_groups for p in group["params"]]
    assert len(given) == len(set(map(id, given))) == len(list(model.parameters()))


def test_the_gradient_of_a_pool_is_the_sum_over_copies_one_a_layer():
    model = stack()
    loss_of(model).backward()
    untied = stack(group=1)
    states = model.state_dict()
    for i, block in enumerate(untied.blocks):
        block.ffn.experts = ExpertPool(GLUExperts(EXPERTS, WIDTH, 16))
        own = {name.removeprefix("blocks.0.ffn.experts."): v for name, v in states.items() if "0.ffn.experts" in name}
        block.ffn.experts.load_state_dict(own)
        block.ffn.router.load_state_dict(model.blocks[i].ffn.router.state_dict())
    rest = {name: value for name, value in states.items() if ".ffn." not in name}
    assert not untied.load_state_dict(rest, strict=False).unexpected_keys
    loss_of(untied).backward()
    for name, parameter in model.blocks[0].ffn.experts.named_parameters():
        copies = [block.ffn.experts.get_parameter(name).grad for block in untied.blocks]
        torch.testing.assert_close(parameter.grad, sum(copies), atol=1e-6, rtol=1e-5)
        assert all(grad.any() for grad in copies)


@pytest.mark.parametrize("group", [None, 2])
def test_a_file_has_the_pool_once_and_loads_strictly(group: int | None, tmp_path: Path):
    model, other = stack(group), stack(group, seed=5)
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    loaded = load_file(tmp_path / "plain.safetensors")
    other.load_state_dict(loaded, strict=True)
    assert torch.equal(loss_of(other), loss_of(model))
    fresh = stack(group, seed=6)
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(fresh, str(tmp_path / "model.safetensors"))
    assert torch.equal(loss_of(fresh), loss_of(model))


def test_a_model_is_loaded_again_and_again_and_copied():
    model, other = stack(), stack(seed=5)
    for source in (stack(seed=6), model):
        other.load_state_dict(source.state_dict(), strict=True)
    copied = copy.deepcopy(other)
    assert copied.blocks[3].ffn.experts is copied.blocks[0].ffn.experts is not other.blocks[0].ffn.experts
    assert list(copied.state_dict()) == list(model.state_dict())
    copied.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(loss_of(copied), loss_of(model))


def test_a_state_with_the_pool_under_every_name_still_loads():
    model, other = stack(), stack(seed=5)
    full = dict(model.state_dict())
    for layer in range(1, LAYERS):
        full |= {n.replace("blocks.0.", f"blocks.{layer}."): v for n, v in full.items() if "blocks.0.ffn.experts" in n}
    other.load_state_dict(full, strict=True)
    assert torch.equal(loss_of(other), loss_of(model))


def test_what_is_missing_or_too_much_is_said_once():
    model = stack()
    state = {name: value for name, value in model.state_dict().items() if ".experts." not in name}
    keys = model.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["blocks.0.ffn.experts.bank.gate_up", "blocks.0.ffn.experts.bank.down"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_weights_are_assigned_and_kept_with_their_graph():
    model = stack()
    names = list(model.state_dict())
    assert list(model.state_dict(keep_vars=True)) == names
    with torch.device("meta"):
        bare = stack()
    assert list(bare.state_dict()) == names
    bare.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert bare.blocks[3].ffn.experts.bank.down is bare.blocks[0].ffn.experts.bank.down
    assert torch.equal(loss_of(bare), loss_of(model))


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_sharded_model_has_the_pool_once(by_layer: bool, alone):
    model, whole = stack(), stack()
    units = [model.blocks[0].ffn.experts, *model.blocks, model] if by_layer else [model]
    for unit in units:
        fully_shard(unit, mesh=init_device_mesh("cpu", (1,)))
    state = model.state_dict()
    assert list(state) == list(whole.state_dict()) and all(isinstance(value, DTensor) for value in state.values())
    loss_of(model).backward()
    loss_of(whole).backward()
    for (name, mine), (_, its) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), its.grad, msg=name)
    model.load_state_dict(state, strict=True)


def test_a_pool_alone_is_a_bank():
    bank = MLPExperts(EXPERTS, WIDTH, 16)
    pool = ExpertPool(bank)
    x = torch.randn(5, WIDTH)
    router = LinearRouter(WIDTH, EXPERTS, 2)
    assert torch.equal(pool(x, router(x)), bank(x, router(x)))
    assert list(pool.state_dict()) == [f"bank.{name}" for name in bank.state_dict()]


@pytest.mark.parametrize(
    ("layers", "group", "said"),
    [(4, 3, "group is 3"), (4, 0, "group is 0"), (0, None, "n_layers is 0"), (4, 8, "group is 8")],
)
def test_bad_groups(layers: int, group: int | None, said: str):
    with pytest.raises(InputError, match=said):
        assign_pools(layers, lambda: GLUExperts(EXPERTS, WIDTH, 16), group)


def test_a_bank_that_is_none():
    with pytest.raises(InputError, match="bank is a Linear"):
        ExpertPool(nn.Linear(2, 2))
