"""What a run records: every series by name, when it is recorded, as what, and what it means. There is no other list.

A name is a pattern filled in: `LOAD.name("blocks.0.ffn")` is "load/blocks.0.ffn". Writers make names here, and readers
ask here what a name is (`find`). A scalar is a float64; a tensor has a numpy dtype and a shape in these letters:

    E experts, E' experts of the next layer, D domains, M modalities, V token ids, n singular values (the shorter side
    of the matrix), m rows and k columns of a table, L layers that use one pool of experts, R depths (from none to all
    recursions), N tokens

What is due at the cadence "routing" is recorded where "structure" is due as well.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

STEP, EVALUATION = "step", "evaluation"  # beside the kinds of `watch.Cadence`: routing, structure, conflict


@dataclass(frozen=True)
class Record:
    """One kind of series.

    Attributes:
        pattern: its name, with what it is of in braces.
        cadence: when it is recorded: every "step", at an "evaluation", or at a kind of `watch.Cadence`.
        meaning: with the unit, where it has one.
        dtype: of a tensor; None for a scalar.
        shape: of a tensor.
    """

    pattern: str
    cadence: str
    meaning: str
    dtype: str | None = None
    shape: tuple[str | int, ...] = ()

    def name(self, *of: str) -> str:
        """The name of one series: the pattern with its braces filled in, in order; "" is the whole model."""
        between = re.split(_BRACES, self.pattern)
        filled = (*(part or "model" for part in of), "")
        return "".join(part for pair in zip(between, filled, strict=True) for part in pair)

    def of(self, name: str) -> tuple[str, ...] | None:
        """The inverse of `name`: what a series is of, or None where it is no such series."""
        found = re.fullmatch(re.sub(_BRACES, "(.+?)", self.pattern), name)
        return None if found is None else found.groups()

    def as_dict(self) -> dict[str, Any]:
        """The description as plain values, for JSON; dtype and shape of a scalar are null."""
        shape = list(self.shape) if self.dtype else None
        values = {"pattern": self.pattern, "cadence": self.cadence, "dtype": self.dtype, "shape": shape}
        return values | {"meaning": self.meaning}


_BRACES = r"\{\w+\}"

LOSS = Record("train/loss", STEP, "task loss of the training batch, in the unit that meta names, nats in a run of ours")
STEP_SECONDS = Record("train/step_seconds", STEP, "duration of the step without what the probes took, seconds")
LEARNING_RATE = Record("train/lr", STEP, "learning rate the step was made with")
GRAD_NORM = Record("train/grad_norm", STEP, "length of the gradient over all trained parameters, before clipping")
AUX = Record("train/aux", STEP, "weighted sum of the auxiliary losses of all layers, in the unit of the loss")
TRAIN = Record("train/{value}", STEP, "a number that the training loop handed over with its step")
PROBE_SECONDS = Record("cost/probe_seconds", STEP, "time the probes took in and after the step, seconds")
STORE_SECONDS = Record("cost/store_seconds", STEP, "time the writing of the step before took, seconds")

RANK_LOAD = Record(
    "rank/{rank}/load/{layer}", "routing", "assignments by expert of the tokens of one of several processes", "uint32",
    ("E",),
)  # fmt: skip
RANK_SECONDS = Record("rank/{rank}/seconds", "routing", "duration of the step in one of several processes, seconds")
RANK_WAITING = Record(
    "rank/{rank}/waiting", "routing", "of these the time in collectives, for the wire and for processes that came "
    "later, seconds",
)  # fmt: skip
RANK_SENT = Record(
    "rank/{rank}/sent/{collective}", "routing", "bytes that it sent to others in the step, by the formula of the "
    "collective",
)  # fmt: skip

SUPPORT = Record(
    "router/{layer}/support", "routing", "effective number of experts of a token, (sum w)^2 / sum w^2 of its weights"
)
PROBABILITY_SUPPORT = Record(
    "router/{layer}/probability_support", "routing", "the same of the probabilities over all experts"
)
CONFIDENCE = Record("router/{layer}/confidence", "routing", "mean of the largest probability")
ENTROPY = Record("router/{layer}/entropy", "routing", "mean entropy of a token's probabilities, as a share of ln E")

LOAD = Record(
    "load/{layer}", "routing", "assignments by expert, before capacity where the router tells", "uint32", ("E",)
)
IMPORTANCE = Record("importance/{layer}", "routing", "mean probability of each expert", "float32", ("E",))
LOAD_BY_DOMAIN = Record("load_by_domain/{layer}", "routing", "assignments by domain and expert", "uint32", ("D", "E"))
LOAD_BY_MODALITY = Record(
    "load_by_modality/{layer}", "routing", "assignments by modality and expert", "uint32", ("M", "E")
)
DEPTH = Record(
    "depth/{layer}", "routing", "tokens by the number of recursions they went through, from none to all", "uint32",
    ("R",),
)  # fmt: skip
DEPTH_TEXT = Record(
    "depth_text/{layer}", "structure", "the first tokens of the batch: their ids, and their depths; -1 behind its end",
    "int32", (2, "N"),
)  # fmt: skip
DROPPED = Record(
    "dropped/{layer}", "routing", "under a capacity limit, rates: assignments dropped, tokens that lost all of theirs",
    "float32", (2,),
)  # fmt: skip
COACTIVATION = Record(
    "coactivation/{layer}", "structure", "tokens that chose both of two experts; the load on the diagonal",
    "uint32", ("E", "E"),
)  # fmt: skip
COACTIVATION_BY_DOMAIN = Record(
    "coactivation_by_domain/{layer}", "structure", "the same of the tokens of each domain", "uint32", ("D", "E", "E")
)
COACTIVATION_BY_MODALITY = Record(
    "coactivation_by_modality/{layer}", "structure", "the same of the tokens of each modality", "uint32",
    ("M", "E", "E"),
)  # fmt: skip
TRANSITION = Record(
    "transition/{layer}", "structure", "tokens by expert here and expert in the next layer", "uint32", ("E", "E'")
)
AGREEMENT = Record(
    "agreement/{pool}", "structure", "of two layers that use the same experts: tokens whose first expert is the same, "
    "such tokens if the layers chose independently, and tokens compared", "uint32", (3, "L", "L"),
)  # fmt: skip
SPECTRUM = Record(
    "spectrum/{of}/{matrix}", "structure", "singular values, largest first, of the weight, the step's update of it or "
    "its gradient; of a large matrix the largest only", "float32", ("n",),
)  # fmt: skip
FORM = Record(
    "form/{layer}/{what}", "routing", "a number that a layer tells of its form, which changes while it trains: a rank, "
    "a stage",
)  # fmt: skip
FORM_TABLE = Record(
    "form_table/{layer}/{what}", "routing", "the same of a vector, as one row, or of a matrix: importances, an overlap",
    "float32", ("m", "k"),
)  # fmt: skip
CONFLICT = Record(
    "conflict/{group}", "conflict", "Gram matrices of the domains' gradients of a group of parameters, of two half "
    "batches: within the first, within the second, across", "float64", (3, "D", "D"),
)  # fmt: skip
CONFLICT_BY_MODALITY = Record(
    "conflict_by_modality/{group}", "conflict", "the same of the gradients of each modality's own loss", "float64",
    (3, "M", "M"),
)  # fmt: skip
GRADIENTS_BY_DOMAIN = Record(
    "gradients_by_domain/{matrix}", "conflict", "singular values of the gradient of each domain's own loss, without "
    "balance losses, on the batches of the conflict; 0 where a loss has none", "float32", ("D", "n"),
)  # fmt: skip
GRADIENTS_BY_MODALITY = Record(
    "gradients_by_modality/{matrix}", "conflict", "the same of each modality's own loss", "float32", ("M", "n")
)
TOKENS = Record(
    "tokens/{layer}", "conflict", "assignments by expert and token id since the last record", "uint32", ("E", "V")
)


@dataclass(frozen=True)
class Division:
    """One way in which the tokens and the loss of a task fall into parts, and what is recorded of each part.

    Attributes:
        name: of a part, "domain".
        parts: of all of them, "domains": under this name a task and the model of a run's meta have their names.
    """

    name: str
    parts: str
    load: Record
    coactivation: Record
    conflict: Record
    gradients: Record

    def names(self, of: Any) -> tuple[str, ...]:
        """The parts of a task or of the model of a run's meta, in the order of every record; none where it has none."""
        found = of.get(self.parts) if isinstance(of, dict) else getattr(of, self.parts, None)
        return tuple(found or ())


