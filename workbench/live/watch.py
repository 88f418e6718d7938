"""`watch`: the probes attached to any model, in any training script, writing a run that the live views read.

    with workbench.watch(model, "my-run", total_steps=1000) as w:
        for step in range(1000):
            loss = ...
            loss.backward()
            optimizer.step()
            w.step(loss=loss.item())
            optimizer.zero_grad()

`workbench view my-run` shows it, while it trains and later. A script that is run again says what becomes of its run:
resume=True goes on after its last step (`range(w.next_step, 1000)`), overwrite=True replaces it.

The workbench's own trainer records through the same object.
"""

import os
import shlex
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.errors import InputError, unknown
from workbench.lib.core.adapt.adapted import adaptation_of
from workbench.lib.core.budget import count_params
from workbench.lib.core.task import Task
from workbench.live.probes import find
from workbench.live.probes.blocks import Reader
from workbench.live.probes.conflict import ConflictProbe, compared, undisturbed
from workbench.live.probes.form import FormProbe
from workbench.live.probes.routing import RoutingProbe
from workbench.live.probes.spectra import SpectrumProbe
from workbench.live.provenance import revision, versions
from workbench.live.records import DIVISIONS, PROBE_SECONDS, SPECTRUM, STORE_SECONDS, TOKENS, TRAIN, VALIDATION
from workbench.live.store import DATABASE, Run, RunWriter, new_folder, run_name
from workbench.paths import home

CONFLICT_ROWS = 6
"""Rows of a half batch of the conflict probe: few, because there are two for every domain."""


@dataclass(frozen=True)
class Cadence:
    """Steps between two records of a kind; 0 for none. Every kind is recorded at the first step, too.

    Attributes:
        routing: load, importance, load by domain and modality, drops, confidence of the routers; the form of layers
            that tell it.
        structure: co-activation, transitions, singular spectra.
        conflict: gradient conflict between domains or between modalities (where there are both, the two in turn after
            the first step), spectra of their gradients, and the token ids of every expert.
    """

    routing: int = 10
    structure: int = 50
    conflict: int = 100

    def __post_init__(self):
        for name, every in asdict(self).items():
            if not isinstance(every, int) or isinstance(every, bool) or every < 0:
                raise InputError(f"cadence {name} is {every!r} but must be a whole number of steps, or 0 for never")

    def due(self, kind: str, step: int) -> bool:
        every = getattr(self, kind)
        return every > 0 and step % every == 0


