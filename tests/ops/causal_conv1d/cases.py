"""Named cases of the causal convolution, and what is right for them, in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ssm_moe.ops.causal_conv1d import api


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Sizes, dtype and options of one call.

  Attributes:
    dtype: Of x and the state; kernel and bias are parameters, in float32.
    segments: Whether rows are cut into documents, some of them shorter than the filter.
  """

  name: str
  batch: int = 2
  length: int = 13
  channels: int = 6
  width: int = 4
  dtype: str = 'float32'
  activation: str | None = 'silu'
  bias: bool = True
  state: bool = False
  segments: bool = False


_ALL = {'state': True, 'segments': True}

# A run of tokens is 32 or 64 long, a program has four.
CASES = (
  Case(name='plain'),
  Case(name='linear', activation=None, bias=False),
  *(Case(name=f'all_{length}', length=length, **_ALL) for length in (1, 2, 31, 64, 259)),
  *(Case(name=f'width_{width}', length=70, width=width, **_ALL) for width in (1, 2, 3, 5, 6, 7, 8)),
  Case(name='state', length=65, state=True),
  Case(name='segments', length=65, segments=True, activation=None),
  Case(name='channels_1', length=65, batch=1, channels=1, **_ALL),
  Case(name='channels_130', length=130, channels=130, **_ALL),
  Case(name='channels_130_bfloat16', length=130, channels=130, dtype='bfloat16', **_ALL),
  Case(name='odd_channels_bfloat16', length=130, channels=7, dtype='bfloat16', **_ALL),
)


def make_arguments(case, key):
  """Returns the arguments by name, None for what the case has not, and cotangents of the result."""
  keys = jax.random.split(key, 7)
  state = (case.batch, case.width - 1, case.channels)
  x = (case.batch, case.length, case.channels)
  starts = jax.random.bernoulli(keys[4], 0.2, x[:2])
  arguments = {
    'x': jax.random.normal(keys[0], x).astype(case.dtype),
    'kernel': jax.random.normal(keys[1], (case.width, case.channels)),
    'bias': jax.random.normal(keys[2], (case.channels,)) if case.bias else None,
    'state': jax.random.normal(keys[3], state).astype(case.dtype) if case.state else None,
    # An id may come back: documents end where it changes.
    'segment_ids': jnp.cumsum(starts, axis=1, dtype=jnp.int32) % 2 if case.segments else None,
  }
  cotangents = tuple(
    jax.random.normal(k, shape).astype(case.dtype) for k, shape in zip(keys[5:], (x, state))
  )
  return arguments, cotangents


def value_and_gradients(function, case, arguments, cotangents):
  """Returns y and the last state, and the gradients of all floating arguments by name."""
  floating = {k: v for k, v in arguments.items() if k != 'segment_ids' and v is not None}
  outputs, pullback = jax.vjp(
    lambda floating: function(
      **floating, activation=case.activation, segment_ids=arguments['segment_ids']
    ),
    floating,
  )
  return outputs, pullback(cotangents)[0]


@functools.cache
def expected_results(case):
  """Returns arguments, cotangents, and what the shifted form makes of them in float32."""
  arguments, cotangents = make_arguments(case, jax.random.key(1))
  wide, wide_cotangents = jax.tree.map(
    lambda v: v.astype(jnp.float32) if jnp.issubdtype(v.dtype, jnp.floating) else v,
    (arguments, cotangents),
  )
  function = functools.partial(api.causal_conv1d, implementation='shifted')
  run = jax.jit(functools.partial(value_and_gradients, function, case))
  return arguments, cotangents, run(wide, wide_cotangents)
