"""GPU: the causal convolution and its activation by two kernels, one each way.

Computed in float32 with unrounded filters. Nothing but the inputs is kept for the backward pass,
which makes y before the activation again. Nothing is added atomically: the gradients of filters and
bias leave each program as a sum over its tokens, and these are added up afterwards.

Figures are in docs/performance.md.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssm_moe.ops import gpu_kernels
from ssm_moe.ops.causal_conv1d import shifted
from ssm_moe.shapes import Array, Float, Int

_MAX_WIDTH = 8
_MAX_BATCH = 65535  # programs along the last axis of a grid


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """How a kernel splits its work.

  Attributes:
    channels: Of a thread.
    tokens: That a warp loads at a time; in the backward pass W - 1 or more.
    run: Tokens of a warp, a multiple of `tokens`; in the backward pass W - 1 or more.
    warps: Of a program.
  """

  channels: int = 4
  tokens: int = 8
  run: int = 32
  warps: int = 4


def default_block_sizes(width: int, dtype: jnp.dtype) -> tuple[BlockSizes, BlockSizes]:
  """Returns block sizes, forward and backward, for W taps: those that no register is short for."""
  channels = 8 // dtype.itemsize
  tokens = max(4, width - 1)
  return BlockSizes(channels=channels), BlockSizes(
    channels=channels if width <= 4 else channels // 2, tokens=tokens, run=64 // tokens * tokens
  )


def supports(
  x: Float[Array, 'B L D'], kernel: Float[Array, 'W D'], *others: Array | None
) -> str | None:
  """Returns why the kernels cannot run these arguments of `api.causal_conv1d`, or None."""
  if (reason := gpu_kernels.unavailable()) is not None:
    return reason
  for array in (x, kernel, *others):
    if array is not None and array.dtype == jnp.float64:
      return 'its kernels compute in float32, and an input is float64'
  if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    return f'its kernels take float32, bfloat16 or float16, not {x.dtype}'
  if (width := kernel.shape[0]) > _MAX_WIDTH:
    return f'its kernels take a width up to {_MAX_WIDTH}, not {width}'
  batch, length, channels = x.shape
  if not x.size:
    return 'its kernels take no empty arrays'
  if batch > _MAX_BATCH:
    return f'its kernels take at most {_MAX_BATCH} rows, not {batch}'
  if length * channels * 2 >= 2**31:
    return f'its kernels take rows of less than 2**30 numbers, not {length} x {channels}'
  return None


class _Inputs(NamedTuple):
  """The differentiable arguments."""

  x: Float[Array, 'B L D']
  kernel: Float[Array, 'W D']
  bias: Float[Array, 'D'] | None
  state: Float[Array, 'B W-1 D'] | None


class _Settings(NamedTuple):
  """What is known when a kernel is compiled."""

  forward: BlockSizes
  backward: BlockSizes
  silu: bool


def causal_conv1d(
  x: Float[Array, 'B L D'],
  kernel: Float[Array, 'W D'],
  bias: Float[Array, 'D'] | None = None,
  *,
  activation: str | None = None,
  segment_ids: Int[Array, 'B L'] | None = None,
  state: Float[Array, 'B W-1 D'] | None = None,
  block_sizes: tuple[BlockSizes, BlockSizes] | None = None,
) -> tuple[Float[Array, 'B L D'], Float[Array, 'B W-1 D']]:
  """Convolves by kernels; see `api.causal_conv1d`. Differentiable once, in reverse mode.

  Args:
    block_sizes: Of the forward kernel and of the backward; chosen by W and dtype if None.
  """
  width = kernel.shape[0]
  last_state = shifted.last_state(x, width, segment_ids=segment_ids, state=state)
  inputs = _Inputs(
    x=x,
    kernel=kernel.astype(jnp.float32),
    bias=None if bias is None else bias.astype(jnp.float32),
    state=None if state is None or width == 1 else state.astype(x.dtype),
  )
  reach = None
  if segment_ids is not None and width > 1:
    same = shifted.same_document(segment_ids, width - 1)
    reach = sum(each.astype(jnp.int32) for each in same)
  block_sizes = block_sizes or default_block_sizes(width, x.dtype)
  settings = _Settings(*block_sizes, activation == 'silu')
  return _convolve(settings, inputs, reach), last_state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(
  settings: _Settings, inputs: _Inputs, reach: Int[Array, 'B L'] | None
) -> Float[Array, 'B L D']:
  from ssm_moe.ops.causal_conv1d import triton_conv

  (y,) = _call(triton_conv.conv_forward, settings.forward, settings, inputs, reach, (inputs.x,))
  return y


def _forward(settings, inputs, reach):
  return _convolve(settings, inputs, reach), (inputs, reach)


def _backward(settings, residuals, dy):
  from ssm_moe.ops.causal_conv1d import triton_conv

  inputs, reach = residuals
  batch, length, channels = inputs.x.shape
  programs = -(-length // (settings.backward.run * settings.backward.warps))
  parts = jax.ShapeDtypeStruct((batch, programs, inputs.kernel.shape[0] + 1, channels), jnp.float32)
  outputs, arrays = [inputs.x, parts], {'dy_ptr': dy}
  if inputs.state is None:
    arrays['dstate_ptr'] = None
  else:
    outputs.append(inputs.state)
  kernel, sizes = triton_conv.conv_backward, settings.backward
  dx, parts, *dstate = _call(kernel, sizes, settings, inputs, reach, outputs, **arrays)
  sums = jnp.sum(parts, axis=(0, 1))
  gradients = _Inputs(
    x=dx,
    kernel=sums[:-1],
    bias=None if inputs.bias is None else sums[-1],
    state=dstate[0] if dstate else None,
  )
  return gradients, None


_convolve.defvjp(_forward, _backward)


def _call(kernel, sizes: BlockSizes, settings, inputs, reach, outputs, **arrays):
  """Starts a kernel, whose last arguments are arrays like `outputs`. Returns these."""
  batch, length, channels = inputs.x.shape
  return gpu_kernels.call(
    x_ptr=inputs.x,
    kernel_ptr=inputs.kernel,
    bias_ptr=inputs.bias,
    reach_ptr=reach,
    state_ptr=inputs.state,
    **arrays,
    kernel=kernel,
    out_type=[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in outputs],
    grid=(-(-channels // (32 * sizes.channels)), -(-length // (sizes.run * sizes.warps)), batch),
    name=kernel.fn.__name__,
    options={'num_warps': sizes.warps},
    L=length,
    D=channels,
    W=inputs.kernel.shape[0],
    G=sizes.warps,
    R=sizes.run,
    U=sizes.tokens,
    V=sizes.channels,
    SILU=settings.silu,
  )
