"""Streaming DiLoCo: what it is in its limits, on real processes as in one, its bytes, its schedule, and a restart."""

import copy
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save

from tests.draws import draw
from tests.lib.distributed import diloco_ranks as ranks
from tests.lib.distributed.diloco_ranks import Net, config, shards, weights
from workbench.errors import InputError
from workbench.lib.core import checkpoint
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.core.train import Hook, make_optimizer, steps, train
from workbench.lib.distributed.bandwidth import BandwidthModel
from workbench.lib.distributed.replicas import LocalReplicas, Mailboxes, train_replicas
from workbench.lib.distributed.streaming_diloco import (
    E3M0Codec,
    Schedule,
    StreamingDiLoCo,
    all_gather,
    fragments,
)

WHOLE = {"sync_every": 5, "delay": 0, "mix": 0.0}
PLAIN = {"outer_lr": 1.0, "outer_momentum": 0.0}
CASES = [
    {"steps": 11, "count": 1, "codec": False, **WHOLE},
    {"steps": 13, "count": 3, "codec": False, "sync_every": 8, "delay": 2, "mix": 0.5},
    {"steps": 13, "count": 3, "codec": True, "sync_every": 8, "delay": 2, "mix": 0.5},
    {"steps": 12, "count": 4, "codec": True, "sync_every": 5, "delay": 1, "mix": 0.0},
]
HOW = {"sync_every": 5, "delay": 1, "mix": 0.5, "codec": E3M0Codec(16)}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def local(replicas: int, dtype=torch.float32, count: int = 1, order: str = "strided", **settings) -> LocalReplicas:
    models = [Net(dtype) for _ in range(replicas)]
    return LocalReplicas(models, fragments(models[0], count, order), **settings)


def in_process(replicas: int, steps: int, count: int, codec: bool, **settings) -> LocalReplicas:
    made = local(replicas, count=count, codec=E3M0Codec(16) if codec else None, **settings)
    train_replicas(made, shards(replicas), config(steps, 4 * replicas))
    return made


# -- its limits, each beside a loop of its own


@pytest.mark.parametrize("replicas", [2, 3])
def test_one_fragment_at_once_is_diloco(replicas):
    """Beside it a loop over whole models with torch's SGD as the outer optimiser: equal to the last bit."""
    n_steps, every = 17, 5
    found = local(replicas, sync_every=every, delay=0, mix=0.0, outer_lr=0.7)
    train_replicas(found, shards(replicas), config(n_steps, 4 * replicas))
    models, theta = [Net() for _ in range(replicas)], Net()
    outer = torch.optim.SGD([p for p in theta.parameters() if p.requires_grad], lr=0.7, momentum=0.9, nesterov=True)
    loops = [steps(model, shards(replicas).of(m), config(n_steps)) for m, model in enumerate(models)]
    for step in range(1, n_steps + 1):
        for loop in loops:
            next(loop)
        if step % every == 0:
            for name, p in theta.named_parameters():
                if p.requires_grad:
                    deltas = [p.detach() - model.get_parameter(name).detach() for model in models]
                    p.grad = sum(deltas[1:], start=deltas[0]) / replicas
            outer.step()
            for model in models:
                model.load_state_dict(theta.state_dict())
    assert all(equal(weights(a), weights(b)) for a, b in zip(found.replicas, models, strict=True))
    assert not equal(weights(models[0]), weights(models[1]))  # it stopped between two exchanges
    assert equal(found.parts[0].global_parameters(), {n: w for n, w in weights(theta).items() if n != "fixed"})


def test_an_exchange_after_every_step_is_data_parallel_sgd():
    found, whole = local(3, torch.float64, sync_every=1, delay=0, mix=0.0, **PLAIN), Net(torch.float64)
    sgd = torch.optim.SGD([p for p in found.parameters() if p.requires_grad], lr=0.05)
    alone = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.05)
    task = shards(3)
    for step in range(8):
        batch = task.batch("train", 12, torch.Generator().manual_seed(step))
        for model, optimizer in ((found, sgd), (whole, alone)):
            optimizer.zero_grad()
            task.loss(model, batch)[0].backward()
            optimizer.step()
        found.step()
    assert any((w - Net(torch.float64).get_parameter(n)).abs().max() > 1e-3 for n, w in weights(whole).items())
    for replica in found.replicas:
        assert all(torch.allclose(w, weights(replica)[n], atol=1e-12, rtol=0) for n, w in weights(whole).items())


