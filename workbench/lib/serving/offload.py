"""A server whose weights stream, really run on this machine: one thread for the device, one for the CPU, one the link.

    server = TinyOffloadServer(model, n_pages=64, page=16, link_bandwidth=300e6)
    served = server.serve(prompts, generate=[16] * len(prompts), max_tokens=512)
    served.tokens, served.timeline.busy_shares()

The weights of a layer lie in one piece in "host memory" and come over a throttled link into one of two buffers, in
chunks of one size; the blocks of the model that compute have their parameters in those buffers. Keys and values lie in
pages. What is computed is what the plain model computes.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.attention import Attention
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.simulation.executor import Executor, Job, ThrottledLink
from workbench.lib.core.simulation.timeline import Timeline
from workbench.lib.core.simulation.validation import machine
from workbench.lib.serving.attendant import SLOTS, Attendant, Together, attend
from workbench.lib.serving.paging import PagedKV, Pass, Requests, Scheduler, Share
from workbench.lib.serving.pipeline import (
    ATTEND,
    BUFFERS,
    HEAD,
    LANE,
    LANES,
    LOAD,
    MOE,
    QKV,
    name_of,
    weave,
)

AHEAD = 2
"""Passes behind the one that is planned whose tokens may still be missing."""

CACHED = 1 << 19
"""Bytes of keys and values that are gathered from pages and attended over at once: they stay in a core's cache."""


@dataclass(frozen=True)
class Served:
    """What a server gave out.

    Attributes:
        tokens: of each request, those generated, in order.
        logits: of each request, (g, V): what each token was the largest of.
        timeline: of everything that ran, "measured".
        passes: as they were planned.
    """

    tokens: list[list[int]]
    logits: list[Float[Tensor, "_ vocab"]]
    timeline: Timeline
    passes: list[Pass]

    @property
    def seconds(self) -> float:
        """From the first event to the end of the last."""
        return self.timeline.makespan - self.timeline.events[0].start

    @property
    def throughput(self) -> float:
        """Generated tokens/s."""
        return sum(map(len, self.tokens)) / self.seconds


class TinyOffloadServer:
    """Serves requests with a model of which two layers at a time are on the "device".

    Args:
        model: a `DecoderLM` with causal `Attention` and feed-forward blocks without buffers, at least two layers.
        n_pages, page: memory for keys and values, of `page` tokens each.
        link_bandwidth: bytes/s of the link.
        apart: let a process of its own attend (see `attendant`), for at most so many requests at once; to be closed,
            as a context manager is. None: the CPU's thread attends.

    Raises:
        InputError: a model that is none of these.
    """

    def __init__(self, model: DecoderLM, n_pages: int, page: int, link_bandwidth: float, apart: int | None = None):
        PagedKV(n_pages, page)  # refuses what are no numbers of pages
        blocks = list(model.blocks)
        if len(blocks) < 2:
            raise InputError(f"model has {len(blocks)} layers but must have at least 2, one for each buffer")
        for layer, block in enumerate(blocks):
            if type(block.attention) is not Attention or not block.attention.causal:
                raise InputError(
                    f"model has {type(block.attention).__name__} in layer {layer} but must have causal Attention"
                )
            if any(True for _ in block.buffers()):
                raise InputError(f"model has buffers in layer {layer} but must have none: only parameters stream")
        self.model, self.n_pages, self.page = model, n_pages, page
        self.link = ThrottledLink(link_bandwidth)
        self.stored = [torch.cat([p.detach().flatten() for p in block.parameters()]) for block in blocks]
        if len({flat.numel() for flat in self.stored}) > 1:
            raise InputError("model has layers of different sizes but must have one")
        self.buffers = [torch.zeros_like(self.stored[0]) for _ in range(BUFFERS)]
        self.blocks = [_in_place(block, flat) for block, flat in zip(blocks, self.buffers, strict=False)]
        heads, width = blocks[0].attention.n_heads, model.embedding.embedding_dim
        shape = (len(blocks), n_pages, page, heads, width // heads)
        self.keys, self.values = (torch.zeros(shape, dtype=self.stored[0].dtype) for _ in range(2))
        self.cached_tokens = CACHED // (2 * width * self.keys.element_size())
        self.attendant = None if apart is None else Attendant(self.keys, self.values, apart)
        self.apart = apart

    def __enter__(self) -> "TinyOffloadServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process that attends, where there is one."""
        if self.attendant is not None:
            self.attendant.close()

    @property
    def n_layers(self) -> int:
        return len(self.stored)

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        generate: Sequence[int],
        max_tokens: int,
        *,
        admission: str = "peak",
        mode: str = "mixed",
        groups: int = 2,
    ) -> Served:
        """Generate greedily for all requests; options are those of `Scheduler`.

        Raises:
            InputError: no request; a prompt without tokens, or longer with what it generates than the model takes; a
                token that is none; memory too small for one of them.
        """
        requests = Requests(tuple(map(len, prompts)), tuple(generate))
        kv = PagedKV(self.n_pages, self.page)
        scheduler = Scheduler(requests, kv, max_tokens, admission, mode, groups)
        self._check(prompts, requests)
        if self.apart is not None and (groups > SLOTS or len(prompts) > self.apart):
            raise InputError(
                f"{len(prompts)} requests in {groups} groups but apart = {self.apart} has room for as many requests in "
                f"{SLOTS}"
            )
        run = _Run(self, [list(prompt) for prompt in prompts])
        with Executor(LANES, f"measured on {machine()['cpu']}") as executor:
            passes = run.weave(executor, scheduler)
        return Served(run.given(requests), run.logits(), executor.timeline(), passes)

    def _check(self, prompts: Sequence[Sequence[int]], requests: Requests) -> None:
        vocab, longest = self.model.embedding.num_embeddings, self.model.seq_len
        for request, (prompt, g) in enumerate(zip(prompts, requests.generate, strict=True)):
            if len(prompt) + g - 1 > longest:
                raise InputError(
                    f"request {request} has {len(prompt)} tokens and generates {g} but the model takes {longest}"
                )
            if strange := [token for token in prompt if not 0 <= token < vocab]:
                raise InputError(f"request {request} has token {strange[0]} but tokens are 0 to {vocab - 1}")


