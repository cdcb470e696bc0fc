"""What a job's checkpoints look like to OpenAI's client, and to whoever watches a quota."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from gossamer.api.settings import Limits, Settings
from gossamer.jobs.views import JobLimits
from tests.api.hand import Hand, at_hand, base_of
from tests.api.running import Running, running
from tests.api.tuning import Tenant


@pytest.fixture(scope="module")
def server(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of our own: a hand that claims the next job wants no other tests' in the queue."""
    with running(api_base, tmp_path_factory.mktemp("checkpoints"), {}) as server:
        yield server


@pytest.fixture
def hand(server: Running) -> Iterator[Hand]:
    with at_hand(server.services.settings.data_dir, base_of(server)) as hand:
        yield hand


def test_only_those_that_can_be_asked_are_listed(server: Running, hand: Hand) -> None:
    tenant = Tenant(server, "acme")
    job: Any = tenant.create(suffix="rows")
    claim = hand.claim(job.id)
    for step in range(1, 7):
        hand.checkpoint(claim, step, server.make_file(40 + step), {"step": step})
    tenant.client.models.delete("rows@step-6")
    tenant.client.models.delete("rows@step-3")
    listed = list(tenant.jobs.checkpoints.list(job.id, limit=2))  # the client asks page for page
    assert [one.step_number for one in listed] == [5, 4, 2, 1]
    for one in listed:
        assert tenant.text(one.fine_tuned_model_checkpoint)
    with pytest.raises(openai.NotFoundError):
        tenant.text("rows@step-3")
    page = tenant.jobs.checkpoints.list(job.id, limit=2, after=listed[1].id)
    assert ([one.id for one in page.data], page.has_more) == ([listed[2].id, listed[3].id], False)


def test_their_bytes_are_in_the_usage(server: Running, hand: Hand) -> None:
    tenant = Tenant(server, "zeta")
    job: Any = tenant.create(suffix="rows")
    claim = hand.claim(job.id)
    made = hand.checkpoint(claim, 1, server.make_file(51), {})
    usage = tenant.client.get("/adapters", cast_to=dict[str, Any])["usage"]
    assert (usage["adapters"], usage["bytes"]) == (0, made.nbytes)


def test_how_many_a_job_keeps_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Limits().of_jobs() == JobLimits(), "one default, said twice"
    monkeypatch.setenv("GOSSAMER_LIMITS__CHECKPOINTS_PER_JOB", "2")
    monkeypatch.setenv("GOSSAMER_LIMITS__JOBS_PER_TENANT", "3")
    assert Settings().limits.of_jobs() == JobLimits(unfinished=3, checkpoints=2)
    monkeypatch.setenv("GOSSAMER_LIMITS__CHECKPOINTS_PER_JOB", "0")
    with pytest.raises(ValueError, match="checkpoints_per_job"):
        Settings()
