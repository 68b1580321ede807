"""Work for several threads, its results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Items that wait for a thread, or with a result to be taken, per thread.
WAITING = 2


def in_order(run: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """run(item) for every item, in their order, `threads` at a time; what `run` raises is raised here.

    No more items are taken than some per thread ahead, so that memory does not grow with their number.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="worker") as pool:
        try:
            for item in items:
                pending.append(pool.submit(run, item))
                if len(pending) > WAITING * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
