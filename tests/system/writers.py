"""Many writers at a time, run as a process: each has a task of its own, and writes until SIGTERM asks for the ends.

    python -m tests.system.writers FOLDER COUNT SEED

Each task ends in one of three ways: completed, failed, cancelled (which a stream spells as two frames).
"""

import asyncio
import random
import signal
import sys
from pathlib import Path

from app import events
from app.settings import Settings
from app.store import Store, open_store
from tests.api.serving import ORG, USER, Attempt

TURNS = 2
"""Per hundredth of a second, shared by all: work for two cores, but no flood."""


def task_of(number: int) -> str:
    return f"written-{number}"


async def begin(store: Store, task: str) -> Attempt:
    """In a queue of its own, so that nobody gets another's."""
    submission = events.Submission(id=task, org=ORG, owner=USER, query="why?", queue=task, submission=task)
    await store.submit(submission)
    (claimed,) = await store.claim([task], task, 1)
    return Attempt(store, task, claimed.fence)


async def write(store: Store, number: int, seed: str, turns: asyncio.Semaphore, over: asyncio.Event) -> None:
    dice = random.Random(f"{seed}/{number}")
    attempt = await begin(store, task_of(number))
    while await turns.acquire() and not over.is_set():
        for _ in range(dice.choice((1, 1, 4))):
            if dice.random() < 0.8:
                await attempt.write("wörd " * dice.randint(1, 20))
            else:
                await attempt.say(events.Noted(name="NOTED", payload={"x": "y" * dice.randint(0, 600)}))
    match number % 3:
        case 0:
            await attempt.complete()
        case 1:
            await attempt.say(events.Failed(error="no"))
        case _:
            await store.append(ORG, task_of(number), events.Cancelled(), operation=f"end-{number}")


async def main(folder: Path, count: int, seed: str) -> None:
    turns, over = asyncio.Semaphore(0), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    # Nobody renews a lease here: it outlasts the test.
    async with open_store(Settings(data=folder, lease_seconds=600)) as store, asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(write(store, number, seed, turns, over))
        while not over.is_set():
            await asyncio.sleep(0.01)
            for _ in range(TURNS):
                turns.release()
        for _ in range(count):
            turns.release()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
