"""Attention of decodes over pages of keys and values: where the CPU's thread does it, or in a process of its own.

Two threads of one interpreter take turns in all that is no operator. Where that costs too much, the CPU's thread only
waits for an `Attendant`, which shares keys, values, queries and outputs with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.multiprocessing as mp
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SLOTS = 2
"""Micro-groups whose queries an attendant has room for."""
PATIENCE = 60.0
"""Seconds after which an attendant that does not answer is taken for lost."""


@dataclass(frozen=True)
class Together:
    """Decodes of one number of pages, attended over at once; plain numbers, as they are sent.

    Attributes:
        rows: their rows among the queries.
        tables: of each, its pages in order.
        held: of each, the tokens that these hold.
    """

    rows: list[int]
    tables: list[tuple[int, ...]]
    held: list[int]


def attend(
    q: Float[Tensor, "heads requests head"],
    keys: Float[Tensor, "pages page heads head"],
    values: Float[Tensor, "pages page heads head"],
    work: Sequence[Together],
) -> Float[Tensor, "heads requests head"]:
    """One layer's attention: each query over the keys and values of its request."""
    y = torch.empty_like(q)
    for group in work:
        rows, tables = torch.tensor(group.rows), torch.tensor(group.tables)
        seen = torch.arange(tables.shape[1] * keys.shape[1]) < torch.tensor(group.held)[:, None]
        k, v = (kept[tables].flatten(1, 2).transpose(1, 2) for kept in (keys, values))  # (R, H, m page, d)
        found = F.scaled_dot_product_attention(
            q[:, rows].transpose(0, 1)[:, :, None], k, v, attn_mask=seen[:, None, None]
        )
        y[:, rows] = found[:, :, 0].transpose(0, 1)
    return y


class Attendant:
    """A process that attends; a context manager.

    Args:
        keys, values: (layers, pages, page, heads, d); moved to shared memory.
        most: decodes of a micro-group at most.
    """

    def __init__(self, keys: Tensor, values: Tensor, most: int):
        heads, width = keys.shape[-2:]
        self._q, self._y = (torch.zeros(SLOTS, heads, most, width, dtype=keys.dtype).share_memory_() for _ in range(2))
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        shared = (keys.share_memory_(), values.share_memory_(), self._q, self._y)
        self._process = context.Process(target=_work, args=(theirs, *shared), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()  # it stands

    def begin(self, slot: int, work: Sequence[Together]) -> None:
        """What `attend` of a slot is about, until it is said anew."""
        self._pipe.send((slot, None, list(work)))

    def attend(self, slot: int, layer: int, q: Tensor) -> Tensor:
        """One layer's attention (H, R, d) for the queries of a slot."""
        n = q.shape[1]
        self._q[slot, :, :n] = q
        self._pipe.send((slot, layer, n))
        self._answer()
        return self._y[slot, :, :n]

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(PATIENCE)

    def __enter__(self) -> "Attendant":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> None:
        try:
            said = self._pipe.recv() if self._pipe.poll(PATIENCE) else "no answer"
        except (EOFError, OSError):
            said = f"it ended with {self._process.exitcode}"
        if said is not None:
            raise RuntimeError(f"the process that attends failed: {said}")


def _work(pipe, keys: Tensor, values: Tensor, q: Tensor, y: Tensor) -> None:
    torch.set_num_threads(1)
    work: dict[int, list[Together]] = {}
    pipe.send(None)
    while True:
        try:
            slot, layer, found = pipe.recv()
        except EOFError:  # whoever asked is done
            return
        if layer is None:
            work[slot] = found
            continue
        try:
            with torch.no_grad():
                y[slot, :, :found] = attend(q[slot, :, :found], keys[layer], values[layer], work[slot])
            pipe.send(None)
        except Exception as error:  # told to whoever waits, and the next is served
            pipe.send(repr(error))
