"""What the routers of a model decide, counted over the training batch of one step and over an evaluation."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from workbench.lib.core.recompute import recomputing
from workbench.lib.core.routing import Context, Routing
from workbench.lib.measures.coactivation import pair_sums
from workbench.lib.measures.meters import RoutingMeter
from workbench.lib.measures.routing import counts_by_class, effective_support_size
from workbench.live.probes.find import Block, Inputs, pools
from workbench.live.records import (
    AGREEMENT,
    COACTIVATION,
    CONFIDENCE,
    DEPTH,
    DEPTH_TEXT,
    DIVISIONS,
    DROPPED,
    ENTROPY,
    IMPORTANCE,
    LOAD,
    PROBABILITY_SUPPORT,
    SUPPORT,
    TOKENS,
    TRANSITION,
    Record,
    on_validation,
)

LARGEST_TABLE = 2**17
"""Cells of the largest tables that are kept: experts by token ids, and pairs of experts by domains or modalities."""

TEXT = 256
"""Tokens of a batch whose depths are kept one by one."""

Values = tuple[dict[str, float], dict[str, np.ndarray]]


class _Tally:
    """Sums over batches: what `RoutingMeter` holds, loads and pairs by part, and the effective support sizes."""

    def __init__(self, found: list[Block], parts: Mapping[str, int], pairs: bool):
        self.meter = RoutingMeter([block.name for block in found], [block.n_experts for block in found], None)
        self.load = {block.name: torch.zeros(block.n_experts, dtype=torch.int64) for block in found}
        self.parts = {name: _Parts(found, n, pairs) for name, n in parts.items() if n}
        self.support: dict[str, tuple[float, int]] = {}  # by series: sum over tokens and their number
        self.pools = [_Agreement(name, users) for name, users in pools(found).items()]
        self.depth = {b.name: torch.zeros(b.n_experts + 1, dtype=torch.int64) for b in found if b.recursive}
        self.text: dict[str, np.ndarray] = {}  # of the first batch
        self.tokens = 0

    def __iadd__(self, other: "_Tally") -> "_Tally":
        """With what another process has counted of its share of the same batches."""
        self.meter = self.meter + other.meter
        self.tokens += other.tokens
        for mine, its in ((self.load, other.load), (self.depth, other.depth)):
            for name in mine:
                mine[name] += its[name]
        for name, part in self.parts.items():
            for mine, its in ((part.load, other.parts[name].load), (part.pairs, other.parts[name].pairs)):
                for layer in mine:
                    mine[layer] += its[layer]
        for series, (total, tokens) in other.support.items():
            before, n = self.support.get(series, (0.0, 0))
            self.support[series] = (before + total, n + tokens)
        for pool, its in zip(self.pools, other.pools, strict=True):
            pool.counts += its.counts
        return self

    def add(self, block: Block, routing: Routing, context: Context) -> None:
        self.tokens += routing.n_tokens
        self.load[block.name] += routing.counts.cpu()
        if routing.top_k is not None:
            kept = None if routing.kept is None else routing.kept.view(routing.n_tokens, routing.top_k)
            self.meter.update(block.name, routing.indices, routing.probs, kept)
        else:
            kept = None if routing.kept is None else _mask(routing, routing.kept)
            self.meter.update(block.name, routing.mask(), routing.probs, kept)
        for pool in self.pools:
            pool.add(block, routing)
        served = routing.weights if routing.top_k is not None and routing.kept is None else routing.dense()
        self._add_support(SUPPORT.name(block.name), served)
        if routing.probs is not None:
            self._add_support(PROBABILITY_SUPPORT.name(block.name), routing.probs)
        for name, part in self.parts.items():
            if (label := getattr(context, name)) is not None:
                part.add(block, routing, label.to(routing.expert.device))
        if block.recursive:
            self._add_depth(block, routing.active_counts.cpu(), context.token_ids)

    def _add_depth(self, block: Block, depth: Tensor, ids: Tensor | None) -> None:
        self.depth[block.name] += torch.bincount(depth, minlength=block.n_experts + 1)
        if ids is not None and block.name not in self.text:
            text = np.full((2, TEXT), -1, dtype=np.int32)
            text[:, : len(depth)] = torch.stack([ids.cpu(), depth])[:, :TEXT].numpy()
            self.text[block.name] = text

    def _add_support(self, series: str, weights: Tensor) -> None:
        sizes = effective_support_size(weights.detach())
        sizes = sizes[sizes.isfinite()]  # a token without any expert has none
        total, tokens = self.support.get(series, (0.0, 0))
        self.support[series] = (total + float(sizes.sum()), tokens + len(sizes))

    def support_sizes(self, name: str) -> dict[str, float]:
        """Mean effective support size of the weights and of the probabilities, as far as they were seen."""
        series = (SUPPORT.name(name), PROBABILITY_SUPPORT.name(name))
        found = {one: self.support.get(one, (0.0, 0)) for one in series}
        return {one: total / tokens for one, (total, tokens) in found.items() if tokens}

    def loads(self, name: str) -> dict[Record, np.ndarray]:
        """The `records.LOADS` of one layer, as far as they were seen."""
        counts = self.meter.counts(name)
        found = {LOAD: _uint32(self.load[name])}
        if counts.probabilities:
            found[IMPORTANCE] = self.meter.importance(name).numpy().astype(np.float32)
        for division, part in self.parts.items():
            if part.load[name].any():
                found[DIVISIONS[division].load] = _uint32(part.load[name])
        if name in self.depth:
            found[DEPTH] = _uint32(self.depth[name])
        return found


class _Parts:
    """Assignments by the parts of one division, domains or modalities, and pairs of experts by them.

    Attributes:
        load: layer -> (C, E) of C parts.
        pairs: layer -> (C, E, E); of layers where that is not too large, if wanted.
    """

    def __init__(self, found: list[Block], n: int, pairs: bool):
        self.n = n
        self.load = {block.name: torch.zeros(n, block.n_experts, dtype=torch.int64) for block in found}
        tables = {block.name: (n, block.n_experts, block.n_experts) for block in found if pairs}
        self.pairs = {
            name: torch.zeros(shape, dtype=torch.int64)
            for name, shape in tables.items()
            if torch.Size(shape).numel() <= LARGEST_TABLE
        }

    def add(self, block: Block, routing: Routing, label: Tensor) -> None:
        counts = counts_by_class(routing.expert, label[routing.token], self.n, routing.n_experts)
        self.load[block.name] += counts.cpu()
        if block.name in self.pairs and routing.top_k != 1:
            selected = routing.mask()
            for part in range(self.n):
                mine = selected[label == part]
                self.pairs[block.name][part] += pair_sums(mine, mine).cpu()


class _Agreement:
    """How often the first expert of a token is the same in two of the layers that use one pool of experts.

    Layers are compared in one forward pass, and where they see the same number of tokens.

    Attributes:
        counts: (3, L, L) of `records.AGREEMENT`.
    """

    def __init__(self, name: str, users: list[Block]):
        self.name, self.place = name, {block.name: place for place, block in enumerate(users)}
        self.counts = torch.zeros(3, len(users), len(users), dtype=torch.float64)
        self._first: dict[int, Tensor] = {}  # of this pass

    def add(self, block: Block, routing: Routing) -> None:
        here = self.place.get(block.name)
        if here is None or routing.top_k is None:
            return
        if here in self._first:  # the next pass
            self._first.clear()
        mine = self._first[here] = routing.first
        loads = torch.bincount(mine, minlength=routing.n_experts).double()
        for there, other in self._first.items():
            if len(other) == len(mine):
                by_chance = loads @ torch.bincount(other, minlength=routing.n_experts).double() / max(1, len(mine))
                found = torch.stack([(mine == other).sum().double(), by_chance, loads.sum()]).cpu()
                self.counts[:, here, there] += found
                if there != here:
                    self.counts[:, there, here] += found


class RoutingProbe:
    """Counts routing decisions through observers on the blocks of a model.

    Training forwards are counted in steps for which `arm` was called, all of them (gradient accumulation included), but
    never a forward that autograd repeats (activation checkpointing). Forwards in evaluation mode are counted apart.

    Args:
        model: the whole model.
        found: its blocks.
        parts: how many there are in `context.domain` and in `context.modality`, by "domain" and "modality".
        vocabulary: number of token ids, or None not to count experts by token.

    Attributes:
        seconds, evaluation_seconds: time spent inside training and evaluation forwards since last set to 0.
        doubts: what is wrong with a layer, by its name; it is not recorded then, unless its experts are at fault.
    """

    def __init__(self, model: nn.Module, found: list[Block], parts: Mapping[str, int], vocabulary: int | None):
        self.found, self.parts = found, parts
        self.armed = self._pairs = False
        self.seconds = self.evaluation_seconds = 0.0
        self._muted = self._closed = False
        self.doubts: dict[str, str] = {}
        self._parts = {block.name: block.parts for block in found}
        self._checks = {block.name: _Check(block, self._wants) for block in found if block.members}
        self._train = self._valid = None
        tables = {block.name: (block.n_experts, vocabulary or 0) for block in found}
        self.tokens = {
            name: torch.zeros(s, dtype=torch.int64) for name, s in tables.items() if 0 < s[0] * s[1] <= LARGEST_TABLE
        }
        self._inputs = Inputs(model) if found else None
        self._remove = [block.observe(self._see, self._wants) for block in found]

    def close(self) -> None:
        """Take the observers off."""
        self._closed = True  # what was compiled with them goes on calling them
        for check in self._checks.values():
            check.remove()
        for remove in (*self._remove, *([self._inputs.remove] if self._inputs else [])):
            remove()

    def arm(self, armed: bool, structure: bool = True) -> None:
        """Whether to count the training forwards from here on, for `structure` too; forgets what was counted."""
        self.armed, self._pairs = armed, structure
        self._train = self._valid = None

    def take(self, structure: bool) -> Values:
        """(scalars, tensors) of the training forwards since `arm`; with `structure` the pairs of experts as well."""
        scalars: dict[str, float] = {}
        tensors: dict[str, np.ndarray] = {}
        tally = self._train
        if tally is None:
            return scalars, tensors
        self._check()
        for i, block in enumerate(self.found):
            name, counts = block.name, tally.meter.counts(block.name)
            if not counts.tokens or self._refused(block):
                continue
            tensors |= {record.name(name): value for record, value in tally.loads(name).items()}
            if counts.limited[0]:
                rates = [float(rate) for rate in tally.meter.drop_rates(name)]
                tensors[DROPPED.name(name)] = np.array(rates, dtype=np.float32)
            scalars |= tally.support_sizes(name)
            if counts.probabilities:
                scalars[CONFIDENCE.name(name)] = float(tally.meter.confidence(name))
                scalars[ENTROPY.name(name)] = float(tally.meter.token_entropy(name))
            if structure and name in tally.text:
                tensors[DEPTH_TEXT.name(name)] = tally.text[name]
            if structure and int(counts.pairs.sum()) > int(counts.pairs.diagonal().sum()):
                tensors[COACTIVATION.name(name)] = _uint32(counts.pairs)
                for division, part in tally.parts.items():
                    if name in part.pairs and part.pairs[name].any():
                        tensors[DIVISIONS[division].coactivation.name(name)] = _uint32(part.pairs[name])
            if structure and i + 1 < len(self.found) and counts.transition.any():
                tensors[TRANSITION.name(name)] = _uint32(counts.transition)
        if structure:
            seen = [pool for pool in tally.pools if pool.counts.any()]
            tensors |= {AGREEMENT.name(pool.name): _uint32(pool.counts.round()) for pool in seen}
        return scalars, tensors

    def take_tokens(self) -> dict[str, np.ndarray]:
        """The (E, V) counts by token id since the last call."""
        refused = {block.name for block in self.found if self._refused(block)}
        kept = {name: counts for name, counts in self.tokens.items() if name not in refused}
        counted = {TOKENS.name(name): _uint32(counts) for name, counts in kept.items() if counts.any()}
        for counts in self.tokens.values():
            counts.zero_()
        return counted

    def hand_over(self) -> tuple[_Tally | None, dict[str, Tensor]]:
        """What this process has counted since `arm`, and by token id, which begins anew: for `take_over`."""
        tokens = {name: counts.clone() for name, counts in self.tokens.items()}
        for counts in self.tokens.values():
            counts.zero_()
        return self._train, tokens

    def take_over(self, others: Sequence[tuple[_Tally | None, dict[str, Tensor]]]) -> None:
        """Count what all processes that train the model have handed over, this one among them, as its own."""
        tallies = [tally for tally, _ in others if tally is not None]
        if tallies:
            self._train, *further = tallies
            for tally in further:
                self._train += tally
        for _, tokens in others:
            for name, counts in tokens.items():
                self.tokens[name] += counts

    def loads(self) -> dict[str, np.ndarray]:
        """By layer the assignments (E,) that this process has counted since `arm`."""
        return {} if self._train is None else {name: _uint32(load) for name, load in self._train.load.items()}

    def take_evaluation(self) -> dict[str, np.ndarray]:
        """The `records.LOADS` over the evaluation forwards since the last training step, and texts by depth."""
        tally, self._valid = self._valid, None
        if tally is None:
            return {}
        self._check()
        counted = [block for block in self.found if tally.meter.counts(block.name).tokens]
        names = [block.name for block in counted if not self._refused(block)]
        loads = {name: tally.loads(name) for name in names}
        for name in tally.text.keys() & loads.keys():
            loads[name][DEPTH_TEXT] = tally.text[name]
        return {on_validation(record).name(name): value for name in names for record, value in loads[name].items()}

    def mute(self, muted: bool) -> None:
        """Look away, while another probe runs the model."""
        self._muted = muted

    def unseen(self) -> list[Block]:
        """The blocks of which no training forward was seen since `arm`."""
        counts = None if self._train is None else self._train.meter.counts
        return [block for block in self.found if counts is None or not counts(block.name).tokens]

    def gone(self, model: nn.Module) -> list[Block]:
        """The blocks that are looked at and are not in the model any more."""
        there = set(model.modules())
        return [block for block in self.found if not there.issuperset(self._parts[block.name])]

    def _refused(self, block: Block) -> bool:
        return block.name in self.doubts and block.experts is None

    def _check(self) -> None:
        """Compare the decisions with what the experts were called with, once."""
        for name, check in list(self._checks.items()):
            if check.chosen.any():
                check.remove()
                del self._checks[name]
                if (wrong := check.wrong()) is not None:
                    self.doubts[name] = wrong

    def _wants(self, block: Block) -> bool:
        looking = not self._muted and not self._closed
        return looking and (self.armed or not block.module.training) and not recomputing()

    @torch.no_grad()
    def _see(self, block: Block, routing: Routing | str, context: Context) -> None:
        began = time.perf_counter()
        if isinstance(routing, str):
            self.doubts[block.name] = f"its decision cannot be read from {routing}"
            return
        if block.name in self._checks:
            self._checks[block.name].chosen += routing.counts.cpu()
        routing, context = self._inputs.without_padding(block, routing, context)
        if block.module.training:
            tally = self._train = self._train or _Tally(self.found, self.parts, self._pairs)
            table = self.tokens.get(block.name)
            if table is not None and context.token_ids is not None and int(context.token_ids.max()) < table.shape[1]:
                ids = context.token_ids.to(routing.expert.device)[routing.token]
                table += counts_by_class(routing.expert, ids, table.shape[1], routing.n_experts).T.cpu()
        else:
            tally = self._valid = self._valid or _Tally(self.found, self.parts, pairs=False)
        tally.add(block, routing, context)
        spent = time.perf_counter() - began
        if block.module.training:
            self.seconds += spent
        else:
            self.evaluation_seconds += spent


class _Check:
    """What experts that are modules of their own are called with, beside what a decision says.

    A decision that was put together from logits may be another than the block's own, and a block may give its experts
    other tokens than its router chose.
    """

    def __init__(self, block: Block, wanted: Callable[[Block], bool]):
        self.chosen = torch.zeros(block.n_experts, dtype=torch.int64)
        self.given = torch.zeros(block.n_experts, dtype=torch.int64)

        def count(expert: int) -> Callable[[nn.Module, tuple], None]:
            def called(module: nn.Module, inputs: tuple) -> None:
                if torch.compiler.is_compiling() or module is not block.members[expert] or not wanted(block):
                    return
                if inputs and isinstance(inputs[0], Tensor):
                    self.given[expert] += inputs[0].shape[:-1].numel()

            return called

        self._remove = [m.register_forward_pre_hook(count(e)).remove for e, m in enumerate(block.members)]

    def remove(self) -> None:
        for remove in self._remove:
            remove()

    def wrong(self) -> str | None:
        """What does not agree, in words. Experts that all see the same number of tokens may be called with all."""
        same = bool((self.given == self.given[0]).all())
        if same or not bool((self.given > self.chosen).any()):
            return None
        return (
            f"its experts were called with {self.given.tolist()} tokens where its router chose {self.chosen.tolist()}"
        )


def _mask(routing: Routing, kept: Tensor) -> Tensor:
    """(N, E) True for the pairs that were kept."""
    mask = torch.zeros(routing.n_tokens, routing.n_experts, dtype=torch.bool, device=kept.device)
    return mask.index_put_((routing.token[kept], routing.expert[kept]), torch.tensor(True, device=kept.device))


def _uint32(counts: Tensor) -> np.ndarray:
    return counts.numpy().astype(np.uint32)
