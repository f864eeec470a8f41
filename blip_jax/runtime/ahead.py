"""A map in threads that run ahead of the consumer."""

import collections
import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable
from typing import Any


def map_ahead(
  function: Callable[[Any], Any],
  items: Iterable[Any],
  number: int,
  threads: concurrent.futures.Executor | None = None,
) -> Generator[Any, None, None]:
  """Like `map`, in threads that are up to `number` items ahead.

  While a result is in use, at most `number` others are ready or being computed.
  Items are taken when they are needed, in order.  Frequent callers pass their
  own `threads`: malloc keeps memory for every thread that ever existed.
  """
  items = iter(items)
  with (
    concurrent.futures.ThreadPoolExecutor()
    if threads is None
    else contextlib.nullcontext(threads)
  ) as pool:
    start = lambda count: [
      pool.submit(function, item) for item in itertools.islice(items, count)
    ]
    waiting = collections.deque(start(number))
    try:
      while waiting:
        result = waiting.popleft().result()
        waiting.extend(start(1))
        yield result
    finally:
      for future in waiting:
        future.cancel()
