"""GPU: the selective scan by two kernels, one each way, with every option fused.

The forward pass keeps the inputs, y before the gate, and the state before each 16 tokens; the
backward pass makes the states between them again. Nothing of size L x N x D is stored, and nothing
is added atomically: the gradients of B and C leave each program as a partial sum over its channels,
rounded to their dtype, and a third kernel adds these up.

Where rows and channels are few, their time is cut into pieces that run side by side; a fourth
kernel, before each of the two, finds what enters each piece.

What was tried, and what it brought, is in docs/performance.md.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssm_moe.ops import gpu_kernels
from ssm_moe.ops.selective_scan import pieces
from ssm_moe.ops.selective_scan.reference import segment_starts
from ssm_moe.shapes import Array, Float, Int

_LOG2_E = 1.4426950408889634
_MAX_STATES = 256
_LEAST_STATES = 8
_STATES_PER_KERNEL = 32
_UNROLLED = 4  # U of the backward kernel
# Schedulers of an H200: with fewer programs of one warp than these, time is cut into pieces.
_SCHEDULERS = 4 * 132
_LEAST_PIECE = 512  # tokens: less is not worth the pass that comes first
# In what a piece hands on, what is below 2**-40 of what it was counts as nothing (float32: 2**-24).
_LEAST_DECAY = 40


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """How a kernel splits its work.

  Attributes:
    tile: Tokens that are loaded, and made ready, at a time.
    states_per_thread: Of one channel: 8, or 4 so that more threads share the work.
    warps: Of a program.
    stages: Tiles in flight, and the one in use.
    max_registers: Of a thread, so that more programs fit on a multiprocessor; the compiler's choice
      if None.
    pieces: Of a row, about: each a program of its own.
  """

  tile: int = 16
  states_per_thread: int = 8
  warps: int = 1
  stages: int = 3
  max_registers: int | None = None
  pieces: int = 1


def default_block_sizes(
  rows: int, length: int, channels: int, states: int
) -> tuple[BlockSizes, BlockSizes, BlockSizes]:
  """Returns block sizes, forward, backward and of what pieces hand on, for B rows of D channels.

  Args:
    rows, length, channels: B, L and D.
    states: N, a power of two, 8 or more.
  """
  warps = rows * channels * states // (32 * BlockSizes.states_per_thread)
  carry = BlockSizes(tile=64, states_per_thread=2 if states <= 16 else 4, warps=4, stages=2)
  cuts = 1
  if warps < _SCHEDULERS:
    cuts = max(1, min(2 * _SCHEDULERS // max(warps, 1), length // _LEAST_PIECE))
  if warps * cuts < _SCHEDULERS and states <= 16:  # 4 threads at most share a channel
    return (BlockSizes(tile=32, states_per_thread=4, stages=2, pieces=cuts),) * 2 + (carry,)
  return BlockSizes(pieces=cuts), BlockSizes(stages=2, pieces=cuts), carry


def supports(*arrays: Array | None) -> str | None:
  """Returns why the kernels cannot run these arguments of `api.selective_scan`, or None."""
  if (reason := gpu_kernels.unavailable()) is not None:
    return reason
  for array in arrays:
    if array is not None and array.dtype == jnp.float64:
      return 'its kernels compute in float32, and an input is float64'
  if (d_state := arrays[2].shape[1]) > _MAX_STATES:
    return f'its kernels take d_state up to {_MAX_STATES}, not {d_state}'
  _, length, channels = arrays[0].shape
  if length * channels * 2 >= 2**31:
    return f'its kernels take rows of less than 2**30 numbers, not {length} x {channels}'
  return None


class _Inputs(NamedTuple):
  """The differentiable arguments, padded to what the kernels take."""

  x: Float[Array, 'B L D']
  dt: Float[Array, 'B L D']
  A: Float[Array, 'D N']
  B: Float[Array, 'B L N']
  C: Float[Array, 'B L N']
  D: Float[Array, 'D'] | None
  z: Float[Array, 'B L D'] | None
  dt_bias: Float[Array, 'D'] | None
  h0: Float[Array, 'B D N'] | None


class _Settings(NamedTuple):
  """What is known when a kernel is compiled."""

  forward: BlockSizes
  backward: BlockSizes
  carry: BlockSizes
  dt_softplus: bool


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
  block_sizes: tuple[BlockSizes, BlockSizes, BlockSizes] | None = None,
) -> tuple[Float[Array, 'B L D'], Float[Array, 'B D N']]:
  """Runs the recurrence by kernels; see `api.selective_scan`.

  Differentiable once, in reverse mode. With segment ids, an A above zero counts as zero.

  Args:
    block_sizes: Of the forward kernel, of the backward, and of the one that finds what pieces hand
      on; chosen by shape if None.
  """
  d_inner, d_state = A.shape
  if d_state > _STATES_PER_KERNEL:
    return _by_states(x, dt, A, B, C, D, z, dt_bias, dt_softplus, segment_ids, h0)
  states = max(_LEAST_STATES, 1 << (d_state - 1).bit_length())
  if block_sizes is None:
    block_sizes = default_block_sizes(*x.shape, states)
  settings = _Settings(*block_sizes, dt_softplus)
  if settings.forward.tile % settings.backward.tile:
    raise ValueError(
      f'selective_scan: tiles of {settings.forward.tile} tokens forward are no whole number of '
      f'those of {settings.backward.tile} backward, before each of which a state is kept'
    )
  starts = None if segment_ids is None else segment_starts(segment_ids).astype(jnp.int32)
  # A thread copies 16 bytes at a time, so rows begin at multiples of that.
  more_channels = -d_inner % 8
  more_states = states - d_state

  def pad(v, *widths, dtype=None):
    if v is None:
      return None
    v = v if dtype is None else v.astype(dtype)
    return jnp.pad(v, [(0, width) for width in widths]) if any(widths) else v

  inputs = _Inputs(
    x=pad(x, 0, 0, more_channels),
    dt=pad(dt, 0, 0, more_channels),
    A=pad(A, more_channels, more_states, dtype=jnp.float32),
    B=pad(B, 0, 0, more_states),
    C=pad(C, 0, 0, more_states),
    D=pad(D, more_channels, dtype=jnp.float32),
    z=pad(z, 0, 0, more_channels),
    dt_bias=pad(dt_bias, more_channels, dtype=jnp.float32),
    h0=pad(h0, 0, more_channels, more_states, dtype=jnp.float32),
  )
  y, h = _scan(settings, inputs, starts)
  return y[:, :, :d_inner], h[:, :d_inner, :d_state]


def _by_states(x, dt, A, B, C, D, z, dt_bias, dt_softplus, segment_ids, h0):
  """Runs 32 states at a time: they meet only where y adds them up."""
  y, hs = 0, []
  for first in range(0, A.shape[1], _STATES_PER_KERNEL):
    some = slice(first, first + _STATES_PER_KERNEL)
    y_some, h = selective_scan(
      x.astype(jnp.float32),
      dt,
      A[:, some],
      B[:, :, some],
      C[:, :, some],
      dt_bias=dt_bias,
      dt_softplus=dt_softplus,
      segment_ids=segment_ids,
      h0=None if h0 is None else h0[:, :, some],
    )
    y += y_some
    hs.append(h)
  if D is not None:
    y += D.astype(jnp.float32)[None, None, :] * x.astype(jnp.float32)
  if z is not None:
    y *= jax.nn.silu(z.astype(jnp.float32))
  return y.astype(x.dtype), jnp.concatenate(hs, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(settings: _Settings, inputs: _Inputs, starts: Int[Array, 'B L'] | None):
  y, h, _, _ = _run_forward(settings, inputs, starts, save=False)
  return y, h


def _forward(settings, inputs, starts):
  y, h, *saved = _run_forward(settings, inputs, starts, save=True)
  return (y, h), (inputs, starts, *saved)


def _run_forward(settings, inputs, starts, *, save):
  from ssm_moe.ops.selective_scan import triton_forward

  batch, length, channels = inputs.x.shape
  states = inputs.A.shape[1]
  between = settings.backward.tile
  shapes = {
    'y_ptr': inputs.x,
    'h_ptr': _float32(batch, channels, states),
    'saved_ptr': _float32(batch, -(-length // between), channels, states) if save else None,
    'ungated_ptr': inputs.x if save and inputs.z is not None else None,
  }
  arrays = _kernel_inputs(inputs, starts) | {'h0_ptr': inputs.h0}
  if _piece(length, settings.forward, settings) < length:
    carries, decays = _carry(settings, arrays, inputs.x, inputs.B)
    arrays['h0_ptr'] = pieces.join(inputs.h0, carries, decays)
  return _call(
    triton_forward.forward, settings.forward, settings, inputs, arrays, shapes, SAVE=between
  ).values()


def _backward(settings, residuals, cotangents):
  from ssm_moe.ops.selective_scan import triton_backward

  inputs, starts, saved, ungated = residuals
  dy, dh = cotangents
  sizes = settings.backward
  batch, length, channels = inputs.x.shape
  states = inputs.A.shape[1]
  programs = batch * -(-length // _piece(length, sizes, settings))
  tokens = -(-length // sizes.tile) * sizes.tile
  shapes = {
    'dx_ptr': inputs.x,
    'ddt_ptr': inputs.dt,
    'dz_ptr': inputs.z,
    'dA_ptr': _float32(programs, channels, states),
    'dBC_ptr': jax.ShapeDtypeStruct(
      (
        batch,
        -(-channels // _program_channels(states, sizes)) * sizes.warps,
        tokens // _UNROLLED,
        2,
        states,
        _UNROLLED,
      ),
      inputs.B.dtype,
    ),
    'dD_ptr': None if inputs.D is None else _float32(programs, channels),
    'dbias_ptr': None if inputs.dt_bias is None else _float32(programs, channels),
    'dh0_ptr': inputs.h0,
  }
  arrays = _kernel_inputs(inputs, starts) | {
    'saved_ptr': saved,
    'ungated_ptr': ungated,
    'dy_ptr': dy,
    'dh_ptr': dh,
  }
  if programs > batch:
    carries, decays = _carry(settings, arrays, dy, inputs.C, back=True)
    arrays['dh_ptr'] = pieces.join(dh, carries, decays, from_right=True)
  results = _call(triton_backward.backward, sizes, settings, inputs, arrays, shapes)
  dB, dC = _add_parts(results['dBC_ptr'], inputs.B, inputs.C)

  def over_rows(v):
    return None if v is None else jnp.sum(v, axis=0)

  gradients = _Inputs(
    x=results['dx_ptr'],
    dt=results['ddt_ptr'],
    A=over_rows(results['dA_ptr']),
    B=dB,
    C=dC,
    D=over_rows(results['dD_ptr']),
    z=results['dz_ptr'],
    dt_bias=over_rows(results['dbias_ptr']),
    h0=results['dh0_ptr'],
  )
  return gradients, None


_scan.defvjp(_forward, _backward)


def _piece(length: int, sizes: BlockSizes, settings: _Settings) -> int:
  """Returns how many tokens a program of a kernel has."""
  multiple = math.lcm(sizes.tile, settings.carry.tile)
  return pieces.tokens_of_piece(length, sizes.pieces, multiple) if sizes.pieces > 1 else length


def _carry(
  settings: _Settings,
  arrays: dict[str, Array | None],
  values: Float[Array, 'B L D'],
  vectors: Float[Array, 'B L N'],
  *,
  back: bool = False,
) -> list[Float[Array, 'B Q D N']]:
  """Returns what pieces add to the state that leaves them, or its cotangent, and their decays."""
  from ssm_moe.ops.selective_scan import triton_carry

  batch, length, channels = values.shape
  states = vectors.shape[2]
  sizes = settings.carry
  piece = _piece(length, settings.backward if back else settings.forward, settings)
  passed = -(-length // piece) - 1
  return gpu_kernels.call(
    **{name: arrays[name] for name in ('dt_ptr', 'A_ptr', 'bias_ptr', 'starts_ptr')},
    values_ptr=values,
    z_ptr=arrays['z_ptr'] if back else None,
    vectors_ptr=vectors,
    kernel=triton_carry.carry,
    out_type=[_float32(batch, passed, channels, states)] * 2,
    grid=(-(-channels // _program_channels(states, sizes)), batch * passed, 1),
    name='selective_scan_carry',
    options={'num_warps': sizes.warps, 'maxnreg': sizes.max_registers},
    **_constants(values, vectors, sizes, settings),
    PIECE=piece,
    BACK=back,
    LEAST=_LEAST_DECAY,
  )


def _add_parts(
  parts: Float[Array, 'B P K 2 N U'], B: Float[Array, 'B L N'], C: Float[Array, 'B L N']
) -> list[Float[Array, 'B L N']]:
  """Returns the gradients of B and C from partial sums. XLA takes four times as long for it."""
  from ssm_moe.ops.selective_scan import triton_backward

  size = math.prod(parts.shape[2:])
  slab = 512
  return gpu_kernels.call(
    parts,
    kernel=triton_backward.add_parts,
    out_type=[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (B, C)],
    grid=(-(-size // slab), B.shape[0], 1),
    name='selective_scan_add_parts',
    options={'num_warps': slab // 128},
    PARTS=parts.shape[1],
    SIZE=size,
    L=B.shape[1],
    N=B.shape[2],
    U=_UNROLLED,
    SLAB=slab,
    AT_ONCE=8,
  )


def _kernel_inputs(inputs: _Inputs, starts: Int[Array, 'B L'] | None) -> dict[str, Array | None]:
  A = inputs.A * _LOG2_E
  if starts is not None:
    A = jnp.minimum(A, -1e-35)  # so that a step can forget: `triton_forward.FORGET`
  return {
    'x_ptr': inputs.x,
    'dt_ptr': inputs.dt,
    'z_ptr': inputs.z,
    'A_ptr': A,
    'B_ptr': inputs.B,
    'C_ptr': inputs.C,
    'D_ptr': inputs.D,
    'bias_ptr': inputs.dt_bias,
    'starts_ptr': starts,
  }


def _call(kernel, sizes: BlockSizes, settings, inputs, arrays, shapes, **constants):
  """Starts a kernel. Returns its outputs by name; where a shape is None there is none."""
  batch, length, channels = inputs.x.shape
  piece = _piece(length, sizes, settings)
  present = {name: shape for name, shape in shapes.items() if shape is not None}
  absent = dict.fromkeys(shapes.keys() - present.keys())
  outputs = gpu_kernels.call(
    **arrays,
    **absent,
    kernel=kernel,
    out_type=[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in present.values()],
    grid=(
      -(-channels // _program_channels(inputs.A.shape[1], sizes)),
      batch * -(-length // piece),
      1,
    ),
    name=f'selective_scan_{kernel.fn.__name__}',
    options={'num_warps': sizes.warps, 'maxnreg': sizes.max_registers},
    **_constants(inputs.x, inputs.B, sizes, settings),
    PIECE=piece,
    **constants,
  )
  return dict.fromkeys(shapes) | dict(zip(present, outputs))


def _constants(
  values: Float[Array, 'B L D'],
  vectors: Float[Array, 'B L N'],
  sizes: BlockSizes,
  settings: _Settings,
) -> dict[str, int | bool]:
  _, length, channels = values.shape
  states = vectors.shape[2]
  return {
    'L': length,
    'D': channels,
    'N': states,
    'T': sizes.tile,
    'BD': _program_channels(states, sizes),
    'NT': states // sizes.states_per_thread,
    'W': sizes.warps,
    'STAGES': sizes.stages,
    'SOFTPLUS': settings.dt_softplus,
  }


def _program_channels(states: int, sizes: BlockSizes) -> int:
  return 32 // (states // sizes.states_per_thread) * sizes.warps


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)
