"""Who needs a blob: versions, files, jobs that are not finished, and uploads in progress.

Every question is asked inside the transaction that holds the blob's row locked, or the answer may
be old by the time it is used.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.store.registry.job_models import FINISHED, Job
from gossamer.store.registry.models import ACTIVE, TOMBSTONED, File, Upload, Version

_VERSIONS = sa.select(Version.blob_id).where(Version.status != TOMBSTONED)
#: A job reads its files when its turn comes, which may be long after their deletion.
_IN_A_JOB = sa.or_(
    *(
        sa.exists().where(column == File.id, Job.status.not_in(FINISHED))
        for column in (Job.training_file_id, Job.validation_file_id)
    )
)
_FILES = sa.select(File.blob_id).where(sa.or_(File.deleted_at.is_(None), _IN_A_JOB))


def is_needed(session: Session, blob_id: str) -> bool:
    """Whether a version, a file or an unfinished job needs the blob."""
    return is_a_versions(session, blob_id) or is_a_files(session, blob_id)


def is_a_versions(session: Session, blob_id: str) -> bool:
    """Whether a version that is not deleted needs the blob."""
    return session.execute(_VERSIONS.where(Version.blob_id == blob_id).limit(1)).first() is not None


def is_a_files(session: Session, blob_id: str) -> bool:
    """Whether a file needs the blob: one not deleted, or one that an unfinished job uses."""
    return session.execute(_FILES.where(File.blob_id == blob_id).limit(1)).first() is not None


def needed_blobs(session: Session) -> set[str]:
    """Every blob for which `is_needed` says yes."""
    return set(session.execute(_VERSIONS.union(_FILES)).scalars())


def usable_blobs(session: Session) -> set[str]:
    """Those of them that should be there: not of versions that were found damaged."""
    versions = sa.select(Version.blob_id).where(Version.status == ACTIVE)
    return set(session.execute(versions.union(_FILES)).scalars())


def is_claimed(session: Session, blob_id: str) -> bool:
    """Whether an upload in progress is about to refer to the blob."""
    query = sa.select(Upload.id).where(Upload.blob_id == blob_id)
    return session.execute(query.limit(1)).first() is not None
