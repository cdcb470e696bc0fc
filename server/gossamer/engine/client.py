"""The engine as others see it: submit, cancel, drain, health, numbers. Safe from any thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer import merge
from gossamer.base.ends import end_tokens
from gossamer.engine import probe
from gossamer.engine.config import EngineConfig
from gossamer.engine.errors import (
    AdapterTooLarge,
    ContextLengthExceeded,
    InvalidRequest,
    Overloaded,
    ShuttingDown,
)
from gossamer.engine.group import Group
from gossamer.engine.loop import Loop
from gossamer.engine.memory import Memory
from gossamer.engine.messages import Deliver, Done, Failed, Message, Request, Sampling
from gossamer.engine.pages import root_key
from gossamer.engine.residency import Residency, Resident, Source
from gossamer.engine.runner import Geometry, Runner
from gossamer.engine.text import TokenizerDecoder
from gossamer.kernels import warm_up
from gossamer.merge import METHODS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """Whether requests can be served, and why not."""

    ready: bool
    reason: str | None = None


@dataclass(frozen=True)
class Stats:
    """A snapshot of the engine. Bytes; counters since the start."""

    running: int
    waiting: int
    kv_bytes: int
    adapter_bytes: int
    memory_bytes: int
    steps: int
    fused_steps: int
    fused_windows: int
    held_row_steps: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    loads: int
    load_failures: int
    evictions: int
    running_mixes: tuple[str, ...]
    waiting_mixes: tuple[str, ...]

    @property
    def kv_usage(self) -> float:
        """Share of the budget that KV pages take."""
        return self.kv_bytes / self.memory_bytes


class Engine:
    """Continuous batching over one base model, another mix of adapters in every row.

    Args:
        model: a freshly loaded causal LM; the engine rebuilds it in place and owns it from then on.
        tokenizer: its tokenizer.
        source: digest → decoded deltas; called in loader threads.
        config: limits and policy.
        fingerprint: of the base, before this call.

    Raises:
        UnsupportedModel: the architecture cannot be served right; nothing was started.
        BackendUnavailableError: the kernels or the attention that the configuration asks for cannot
            run here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: Source,
        config: EngineConfig,
        *,
        fingerprint: str,
    ) -> None:
        probe.check_static(model)
        self.config = config
        self.context_length = int(model.config.get_text_config().max_position_embeddings)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.eos = end_tokens(tokenizer, model.generation_config)
        self._decoder = TokenizerDecoder(tokenizer)
        self._fingerprint = fingerprint
        page_bytes = Geometry.of(model).page_bytes(config.page_size, model.dtype, config.kernels)
        self._memory: Memory[Resident] = Memory(
            config.memory_bytes, page_bytes, config.page_size, framed=config.kernels == "triton"
        )
        expected = probe.expected(model)
        warm_up(config.kernels)
        frames = self._memory.frames
        of_page = None if frames is None else frames.of_page
        runner = Runner(model, self._memory.pages.num_pages, config, of_page)
        probe.check(runner, expected)
        self._loaders = ThreadPoolExecutor(
            config.loader_threads, thread_name_prefix="gossamer-load"
        )
        self._residency = Residency(
            self._memory, source, runner.adapters.pack, self._loaders, self._wake, runner.frames
        )
        self._loop = Loop(
            config,
            self._memory,
            self._residency,
            runner,
            may_fuse=config.fuse and model.dtype.itemsize == 4,
        )
        self._thread = threading.Thread(target=self._loop.run, name="gossamer-engine", daemon=True)
        self._refusing: str | None = "The engine has not been started."
        self._lock = threading.Lock()
        self._pending: set[str] = set()
        self._posted = 0  # sequences in the inbox, not yet in the queue
        self.table = runner.patch_map.table()

    # -- life

    def start(self) -> None:
        """Start the engine's thread."""
        self._refusing = None
        self._loaders.submit(merge.warm_up)
        self._thread.start()

    def drain(self, timeout: float) -> None:
        """Refuse new requests, let the present ones finish for `timeout` seconds, then close."""
        self._refusing = "The server is shutting down."
        end = time.monotonic() + timeout
        while self._pending and time.monotonic() < end and self._loop.dead is None:
            time.sleep(0.02)
        self.close()

    def close(self) -> None:
        """Stop; whatever is in flight fails with `ShuttingDown`. Idempotent."""
        self._refusing = self._refusing or "The engine has stopped."
        self._loop.stop()
        if self._thread.is_alive():
            self._thread.join()
        self._loaders.shutdown(wait=True, cancel_futures=True)

    def health(self) -> Health:
        """Ready, or the reason why not."""
        if self._loop.dead is not None:
            return Health(False, f"The engine's thread died: {self._loop.dead}")
        return Health(self._refusing is None, self._refusing)

    # -- requests

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Take a request in; its messages go to `deliver`, from the engine's thread, in order.

        Raises an `EngineError` when it is refused at once; then nothing is delivered.
        """
        health = self.health()
        if not health.ready:
            raise ShuttingDown(health.reason or "")
        self._check(request)
        self._claim(request)
        self._residency.prefetch(request.mix)
        try:
            group = Group.of(
                request,
                self._closing(request.id, deliver),
                self._decoder,
                self.eos,
                self.vocab_size,
                self._root(request),
                time.monotonic(),
            )
            if not self._loop.post(lambda: self._add(group)):
                raise ShuttingDown("The engine has stopped.")
        except BaseException:
            with self._lock:
                self._pending.discard(request.id)
                self._posted -= request.sampling.n
            raise

    def cancel(self, request_id: str) -> None:
        """Give a request up; its final message is `Failed(Cancelled)`. Idempotent."""
        if request_id in self._pending:
            self._loop.post(lambda: self._loop.cancel(request_id))

    def generate(self, requests: Sequence[Request]) -> list[list[Message]]:
        """Run requests to their end and return all their messages (for benchmarks and scripts).

        The engine waits until all are submitted, so that equal calls make equal batches.
        """
        inboxes: list[list[Message]] = [[] for _ in requests]
        finals = [threading.Event() for _ in requests]
        submitted = threading.Event()
        self._loop.post(lambda: _wait(submitted))
        for request, inbox, final in zip(requests, inboxes, finals, strict=True):

            def deliver(
                message: Message, inbox: list[Message] = inbox, final: threading.Event = final
            ) -> None:
                inbox.append(message)
                if isinstance(message, Done | Failed):
                    final.set()

            try:
                self.submit(request, deliver)
            except BaseException:
                submitted.set()
                for earlier in requests:
                    self.cancel(earlier.id)
                raise
        submitted.set()
        for final in finals:
            final.wait()
        return inboxes

    # -- numbers

    def stats(self) -> Stats:
        """A snapshot; reads without stopping the engine, so figures may be a step apart."""
        counts, memory, scheduler = self._loop.counts, self._memory, self._loop.scheduler
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        return Stats(
            running=len(running),
            waiting=len(waiting),
            kv_bytes=memory.kv_bytes,
            adapter_bytes=memory.adapter_bytes,
            memory_bytes=memory.total_bytes,
            steps=counts.steps,
            fused_steps=counts.fused_steps,
            fused_windows=counts.fused_windows,
            held_row_steps=counts.held_row_steps,
            prompt_tokens=counts.prompt_tokens,
            completion_tokens=counts.completion_tokens,
            cached_tokens=counts.cached_tokens,
            loads=memory.counts.loads,
            load_failures=memory.counts.load_failures,
            evictions=memory.counts.evictions,
            running_mixes=tuple(s.request.mix.digest for s in running),
            waiting_mixes=tuple(s.request.mix.digest for s in waiting),
        )

    def resident(self) -> dict[str, int]:
        """Adapter digest (or digest of a compiled mix) → bytes in memory."""
        return self._memory.resident()

    # -- inside

    def _claim(self, request: Request) -> None:
        """Take a place in the queue, or raise."""
        with self._lock:
            waiting = len(self._loop.scheduler.waiting) + self._posted
            if waiting + request.sampling.n > self.config.max_waiting:
                raise Overloaded(f"{waiting} sequences are waiting already.", 1.0)
            if request.id in self._pending:
                raise InvalidRequest("request_id", f"Request {request.id} is in flight already.")
            self._pending.add(request.id)
            self._posted += request.sampling.n

    def _add(self, group: Group) -> None:
        """In the engine's thread."""
        with self._lock:
            self._posted -= len(group.choices)
        self._loop.add(group)

    def _wake(self) -> None:
        self._loop.wake()

    def _closing(self, request_id: str, deliver: Deliver) -> Deliver:
        def forward(message: Message) -> None:
            if isinstance(message, Done | Failed):
                with self._lock:
                    self._pending.discard(request_id)
            try:
                deliver(message)
            except Exception:
                log.exception("the receiver of request %s raised", request_id)

        return forward

    def _root(self, request: Request) -> bytes | None:
        if not self.config.prefix_sharing:
            return None
        return root_key(self._fingerprint, request.mix.digest, request.salt)

    def _check(self, request: Request) -> None:
        s = request.sampling
        self._check_sampling(s)
        if request.mix.method not in METHODS:
            raise InvalidRequest("model", f"There is no merge method {request.mix.method}.")
        if not request.prompt:
            raise InvalidRequest("prompt", "The prompt has no tokens.")
        if min(request.prompt) < 0 or max(request.prompt) >= self.vocab_size:
            raise InvalidRequest("prompt", f"Token ids go from 0 to {self.vocab_size - 1}.")
        if len(request.prompt) + s.max_tokens > self.context_length:
            raise ContextLengthExceeded(len(request.prompt), s.max_tokens, self.context_length)
        if len(request.mix.members) > self.config.max_members:
            raise InvalidRequest("model", f"A mix has at most {self.config.max_members} members.")
        size = self.config.page_size
        needed = -(-(len(request.prompt) + s.max_tokens) // size) * self._memory.page_bytes
        if needed > self._memory.total_bytes:
            raise AdapterTooLarge("the request's keys and values", needed, self._memory.total_bytes)

    def _check_sampling(self, s: Sampling) -> None:
        if s.n < 1:
            raise InvalidRequest("n", "n is at least 1.")
        if s.max_tokens < 0:
            raise InvalidRequest("max_tokens", "max_tokens is at least 0.")
        if not s.temperature >= 0:
            raise InvalidRequest("temperature", "A temperature is at least 0.")
        if s.seed is not None and not -(2**63) <= s.seed < 2**63:
            raise InvalidRequest("seed", "A seed is a 64-bit integer.")
        for field, tokens in (
            ("logit_bias", s.logit_bias),
            ("allowed_token_ids", s.allowed_token_ids or ()),
            ("stop_token_ids", s.stop_token_ids),
        ):
            if any(not 0 <= token < self.vocab_size for token in tokens):
                raise InvalidRequest(field, f"Token ids go from 0 to {self.vocab_size - 1}.")


def _wait(event: threading.Event) -> None:
    event.wait()
