"""The rule's own sizes come first, unless others are clearly faster."""

import pytest

from ssm_moe.analysis import benchmark_tune


@pytest.mark.parametrize(
  ('milliseconds', 'expected'),
  [
    ([1.05, 1.0, 1.02], [1.05, 1.0, 1.02]),
    ([1.07, 1.0, 1.02], [1.0, 1.02, 1.07]),
    ([1.0, 1.02, 1.01], [1.0, 1.01, 1.02]),
    ([], []),
  ],
)
def test_the_first_stays_first_unless_it_is_much_slower(milliseconds, expected):
  rows = [{'milliseconds': ms} for ms in milliseconds]
  assert [row['milliseconds'] for row in benchmark_tune.in_order(rows)] == expected
