"""Expert and data groups on four real processes, each beside one process; states on the host; bytes by formula."""

import pytest
import torch
from torch import nn

from tests.lib.distributed.z_code_ranks import everything
from workbench.errors import InputError
from workbench.lib.core import checkpoint
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.core.optim.offloaded import OffloadedAdamW
from workbench.lib.distributed.expert_groups import ExpertGroups
from workbench.lib.distributed.expert_memory import Bytes, Memory, memory

# -- groups


@pytest.mark.parametrize("world", [1, 4, 6, 8, 16])
def test_every_rank_is_in_one_group_of_each_kind_and_a_group_has_all_experts(world: int):
    for ep in (d for d in range(1, world + 1) if world % d == 0):
        groups = ExpertGroups(world, ep)
        assert groups.expert_parallel == [list(range(g * ep, (g + 1) * ep)) for g in range(world // ep)]
        assert groups.expert_data == [list(range(i, world, ep)) for i in range(ep)]
        for kind in (groups.expert_parallel, groups.expert_data):
            assert sorted(rank for group in kind for rank in group) == list(range(world))
        n_experts = 3 * ep
        for group in groups.expert_parallel:
            assert [e for rank in group for e in groups.experts_of(rank, n_experts)] == list(range(n_experts))
        for group in groups.expert_data:
            assert len({groups.experts_of(rank, n_experts) for rank in group}) == 1


def test_what_does_not_fit_is_refused_and_what_does_is_named():
    with pytest.raises(InputError, match=r"world of 8: those that divide it are 1, 2, 4, 8"):
        ExpertGroups(8, 3)
    with pytest.raises(InputError, match="n_experts is 6 but must be a multiple of ep = 4"):
        ExpertGroups(8, 4).experts_of(0, 6)


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_processes(everything, 4, timeout=120)


@pytest.mark.parametrize("form", ["E+D", "E+D+ZeRO", "E", "D+ZeRO"])
def test_five_clipped_steps_of_every_form_are_those_of_one_process(ranks: list[dict], form: str):
    for found in (rank[form] for rank in ranks):
        assert found["clipped"]
        assert found["gap"] < 1e-12 and found["norm"] < 1e-12


def test_and_in_single_precision(ranks: list[dict]):
    for found in (rank["E+D+ZeRO in single precision"] for rank in ranks):
        assert found["gap"] < 1e-6 and found["norm"] < 1e-6


def test_the_whole_weights_are_gathered_on_every_rank(ranks: list[dict]):
    assert max(gap for rank in ranks for gap in rank["together"].values()) < 1e-12


@pytest.mark.parametrize("form", ["E+D", "E+D+ZeRO", "E", "D+ZeRO", "E+D+ZeRO in single precision"])
def test_a_rank_holds_the_bytes_that_the_formula_says(ranks: list[dict], form: str):
    for found in (rank[form] for rank in ranks):
        assert found["held"] == found["formula"] and min(found["held"]) > 0


def test_gradients_of_experts_are_divided_by_all_ranks_not_by_their_copies(ranks: list[dict]):
    for scales in (rank["scales"] for rank in ranks):
        assert scales["world"] < 1e-14
    assert max(rank["scales"]["copies"] for rank in ranks) > 1e-4


def test_with_a_capacity_each_rank_has_places_of_its_own(ranks: list[dict]):
    for found in (rank["capacity"] for rank in ranks):
        assert found["kept"] and found["dropped"] > 0 and found["gap"] < 1e-14


def test_states_shared_out_as_torch_does_it(ranks: list[dict]):
    assert max(rank["torch"] for rank in ranks) < 1e-6


def test_gradients_are_sent_to_those_who_have_the_same_parameters_alone(ranks: list[dict]):
    for found in (rank["traffic"] for rank in ranks):
        assert found["shared"] == found["shared_formula"] > 0
        assert found["experts"] == found["experts_formula"] > 0


def test_ranks_refuse_what_they_cannot_do(ranks: list[dict]):
    for said in (rank["refusals"] for rank in ranks):
        assert len(said) == 3 and "those that divide it are 1, 2, 4" in said[0]
        assert said[1] == "4 processes cannot share batch_size = 6 evenly: 1, 2, 3, 6 can"
        assert "model has no MoELayer" in said[2]


# -- states on the host


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 6, generator=generator).to(next(model.parameters()).dtype)
    return (model(x) - x[:, :1] * x[:, 1:2]).float().square().mean()


def groups_of(model: nn.Module) -> list[dict]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_are_those_of_torch(dtype: torch.dtype, streaming: bool):
    ours, theirs = net(dtype), net(dtype)
    optimizers = (
        OffloadedAdamW(groups_of(ours), lr=0.01, betas=(0.8, 0.95), bucket_bytes=200),
        torch.optim.AdamW(groups_of(theirs), lr=0.01, betas=(0.8, 0.95)),
    )
    for step in range(8):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
            if model is ours and streaming:
                with optimizer.streaming():
                    loss_of(model, step).backward()
                assert all(p.grad is None for p in model.parameters())
                optimizer.clip(0.5)
            else:
                loss_of(model, step).backward()
                nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not optimizers[0].state  # no moment on the device


def test_in_half_precision_the_steps_are_those_of_the_masters():
    model, wide = net(torch.bfloat16), net()
    with torch.no_grad():
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            q.copy_(p)
    ours, theirs = OffloadedAdamW(model.parameters(), lr=1e-4), torch.optim.AdamW(wide.parameters(), lr=1e-4)
    for step in range(20):
        loss_of(model, step).backward()
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(model.parameters(), wide.parameters(), strict=True))