@pytest.mark.parametrize(("count", "mix"), [(1, 0.0), (3, 0.0), (3, 1.0)])
def test_alone_or_unmixed_it_is_plain_training(count, mix):
    """One replica with outer steps of rate 1 is where it would be anyway; with a mix of 1 nothing arrives at all."""
    outer = PLAIN if mix == 0 else {}
    found = local(1, torch.float64, count, sync_every=4, delay=0, mix=mix, **outer)
    train_replicas(found, shards(1), config(10))
    plain = Net(torch.float64)
    train(plain, shards(1).of(0), config(10))
    off = max(float((w - weights(found.replicas[0])[n]).abs().max()) for n, w in weights(plain).items())
    assert off == 0 if mix == 1 else off < 1e-12
    assert not equal(weights(plain), weights(Net(torch.float64)))


def test_fragments_delays_and_mixes_by_hand():
    """Replicas that add numbers of their own in each step, beside a table of what was when, in plain Python."""
    P, H, tau, alpha, rate, mu, M, T = 2, 5, 2, 0.25, 0.5, 0.9, 3, 16

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(P)).double()
            for layer in self.layers:
                torch.nn.init.ones_(layer.weight)

    found = LocalReplicas([Two() for _ in range(M)], [["layers.0.weight"], ["layers.1.weight"]],
                          sync_every=H, delay=tau, mix=alpha, outer_lr=rate, outer_momentum=mu)  # fmt: skip
    x, theta, speed = [[1.0] * P for _ in range(M)], [1.0] * P, [0.0] * P
    snapshots = {}
    for t in range(1, T + 1):
        for m in range(M):
            for p in range(P):
                with torch.no_grad():
                    found.replicas[m].layers[p].weight += 0.1 * (m + 1) * (p + 1) + 0.01 * t
                x[m][p] += 0.1 * (m + 1) * (p + 1) + 0.01 * t
        found.step()
        for p in range(P):
            if (t - H * (p + 1) // P) % H == 0:
                snapshots[t, p] = [theta[p] - x[m][p] for m in range(M)]
            if (t - tau, p) in snapshots:
                gradient = sum(snapshots[t - tau, p]) / M
                speed[p] = mu * speed[p] + gradient
                theta[p] -= rate * (gradient + mu * speed[p])
                for m in range(M):
                    x[m][p] = alpha * x[m][p] + (1 - alpha) * theta[p]
        for m in range(M):
            now = [layer.weight.item() for layer in found.replicas[m].layers]
            assert now == pytest.approx(x[m], abs=1e-12), (t, m)
        copies = [[v.item() for v in part.global_parameters().values()] for part in found.parts]
        assert copies[0] == pytest.approx(theta, abs=1e-12) and copies.count(copies[0]) == M
    assert len(snapshots) == 6 and theta[0] > 2  # it went where the replicas went


# -- on processes


@pytest.fixture(scope="module")
def two() -> list[dict]:
    return run_processes(ranks.on_two, 2, CASES, HOW)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_do_what_replicas_of_one_process_do(world, two):
    found = [rank["trained"] for rank in two] if world == 2 else run_processes(ranks.trained, world, CASES)
    for at, case in enumerate(CASES):
        mine, made = [rank[at] for rank in found], in_process(world, **case)
        for m, rank in enumerate(mine):
            assert equal(rank["weights"], weights(made.replicas[m]))
            assert equal(rank["global"], mine[0]["global"]), "global copies are equal to the last bit"
            assert equal(rank["global"], made.parts[m].global_parameters())
            assert not equal(rank["weights"], rank["first"])
        assert not equal(mine[0]["weights"], mine[1]["weights"])  # they are between two exchanges
        # on the wire is what the formula says, after each step; and never more than the largest fragment
        assert all(rank["sent"] == rank["formula"] for rank in mine)
        part = made.parts[0]
        sizes = [part.message_bytes(p) for p in range(case["count"])]
        assert max(mine[0]["formula"]) == (world - 1) * max(sizes)
        numbers = [len(theta) for theta in part.globals]
        assert sizes == [-(-n // 2) + 4 * -(-n // 16) if case["codec"] else 4 * n for n in numbers]
        window = mine[0]["formula"][: case["sync_every"]]
        assert sum(window) == (world - 1) * sum(sizes) and sum(b > 0 for b in window) == case["count"]


def test_the_function_for_processes_trains_a_replica_on_each(two):
    made = local(2, count=2, **HOW)
    train_replicas(made, shards(2), config(7, 8))
    found = [rank["by the function"] for rank in two]
    assert all(equal(weights(a), weights(b)) for a, b in zip(found, made.replicas, strict=True))


def test_a_whole_exchange_makes_replicas_equal_and_a_mixed_one_leaves_them_apart():
    for mix in (0.0, 0.5):
        made = in_process(2, steps=10, count=1, codec=True, sync_every=5, delay=0, mix=mix)
        assert equal(*map(weights, made.replicas)) == (mix == 0)
        assert equal(*(part.global_parameters() for part in made.parts))


def test_it_is_torchs_local_sgd_where_the_outer_step_is_a_mean(two):
    for theirs, ours in (rank["local sgd"] for rank in two):
        assert all(torch.allclose(theirs[name], ours[name], atol=1e-12, rtol=0) for name in ours)


def test_a_process_that_is_cut_while_a_fragment_is_under_way_goes_on_to_the_same_bits(two):
    for whole, again in (rank["resumed"] for rank in two):
        assert equal(whole, again)


def test_replicas_that_begin_unlike_are_refused(two):
    assert all("replicas are 2 but 1 began with other weights or settings" in s for rank in two for s in rank["unlike"])
    with pytest.raises(InputError, match="which is not set up"):
        all_gather()


# -- a restart


def test_replicas_of_one_process_are_kept_and_resumed_by_a_checkpoint(tmp_path):
    settings = {"count": 2, "codec": True, "sync_every": 6, "delay": 2, "mix": 0.5}
    whole, cut = in_process(2, steps=14, **settings), 10

    def fresh():
        made = {key: value for key, value in settings.items() if key != "codec"}
        return local(2, codec=E3M0Codec(16), **made)

    half = fresh()
    optimizer = make_optimizer(half, config(14))

    class Stop(Hook):
        def after_step(self, state):
            state.stop = state.step + 1 == cut

    train_replicas(half, shards(2), config(14, 8), [Stop()], optimizer=optimizer)
    assert half.parts[0]._under_way is not None
    checkpoint.save(tmp_path, cut, half, optimizer)
    again = fresh()
    second = make_optimizer(again, config(14))
    assert checkpoint.load(tmp_path, again, second).step == cut
    train_replicas(again, shards(2), config(14, 8), optimizer=second, start=cut)
    assert checkpoint.weights_digest(again) == checkpoint.weights_digest(whole)


def test_the_state_is_tensors_and_is_refused_by_other_fragments():
    made = in_process(2, steps=4, count=3, codec=True, sync_every=9, delay=2, mix=0.5)
    state = load(save(made.parts[0].state_dict()))
    assert state["under_way"].tolist() == [0, 5] and int(state["made"]) == 4
    for count in (2, 4):
        other = local(2, count=count, sync_every=9, delay=1, mix=0.5)
        with pytest.raises(InputError, match=f"state is of other fragments than the {count} that there are"):
            other.parts[0].load_state_dict(state)


@pytest.mark.parametrize(("count", "every"), [(1, 1), (1, 3), (2, 5), (4, 5)])
@pytest.mark.parametrize("codec", [None, E3M0Codec(16)])
def test_a_restart_after_any_step_with_any_delay_goes_on_to_the_same_bits(count, every, codec):
    def change(made: LocalReplicas, step: int) -> None:
        with torch.no_grad():
            for m, model in enumerate(made.replicas):
                for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
                    p += 0.1 * draw(*p.shape, seed=100 * step + 10 * m + i)
        made.step()

    total = 2 * every + 2
    for delay in range((every - 1) // count + 1):
        how = {"count": count, "sync_every": every, "delay": delay, "codec": codec}
        whole, states = local(2, **how), []
        for step in range(total):
            states.append(copy.deepcopy(whole.state_dict()))
            change(whole, step)
        for cut, state in enumerate(states):
            again = local(2, **how)
            again.load_state_dict(state)
            for step in range(cut, total):
                change(again, step)
            assert equal(again.state_dict(), whole.state_dict()), (delay, cut)


def test_a_state_of_the_same_sizes_in_another_order_and_one_of_another_codec_are_refused():
    def made(order: str, codec: E3M0Codec | None) -> LocalReplicas:
        nets = [torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(4)]) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        return LocalReplicas(nets, fragments(nets[0], 2, order), sync_every=8, delay=2, codec=codec)

    one = made("strided", E3M0Codec(16))
    for _ in range(4):
        one.step()
    assert one.parts[0]._under_way is not None
    with pytest.raises(InputError, match="state is of other fragments than the 2 that there are"):
        made("sequential", E3M0Codec(16)).load_state_dict(one.state_dict())
    for other in (None, E3M0Codec(32)):
        with pytest.raises(InputError, match=r"state has a message of 20 bytes .* it is of another codec"):
            made("strided", other).load_state_dict(one.state_dict())


def test_replicas_whose_frozen_weights_are_unlike_are_refused():
    models = [Net(), Net()]
    models[1].fixed.data[0, 0] = 2.0
    made = LocalReplicas(models, fragments(models[0], 1), sync_every=4)
    with pytest.raises(InputError, match="replicas are 2 but 1 began with other weights"):
        made.step()


def test_a_flush_takes_over_at_once_what_is_under_way():
    made = in_process(2, steps=4, count=1, codec=False, sync_every=4, delay=3, mix=0.0)
    assert not equal(*map(weights, made.replicas))
    for part in made.parts:
        part.flush()
        part.flush()  # nothing is left
    assert equal(*map(weights, made.replicas)) and "message" not in made.parts[0].state_dict()


# -- its parts


@pytest.mark.parametrize(("count", "every"), [(1, 1), (1, 7), (3, 8), (4, 4), (5, 13)])
def test_each_fragment_is_sent_once_in_a_period_and_no_two_are_under_way(count, every):
    for delay in range((every - 1) // count + 1):
        schedule = Schedule(count, every, delay)
        assert schedule.offsets[-1] == every and len(set(schedule.offsets)) == count
        sent = {t: p for t in range(1, 4 * every + 1) if (p := schedule.sent(t)) is not None}
        arrives = {t: p for t in range(1, 5 * every) if (p := schedule.arriving(t)) is not None}
        for start in range(1, 3 * every):
            assert sorted(sent[t] for t in range(start, start + every) if t in sent) == list(range(count))
        assert {t + delay: p for t, p in sent.items()}.items() <= arrives.items()
        assert all(b - a >= delay for a, b in pairwise(sorted(sent)))


def test_fragments_are_whole_layers_and_every_trained_parameter_is_in_one():
    model = Net()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for order in ("strided", "sequential"):
        for count in (1, 2, 3, 4):
            found = fragments(model, count, order)
            assert sorted(name for part in found for name in part) == sorted(trained) and all(found)
            for i in range(4):
                assert len({p for p, part in enumerate(found) for n in part if n.startswith(f"layers.{i}.")}) == 1
    strided, sequential = (
        [sorted({int(n.split(".")[1]) for n in part if n.startswith("layers")}) for part in fragments(model, 2, order)]
        for order in ("strided", "sequential")
    )
    assert strided == [[0, 2], [1, 3]] and sequential == [[0, 1], [2, 3]]
    assert {"into.weight", "scale"} <= set(fragments(model, 2)[1])  # the smaller one: its layers have no biases
    assert fragments(torch.nn.Linear(2, 2), 1) == [["weight", "bias"]]
    assert fragments(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1)), 2) == [
        ["0.weight", "0.bias"],
        ["2.weight", "2.bias"],
    ]
    text = DecoderLM(16, 8, 2, 2, lambda layer: torch.nn.Identity(), 4)
    assert "embedding.weight" in fragments(text, 2)[0]


def test_any_users_network_in_bfloat16_takes_part():
    """The copy is kept in float32, and what arrives is rounded to the type of the network."""
    models = [Net(torch.bfloat16) for _ in range(2)]
    made = LocalReplicas(models, fragments(models[0], 2), sync_every=4, delay=1, mix=0.0, codec=E3M0Codec())
    for step in range(9):
        for m, model in enumerate(models):
            with torch.no_grad():
                for i, p in enumerate(model.parameters()):
                    p += 0.1 * draw(*p.shape, seed=100 * step + 10 * m + i, dtype=p.dtype)
        made.step()
    assert all(theta.dtype == torch.float32 for theta in made.parts[0].globals)
    assert models[0].scale.dtype == torch.bfloat16
    assert equal(*(part.global_parameters() for part in made.parts))


def test_the_codec_writes_scales_and_codes():
    codec, x = E3M0Codec(16), draw(37) * 2 ** (3 * draw(37, seed=1))
    message = codec.encode(x)
    assert len(message) == codec.size(37) == 4 * 3 + 19 and message.dtype == torch.uint8
    found = codec.decode(message, 37)
    assert torch.equal(codec.encode(found), message)
    among = torch.cat([torch.zeros(1, dtype=torch.uint8), message])[1:]  # where no float32 may begin
    assert torch.equal(codec.decode(among, 37), found)
    of = x.abs().unfold(0, 16, 16).amax(1).repeat_interleave(16) / 16
    large = x[:32].abs() >= of / 4
    assert ((found - x)[:32].abs()[large] <= x[:32].abs()[large] / 3 * 1.00001).all()
    assert E3M0Codec().bits == 4.25


def test_shards_give_a_replica_the_rows_it_would_have_alone():
    task = shards(3)
    generator = torch.Generator().manual_seed(5)
    together, parts = task.batch("train", 9, generator), []
    for m in range(3):
        parts.append(task.of(m).batch("train", 3, torch.Generator().manual_seed(5)))
    assert torch.equal(together.inputs, torch.cat([part.inputs for part in parts]))
    assert not torch.equal(parts[0].inputs, parts[1].inputs)
    assert len(task.batch("train", 7, generator)) == 7 and len(task.batch("train", 2, generator)) == 2
    assert task.of(1).metric == "nmse" and task.of(1).domains == task.domains
    replicas = local(3, sync_every=2, delay=0)
    loss, context = task.loss(replicas, together)
    alone = [task.loss(Net(), part)[0] for part in parts]
    assert loss.item() == pytest.approx(sum(alone).item() / 3) and context.aux == 0
    loss.backward()
    gradient = torch.autograd.grad(task.loss(model := Net(), parts[1])[0], model.scale)[0]
    assert torch.allclose(replicas.replicas[1].scale.grad, gradient)
    assert torch.isfinite(task.loss(replicas, task.batch("train", 2, generator))[0])
    assert task.evaluate(replicas)["nmse"] == pytest.approx(task.evaluate(Net())["nmse"])


def test_the_mean_and_the_copy_are_models_of_their_own():
    made = in_process(2, steps=7, count=2, codec=False, sync_every=4, delay=1, mix=0.5)
    before = copy.deepcopy(made.state_dict())
    mean, theta = made.mean_model(), made.global_model()
    for name, value in weights(mean).items():
        own = [replica.get_parameter(name) for replica in made.replicas]
        assert torch.allclose(value, (own[0] + own[1]) / 2, atol=1e-7)
    assert all(torch.equal(weights(theta)[n], v) for n, v in made.parts[0].global_parameters().items())
    with torch.no_grad():
        mean.scale += 1
        theta.scale += 1
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


def test_utilisation_is_by_hand():
    link = LinkModel(alpha=0.1, beta=1e-6)  # a megabyte a second
    # a fragment of 1e6 * 4 / 8 / 5 bytes takes 0.1 + 0.1 s, of which a step of 0.05 s is hidden; 5 of them in 20 steps
    found = BandwidthModel(10**6, 5, 20, 1, 4, 0.05, link)
    assert found.message_bytes == 100_000 and found.sent_bytes == 25_000
    assert found.exchange_seconds == pytest.approx(0.2) and found.exposed_seconds == pytest.approx(0.15 * 5 / 20)
    assert found.utilisation == pytest.approx(0.05 / (0.05 + 0.0375))
    assert BandwidthModel(10**6, 5, 20, 3, 4, 0.1, link).utilisation == 1
    assert BandwidthModel(10**6, 5, 20, 1, 4, 0.05, link, shared=True).exchange_seconds == pytest.approx(0.3)
    parallel = BandwidthModel.data_parallel(10**6, 16, 0.05, link)
    assert parallel.exposed_seconds == parallel.exchange_seconds == pytest.approx(2 * (0.1 + 1.0))
    assert parallel.sent_bytes == 2e6 and parallel.utilisation == pytest.approx(0.05 / 2.25)
    assert BandwidthModel(10**6, 1, 20, 0, 4, 0.05, link, replicas=4).sent_bytes == 75_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Schedule(0, 5), "count is 0 but must be at least 1"),
        (lambda: Schedule(4, 3), "sync_every is 3 but must be at least the 4 fragments"),
        (lambda: Schedule(3, 9, 3), "delay is 3 but must be 0 to 2: 3 fragments are exchanged in 9 steps"),
        (lambda: Schedule(3, 9, -1), "delay is -1 but"),
        (lambda: Schedule(2, True), "sync_every is True but must be a whole number"),
        (lambda: LocalReplicas([Net()] * 2, fragments(Net(), 1), sync_every=4), "models have parameters in common but"),
        (lambda: LocalReplicas([], fragments(Net(), 1), sync_every=4), "models has none but must be at least one"),
        (lambda: fragments(Net(), 5), "count is 5 but must be 1 to 4, the layers"),
        (lambda: fragments(Net(), 2, "stride"), "order 'stride' is unknown; did you mean 'strided'"),
        (lambda: E3M0Codec(100), "block is 100 but must be one of 16"),
        (lambda: local(2, sync_every=4, mix=1.5), "mix is 1.5 but must be 0 to 1"),
        (lambda: local(2, sync_every=4, outer_lr=0.0), "outer_lr is 0.0 but must be above 0"),
        (lambda: local(2, sync_every=4, outer_momentum=1.0), "outer_momentum is 1.0 but must be 0 or more"),
        (lambda: shards(2).of(2), "replica is 2 but must be 0 to 1"),
        (lambda: train_replicas(local(2, sync_every=4), shards(2), config(2, 5)), "batch_size is 5 but"),
        (lambda: train_replicas(local(2, sync_every=4), shards(3), config(2, 6)), "shards has 3 tasks but"),
        (lambda: BandwidthModel(0, 1, 1, 0, 16, 1.0, LinkModel(0, 1)), "params is 0 but must be above 0"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: [*parts, []], "fragments has an empty one"),
        (lambda parts: parts[1:], "fragments lack parameter"),
        (lambda parts: [*parts, ["scale"]], "fragments have parameter 'scale' 2 times"),
        (lambda parts: [*parts, ["scal"]], "parameter in fragments 'scal' is unknown; did you mean 'scale'"),
        (lambda parts: [*parts, ["fixed"]], "parameter in fragments 'fixed' is unknown"),
    ],
)
def test_fragments_that_do_not_fit_the_model_are_refused(change, message):
    model = Net()
    with pytest.raises(InputError, match=message):
        StreamingDiLoCo(model, change(fragments(model, 2)), sync_every=8, delay=0, gather=Mailboxes(1).of(0))
