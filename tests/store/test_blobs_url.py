"""URLs of blob stores: what is taken, and that a refusal keeps secrets to itself."""

from __future__ import annotations

import traceback

import pytest

from gossamer.store.blobs_url import check_blobs_url
from gossamer.store.catalog.errors import BlobsUrlInvalid

SECRET = "sEcReT"


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket",
        "s3://bucket/",
        "s3://my.bucket-1/some/prefix",
        "gs://bucket/prefix",
        "az://container",
        "file:///var/lib/gossamer",
        "file://localhost/srv",
    ],
)
def test_a_folder_or_a_bucket_is_taken(url: str) -> None:
    check_blobs_url(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (f"s3://key:{SECRET}@bucket", "credentials"),
        (f"s3://{SECRET}@bucket/prefix", "credentials"),
        (f"https://key:{SECRET}@storage.example.com/bucket", "credentials"),
        (f"s3://bucket?secret_access_key={SECRET}", "query"),
        (f"s3://bucket/prefix#{SECRET}", "fragment"),
        ("s3://bucket?", "query"),
        ("s3://bucket/prefix#", "fragment"),
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("gs://", "no bucket"),
        ("s3:bucket", "begins with none"),
        ("S3://bucket", "begins with none"),
        ("FILE:///srv", "begins with none"),
        (" file:///srv", "begins with none"),
        ("file:srv", "begins with none"),
        ("file:/srv", "begins with none"),
        (f"FILE://key:{SECRET}@host/srv", "credentials"),
        ("s3://localhost:9000/bucket", "AWS_ENDPOINT_URL"),
        ("s3://bucket:", "AWS_ENDPOINT_URL"),
        (f"s3://bucket:{SECRET}", "not a URL"),
        (f"s3://[{SECRET}", "not a URL"),
        (f"https://storage.example.com/{SECRET}", "begins with none"),
        ("memory:///", "begins with none"),
        ("/var/lib/gossamer", "begins with none"),
        (SECRET, "begins with none"),
        ("", "begins with none"),
        ("file://", "no folder"),
        ("file:///", "no folder"),
        ("file:////", "no folder"),
        ("file://host/srv", "no folder"),
    ],
)
def test_anything_else_is_refused_and_not_quoted(url: str, why: str) -> None:
    with pytest.raises(BlobsUrlInvalid) as refused:
        check_blobs_url(url)
    assert why in refused.value.why
    assert refused.value.why in str(refused.value)
    assert SECRET not in "".join(traceback.format_exception(refused.value))
