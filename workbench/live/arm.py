"""An arm of a study as what a run trains: its recipe is the study's name, and the training is the study's own.

Importing this module is light; making an `Arm` imports its study, and with it torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from workbench.catalogue import method
from workbench.errors import InputError, unknown
from workbench.live.recipe import Recipe

if TYPE_CHECKING:
    from workbench.studies.core import Settings, Study


@dataclass(frozen=True)
class Arm:
    """One arm of a study at one seed, trained as the study trains it. What cannot be watched is an `InputError`.

    A run of it is the trainings that make the arm (`Study.trainings`), their steps counted on. Beds that the study
    starts from are trained or fetched before, and nothing is trained or measured after.

    Attributes:
        study: slug of the system.
        arm: its name in the study; None for the paper's method.
        preset: of the study.
        seed: of everything random.
        checkpoint_every: steps between checkpoints; 0 for one at the end.
    """

    study: str
    arm: str | None = None
    preset: str = "small"
    seed: int = 0
    checkpoint_every: int = 100

    threads: ClassVar[int] = 1  # as every run of a study
    cadence: ClassVar[Mapping[str, int]] = {"structure": 25}  # these are short trainings
    evaluations: ClassVar[int] = 8

    def __post_init__(self):
        for name, value in (("seed", self.seed), ("checkpoint_every", self.checkpoint_every)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise InputError(f"{name} is {value!r} but must be a whole number between 0 and 2**31 - 1")
        for name in ("study", "preset", "arm"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name, value) != ("arm", None):
                raise InputError(f"{name} is {value!r} but must be a name")
        if not method(self.study).ready:
            raise InputError(f"study {self.study!r} is planned: it has nothing to train yet")
        settings = self.settings
        if self.arm is None:
            object.__setattr__(self, "arm", self._study.main_arm(settings))
        arms = self._study.arms_of(settings)
        if self.arm not in arms:
            raise unknown(f"arm of {self.study} at {self.preset}", self.arm, arms)
        if isinstance(instead := self._study.trainings(self.arm), str):
            notebook = method(self.study).notebook
            raise InputError(
                f"arm {self.arm!r} of {self.study} trains nothing that could be watched: {instead}. "
                f"See what it finds with workbench study {self.study}, or in {notebook}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Arm":
        """The inverse of `to_dict`; an `InputError` where the study's settings are others now."""
        fields = dict(values)
        then = fields.pop("settings", None)
        for name in fields:
            if name not in cls.__dataclass_fields__:
                raise unknown("recipe value", name, cls.__dataclass_fields__)
        found = cls(**fields)
        if then is not None and then != found.to_dict()["settings"]:
            raise InputError(f"study {found.study} has other settings at {found.preset!r} now than this run began with")
        return found

    def to_dict(self) -> dict[str, Any]:
        """All that decides the training, as JSON has it."""
        return asdict(self) | {"settings": json.loads(json.dumps(dict(self.settings)))}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @property
    def trainings(self) -> int:
        """How many trainings of one model the run is made of."""
        return self._study.trainings(self.arm)

    @property
    def settings(self) -> "Settings":
        from workbench.studies.core import row_settings

        return row_settings(self._study.settings(self.preset))

    def check_processes(self, processes: int) -> None:
        """Raise `InputError` for more than one."""
        if processes > 1:
            raise InputError(f"processes is {processes} but the arms of a study train in one process")

    def train(self) -> None:
        """Run the arm."""
        self._study.run(self.arm, self.seed, self.settings)

    @property
    def _study(self) -> "Study":
        from workbench.studies.core import load_study

        return load_study(self.study)


def read_recipe(values: Mapping[str, Any] | str) -> Recipe | Arm:
    """What a run's "recipe" says, as a mapping or as JSON."""
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except ValueError as error:
            raise InputError(f"the recipe is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"the recipe is a JSON {type(values).__name__} but must be an object of names and values")
    return Arm.from_dict(values) if "study" in values else Recipe.from_dict(values)
