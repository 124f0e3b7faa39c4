"""NVIDIA Hopper: one kernel that reads the logits once, and writes their gradient.

A row of logits stays in shared memory from the sweep that finds its sum to the one that writes its
gradient. Nothing is added up by atomics, so results repeat bit by bit.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ssm_moe.ops import gpu_kernels
from ssm_moe.shapes import Array, Float, Int

_MULTIPROCESSORS = 132
# Of the 227 KB that a program can have, less what its sums over threads take.
_SHARED_BYTES = 224 * 1024
# What a thread copies at a time is 16 bytes.
_MULTIPLE = 4
_MAX_COLUMNS = _SHARED_BYTES // 4
_GRADIENT_DTYPES = ('bfloat16', 'float16', 'float32')


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """How the kernel splits its work.

  Attributes:
    warps: Of a program, which has one row at a time.
    vectors: Four columns for each thread are a vector: so many are waited for, and have their
      largest found, at a time.
    programs: On each multiprocessor.
  """

  warps: int = 16
  vectors: int = 4
  programs: int = 1


def default_block_sizes(columns: int) -> BlockSizes:
  """Returns block sizes for rows of so many columns."""
  if columns <= 8192:
    return BlockSizes(warps=4, programs=4)
  return BlockSizes(programs=2 if columns <= _MAX_COLUMNS // 2 else 1)


def supports(logits: Array, gradient_dtype: jnp.dtype | None) -> str | None:
  """Returns why the kernel cannot run these arguments of `api.softmax_cross_entropy`, or None."""
  if (reason := gpu_kernels.unavailable(exactly=gpu_kernels.HOPPER)) is not None:
    return reason
  if gradient_dtype is not None and gradient_dtype.name not in _GRADIENT_DTYPES:
    return f'its kernel gives gradients of at most 32 bits, not {gradient_dtype}'
  if 0 in logits.shape:
    return 'its kernel takes no empty arrays'
  if (columns := logits.shape[-1]) % _MULTIPLE:
    return f'its kernel takes rows of a multiple of {_MULTIPLE} columns, not {columns}'
  if columns > _MAX_COLUMNS:
    return f'its kernel takes rows of up to {_MAX_COLUMNS} columns, not {columns}'
  return None


def softmax_cross_entropy(
  logits: Float[Array, '*T V'],
  targets: Int[Array, '*T'],
  weights: Float[Array, '*T'],
  *,
  vocab_size: int,
  gradient_dtype: jnp.dtype | None = None,
  block_sizes: BlockSizes | None = None,
) -> tuple[Float[Array, '*T'], Float[Array, '*T V'] | None]:
  """Runs `api.softmax_cross_entropy`. A target outside of the vocabulary makes a loss NaN.

  Args:
    block_sizes: Chosen by the number of columns if None.
  """
  from ssm_moe.ops.softmax_cross_entropy import triton_rows

  columns = logits.shape[-1]
  tokens = math.prod(targets.shape)
  sizes = default_block_sizes(columns) if block_sizes is None else block_sizes
  out_type = [jax.ShapeDtypeStruct((tokens,), jnp.float32)]
  absent = {}
  if gradient_dtype is None:
    absent = {'d_logits_ptr': None}
  else:
    out_type.append(jax.ShapeDtypeStruct((tokens, columns), gradient_dtype))
  programs = min(tokens, _MULTIPROCESSORS * sizes.programs)
  losses, *gradient = gpu_kernels.call(
    logits_ptr=logits.reshape(tokens, columns),
    targets_ptr=targets.reshape(tokens).astype(jnp.int32),
    weights_ptr=weights.reshape(tokens),
    **absent,
    kernel=triton_rows.cross_entropy_of_rows,
    out_type=out_type,
    grid=(programs,),
    name='softmax_cross_entropy' + ('' if gradient_dtype is None else '_and_gradient'),
    options={'num_warps': sizes.warps},
    T=tokens,
    V=columns,
    VOCAB=vocab_size,
    W=sizes.warps,
    VECTORS=sizes.vectors,
    PROGRAMS=programs,
  )
  return losses.reshape(targets.shape), gradient[0].reshape(logits.shape) if gradient else None
