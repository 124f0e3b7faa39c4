"""The causal convolution: checks of the arguments and the choice of an implementation."""

import functools
from typing import Literal

import jax.numpy as jnp

from ssm_moe.ops import implementation as implementation_lib
from ssm_moe.ops import sequence_parallel
from ssm_moe.ops.causal_conv1d import shifted, triton_gpu
from ssm_moe.ops.per_device import per_device
from ssm_moe.shapes import Array, Float, Int

Implementation = Literal['auto', 'shifted', 'triton_gpu']

# In the order of preference.
_FUNCTIONS = {'triton_gpu': triton_gpu.causal_conv1d, 'shifted': shifted.causal_conv1d}


def causal_conv1d(
  x: Float[Array, 'B L D'],
  kernel: Float[Array, 'W D'],
  bias: Float[Array, 'D'] | None = None,
  *,
  activation: Literal['silu'] | None = None,
  segment_ids: Int[Array, 'B L'] | None = None,
  state: Float[Array, 'B W-1 D'] | None = None,
  channels: str | None = 'inner',
  implementation: Implementation = 'auto',
) -> tuple[Float[Array, 'B L D'], Float[Array, 'B W-1 D']]:
  """Convolves every channel with its own filter, looking back only, and applies an activation.

  y_t = activation(bias + sum_w kernel_w x_{t - (W - 1) + w})

  Args:
    x: Input.
    kernel: Filters; the last row meets the present token.
    bias: Added to every position.
    activation: Of the sum; none if None.
    segment_ids: Document of each position; a document ends where the id changes, and inputs before
      its start count as zero. The first position continues the document that `state` comes from.
    state: The W - 1 inputs before the first position; zeros if None.
    channels: Logical axis of the channels; None if every device is to have all of them.
    implementation: 'auto' selects by backend; a name never falls back to another. In a program for
      several devices, as the ambient mesh tells, each convolves its own rows, channels and piece of
      time.

  Returns:
    y in the dtype of `x`, and the state after the last position: its last W - 1 inputs, those of
    documents before the last one set to zero. Gradients flow through both.

  Raises:
    ValueError: a shape that does not fit the others, or no token, or no row in `kernel`; an
      activation or an implementation that does not exist.
    TypeError: a dtype that is not floating, or segment ids that are not integers.
    NotImplementedError: the named implementation cannot run these arguments; the message says
      which and why.
  """
  x, kernel = jnp.asarray(x), jnp.asarray(kernel)
  bias, segment_ids, state = (
    None if v is None else jnp.asarray(v) for v in (bias, segment_ids, state)
  )
  arrays = {'x': x, 'kernel': kernel, 'bias': bias, 'segment_ids': segment_ids, 'state': state}
  _check_shapes(arrays)
  _check_dtypes(arrays)
  if activation not in (None, 'silu'):
    raise ValueError(f"causal_conv1d: activation is {activation!r}; it must be 'silu' or None")
  if implementation == 'auto' and x.shape[1] == 1:
    # XLA joins the work on one token to what stands around it.
    implementation = 'shifted'
  run = functools.partial(_run, activation=activation, implementation=implementation)
  axes = {
    'x': ('batch', 'sequence', channels),
    'kernel': (None, channels),
    'bias': (channels,),
    'segment_ids': ('batch', 'sequence'),
    'state': ('batch', None, channels),
  }
  return per_device(
    run,
    arrays,
    axes,
    (axes['x'], axes['state']),
    in_pieces=functools.partial(_run_piece, run),
    least_piece=kernel.shape[0] - 1,
  )


def _run(*, x, kernel, bias, segment_ids, state, activation, implementation) -> tuple[Array, Array]:
  name = implementation_lib.select(
    'causal_conv1d',
    implementation,
    {
      'triton_gpu': functools.partial(triton_gpu.supports, x, kernel, bias, state),
      'shifted': implementation_lib.always,
    },
  )
  return _FUNCTIONS[name](
    x, kernel, bias, activation=activation, segment_ids=segment_ids, state=state
  )


def _run_piece(run, *, x, kernel, segment_ids, state, **options) -> tuple[Array, Array]:
  """Convolves a device's piece of time, after the last inputs of the piece before it."""
  if kernel.shape[0] == 1:  # looks back at nothing
    return run(x=x, kernel=kernel, segment_ids=segment_ids, state=state, **options)
  left = shifted.last_state(x, kernel.shape[0], segment_ids=segment_ids)
  halo = sequence_parallel.from_left(left)
  if segment_ids is not None:
    same = sequence_parallel.continues(segment_ids)
    halo = jnp.where(same[:, None, None], halo, 0)
  if state is not None:
    halo = jnp.where(sequence_parallel.is_first(), state.astype(x.dtype), halo)
  y, last = run(x=x, kernel=kernel, segment_ids=segment_ids, state=halo, **options)
  return y, sequence_parallel.of_last(last)


def _check_shapes(arrays: dict[str, Array | None]) -> None:
  x, kernel = arrays['x'], arrays['kernel']
  if x.ndim != 3:
    raise ValueError(f'causal_conv1d: x has shape {x.shape}; it must be [B, L, D]')
  if kernel.ndim != 2:
    raise ValueError(f'causal_conv1d: kernel has shape {kernel.shape}; it must be [W, D]')
  batch, length, channels = x.shape
  width = kernel.shape[0]
  if length < 1:
    raise ValueError('causal_conv1d: x has length 0; it must have at least one token')
  if width < 1:
    raise ValueError('causal_conv1d: kernel has width 0; it must have at least one row')
  expected = {
    'kernel': ('[W, D]', (width, channels)),
    'bias': ('[D]', (channels,)),
    'segment_ids': ('[B, L]', (batch, length)),
    'state': ('[B, W - 1, D]', (batch, width - 1, channels)),
  }
  for name, (axes, shape) in expected.items():
    array = arrays[name]
    if array is not None and array.shape != shape:
      raise ValueError(
        f'causal_conv1d: {name} has shape {array.shape}; it must be {axes} = {shape}, '
        f'as x is {x.shape} and kernel is {kernel.shape}'
      )


def _check_dtypes(arrays: dict[str, Array | None]) -> None:
  for name, array in arrays.items():
    kind, word = (
      (jnp.integer, 'integer') if name == 'segment_ids' else (jnp.floating, 'floating point')
    )
    if array is not None and not jnp.issubdtype(array.dtype, kind):
      raise TypeError(f'causal_conv1d: {name} is {array.dtype}; it must be {word}')
