"""Do small key blocks, and a convolution on keys, let MoBA find what dense attention finds? (2511.11571)

A byte model learns `beds.fact_recall`, Python sources with facts that are asked for later. Layer 0 is a sliding window
of 32; layer 1 is what the arms differ in. There keys are made of the previous token's representation, and start with
the weights of the queries: an attention that looks for a token and returns the one after it. Recall is then learnt
within a hundred steps (tried with the dense arm alone), and what is left to tell the arms apart is whether the block of
the fact is chosen. All block arms visit equally many keys.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds.fact_recall import FactRecall, fact_recall
from workbench.kernels.block_sparse_attention.index import BlockIndex, block_table, token_blocks
from workbench.lib.attention.moa import MoA
from workbench.lib.attention.moa_plan import SpanRule
from workbench.lib.attention.moba import METHOD, MoBA, retrieval_fail_prob, simulate_retrieval, snr
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Context
from workbench.lib.core.train import TrainConfig, train
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

MARGIN = 0.05  # accuracy: as near as this is near dense
LEARNT = 0.5  # below this accuracy of the dense arm there is nothing to compare
AGREES = 0.015  # difference of a simulated from a computed probability, at 4,000 trials or more
WINDOW = 32
SHARPER = 2.0  # factor on the first weights of queries and keys in layer 1

RULE = (
    "The metric is the share of facts recalled on test text; intervals are 95% paired intervals over seeds. "
    "(a) Small blocks: the smallest block minus the largest, at equally many keys visited, lies above 0. "
    "(b) The convolution: the smallest block with it minus without it lies above 0. "
    f"(c) Near dense: dense minus the smallest block with the convolution lies below {MARGIN}. "
    "(d) Theory: the simulated probability that another block wins is that of the formula, Phi(-SNR), within "
    f"{AGREES} at every block size. Reproduced if all hold. Not reproduced if (a) or (b) lies below 0, (c) lies above "
    f"{MARGIN}, or (d) fails. Not resolved otherwise, or if dense attention recalls less than {LEARNT:.0%}."
)

THEORY = {"head_dim": 64, "gap": 0.8, "blocks": (16, 32, 64, 128, 256), "trials": 8000}
COMMON = {"d_model": 64, "n_heads": 2, "lr": 3e-3, "cap": 1_500_000, "recall_weight": 1.0, "theory": THEORY}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 6, "batch_size": 4, "seq_len": 64, "blocks": (16, 4), "keys": 32, "facts": 4}
    | {"d_model": 16, "cap": 65_536, "test_rows": 8}
    | {"theory": THEORY | {"blocks": (16, 32), "trials": 4000}},
    "small": COMMON
    | {"seeds": 12, "steps": 100, "batch_size": 8, "seq_len": 512, "blocks": (64, 32, 16), "keys": 128, "facts": 16}
    | {"test_rows": 128},
    "full": COMMON
    | {"seeds": 3, "steps": 1000, "batch_size": 16, "seq_len": 1024, "blocks": (128, 64, 32, 16), "keys": 256}
    | {"facts": 32, "test_rows": 512},
}


def arms(settings: Settings) -> list[str]:
    """Dense; each block size, the smallest with and without the convolution, and with random blocks."""
    sizes = settings["blocks"]
    return ["dense", *(f"moba-{size}" for size in sizes), f"moba-{sizes[-1]}-kconv", f"random-{sizes[-1]}"]


class Finder(MoBA):
    """MoBA that looks for a token and returns the next: the key of a position is made of the position before it."""

    def __init__(self, d_model: int, n_heads: int, **options):
        super().__init__(d_model, n_heads, **options)
        with torch.no_grad():
            query = self.qkv.weight[:d_model].mul_(SHARPER)
            self.qkv.weight[d_model : 2 * d_model] = query

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        k = self.kconv(F.pad(k, (0, 0, 0, 0, 1, -1)))
        return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


class RandomFinder(Finder):
    """The same with earlier blocks drawn at random, anew in each pass."""

    def choose(self, q: Tensor, k: Tensor, sequences: Tensor | None) -> BlockIndex:
        starts, lengths = block_table(len(q), self.block_size, sequences, q.device)
        own, first = (x[:, None, None] for x in token_blocks(len(q), starts, lengths, sequences))
        n = int((own - first).max()) + 1
        block = first + torch.arange(n, dtype=torch.int32)
        score = torch.rand(*q.shape[:2], n).masked_fill(block > own, -1).masked_fill(block == own, 2)
        best = score.topk(min(self.blocks_per_query, n), dim=-1)
        blocks = torch.where(best.values >= 0, best.indices + first, -1).int()
        return BlockIndex.from_blocks(blocks, self.block_size, sequences)


def build(arm: str, settings: Settings) -> DecoderLM:
    """The model of one arm. Weights that all have are drawn alike."""
    width, heads, length = settings["d_model"], settings["n_heads"], settings["seq_len"]
    kind, _, rest = arm.partition("-")
    size = length if kind == "dense" else int(rest.split("-")[0])  # dense attention is one block
    options = {"block_size": size, "top_k": 1 if kind == "dense" else settings["keys"] // size, "seq_len": length}
    finder = RandomFinder if kind == "random" else Finder

    def attention(layer: int) -> nn.Module:
        if layer == 0:
            return MoA(width, heads, SpanRule(WINDOW, 0, sink=0), rope=True)
        return finder(width, heads, kconv=3 if arm.endswith("kconv") else 0, **options)

    return DecoderLM(256, width, 2, heads, lambda _: GLU(width, width), length, attention, learned_positions=False)


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = fact_recall(settings)
    torch.manual_seed(seed)
    model = build(arm, settings)
    config = TrainConfig(settings["steps"], settings["batch_size"], settings["lr"], seed=seed, eval_every=None)
    budget = training_budget(model, task, config.batch_size, seed)
    train(model, task, config)
    torch.manual_seed(seed)  # of random blocks in the evaluation
    drawn = task.evaluate(model, "test") if arm.startswith("random") else {}  # before more are drawn to be counted
    found = held_out(model, task) | drawn
    return trained_row(arm, seed, budget, config.steps, found.pop("recall"), **found)


def held_out(model: DecoderLM, task: FactRecall) -> dict[str, float | str]:
    """The task's evaluation on test text, and what the last layer chooses in it: how often the block of the fact is
    among those chosen at the question (mean over questions and heads), and the signal-to-noise ratio of that choice:
    mean over deviation of q . (c* - c_j), over the other earlier blocks j.
    """
    finder, places = model.blocks[1].attention, task.held_out("test")
    hits, gaps = [], []

    def look(_: nn.Module, inputs: tuple[Tensor, Context], output: Tensor) -> None:
        _, question, value = next(places)
        rows, time, size = *inputs[0].shape[:2], finder.block_size
        q, k, _ = finder.heads(inputs[0])
        sequences = torch.arange(0, rows * time + 1, time, dtype=torch.int32)
        blocks = finder.choose(q, k, sequences).blocks.unflatten(0, (rows, time))
        n = math.ceil(time / size)
        local = torch.where(blocks < 0, -1, blocks % n)
        row = torch.arange(rows)[:, None]
        wanted = value // size
        earlier = wanted < question // size
        hits.append((local[row, question] == wanted[..., None, None]).any(-1) | ~earlier[..., None])
        centres = F.pad(k.unflatten(0, (rows, time)), (0, 0, 0, 0, 0, n * size - time)).unflatten(1, (n, size)).mean(2)
        scores = torch.einsum("rfhd,rnhd->rfhn", q.unflatten(0, (rows, time))[row, question], centres)
        gap = scores.gather(3, wanted[..., None, None].expand(-1, -1, finder.n_heads, 1)) - scores
        other = (torch.arange(n) < (question // size)[..., None]) & (torch.arange(n) != wanted[..., None])
        gaps.append(gap[(other & earlier[..., None])[:, :, None].expand_as(gap)])

    with finder.register_forward_hook(look):
        found = task.evaluate(model, "test")
    hit, gap = torch.cat(hits), torch.cat(gaps)
    ratio = float(gap.mean() / gap.std()) if len(gap) > 1 else math.inf  # one block: there is no choice
    return found | {"block_recall": int(hit.sum()) / hit.numel(), "snr": ratio if math.isfinite(ratio) else "none"}


def theory(settings: Settings) -> dict[str, list[float]]:
    """The probability that one other block wins, by the formula and by simulation, for each block size."""
    t = settings["theory"]
    generator = torch.Generator().manual_seed(0)
    computed = [retrieval_fail_prob(snr(t["gap"], t["head_dim"], size)) for size in t["blocks"]]
    simulated = [simulate_retrieval((t["gap"],), t["head_dim"], size, t["trials"], generator) for size in t["blocks"]]
    return {"blocks": list(t["blocks"]), "formula": computed, "simulated": simulated}


def judge(rows: Rows, settings: Settings, probabilities: dict[str, list[float]] | None = None) -> Judgement:
    """Apply `RULE`; `probabilities` in place of those of `theory`."""
    probabilities = theory(settings) if probabilities is None else probabilities
    large, small = (f"moba-{size}" for size in (settings["blocks"][0], settings["blocks"][-1]))
    smaller, conv = rows.minus(small, large), rows.minus(f"{small}-kconv", small)
    short = rows.minus("dense", f"{small}-kconv")
    worst = max(abs(a - b) for a, b in zip(probabilities["formula"], probabilities["simulated"], strict=True))
    dense = rows.mean("dense")
    learnt = dense >= LEARNT
    verdict = decide(
        (NOT_REPRODUCED, worst > AGREES or (learnt and (smaller.high < 0 or conv.high < 0 or short.low > MARGIN))),
        (REPRODUCED, learnt and smaller.low > 0 and conv.low > 0 and short.high < MARGIN),
    )
    reason = (
        f"Share recalled, {small} minus {large} {smaller}, convolution {conv}, dense minus "
        f"{small}-kconv {short}; dense recalls {dense:.3f}. Simulation and formula "
        f"differ by at most {worst:.4f}. The effect is {small} minus {large}."
    )
    clear = [arm for arm in rows.arms if all(isinstance(ratio, float) for ratio in rows.of(arm, "snr"))]
    details = {
        "recall": rows.means(),
        "block_recall": rows.means("block_recall"),
        "snr": rows.means("snr", clear),
        "bits_per_byte": rows.means("bits_per_byte"),
        "chosen_minus_random": rows.minus(small, small.replace("moba", "random")),
        "convolution": conv,
        "dense_minus_sparse": short,
        "theory": probabilities,
    }
    return Judgement.on(smaller, verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="recall",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
    tested="Small key blocks, at equally many keys visited, and a short convolution on keys raise the signal-to-noise "
    "ratio of block selection until sparse attention recalls as dense attention does.",
    power=Power(("dense", "moba-64", "random-16"), effect=0.2, deviation={"small": (0.0692, 12)}),
    main=lambda settings: f"moba-{settings['blocks'][-1]}",
)
