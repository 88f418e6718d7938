"""A run without training: every name a trainer records, with routing that drifts, for views, tests and measurements.

- Tokens are drawn and routed for real, from tables of affinities that take a random walk: loads, co-activations,
  transitions and token counts of a step belong to one batch and agree with each other.
- Spectra and gradients are drawn directly: decaying singular values, and domain gradients that share a direction.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.live.store import RunWriter

VOCABULARY = 256  # bytes
WIDTH = 128
GROUPS = ("embedding", "attention", "router", "experts", "head")
MODALITIES = ("text", "image")
CADENCE = {"routing": 10, "structure": 50, "conflict": 100, "evaluation": 500}  # steps
CAPACITY_FACTOR = 1.25
POOL = "blocks.0.ffn.experts"
RANK = 16  # at first, of layers that shrink
TEXT = 256  # tokens of a text by depth
RANKS = 2  # processes, each with half of the tokens and of the experts


def write_synthetic_run(
    folder: str | Path,
    n_steps: int,
    n_layers: int = 4,
    n_experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    domains: Sequence[str] = ("python", "docs", "names"),
    n_tokens: int = 1024,
) -> Path:
    """Write a finished run of ``n_steps`` steps into ``folder`` and return that."""
    meta = synthetic_meta(n_steps, n_layers, n_experts, top_k, seed, domains)
    with RunWriter.create(folder, meta) as writer:
        for _ in synthetic_steps(writer, n_steps, n_layers, n_experts, top_k, seed, domains, n_tokens):
            pass
        return writer.folder


def synthetic_meta(
    n_steps: int, n_layers: int, n_experts: int, top_k: int, seed: int, domains: Sequence[str]
) -> dict[str, Any]:
    """The meta of such a run."""
    return {
        "kind": "train",
        "seed": seed,
        "recipe": {"name": "synthetic", "n_layers": n_layers, "n_experts": n_experts, "top_k": top_k},
        "versions": {"numpy": np.__version__},
        "git": None,
        "data": {},
        "total_steps": n_steps,
        "cadence": CADENCE,
        "processes": {"world": RANKS, "layout": "experts", "device": "cpu"},
        "model": {
            "layers": [
                {"name": layer, "n_experts": n_experts, "top_k": top_k} | ({"recursive": True} if last else {})
                for layer in _layers(n_layers)
                for last in [layer == _layers(n_layers)[-1]]
            ],
            "groups": {group: 1000 * (i + 1) for i, group in enumerate(GROUPS)},
            "matrices": _matrices(n_layers, n_experts),
            "pools": {POOL: _layers(n_layers)} if n_layers > 1 else {},
            "forms": {layer: {"rank": [], "importance": [1, RANK], "overlap": [3, 3]} for layer in _layers(n_layers)},
            "domains": list(domains),
            "modalities": list(MODALITIES),
            "vocabulary": "bytes",
            "parameters": 15_000,
            "active_parameters": 9_000,
            "flops": 18_000,
        },
    }


def synthetic_steps(
    writer: RunWriter,
    n_steps: int,
    n_layers: int = 4,
    n_experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    domains: Sequence[str] = ("python", "docs", "names"),
    n_tokens: int = 1024,
) -> Iterator[int]:
    """Record and commit steps 0 to n_steps - 1, one at each turn, and yield the step."""
    rng = np.random.default_rng(seed)
    layers = [_Layer(rng, len(domains), n_experts, top_k) for _ in range(n_layers)]
    names = _layers(n_layers)
    for step in range(n_steps):
        loss = 2.0 + 3.0 * np.exp(-step / 400) + 0.05 * rng.standard_normal()
        scalars = {
            "train/loss": loss,
            "train/aux": 0.01 + 0.02 * np.exp(-step / 200) + 0.001 * rng.random(),
            "train/lr": 1e-3 * min(1.0, (step + 1) / 100),
            "train/grad_norm": 0.5 + rng.gamma(4.0, 0.1),
            "train/step_seconds": 0.05 + 0.002 * rng.random(),
            "cost/probe_seconds": 0.001 * rng.random(),
            "cost/store_seconds": 0.0002 * rng.random(),
        }
        tensors: dict[str, np.ndarray] = {}
        if step % CADENCE["routing"] == 0:
            batch = _Batch(rng, n_tokens, len(domains))
            for name, layer in zip(names, layers, strict=True):
                layer.drift(rng)
                layer.route(rng, batch)
                scalars |= {f"router/{name}/{what}": value for what, value in layer.sharpness().items()}
                tensors |= {f"{key}/{name}": value for key, value in layer.loads(batch).items()}
                tensors[f"dropped/{name}"] = layer.dropped()
            for rank in range(RANKS):
                scalars |= _rank(rank, seed, step)
                for name, layer in zip(names, layers, strict=True):
                    own = np.array_split(layer.mask, RANKS)[rank]
                    tensors[f"rank/{rank}/load/{name}"] = own.sum(axis=0).astype(np.uint32)
            shares, text = _depth(seed, step, n_experts, n_tokens)
            tensors[f"depth/{names[-1]}"] = shares
            for i, name in enumerate(names):
                rank, importance = _form(step, i)
                scalars[f"form/{name}/rank"] = rank
                tensors |= {f"form_table/{name}/importance": importance, f"form_table/{name}/overlap": _overlap(step)}
            if step % CADENCE["structure"] == 0:
                tensors[f"depth_text/{names[-1]}"] = text
                tensors |= _structure(names, layers, batch)
                tensors |= _spectra(rng, n_layers, n_experts, step)
        if step % CADENCE["conflict"] == 0:
            tensors |= {f"conflict/{group}": _conflict(rng, len(domains), i) for i, group in enumerate(GROUPS)}
            others = np.random.default_rng((seed, step))  # what came before this was recorded stays as it was
            for i, group in enumerate(GROUPS):
                tensors[f"conflict_by_modality/{group}"] = _conflict(others, len(MODALITIES), i + len(GROUPS))
            for by, n in (("domain", len(domains)), ("modality", len(MODALITIES))):
                tensors |= _gradients(others, by, n, n_layers, n_experts)
            tensors |= {f"tokens/{name}": layer.take_tokens() for name, layer in zip(names, layers, strict=True)}
        if step % CADENCE["evaluation"] == 0:
            for i, domain in enumerate(domains):
                scalars[f"valid/loss/{domain}"] = loss + 0.1 + 0.2 * i
            scalars["valid/loss"] = np.mean([scalars[f"valid/loss/{domain}"] for domain in domains])
            batch = _Batch(rng, n_tokens, len(domains))
            for name, layer in zip(names, layers, strict=True):
                layer.route(rng, batch)
                tensors |= {f"valid/{key}/{name}": value for key, value in layer.loads(batch).items()}
            shares, text = _depth(seed, step, n_experts, n_tokens)
            tensors |= {f"valid/depth/{names[-1]}": shares, f"valid/depth_text/{names[-1]}": text}
        writer.scalars(step, scalars)
        writer.tensors(step, tensors)
        writer.commit(step)
        yield step


def _rank(rank: int, seed: int, step: int) -> dict[str, float]:
    """A step of a process: the second computes longer, and the first waits for it."""
    seconds, waiting = 0.05 + 0.001 * np.random.default_rng((seed, step, 9)).random(), (0.02, 0.005)[rank]
    sent = {f"rank/{rank}/sent/all_to_all": 64_000.0 + 10 * step, f"rank/{rank}/sent/all_reduce": 30_000.0}
    return {f"rank/{rank}/seconds": seconds, f"rank/{rank}/waiting": waiting, **sent}


class _Batch:
    """N tokens: their domain (N,) and id (N,), each domain with token frequencies of its own."""

    def __init__(self, rng: np.random.Generator, n_tokens: int, n_domains: int):
        self.domain = rng.integers(n_domains, size=n_tokens)
        common = (rng.zipf(1.3, size=n_tokens) - 1) % VOCABULARY
        self.token = (common + 37 * self.domain) % VOCABULARY
        self.modality = (self.token >= VOCABULARY // 2).astype(int)
        parts = (("domain", self.domain, n_domains), ("modality", self.modality, len(MODALITIES)))
        self.parts = {by: np.eye(n, dtype=np.float32)[label] for by, label, n in parts}  # (N, parts)


class _Layer:
    """One MoE layer: affinities of domains (domains, E) and of tokens (V, E), and the batch it routed last."""

    def __init__(self, rng: np.random.Generator, n_domains: int, n_experts: int, top_k: int):
        self.n_experts, self.top_k = n_experts, top_k
        self.by_domain = 0.5 * rng.standard_normal((n_domains, n_experts))
        self.by_token = 0.3 * rng.standard_normal((VOCABULARY, n_experts))
        self.tokens = np.zeros((n_experts, VOCABULARY), dtype=np.uint32)

    def drift(self, rng: np.random.Generator) -> None:
        self.by_domain = 0.999 * self.by_domain + 0.03 * rng.standard_normal(self.by_domain.shape)
        self.by_token = 0.999 * self.by_token + 0.02 * rng.standard_normal(self.by_token.shape)

    def route(self, rng: np.random.Generator, batch: _Batch) -> None:
        """Draw K experts a token without replacement: the K first arrivals of exponential clocks with rates p."""
        logits = self.by_domain[:, None, :] + self.by_token  # (domains, V, E)
        table = np.exp(logits - logits.max(axis=-1, keepdims=True))
        table /= table.sum(axis=-1, keepdims=True)
        self.p = table[batch.domain, batch.token]  # (N, E)
        arrival = rng.standard_exponential(self.p.shape, dtype=np.float32) / self.p
        self.chosen = np.argpartition(arrival, self.top_k - 1, axis=1)[:, : self.top_k]  # (N, K)
        self.mask = np.zeros(self.p.shape, dtype=np.float32)
        np.put_along_axis(self.mask, self.chosen, 1.0, axis=1)
        np.add.at(self.tokens, (self.chosen, batch.token[:, None]), 1)

    def sharpness(self) -> dict[str, float]:
        """Mean of the largest probability, token entropy as a share of ln E, and effective support sizes."""
        entropy = -(self.p * np.log(self.p)).sum(axis=1)
        weights = np.take_along_axis(self.p, self.chosen, axis=1)
        return {
            "confidence": float(self.p.max(axis=1).mean()),
            "entropy": float(entropy.mean() / np.log(max(self.n_experts, 2))),
            "support": float((weights.sum(axis=1) ** 2 / (weights**2).sum(axis=1)).mean()),
            "probability_support": float((1 / (self.p**2).sum(axis=1)).mean()),
        }

    def loads(self, batch: _Batch) -> dict[str, np.ndarray]:
        by_part = {f"load_by_{by}": (parts.T @ self.mask).astype(np.uint32) for by, parts in batch.parts.items()}
        return {
            "load": self.mask.sum(axis=0).astype(np.uint32),
            "importance": self.p.mean(axis=0).astype(np.float32),
            **by_part,
        }

    def dropped(self) -> np.ndarray:
        """(2,): dropped assignments, and tokens that lost all theirs, as rates; earlier tokens go first."""
        capacity = int(np.ceil(CAPACITY_FACTOR * self.chosen.size / self.n_experts))
        lost = self.mask * (np.cumsum(self.mask, axis=0) > capacity)
        return np.array([lost.sum() / self.chosen.size, (lost.sum(axis=1) == self.top_k).mean()], dtype=np.float32)

    def take_tokens(self) -> np.ndarray:
        """The (E, V) counts since the last call."""
        counts, self.tokens = self.tokens, np.zeros_like(self.tokens)
        return counts


def _structure(names: list[str], layers: list[_Layer], batch: _Batch) -> dict[str, np.ndarray]:
    """Pairs of experts that share tokens, within a layer (K >= 2) and from a layer to the next."""
    found = {}
    for i, (name, layer) in enumerate(zip(names, layers, strict=True)):
        if layer.top_k >= 2:
            found[f"coactivation/{name}"] = (layer.mask.T @ layer.mask).astype(np.uint32)
            for by, parts in batch.parts.items():
                pairs = np.einsum("np,ni,nj->pij", parts, layer.mask, layer.mask, optimize=True)
                found[f"coactivation_by_{by}/{name}"] = pairs.round().astype(np.uint32)
        if i + 1 < len(layers):
            found[f"transition/{name}"] = (layer.mask.T @ layers[i + 1].mask).astype(np.uint32)
    if len(layers) > 1:
        first = np.stack([_first(layer) for layer in layers])  # (L, N)
        loads = np.stack([np.bincount(row, minlength=layers[0].n_experts) for row in first])
        same, n = (first[:, None] == first).sum(-1), first.shape[1]
        counts = np.stack([same, loads @ loads.T / n, np.full_like(same, n)])
        found[f"agreement/{POOL}"] = counts.round().astype(np.uint32)
    return found


def _first(layer: _Layer) -> np.ndarray:
    """(N,) the likeliest of the chosen."""
    best = np.take_along_axis(layer.p, layer.chosen, axis=1).argmax(axis=1)
    return np.take_along_axis(layer.chosen, best[:, None], axis=1)[:, 0]


def _spectra(rng: np.random.Generator, n_layers: int, n_experts: int, step: int) -> dict[str, np.ndarray]:
    """Descending singular values; the weights' grow a few strong directions as the run goes on."""
    found = {}
    for name, shape in _matrices(n_layers, n_experts).items():
        rank = np.arange(1, min(shape) + 1)
        for what, scale, decay in (("weight", 4.0, 0.3), ("update", 0.01, 0.8), ("gradient", 0.1, 1.0)):
            growth = 1 + 0.5 * np.log1p(step / 100) * np.exp(-rank / 4) if what == "weight" else 1.0
            values = scale * growth * rank**-decay * np.exp(0.05 * rng.standard_normal(rank.size))
            found[f"spectrum/{what}/{name}"] = -np.sort(-values).astype(np.float32)
    return found


