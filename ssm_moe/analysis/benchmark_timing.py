"""How long a call takes, by the host's clock."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax


class Timed(Protocol):
  """Something that can be run."""

  def run(self, calls: int) -> float:
    """Returns the milliseconds of a call, of so many without waiting between them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """How to time.

  Attributes:
    repeats: Times that are taken of each pass.
    least_ms: Of a timing: so many calls are started one after the other, and waited for together,
      that the device is never idle while the host prepares the next. 0 waits for each.
    most_seconds: For the repeats of a pass together, if that leaves three of them.
    least_bytes: Arguments take turns until they have this size, so that none is in a cache from the
      call before.
    most_sets: Of arguments.
    interleaved: Whether all passes take turns.
  """

  repeats: int = 7
  least_ms: float = 0.0
  most_seconds: float = math.inf
  least_bytes: int = 0
  most_sets: int = 8
  interleaved: bool = True

  @classmethod
  def on(cls, platform: str, repeats: int) -> 'Timing':
    """Returns what suits a CPU, or a GPU: 120 MB are two H200 L2 caches."""
    if platform == 'cpu':
      return cls(repeats=repeats)
    return cls(
      repeats=repeats, least_ms=10, most_seconds=3, least_bytes=120_000_000, interleaved=False
    )


def milliseconds(
  function: Callable[..., Any], argument_sets: Sequence[tuple[Any, ...]], calls: int
) -> float:
  """Returns the milliseconds of a call of `function`, of `calls` on the sets in turn."""
  start = time.perf_counter()
  for i in range(calls):
    results = function(*argument_sets[i % len(argument_sets)])
  jax.block_until_ready(results)
  return 1e3 * (time.perf_counter() - start) / calls


def measure(passes: Mapping[Any, Timed], timing: Timing) -> dict[Any, list[float]]:
  """Returns the milliseconds of a call, for each repeat, of passes that have run before."""
  calls = {key: _calls(timed, timing) for key, timed in passes.items()}
  times = {key: [] for key in passes}
  spent = dict.fromkeys(passes, 0.0)
  for repeat in range(timing.repeats):
    for key, timed in passes.items():
      if repeat >= 3 and spent[key] > 1e3 * timing.most_seconds:
        continue
      times[key].append(timed.run(calls[key]))
      spent[key] += calls[key] * times[key][-1]
  return times


def _calls(timed: Timed, timing: Timing) -> int:
  calls = 1
  if timing.least_ms == 0:
    return calls
  # The first call alone holds the host's work for it: the second guess is the better one.
  for _ in range(2):
    calls = max(math.ceil(timing.least_ms / timed.run(calls)), 1)
  return calls
