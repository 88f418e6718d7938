"""The real server: what threads and pages give out is what the plain model says, whatever the schedule."""

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.serving.calibration import calibrate
from workbench.lib.serving.moe_lens import PipelineSim, Requests, TinyOffloadServer, n_star, predict
from workbench.lib.serving.pipeline import LANES

VOCAB, WIDTH = 50, 16


def lm(rope: bool = True, layers: int = 3) -> DecoderLM:
    torch.manual_seed(0)

    def ffn(layer: int) -> nn.Module:
        return MoELayer(LinearRouter(WIDTH, 4, 2), GLUExperts(4, WIDTH, 8))

    def attention(layer: int) -> nn.Module:
        return Attention(WIDTH, 2, causal=True, rope=rope)

    model = DecoderLM(VOCAB, WIDTH, layers, 2, ffn, 64, attention, learned_positions=not rope)
    for block in model.blocks:  # decided routers: a tie would be decided by rounding
        nn.init.normal_(block.ffn.router.projection.weight, std=1.0)
    return model


def requests(count: int = 6) -> tuple[list[list[int]], list[int]]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 24, (count,), generator=draw).tolist()
    prompts = [torch.randint(VOCAB, (n,), generator=draw).tolist() for n in lengths]
    return prompts, torch.randint(1, 20, (count,), generator=draw).tolist()


@pytest.fixture(scope="module")
def served():
    """Each schedule of the same requests, in memory for two or three of them."""
    prompts, generate = requests()
    server = TinyOffloadServer(lm(), n_pages=14, page=4, link_bandwidth=1e9)
    ways = [{"admission": a, "mode": m, "groups": g} for a, m, g in (
        ("peak", "mixed", 2), ("headroom", "mixed", 2), ("peak", "separate", 2), ("peak", "mixed", 1),
    )]  # fmt: skip
    return prompts, generate, {tuple(way.values()): server.serve(prompts, generate, 40, **way) for way in ways}


def test_logits_are_those_of_the_plain_model_in_every_schedule(served):
    prompts, generate, found = served
    model = lm()
    for way, result in found.items():
        for prompt, g, tokens, logits in zip(prompts, generate, result.tokens, result.logits, strict=True):
            assert len(tokens) == g and logits.shape == (g, VOCAB)
            with torch.no_grad():
                whole = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5, msg=str(way))
            assert logits.argmax(-1).tolist() == tokens


