"""Cross entropy of the next token, without float32 logits of the whole batch."""

import functools

import jax
import jax.numpy as jnp

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
  twice and only the gradients themselves are kept.

  Args:
    hidden: Model output; its dtype is the dtype of the matrix work. Logits are float32.
    head: Makes logits of it.
    targets: The token that comes next.
    weights: 0 where a token does not count; constants, no gradient flows to them.
    chunk: Tokens; cut along the length, so that every device has a part of each chunk.
    implementation: Of `ops.softmax_cross_entropy`.
  """
  batch, length = targets.shape
  columns = min(max(chunk // batch, 1), length)
  padding = -length % columns
  num_chunks = (length + padding) // columns

  def in_chunks(x):
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, num_chunks, columns, *x.shape[2:]).swapaxes(0, 1)

  vocab_size = head.shape[1]
  if implementation_lib.platform() == 'gpu':
    head = jnp.pad(head, ((0, 0), (0, -vocab_size % _GPU_COLUMNS)))
  return _sum_over_chunks(
    vocab_size,
    implementation,
    in_chunks(hidden),
    head,
    in_chunks(targets),
    in_chunks(weights.astype(jnp.float32)),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_over_chunks(vocab_size, implementation, hidden, head, targets, weights):
  matrix = head.astype(hidden.dtype)

  def one_chunk(total, chunk):
    x, targets, weights = chunk
    losses, _ = softmax_cross_entropy(
      _logits(x, matrix),
      targets,
      weights,
      vocab_size=vocab_size,
      implementation=implementation,
    )
    return total + jnp.sum(losses), None

  zero = jnp.zeros((), jnp.float32)
  return jax.lax.scan(one_chunk, zero, (hidden, targets, weights))[0]


def _forward(vocab_size, implementation, hidden, head, targets, weights):
  matrix = head.astype(hidden.dtype)

  def one_chunk(carry, chunk):
    total, d_head = carry
    x, targets, weights = chunk
    losses, d_logits = softmax_cross_entropy(
      _logits(x, matrix),
      targets,
      weights,
      vocab_size=vocab_size,
      gradient_dtype=x.dtype,
      implementation=implementation,
    )
    d_x = jnp.einsum('blv,mv->blm', d_logits, matrix)
    d_head += jnp.einsum('blm,blv->mv', x, d_logits, preferred_element_type=jnp.float32)
    return (total + jnp.sum(losses), d_head), d_x

  zeros = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
  (total, d_head), d_hidden = jax.lax.scan(one_chunk, zeros, (hidden, targets, weights))
  return total, (d_hidden, d_head.astype(head.dtype))


def _backward(vocab_size, implementation, residuals, d_total):
  del vocab_size, implementation
  d_hidden, d_head = residuals
  scaled = functools.partial(jnp.multiply, d_total)
  d_hidden = scaled(d_hidden.astype(jnp.float32)).astype(d_hidden.dtype)
  return d_hidden, scaled(d_head.astype(jnp.float32)).astype(d_head.dtype), None, None


_sum_over_chunks.defvjp(_forward, _backward)


def _logits(x: Float[Array, 'B L M'], matrix: Float[Array, 'M V']) -> Float[Array, 'B L V']:
  return jnp.einsum('blm,mv->blv', x, matrix, preferred_element_type=jnp.float32)
