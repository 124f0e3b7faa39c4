"""Named cases of Mamba-2's scan, and random inputs for them: shared by tests and benchmarks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ssm_moe.shapes import Array, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Sizes, dtype and options of one call.

  Attributes:
    dtype: Of x, dt, B and C. A, D, dt_bias and h0 are parameters or state, in `wide_dtype`.
    segments: Number of documents that a row is cut into at random; None for no segment ids.
  """

  name: str
  batch: int = 2
  length: int
  num_heads: int = 4
  head_dim: int = 3
  num_groups: int = 2
  d_state: int = 5
  dtype: str = 'float32'
  D: bool = False
  dt_bias: bool = False
  dt_softplus: bool = False
  h0: bool = False
  segments: int | None = None

  @property
  def wide_dtype(self) -> str:
    return 'float64' if self.dtype == 'float64' else 'float32'

  @property
  def shape(self) -> str:
    return (
      f'B {self.batch}, L {self.length}, H {self.num_heads}, P {self.head_dim}, '
      f'G {self.num_groups}, N {self.d_state}'
    )


_FUSED = {'D': True, 'dt_bias': True, 'dt_softplus': True}

# 128 is one whole chunk, 129 leaves a chunk of one step, 7 and 1 are less than a chunk.
CASES = (
  Case(name='plain_1', length=1),
  Case(name='plain_128', length=128),
  Case(name='plain_129', length=129),
  Case(name='all_1', length=1, **_FUSED, h0=True, segments=1),
  Case(name='all_7', length=7, **_FUSED, h0=True, segments=3),
  Case(name='all_128', length=128, **_FUSED, h0=True, segments=5),
  Case(name='all_129', length=129, **_FUSED, h0=True, segments=5),
  Case(name='all_300', length=300, **_FUSED, h0=True, segments=4),
  Case(name='bias_129', length=129, dt_bias=True),
  Case(name='segments_129', length=129, segments=9),
  Case(name='one_group_129', length=129, num_groups=1, **_FUSED, h0=True),
  Case(name='group_a_head_129', length=129, num_groups=4, **_FUSED, h0=True),
  Case(
    name='one_of_each_129',
    length=129,
    batch=1,
    num_heads=1,
    head_dim=1,
    num_groups=1,
    d_state=1,
    h0=True,
  ),
  Case(name='all_1_bfloat16', length=1, dtype='bfloat16', **_FUSED, h0=True, segments=1),
  Case(name='all_128_bfloat16', length=128, dtype='bfloat16', **_FUSED, h0=True, segments=5),
  Case(name='all_129_bfloat16', length=129, dtype='bfloat16', **_FUSED, h0=True, segments=5),
)

# A size that the figures in `chunked` are for.
BENCHMARK_CASE = Case(
  name='plain_2048', length=2048, num_heads=16, head_dim=64, num_groups=1, d_state=128
)


def make_inputs(case: Case, key: Key[Array, '']) -> dict[str, Any]:
  """Returns random arguments of `api.ssd` by name, None for what the case has not.

  Decays lie between those of a fast and a slow head of a trained layer: dt is log-normal around
  0.05 and -A between 0.1 and 16, so that states forget over one to a few hundred steps.
  """
  keys = iter(jax.random.split(key, 10))
  dtype = jnp.dtype(case.dtype)
  wide = jnp.dtype(case.wide_dtype)
  batch, length, num_heads = case.batch, case.length, case.num_heads

  def normal(shape, dtype=wide):
    return jax.random.normal(next(keys), shape, wide).astype(dtype)

  dt = 0.05 * jnp.exp(normal((batch, length, num_heads)))
  dt_bias = 0.5 * normal((num_heads,))
  if case.dt_bias:
    # Without the softplus dt + dt_bias itself is the step size, and stays positive.
    dt_bias = dt_bias if case.dt_softplus else 0.1 * jnp.abs(dt_bias)
  if case.dt_softplus:
    dt = jnp.log(jnp.expm1(dt))
  arguments = {
    'x': normal((batch, length, num_heads, case.head_dim), dtype),
    'dt': dt.astype(dtype),
    'A': -(10 ** jax.random.uniform(next(keys), (num_heads,), wide, -1, 1.2)),
    'B': normal((batch, length, case.num_groups, case.d_state), dtype),
    'C': normal((batch, length, case.num_groups, case.d_state), dtype),
    'D': normal((num_heads,)) if case.D else None,
    'dt_bias': dt_bias if case.dt_bias else None,
    'dt_softplus': case.dt_softplus,
    'segment_ids': None,
    'h0': normal((batch, num_heads, case.head_dim, case.d_state)) if case.h0 else None,
  }
  if case.segments is not None:
    arguments['segment_ids'] = _segment_ids(case, next(keys))
  return arguments


def make_cotangents(case: Case, key: Key[Array, '']) -> tuple[Array, Array]:
  """Returns random cotangents of (y, last state)."""
  dtype = jnp.dtype(case.dtype)
  wide = jnp.dtype(case.wide_dtype)
  key_y, key_h = jax.random.split(key)
  heads = (case.num_heads, case.head_dim)
  dy = jax.random.normal(key_y, (case.batch, case.length, *heads), wide).astype(dtype)
  return dy, jax.random.normal(key_h, (case.batch, *heads, case.d_state), wide)


def _segment_ids(case: Case, key: Key[Array, '']) -> Array:
  """Cuts each row at its own random places, next to each other at times; ids count from 0."""
  cuts = jax.random.randint(key, (case.batch, case.segments - 1), 1, max(case.length, 2))
  tokens = jnp.arange(case.length)
  return jnp.sum(tokens[None, :, None] >= cuts[:, None, :], axis=2)
