"""What can go wrong with jobs. Each class carries its data as attributes; the HTTP status in a
docstring is the one that fits it."""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.store.errors import printable


class JobsError(Exception):
    """Base class of everything that the backlog and the requests raise."""


class ParameterError(JobsError):
    """400: a field of the request cannot have the value that it has.

    Attributes:
        field: dotted, as `parameters.density` or `settings.epochs`.
        problem: what is wrong, without the value.
    """

    def __init__(self, field: str, problem: str) -> None:
        self.field, self.problem = printable(field), problem
        super().__init__(f"{self.field}: {problem}")


class UnknownMethod(JobsError):
    """400: there is no training method of that name, or none that jobs may use."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name, self.known = name, tuple(known)
        super().__init__(
            f"There is no training method '{printable(name)}'; there are {', '.join(known)}."
        )


class UnusableFile(JobsError):
    """400 for `param`: no such file, deleted, another tenant's (one message for these), or kept for
    another purpose."""

    def __init__(self, param: str, file_id: str, why: str) -> None:
        self.param, self.file_id, self.why = param, file_id, why
        super().__init__(f"The file '{printable(file_id)}' {why}.")


class JobNotFound(JobsError):
    """404: no such job, or another tenant's. One message for both."""

    def __init__(self, given: str) -> None:
        self.given = given
        super().__init__(
            f"The job '{printable(given)}' does not exist or you do not have access to it."
        )


class UnknownCursor(JobsError):
    """400 `after`: it is not the id of anything in the list."""

    def __init__(self, given: str) -> None:
        self.given = given
        super().__init__(f"'{printable(given)}' is nothing of this list.")


class JobStateError(JobsError):
    """409, no use to retry: what was asked for does not apply to a job in this state.

    Attributes:
        action: cancel, pause or resume.
        status: the job's, or `cancelling` while a cancel is under way.
    """

    def __init__(self, job_id: str, action: str, status: str) -> None:
        self.job_id, self.action, self.status = job_id, action, status
        super().__init__(f"The job {job_id} is {status}; one cannot {action} it.")


class TooManyJobs(JobsError):
    """429 `insufficient_quota`: the tenant has as many unfinished jobs as it may have."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(
            f"There are {limit} unfinished jobs already, and no more may wait; "
            "cancel one, or wait until one is finished."
        )


class LeaseLost(JobsError):
    """For workers: the job is no longer theirs. It was taken over, or ended, meanwhile; nothing was
    written, and nothing may be written any more."""

    def __init__(self, job_id: str, worker: str) -> None:
        self.job_id, self.worker = job_id, worker
        super().__init__(f"The job {job_id} is no longer {worker}'s.")


class CancelRequested(JobsError):
    """For workers: the job cannot succeed, for its tenant has cancelled it. Nothing was written;
    `Backlog.cancelled` is what comes next."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"The job {job_id} was cancelled before its result was registered.")
