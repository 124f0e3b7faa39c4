"""The cross entropy of logits: checks of the arguments and the choice of an implementation."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ssm_moe.ops import implementation as implementation_lib
from ssm_moe.ops.softmax_cross_entropy import reference, triton_gpu, xla
from ssm_moe.shapes import Array, Float, Int

Implementation = Literal['auto', 'reference', 'xla', 'triton_gpu']

# In the order of preference.
_FUNCTIONS = {
  'triton_gpu': triton_gpu.softmax_cross_entropy,
  'xla': xla.softmax_cross_entropy,
  'reference': reference.softmax_cross_entropy,
}


def softmax_cross_entropy(
  logits: Float[Array, '*T V'],
  targets: Int[Array, '*T'],
  weights: Float[Array, '*T'],
  *,
  vocab_size: int | None = None,
  gradient_dtype: DTypeLike | None = None,
  implementation: Implementation = 'auto',
) -> tuple[Float[Array, '*T'], Float[Array, '*T V'] | None]:
  """Returns weight * -log softmax(logits)[target] of each token, in nats, and its gradient.

  d loss / d logits_v = weight (softmax(logits)_v - [v = target]).

  The gradient is a result, for those who know the cotangent beforehand; the losses themselves are
  constants to automatic differentiation.

  Args:
    logits: float32. One of -inf is a token of probability zero.
    targets: Column of each token, from 0 to vocab_size - 1; what others give is not defined.
    weights: float32.
    vocab_size: Columns that are tokens; whatever the others hold has no part in the sums, and gets
      a gradient of zero. All if None.
    gradient_dtype: Of the gradient; None, and there is none.
    implementation: 'auto' selects by backend; a name never falls back to another.

  Returns:
    Losses in float32, and the gradient or None.

  Raises:
    ValueError: shapes that do not fit, or an implementation that does not exist.
    TypeError: logits or weights that are not float32, or targets that are not integers.
    NotImplementedError: the named implementation cannot run these arguments.
  """
  logits, targets, weights = (
    jax.lax.stop_gradient(jnp.asarray(v)) for v in (logits, targets, weights)
  )
  if logits.ndim == 0:
    raise ValueError('softmax_cross_entropy: logits has shape (); it must be [..., V]')
  vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
  _check(logits, targets, weights, vocab_size)
  if gradient_dtype is not None:
    gradient_dtype = jnp.dtype(gradient_dtype)
    if not jnp.issubdtype(gradient_dtype, jnp.floating):
      raise TypeError(
        f'softmax_cross_entropy: gradient_dtype is {gradient_dtype}; it must be floating point'
      )
  candidates = dict.fromkeys(_FUNCTIONS, implementation_lib.always)
  candidates['triton_gpu'] = functools.partial(triton_gpu.supports, logits, gradient_dtype)
  name = implementation_lib.select('softmax_cross_entropy', implementation, candidates)
  return _FUNCTIONS[name](
    logits, targets, weights, vocab_size=vocab_size, gradient_dtype=gradient_dtype
  )


def _check(logits: Array, targets: Array, weights: Array, vocab_size: int) -> None:
  for name, array in (('targets', targets), ('weights', weights)):
    if array.shape != logits.shape[:-1]:
      raise ValueError(
        f'softmax_cross_entropy: {name} has shape {array.shape}; it must be '
        f'{logits.shape[:-1]}, as logits is {logits.shape}'
      )
  if not 1 <= vocab_size <= logits.shape[-1]:
    raise ValueError(
      f'softmax_cross_entropy: vocab_size is {vocab_size}; it must be 1 to {logits.shape[-1]}, '
      'the columns of logits'
    )
  for name, array in (('logits', logits), ('weights', weights)):
    if array.dtype != jnp.float32:
      raise TypeError(f'softmax_cross_entropy: {name} is {array.dtype}; it must be float32')
  if not jnp.issubdtype(targets.dtype, jnp.integer):
    raise TypeError(f'softmax_cross_entropy: targets is {targets.dtype}; it must be integer')
