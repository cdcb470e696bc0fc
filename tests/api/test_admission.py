"""Places in the queue: bounded for the server and for each tenant, and always given back."""

from __future__ import annotations

import pytest

from gossamer.api.admission import Admission
from gossamer.api.errors import ApiError
from gossamer.api.settings import Limits


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def admission(rows: int = 1, **limits: int) -> tuple[Admission, Clock]:
    clock = Clock()
    return Admission(rows, Limits(**limits), clock), clock


def test_what_fits_the_rows_does_not_count_as_waiting() -> None:
    places, _ = admission(rows=16, queued=10, queued_per_tenant=4)
    tickets = [places.enter("acme", 1) for _ in range(20)]
    with pytest.raises(ApiError):
        places.enter("acme", 1)
    for ticket in tickets[:16]:
        ticket.begun(1)
    with pytest.raises(ApiError):
        places.enter("acme", 1)
    tickets[0].leave()
    places.enter("acme", 1)


def test_a_tenant_is_refused_with_429_before_the_server_is_full() -> None:
    places, _ = admission(queued=10, queued_per_tenant=4)
    places.enter("acme", 5)
    with pytest.raises(ApiError) as caught:
        places.enter("acme", 1)
    assert caught.value.status_code == 429
    assert caught.value.code == "rate_limit_exceeded"
    places.enter("other", 4)


def test_a_full_server_answers_503() -> None:
    places, _ = admission(queued=6, queued_per_tenant=4)
    places.enter("acme", 5)
    places.enter("b", 2)
    with pytest.raises(ApiError) as caught:
        places.enter("c", 1)
    assert caught.value.status_code == 503
    headers = caught.value.headers or {}
    assert int(headers["retry-after"]) >= 1
    assert int(headers["retry-after-ms"]) >= 250


def test_a_tenant_whose_sequences_all_run_may_queue_behind_another_s() -> None:
    places, _ = admission(rows=4, queued=10, queued_per_tenant=4)
    places.enter("acme", 4).begun(4)
    places.enter("b", 4)
    places.enter("acme", 4)
    with pytest.raises(ApiError):
        places.enter("acme", 1)


def test_leaving_gives_back_what_still_waited_once() -> None:
    places, _ = admission(queued=10, queued_per_tenant=4)
    ticket, other = places.enter("acme", 4), places.enter("b", 2)
    ticket.begun(1)
    ticket.leave()
    ticket.leave()
    assert (places.waiting, places.inside) == (2, 1)
    ticket.begun(1)  # a message that comes late
    assert places.waiting == 2
    other.leave()
    assert (places.waiting, places.inside) == (0, 0)
    places.enter("acme", 5)


def test_the_wait_that_is_advised_grows_with_what_requests_take() -> None:
    places, clock = admission(queued=100, queued_per_tenant=50)

    def advised() -> int:
        held = places.enter("acme", 51)
        try:
            places.enter("acme", 1)
        except ApiError as error:
            return int((error.headers or {})["retry-after-ms"])
        finally:
            held.leave()
        raise AssertionError("it was let in")

    quick = advised()
    for _ in range(20):
        slow = places.enter("acme", 1)
        clock.now += 10
        slow.leave()
    assert advised() > quick


def test_uploads_are_bounded_for_each_tenant_and_for_all() -> None:
    places, _ = admission(uploads=2, uploads_per_tenant=1)
    with places.upload("a"):
        with pytest.raises(ApiError) as mine, places.upload("a"):
            pass
        with places.upload("b"), pytest.raises(ApiError) as all_, places.upload("c"):
            pass
    assert (mine.value.status_code, all_.value.status_code) == (429, 503)
    with places.upload("a"):
        pass


def test_increments_are_bounded_for_each_tenant_and_for_all() -> None:
    places, _ = admission(increments=2, increments_per_tenant=1, uploads=1, uploads_per_tenant=1)
    with places.upload("a"), places.increment("a"):
        with pytest.raises(ApiError) as mine, places.increment("a"):
            pass
        with places.increment("b"), pytest.raises(ApiError) as all_, places.increment("c"):
            pass
    assert (mine.value.status_code, all_.value.status_code) == (429, 503)
    with places.increment("a"):
        pass