BY_DOMAIN = Division("domain", "domains", LOAD_BY_DOMAIN, COACTIVATION_BY_DOMAIN, CONFLICT, GRADIENTS_BY_DOMAIN)
BY_MODALITY = Division(
    "modality", "modalities", LOAD_BY_MODALITY, COACTIVATION_BY_MODALITY, CONFLICT_BY_MODALITY, GRADIENTS_BY_MODALITY
)
DIVISIONS = {division.name: division for division in (BY_DOMAIN, BY_MODALITY)}


def on_validation(record: Record) -> Record:
    """A record of the routing as it is taken in an evaluation, over the forward passes of that."""
    meaning = f"{record.meaning}, over the evaluation"
    return replace(record, pattern=f"valid/{record.pattern}", cadence=EVALUATION, meaning=meaning)


LOADS = (LOAD, IMPORTANCE, LOAD_BY_DOMAIN, LOAD_BY_MODALITY, DEPTH)
"""What is counted of every layer, in training and in evaluation."""

VALIDATION = Record("valid/{metric}", EVALUATION, 'a metric on validation data; "metric/domain" is that of one domain')

#: Of two patterns that a name fits, the earlier is meant.
RECORDS = (
    *(LOSS, STEP_SECONDS, LEARNING_RATE, GRAD_NORM, AUX, TRAIN, PROBE_SECONDS, STORE_SECONDS),
    *(RANK_LOAD, RANK_SECONDS, RANK_WAITING, RANK_SENT),
    *(SUPPORT, PROBABILITY_SUPPORT, CONFIDENCE, ENTROPY),
    *(*LOADS, DEPTH_TEXT, DROPPED, COACTIVATION, COACTIVATION_BY_DOMAIN, COACTIVATION_BY_MODALITY, TRANSITION),
    *(
        AGREEMENT,
        SPECTRUM,
        FORM,
        FORM_TABLE,
        CONFLICT,
        CONFLICT_BY_MODALITY,
        GRADIENTS_BY_DOMAIN,
        GRADIENTS_BY_MODALITY,
    ),
    TOKENS,
    *map(on_validation, (*LOADS, DEPTH_TEXT)),
    VALIDATION,
)


@cache
def find(name: str) -> Record | None:
    """The record that a series of this name is one of; None for one that a program of the user's own has written."""
    return next((record for record in RECORDS if record.of(name) is not None), None)
