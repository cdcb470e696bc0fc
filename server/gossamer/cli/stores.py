"""The data folder's store, for commands that work on it beside a server that may be running."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gossamer.api.settings import Settings
    from gossamer.base.load import BaseFiles
    from gossamer.store.catalog.opening import Store


def open_store(settings: Settings, base: BaseFiles) -> Store:
    """The registry and the blobs that the settings name, for adapters of `base`; not its owner.

    Raises:
        RegistryTooNew, RegistryBusy, KeySecretUnsafe, StoreFull, BlobStoreFailed, BlobsNotOurs
    """
    from gossamer.store.catalog.opening import Store
    from gossamer.store.catalog.views import BaseInfo

    limits = settings.limits
    return Store(
        settings.data_dir.expanduser().resolve(),
        BaseInfo(base.name, base.fingerprint, base_table(base)),
        database_url=settings.database_url,
        blobs_url=settings.blobs_url,
        limits=limits.of_store(),
        upload_bytes=limits.adapter_bytes,
    )


def base_table(base: BaseFiles) -> dict[str, tuple[int, int]]:
    """Names and shapes of the weights that an adapter may change, without loading any."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from gossamer.base.patch_map import adapter_table

    config = AutoConfig.from_pretrained(base.path, local_files_only=True)
    with torch.device("meta"):
        return adapter_table(AutoModelForCausalLM.from_config(config))
