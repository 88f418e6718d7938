"""Do tokens that choose how often a shared block is applied learn more, at equal training FLOPs? (2507.10524)

A byte model on Python sources. Arms: layers that are all different; one block shared by three recursions, for all
tokens; and mixtures of recursions, whose cheaper steps buy more of them. What arms have in common starts from the same
weights for one seed. A model is judged as it would be used, token by token: by the threshold, without a look at later
bytes; what the choice of the k best would say is beside it.
"""

import keyword
import re
from operator import itemgetter

import torch
from torch import Tensor, nn

from workbench.beds.python_text import python_text
from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import Block, DecoderLM
from workbench.lib.core.observe import announcing, observing
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.sharing.mixture_of_recursions import (
    METHOD,
    ExpertChoiceMoR,
    RecursiveBlock,
    SharedStack,
    TokenChoiceMoR,
    mor_flops,
    shared_layers,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

ARMS = ("vanilla", "recursive", "expert", "token", "expert-share", "random")
#: Arms -> options of `ExpertChoiceMoR`; the others are plain stacks, and token choice.
EXPERT = {"expert": {}, "expert-share": {"kv": "share"}, "random": {"choice": "random"}}
BASELINES = ("vanilla", "recursive")
MARGIN = 0.02  # bits per byte: no more is lost to a transformer with a layer of its own at every depth
CLASSES = {"keyword": 0, "identifier": 1, "space": 2, "newline": 3, "other": 4}
SHOWN = 256  # bytes of test text whose depths are kept

RULE = (
    "The metric is bits per byte on the test split, by the threshold; all arms have the training FLOPs of vanilla; "
    "intervals are 95% paired intervals over seeds. (a) Depth by token gains: expert minus recursive lies below 0. "
    f"(b) Nothing is lost: the interval of expert minus vanilla ends below {MARGIN}. (c) It matters who is taken: "
    "expert minus random, the same capacities and gates with tokens that are drawn, lies below 0. Reproduced if all "
    f"hold. Not reproduced if the interval of (a) or (c) lies above 0, or that of (b) above {MARGIN}. Not resolved "
    "otherwise."
)

COMMON = {"n_heads": 4, "n_recursions": 3, "lr": 3e-3, "arms": ARMS}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 6, "batch_size": 4, "seq_len": 16, "cap": 65_536, "test_batches": 1}
    | {"d_model": 16, "d_hidden": 16, "n_layers": 5},
    "small": COMMON
    | {"seeds": 12, "steps": 150, "batch_size": 8, "seq_len": 64, "cap": 1_500_000, "test_batches": 8}
    | {"d_model": 48, "d_hidden": 96, "n_layers": 5},
    "full": COMMON
    | {"seeds": 3, "steps": 4000, "batch_size": 16, "seq_len": 128, "cap": 1_500_000, "test_batches": None}
    | {"d_model": 96, "d_hidden": 192, "n_layers": 8},
}


def build(arm: str, settings: Settings) -> DecoderLM:
    """The model of one arm, of `n_layers` layers where every token passes all recursions: 1 + R x shared + 1."""
    width, heads, n = settings["d_model"], settings["n_heads"], settings["n_recursions"]
    model = DecoderLM(256, width, 0, heads, nn.Identity, settings["seq_len"], learned_positions=False)
    order = shared_layers("middle-cycle", settings["n_layers"], 1 if arm == "vanilla" else n)
    layers = [
        Block(width, GLU(width, settings["d_hidden"]), Attention(width, heads, causal=True, rope=True))
        for _ in range(max(order) + 1)
    ]
    if arm in BASELINES:
        model.blocks = nn.ModuleList([SharedStack(layers, order)])
        return model
    first, *shared, last = layers
    block = RecursiveBlock(shared)
    mor = TokenChoiceMoR(block, n) if arm == "token" else ExpertChoiceMoR(block, n, **EXPERT[arm])
    model.blocks = nn.ModuleList([first, mor, last])
    return model