def test_what_is_held_is_what_the_formula_says():
    """Weights on the device with at most a bucket of gradients; all else on the host."""
    model, bucket = net(torch.bfloat16), 100
    n = sum(p.numel() for p in model.parameters())
    optimizer = OffloadedAdamW(model.parameters(), bucket_bytes=bucket)
    for _ in range(2):
        with optimizer.streaming():
            loss_of(model, 0).backward()
        host = optimizer.host_bytes()
        optimizer.step()
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == 2 * n
    assert all(p.grad is None for p in model.parameters()) and optimizer.host_bytes()["gradients"] == 0
    expected = memory(n, 0, world=1, ep=1, offload=True, bucket_bytes=optimizer.largest_bucket)
    assert expected == Memory(2 * n, optimizer.largest_bucket, 0, sum(host.values())) and host["gradients"] == 4 * n
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    assert bucket <= optimizer.largest_bucket < bucket + largest < 2 * n


def test_gradients_that_stream_add_up_and_are_clipped_by_their_common_norm():
    model, whole = net(), net()
    optimizer = OffloadedAdamW(model.parameters(), bucket_bytes=1)
    with optimizer.streaming():
        for step in range(2):
            loss_of(model, step).backward()
    (loss_of(whole, 0) + loss_of(whole, 1)).backward()
    expected = nn.utils.clip_grad_norm_(whole.parameters(), 0.01)
    assert float(optimizer.clip(0.01)) == pytest.approx(float(expected), rel=1e-6)
    masters = next(group["params"] for group in optimizer._adamw.param_groups)
    assert all(torch.allclose(m.grad, p.grad, atol=1e-9) for m, p in zip(masters, whole.parameters(), strict=True))
    optimizer.zero_grad()
    before = [p.clone() for p in model.parameters()]
    optimizer.step()  # of nothing
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_from_its_state_it_goes_on_bit_for_bit():
    one = net(torch.bfloat16)
    optimizer = OffloadedAdamW(groups_of(one), lr=0.01)
    for step in range(3):
        loss_of(one, step).backward()
        optimizer.step()
    two = net(torch.bfloat16)
    other = OffloadedAdamW(groups_of(two), lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    assert all("master" not in state for state in optimizer._adamw.state.values())
    for step in range(3, 6):
        for model, its in ((one, optimizer), (two, other)):
            loss_of(model, step).backward()
            its.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert other.param_groups[0]["lr"] == 0.01 and other.param_groups[1]["weight_decay"] == 0.0
    plain = torch.optim.AdamW(groups_of(two))
    with pytest.raises(InputError, match="has no master of parameter 0"):
        other.load_state_dict(plain.state_dict())
    with pytest.raises(InputError, match="bucket_bytes is 0"):
        OffloadedAdamW(two.parameters(), bucket_bytes=0)


def test_frozen_weights_have_no_gradient_to_stream_and_one_bucket_may_see_several_passes():
    for finished in (True, False):
        model, whole = net(), net()
        for one in (model, whole):
            one[2].weight.requires_grad_(False)
        ours, theirs = OffloadedAdamW(model.parameters()), torch.optim.AdamW(whole.parameters(), foreach=False)
        with ours.streaming():
            for step in range(2):
                loss_of(model, step).backward()
                loss_of(whole, step).backward()
            if not finished:
                ours.step()
        if finished:
            ours.step()
        theirs.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_weights_that_somebody_else_has_changed_are_gone_on_from():
    """A checkpoint of the model alone, an average with other replicas: AdamW steps from what is there."""
    model, whole = net(), net()
    ours, theirs = OffloadedAdamW(model.parameters()), torch.optim.AdamW(whole.parameters(), foreach=False)
    for step in range(3):
        for one, optimizer in ((model, ours), (whole, theirs)):
            if step != 1:
                one.load_state_dict({name: t.round(decimals=1) for name, t in one.state_dict().items()})
            loss_of(one, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    half = net(torch.bfloat16)
    optimizer = OffloadedAdamW(half.parameters(), lr=1e-5)
    loss_of(half, 0).backward()
    optimizer.step()
    masters = [state["master"].clone() for state in optimizer.state_dict()["state"].values()]
    half.load_state_dict(half.state_dict())  # what is as it was keeps the bits that bfloat16 has not
    optimizer.step()
    assert all(
        torch.equal(a, s["master"]) for a, s in zip(masters, optimizer.state_dict()["state"].values(), strict=True)
    )
    assert not all(torch.equal(a, a.bfloat16().float()) for a in masters)


def test_its_state_has_the_rates_of_now_and_what_schedules_keep_beside_them():
    model = net()
    optimizer = OffloadedAdamW(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loss_of(model, 0).backward()
    optimizer.step()
    schedule.step()
    other = OffloadedAdamW(net().parameters(), lr=3.0)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5 and other.param_groups[0]["initial_lr"] == 1.0
    with pytest.raises(InputError, match=r"a master of shape \(16, 6\) of parameter 0 but must have \(3, 2\)"):
        OffloadedAdamW(nn.Sequential(*[nn.Linear(2, 3) for _ in range(3)]).parameters()).load_state_dict(
            optimizer.state_dict()
        )


def test_it_is_kept_by_a_checkpoint(tmp_path):
    model = net(torch.bfloat16)
    optimizer = OffloadedAdamW(model.parameters(), lr=0.01)
    loss_of(model, 0).backward()
    optimizer.step()
    checkpoint.save(tmp_path, 1, model, optimizer)
    again = net(torch.bfloat16)
    other = OffloadedAdamW(again.parameters())
    assert checkpoint.load(tmp_path, again, other).step == 1
    for one, its in ((model, optimizer), (again, other)):
        loss_of(one, 1).backward()
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# -- the formula


def test_memory_of_the_forms_by_hand():
    shared, experts = 10, 640
    assert memory(shared, experts, world=1, ep=1) == Memory(1300, 1300, 7800, 0)
    assert memory(shared, experts, world=8, ep=8).device == 16 * (10 + 80)
    assert memory(shared, experts, world=8, ep=4, zero=True) == Memory(
        340, 340, 12 * (2 + 80), 0
    )  # 10 / 8 is filled up
    assert memory(shared, experts, world=8, ep=4, tp=2).device == 16 * (5 + 160)
    found = memory(shared, experts, world=8, ep=8, offload=True, bucket_bytes=64)
    assert (found.device, found.host) == (2 * 90 + 64, 16 * 90)
    assert memory(1, 1, world=1, ep=1, per=Bytes(4, 4, 8)).device == 32


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="those that divide it are 1, 2, 4, 8"):
        memory(1, 1, world=8, ep=3)
    with pytest.raises(InputError, match="world of 4: those that divide it are 1, 2, 4"):
        memory(1, 1, world=8, tp=2, ep=8)
    with pytest.raises(InputError, match="bucket_bytes is 0 but must be at least 1"):
        memory(1, 1, world=8, ep=8, offload=True, bucket_bytes=0)
    with pytest.raises(InputError, match="experts is -1"):
        memory(1, -1, world=8, ep=8)
