"""Named cases of the selective scan, and random inputs for them: shared by tests and benchmarks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ssm_moe.shapes import Array, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Sizes, dtype and options of one call.

  Attributes:
    dtype: Of x, dt, B, C and z. A, D, dt_bias and h0 are parameters or state, in `wide_dtype`.
    segments: Number of documents that a row is cut into at random; None for no segment ids.
  """

  name: str
  batch: int = 2
  length: int
  d_inner: int = 6
  d_state: int = 4
  dtype: str = 'float32'
  D: bool = False
  z: bool = False
  dt_bias: bool = False
  dt_softplus: bool = False
  h0: bool = False
  segments: int | None = None

  @property
  def wide_dtype(self) -> str:
    return 'float64' if self.dtype == 'float64' else 'float32'

  @property
  def shape(self) -> str:
    return f'B {self.batch}, L {self.length}, D {self.d_inner}, N {self.d_state}'


_FUSED = {'D': True, 'z': True, 'dt_bias': True, 'dt_softplus': True}

# 128 is a whole number of chunks, 129 leaves a chunk of one step, 7 and 1 are less than a chunk.
CASES = (
  Case(name='plain_1', length=1),
  Case(name='plain_7', length=7),
  Case(name='plain_128', length=128),
  Case(name='plain_129', length=129),
  Case(name='all_1', length=1, **_FUSED, h0=True, segments=1),
  Case(name='all_7', length=7, **_FUSED, h0=True, segments=3),
  Case(name='all_128', length=128, **_FUSED, h0=True, segments=5),
  Case(name='all_129', length=129, **_FUSED, h0=True, segments=5),
  Case(name='skip_129', length=129, D=True),
  Case(name='gate_129', length=129, z=True),
  Case(name='softplus_129', length=129, dt_softplus=True),
  Case(name='bias_129', length=129, dt_bias=True),
  Case(name='state_129', length=129, h0=True),
  Case(name='segments_129', length=129, segments=9),
  Case(name='one_channel_129', length=129, batch=1, d_inner=1, d_state=1, h0=True),
  Case(name='plain_129_bfloat16', length=129, dtype='bfloat16'),
  Case(name='all_7_bfloat16', length=7, dtype='bfloat16', **_FUSED, h0=True, segments=2),
  Case(name='all_128_bfloat16', length=128, dtype='bfloat16', **_FUSED, h0=True, segments=5),
  Case(name='all_129_bfloat16', length=129, dtype='bfloat16', **_FUSED, h0=True, segments=5),
)

# The size that the figures in `chunked` are for.
BENCHMARK_CASE = Case(name='plain_4096', length=4096, d_inner=512, d_state=16)


def make_inputs(case: Case, key: Key[Array, '']) -> dict[str, Any]:
  """Returns random arguments of `api.selective_scan` by name, None for what the case has not.

  Decays lie between those of a fast and a slow channel of a trained layer: dt is log-normal around
  0.05 and A about -n for state n, so that states forget over a few to a hundred steps.
  """
  keys = iter(jax.random.split(key, 10))
  dtype = jnp.dtype(case.dtype)
  wide = jnp.dtype(case.wide_dtype)
  batch, length, d_inner, d_state = case.batch, case.length, case.d_inner, case.d_state

  def normal(shape, dtype=wide):
    return jax.random.normal(next(keys), shape, wide).astype(dtype)

  dt = 0.05 * jnp.exp(normal((batch, length, d_inner)))
  dt_bias = 0.5 * normal((d_inner,))
  if case.dt_bias:
    # Without the softplus dt + dt_bias itself is the step size, and stays positive.
    dt_bias = dt_bias if case.dt_softplus else 0.1 * jnp.abs(dt_bias)
  if case.dt_softplus:
    dt = jnp.log(jnp.expm1(dt))
  states = jnp.arange(1, d_state + 1, dtype=wide)
  arguments = {
    'x': normal((batch, length, d_inner), dtype),
    'dt': dt.astype(dtype),
    'A': -states[None, :] * jnp.exp(0.3 * normal((d_inner, d_state))),
    'B': normal((batch, length, d_state), dtype),
    'C': normal((batch, length, d_state), dtype),
    'D': normal((d_inner,)) if case.D else None,
    'z': normal((batch, length, d_inner), dtype) if case.z else None,
    'dt_bias': dt_bias if case.dt_bias else None,
    'dt_softplus': case.dt_softplus,
    'segment_ids': None,
    'h0': normal((batch, d_inner, d_state)) if case.h0 else None,
  }
  if case.segments is not None:
    arguments['segment_ids'] = _segment_ids(case, next(keys))
  return arguments


def make_cotangents(case: Case, key: Key[Array, '']) -> tuple[Array, Array]:
  """Returns random cotangents of (y, last state)."""
  dtype = jnp.dtype(case.dtype)
  wide = jnp.dtype(case.wide_dtype)
  key_y, key_h = jax.random.split(key)
  dy = jax.random.normal(key_y, (case.batch, case.length, case.d_inner), wide).astype(dtype)
  return dy, jax.random.normal(key_h, (case.batch, case.d_inner, case.d_state), wide)


def _segment_ids(case: Case, key: Key[Array, '']) -> Array:
  """Cuts each row at its own random places, next to each other at times; ids count from 0."""
  cuts = jax.random.randint(key, (case.batch, case.segments - 1), 1, max(case.length, 2))
  tokens = jnp.arange(case.length)
  return jnp.sum(tokens[None, :, None] >= cuts[:, None, :], axis=2)
