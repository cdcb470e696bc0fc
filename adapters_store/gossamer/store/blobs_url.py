"""Which URLs may name the blob store. Imports nothing heavy: settings are checked with it."""

from __future__ import annotations

from urllib.parse import urlsplit

from gossamer.store.catalog.errors import BlobsUrlInvalid

#: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage. The name after `//`
#: is the bucket's, or the container's.
BUCKETS = ("s3", "gs", "az")


def check_blobs_url(url: str) -> None:
    """Whether `url` names a folder (`file:///…`) or a bucket (`s3://bucket/prefix`) and nothing
    else: URLs come to be logged and shown, so one that holds a secret must not get that far.

    Raises:
        BlobsUrlInvalid: its message holds no part of the URL that could be a secret.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BlobsUrlInvalid("it is not a URL") from None  # the cause quotes the URL
    if "@" in parts.netloc:
        raise BlobsUrlInvalid(
            "it holds credentials; they belong in the environment, "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3"
        )
    # As it stands there: a parser takes `FILE:///x`, ` file:///x` and `file:x` too, which others
    # that look at the URL's beginning would take for something else.
    scheme, mark, _ = url.partition("://")
    if scheme not in (*BUCKETS, "file") or not mark:
        known = ", ".join(f"{scheme}://" for scheme in BUCKETS)
        raise BlobsUrlInvalid(f"it begins with none of {known} and file:///")
    if "?" in url or "#" in url:
        raise BlobsUrlInvalid(
            "it has a query or a fragment; an endpoint is given in the environment, "
            "as AWS_ENDPOINT_URL for S3"
        )
    if port is not None or ":" in parts.netloc:
        raise BlobsUrlInvalid("a port is part of the endpoint, AWS_ENDPOINT_URL, not of the URL")
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.strip("/"):
            raise BlobsUrlInvalid("it names no folder of this machine; write file:///path")
    elif not parts.netloc:
        raise BlobsUrlInvalid(f"it names no bucket; write {scheme}://bucket/prefix")