def _gradients(rng: np.random.Generator, by: str, n: int, n_layers: int, n_experts: int) -> dict[str, np.ndarray]:
    """Descending singular values of each part's gradient; those of later parts fall faster."""
    found = {}
    for name, shape in _matrices(n_layers, n_experts).items():
        rank, decay = np.arange(1, min(shape) + 1), 0.8 + 0.3 * np.arange(n)[:, None]
        values = 0.1 * rank**-decay * np.exp(0.05 * rng.standard_normal((n, rank.size)))
        found[f"gradients_by_{by}/{name}"] = -np.sort(-values).astype(np.float32)
    return found


def _form(step: int, layer: int) -> tuple[int, np.ndarray]:
    """The rank that is left of a layer, and the importances (1, RANK) of its components, 0 for those that were cut."""
    rank = max(RANK // (1 + step // (40 + 20 * layer)), 2)
    return rank, np.where(np.arange(RANK) < rank, 0.8 ** np.arange(RANK), 0).astype(np.float32)[None]


def _depth(seed: int, step: int, deepest: int, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens by depth (R,), which falls, and the first of them (2, TEXT): the same ids at every step, and depths."""
    ids = np.random.default_rng(seed).integers(32, 127, size=TEXT)
    depths = np.random.default_rng((seed, step)).binomial(deepest, 0.9 / (1 + step / 200), size=max(n_tokens, TEXT))
    return np.bincount(depths, minlength=deepest + 1).astype(np.uint32), np.stack([ids, depths[:TEXT]]).astype(np.int32)


def _overlap(step: int) -> np.ndarray:
    """The overlap (3, 3) of the masks of three tasks, which part."""
    return np.where(np.eye(3) > 0, 1, 0.9 / (1 + step / 100)).astype(np.float32)


def _conflict(rng: np.random.Generator, n_domains: int, group: int) -> np.ndarray:
    """Gram matrices (3, n, n) of two half-batch gradients a domain: within each half, and across the halves."""
    shared = rng.standard_normal(64) * (1.2 - 0.25 * group)
    own = np.random.default_rng(group).standard_normal((n_domains, 64))  # the same from step to step
    half = [shared + own + 0.8 * rng.standard_normal((n_domains, 64)) for _ in range(2)]
    return np.stack([half[0] @ half[0].T, half[1] @ half[1].T, half[0] @ half[1].T])


def _layers(n_layers: int) -> list[str]:
    return [f"blocks.{i}.ffn" for i in range(n_layers)]


def _matrices(n_layers: int, n_experts: int) -> dict[str, list[int]]:
    return {
        name: shape
        for i in range(n_layers)
        for name, shape in (
            (f"blocks.{i}.attention.qkv", [3 * WIDTH, WIDTH]),
            (f"blocks.{i}.attention.out", [WIDTH, WIDTH]),
            (f"blocks.{i}.ffn.router", [n_experts, WIDTH]),
        )
    }
