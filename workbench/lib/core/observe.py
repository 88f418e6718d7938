"""Modules that say what they route where, or what form they have taken, and the observers who listen or ask."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workbench.lib.core.routing import Context, Routing

Observer = Callable[["Announcing", Routing, Context], None]


class Announcing(nn.Module):
    """A module that announces every routing decision it makes: what the live views and the studies watch.

    Attributes:
        n_experts: E, the number of places a token can be sent to.
        top_k: K where every token is sent to exactly K of them, else None.
        depths: of a module that a model applies several times in one forward pass, the depths at which it does, in
            order. Each is then a layer of its own to the live views, as long as the passes share one `Context`.
        recursive: whether the places are recursions, one behind the other: how many a token has is its depth.
    """

    n_experts: int
    top_k: int | None
    depths: tuple[int, ...] = ()
    recursive: bool = False

    def __init__(self):
        super().__init__()
        self._observers: OrderedDict[int, Observer] = OrderedDict()

    def observe(self, observer: Observer) -> RemovableHandle:
        """Call `observer(module, routing, context)` after each forward, until the returned handle's `remove()`."""
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    @property
    def observed(self) -> bool:
        """Whether anyone listens: a module may skip work that only an announcement needs."""
        return bool(self._observers)

    def announce(self, routing: Routing, context: Context) -> None:
        """Tell all observers; `context.passed[self]` is then the number of this decision in the pass, from 1."""
        if self._observers:
            context.passed[self] = context.passed.get(self, 0) + 1
        for observer in tuple(self._observers.values()):
            observer(self, routing, context)


def announcing(model: nn.Module) -> list[Announcing]:
    """The modules of a model that announce, in its order."""
    return [module for module in model.modules() if isinstance(module, Announcing)]


def routed_layers(model: nn.Module) -> dict[str, Announcing]:
    """Those whose router has settings that may change while training, by their name in the model."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, Announcing))
    return {name: module for name, module in found if hasattr(getattr(module, "router", None), "coefficients")}


def _decision(routing: Routing, context: Context) -> tuple[Routing, Context]:
    return routing, context


@contextmanager
def observing(modules: Iterable[nn.Module], keep: Callable[..., Any] = _decision) -> Iterator[dict[nn.Module, list]]:
    """What the modules announce inside, module by module and in order; nobody listens any more afterwards.

    Args:
        modules: `Announcing` ones, or others with an `observe` of their own.
        keep: what is kept of a decision; by default the routing and its context.
    """
    seen: dict[nn.Module, list] = {module: [] for module in modules}
    handles = [module.observe(lambda module, *said: seen[module].append(keep(*said))) for module in seen]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@runtime_checkable
class Changing(Protocol):
    """A module whose form changes while it trains: its rank, its mask, its stage.

    It is asked at a cadence by whoever watches the model; where nobody does, nothing is computed. What it says is
    recorded and drawn over time (`live.probes.form`), layer beside layer.
    """

    def form_now(self) -> Mapping[str, float | Tensor]:
        """What the form is at this moment, by name: the same names and shapes at every call, NaN where undefined.

        A number (a rank, a stage, a share of what is active), a vector (n,) (importances, a mask; 0 for what was cut)
        or a matrix (m, n) (an overlap of tasks). Asking changes nothing: no random number is drawn, no state is kept.
        """


@contextmanager
def outputs(module: nn.Module) -> Iterator[list]:
    """What a module returns inside, call by call."""
    found: list = []
    with module.register_forward_hook(lambda *call: found.append(call[-1])):
        yield found


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Forward passes inside are seen by no observer of the model's modules; afterwards all observers are back."""
    modules = announcing(model)
    observers = [module._observers for module in modules]
    for module in modules:
        module._observers = OrderedDict()
    try:
        yield
    finally:
        for module, kept in zip(modules, observers, strict=True):
            module._observers = kept
