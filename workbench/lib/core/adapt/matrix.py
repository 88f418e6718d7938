"""Linear layers that are no `nn.Linear`: GPT-2's `Conv1D`, and one matrix of a packed tensor, seen as one."""

from torch import Tensor, nn

from workbench.errors import InputError


class Matrix(nn.Linear):
    """A matrix that lies in another module, in the place and with the names of a linear layer. It has no copy of it.

    Args:
        module: where it lies.
        weight, bias: names of its parameters there.
        index: of the matrix in a packed tensor; None where the whole parameter is the matrix.
        transposed: whether it lies as (I, O).
        own: whether `module` belongs to this one, and is called in its stead. Otherwise it stays where it is.
    """

    def __init__(
        self,
        module: nn.Module,
        weight: str = "weight",
        bias: str | None = None,
        index: int | None = None,
        transposed: bool = False,
        own: bool = False,
    ):
        nn.Module.__init__(self)
        self.key, self.bias_key, self.index, self.transposed = weight, bias, index, transposed
        self.whole = module if own else None
        self._module = (module,)  # in a tuple, which keeps it from being registered
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:
        weight = self._part(getattr(self._module[0], self.key))
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        return None if self.bias_key is None else self._part(getattr(self._module[0], self.bias_key))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.whole is None else self.whole(x)

    def _part(self, packed: Tensor) -> Tensor:
        return packed if self.index is None else packed[self.index]


def is_linear(module: nn.Module) -> bool:
    """Whether a linear layer can be adapted: it is one, and nobody reads its weight past whatever takes its place.

    Not a subclass of `nn.Linear`: torch's multi-head attention, for one, has such a layer and reads its weight itself.
    """
    return (type(module) in (nn.Linear, Matrix) or _is_conv1d(module)) and module.weight.numel() > 0


def as_linear(module: nn.Module, own: bool = False) -> nn.Linear:
    """The layer itself, or what shows it as a linear layer."""
    if not _is_conv1d(module):
        return module
    return Matrix(module, bias=None if module.bias is None else "bias", transposed=True, own=own)


def is_turned(layer: nn.Module) -> bool:
    """Whether the weight of a linear layer, or of what shows it as one, lies as (I, O)."""
    return layer.transposed if isinstance(layer, Matrix) else _is_conv1d(layer)


def weight_at(layer: nn.Linear) -> tuple[nn.Module, str]:
    """The module and the name under which the parameter with the layer's weight is kept.

    Raises:
        InputError: there is no such parameter: it is computed from others.
    """
    module, key = (layer._module[0], layer.key) if isinstance(layer, Matrix) else (layer, "weight")
    if key not in module._parameters:
        kind = type(module).__name__
        raise InputError(f"the weight of a {kind} is computed from others, so nothing can be merged into it")
    return module, key


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module by name, those of matrices that lie elsewhere among them."""
    found = dict(module.state_dict())
    for name, part in module.named_modules():
        if isinstance(part, Matrix) and part.whole is None:
            tensors = {"weight": part.weight, "bias": part.bias}
            found |= {f"{name}.{key}".lstrip("."): t.detach() for key, t in tensors.items() if t is not None}
    return found


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)  # by its name, so that transformers is not imported
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
