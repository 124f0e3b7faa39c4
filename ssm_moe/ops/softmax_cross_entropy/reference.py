"""The specification: log softmax, and its gradient by automatic differentiation."""

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

  def losses_of(logits):
    log_probs = jax.nn.log_softmax(logits[..., :vocab_size], axis=-1)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -chosen * weights

  losses, pullback = jax.vjp(losses_of, logits)
  if gradient_dtype is None:
    return losses, None
  return losses, pullback(jnp.ones_like(losses))[0].astype(gradient_dtype)
