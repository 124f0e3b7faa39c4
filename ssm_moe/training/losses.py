"""Cross entropy of the next token, without float32 logits of the whole batch."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from ssm_moe import sharding
from ssm_moe.ops import implementation as implementation_lib
from ssm_moe.ops.softmax_cross_entropy import Implementation, softmax_cross_entropy
from ssm_moe.shapes import Array, Float, Int

# Columns that matrix products on a GPU are padded to: with an odd vocabulary, as GPT-NeoX's 50,277
# tokens, they take three times as long (H200: 41 ms for 32,768 tokens of 768).
_GPU_COLUMNS = 128


def cross_entropy_sum(
  hidden: Float[Array, 'B L M'],
  head: Float[Array, 'M V'],
  targets: Int[Array, 'B L'],
  weights: Float[Array, 'B L'],
  *,
  chunk: int,
  implementation: Implementation = 'auto',
) -> Float[Array, '']:
  """Returns the weighted sum over tokens of -log softmax(hidden head)[target], in nats.

  Logits exist for about `chunk` tokens at one time, in the forward pass as in the backward: when a
  gradient is asked for, it is made in the forward pass, chunk by chunk, so that nothing is computed
  twice and only the gradients themselves are kept. Over a mesh each device does so with its own
  tokens; a head that is held in parts is gathered once, and its gradient scattered once.

  Args:
    hidden: Model output; its dtype is the dtype of the matrix work. Logits are float32.
    head: Makes logits of it.
    targets: The token that comes next.
    weights: 0 where a token does not count; constants, no gradient flows to them.
    chunk: Tokens; cut along the length, so that every device has a part of each chunk.
    implementation: Of `ops.softmax_cross_entropy`.
  """
  vocab_size = head.shape[1]
  multiple = _GPU_COLUMNS if implementation_lib.platform() == 'gpu' else 1
  multiple = math.lcm(multiple, sharding.axis_size('tensor'))
  # What is filled up can be split, even if the parameter, of an odd vocabulary, is not.
  head = jnp.pad(head, ((0, 0), (0, -vocab_size % multiple)))
  head = sharding.constrain(head, 'embed', 'vocab')
  options = _Options(vocab_size, chunk, implementation)
  return _total(options, hidden, head, targets, weights.astype(jnp.float32))


class _Options(NamedTuple):
  """Of the vocabulary so many columns of the head are tokens; the rest as `cross_entropy_sum`."""

  vocab_size: int
  chunk: int
  implementation: Implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(options, hidden, head, targets, weights):
  return _over_mesh(_sum_over_chunks, options, hidden, head, targets, weights)[0]


def _forward(options, hidden, head, targets, weights):
  total, *gradients = _over_mesh(_with_gradients, options, hidden, head, targets, weights)
  return total, gradients


def _backward(options, gradients, d_total):
  del options
  d_hidden, d_head = (
    (d_total * gradient.astype(jnp.float32)).astype(gradient.dtype) for gradient in gradients
  )
  return d_hidden, d_head, None, None


_total.defvjp(_forward, _backward)


def _sum_over_chunks(
  options: _Options,
  hidden: Float[Array, 'B L M'],
  matrix: Float[Array, 'M V'],
  targets: Int[Array, 'B L'],
  weights: Float[Array, 'B L'],
) -> tuple[Float[Array, '']]:
  def one_chunk(total, chunk):
    x, *expected = chunk
    losses, _ = softmax_cross_entropy(
      _logits(x, matrix),
      *expected,
      vocab_size=options.vocab_size,
      implementation=options.implementation,
    )
    return total + jnp.sum(losses), None

  chunks = _in_chunks(options.chunk, hidden, targets, weights)
  return (jax.lax.scan(one_chunk, jnp.zeros((), jnp.float32), chunks)[0],)


def _with_gradients(
  options: _Options,
  hidden: Float[Array, 'B L M'],
  matrix: Float[Array, 'M V'],
  targets: Int[Array, 'B L'],
  weights: Float[Array, 'B L'],
) -> tuple[Float[Array, ''], Float[Array, 'B L M'], Float[Array, 'M V']]:
  def one_chunk(carry, chunk):
    total, d_matrix = carry
    x, *expected = chunk
    losses, d_logits = softmax_cross_entropy(
      _logits(x, matrix),
      *expected,
      vocab_size=options.vocab_size,
      gradient_dtype=x.dtype,
      implementation=options.implementation,
    )
    d_x = jnp.einsum('blv,mv->blm', d_logits, matrix)
    d_matrix += jnp.einsum('blm,blv->mv', x, d_logits, preferred_element_type=jnp.float32)
    return (total + jnp.sum(losses), d_matrix), d_x

  zeros = (jnp.zeros((), jnp.float32), jnp.zeros(matrix.shape, jnp.float32))
  chunks = _in_chunks(options.chunk, hidden, targets, weights)
  (total, d_matrix), d_chunks = jax.lax.scan(one_chunk, zeros, chunks)
  batch, length, d_model = hidden.shape
  d_hidden = d_chunks.swapaxes(0, 1).reshape(batch, -1, d_model)[:, :length]
  return total, d_hidden, d_matrix


def _in_chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
  """Cuts arrays [B, L, ...] along the length: [chunks, B, columns, ...], filled up with zeros."""
  batch, length = arrays[0].shape[:2]
  columns = min(max(chunk // batch, 1), length)
  padding = -length % columns

  def cut(x):
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, -1, columns, *x.shape[2:]).swapaxes(0, 1)

  return tuple(cut(x) for x in arrays)


def _logits(x: Float[Array, 'B L M'], matrix: Float[Array, 'M V']) -> Float[Array, 'B L V']:
  return jnp.einsum('blm,mv->blv', x, matrix, preferred_element_type=jnp.float32)


def _over_mesh(
  function: Callable[..., tuple[Array, ...]],
  options: _Options,
  hidden: Float[Array, 'B L M'],
  head: Float[Array, 'M V'],
  targets: Int[Array, 'B L'],
  weights: Float[Array, 'B L'],
) -> tuple[Any, ...]:
  """Returns what `function` makes of all tokens: a sum, and the gradients of hidden and head.

  Each device has its own tokens. Left to the compiler, each chunk would gather the head, and send
  its gradient. A vocabulary in parts is nevertheless left to it: no kernel has a part of a row.
  """
  mesh = _mesh_to_map(targets)
  if mesh is None:
    total, *gradients = function(options, hidden, head.astype(hidden.dtype), targets, weights)
    return total, *(_as(like, gradient) for like, gradient in zip((hidden, head), gradients))
  own_axes = {name for name in mesh.axis_names if name != 'tensor' or mesh.shape[name] == 1}
  token_axes = tuple(name for name in mesh.axis_names if name in own_axes and mesh.shape[name] > 1)
  split = sharding.mapped_layout(mesh, ('embed', 'vocab'), head.shape)[0]
  devices = sharding.batch_divisor(mesh) * mesh.shape['sequence']
  own_options = options._replace(chunk=max(options.chunk // devices, 1))

  def of_own_tokens(hidden, part, targets, weights):
    matrix = part.astype(hidden.dtype)
    if split:
      matrix = jax.lax.all_gather(matrix, split, axis=0, tiled=True)
    total, *gradients = function(own_options, hidden, matrix, targets, weights)
    total = jax.lax.psum(total, token_axes)
    if not gradients:
      return (total,)
    d_hidden, d_head = gradients
    if split:
      d_head = jax.lax.psum_scatter(d_head, split, scatter_dimension=0, tiled=True)
    d_head = jax.lax.psum(d_head, tuple(name for name in token_axes if name not in split))
    return total, _as(hidden, d_hidden), _as(part, d_head)

  tokens, parts = PartitionSpec(sharding.BATCH_AXES, 'sequence'), PartitionSpec(split)
  results = (PartitionSpec(), tokens, parts)
  of_all = jax.shard_map(
    of_own_tokens,
    mesh=mesh,
    in_specs=(tokens, parts, tokens, tokens),
    out_specs=results if function is _with_gradients else results[:1],
    axis_names=own_axes,
    # Loops inside begin with zeros, of which the check would want to be told that they vary.
    check_vma=False,
  )
  return of_all(hidden, head, targets, weights)


def _mesh_to_map(targets: Int[Array, 'B L']) -> AbstractMesh | None:
  """Returns the mesh that is traced for, if it splits tokens, and evenly; else None."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes or mesh.axis_names != sharding.MESH_AXES:
    return None
  rows, columns = sharding.batch_divisor(mesh), mesh.shape['sequence']
  batch, length = targets.shape
  return mesh if rows * columns > 1 and batch % rows == 0 and length % columns == 0 else None


def _as(like: Array, gradient: Array) -> Array:
  return gradient.astype(like.dtype)
