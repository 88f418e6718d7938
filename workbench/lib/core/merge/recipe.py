"""The YAML recipes of mergekit, read as merges of ours: the same numbers, or a refusal that names key and line.

    base_model: base                      recipe = read_recipe("recipe.yml")
    merge_method: task_arithmetic         vectors = open_models(recipe.base, recipe.experts)
    models:                               write_model(vectors, recipe.merger, recipe.base, "merged")
      - model: expert
        parameters: {weight: [0, 0.5, 1]}

As in mergekit 0.1.5: a parameter is looked for at its model, then at the whole recipe, then it has its default; a list
of numbers is interpolated over the layers, evenly from the first to the last, and its first number is for what is in no
layer; a list of {filter, value} takes the first whose filter is part of the tensor's name, or "*", or not there. All
methods merge each tensor by itself. DARE draws other numbers than mergekit, by the same rule. What is not done is never
passed over: slices, modules, other methods, a changed tokenizer, another dtype than the base's.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from workbench.errors import InputError, unknown
from workbench.lib.core.adapt.files import read_bytes
from workbench.lib.core.merge.linear import TaskArithmetic
from workbench.lib.core.merge.merger import Merger, Update
from workbench.lib.core.merge.trimmed import Dare, DareTies, Ties, check_density, kept_count, threshold
from workbench.lib.core.merge.vectors import TaskVectors

LONGEST = 2**18
"""Bytes of the longest recipe that is read."""

DONE = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source")
NOT_DONE = ("slices", "modules", "tokenizer", "chat_template")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

Found = Mapping[str, Any]


class TiesOfEach(Ties):
    """TIES by mergekit's conventions, with a density of each expert."""

    def __init__(self, densities: list[float], weights: list[float], scale: float, divide: bool):
        for density in densities:
            check_density(density)
        super().__init__(1.0, weights, scale, "tensor", "weighted", divide="weights" if divide else None, least=1)
        self.densities = densities

    def _thresholds(self, vectors: TaskVectors) -> dict[str, list[float]]:
        def of(name: str, i: int) -> float:
            k = kept_count(self.densities[i], vectors.sizes[name], self.least)
            return threshold(vectors, i, [name], k) if self.densities[i] < 1 else 0.0

        return {name: [of(name, i) for i in range(vectors.n)] for name in vectors.names if vectors.sizes[name]}


class WholeModels(TaskArithmetic):
    """sum_i w_i theta_i, in which the base has the weight sum_i w_i."""

    def __init__(self, weights: list[float]):
        super().__init__(1.0, weights)

    def update(self, vectors: TaskVectors) -> Update:
        for place, update in super().update(vectors):
            yield place, update + (sum(self.weights) - 1) * vectors.values(place)


def _linear(of: Found, shared: Found) -> Merger:
    if shared["normalize"]:
        return TaskArithmetic(1.0, of["weight"], "weights")
    return WholeModels(of["weight"])


def _task_arithmetic(of: Found, shared: Found) -> Merger:
    return TaskArithmetic(_scale(of, shared), of["weight"])


def _ties(of: Found, shared: Found) -> Merger:
    if any(weight < 0 for weight in of["weight"]):
        raise InputError("weights below 0 are not done for ties: an expert would vote against what it is")
    return TiesOfEach(of["density"], of["weight"], shared["lambda"], shared["normalize"])


def _dare_linear(of: Found, shared: Found) -> Merger:
    return Dare(_one(of["density"]), of["weight"], _scale(of, shared), "l1" if shared["rescale"] else None)


def _dare_ties(of: Found, shared: Found) -> Merger:
    if any(weight < 0 for weight in of["weight"]):
        raise InputError("weights below 0 are not done for dare_ties: an expert would vote against what it is")
    rescale, divide = "l1" if shared["rescale"] else None, "weights" if shared["normalize"] else None
    return DareTies(_one(of["density"]), of["weight"], shared["lambda"], rescale, "weighted", divide)


