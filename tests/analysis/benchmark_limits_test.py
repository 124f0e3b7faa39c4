"""The limit is what takes longest, and the ceilings are measured on this machine."""

import pytest

from ssm_moe.analysis import benchmark_limits, benchmark_scans
from ssm_moe.analysis.benchmark_limits import Ceilings, Work
from ssm_moe.analysis.benchmark_timing import Timing

CEILINGS = Ceilings(
  bytes_per_second=1e3,
  flops_per_second=1e6,
  specials_per_second=1e4,
  multiply_adds_per_second=1e5,
)


@pytest.mark.parametrize(
  ('work', 'seconds'),
  [
    (Work(num_bytes=3000, flops=2_000_000, specials=1), 3),
    (Work(num_bytes=3000, flops=4_000_000), 4),
    (Work(num_bytes=3000, specials=50_000), 5),
    (Work(num_bytes=3000, multiply_adds=600_000), 6),
  ],
)
def test_what_takes_longest_counts(work, seconds):
  assert work.seconds(CEILINGS) == seconds


def test_what_a_device_is_not_known_to_do_does_not_count():
  ceilings = Ceilings(bytes_per_second=1e3, flops_per_second=1e6)
  assert Work(num_bytes=3000, specials=50_000, multiply_adds=600_000).seconds(ceilings) == 3


def test_backward_comes_on_top():
  forward, backward = Work(num_bytes=1, flops=2, specials=3), Work(num_bytes=10, multiply_adds=4)
  both = benchmark_limits.passes(forward, backward)['forward_backward']
  assert both == Work(num_bytes=11, flops=2, specials=3, multiply_adds=4)


def test_the_scan_is_bound_by_its_exponentials():
  """An H200 has 132 x 16 x 1.98e9 = 4.18e12 of them a second: 16 states take 3.8 ps."""
  op = benchmark_scans.selective_scans('gpu')[0]
  h200 = Ceilings(
    bytes_per_second=4.29e12,
    flops_per_second=700e12,
    specials_per_second=132 * 16 * 1.98e9,
    multiply_adds_per_second=132 * 128 * 1.98e9,
  )
  elements = 8 * 2048 * 2048
  assert op.work['forward'].seconds(h200) / elements == pytest.approx(3.83e-12, rel=0.01)
  # Four arrays of two bytes an element, and two of 16 states a token.
  assert op.work['forward'].num_bytes == 2 * (4 * elements + 2 * 8 * 2048 * 16)


def test_ceilings_are_measured():
  ceilings, records = benchmark_limits.measure_ceilings(Timing(repeats=2), copied=2**20, size=128)
  copy, product = records
  assert ceilings.bytes_per_second == pytest.approx(2 * 2**20 / (copy.median_ms / 1e3))
  assert ceilings.flops_per_second == pytest.approx(2 * 128**3 / (product.median_ms / 1e3))
  assert ceilings.specials_per_second is None
