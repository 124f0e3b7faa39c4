"""Cross entropy of the next token, without float32 logits of the whole batch."""

import functools

import jax
import jax.numpy as jnp

from ssm_moe.ops import implementation
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
  """
  batch, length = targets.shape
  columns = min(max(chunk // batch, 1), length)
  padding = -length % columns
  num_chunks = (length + padding) // columns

  def in_chunks(x):
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, num_chunks, columns, *x.shape[2:]).swapaxes(0, 1)

  vocab_size = head.shape[1]
  if implementation.platform() == 'gpu':
    head = jnp.pad(head, ((0, 0), (0, -vocab_size % _GPU_COLUMNS)))
  return _sum_over_chunks(
    vocab_size,
    in_chunks(hidden),
    head,
    in_chunks(targets),
    in_chunks(weights.astype(jnp.float32)),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_chunks(vocab_size, hidden, head, targets, weights):
  matrix = head.astype(hidden.dtype)

  def one_chunk(total, chunk):
    logits, log_normalizer = _logits(chunk[0], matrix, vocab_size)
    return total + _weighted_sum(logits, log_normalizer, *chunk[1:]), None

  zero = jnp.zeros((), jnp.float32)
  return jax.lax.scan(one_chunk, zero, (hidden, targets, weights))[0]


def _forward(vocab_size, hidden, head, targets, weights):
  matrix = head.astype(hidden.dtype)

  def one_chunk(carry, chunk):
    total, d_head = carry
    x, targets, weights = chunk
    logits, log_normalizer = _logits(x, matrix, vocab_size)
    total += _weighted_sum(logits, log_normalizer, targets, weights)
    probs = jnp.exp(logits - log_normalizer[..., None])
    d_logits = (probs - jax.nn.one_hot(targets, probs.shape[-1])) * weights[..., None]
    d_logits = d_logits.astype(x.dtype)
    d_x = jnp.einsum('blv,mv->blm', d_logits, matrix)
    d_head += jnp.einsum('blm,blv->mv', x, d_logits, preferred_element_type=jnp.float32)
    return (total, d_head), d_x

  zeros = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
  (total, d_head), d_hidden = jax.lax.scan(one_chunk, zeros, (hidden, targets, weights))
  return total, (d_hidden, d_head.astype(head.dtype))


def _backward(vocab_size, residuals, d_total):
  del vocab_size
  d_hidden, d_head = residuals
  scaled = functools.partial(jnp.multiply, d_total)
  d_hidden = scaled(d_hidden.astype(jnp.float32)).astype(d_hidden.dtype)
  return d_hidden, scaled(d_head.astype(jnp.float32)).astype(d_head.dtype), None, None


_sum_over_chunks.defvjp(_forward, _backward)


def _logits(x: Array, matrix: Array, vocab_size: int) -> tuple[Array, Array]:
  logits = jnp.einsum('blm,mv->blv', x, matrix, preferred_element_type=jnp.float32)
  if matrix.shape[1] > vocab_size:
    is_token = jnp.arange(matrix.shape[1]) < vocab_size
    logits = jnp.where(is_token[None, None, :], logits, -jnp.inf)
  return logits, jax.nn.logsumexp(logits, axis=-1)


def _weighted_sum(logits: Array, log_normalizer: Array, targets: Array, weights: Array) -> Array:
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.sum((log_normalizer - chosen) * weights)