def _scale(of: Found, shared: Found) -> float:
    """lambda, over the sum of the weights where the recipe normalizes and that is not 0."""
    total = sum(of["weight"])
    return shared["lambda"] / (total if shared["normalize"] and abs(total) >= 1e-8 else 1.0)


def _one(densities: list[float]) -> float:
    if len(set(densities)) > 1:
        raise InputError(f"densities {densities} are not done for dare: all models must have the same")
    return densities[0]


@dataclass(frozen=True)
class Form:
    """A method of mergekit.

    Attributes:
        make: the merger of the parameters that a tensor has.
        normalize, rescale: their defaults; a rescale that is not the default of a method that drops by chance is done,
            of others it is refused.
    """

    make: Callable[[Found, Found], Merger]
    normalize: bool
    rescale: bool = False

    @property
    def models(self) -> dict[str, float | None]:
        """The parameters of each model and their defaults; None where it must be given."""
        return {"weight": None} | ({} if self.make is _linear else {"density": 1.0})

    @property
    def shared(self) -> dict[str, float | bool]:
        """The parameters of the whole recipe and their defaults."""
        # int8_mask is about the memory of mergekit's own masks
        more = {"lambda": 1.0, "int8_mask": False, "rescale": self.rescale}
        return {"normalize": self.normalize} | ({} if self.make is _linear else more)


FORMS = {
    "linear": Form(_linear, normalize=True),
    "task_arithmetic": Form(_task_arithmetic, normalize=False),
    "ties": Form(_ties, normalize=True),
    "dare_linear": Form(_dare_linear, normalize=False, rescale=True),
    "dare_ties": Form(_dare_ties, normalize=False, rescale=True),
}


@dataclass(frozen=True)
class Setting:
    """A parameter as it is written: a number, a gradient, or values by filters; and the line it is in."""

    value: Any
    line: int

    def at(self, name: str, t: float) -> Any:
        """Its value for a tensor at t of the layers, 0 to 1; None where no filter takes the tensor."""
        return _at(self.value, name, t)


def _at(value: Any, name: str, t: float) -> Any:
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    if isinstance(value[0], dict):
        for one in value:
            if one.get("filter") in (None, "*") or one["filter"] in name:
                return _at(one["value"], name, t)
        return None
    scaled = t * (len(value) - 1)
    low = int(scaled)
    if isinstance(value[0], bool):
        return value[low]
    return (1 - (scaled - low)) * value[low] + (scaled - low) * value[min(low + 1, len(value) - 1)]


@dataclass(frozen=True)
class Recipe(Merger):
    """A merge that a recipe asks for; each tensor is merged with its own parameters.

    Attributes:
        base, experts: paths, as they are written.
        method: mergekit's name.
        models, shared: the parameters of each expert, and of the whole recipe.
        dtype: that the base must have; None where the recipe says nothing.
    """

    path: Path
    base: Path
    experts: list[Path]
    method: str
    models: list[dict[str, Setting]]
    shared: dict[str, Setting]
    dtype: torch.dtype | None = None
    dtype_line: int = field(default=0)

    def update(self, vectors: TaskVectors) -> Update:
        other = {name: kind for name, kind in vectors.dtypes.items() if self.dtype not in (None, kind)}
        if other:
            name, kind = next(iter(other.items()))
            raise InputError(
                f"{self.path}, line {self.dtype_line}: the dtype is {self.dtype} but must be the base's, which has "
                f"{name} as {kind}: a merge here changes no dtype, and computes in float32 or better"
            )
        layers = _layers(vectors.names)
        form = FORMS[self.method]
        for name in vectors.names:
            t = layers[name]
            of = {
                key: [self._value(key, default, name, t, own) for own in self.models]
                for key, default in form.models.items()
            }
            shared = {key: self._value(key, default, name, t, {}) for key, default in form.shared.items()}
            try:
                merger = form.make(of, shared)
            except InputError as error:
                raise InputError(f"{self.path}: {name}: {error}") from error
            yield from merger.update(vectors.only([name]))

    def _value(self, key: str, default: Any, name: str, t: float, own: Mapping[str, Setting]) -> Any:
        for settings in (own, self.shared):
            if key in settings and (value := settings[key].at(name, t)) is not None:
                return value
        if default is None:
            raise InputError(
                f"{self.path}: {self.method} needs {key} for {name}, of every model or of the whole recipe"
            )
        return default


