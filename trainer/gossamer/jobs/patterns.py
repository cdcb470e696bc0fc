"""Regular expressions that tenants send, searched in time linear in the text.

Python's `re` backtracks: `(.|.)*x`, sent as a job's targets, would stop a worker for good, with the
interpreter's lock held. pydantic brings the Rust crate `regex`, which does not backtrack, bounds
the size of what it compiles, and for that has no look-around and no back-references.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import StringConstraints, TypeAdapter, ValidationError
from pydantic_core import SchemaError

#: in characters
LONGEST = 1024


class Pattern:
    """A compiled regular expression.

    Raises:
        ValueError: it is none, or its compiled form would be too large.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise ValueError(f"longer than {LONGEST} characters")
        self.text = text
        try:
            self._adapter = TypeAdapter[str](Annotated[str, StringConstraints(pattern=text)])
        except SchemaError as error:
            raise ValueError("not a regular expression (no look-around, no back-references)") from (
                error
            )

    def search(self, text: str) -> bool:
        """Whether it matches anywhere in `text`, as `re.search` does."""
        try:
            self._adapter.validate_python(text)
        except ValidationError:
            return False
        return True
