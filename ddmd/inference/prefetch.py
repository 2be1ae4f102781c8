"""Work on the next item while the caller is busy with this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    items: Iterable[Item], work: Callable[[Item], Result]
) -> Iterator[tuple[Item, Callable[[], Result]]]:
    """Each item, and a function that waits for `work(item)` and returns it or raises what it raised.

    A thread works on one item more than was asked for, and never on more, so that memory holds two results
    at most.
    """
    waiting = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ddmd-prefetch") as pool:

        def begin() -> tuple[Item, Future[Result]] | None:
            for item in waiting:
                return item, pool.submit(work, item)
            return None

        current = begin()
        while current is not None:
            item, future = current
            future.exception()  # waits: the next is begun when this one is done
            following = begin()
            yield item, future.result
            current = following
