"""Everything the routes use, put together in one place."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

import torch
from fastapi import Depends
from starlette.requests import Request

from gossamer.api.admission import Admission
from gossamer.api.constraints import Constraints
from gossamer.api.device import Device, check_attention, choose_device, memory_budget
from gossamer.api.job_requests import JobReader
from gossamer.api.lifecycle import Lifecycle
from gossamer.api.mailbox import Postbox
from gossamer.api.metrics import EngineMetrics, Metrics
from gossamer.api.mixes import Mixes
from gossamer.api.prompts import Prompts
from gossamer.api.settings import Settings
from gossamer.api.tokens import TokenText
from gossamer.api.workers import Workers
from gossamer.base.fetch import Progress
from gossamer.base.load import BaseFiles, load_model, load_tokenizer
from gossamer.base.sources import open_base
from gossamer.base.weights import BaseNames
from gossamer.engine.client import Engine
from gossamer.engine.config import EngineConfig
from gossamer.engine.runner import Geometry
from gossamer.jobs.backlog import Backlog
from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import BaseInfo
from gossamer.store.files import Files


@dataclass(frozen=True)
class Services:
    """The parts of one server. Made by `build`; the application starts and stops them.

    Attributes:
        named: what other libraries' adapters are checked against when they are uploaded.
    """

    settings: Settings
    base: BaseFiles
    named: BaseNames
    engine: Engine
    store: Store
    backlog: Backlog
    prompts: Prompts
    tokens: TokenText
    constraints: Constraints
    mixes: Mixes
    job_reader: JobReader
    admission: Admission
    workers: Workers
    metrics: Metrics
    postbox: Postbox = field(default_factory=Postbox)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def catalog(self) -> Catalog:
        """The one door to adapters."""
        return self.store.catalog

    @property
    def files(self) -> Files:
        """The one door to files."""
        return self.store.files


def build(settings: Settings, *, progress: Progress | None = None) -> Services:
    """Open the base and the store, and load the model. Blocks; nothing is started yet.

    Raises:
        BaseModelError: the base cannot be had or loaded.
        DeviceError: it cannot run on what the settings ask for.
        UnsupportedModel: the base cannot be served right.
        AlreadyOwned, RegistryTooNew, KeySecretUnsafe: the data folder is another server's, or for
            a later release, or not safe.
        BlobsNotOurs: the blob store is another registry's.
    """
    data_dir = settings.data_dir.expanduser().resolve()
    data_dir.mkdir(parents=True, exist_ok=True)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    base = open_base(settings.base, data_dir, progress=progress)
    chosen = choose_device(settings, base)
    check_attention(settings, chosen)  # what can be refused before the base is loaded
    tokenizer, model = load_tokenizer(base), load_model(base, chosen.dtype, chosen.device)
    check_attention(settings, chosen, Geometry.of(model).head_dim)
    limits, names = settings.limits, BaseNames.of_model(base, model)
    store = Store(
        data_dir,
        BaseInfo(base.name, base.fingerprint, names.table),
        owner=True,
        database_url=settings.database_url,
        blobs_url=settings.blobs_url,
        limits=limits.of_store(),
        upload_bytes=limits.adapter_bytes,
    )
    config = engine_config(settings, chosen)
    engine = Engine(model, tokenizer, store.catalog.open, config, fingerprint=base.fingerprint)
    workers, metrics = Workers(), Metrics()
    admission = Admission(settings.max_rows, limits)
    metrics.registry.register(EngineMetrics(engine, admission, base.name, settings.max_rows))
    mixes = Mixes(store.catalog, workers, base.name, limits.merge_members)
    return Services(
        settings=settings,
        base=base,
        named=names,
        engine=engine,
        store=store,
        backlog=Backlog(store.registry, limits=limits.of_jobs()),
        prompts=Prompts(tokenizer, engine.context_length, limits.template_seconds),
        tokens=TokenText(tokenizer),
        constraints=Constraints(
            tokenizer,
            engine.vocab_size,
            engine.eos,
            limits.grammar_seconds,
            limits.queue_seconds,
        ),
        mixes=mixes,
        job_reader=JobReader(store.catalog, workers, mixes, base.fingerprint, limits.merge_members),
        admission=admission,
        workers=workers,
        metrics=metrics,
    )


def engine_config(settings: Settings, chosen: Device) -> EngineConfig:
    """The part of the settings that is the engine's, once the base is on its device."""
    on_device = chosen.kernels == "triton"
    tokens = settings.max_step_tokens or (2048 if on_device else 512)
    return EngineConfig(
        max_rows=settings.max_rows,
        # Admission counts what waits; this bound only catches what it would miss.
        max_waiting=2 * settings.limits.queued,
        memory_bytes=memory_budget(settings, chosen.device),
        kernels=chosen.kernels,
        attention=settings.attention,
        host_bytes=settings.host_bytes,
        int8_adapters=settings.int8_adapters,
        page_size=settings.page_size,
        max_step_tokens=tokens,
        # A step with prompts is launched one by one: on a device that takes the host some 12 ms for
        # 32 layers (estimated), whatever the prompts' length.
        max_mixed_step_tokens=min(tokens, 1024 if on_device else 128),
        # One packs while the other's copy is under way.
        loader_threads=2 if on_device else 1,
        max_members=settings.limits.merge_members,
        queue_timeout=settings.limits.queue_seconds,
        fuse=settings.fuse,
        fuse_share=settings.fuse_share,
        fuse_hold_steps=settings.fuse_hold_steps,
        fuse_hold_share=settings.fuse_hold_share,
        fuse_16bit=settings.fuse_16bit,
        fuse_deviation=settings.fuse_deviation,
    )


def services_of(request: Request) -> Services:
    """The services of the application that the request came to."""
    services: Services = request.app.state.services
    return services


ServicesOf = Annotated[Services, Depends(services_of)]
