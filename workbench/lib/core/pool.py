"""Experts that several layers use: one bank, shared by reference over depth.

    pool = ExpertPool(GLUExperts(16, 64, 128))
    layers = [MoELayer(LinearRouter(64, 16, 1), pool) for _ in range(6)]

Every layer holds the same object. So an optimiser gets each weight once, and its gradient is the sum over the layers
of what each would get if it had a copy. Where the whole MoE layer is shared, router and all, there is no need of a
pool: a model calls the one layer several times, and says so in its `depths` (see `Announcing`).

Tensor letters: N tokens, D model width, M experts of a pool, L layers.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.routing import Experts, Routing


class ExpertPool(nn.Module):
    """A bank of M experts for any number of layers; itself an `Experts`.

    A state dict of a model with it, and so a safetensors file, has the pool once: see `stored_once`. Under FSDP2, where
    layers are units, the pool is one of its own and the first: `fully_shard(pool)`, then the layers.

    Args:
        bank: the experts, e.g. `GLUExperts`.
    """

    def __init__(self, bank: nn.Module):
        super().__init__()
        if not isinstance(bank, Experts):
            raise InputError(f"bank is a {type(bank).__name__} but must have n_experts, such as GLUExperts")
        self.bank = bank
        stored_once(self)

    @property
    def n_experts(self) -> int:
        return self.bank.n_experts

    def forward(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        return self.bank(x, routing)


def assign_pools(n_layers: int, make_bank: Callable[[], nn.Module], group: int | None = None) -> list[ExpertPool]:
    """The pool of each of L layers: one for every `group` adjacent layers, None for one pool of all.

    Args:
        make_bank: makes the experts of one pool; called once a pool, in the order of the layers.
        group: g, which divides L. g = 1 is a bank for each layer, as usual.
    """
    group = n_layers if group is None else group
    if n_layers < 1:
        raise InputError(f"n_layers is {n_layers} but must be at least 1")
    if group < 1 or n_layers % group:
        raise InputError(f"group is {group} but must be at least 1 and divide n_layers = {n_layers}")
    pools = [ExpertPool(make_bank()) for _ in range(n_layers // group)]
    return [pools[layer // group] for layer in range(n_layers)]


def stored_once(module: nn.Module) -> None:
    """From here on a state dict has what is in `module` once, under the first of its names, and loads from there.

    Without it a module that several others hold is in a state dict once for each of them, which `safetensors` refuses
    to save. A state dict that has it more than once, from before, still loads.
    """
    module.register_state_dict_post_hook(_leave_out)
    module.register_load_state_dict_pre_hook(_arrive)
    module.register_load_state_dict_post_hook(_depart)


def _leave_out(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """Take out what is stored already under another name."""
    where = {name: value.untyped_storage()._cdata for name, value in state.items() if isinstance(value, Tensor)}
    mine = [name for name in state if name.startswith(prefix)]
    there = {place for name, place in where.items() if not name.startswith(prefix)}
    if all(where.get(name) in there for name in mine):
        for name in mine:
            del state[name]


def _arrive(
    module: nn.Module, state: dict, prefix: str, metadata: dict, strict: bool, missing: list[str], *lists: list[str]
) -> None:
    """Note whether this is a further name of a module that the same loading has come to before."""
    before = module.__dict__.get("_loading")
    again = before is not None and before[0] is missing and not any(name.startswith(prefix) for name in state)
    module.__dict__["_loading"] = (missing, prefix if again else None)


def _depart(module: nn.Module, keys: tuple[list[str], list[str]]) -> None:
    """What a state dict has under the first name alone is not missing under the others."""
    missing, prefix = module.__dict__["_loading"]
    if prefix is not None:
        missing[:] = [name for name in missing if not name.startswith(prefix)]
