"""Measures of the load records of a run, over all its recorded steps: what the imbalance view draws."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from workbench.figures.balance import BALANCE
from workbench.lib.measures.information import Information
from workbench.lib.measures.routing import load_stats, null_load_stats, routing_information
from workbench.live.records import LOAD, SUPPORT, Division
from workbench.live.views.readings import Layer, Nothing, Readings

BAND = (0.05, 0.95)  # quantiles of the null band
NULL_SAMPLES = 400


class Balance(NamedTuple):
    """Load statistics of all layers: steps (S,), values[measure] (L, S), nulls[measure] of the selected layer."""

    steps: np.ndarray
    values: dict[str, np.ndarray]
    nulls: dict[str, tuple[float, float]]


def loads_over_time(run: Readings, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps (S,), pairs (S, E)) of one layer."""
    return run.tensors(LOAD.name(run.layer(layer).name))


def balance(run: Readings, layer: int) -> Balance:
    """Load statistics of every layer of a run over time; the null band is that of the given layer's newest batch."""
    series = [run.tensors(LOAD.name(known.name)) for known in run.moe_layers()]
    rows = min(len(steps) for steps, _ in series)
    stats = [load_stats(torch.as_tensor(loads[-rows:].astype(np.float64)), 1) for _, loads in series]
    values = {name: np.stack([getattr(layer_stats, name).numpy() for layer_stats in stats]) for name in BALANCE}
    loads = series[run.layers.index(run.layer(layer))][1][-1]
    return Balance(series[0][0][-rows:], values, _null_bands(run.layer(layer), int(loads.sum())))


def _null_bands(layer: Layer, pairs: int) -> dict[str, tuple[float, float]]:
    top_k = layer.top_k or 1
    tokens = pairs // top_k
    if tokens < 1:
        return dict.fromkeys(BALANCE, (np.nan, np.nan))
    return _null_quantiles(tokens, layer.n_experts, top_k)


@lru_cache(maxsize=64)
def _null_quantiles(tokens: int, n_experts: int, top_k: int) -> dict[str, tuple[float, float]]:
    generator = torch.Generator().manual_seed(0)
    null = null_load_stats(tokens, n_experts, top_k, BAND, NULL_SAMPLES, generator=generator)
    return {name: tuple(getattr(null, name).tolist()) for name in BALANCE}


def support(run: Readings) -> tuple[np.ndarray, np.ndarray]:
    """(steps (S,), mean effective support size (L, S)) of the weights in every layer."""
    series = [run.scalars(SUPPORT.name(layer.name), needed=True) for layer in run.moe_layers()]
    rows = min(len(steps) for steps, _ in series)
    return series[0][0][-rows:], np.stack([sizes[-rows:] for _, sizes in series])


def information(run: Readings, by: Division) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps (S,), information (L, S), its shuffled baseline (L, S)) of expert about domain or modality, shares of its
    entropy."""
    if len(run.parts(by)) < 2:  # H is 0
        raise Nothing(f"what a choice says of the {by.name} needs at least two; this run has one")
    series = [run.tensors(by.load.name(layer.name)) for layer in run.moe_layers()]
    rows = min(len(steps) for steps, _ in series)
    found = [
        _information(counts[-rows:], layer.top_k or 1) for (_, counts), layer in zip(series, run.layers, strict=True)
    ]
    values = np.stack([information.normalised.numpy() for information in found])
    nulls = np.stack([(information.null / information.row_entropy).numpy() for information in found])
    return series[0][0][-rows:], values, nulls


def _information(counts: np.ndarray, top_k: int) -> Information:
    # the first-order null: the exact one takes milliseconds a table, and there are hundreds of them
    return routing_information(torch.as_tensor(counts.astype(np.float64)), top_k, null="first_order")


def shares_of(counts: np.ndarray, expert: int) -> tuple[np.ndarray, np.ndarray]:
    """(shares of one expert (n,), shares over all experts (n,)) from counts (E, n)."""
    mine, all_ = counts[expert].astype(np.float64), counts.sum(axis=0, dtype=np.float64)
    if not mine.sum():
        raise Nothing(f"expert {expert} took no token in this record")
    return mine / mine.sum(), all_ / all_.sum()
