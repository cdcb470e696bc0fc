"""How adapters and versions are named in a request.

sql                  the current version of the tenant's adapter `sql`
sql:3                its version 3
sql@sha256:<64 hex>  its version of that digest
sql@step-40          a training job's checkpoint
acme/sql             another tenant's (a tenant's own is `sql` or `<itself>/sql`)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from gossamer.store.catalog.errors import InvalidName, ReservedName

#: of an adapter, and of a tenant
MAX_NAME = 128
#: what the base model is called in every request
BASE = "base"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_TAG = re.compile(r"step-(0|[1-9][0-9]{0,11})")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Ref:
    """A parsed reference. At most one of `number`, `digest` and `tag` is set; none means current.

    `given` is the text it came from, for messages.
    """

    given: str
    name: str
    tenant: str | None = None
    number: int | None = None
    digest: str | None = None
    tag: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one of the forms above.

        Raises:
            InvalidName
        """
        head, at, suffix = text.partition("@")
        head, colon, number = head.partition(":")
        tenant, slash, name = head.rpartition("/")
        if slash:
            check_name(tenant, given=text)
        check_name(name, given=text)
        if at and colon:
            raise InvalidName(text, "it has both a number and a digest or tag")
        if colon and not _NUMBER.fullmatch(number):
            raise InvalidName(text, "a version is a number from 1")
        digest = suffix if at and _DIGEST.fullmatch(suffix) else None
        if at and digest is None and not _TAG.fullmatch(suffix):
            raise InvalidName(text, "after '@' comes sha256:<64 hex digits> or step-<number>")
        return cls(
            given=text,
            name=name,
            tenant=tenant if slash else None,
            number=int(number) if colon else None,
            digest=digest,
            tag=suffix if at and digest is None else None,
        )


def check_name(name: str, *, given: str | None = None) -> str:
    """The name itself, if it may name an adapter or a tenant.

    Raises:
        InvalidName
    """
    if len(name) > MAX_NAME:
        raise InvalidName(given or name, f"it is longer than {MAX_NAME} characters")
    if not _NAME.fullmatch(name):
        raise InvalidName(
            given if given is not None else name,
            "use lower-case letters, digits, '.', '_' and '-', beginning with a letter or digit",
        )
    return name


def check_new_name(name: str, base_name: str) -> str:
    """The name itself, if a new adapter may have it.

    Raises:
        InvalidName
        ReservedName: it is the base model's.
    """
    if name in (BASE, base_name.lower()):
        raise ReservedName(name)
    return check_name(name)


def check_tag(tag: str) -> str:
    """The tag itself, if it may name a checkpoint.

    Raises:
        InvalidName
    """
    if not _TAG.fullmatch(tag):
        raise InvalidName(tag, "a checkpoint's tag is step-<number>")
    return tag