class Spent:
    """Counts what the recursions of a training cost; an observer."""

    def __init__(self, length: int):
        self.length, self.flops, self.steps = length, 0, 0

    def __call__(self, mor: nn.Module, routing: Routing, context: Context) -> None:
        if mor.training:
            active = routing.mask().view(-1, self.length, mor.n_recursions).sum(1).T
            self.flops += mor_flops(mor, active, self.length)
            self.steps += 1


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = python_text(settings)
    size, length, n = settings["batch_size"], settings["seq_len"], settings["n_recursions"]
    torch.manual_seed(seed)
    vanilla = training_budget(build("vanilla", settings), task, size, seed).flops
    # What token choice costs is known afterwards. It gets the steps of expert choice, whose shares of tokens in each
    # recursion are those that its balance loss asks for; "spent" says how it came out.
    budget = training_budget(build("expert" if arm == "token" else arm, settings), task, size, seed)
    steps = round(settings["steps"] * vanilla / budget.flops)
    torch.manual_seed(seed)
    model = build(arm, settings)
    found, spent = announcing(model), Spent(length)
    handles = [mor.observe(spent) for mor in found]
    config = TrainConfig(steps, size, settings["lr"], seed=seed, eval_every=max(1, steps // 5), eval_batches=2)
    history = train(model, task, config).history
    for handle in handles:
        handle.remove()
    extra = {"curve": [[made * budget.flops, metrics["bits_per_byte"]] for made, metrics in history]}
    torch.manual_seed(seed)  # who is taken at random is drawn in evaluation too
    bits, depths, text, _ = held_out(model, task, settings)
    if found:
        (mor,) = found
        balanced = torch.tensor([[max(1, (n - r) * length // n)] * size for r in range(n)])
        extra["spent"] = spent.flops / spent.steps / mor_flops(mor, balanced, length)
        extra |= depth_measures(depths, text, n)
        extra["cache"] = 1 / n if mor.kv == "share" else extra["mean_depth"] / n
    if arm in EXPERT:
        mor.evaluate_by = "top-k"
        flattered, _, _, accuracy = held_out(model, task, settings)
        extra |= {"top_k_bits": flattered, "gap": bits - flattered}
        extra |= {"sampling_accuracy": accuracy} if arm != "random" else {}
    return trained_row(arm, seed, budget, steps, bits, **extra)


def held_out(model: nn.Module, task: LanguageModelling, settings: Settings) -> tuple[float, Tensor, bytes, list[float]]:
    """Bits per byte of test text, the depths (N,) of its bytes, these bytes, and the share of candidates of each
    recursion but the first, which has all, that the threshold decides as they were decided; empty without recursions.
    """

    def keep(routing: Routing, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        return routing.mask(), routing.logits, context.token_ids

    with observing(announcing(model), keep) as seen:
        bits = task.evaluate(model, "test", settings["test_batches"])["bits_per_byte"]
    if not seen:
        return bits, torch.empty(0), b"", []
    mask, logits, ids = (torch.cat(parts) for parts in zip(*next(iter(seen.values())), strict=True))
    alike = [((logits > 0) == mask)[mask[:, r - 1], r].double().mean().item() for r in range(1, mask.shape[1])]
    return bits, mask.sum(1), bytes(ids.tolist()), alike


def depth_measures(depths: Tensor, text: bytes, n: int) -> dict:
    """What the depths of a text say: their mean, shares, means by class of bytes, and the first of them in full."""
    classes = byte_classes(text)
    return {
        "mean_depth": float(depths.double().mean()),
        "depth_shares": (torch.bincount(depths, minlength=n + 1) / len(depths)).tolist(),
        "depth_by_class": {
            name: float(depths[classes == i].double().mean()) for name, i in CLASSES.items() if (classes == i).any()
        },
        "text": text[:SHOWN].decode("latin-1"),
        "depths": "".join(map(str, depths[:SHOWN].tolist())),
    }


def byte_classes(text: bytes) -> Tensor:
    """(N,) the class of each byte of Python source, a number of `CLASSES`; words in strings and comments are words."""
    classes = torch.full((len(text),), CLASSES["other"])
    words = {word.encode() for word in keyword.kwlist}
    for found in re.finditer(rb"[A-Za-z_][A-Za-z_0-9]*|[ \t]+|[\r\n]+", text):
        word = found.group()
        kind = "newline" if word[:1] in b"\r\n" else "space" if word[:1] in b" \t" else "identifier"
        classes[found.start() : found.end()] = CLASSES["keyword" if word in words else kind]
    return classes


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gain, loss, choice = (rows.minus("expert", other) for other in ("recursive", "vanilla", "random"))
    verdict = decide(
        (REPRODUCED, gain.high < 0 and loss.high < MARGIN and choice.high < 0),
        (NOT_REPRODUCED, gain.low > 0 or loss.low > MARGIN or choice.low > 0),
    )
    routed = [arm for arm in rows.arms if arm not in BASELINES]
    reason = (
        f"Bits per byte, expert minus recursive {gain}, minus vanilla {loss} (to stay below {MARGIN}), minus random "
        f"{choice}; the k best would flatter expert by {rows.mean('expert', 'gap'):.3g}. The effect is expert minus "
        "recursive."
    )
    details = {
        "expert_minus": {arm: rows.minus("expert", arm) for arm in rows.arms if arm != "expert"},
        "recursive_minus_vanilla": rows.minus("recursive", "vanilla"),
        "gap": {arm: rows.interval(rows.of(arm, "gap")) for arm in EXPERT},
        "mean_depth": {arm: rows.mean(arm, "mean_depth") for arm in routed},
        "spent": {arm: rows.mean(arm, "spent") for arm in routed},
    }
    return Judgement.on(gain, verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="bits_per_byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    tested="Recursions for the tokens that a learned router takes give, at equal training FLOPs and judged without a "
    "look at later bytes, a better language model than the same recursions for all tokens or for drawn ones, and no "
    "worse a one than layers that are not shared.",
    power=Power(BASELINES, effect=MARGIN, deviation={"small": (0.0217, 12)}),
    main="expert",
)
