"""Do small key blocks, and a convolution on keys, let MoBA find what dense attention finds? (2511.11571)

A byte model on Python sources into which facts are written, a key byte and a value byte side by side, and asked for
later by their keys. Layer 0 is a sliding window of 32; layer 1 is what the arms differ in. There keys are made of the
previous token's representation, and start with the weights of the queries: an attention that looks for a token and
returns the one after it. Recall is then learnt within a hundred steps (tried with the dense arm alone), and what is
left to tell the arms apart is whether the block of the fact is chosen. All block arms visit equally many keys.
"""

import math
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.kernels.block_sparse_attention.index import BlockIndex, block_table, token_blocks
from workbench.lib import data
from workbench.lib.attention.moa import MoA
from workbench.lib.attention.moa_plan import SpanRule
from workbench.lib.attention.moba import MoBA, retrieval_fail_prob, simulate_retrieval, snr
from workbench.lib.core.budget import measure_budget
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Context
from workbench.lib.core.task import EVALUATION_BATCH, Batch, device_of
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.measures.statistics import paired_interval
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

MARGIN = 0.05  # accuracy: as near as this is near dense
LEARNT = 0.5  # below this accuracy of the dense arm there is nothing to compare
AGREES = 0.015  # difference of a simulated from a computed probability, at 4,000 trials or more
SYMBOLS = 64  # keys, and values: the bytes from 128 and from 192, which the text is freed from
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

COMMON = {
    "d_model": 64,
    "n_heads": 2,
    "lr": 3e-3,
    "cap": 1_500_000,
    "recall_weight": 1.0,
    "theory": {"head_dim": 64, "gap": 0.8, "blocks": (16, 32, 64, 128, 256), "trials": 8000},
}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 6, "batch_size": 4, "seq_len": 64, "blocks": (16, 4), "keys": 32, "facts": 4}
    | {"d_model": 16, "cap": 65_536, "test_rows": 8}
    | {"theory": COMMON["theory"] | {"blocks": (16, 32), "trials": 4000}},
    "small": COMMON
    | {"seeds": 3, "steps": 100, "batch_size": 8, "seq_len": 512, "blocks": (64, 32, 16), "keys": 128, "facts": 16}
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


