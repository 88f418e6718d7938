"""An adapted model: what it is told beside its input, what it trains and reports, how it is kept and undone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import InputError, unknown
from workbench.lib.core.adapt.feed_forward import FeedForward
from workbench.lib.core.adapt.files import write_adapter
from workbench.lib.core.adapt.layer import AdaptedLayer, Side
from workbench.lib.core.adapt.matrix import is_turned, tensors_of, weight_at
from workbench.lib.core.adapt.passes import Passes
from workbench.lib.core.adapt.report import target_rows
from workbench.lib.core.adapt.sequences import Generate
from workbench.lib.core.low_rank import LowRankExperts

BESIDE = "adapter"
"""The folder, inside that of a model of transformers, in which its adaptation is kept."""


class Adapter:
    """What one system does with the layers it is put on; see the module's example.

    Attributes:
        slug: in the catalogue.
        facts: what it wants to be told, of `FACTS`.
        router_lr: learning rate of the routers as a multiple of that of the experts.
    """

    slug: str
    facts: tuple[str, ...] = ()
    router_lr: float = 1.0

    def linear(self, layer: nn.Linear, name: str) -> AdaptedLayer:
        """What takes the place of the linear layer called `name`."""
        raise NotImplementedError

    def feed_forward(self, block: FeedForward, name: str) -> AdaptedLayer | None:
        """What takes the place of a feed-forward block whose linear layers are all wanted; None: each by itself.

        A block that is the whole model has nowhere to be replaced, and is adapted layer by layer.
        """
        return None

    def finish(self, adapted: "Adapted") -> None:
        """Called once all layers are in place, for systems that tie layers together."""

    def rate(self, name: str) -> float:
        """Learning rate of a trained parameter, by its name in the model, as a multiple of that of the optimizer."""
        return self.router_lr if ".router." in name else 1.0

    def beside_adamw(self, adapted: "Adapted") -> str | None:
        """What a step of `Adapted.optimizer` is beyond AdamW's, in words; None where it is AdamW's."""
        rates = sorted({self.rate(name) for name in adapted.named_parameters()})
        return None if rates in ([], [1.0]) else f"learning rates of {', '.join(f'{rate:g}' for rate in rates)} times"

    def before_step(self, adapted: "Adapted", optimizer: torch.optim.Optimizer) -> None:
        """Called before each step of `Adapted.optimizer`: gradients are there and may be changed."""

    def after_step(self, adapted: "Adapted", optimizer: torch.optim.Optimizer) -> None:
        """Called after each step of `Adapted.optimizer`: parameters, its state and its groups may be changed."""


class Adapted:
    """An adapted model, with the means to train, tell, report, keep and undo the adaptation.

    Attributes:
        model: the model itself, changed in place, its own parameters frozen.
        adapter: the system.
        layers: what was put in, by module name.
        options: of the system, all of them.
        left_out: what `targets` matches and is not adapted, with the reason.
        by_layer: what has the parts of a feed-forward block and is adapted layer by layer, with the reason.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, targets: Sequence[str], options: dict[str, Any]):
        self.model, self.adapter, self.targets, self.options = model, adapter, tuple(targets), options
        self.layers: dict[str, AdaptedLayer] = {}
        self.left_out: dict[str, str] = {}
        self.by_layer: dict[str, str] = {}
        self.side = Side()
        self._replaced: list[tuple[nn.Module, nn.Module]] = []
        self._trained = {p: p.requires_grad for p in model.parameters()}
        for p in self._trained:
            p.requires_grad_(False)
        self._hooks: list[Any] = []
        self._is_bare = False

    def listen(self) -> None:
        """Called when all layers are in place: from now on it is seen what the model is called with."""
        self._hooks = [
            *Passes(self.side).listen(self.model),
            self.model.register_load_state_dict_pre_hook(self._check_loaded),
        ]
        if callable(getattr(type(self.model), "generate", None)):
            self.model.generate = Generate(self.model)
        self.model._workbench_adapted = self  # where `adaptation_of` finds it, in a copy of the model the copy of it
        if hasattr(self.model, "save_pretrained"):  # transformers' own would write names that nobody can load
            self.model.save_pretrained = self.save_pretrained

    @property
    def rebuilt(self) -> bool:
        """Whether more was replaced than `layers`: packed experts taken apart, or a block in two modules joined."""
        return len(self._replaced) > len(self.layers)

    @contextmanager
    def given(self, axis: int = 0, **facts: int | Sequence[int] | Tensor) -> Iterator[None]:
        """Tell the model something beside its input for the forwards inside: task, language, label or modality.

        Each fact is a number for all rows, one for each row of the batch, or one for each token. What a system does
        without is written in its `Adapter`; a fact it has no use for is an error.

        Args:
            axis: of the rows of the batch in what layers are given: 1 for models of (time, batch, width).
        """
        for name in facts:
            if name not in self.adapter.facts:
                raise unknown(f"fact of {self.adapter.slug}", name, self.adapter.facts)
        before = dict(self.side.given), self.side.axis
        self.side.given.update({name: torch.as_tensor(value) for name, value in facts.items()})
        self.side.axis = axis
        try:
            yield
        finally:
            self.side.given.clear()
            self.side.given.update(before[0])
            self.side.axis = before[1]

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Generate the same sequences with all forwards inside, by a loop of your own and without a cache.

        What a system decides for a whole sequence it decides in the first forward, and it stays, as with a cache. The
        `generate` of a transformers model does that by itself.
        """
        with self.side.deciding():
            yield

    def losses(self) -> dict[str, Tensor]:
        """The weighted auxiliary losses of the last forward by name, each summed over the layers; {} without any.

        To be trained with the task's loss: `loss + sum(adapted.losses().values())`. Where the model is called with a
        `Context`, as `train` does, `context.aux` holds them already, beside the model's own: add that, and not both.

        Layers may be checkpointed. With a reentrant checkpoint the losses must be differentiated together with the
        output; apart from it, or of a forward under `torch.no_grad()`, their backward pass raises an `InputError`.

        They are means over tokens: of a step that is made of several batches, each counts by its share of the tokens.
        Under transformers' `Trainer`, `live.trainer_callback` sees to that.
        """
        found: dict[str, Tensor] = {}
        losses = {} if self.side.forward is None else self.side.forward.losses()
        for (_, name), loss in losses.items():
            found[name] = found.get(name, 0.0) + loss
        return found

    def put(self, name: str, before: nn.Module, layer: AdaptedLayer) -> None:
        """Put `layer` everywhere the module `before` is."""
        layer.side, layer.slug, layer.place = self.side, self.adapter.slug, name
        _match(layer, next(iter(tensors_of(before).values())))
        layer.train(before.training)
        for base, bank in _banks(layer):
            bank.turned = is_turned(base)
        self.layers[name] = layer
        self.replace(before, layer)

    def replace(self, before: nn.Module, after: nn.Module) -> None:
        """Put `after` everywhere the module `before` is, until `remove`."""
        self._replaced.append((before, after))
        replace_module(self.model, before, after)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters of what was put in, by their name in the model, each once."""
        return {f"{name}.{key}": p for name, key, p in self._own_parameters()}

    def _own_parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Each once: the layer that has it first, its name there, and the parameter."""
        seen = set(self._trained)
        for name, layer in self.layers.items():
            for key, p in layer.named_parameters():
                if p not in seen and p.requires_grad:
                    seen.add(p)
                    yield name, key, p

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters of what was put in."""
        return list(self.named_parameters().values())

    def optimizer(self, lr: float = 3e-3, weight_decay: float = 0.0) -> torch.optim.AdamW:
        """AdamW over the trained parameters, each at the system's own multiple of the learning rate, `Adapter.rate`.

        A system that has more to do in a step than AdamW does it in the steps of this optimizer, in whatever loop: the
        rates of lora+ and of mhr's routers, the gradients of riemannian and lora-pro, the restarts of relora, the ranks
        of adalora. With an optimizer of one's own there is none of it. transformers' `Trainer` makes its own unless it
        is given this: `Trainer(model, args, optimizers=(adapted.optimizer(args.learning_rate), None))`, which its
        schedule then scales; `live.trainer_callback` says so where it was not.
        """
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, p in self.named_parameters().items():
            groups.setdefault((".router." in name, self.adapter.rate(name)), []).append(p)
        ordered = sorted(groups.items(), key=itemgetter(0))  # routers last
        rows = [{"params": group, "lr_scale": rate, "lr": lr * rate} for (_, rate), group in ordered]
        optimizer = torch.optim.AdamW(rows, lr=lr, weight_decay=weight_decay)
        optimizer.adapted = self
        optimizer.register_step_pre_hook(lambda *_: self.adapter.before_step(self, optimizer))
        optimizer.register_step_post_hook(lambda *_: self.adapter.after_step(self, optimizer))
        return optimizer

    def report(self) -> dict[str, Any]:
        """Counts of parameters: base (of the model as it was), added, trained; and trained in percent of all.

        And what was put where, as "targets", by the names of the layers: see `adapt.report.target_rows`; and how many
        parameters are trained in each, those that layers share in the first. And, by name with the reason, what
        `targets` matches and was left out, and what was adapted layer by layer though it has the parts of a
        feed-forward block. The page of a run that is watched shows it.
        """
        base = sum(p.numel() for p in self._trained)
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.parameters())
        counts = {"base": base, "added": total - base, "trained": trained, "percent": 100 * trained / total}
        rest = {"left_out": dict(self.left_out), "by_layer": dict(self.by_layer)}
        rows = {name: row | {"trained": 0} for name, row in target_rows(self.model, self.layers).items()}
        for name, _, p in self._own_parameters():
            rows[name]["trained"] += p.numel()
        return counts | {"targets": rows} | rest

    def save(self, folder: str | Path) -> Path:
        """Keep it in a new folder, or in place of the adaptation that is there; `load_adapter` gets it back.

        Raises:
            InputError: something else is at `folder`.
            OSError: the disk is full or not writable; what was there still is.
        """
        return write_adapter(folder, self.layers, self.adapter.slug, self.targets, self.options)

    def save_pretrained(self, folder: str | Path, *rest: Any, **keywords: Any) -> None:
        """What a model of transformers does by that name while it is adapted: keep it in `folder` without the
        adaptation, so that `from_pretrained` gets it as it was, and the adaptation in `folder/adapter`, see `BESIDE`.

        Raises:
            InputError: a `state_dict` is passed, whose names would be those of the adapted model.
        """
        if keywords.get("state_dict") is not None:
            raise InputError("state_dict is passed, but an adapted model is saved from its own: save(folder) keeps it")
        with self.bare():
            type(self.model).save_pretrained(self.model, folder, *rest, **keywords)
        self.save(Path(folder) / BESIDE)

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The model as it is without the adaptation, to save or load its own weights inside."""
        for before, after in reversed(self._replaced):
            replace_module(self.model, after, before)
        self._is_bare = True
        try:
            yield
        finally:
            self._is_bare = False
            for before, after in self._replaced:
                replace_module(self.model, before, after)

    def merge_back(self, untie: bool = False) -> nn.Module:
        """Fold every update into the layer it belongs to, and take the adapters off: the same function, no overhead.

        Args:
            untie: a weight that is used elsewhere in the model too, as an output layer's is that is tied to the
                embedding, becomes the layer's own first. Where the model's `config` speaks of ties it says that there
                are none from then on, and none are left.

        Raises:
            InputError: the update of some layer depends on the token, so no single matrix holds it; or it makes the
                weight infinite or NaN; or the weight is used elsewhere too and `untie` is not set. Nothing is changed.
        """
        routed = [name for name, layer in self.layers.items() if layer.fixed_update() is None]
        if routed:
            raise InputError(
                f"{self.adapter.slug} cannot be merged back: in {len(routed)} layers, such as {routed[0]}, the update "
                "depends on the token; what merges is lora"
            )
        tied = self._tied()
        if tied and not untie:
            shown = ", ".join(f"{name} with {other}" for name, other in tied.items())
            raise InputError(f"layers share their weight, which would change in both: {shown}; pass untie=True")
        broken = [name for name, layer in self.layers.items() if not _merged(layer).isfinite().all()]
        if broken:
            raise InputError(f"the updated weight of {', '.join(broken)} is not finite, so nothing is merged back")
        with torch.no_grad():
            for name, layer in self.layers.items():
                merged, (module, key) = _merged(layer), weight_at(layer.base)
                if name in tied:
                    self._own(module, key)
                layer.base.weight.copy_(merged)
        if tied and getattr(getattr(self.model, "config", None), "tie_word_embeddings", False):
            self.model.config.tie_word_embeddings = False
            seen: set[nn.Parameter] = set()
            for module in self.model.modules():
                for key, p in module._parameters.items():
                    if p is not None and p in seen:
                        self._own(module, key)
                    seen.add(p)
        return self.remove()

    def remove(self) -> nn.Module:
        """Put the layers that were there back, trainable as before; apart from `merge_back`, bit for bit."""
        for before, after in reversed(self._replaced):
            replace_module(self.model, after, before)
        for hook in self._hooks:
            hook.remove()
        if isinstance(vars(self.model).get("generate"), Generate):
            del self.model.generate
        for p, wanted in self._trained.items():
            p.requires_grad_(wanted)
        for key in ("save_pretrained", "_workbench_adapted"):
            vars(self.model).pop(key, None)
        self.layers, self._replaced = {}, []
        return self.model

    def _check_loaded(self, model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Before a state is loaded: where it is not strict, what is missing would stay as it is in silence."""
        if self._is_bare or not self._replaced:
            return
        here = set(model.state_dict())
        with self.bare():
            other = [name for name in model.state_dict() if name not in here and prefix + name in state]
        if other:
            raise InputError(
                f"the state to load is of the model before it was adapted, with {other[0]!r}, and has nothing "
                "of the adaptation: a checkpoint of transformers' Trainer is loaded whole where the trainer has a "
                "WatchCallback(trainer, adapted=...) of workbench.live.trainer_callback; else load within "
                "adapted.bare(), and the adaptation with workbench.load_adapter on the bare model"
            )

    def _own(self, module: nn.Module, key: str) -> None:
        """Give a module a parameter of its own in place of one that others have too."""
        p = module._parameters[key]
        module._parameters[key] = own = nn.Parameter(p.detach().clone())
        self._trained[own] = self._trained[p]

    def _tied(self) -> dict[str, str]:
        """The adapted layers whose weight is used elsewhere in the model too, by name, and where."""
        users: dict[nn.Parameter, list[str]] = {}
        for name, module in self.model.named_modules():
            for key, p in module._parameters.items():
                users.setdefault(p, []).append(f"{name}.{key}".replace(".base.", ".").lstrip("."))
        places = {name: weight_at(layer.base) for name, layer in self.layers.items()}
        found = {}
        for name, (module, key) in places.items():
            others = users[module._parameters[key]]
            if len(others) > 1:
                found[name] = next(other for other in others if other != f"{name}.weight")
        return found


