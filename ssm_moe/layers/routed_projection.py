"""Linear maps of which each token uses those of its experts: the projections of Routing Mamba."""

import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.layers import dispatch
from ssm_moe.shapes import Array, Float


class RoutedProjection(nn.Module):
  """One matrix for each expert, applied to rows that a plan has dispatched.

  Attributes:
    num_experts: E.
    features: Output axes; they stay apart, so that each can be sharded.
    axes: Logical names of the input axis and the output axes.
    kernel_init: Of the stacked matrices.
    dtype: Of the product.
  """

  num_experts: int
  features: tuple[int, ...]
  axes: tuple[str, ...]
  kernel_init: nn.initializers.Initializer
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, rows: Float[Array, '*S M'], plan: dispatch.Plan) -> Float[Array, '...']:
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(self.kernel_init, ('expert', *self.axes)),
      (self.num_experts, rows.shape[-1], *self.features),
      jnp.float32,
    )
    return plan.matmul(rows.astype(self.dtype), kernel.astype(self.dtype))
