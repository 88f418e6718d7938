"""Which requests share a pass, and in which pages their keys and values lie: counts only, no tokens.

    kv = PagedKV(n_pages=64, page=16)
    scheduler = Scheduler(Requests.uniform(prompt=100, generate=32, requests=50), kv, max_tokens=700)
    for step in scheduler: ...                        # a `Pass`: who takes part, with how many tokens

A request of prompt p that generates g tokens takes part in g passes: one with its p tokens, which gives the first of
them, and g - 1 with one token. Afterwards its pages hold p + g - 1 tokens; the last token is given out and never read.
"""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from workbench.errors import InputError, unknown

ADMISSIONS = ("peak", "headroom")
MODES = ("mixed", "separate")


@dataclass(frozen=True)
class Requests:
    """Requests by their lengths in tokens: prompts p and what they generate g, all at least 1."""

    prompts: tuple[int, ...]
    generate: tuple[int, ...]

    def __post_init__(self):
        if not self.prompts or len(self.prompts) != len(self.generate):
            raise InputError(
                f"prompts and generate have {len(self.prompts)} and {len(self.generate)} lengths but must have one for "
                "each request, and at least one"
            )
        for name in ("prompts", "generate"):
            if least := [n for n in getattr(self, name) if not _whole(n)]:
                raise InputError(f"{name} holds {least[0]} but lengths must be whole numbers of at least 1")

    @classmethod
    def uniform(cls, prompt: int, generate: int, requests: int) -> "Requests":
        """Requests of one length."""
        return cls((prompt,) * requests, (generate,) * requests)

    @classmethod
    def drawn(cls, prompt: int, generate: int, requests: int, seed: int) -> "Requests":
        """Lengths drawn evenly from half of these means to one and a half."""
        draw = random.Random(seed)
        cls.uniform(prompt, generate, requests)  # refuses what are no lengths

        def lengths(mean: int) -> tuple[int, ...]:
            return tuple(draw.randint(max(1, mean // 2), mean + mean // 2) for _ in range(requests))

        return cls(lengths(prompt), lengths(generate))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def generated(self) -> int:
        """Tokens given out in all."""
        return sum(self.generate)

    @property
    def processed(self) -> int:
        """Tokens that go through the model in all, without those of prefills that are repeated: sum of p + g - 1."""
        return sum(p + g - 1 for p, g in zip(self.prompts, self.generate, strict=True))

    def held(self, page: int = 1) -> int:
        """Tokens of memory times passes: over requests and passes i = 0..g-1 the sum of p + i, in whole pages."""
        return sum(
            int((-(-(p + np.arange(g)) // page) * page).sum()) for p, g in zip(self.prompts, self.generate, strict=True)
        )


class PagedKV:
    """Pages of memory for keys and values, and whose they are. A page holds `page` tokens of one request, all layers.

    Raises:
        InputError: a number is below 1.
    """

    def __init__(self, n_pages: int, page: int):
        for name, value in (("n_pages", n_pages), ("page", page)):
            if not _whole(value):
                raise InputError(f"{name} is {value} but must be a whole number of at least 1")
        self.n_pages, self.page = n_pages, page
        self._free = list(range(n_pages))[::-1]
        self._tables: dict[int, tuple[int, ...]] = {}

    @property
    def free(self) -> int:
        """Pages that are nobody's."""
        return len(self._free)

    def pages(self, tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-tokens // self.page)

    def table(self, request: int) -> tuple[int, ...]:
        """The pages of a request in the order of its tokens."""
        return self._tables.get(request, ())

    def grow(self, request: int, tokens: int) -> None:
        """Give a request the pages it lacks to hold so many tokens.

        Raises:
            InputError: not enough are free; nothing has changed.
        """
        table = self.table(request)
        lacks = self.pages(tokens) - len(table)
        if lacks > self.free:
            raise InputError(f"request {request} needs {lacks} pages for {tokens} tokens but {self.free} are free")
        if lacks > 0:
            self._tables[request] = table + tuple(self._free.pop() for _ in range(lacks))

    def release(self, request: int) -> None:
        """Take back all pages of a request."""
        self._free += reversed(self._tables.pop(request, ()))


@dataclass(frozen=True)
class Share:
    """What one request has in a pass: `tokens` new ones after `start` that are kept already, in a micro-group.

    pages: of the request, in the order of its tokens, as they are in this pass.
    """

    request: int
    start: int
    tokens: int
    group: int
    pages: tuple[int, ...]

    @property
    def decodes(self) -> bool:
        """Whether it reads keys and values that are kept; a prefill starts anew."""
        return self.start > 0


@dataclass(frozen=True)
class Pass:
    """One pass through all layers: the shares, decodes first, and who was turned out before it."""

    shares: tuple[Share, ...]
    preempted: tuple[int, ...] = ()
    waiting: int = 0

    @property
    def tokens(self) -> int:
        return sum(share.tokens for share in self.shares)

    def group(self, group: int) -> tuple[Share, ...]:
        """The shares of one micro-group."""
        return tuple(share for share in self.shares if share.group == group)


@dataclass
class _Running:
    request: int
    held: int  # tokens that are kept after the pass that was planned last
    given: int  # tokens given out by then
    group: int


class Scheduler:
    """MoE-Lens's resource-aware scheduler: decodes first, then the prompts that memory and the pass have room for.

    In each pass every running request decodes one token. Waiting prompts are admitted in their order while the tokens
    of the pass stay within `max_tokens` (one prompt is, whatever its length, where none is yet) and memory allows.
    Where the pages run out for those who run, the newest is turned out: its pages are freed, it goes back to the head
    of the queue, and its prompt and what it has generated are prefilled again.

    Args:
        kv: the pages; emptied of these requests when the last has ended.
        max_tokens: of a pass, see `n_star`: more would make it longer than the weights take to stream.
        admission: what memory must be free for a prompt. "peak": so much that all who run can go on to their end, by
            the passes that each still has to come, so that nobody is ever turned out. "headroom": the pages of the
            prompt, and one more for every request that then runs.
        mode: "mixed", prefills and decodes share passes; "separate", a pass has only one of them, as earlier systems.
        groups: micro-groups. A request stays in the one that held the fewest tokens when it came.

    Raises:
        InputError: one of the requests does not fit even alone, by its number.
    """

    def __init__(
        self,
        requests: Requests,
        kv: PagedKV,
        max_tokens: int,
        admission: str = "peak",
        mode: str = "mixed",
        groups: int = 2,
    ):
        if not _whole(max_tokens):
            raise InputError(f"max_tokens is {max_tokens} but must be a whole number of at least 1")
        if admission not in ADMISSIONS:
            raise unknown("admission", admission, ADMISSIONS)
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        if not _whole(groups):
            raise InputError(f"groups is {groups} but must be a whole number of at least 1")
        for request, (p, g) in enumerate(zip(requests.prompts, requests.generate, strict=True)):
            if kv.pages(p + g - 1) > kv.n_pages:
                raise InputError(
                    f"n_pages is {kv.n_pages} but request {request} alone needs {kv.pages(p + g - 1)} pages of "
                    f"{kv.page} for its {p + g - 1} tokens"
                )
        self.requests, self.kv, self.max_tokens = requests, kv, max_tokens
        self.admission, self.mode = admission, mode
        self._queue = deque((request, requests.prompts[request], 0) for request in range(len(requests)))
        self._running: list[_Running] = []
        self._held = [0] * groups  # tokens that each micro-group keeps
        # Pages of all who run, in the pass that was planned last and in those ahead of it.
        self._need = np.zeros(max(requests.generate) + 1, dtype=np.int64)

    def __iter__(self) -> Iterator[Pass]:
        while self._queue or self._running:
            yield self._next()

    def _next(self) -> Pass:
        preempted, shares = (), []
        if not (self.mode == "separate" and self._queue and self._may_admit(0, 0)):
            preempted = self._make_room()
            self._need[:-1], self._need[-1] = self._need[1:].copy(), 0
            shares = [self._decode(run) for run in self._running]
        if not preempted and not (self.mode == "separate" and shares):
            shares += self._admit(len(shares))
        plan = Pass(tuple(shares), preempted, len(self._queue))
        for run in [run for run in self._running if run.given == self.requests.generate[run.request]]:
            self._running.remove(run)
            self._need[0] -= self.kv.pages(run.held)
            self._leave(run)
        return plan

    def _make_room(self) -> tuple[int, ...]:
        """Turn out the newest until those who run have pages for one more token each."""
        gone = []
        while sum(self.kv.pages(run.held + 1) for run in self._running) > self.kv.n_pages:
            run = self._running.pop()
            self._ahead(run, -1)
            self._leave(run)
            self._queue.appendleft((run.request, run.held + 1, run.given))
            gone.append(run.request)
        return tuple(gone)

    def _leave(self, run: _Running) -> None:
        self.kv.release(run.request)
        self._held[run.group] -= run.held

    def _decode(self, run: _Running) -> Share:
        self.kv.grow(run.request, run.held + 1)
        run.held, run.given = run.held + 1, run.given + 1
        self._held[run.group] += 1
        return Share(run.request, run.held - 1, 1, run.group, self.kv.table(run.request))

    def _admit(self, tokens: int) -> list[Share]:
        shares: list[Share] = []
        while self._queue and self._may_admit(tokens, len(shares)):
            request, prompt, given = self._queue.popleft()
            run = _Running(request, prompt, given + 1, self._held.index(min(self._held)))
            self.kv.grow(request, prompt)
            self._held[run.group] += prompt
            self._running.append(run)
            self._ahead(run, 1)
            shares.append(Share(request, 0, prompt, run.group, self.kv.table(request)))
            tokens += prompt
        return shares

    def _may_admit(self, tokens: int, admitted: int) -> bool:
        """Whether the head of the queue has room beside the `tokens` of the pass and those who run."""
        request, prompt, given = self._queue[0]
        if tokens + prompt > self.max_tokens and (admitted or prompt <= self.max_tokens):
            return False
        if self.admission == "headroom":
            return not self._running or self.kv.free >= self.kv.pages(prompt) + len(self._running) + 1
        left = self.requests.generate[request] - given
        return bool((self._need[:left] + self._pages_ahead(prompt, left) <= self.kv.n_pages).all())

    def _ahead(self, run: _Running, sign: int) -> None:
        """Count the pages of a request in the pass that was planned last and in those that it still has to come."""
        left = self.requests.generate[run.request] - run.given + 1
        self._need[:left] += sign * self._pages_ahead(run.held, left)

    def _pages_ahead(self, held: int, passes: int) -> np.ndarray:
        return -(-(held + np.arange(passes)) // self.kv.page)


def _whole(n: float) -> bool:
    """Whether it is a whole number of at least 1; infinity and nan are none."""
    return bool(n >= 1 and n % 1 == 0)
