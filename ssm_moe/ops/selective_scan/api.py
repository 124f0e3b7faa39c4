"""The selective scan: checks of the arguments and the choice of an implementation."""

import functools
from typing import Literal

import jax.numpy as jnp

from ssm_moe.ops import implementation as implementation_lib
from ssm_moe.ops import sequence_parallel
from ssm_moe.ops.per_device import per_device
from ssm_moe.ops.selective_scan import (
  associative,
  chunked,
  hand_on,
  one_token,
  pallas_tpu,
  reference,
  triton_gpu,
)
from ssm_moe.shapes import Array, Float, Int

Implementation = Literal[
  'auto', 'reference', 'associative', 'chunked', 'triton_gpu', 'pallas_tpu', 'one_token'
]

# In the order of preference: the kernel for TPUs comes after all until a chip has timed it.
_FUNCTIONS = {
  'triton_gpu': triton_gpu.selective_scan,
  'chunked': chunked.selective_scan,
  'associative': associative.selective_scan,
  'reference': reference.selective_scan,
  'pallas_tpu': pallas_tpu.selective_scan,
  'one_token': one_token.selective_scan,
}


def selective_scan(
  x: Float[Array, 'B L D'],
  dt: Float[Array, 'B L D'],
  A: Float[Array, 'D N'],
  B: Float[Array, 'B L N'],
  C: Float[Array, 'B L N'],
  *,
  D: Float[Array, 'D'] | None = None,
  z: Float[Array, 'B L D'] | None = None,
  dt_bias: Float[Array, 'D'] | None = None,
  dt_softplus: bool = False,
  segment_ids: Int[Array, 'B L'] | None = None,
  h0: Float[Array, 'B D N'] | None = None,
  implementation: Implementation = 'auto',
) -> tuple[Float[Array, 'B L D'], Float[Array, 'B D N']]:
  """Runs the selective state-space recurrence over the length axis.

  h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,    y_t = C_t h_t + D x_t.
  Algorithm 2 of Mamba (https://arxiv.org/abs/2312.00752).

  Computed in float32, or in float64 when any input is float64; the inputs may be bfloat16.
  Differentiable (reverse mode) in every floating input, through both results.

  Args:
    x: Input after the causal convolution and its activation.
    dt: Step size in the time unit that `A` decays in; positive, or made so by `dt_bias` and
      `dt_softplus`.
    A: Diagonal of the state matrix, negative (decay); float32.
    B: What enters the state at each step.
    C: What is read from the state at each step.
    D: Skip from x to y, one factor a channel; none if None.
    z: Gate: y is multiplied by silu(z), after the skip; none if None.
    dt_bias: Added to dt before the softplus.
    dt_softplus: Whether dt is replaced by softplus(dt + dt_bias).
    segment_ids: Document of each token. Where it differs from the token before, the state is set
      to zero before the step. Position 0 always continues from `h0`: `h0` belongs to the segment of
      the first token, so a caller whose row starts a document gives zeros.
    h0: State before the first token; zeros if None.
    implementation: 'auto' selects by backend; a name never falls back to another. In a program for
      several devices, as the ambient mesh tells, each scans its own rows, channels and piece of
      time.

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
  arrays |= {'D': D, 'z': z, 'dt_bias': dt_bias, 'segment_ids': segment_ids, 'h0': h0}
  arrays = {name: None if v is None else jnp.asarray(v) for name, v in arrays.items()}
  _check_shapes(arrays)
  _check_dtypes(arrays)
  run = functools.partial(_run, dt_softplus=dt_softplus, implementation=implementation)
  recurrence = sequence_parallel.Recurrence(
    run,
    functools.partial(hand_on.forward, dt_softplus=dt_softplus),
    functools.partial(hand_on.backward, dt_softplus=dt_softplus),
    hand_on.decay,
  )
  in_pieces = functools.partial(sequence_parallel.run_piece, recurrence)
  return per_device(run, arrays, _AXES, (_AXES['x'], _AXES['h0']), in_pieces=in_pieces)


_AXES = {
  'x': ('batch', 'sequence', 'inner'),
  'dt': ('batch', 'sequence', 'inner'),
  'A': ('inner', None),
  'B': ('batch', 'sequence', None),
  'C': ('batch', 'sequence', None),
  'D': ('inner',),
  'z': ('batch', 'sequence', 'inner'),
  'dt_bias': ('inner',),
  'segment_ids': ('batch', 'sequence'),
  'h0': ('batch', 'inner', None),
}


def _run(
  *, x, dt, A, B, C, dt_softplus: bool, implementation: Implementation, **options
) -> tuple[Array, Array]:
  candidates = dict.fromkeys(_FUNCTIONS, implementation_lib.always)
  for kernel in (triton_gpu, pallas_tpu, one_token):
    candidates[kernel.__name__.rpartition('.')[2]] = functools.partial(
      kernel.supports, x, dt, A, B, C, *(options[name] for name in _OPTIONS)
    )
  name = implementation_lib.select('selective_scan', implementation, candidates)
  return _FUNCTIONS[name](x, dt, A, B, C, dt_softplus=dt_softplus, **options)


# In the order of `supports`.
_OPTIONS = ('D', 'z', 'dt_bias', 'segment_ids', 'h0')


def _check_shapes(arrays: dict[str, Array | None]) -> None:
  x, A = arrays['x'], arrays['A']
  if x.ndim != 3:
    raise ValueError(f'selective_scan: x has shape {x.shape}; it must be [B, L, D]')
  if A.ndim != 2:
    raise ValueError(f'selective_scan: A has shape {A.shape}; it must be [D, N]')
  batch, length, d_inner = x.shape
  d_state = A.shape[1]
  if length < 1:
    raise ValueError('selective_scan: x has length 0; it must have at least one token')
  expected = {
    'dt': ('[B, L, D]', (batch, length, d_inner)),
    'A': ('[D, N]', (d_inner, d_state)),
    'B': ('[B, L, N]', (batch, length, d_state)),
    'C': ('[B, L, N]', (batch, length, d_state)),
    'D': ('[D]', (d_inner,)),
    'z': ('[B, L, D]', (batch, length, d_inner)),
    'dt_bias': ('[D]', (d_inner,)),
    'segment_ids': ('[B, L]', (batch, length)),
    'h0': ('[B, D, N]', (batch, d_inner, d_state)),
  }
  for name, (axes, shape) in expected.items():
    array = arrays[name]
    if array is not None and array.shape != shape:
      raise ValueError(
        f'selective_scan: {name} has shape {array.shape}; it must be {axes} = {shape}, '
        f'as x is {x.shape} and A is {A.shape}'
      )


def _check_dtypes(arrays: dict[str, Array | None]) -> None:
  for name, array in arrays.items():
    kind, word = (
      (jnp.integer, 'integer') if name == 'segment_ids' else (jnp.floating, 'floating point')
    )
    if array is not None and not jnp.issubdtype(array.dtype, kind):
      raise TypeError(f'selective_scan: {name} is {array.dtype}; it must be {word}')
