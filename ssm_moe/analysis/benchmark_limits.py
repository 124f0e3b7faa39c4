"""What a machine could reach at best: two measured ceilings, and the least work of an op."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ssm_moe.analysis.benchmark_records import Record, make_record
from ssm_moe.analysis.benchmark_timing import Timing, measure, milliseconds

# Multiprocessors times clock in Hz. Published by NVIDIA for the SXM modules; a multiprocessor of
# Hopper gives 16 special-function results (exponentials) and 128 float32 multiply-adds a cycle.
_HOPPER_CYCLES = {'NVIDIA H100 80GB HBM3': 132 * 1.98e9, 'NVIDIA H200': 132 * 1.98e9}
_SPECIAL_A_CYCLE, _MULTIPLY_ADDS_A_CYCLE = 16, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
  """Of a device.

  Attributes:
    bytes_per_second: Read and written, by a copy of an array that fits no cache; measured.
    flops_per_second: Of a large bfloat16 matrix product of random numbers; measured.
    specials_per_second: Exponentials and their like; None if not known of this device.
    multiply_adds_per_second: In float32, outside the matrix units; None likewise.
  """

  bytes_per_second: float
  flops_per_second: float
  specials_per_second: float | None = None
  multiply_adds_per_second: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """The least that a pass takes.

  Attributes:
    num_bytes: Every input read once, every result written once.
    flops: Of matrix products.
    specials: Exponentials and their like.
    multiply_adds: In float32, outside matrix products.
  """

  num_bytes: int
  flops: int = 0
  specials: int = 0
  multiply_adds: int = 0

  def seconds(self, ceilings: Ceilings) -> float:
    """Returns how long the longest of them takes, the others beside it."""
    seconds = [self.num_bytes / ceilings.bytes_per_second, self.flops / ceilings.flops_per_second]
    if ceilings.specials_per_second is not None:
      seconds.append(self.specials / ceilings.specials_per_second)
    if ceilings.multiply_adds_per_second is not None:
      seconds.append(self.multiply_adds / ceilings.multiply_adds_per_second)
    return max(seconds)

  def __add__(self, other: 'Work') -> 'Work':
    names = [field.name for field in dataclasses.fields(self)]
    return Work(**{name: getattr(self, name) + getattr(other, name) for name in names})


def passes(forward: Work, backward: Work) -> dict[str, Work]:
  """Returns the work by pass."""
  return {'forward': forward, 'backward': backward, 'forward_backward': forward + backward}


class _Call:
  def __init__(self, function, *arguments):
    self._function = jax.jit(function).lower(*arguments).compile()
    self._arguments = arguments

  def run(self, calls: int) -> float:
    return milliseconds(self._function, [self._arguments], calls)


def measure_ceilings(
  timing: Timing, *, copied: int = 2**30, size: int = 8192
) -> tuple[Ceilings, Sequence[Record]]:
  """Measures a copy of `copied` bytes and a product of two square matrices.

  Args:
    timing: How.
    copied: Bytes; far more than the caches.
    size: Of the matrices.
  """
  keys = jax.random.split(jax.random.key(0), 3)
  array = jax.random.normal(keys[0], (copied // 4,))
  left, right = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys[1:])
  calls = {'copy': _Call(jnp.negative, array), 'matmul': _Call(jnp.matmul, left, right)}
  for call in calls.values():
    call.run(1)
  times = measure(calls, timing)
  shared = {'implementation': 'xla', 'pass_': 'forward', 'tokens': None}
  records = [
    make_record(
      times['copy'], name='copy', shape=f'{copied / 2**30:g} GiB', dtype='float32', **shared
    ),
    make_record(times['matmul'], name='matmul', shape=f'{size} cubed', dtype='bfloat16', **shared),
  ]
  copy_seconds, matmul_seconds = (record.median_ms / 1e3 for record in records)
  cycles = _HOPPER_CYCLES.get(jax.devices()[0].device_kind)
  ceilings = Ceilings(
    bytes_per_second=2 * copied / copy_seconds,
    flops_per_second=2 * size**3 / matmul_seconds,
    specials_per_second=cycles and _SPECIAL_A_CYCLE * cycles,
    multiply_adds_per_second=cycles and _MULTIPLY_ADDS_A_CYCLE * cycles,
  )
  return ceilings, records
