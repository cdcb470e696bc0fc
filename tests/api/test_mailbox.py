"""Messages on their way from the engine's thread into the event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from gossamer.api.mailbox import Inbox, Postbox
from gossamer.engine.messages import ChoiceEnd, Chunk, Message


def test_messages_arrive_in_order_and_each_in_its_inbox() -> None:
    async def main() -> list[list[tuple[int, Message]]]:
        postbox = Postbox()
        postbox.open()
        inboxes = [Inbox() for _ in range(8)]
        slots = [postbox.slot(inbox, number) for number, inbox in enumerate(inboxes)]

        def engine() -> None:
            for step in range(500):
                for number, slot in enumerate(slots):
                    slot(Chunk(number, "", (step,)))
            for slot in slots:
                slot(ChoiceEnd(0, "stop"))

        async def read(inbox: Inbox) -> list[tuple[int, Message]]:
            found: list[tuple[int, Message]] = []
            while not found or not isinstance(found[-1][1], ChoiceEnd):
                found += await inbox.take()
            return found

        thread = threading.Thread(target=engine)
        thread.start()
        try:
            return await asyncio.gather(*(read(inbox) for inbox in inboxes))
        finally:
            thread.join()

    for number, found in enumerate(asyncio.run(main())):
        chunks = [message for _, message in found[:-1]]
        assert chunks == [Chunk(number, "", (step,)) for step in range(500)]
        assert {prompt for prompt, _ in found} == {number}


def test_a_step_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        loop: Any = asyncio.get_running_loop()
        wakes = 0
        call = loop.call_soon_threadsafe

        def counting(*args: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return call(*args)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
        postbox = Postbox()
        postbox.open()
        inbox = Inbox()
        slots = [postbox.slot(inbox, row) for row in range(16)]
        for slot in slots:  # in the loop's own thread, so that it cannot come between them
            slot(Chunk(0, "a", (1,)))
        assert len(await inbox.take()) == 16
        return wakes

    assert asyncio.run(main()) == 1


def test_a_failure_comes_after_the_messages_before_it() -> None:
    async def main() -> None:
        inbox = Inbox()
        inbox.put(0, Chunk(0, "a", (1,)))
        inbox.fail(ValueError("first"))
        inbox.fail(ValueError("second"))
        assert await inbox.take() == [(0, Chunk(0, "a", (1,)))]
        with pytest.raises(ValueError, match="first"):
            await inbox.take()

    asyncio.run(main())


def test_a_failure_ends_a_wait() -> None:
    async def main() -> None:
        inbox = Inbox()
        asyncio.get_running_loop().call_later(0.01, inbox.fail, ValueError("ended"))
        with pytest.raises(ValueError, match="ended"):
            await inbox.take()

    asyncio.run(main())


def test_nothing_is_kept_for_a_loop_that_has_ended() -> None:
    postbox, inbox = Postbox(), Inbox()

    async def main() -> None:
        postbox.open()
        postbox.close()

    asyncio.run(main())
    postbox.slot(inbox, 0)(Chunk(0, "a", (1,)))
