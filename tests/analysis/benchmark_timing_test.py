"""A timing is long enough, and does not take for ever."""

import pytest

from ssm_moe.analysis import benchmark_timing
from ssm_moe.analysis.benchmark_timing import Timing


class Fake:
  """Takes so many milliseconds a call, and some more for every run."""

  def __init__(self, each, once=0.0):
    self.each, self.once, self.runs = each, once, []

  def run(self, calls):
    self.runs.append(calls)
    return self.each + self.once / calls


def test_a_cpu_waits_for_every_call():
  fake = Fake(3.0)
  assert benchmark_timing.measure({'a': fake}, Timing.on('cpu', 4)) == {'a': [3.0] * 4}
  assert fake.runs == [1] * 4


def test_calls_are_started_together_until_they_take_long_enough():
  fake = Fake(0.1, once=1.0)
  (times,) = benchmark_timing.measure({'a': fake}, Timing(repeats=5, least_ms=10)).values()
  # One call seems to take 1.1 ms, ten 0.2 ms: so 50.
  assert fake.runs == [1, 10, *[50] * 5]
  assert times == pytest.approx([0.12] * 5)


def test_what_is_slow_has_three_times_at_least():
  slow, fast = Fake(2000.0), Fake(1.0)
  times = benchmark_timing.measure(
    {'slow': slow, 'fast': fast}, Timing(repeats=9, most_seconds=3, least_ms=10)
  )
  assert {name: len(values) for name, values in times.items()} == {'slow': 3, 'fast': 9}


def test_all_argument_sets_are_used_in_turn():
  seen = []
  benchmark_timing.milliseconds(lambda x: seen.append(x), [(1,), (2,), (3,)], 7)
  assert seen == [1, 2, 3, 1, 2, 3, 1]
