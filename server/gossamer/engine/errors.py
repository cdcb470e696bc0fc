"""What can go wrong with a request inside the engine. Every class carries its data.

Source: the habit of starlette's exceptions: data here, one table to HTTP in the API.
"""

from __future__ import annotations


class EngineError(Exception):
    """A request's own failure; its batch-mates are not concerned."""


class ContextLengthExceeded(EngineError):
    """Prompt and max_tokens do not fit the base's context (tokens)."""

    def __init__(self, prompt: int, max_tokens: int, context: int) -> None:
        super().__init__(
            f"This model's context is {context} tokens, but the request needs "
            f"{prompt + max_tokens} ({prompt} in the prompt, {max_tokens} for the completion)."
        )
        self.prompt, self.max_tokens, self.context = prompt, max_tokens, context


class InvalidRequest(EngineError):
    """A field of the request is outside what the base allows."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Overloaded(EngineError):
    """The queue is full, or the request waited too long in it (seconds until a retry helps)."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class AdapterTooLarge(EngineError):
    """An adapter does not fit the byte budget beside what is pinned. Nothing was evicted for it."""

    def __init__(self, key: str, nbytes: int, available: int) -> None:
        super().__init__(
            f"Adapter {key} needs {nbytes} bytes; {available} can be made free at the moment."
        )
        self.key, self.nbytes, self.available = key, nbytes, available


class AdapterUnavailable(EngineError):
    """An adapter could not be loaded; `cause` says why."""

    def __init__(self, digest: str, cause: BaseException) -> None:
        super().__init__(f"Adapter {digest} could not be loaded: {cause}")
        self.digest, self.cause = digest, cause


class DeviceFull(AdapterUnavailable):
    """The device ran out of memory while the adapter was brought there."""


class NonFiniteLogits(EngineError):
    """The model with this request's mix produced NaN or infinity."""

    def __init__(self, mix: str) -> None:
        super().__init__(f"The model with mix {mix} produced a value that is not finite.")
        self.mix = mix


class StepFailed(EngineError):
    """An exception in the request's own part of a step."""


class Cancelled(EngineError):
    """The client went away or a limit on the whole request passed."""


class ShuttingDown(EngineError):
    """The server is draining, or the engine has stopped."""


class UnsupportedModel(Exception):
    """The base cannot be served right; refused at start."""

    def __init__(self, architecture: str, why: str) -> None:
        super().__init__(f"{architecture} cannot be served: {why}")
        self.architecture, self.why = architecture, why
