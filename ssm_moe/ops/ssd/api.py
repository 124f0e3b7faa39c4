"""Mamba-2's scan: checks of the arguments and the choice of an implementation."""

import functools
from typing import Literal

import jax.numpy as jnp

from ssm_moe.ops import implementation as implementation_lib
from ssm_moe.ops import sequence_parallel
from ssm_moe.ops.per_device import per_device
from ssm_moe.ops.ssd import chunked, hand_on, one_token, reference
from ssm_moe.shapes import Array, Float, Int

Implementation = Literal['auto', 'reference', 'chunked', 'one_token']

_FUNCTIONS = {'chunked': chunked.ssd, 'reference': reference.ssd, 'one_token': one_token.ssd}


def ssd(
  x: Float[Array, 'B L H P'],
  dt: Float[Array, 'B L H'],
  A: Float[Array, 'H'],
  B: Float[Array, 'B L G N'],
  C: Float[Array, 'B L G N'],
  *,
  D: Float[Array, 'H'] | None = None,
  dt_bias: Float[Array, 'H'] | None = None,
  dt_softplus: bool = False,
  segment_ids: Int[Array, 'B L'] | None = None,
  h0: Float[Array, 'B H P N'] | None = None,
  implementation: Implementation = 'auto',
) -> tuple[Float[Array, 'B L H P'], Float[Array, 'B H P N']]:
  """Runs the state-space recurrence with one decay a head over the length axis.

  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,    y_t = h_t C_t + D x_t.
  Head h reads B and C of group h // (H / G). Mamba-2 (https://arxiv.org/abs/2405.21060), sections 3
  and 7.

  Decays and states are float32, or float64 when any input is float64. When x, B and C are all
  bfloat16, 'chunked' multiplies bfloat16 matrices and sums in float32. Differentiable in every
  floating input, through both results.

  Args:
    x: Input after the causal convolution and its activation.
    dt: Step size in the time unit that `A` decays in; positive, or made so by `dt_bias` and
      `dt_softplus`.
    A: Negative (decay), one a head; float32.
    B: What enters the state at each step.
    C: What is read from the state at each step.
    D: Skip from x to y, one factor a head; none if None.
    dt_bias: Added to dt before the softplus.
    dt_softplus: Whether dt is replaced by softplus(dt + dt_bias).
    segment_ids: Document of each token. Where it differs from the token before, the state is set
      to zero before the step. Position 0 always continues from `h0`: `h0` belongs to the segment of
      the first token, so a caller whose row starts a document gives zeros.
    h0: State before the first token; zeros if None.
    implementation: 'auto' selects by backend; a name never falls back to another. In a program for
      several devices, as the ambient mesh tells, each runs its own rows, heads and piece of time.

  Returns:
    y in the dtype of `x`, and the last state in float32 (float64 when any input is). Gradients flow
    through both.

  Raises:
    ValueError: a shape that does not fit the others, or an implementation that does not exist.
    TypeError: a dtype that is not floating, or segment ids that are not integers.
    NotImplementedError: the named implementation cannot run these arguments; the message says
      which and why.
  """
  arrays = {'x': x, 'dt': dt, 'A': A, 'B': B, 'C': C}
  arrays |= {'D': D, 'dt_bias': dt_bias, 'segment_ids': segment_ids, 'h0': h0}
  arrays = {name: None if v is None else jnp.asarray(v) for name, v in arrays.items()}
  _check_shapes(arrays)
  _check_dtypes(arrays)
  run = functools.partial(_run, dt_softplus=dt_softplus, implementation=implementation)
  # One group is read by the heads of all devices; several go with their heads.
  of_groups = ('batch', 'sequence', None if arrays['B'].shape[2] == 1 else 'heads', None)
  axes = _AXES | {'B': of_groups, 'C': of_groups}
  recurrence = sequence_parallel.Recurrence(
    run,
    functools.partial(hand_on.forward, dt_softplus=dt_softplus),
    functools.partial(hand_on.backward, dt_softplus=dt_softplus),
    hand_on.decay,
  )
  in_pieces = functools.partial(sequence_parallel.run_piece, recurrence)
  return per_device(run, arrays, axes, (_AXES['x'], _AXES['h0']), in_pieces=in_pieces)


_AXES = {
  'x': ('batch', 'sequence', 'heads', None),
  'dt': ('batch', 'sequence', 'heads'),
  'A': ('heads',),
  'D': ('heads',),
  'dt_bias': ('heads',),
  'segment_ids': ('batch', 'sequence'),
  'h0': ('batch', 'heads', None, None),
}


def _run(
  *, x, dt, A, B, C, dt_softplus: bool, implementation: Implementation, **options
) -> tuple[Array, Array]:
  candidates = dict.fromkeys(_FUNCTIONS, implementation_lib.always)
  candidates['one_token'] = functools.partial(one_token.supports, x)
  name = implementation_lib.select('ssd', implementation, candidates)
  return _FUNCTIONS[name](x, dt, A, B, C, dt_softplus=dt_softplus, **options)


def _check_shapes(arrays: dict[str, Array | None]) -> None:
  x, B = arrays['x'], arrays['B']
  if x.ndim != 4:
    raise ValueError(f'ssd: x has shape {x.shape}; it must be [B, L, H, P]')
  if B.ndim != 4:
    raise ValueError(f'ssd: B has shape {B.shape}; it must be [B, L, G, N]')
  batch, length, num_heads, head_dim = x.shape
  num_groups, d_state = B.shape[2:]
  if length < 1:
    raise ValueError('ssd: x has length 0; it must have at least one token')
  if num_groups < 1 or num_heads % num_groups:
    raise ValueError(
      f'ssd: B has {num_groups} groups; their number must divide the {num_heads} heads of x'
    )
  expected = {
    'dt': ('[B, L, H]', (batch, length, num_heads)),
    'A': ('[H]', (num_heads,)),
    'B': ('[B, L, G, N]', (batch, length, num_groups, d_state)),
    'C': ('[B, L, G, N]', (batch, length, num_groups, d_state)),
    'D': ('[H]', (num_heads,)),
    'dt_bias': ('[H]', (num_heads,)),
    'segment_ids': ('[B, L]', (batch, length)),
    'h0': ('[B, H, P, N]', (batch, num_heads, head_dim, d_state)),
  }
  for name, (axes, shape) in expected.items():
    array = arrays[name]
    if array is not None and array.shape != shape:
      raise ValueError(
        f'ssd: {name} has shape {array.shape}; it must be {axes} = {shape}, '
        f'as x is {x.shape} and B is {B.shape}'
      )


def _check_dtypes(arrays: dict[str, Array | None]) -> None:
  for name, array in arrays.items():
    kind, word = (
      (jnp.integer, 'integer') if name == 'segment_ids' else (jnp.floating, 'floating point')
    )
    if array is not None and not jnp.issubdtype(array.dtype, kind):
      raise TypeError(f'ssd: {name} is {array.dtype}; it must be {word}')
