"""The estimate, worked out by hand for a chip with round figures."""

import dataclasses

import pytest

from ssm_moe.analysis import chips, compiled, roofline

_CHIP = dataclasses.replace(
  chips.CHIPS['v5e'], peak_flops=100.0, hbm_bandwidth=10.0, ici_link_bandwidth=1.0
)


def _estimate(*work, collectives=(), tokens=8, model_flops=400):
  step = compiled.Step(
    work=tuple(compiled.Work(*entry) for entry in work),
    collectives=tuple(collectives),
    unknown_loops=0,
    kernels_without_flops=0,
  )
  return roofline.estimate(step, _CHIP, num_devices=4, tokens=tokens, model_flops=model_flops)


def test_each_instruction_takes_the_longer_of_products_and_memory():
  # 200 / 100 = 2 s against 0.1 s, and 0.5 s against 30 / 10 = 3 s, twice.
  estimate = _estimate((200, 200, 1, 1), (50, 50, 30, 2))
  assert estimate.device_seconds == 2 + 2 * 3
  assert estimate.compute_seconds == 3
  assert estimate.memory_seconds == pytest.approx(6.1)


def test_passes_take_time_and_do_not_count_as_use():
  estimate = _estimate((100, 600, 0, 1))
  assert estimate.seconds == 6
  assert estimate.mfu == 400 / (6 * 4 * 100)
  assert estimate.tokens_per_second == 8 / 6


def test_collectives_come_on_top():
  gather = compiled.Collective(
    kind='all-gather',
    name='g',
    source='',
    results=(),
    operand_bytes=2,
    group_size=4,
    times=5,
  )
  estimate = _estimate((100, 100, 0, 1), collectives=[gather])
  # 5 times 2 * 3 bytes over two links of 1 byte a second, and two hops each time.
  latency = 5 * 2 * roofline.HOP_SECONDS
  assert estimate.latency_seconds == latency
  assert estimate.seconds == pytest.approx(1 + 5 * 6 / 2 + latency)