def adaptation_of(model: nn.Module) -> Adapted | None:
    """The adaptation of the model, or of one inside it."""
    return next((of for module in model.modules() if (of := vars(module).get("_workbench_adapted")) is not None), None)


def adapted_with(model: nn.Module) -> str | None:
    """The system that some layer of the model is adapted with already."""
    return next((module.slug for module in model.modules() if isinstance(module, AdaptedLayer)), None)


def _banks(layer: AdaptedLayer) -> list[tuple[nn.Module, LowRankExperts]]:
    """The banks of a layer, or of a block, each with the linear layer that it is for."""
    experts, block = getattr(layer, "experts", None), getattr(layer, "block", None)
    of_block = isinstance(experts, nn.ModuleDict) and block is not None
    pairs = [(block.linears[key], bank) for key, bank in experts.items()] if of_block else [(layer.base, experts)]
    return [(base, bank) for base, bank in pairs if isinstance(bank, LowRankExperts)]


def _match(layer: AdaptedLayer, like: Tensor) -> None:
    """Move what was added to the device of `like`, in its type or in float32 where that is narrower.

    Half precision loses the steps of an optimizer, and what is frozen stays as it is.
    """
    dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
    frozen = set(layer.base.modules())
    for module in layer.modules():
        if module not in frozen:  # as `module.to` does, without what is inside
            module._apply(lambda t: t.to(like.device, dtype if t.is_floating_point() else None), recurse=False)


def _merged(layer: AdaptedLayer) -> Tensor:
    """The weight with the update, in the weight's own dtype."""
    with torch.no_grad():
        return (layer.base.weight + layer.fixed_update()).to(layer.base.weight.dtype)


def replace_module(model: nn.Module, before: nn.Module, after: nn.Module) -> None:
    """Put `after` wherever `before` is in the model, except inside `after` itself."""
    skip = set(after.modules())
    for parent in list(model.modules()):
        if parent in skip:
            continue
        for key, child in parent._modules.items():  # named_children gives a module that is there twice once
            if child is before:
                parent._modules[key] = after