def watch(
    model: nn.Module,
    run: str | Path | RunWriter | None = None,
    *,
    task: Task | None = None,
    total_steps: int | None = None,
    cadence: Cadence | Mapping[str, int] | None = None,
    seed: int = 0,
    meta: Mapping[str, Any] | None = None,
    conflict_rows: int = CONFLICT_ROWS,
    routers: Mapping[str, tuple[int, Reader]] | None = None,
    units: Mapping[str, str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> "Watch":
    """Attach probes to `model` and record what they find in a run.

    Args:
        model: any module; see `probes.find` for what is recognised in it. Parameters that are trained later, such as
            adapters, must be there already.
        run: name of a new run (kept in the user's runs), a folder for it, or an open writer; None for a new name.
        task: where gradient conflict draws batches of each domain from; None for a model without domains. One that has
            `modalities`, their names, may have `modality_loss(model, batch, modality)`, the mean loss of one.
        total_steps: how many steps are planned, for the views.
        cadence: see `Cadence`; a mapping may give some of its values.
        seed: of the batches and starts that probes draw.
        meta: further entries of the run's meta.
        conflict_rows: rows of the half batches of the conflict probe.
        routers: what reads a decision that is not found, or not rightly: for the name of a module or a pattern of names
            the number of experts, and a function of what a forward hook gets that returns the `Routing`, by indices and
            weights (N, K) or by a map and weights (N, E):

            {"layers.*.gate": (8, lambda module, inputs, output: Routing.fixed(output[1], output[0], 8))}
            {"layers.*.gate": (8, lambda module, inputs, output: Routing.ragged(output > 0, output))}
        units: of the values handed to `step` and `evaluation`, for the views: {"loss": "nats/token", "aux": "nats"}.
        resume: go on after the last step of the run of this name or folder, if there is one; `next_step` says where.
            Its model must have the same layers, matrices, parameters and domains.
        overwrite: replace the run of this name or folder, if there is one. It goes when the new one is there.

    Where to look and what was found is said on stderr, unless ``$WORKBENCH_QUIET`` is set. Where a probe has seen
    nothing at the first step it was to record, a warning says so, and what helps. A compiled model is compiled anew,
    its routers are read between graphs: it cannot be one whole graph (``fullgraph=True``).

    Raises:
        InputError: the run is there already and neither `resume` nor `overwrite` says what to do; it is being written
            by another process; it cannot go on with this model; or an argument has a value that is not allowed.
    """
    if resume and overwrite:
        raise InputError("resume and overwrite are both True: a run that is there goes on, or is replaced")
    if (resume or overwrite) and (run is None or isinstance(run, RunWriter)):
        raise InputError(f"{'resume' if resume else 'overwrite'}=True needs the name or the folder of a run")
    if not isinstance(cadence, Cadence):
        for name in cadence or {}:
            if name not in {item.name for item in fields(Cadence)}:
                raise unknown("cadence", name, [item.name for item in fields(Cadence)])
        cadence = Cadence(**(cadence or {}))
    _check_units(units or {})
    probes = Watch(model, task, cadence, seed, conflict_rows, routers)
    try:
        if isinstance(run, RunWriter):
            probes.attach(run, own=False, next_step=run.last_step + 1)
        else:
            entries = {
                "kind": "watch",
                "seed": seed,
                "versions": versions(),
                "git": revision(Path.cwd()),
                "data": task.manifest if task else {},
                "total_steps": total_steps,
                "cadence": asdict(cadence),
                "units": dict(units or {}),
                "model": describe(model, task, routers),
            }
            writer = _writer(_folder(run), entries, dict(meta or {}), resume, overwrite)
            probes.attach(writer, own=True, next_step=writer.last_step + 1)
            if not os.environ.get("WORKBENCH_QUIET"):
                print(f"workbench: watching {probes.where}\nworkbench: found {probes.found}", file=sys.stderr)
    except BaseException:
        probes.close()
        raise
    return probes


def _check_units(units: Mapping[str, str]) -> None:
    for name, unit in units.items():
        if not isinstance(unit, str) or not unit.strip():
            raise InputError(f"units[{name!r}] is {unit!r} but must be a unit in words, such as 'nats/token'")


def _folder(run: str | Path | None) -> Path:
    if run is None:
        return new_folder("watch")
    if isinstance(run, str) and "/" not in run:
        if not run.strip(". "):
            raise InputError(f"run is {run!r} but must be a name, a folder or a RunWriter")
        return home() / "runs" / run
    return Path(run).expanduser().absolute()


def _writer(folder: Path, entries: dict[str, Any], more: dict[str, Any], resume: bool, overwrite: bool) -> RunWriter:
    """Of a new run, of one that goes on, or of one in place of another."""
    if not os.path.exists(folder / DATABASE):  # unlike Path's, never raises
        return RunWriter.create(folder, entries | more)
    try:
        with Run(folder) as past:
            meta, stands = past.meta, f"{past.status.state} after {past.last_step + 1} steps"
    except InputError as error:
        meta, stands = None, str(error)
    if meta and meta.get("kind") != "watch":
        raise InputError(
            f"run {folder.name!r} is there already and no watched model's: workbench resume {folder.name} goes on with "
            "it; choose another name here"
        )
    if overwrite:
        return RunWriter.replace(folder, entries | more)
    if meta is None:
        raise InputError(f"{stands}; overwrite=True replaces it")
    if not resume:
        raise InputError(
            f"run {folder.name!r} is there already ({stands}): pass resume=True to go on with it, overwrite=True to "
            "replace it, or another name"
        )
    if difference := _difference(meta["model"], entries["model"]):
        raise InputError(f"run {folder.name!r} cannot go on with this model: {difference}; overwrite=True replaces it")
    writer = RunWriter.open(folder)
    try:
        said = {key: entries[key] for key in ("seed", "cadence", "total_steps") if entries[key] is not None}
        said |= {"units": entries["units"]} if entries["units"] else {}
        said |= {"model": entries["model"]}  # what was compared is the same; it may be adapted otherwise
        for key, value in (said | more).items():
            writer.set_meta(key, value)
        writer.event(writer.last_step, "resume", "by its own program")
    except BaseException:
        writer.close()
        raise
    return writer


def _difference(past: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first thing in which the descriptions of two models differ, in words."""
    for part in ("layers", "matrices", "groups", "domains", "modalities", "forms"):
        before, after = (_by_name(described.get(part) or {}) for described in (past, now))
        for name in [*before, *after]:
            if before.get(name) != after.get(name):
                was, is_ = (found.get(name, "not there") for found in (before, after))
                one = {"matrices": "matrix", "modalities": "modality"}.get(part, part[:-1])
                return f"{one} {name!r} is {is_} but was {was}"
    return None


def _by_name(part: dict[str, Any] | list[Any]) -> dict[str, Any]:
    if isinstance(part, dict):
        return part
    return {item["name"]: item for item in part if isinstance(item, dict)} or {name: "there" for name in part}


def describe(
    model: nn.Module, task: Task | None = None, routers: Mapping[str, tuple[int, Reader]] | None = None
) -> dict[str, Any]:
    """The entry "model" of a run's meta; active parameters and operations are for the caller to add."""
    found = find.blocks(model, routers)
    matrices, adapted = find.matrices(model, found), adaptation_of(model)
    return {
        "layers": [
            {"name": block.name, "n_experts": block.n_experts, "top_k": block.top_k}
            | ({"recursive": True} if block.recursive else {})
            for block in found
        ],
        "groups": {name: find.size(group) for name, group in find.groups(model, found).items()},
        "matrices": {matrix.name: list(matrix.shape) for matrix in matrices},
        "low_rank": [matrix.name for matrix in matrices if isinstance(matrix, find.LowRank)],
        "pools": {name: [block.name for block in users] for name, users in find.pools(found).items()},
        "forms": {
            layer: {what: list(shape) for what, shape in shapes.items()}
            for layer, shapes in FormProbe(model).shapes.items()
        },
        **{by.parts: list(by.names(task)) for by in DIVISIONS.values()},
        "adaptation": adapted and {"slug": adapted.adapter.slug, "options": adapted.options, **adapted.report()},
        "vocabulary": "bytes" if getattr(task, "vocab", None) == 256 else None,
        "parameters": count_params(model),
        "active_parameters": None,
        "flops": None,
    }


def _names(found: list[find.Block]) -> str:
    names = [block.name or "the model" for block in found]
    return ", ".join(names if len(names) < 4 else (*names[:2], "...", names[-1]))


def _remedy(unseen: list[find.Block]) -> str:
    if not any(block.module.training for block in unseen):
        return (
            "it is in evaluation mode, and a step of training is recorded from forwards in training mode: model.train()"
        )
    return (
        "its router was not called. Watch the very model that is trained, no copy of it, and before a function that "
        "calls it is compiled, or call torch.compiler.reset() after watch"
    )


class Watch:
    """Probes on a model and the run they write; made by `watch`. Best used in `with`, which says how the run ended.

    A step is recorded by `step` after the optimizer has used the gradients. Where that is no optimizer of torch,
    gradients are seen only if they are not yet set to zero or None.

    Where several processes train, `trained` is the model as this one has it: its routing is watched there, and all else
    in `model`, a whole copy that somebody keeps up to date. One that does not lead watches routing alone.

    Attributes:
        writer: of the run.
        next_step: the step that the next call of `step` records, 0-based.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task | None,
        cadence: Cadence,
        seed: int,
        conflict_rows: int = CONFLICT_ROWS,
        routers: Mapping[str, tuple[int, Reader]] | None = None,
        trained: nn.Module | None = None,
        leads: bool = True,
    ):
        self.model, self.task, self.cadence, self.seed = model, task, cadence, seed
        self.trained = model if trained is None else trained
        self.blocks = find.blocks(self.trained, routers)
        of_model = self.blocks if trained is None else find.blocks(model, routers)
        self.groups = find.groups(model, of_model) if leads else {}
        parts = {by.name: len(by.names(task)) for by in DIVISIONS.values()}
        self.routing = RoutingProbe(self.trained, self.blocks, parts, getattr(task, "vocab", None))
        self.spectra = SpectrumProbe(find.matrices(model, of_model) if leads else [])
        self.form = FormProbe(model)
        pairs = any(compared(task, by) for by in DIVISIONS.values()) and cadence.conflict and self.groups
        dense = self.spectra.dense
        self.conflict = ConflictProbe(model, task, self.groups, conflict_rows, dense) if pairs else None
        self.writer: RunWriter | None = None
        self._folder: Path | None = None
        self.next_step = 0
        self._own = False
        self._store_seconds = 0.0
        self._unreviewed = {"routing", "gradient"}
        self._missing: set[str] = set()
        self._doubted: set[str] = set()  # layers whose form is none, once said
        self._compile_anew()

    def attach(self, writer: RunWriter, own: bool, next_step: int) -> None:
        """Write to `writer` from `next_step` on; `own` to close it in the end."""
        self.writer, self._own, self.next_step = writer, own, next_step
        self._folder = writer.folder  # known when the writer has gone, too
        self._began = time.perf_counter()
        self._prepare()

    def step(self, loss: float | None = None, *, seconds: float | None = None, **values: float) -> None:
        """Record one step of training.

        Args:
            loss: task loss of the step; nats, unless `units` says otherwise.
            seconds: duration of the step; left out, the time since the last call. What probes spent is taken off.
            values: further numbers, recorded as `records.TRAIN`: lr, grad_norm, aux or anything else.
        """
        if self.writer is None:
            raise InputError("this watch is closed: no further step can be recorded")
        began, step, cadence = time.perf_counter(), self.next_step, self.cadence
        seconds = began - self._began if seconds is None else seconds
        in_forward, in_evaluation = self.routing.seconds, self.routing.evaluation_seconds
        scalars, tensors = {}, {}
        self._look_for_replaced(step)
        if cadence.due("routing", step) or cadence.due("structure", step):
            scalars, tensors = self.routing.take(structure=cadence.due("structure", step))
            numbers, tables = self.form.take()
            scalars, tensors = scalars | numbers, tensors | tables
        if cadence.due("structure", step):
            tensors |= self.spectra.take(self._seed(step, 2))
        self._review(step, tensors)
        if cadence.due("conflict", step):
            tensors |= self.routing.take_tokens()
            if self.conflict:
                tensors |= self._measure_conflict(step)
        if loss is not None:
            values = {"loss": loss, **values}
        values["step_seconds"] = seconds - in_forward
        self.next_step = step + 1
        self._prepare()
        now = time.perf_counter()
        scalars |= {TRAIN.name(name): float(value) for name, value in values.items()}
        scalars[PROBE_SECONDS.name()] = now - began + in_forward + in_evaluation
        scalars[STORE_SECONDS.name()] = self._store_seconds
        self._record(step, scalars, tensors)
        self.writer.commit(step)
        # what the writing of this step cost is only known now, so it is recorded with the next one
        self._began = time.perf_counter()
        self._store_seconds = self._began - now

    def evaluation(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record an evaluation as `records.VALIDATION`, with the routing of the forward passes in evaluation mode.

        It belongs to the last step recorded, or to `step` if that is yet to be recorded.
        """
        at = max(self.next_step - 1, 0) if step is None else step
        scalars = {VALIDATION.name(name): float(value) for name, value in metrics.items()}
        self._record(at, scalars, self.routing.take_evaluation())
        if step is None:
            self.writer.commit(at)

    def evaluate(self, step: int) -> None:
        """Evaluate the model on a batch of each domain, leaving no trace in it, and record that for `step`."""
        began = time.perf_counter()
        with undisturbed(self.model):
            metrics = self.task.evaluate(self.model, max_batches=1)
        self.evaluation(metrics, step)
        self.routing.evaluation_seconds += time.perf_counter() - began

    def state(self) -> dict[str, Tensor]:
        """What was counted for records still to come: with it a checkpoint continues the run exactly."""
        return {TOKENS.name(name): counts.clone() for name, counts in self.routing.tokens.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, counts in self.routing.tokens.items():
            counts.copy_(state[TOKENS.name(name)])

    def close(self, error: BaseException | None = None) -> None:
        """Take all probes off the model, and end the run if it was made here."""
        self.routing.close()
        self.spectra.close()
        self._compile_anew()
        writer, self.writer = self.writer, None
        if writer is not None and self._own:
            writer.__exit__(type(error) if error else None, error, None)

    @property
    def found(self) -> str:
        """What is looked at in the model, and what looks like a mixture and is not; in one line."""
        sizes = [
            f"{block.n_experts} {'recursions' if block.recursive else 'experts'}"
            + (f", top {block.top_k}" if block.top_k else "")
            for block in self.blocks
        ]
        ends = dict.fromkeys((self.blocks[0].name, self.blocks[-1].name)) if self.blocks else ()
        layers = f"{len(sizes)} mixtures of experts ({' to '.join(ends)}; {'; '.join(dict.fromkeys(sizes))})"
        matrices = len(self.spectra.dense) + len(self.spectra.low_rank)
        text = f"{layers if sizes else 'no mixture of experts'}, {matrices} matrices"
        if self.form.shapes:
            text += f", {len(self.form.shapes)} layers that tell their form"
        for by in self.conflict.divisions if self.conflict else ():
            text += f", {len(by.names(self.task))} {by.parts}"
        if unread := find.unread(self.model, self.blocks):
            text += f"; not read: {', '.join(unread)}, say how with watch(..., routers={{...}})"
        return text

    @property
    def where(self) -> str:
        """The run, the folder that keeps it, and the command that shows it; in one line."""
        command = f"workbench view {shlex.quote(run_name(self._folder))}"
        return f"run {self._folder.name}, kept at {self._folder}; look with: {command}"

    def __repr__(self) -> str:
        state = "closed" if self.writer is None else "open"
        where = "no run yet" if self._folder is None else self.where
        return f"<Watch, {state} after {self.next_step} steps: {self.found}; {where}>"

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def _prepare(self) -> None:
        """Get ready for the next step, before its forward pass."""
        cadence, step = self.cadence, self.next_step
        structure = cadence.due("structure", step)
        self.routing.arm(cadence.due("routing", step) or structure, structure)
        self.routing.seconds = self.routing.evaluation_seconds = 0.0
        if cadence.due("structure", step):
            self.spectra.remember()

    def _look_for_replaced(self, step: int) -> None:
        """Say what has left the model; it is not measured any more."""
        routing = self.cadence.due("routing", step) or self.cadence.due("structure", step)
        gone = [block.name for block in self.routing.gone(self.trained)] if routing else []
        gone += self.form.gone(self.model) if routing else []
        gone += self.spectra.gone(self.model) if self.cadence.due("structure", step) else []
        if fresh := [name for name in gone if name not in self._missing]:
            self._missing.update(fresh)
            self._warn(
                step,
                f"{', '.join(fresh)}: replaced in the model since it is watched, and recorded no more; close this "
                "watch and call watch(..., resume=True), which goes on where names and shapes are the same",
            )

    def _review(self, step: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Say what was not seen where it was first due."""
        for layer in self.form.doubts.keys() - self._doubted:
            self._doubted.add(layer)
            self._warn(step, f"{layer or 'the model'}: {self.form.doubts[layer]}; it is recorded no more")
        routing = self.cadence.due("routing", step) or self.cadence.due("structure", step)
        if routing and "routing" in self._unreviewed:
            self._unreviewed.remove("routing")
            for block in self.blocks:
                if doubt := self.routing.doubts.get(block.name):
                    self._warn(
                        step,
                        f"{block.name or 'the model'}: {doubt}; say how it is read with watch(..., routers={{...}})",
                    )
            unseen = [block for block in self.routing.unseen() if block.name not in self.routing.doubts]
            if unseen := [block for block in unseen if block.name not in self._missing]:
                self._warn(step, f"no decision of {_names(unseen)} was seen: {_remedy(unseen)}")
        if self.cadence.due("structure", step) and "gradient" in self._unreviewed:
            self._unreviewed.remove("gradient")
            kinds = {of[0] for of in map(SPECTRUM.of, tensors) if of is not None}
            if self.spectra.dense and "gradient" not in kinds:
                self._warn(
                    step,
                    "no gradient was seen: call step after an optimizer of torch has stepped, or before gradients are "
                    "set to zero or None",
                )

    def _warn(self, step: int, text: str) -> None:
        """As a warning where `step` is called, and as a note in the run."""
        warnings.warn(f"workbench.watch: {text}", stacklevel=4)
        self.writer.event(step, "note", text)

    def _compile_anew(self) -> None:
        """What was compiled before hooks came or went knows nothing of them."""
        compiled = ("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in self.model.modules())
        if self.blocks and any(compiled):
            torch.compiler.reset()

    def _measure_conflict(self, step: int) -> dict[str, np.ndarray]:
        self.routing.mute(True)
        try:
            return self.conflict.take(self._seed(step, 1), step // self.cadence.conflict)
        finally:
            self.routing.mute(False)

    def _seed(self, step: int, stream: int) -> int:
        """A seed for one probe at one step, apart from those of the training itself."""
        return int(np.random.SeedSequence((self.seed, step, stream)).generate_state(1, np.uint64)[0] >> 1)

    def _record(self, step: int, scalars: Mapping[str, float], tensors: Mapping[str, np.ndarray]) -> None:
        began = time.perf_counter()
        self.writer.scalars(step, scalars)
        self.writer.tensors(step, tensors)
        self._store_seconds += time.perf_counter() - began