def _layers(names: list[str]) -> dict[str, float]:
    """Where each tensor is from the first layer, 0, to the last, 1; 0 in none, and 1 of a lone layer."""
    found = {name: re.match(r"(.*?)\.(\d+)\.", name) for name in names}
    last: dict[str, int] = {}
    for match in filter(None, found.values()):
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    return {name: (int(m[2]) / last[m[1]] if last[m[1]] else 1.0) if m else 0.0 for name, m in found.items()}


def read_recipe(path: str | Path) -> Recipe:
    """A recipe from a file.

    Raises:
        InputError: it is no YAML of at most `LONGEST` bytes, has aliases, or asks for what is not done (key and line).
    """
    path = Path(path)
    text = read_bytes(path, LONGEST)
    try:
        # an alias may stand for a billion others
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise InputError(f"{path} has an alias (*name), which no recipe needs")
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no YAML: {error}") from error
    return _Reader(path).recipe(root)


class _Reader:
    """Nodes of YAML into a recipe; every complaint has the line."""

    def __init__(self, path: Path):
        self.path = path

    def wrong(self, node: yaml.Node | None, text: str) -> InputError:
        return InputError(f"{self.path}, line {1 if node is None else node.start_mark.line + 1}: {text}")

    def recipe(self, root: yaml.Node | None) -> Recipe:
        top = self.entries(root, "a recipe")
        for key, (at, _) in top.items():
            if key in NOT_DONE:
                raise self.wrong(at, f"{key} is not done; a recipe here has {', '.join(DONE)}")
            if key not in DONE:
                raise self.wrong(at, str(unknown("key", key, DONE)))
        method = self.text(top, "merge_method", root)
        if method not in FORMS:
            raise self.wrong(top["merge_method"][1], str(unknown("merge_method", method, FORMS)))
        form = FORMS[method]
        if "tokenizer_source" in top and self.text(top, "tokenizer_source", root) != "base":
            raise self.wrong(top["tokenizer_source"][0], "tokenizer_source must be base, whose tokenizer is copied")
        dtype, line = self.dtype(top)
        allowed = {**form.models, **form.shared}
        shared = self.settings(top["parameters"][1], allowed) if "parameters" in top else {}
        if not form.rescale and (rescale := shared.get("rescale")) and rescale.value is not False:
            raise InputError(f"{self.path}, line {rescale.line}: rescale is not done for {method}")
        if "models" not in top:
            raise self.wrong(root, "models is missing: the list of what is merged")
        listed = [self.model(node, form) for node in self.items(top["models"][1], "models")]
        if not listed:
            raise self.wrong(top["models"][1], "models is empty")
        names = [name for name, _ in listed]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise self.wrong(top["models"][1], f"models has {', '.join(sorted(doubled))} twice")
        base = self.text(top, "base_model", root) if "base_model" in top else None
        if method == "linear":
            if base is not None and base not in names:
                raise self.wrong(top["base_model"][0], "base_model of linear must be one of the models, or not there")
            base = names[0] if base is None else base
        elif base is None:
            raise self.wrong(root, f"base_model is missing, which {method} needs")
        else:  # the base is no task of its own
            listed = [(name, settings) for name, settings in listed if name != base]
            if not listed:
                raise self.wrong(top["models"][1], "models has only the base")
        experts, models = [Path(name) for name, _ in listed], [settings for _, settings in listed]
        return Recipe(self.path, Path(base), experts, method, models, shared, dtype, line)

    def dtype(self, top: Mapping[str, tuple]) -> tuple[torch.dtype | None, int]:
        said = [(key, self.text(top, key, None)) for key in ("dtype", "out_dtype") if key in top]
        for key, name in said:
            if name not in DTYPES:
                raise self.wrong(top[key][1], str(unknown(key, name, DTYPES)))
        if not said:
            return None, 0
        key, name = said[-1]  # what is written has out_dtype
        return DTYPES[name], top[key][0].start_mark.line + 1

    def model(self, node: yaml.Node, form: Form) -> tuple[str, dict[str, Setting]]:
        found = self.entries(node, "a model")
        for key, (at, _) in found.items():
            if key not in ("model", "parameters"):
                raise self.wrong(at, str(unknown("key of a model", key, ("model", "parameters"))))
        name = self.text(found, "model", node)
        if "+" in name and not Path(name).exists():
            raise self.wrong(node, f"model {name!r} is a model and a LoRA: name the LoRA's folder alone as a model")
        if "parameters" not in found:
            return name, {}
        return name, self.settings(found["parameters"][1], form.models, "a model's parameters")

    def settings(self, node: yaml.Node, allowed: Mapping[str, Any], whose: str = "parameters") -> dict[str, Setting]:
        settings = {}
        for key, (at, value) in self.entries(node, "parameters").items():
            if key not in allowed:
                raise self.wrong(at, str(unknown(f"key of {whose}", key, allowed)))
            kind = bool if isinstance(allowed[key], bool) else float
            settings[key] = Setting(self.setting(value, kind, key), at.start_mark.line + 1)
        return settings

    def setting(self, node: yaml.Node, kind: type, key: str) -> Any:
        """A value of the kind, a list of them, or one or a list of {filter, value}."""
        if isinstance(node, yaml.MappingNode):
            return self.conditional(node, kind, key)
        if isinstance(node, yaml.SequenceNode):
            if not node.value:
                raise self.wrong(node, f"{key} is an empty list")
            if isinstance(node.value[0], yaml.MappingNode):
                return [self.conditional(one, kind, key) for one in node.value]
            return [self.scalar(one, kind, key) for one in node.value]
        return self.scalar(node, kind, key)

    def conditional(self, node: yaml.Node, kind: type, key: str) -> dict[str, Any]:
        found = self.entries(node, f"{key} with filters")
        for name, (at, _) in found.items():
            if name not in ("filter", "value"):
                raise self.wrong(at, str(unknown(f"key of {key}", name, ("filter", "value"))))
        if "value" not in found or isinstance(found["value"][1], yaml.MappingNode):
            raise self.wrong(node, f"{key} with filters must be a list, each with a value and perhaps a filter")
        filter_ = self.text(found, "filter", node) if "filter" in found and found["filter"][1].value != "null" else None
        return {"filter": filter_, "value": self.setting(found["value"][1], kind, key)}

    def scalar(self, node: yaml.Node, kind: type, key: str) -> float | bool:
        value = yaml.SafeLoader("").construct_object(node) if isinstance(node, yaml.ScalarNode) else None
        if kind is bool and isinstance(value, bool):
            return value
        if kind is float and not isinstance(value, bool):
            try:
                number = float(value)  # YAML takes 1e-3 for a word
                if abs(number) < float("inf"):
                    return number
            except (TypeError, ValueError):
                pass
        words = "true or false" if kind is bool else "a finite number"
        raise self.wrong(node, f"{key} is {str(node.value)[:60]!r} but must be {words}")

    def entries(self, node: yaml.Node | None, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key -> the nodes of key and value, of a mapping."""
        if not isinstance(node, yaml.MappingNode):
            raise self.wrong(node, f"{what} must be keys with values")
        found = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in found:
                raise self.wrong(key, f"{what} has the key {str(key.value)[:60]!r} twice, or no word for a key")
            found[key.value] = (key, value)
        return found

    def items(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise self.wrong(node, f"{what} must be a list")
        return node.value

    def text(self, found: Mapping[str, tuple], key: str, around: yaml.Node | None) -> str:
        if key not in found:
            raise self.wrong(around, f"{key} is missing")
        node = found[key][1]
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise self.wrong(node, f"{key} must be a word")
        return node.value
