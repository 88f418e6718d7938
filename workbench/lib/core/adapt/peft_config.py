"""The settings of a LoRA folder of Hugging Face's peft: what makes it a plain LoRA, and the scale of each layer.

What peft 0.21.2 writes is known by name. A setting that is not known passes only where it is off: null or false.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.lib.core.adapt.files import read_object, short

PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),  # others change the base (PiSSA, OLoRA, LoftQ)
    "fan_in_fan_out": (False, True, None),  # peft itself goes by the kind of layer
    "modules_to_save": (None, []),
    "loftq_config": (None, {}),
    "use_rslora": (False, True, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "ensure_weight_tying": (False, None),
} | dict.fromkeys(
    (
        "alora_invocation_tokens",
        "arrow_config",
        "corda_config",
        "eva_config",
        "kasa_config",
        "layer_replication",
        "lora_ga_config",
        "megatron_config",
        "monteclora_config",
        "trainable_token_indices",
        "use_bdlora",
        "velora_config",
    ),
    (None, False),
)
"""The values at which a setting means plain LoRA; peft has more features, and a folder that uses one is refused."""

SILENT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
"""Settings that say nothing of the function."""

READ = {
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
}


class Config:
    """The settings of a folder, checked.

    Attributes:
        dropout: of the updates' inputs.
        parameters: names of whole parameters that are adapted, such as those of packed experts.
        transposed: whether it says that the base's weights lie as (I, O).
        base_name: what it says of where the base is from.
    """

    def __init__(self, path: Path):
        """
        Raises:
            InputError: no JSON object; features beyond plain LoRA, all of them named; or a setting that is missing or
                of the wrong kind.
        """
        self.path, found = path, read_object(path)
        other = [
            f"{key} = {short(value)}"
            for key, value in found.items()
            if key not in SILENT | READ and not _among(value, PLAIN.get(key, (None, False)))
        ]
        if other or "peft_type" not in found:
            raise InputError(f"{path.parent} is no plain LoRA: {', '.join(other) or 'peft_type is missing'}")
        self.rslora = bool(found.get("use_rslora"))
        self.transposed, self.base_name = bool(found.get("fan_in_fan_out")), found.get("base_model_name_or_path")
        self.alpha = self._number("lora_alpha", found.get("lora_alpha"))
        self.dropout = self._number("lora_dropout", found.get("lora_dropout", 0.0))
        if not 0 <= self.dropout < 1:
            raise InputError(f"{path}: lora_dropout is {self.dropout} but must be at least 0 and below 1")
        alphas = self._object(found, "alpha_pattern")
        # peft takes patterns for regular expressions; those from a file are not compiled: there are some that never end
        if strange := [pattern for pattern in alphas if not re.fullmatch(LITERAL, pattern)]:
            raise InputError(
                f"{path}: alpha_pattern has {short(strange[0])}, of which only the names of layers, or their ends, are "
                "read; write the full names instead"
            )
        self.alphas = [(_literal(key), self._number(f"alpha_pattern of {key!r}", a)) for key, a in alphas.items()]
        # which layer has which rank the tensors say; here is only what ranks there may be
        ranks = {"r": found.get("r"), **self._object(found, "rank_pattern")}
        for name, rank in ranks.items():
            if type(rank) is not int or rank < 1:
                raise InputError(f"{path}: the rank {name!r} is {short(rank)} but must be a whole number, at least 1")
        self.ranks = set(ranks.values())
        self.targets = self._names(found, "target_modules", text=True)
        self.excluded = self._names(found, "exclude_modules", text=True)
        self.parameters = self._names(found, "target_parameters") or []
        self.layers = found.get("layers_to_transform")
        numbers = self.layers if isinstance(self.layers, list) else [] if self.layers is None else [self.layers]
        if any(type(number) is not int for number in numbers):
            raise InputError(f"{path}: layers_to_transform is {short(self.layers)} but must be a list of whole numbers")
        self.layers = None if self._names(found, "layers_pattern", text=True) else numbers

    def scale(self, name: str, rank: int) -> float:
        """What the product B A of a layer is multiplied by."""
        if rank not in self.ranks:
            raise InputError(
                f"{self.path.parent} is damaged: {name} has rank {rank}, but its settings have only "
                f"{', '.join(map(str, sorted(self.ranks)))}"
            )
        alpha = next((alpha for pattern, alpha in self.alphas if _matches(pattern, name)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def targeted(self, name: str) -> bool:
        """Whether peft would adapt the layer, as far as that is in lists of names.

        Regular expressions are not tried, for some never end: where the settings have one, the tensors are believed.
        """
        if isinstance(self.excluded, list) and _ends(name, self.excluded):
            return False
        if isinstance(self.targets, str):
            # one that is names, as `write_peft` has them
            names = re.sub(r"\\([^\w\s])", r"\1", self.targets.removeprefix("^(?:").removesuffix(")$"))
            return re.fullmatch(r"[\w.|-]+", names) is None or f"|{name}|" in f"|{names}|"
        if self.targets is None or name in self.targets:
            return True
        numbers = [part for part in name.split(".")[2:-1] if part.isdecimal()]  # the first is the layer's
        return _ends(name, self.targets) and (not self.layers or numbers[:1] in [[str(n)] for n in self.layers])

    def holds(self, name: str) -> bool:
        """Whether a whole parameter is among the targets."""
        return _ends(name, self.parameters)

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise InputError(f"{self.path}: {name} is {short(value)} but must be a finite number")
        return float(value)

    def _object(self, found: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = {} if found.get(key) is None else found[key]
        if not isinstance(value, dict):
            raise InputError(f"{self.path}: {key} is {short(value)} but must be an object")
        return value

    def _names(self, found: Mapping[str, Any], key: str, text: bool = False) -> list[str] | str | None:
        value = found.get(key)
        if value is None or (text and isinstance(value, str)):
            return value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise InputError(f"{self.path}: {key} is {short(value)} but must be a list of names")
        return value


def anchored(name: str) -> str:
    """The pattern of one layer alone: without the anchor peft would take "out" for "block.out" as well."""
    return f"^{re.escape(name)}"


def _ends(name: str, names: list[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in names)


def _among(value: object, plain: tuple[Any, ...]) -> bool:
    return any(type(value) is type(p) and value == p for p in plain)


Literal = tuple[bool, list[str]]


LITERAL = r"\^?(?:\.\*\\\.)?(?:[\w-]|\.|\\[^\w\s])+\$?"
Pattern = tuple[str, list[str]]


def _literal(pattern: str) -> Pattern:
    """A literal pattern: whether it is the "whole" of a name, its "end" after a dot, or "either"; its characters.

    "." is any character; ".*\\." before the rest, as peft itself writes it for fused experts, makes it an "end".
    """
    where = "whole" if pattern.startswith("^") else "either"
    pattern = pattern.removeprefix("^")
    if pattern.startswith(r".*\."):
        where, pattern = "end", pattern.removeprefix(r".*\.")
    characters = re.findall(r"\\?.", pattern)  # an escaped one with its escape
    return where, characters[:-1] if characters[-1] == "$" else characters


def _matches(pattern: Pattern, name: str) -> bool:
    """As `re.match(rf"(.*\\.)?({pattern})$", name)`."""
    where, characters = pattern
    begin = len(name) - len(characters)
    if begin < 0 or (where == "end" if begin == 0 else where == "whole" or name[begin - 1] != "."):
        return False
    return all(c == "." or c[-1] == here for c, here in zip(characters, name[begin:], strict=True))