def test_who_is_turned_out_says_the_same_in_the_end():
    """Pages of two tokens, so that one page kept free for each request is soon too little."""
    prompts, server = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], TinyOffloadServer(lm(), 9, 2, 1e9)
    peak, headroom = (server.serve(prompts, [8] * 3, 100, admission=name) for name in ("peak", "headroom"))
    assert [step.preempted for step in headroom.passes if step.preempted] == [(2,), (1,)]
    assert not any(step.preempted for step in peak.passes)
    assert headroom.tokens == peak.tokens
    for a, b in zip(headroom.logits, peak.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_passes_mix_prefills_and_decodes_and_every_event_is_there(served):
    _, _, found = served
    result = found["peak", "mixed", 2]
    assert any(len({share.decodes for share in step.shares}) == 2 for step in result.passes)
    assert result.timeline.resources == LANES and result.timeline.overlaps() == []
    assert result.timeline.basis.startswith("measured on ")
    model = PipelineSim(_Ones()).run(result.passes)
    assert sorted(e.name for e in model.events) == sorted(e.name for e in result.timeline.events)
    assert result.throughput == pytest.approx(sum(map(len, result.tokens)) / result.seconds)


class _Ones:
    basis, layers = "simulated, calibrated by a test", 3

    def load(self):
        return 1.0

    qkv = moe = head = attend = lambda self, shares: 1.0

    def host(self, shares):
        return 0.0

    def crowded(self, device, attention):
        return device, attention


def test_a_run_is_no_faster_than_its_link(served):
    prompts, generate = requests(4)
    server = TinyOffloadServer(lm(), n_pages=40, page=4, link_bandwidth=2e6)
    result = server.serve(prompts, generate, 60)
    n_bytes = sum(p.numel() * 4 for p in server.model.blocks[0].parameters())
    assert result.seconds >= 3 * len(result.passes) * n_bytes / 2e6


def test_learned_positions_and_dense_blocks_are_served_too():
    torch.manual_seed(0)
    model = DecoderLM(VOCAB, WIDTH, 2, 2, lambda layer: GLU(WIDTH, 8), 32)
    result = TinyOffloadServer(model, 10, 4, 1e9).serve([[1, 2, 3], [4]], [4, 6], 20)
    with torch.no_grad():
        whole = model(torch.tensor([[1, 2, 3, *result.tokens[0]]]))[0, 2:-1]
    torch.testing.assert_close(result.logits[0], whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keys_and_values_have_the_type_of_the_model(dtype):
    torch.manual_seed(0)
    model = DecoderLM(VOCAB, WIDTH, 2, 2, lambda layer: GLU(WIDTH, 8), 32).to(dtype)
    result = TinyOffloadServer(model, 10, 4, 1e9).serve([[1, 2, 3]], [4], 20)
    with torch.no_grad():
        whole = model(torch.tensor([[1, 2, 3, *result.tokens[0]]]))[0, 2:-1]
    assert result.logits[0].dtype == dtype
    near = 0.1 if dtype is torch.bfloat16 else 1e-12
    torch.testing.assert_close(result.logits[0], whole, atol=near, rtol=near)


def test_a_process_of_its_own_attends_as_the_thread_does_and_can_be_calibrated(served):
    prompts, generate, found = served
    with TinyOffloadServer(lm(), 24, 4, 1e8, apart=20) as server:
        result = server.serve(prompts, generate, 40)
        assert result.tokens == found["peak", "mixed", 2].tokens
        with pytest.raises(InputError, match="21 requests in 2 groups but apart = 20"):
            server.serve([[1]] * 21, [1] * 21, 40)
        costs = calibrate(server, max_tokens=32, repeats=5)
    assert not server.attendant._process.is_alive()
    assert costs.layers == 3 and costs.layer_bytes == server.stored[0].nbytes and min(costs.crowd) >= 1
    assert costs.load() >= costs.layer_bytes / 1e8 and n_star(costs) >= 1
    foreseen = predict(costs, result.passes, Requests(tuple(map(len, prompts)), tuple(generate)))
    assert foreseen.seconds > 0 and "(measured)" in foreseen.basis


def test_a_fault_in_a_thread_is_raised_and_leaves_no_thread_waiting(monkeypatch):
    from workbench.lib.serving import offload

    def broken(*_):
        raise ZeroDivisionError("attention broke")

    monkeypatch.setattr(offload, "attend", broken)
    with pytest.raises(ZeroDivisionError, match="attention broke"):
        TinyOffloadServer(lm(), 24, 4, 1e9).serve(*requests(6), 40)


def with_layers(*kinds) -> DecoderLM:
    model = lm()
    for block, change in zip(model.blocks, kinds, strict=False):
        change(block)
    return model


def not_causal(block):
    block.attention.causal = False


def buffered(block):
    block.register_buffer("count", torch.zeros(1))


def larger(block):
    block.ffn = GLU(WIDTH, 9)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: TinyOffloadServer(lm(layers=1), 8, 4, 1e9), "model has 1 layers but must have at least 2"),
        (lambda: TinyOffloadServer(with_layers(not_causal), 8, 4, 1e9), "layer 0 but must have causal Attention"),
        (lambda: TinyOffloadServer(with_layers(buffered), 8, 4, 1e9), "buffers in layer 0"),
        (lambda: TinyOffloadServer(with_layers(larger), 8, 4, 1e9), "layers of different sizes"),
        (lambda: TinyOffloadServer(lm(), 0, 4, 1e9), "n_pages is 0"),
        (lambda: TinyOffloadServer(lm(), 8, 4, -1), "bandwidth is -1"),
        (lambda: TinyOffloadServer(lm(), 8, 4, 1e9).serve([], [], 9), "at least one"),
        (lambda: TinyOffloadServer(lm(), 8, 4, 1e9).serve([[]], [1], 9), "prompts holds 0"),
        (lambda: TinyOffloadServer(lm(), 8, 4, 1e9).serve([[1, 50]], [1], 9), "token 50 but tokens are 0 to 49"),
        (lambda: TinyOffloadServer(lm(), 99, 4, 1e9).serve([[1] * 60], [6], 9), "the model takes 64"),
        (lambda: TinyOffloadServer(lm(), 2, 4, 1e9).serve([[1] * 8], [2], 9), "request 0 alone needs 3 pages"),
    ],
)
def test_what_cannot_be_served_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()
