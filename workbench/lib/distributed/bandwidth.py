"""How much of their time replicas compute, by the bytes that they exchange and the link that these go through.

link = LinkModel.fit(sizes, seconds)                                  # measured, or LinkModel(0.01, 8 / 1e9)
BandwidthModel(10**9, 3, 30, 1, 4.25, step_seconds=1.0, link=link).utilisation
BandwidthModel.data_parallel(10**9, 16, 1.0, link).utilisation
"""

from dataclasses import dataclass

from workbench.errors import InputError
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.distributed.streaming_diloco import Schedule


@dataclass(frozen=True)
class BandwidthModel:
    """How much of the time replicas compute, where the rest is spent waiting for messages.

    Attributes:
        params: numbers of the model, all of which are sent once in H steps.
        count, sync_every, delay: P, H and tau, see `Schedule`.
        bits: of a number, see `E3M0Codec.bits`.
        step_seconds: of an inner step.
        link: of a message.
        replicas: M.
        shared: whether all messages go through one link, as those of the processes on one machine do.
    """

    params: int
    count: int
    sync_every: int
    delay: int
    bits: float
    step_seconds: float
    link: LinkModel
    replicas: int = 2
    shared: bool = False

    def __post_init__(self):
        Schedule(self.count, self.sync_every, self.delay)
        for name in ("params", "bits", "step_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)} but must be above 0")

    @classmethod
    def data_parallel(
        cls, params: int, bits: float, step_seconds: float, link: LinkModel, replicas: int = 2, shared: bool = False
    ) -> "BandwidthModel":
        """Gradients are all-reduced after every step, and waited for."""
        return cls(params, 1, 1, 0, bits, step_seconds, link, replicas, shared)

    @property
    def message_bytes(self) -> float:
        """Of a fragment, in the mean."""
        return self.params * self.bits / 8 / self.count

    @property
    def sent_bytes(self) -> float:
        """What a replica sends in a step, in the mean."""
        return (self.replicas - 1) * self.message_bytes * self.count / self.sync_every

    @property
    def exchange_seconds(self) -> float:
        """From the start of an exchange to its end. Two replicas' all-reduce sends as much as their all-gather."""
        if self.sync_every == 1:
            return self.link.all_reduce(self.message_bytes, self.replicas, self.shared)
        return self.link.all_gather(self.message_bytes * self.replicas, self.replicas, self.shared)

    @property
    def exposed_seconds(self) -> float:
        """What is waited for in a step, in the mean."""
        waited = max(0.0, self.exchange_seconds - self.delay * self.step_seconds)
        return waited * self.count / self.sync_every

    @property
    def utilisation(self) -> float:
        """The share of the time in which is computed."""
        return self.step_seconds / (self.step_seconds + self.exposed_seconds)
