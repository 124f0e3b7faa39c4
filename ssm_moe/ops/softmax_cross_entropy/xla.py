"""The portable form: what XLA makes of the formula, three passes over the logits."""

import jax
import jax.numpy as jnp

from ssm_moe.shapes import Array, Float, Int


def softmax_cross_entropy(
  logits: Float[Array, '*T V'],
  targets: Int[Array, '*T'],
  weights: Float[Array, '*T'],
  *,
  vocab_size: int,
  gradient_dtype: jnp.dtype | None = None,
) -> tuple[Float[Array, '*T'], Float[Array, '*T V'] | None]:
  """Runs `api.softmax_cross_entropy`."""
  columns = logits.shape[-1]
  if columns > vocab_size:
    is_token = jnp.arange(columns) < vocab_size
    is_token = jax.lax.broadcast_in_dim(is_token, logits.shape, (logits.ndim - 1,))
    logits = jnp.where(is_token, logits, -jnp.inf)
  log_normalizer = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  losses = (log_normalizer - chosen) * weights
  if gradient_dtype is None:
    return losses, None
  probs = jnp.exp(logits - log_normalizer[..., None])
  d_logits = (probs - jax.nn.one_hot(targets, columns)) * weights[..., None]
  return losses, d_logits.astype(gradient_dtype)
