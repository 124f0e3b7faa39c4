"""Linear maps of mixers: one matrix for all tokens, or one for each expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.layers import dispatch, initializers
from ssm_moe.layers.token_order import TokenOrder
from ssm_moe.shapes import Array, Float


class Decision(NamedTuple):
  """Which experts' matrices each token passes through.

  Attributes:
    plan: Moves tokens to their experts and back.
    weights: What the product of each chosen expert is multiplied with; None adds them up as they
      are.
    order: Of the tokens.
  """

  plan: dispatch.Plan
  weights: Float[Array, 'T K'] | None
  order: TokenOrder


class Projection(nn.Module):
  """A linear map; with experts, the sum over those that a token has chosen.

  Attributes:
    features: Output axes; they stay apart, so that each can be sharded.
    axes: Logical names of the input axis and the output axes.
    kernel_init: Of the matrix, or of each expert's.
    dtype: Of the product.
    num_experts: E; None has one matrix.
    bottleneck: Width of experts of two matrices with a ReLU between; None has one.
    bias: Whether something is added to the product: once, whatever the experts and weights.
  """

  features: tuple[int, ...]
  axes: tuple[str, ...]
  kernel_init: nn.initializers.Initializer
  dtype: jnp.dtype
  num_experts: int | None = None
  bottleneck: int | None = None
  bias: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B L M'], decision: Decision | None = None
  ) -> Float[Array, 'B L *F']:
    x = x.astype(self.dtype)
    d_in = x.shape[-1]
    if self.num_experts is None:
      kernel = self._kernel('kernel', self.kernel_init, self.axes, (d_in, *self.features))
      return self._plus_bias(jnp.einsum('blm,m...->bl...', x, kernel))

    if self.bottleneck is None:
      axes = [self.axes]
      matrices = [self._experts('kernel', self.kernel_init, (d_in, *self.features))]
    else:
      axes = [(self.axes[0], 'mlp'), ('mlp', *self.axes[1:])]
      down_init, up_init = self.kernel_init, initializers.linear(self.bottleneck)
      down = self._experts('down', down_init, (d_in, self.bottleneck), axes[0])
      up = self._experts('up', up_init, (self.bottleneck, *self.features), axes[1])
      matrices = [down, up]
    tokens = decision.order.flatten(x)
    y = decision.plan.apply(
      tokens,
      matrices,
      decision.weights,
      between=jax.nn.relu,
      axes=[('expert', *names) for names in axes],
    )
    return self._plus_bias(decision.order.unflatten(y))

  def _plus_bias(self, y):
    return y + self._bias().astype(y.dtype)[None, None] if self.bias else y

  def _bias(self):
    boxed = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
    return self.param('bias', boxed, self.features, jnp.float32)

  def _experts(self, name, init, shape, axes=None):
    return self._kernel(name, init, ('expert', *(axes or self.axes)), (self.num_experts, *shape))

  def _kernel(self, name, init, axes, shape):
    boxed = nn.with_logical_partitioning(init, axes)
    return self.param(name, boxed, shape, jnp.float32).astype(self.dtype)