def _in_place(block: nn.Module, flat: Tensor) -> nn.Module:
    """A copy of a block whose parameters are views of `flat`, in their order."""
    made, at = copy.deepcopy(block), 0
    for parameter in made.parameters():
        parameter.requires_grad_(False)
        parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    return made.eval()


class Batch:
    """The share of one micro-group in a pass: its tokens as rows, decodes first, and where their keys and values lie.

    `texts` are the tokens of each request as far as they are known; they are read when the pass begins.
    """

    def __init__(self, server: TinyOffloadServer, texts: Sequence[list[int]], shares: Sequence[Share]):
        self.server, self.texts, self.shares = server, texts, shares
        page, places, positions = server.page, [], []
        self.spans: list[tuple[int, int]] = []  # rows of each prefill
        classes: dict[int, list[int]] = {}
        for share in shares:
            if share.decodes:
                classes.setdefault(len(share.pages), []).append(len(positions))
            else:
                self.spans.append((len(positions), len(positions) + share.tokens))
            for at in range(share.start, share.start + share.tokens):
                positions.append(at)
                places.append(share.pages[at // page] * page + at % page)
        self.positions, self.places = torch.tensor(positions), torch.tensor(places)
        self.ends = torch.tensor([share.tokens for share in shares]).cumsum(0) - 1  # the last row of each request
        self.n_decodes = sum(map(len, classes.values()))
        self.decodes: list[Together] = []
        for pages, rows in classes.items():
            most = max(1, server.cached_tokens // (pages * page))
            self.decodes += [self._together(rows[i : i + most]) for i in range(0, len(rows), most)]

    def _together(self, rows: list[int]) -> Together:
        shares = [self.shares[row] for row in rows]
        return Together(rows, [share.pages for share in shares], [share.start + 1 for share in shares])

    def embed(self) -> None:
        model, tokens = self.server.model, []
        for share in self.shares:
            text = self.texts[share.request]
            tokens += text[share.start : share.start + share.tokens]
        self.x = model.embedding(torch.tensor(tokens))
        if model.position is not None:
            self.x = self.x + model.position[self.positions]

    def qkv(self, block: nn.Module, layer: int) -> None:
        """Queries, keys and values of all rows, kept in their pages; and the attention of prefills."""
        q, k, v = block.attention.heads(block.attention_norm(self.x), self.positions)  # (H, n, d)
        for kept, new in ((self.server.keys, k), (self.server.values, v)):
            kept[layer].flatten(0, 1).index_copy_(0, self.places, new.transpose(0, 1))
        self.q = q
        self.y = torch.empty_like(q)
        for first, last in self.spans:
            self.y[:, first:last] = prefill_attention(q[:, first:last], k[:, first:last], v[:, first:last])

    def attend(self, layer: int) -> None:
        """The attention of decodes, over their pages."""
        server, n = self.server, self.n_decodes
        if server.attendant is None:
            self.y[:, :n] = attend(self.q[:, :n], server.keys[layer], server.values[layer], self.decodes)
            return
        slot = self.shares[0].group
        if layer == 0:
            server.attendant.begin(slot, self.decodes)
        self.y[:, :n] = server.attendant.attend(slot, layer, self.q[:, :n])

    def moe(self, block: nn.Module) -> None:
        """Output projection and feed-forward part."""
        x = self.x + block.attention.out(self.y.transpose(0, 1).flatten(1))
        self.x = x + block.ffn(block.ffn_norm(x), None)

    def head(self) -> Float[Tensor, "requests vocab"]:
        """The logits of the last token of each request; the largest is the next, and stands in its text from now on."""
        model = self.server.model
        logits = model.norm(self.x[self.ends]) @ model.embedding.weight.T
        for share, token in zip(self.shares, logits.argmax(-1).tolist(), strict=True):
            self.texts[share.request].append(token)
        return logits


def prefill_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one prompt, (H, p, d)."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


class _Run:
    """One call of `serve`: the jobs of its passes, and what comes out of them."""

    def __init__(self, server: TinyOffloadServer, texts: list[list[int]]):
        self.server, self.texts = server, texts
        self._batches: dict[tuple[int, int], Batch] = {}
        self._said: list[tuple[Sequence[Share], Tensor]] = []
        self._heads: deque[list[Job]] = deque(maxlen=AHEAD)

    def weave(self, executor: Executor, scheduler: Scheduler) -> list[Pass]:
        passes: list[Pass] = []

        def paced() -> Iterator[Pass]:
            for step in scheduler:
                if len(self._heads) == AHEAD:  # planning runs ahead of the threads, but not without end
                    for job in self._heads[0]:
                        job.result()
                self._heads.append([])
                passes.append(step)
                yield step

        jobs: list[Job] = []

        def put(kind: str, number: int, layer: int, shares: Sequence[Share], after: Sequence[Job]) -> Job:
            call = torch.no_grad()(self._call(kind, number, layer, shares))
            job = executor.submit(name_of(kind, number, layer, shares), LANE[kind], call, after, group=kind)
            if kind == HEAD:
                self._heads[-1].append(job)
            jobs.append(job)
            return job

        weave(paced(), self.server.n_layers, put)
        for job in jobs:
            job.result()  # the first error, if there was one
        return passes

    def _call(self, kind: str, number: int, layer: int, shares: Sequence[Share]) -> Callable[[], object]:
        buffer = (number * self.server.n_layers + layer) % BUFFERS
        if kind == LOAD:
            return partial(self.server.link.copy, self.server.buffers[buffer], self.server.stored[layer])
        key = (number, shares[0].group)
        if kind == QKV and layer == 0:
            self._batches[key] = Batch(self.server, self.texts, shares)
        batch, block = self._batches[key], self.server.blocks[buffer]
        if kind == QKV:
            return partial(self._begin, batch, block) if layer == 0 else partial(batch.qkv, block, layer)
        if kind == ATTEND:
            return partial(batch.attend, layer)
        if kind == MOE:
            return partial(batch.moe, block)
        del self._batches[key]
        return partial(self._end, batch)

    def _begin(self, batch: Batch, block: nn.Module) -> None:
        batch.embed()
        batch.qkv(block, 0)

    def _end(self, batch: Batch) -> None:
        self._said.append((batch.shares, batch.head()))

    def given(self, requests: Requests) -> list[list[int]]:
        """The tokens after each prompt."""
        return [text[prompt:] for text, prompt in zip(self.texts, requests.prompts, strict=True)]

    def logits(self) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in self.texts]
        for shares, logits in self._said:
            for share, row in zip(shares, logits, strict=True):
                found[share.request].append(row)
        return [torch.stack(rows) for rows in found]
