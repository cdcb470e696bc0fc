"""What an operator can set: read once at the door, frozen, passed down.

Every field can be given as an environment variable: `GOSSAMER_PORT=9000`, or
`GOSSAMER_LIMITS__JSON_BYTES=1048576` for a nested one. Nothing below this module reads the
environment, but for two libraries, which read what is secret or a machine's own: huggingface_hub
(`HF_TOKEN`, `HF_ENDPOINT`) and obstore (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` and so on).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from gossamer.jobs.views import JobLimits
from gossamer.store.blobs_url import check_blobs_url
from gossamer.store.catalog.views import StoreLimits

Bytes = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Limits(BaseModel):
    """What one request, one tenant and one connection may ask for. Bytes, seconds, counts.

    `queued` and `queued_per_tenant` count sequences (prompts × n) that have not begun;
    `rows_at_once` is how many of them one request may have in the engine. `jobs_per_tenant` counts
    training jobs that are queued, running or paused; of its checkpoints a job keeps the last
    `checkpoints_per_job`, which count in the bytes of adapters. The files are those to train on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # the body
    json_bytes: Bytes = 8 << 20
    adapter_bytes: Bytes = 512 << 20
    training_file_bytes: Bytes = 256 << 20
    header_bytes: Bytes = 64 << 10
    headers: Count = 100
    form_fields: Count = 8
    # the request
    choices: Count = 16
    prompts: Count = 128
    stop_strings: Count = 4
    logprobs: Count = 20
    logit_bias: Count = 300
    merge_members: Count = 8
    # the queue
    queued: Count = 256
    queued_per_tenant: Count = 64
    rows_at_once: Count = 16
    uploads: Count = 16
    uploads_per_tenant: Count = 4
    increments: Count = 16
    increments_per_tenant: Count = 2
    connections: Count = 1024
    # time
    header_seconds: Seconds = 15.0
    json_body_seconds: Seconds = 30.0
    body_gap_seconds: Seconds = 15.0
    upload_seconds: Seconds = 600.0
    queue_seconds: Seconds = 30.0
    first_token_seconds: Seconds = 60.0
    request_seconds: Seconds = 600.0
    write_stall_seconds: Seconds = 30.0
    keep_alive_seconds: Seconds = 75.0
    grammar_seconds: Seconds = 2.0
    template_seconds: Seconds = 2.0
    # what a tenant may keep
    adapters_per_tenant: Count = 100
    adapter_bytes_per_tenant: Bytes = 4 << 30
    files_per_tenant: Count = 100
    file_bytes_per_tenant: Bytes = 1 << 30
    # training
    jobs_per_tenant: Count = 16
    checkpoints_per_job: Count = 5

    def of_store(self) -> StoreLimits:
        """Those that the store enforces."""
        return StoreLimits(
            adapters=self.adapters_per_tenant,
            stored_bytes=self.adapter_bytes_per_tenant,
            files=self.files_per_tenant,
            file_bytes=self.file_bytes_per_tenant,
            training_file_bytes=self.training_file_bytes,
        )

    def of_jobs(self) -> JobLimits:
        """Those that the queue of training jobs enforces."""
        return JobLimits(
            unfinished=self.jobs_per_tenant,
            checkpoints=self.checkpoints_per_job,
        )


class Settings(BaseSettings):
    """The server's configuration.

    Attributes:
        data_dir: holds the base models, the registry, the blobs and the key secret.
        base: a known base's name, a Hugging Face directory, a GGUF file, or a model of the Hub at
            one commit, `owner/name@<40 hex digits>`.
        host, port: where to listen; port 0 takes a free one.
        database_url, blobs_url: default to SQLite and a folder inside `data_dir`. A `blobs_url`
            holds no credentials (`s3://bucket/prefix`).
        threads: of torch; None leaves its choice.
        device, dtype: what the base runs on, and in. auto: a GPU in 16 bits if there is one, else
            the CPU in float32.
        attention: whose attention runs the steps on a GPU that are not captured.
        memory_bytes: one budget for KV pages and resident adapters. None: 4 GiB on a CPU, nine
            tenths of what the base leaves free on a GPU.
        host_bytes: of packed adapters kept in the host's memory for a GPU.
        int8_adapters: keep adapters' values on a GPU in 8 bits, with a scale for each row.
        max_rows: sequences that run at once.
        max_step_tokens: most tokens of one engine step (prefill is cut to fit). None: 512 on a
            CPU, 2048 on a GPU.
        page_size: tokens of a KV page.
        fuse: write a mix that every row shares into the weights while that lasts.
        fuse_share: below 1, a mix that this share of all rows wants may be fused too, and the
            others are held back meanwhile: for at most `fuse_hold_steps` steps in a row and, in
            the long run, for at most the share `fuse_hold_share` of the steps.
        fuse_16bit, fuse_deviation: fuse into 16-bit weights as well, which rounds: a mix whose
            deviation is measured to be within that bound.
        drain_seconds: how long running requests may take after SIGTERM.
        collect_seconds: between two looks for blobs that other processes have let go of.
        first_tenant: whom the first admin key is made for.
    """

    model_config = SettingsConfigDict(
        env_prefix="GOSSAMER_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    data_dir: Path = Field(default_factory=lambda: Path.home() / ".gossamer")
    base: str = "smollm2-135m"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    database_url: str | None = None
    blobs_url: str | None = None
    threads: Count | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["triton", "flashinfer"] = "triton"
    memory_bytes: Bytes | None = None
    host_bytes: Bytes = 4 << 30
    int8_adapters: bool = False
    max_rows: Count = 16
    max_step_tokens: Count | None = None
    page_size: Count = 16
    fuse: bool = True
    fuse_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    fuse_hold_steps: Count = 32
    fuse_hold_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    fuse_16bit: bool = False
    fuse_deviation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    drain_seconds: Seconds = 30.0
    collect_seconds: Seconds = 600.0
    first_tenant: Annotated[str, Field(min_length=1, max_length=128)] = "default"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    limits: Limits = Limits()

    @field_validator("blobs_url")
    @classmethod
    def _names_a_blob_store(cls, url: str | None) -> str | None:
        """Raises BlobsUrlInvalid as it is: pydantic's own error would quote the URL."""
        if url is not None:
            check_blobs_url(url)
        return url