class Recall:
    """Text with facts in its first three quarters and a question for each in the last; see the module's docstring.

    Args:
        seq_len: T; a multiple of 8.
        facts: F of a row, each asked for once.
        weight: of the mean loss on the answers, beside the mean loss on all bytes.
        test_rows: rows of an evaluation; the same ones each time.
    """

    name, domains, metric, unit, higher_is_better = "recall", ("python",), "recall", "fraction", True

    def __init__(self, text: "data.TextDomains", seq_len: int, facts: int, weight: float, test_rows: int):
        if seq_len % 8 or not 1 <= facts <= min(seq_len // 8, SYMBOLS):
            raise InputError(
                f"seq_len is {seq_len} and facts is {facts} but must be a multiple of 8 and at least 1 and at most "
                f"{min(seq_len // 8, SYMBOLS)}"
            )
        self.manifest, self.seq_len, self.facts, self.weight, self.test_rows = (
            text.manifest,
            seq_len,
            facts,
            weight,
            test_rows,
        )
        self.text = {
            split: torch.where(part["python"] < 128, part["python"], ord("?")) for split, part in text.splits.items()
        }

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        return self.rows(split, size, generator)[0]

    def rows(self, split: str, size: int, generator: torch.Generator) -> tuple[Batch, Tensor, Tensor]:
        """A batch, and of each question (size, F) where it stands and where the value of its fact stands."""
        text, t, f = self.text[split], self.seq_len, self.facts
        start = torch.randint(len(text) - t, (size, 1), generator=generator)
        rows = text[start + torch.arange(t + 1)].long()

        def distinct(among: int) -> Tensor:
            return torch.rand(size, among, generator=generator).argsort(1)[:, :f]

        key, value = 128 + distinct(SYMBOLS), 192 + torch.randint(SYMBOLS, (size, f), generator=generator)
        fact, question = 2 * distinct(3 * t // 8), 2 * distinct(t // 8) + 3 * t // 4
        for place in (fact, question):
            rows.scatter_(1, place, key).scatter_(1, place + 1, value)
        return Batch(rows[:, :-1], rows[:, 1:], torch.zeros(size, dtype=torch.int64)), question, fact + 1

    def held_out(self, split: str) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for first in range(0, self.test_rows, EVALUATION_BATCH):
            yield self.rows(split, min(EVALUATION_BATCH, self.test_rows - first), generator)

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        for batch, _, _ in self.held_out(split):
            yield from (
                Batch(*parts)
                for parts in zip(
                    batch.inputs.split(size), batch.targets.split(size), batch.domain.split(size), strict=True
                )
            )

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        batch, context = batch.to(device_of(model)), Context()
        losses = F.cross_entropy(model(batch.inputs, context).transpose(1, 2), batch.targets, reduction="none")
        answers = answered(batch)
        return losses.mean() + self.weight * (losses * answers).sum() / answers.sum(), context

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        right = asked = bits = plain = 0
        training = model.training
        model.eval()
        for batch, _, _ in self.held_out(split):
            batch = batch.to(device_of(model))
            logits, answers = model(batch.inputs, Context()), answered(batch)
            right += int(((logits.argmax(-1) == batch.targets) & answers).sum())
            asked += int(answers.sum())
            text = (batch.inputs < 128) & (batch.targets < 128)
            losses = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none") / math.log(2)
            bits, plain = bits + float((losses * text).sum()), plain + int(text.sum())
        model.train(training)
        return {"recall": right / asked, "bits_per_byte": bits / plain}


def answered(batch: Batch) -> Tensor:
    """(B, T) True where the next byte is the answer to a question."""
    late = torch.arange(batch.inputs.shape[1], device=batch.inputs.device) >= 3 * batch.inputs.shape[1] // 4
    return late & (batch.targets >= 192)


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
    text = data.load("text-domains", domains=("python",), cap=settings["cap"])
    task = Recall(text, settings["seq_len"], settings["facts"], settings["recall_weight"], settings["test_rows"])
    torch.manual_seed(seed)
    model = build(arm, settings)
    config = TrainConfig(settings["steps"], settings["batch_size"], settings["lr"], seed=seed)
    budget = measure_budget(model, task, task.batch("train", config.batch_size, torch.Generator().manual_seed(seed)))
    train(model, task, config)
    torch.manual_seed(seed)  # of random blocks in the evaluation
    found = task.evaluate(model, "test")
    return Row(
        arm=arm,
        seed=seed,
        params=budget.params,
        active_params=budget.active_params,
        flops=budget.flops * config.steps,
        steps=config.steps,
        metric=found["recall"],
        extra={"bits_per_byte": found["bits_per_byte"], **selection(model, task)},
    )


@torch.no_grad()
def selection(model: DecoderLM, task: Recall) -> dict[str, float | str]:
    """How often the block of the fact is among those chosen at the question (mean over questions and heads), and the
    signal-to-noise ratio of that choice: mean over deviation of q . (c* - c_j), over the other earlier blocks j.
    """
    finder, seen = model.blocks[1].attention, []
    handle = finder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.eval()
    chosen, total, gaps = 0, 0, []
    for batch, question, value in task.held_out("test"):
        seen.clear()
        model(batch.inputs, Context())
        rows, time, size = *batch.inputs.shape, finder.block_size
        q, k, _ = finder.heads(seen[0])
        sequences = torch.arange(0, rows * time + 1, time, dtype=torch.int32)
        blocks = finder.choose(q, k, sequences).blocks.unflatten(0, (rows, time))
        n = math.ceil(time / size)
        local = torch.where(blocks < 0, -1, blocks % n)
        row = torch.arange(rows)[:, None]
        wanted = value // size
        earlier = wanted < question // size
        hit = (local[row, question] == wanted[..., None, None]).any(-1) | ~earlier[..., None]
        chosen, total = chosen + int(hit.sum()), total + hit.numel()
        centres = F.pad(k.unflatten(0, (rows, time)), (0, 0, 0, 0, 0, n * size - time)).unflatten(1, (n, size)).mean(2)
        scores = torch.einsum("rfhd,rnhd->rfhn", q.unflatten(0, (rows, time))[row, question], centres)
        gap = scores.gather(3, wanted[..., None, None].expand(-1, -1, finder.n_heads, 1)) - scores
        other = (torch.arange(n) < (question // size)[..., None]) & (torch.arange(n) != wanted[..., None])
        gaps.append(gap[(other & earlier[..., None])[:, :, None].expand_as(gap)])
    handle.remove()
    gaps = torch.cat(gaps)
    ratio = float(gaps.mean() / gaps.std()) if len(gaps) > 1 else math.inf  # one block: there is no choice
    return {"block_recall": chosen / total, "snr": ratio if math.isfinite(ratio) else "none"}


def theory(settings: Settings) -> dict[str, list[float]]:
    """The probability that one other block wins, by the formula and by simulation, for each block size."""
    t = settings["theory"]
    generator = torch.Generator().manual_seed(0)
    computed = [retrieval_fail_prob(snr(t["gap"], t["head_dim"], size)) for size in t["blocks"]]
    simulated = [simulate_retrieval((t["gap"],), t["head_dim"], size, t["trials"], generator) for size in t["blocks"]]
    return {"blocks": list(t["blocks"]), "formula": computed, "simulated": simulated}


def judge(rows: list[Row], settings: Settings, probabilities: dict[str, list[float]] | None = None) -> Judgement:
    """Apply `RULE`; `probabilities` in place of those of `theory`."""
    probabilities = theory(settings) if probabilities is None else probabilities
    recall = {arm: [row.metric for row in rows if row.arm == arm] for arm in arms(settings)}
    large, small = (f"moba-{size}" for size in (settings["blocks"][0], settings["blocks"][-1]))
    smaller = paired_interval(recall[small], recall[large])
    conv = paired_interval(recall[f"{small}-kconv"], recall[small])
    short = paired_interval(recall["dense"], recall[f"{small}-kconv"])
    worst = max(abs(a - b) for a, b in zip(probabilities["formula"], probabilities["simulated"], strict=True))
    learnt = statistics.fmean(recall["dense"]) >= LEARNT
    if worst > AGREES or (learnt and (smaller.high < 0 or conv.high < 0 or short.low > MARGIN)):
        verdict = NOT_REPRODUCED
    elif learnt and smaller.low > 0 and conv.low > 0 and short.high < MARGIN:
        verdict = REPRODUCED
    else:
        verdict = NOT_RESOLVED
    blocks = {arm: statistics.fmean(row.extra["block_recall"] for row in rows if row.arm == arm) for arm in recall}
    ratios = {
        arm: statistics.fmean(row.extra["snr"] for row in rows if row.arm == arm)
        for arm in recall
        if all(isinstance(row.extra["snr"], float) for row in rows if row.arm == arm)
    }
    reason = (
        f"Share recalled, {small} minus {large} {smaller}, convolution {conv}, dense minus "
        f"{small}-kconv {short}; dense recalls {statistics.fmean(recall['dense']):.3f}. Simulation and formula "
        f"differ by at most {worst:.4f}. The effect is {small} minus {large}."
    )
    details = {
        "recall": {arm: statistics.fmean(values) for arm, values in recall.items()},
        "block_recall": blocks,
        "snr": ratios,
        "bits_per_byte": {
            arm: statistics.fmean(row.extra["bits_per_byte"] for row in rows if row.arm == arm) for arm in recall
        },
        "chosen_minus_random": paired_interval(recall[small], recall[small.replace("moba", "random")]).as_dict(),
        "convolution": conv.as_dict(),
        "dense_minus_sparse": short.as_dict(),
        "theory": probabilities,
    }
    return Judgement(verdict, smaller.estimate, (smaller.low, smaller.high), reason, details)


STUDY = Study(
    slug="moba",
    title="Optimizing Mixture of Block Attention (MoBA, FlashMoBA)",
    claim="Small key blocks, at equally many keys visited, and a short convolution on keys raise the signal-to-noise "
    "ratio of block selection until sparse attention recalls as dense attention does.",
    metric="recall",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
