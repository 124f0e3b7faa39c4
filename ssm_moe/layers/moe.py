"""The sparse feed-forward layer of MoE-Mamba."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import MoEConfig
from ssm_moe.layers import dispatch
from ssm_moe.layers.router import Router, RoutingAux, routing_aux
from ssm_moe.shapes import Array, Bool, Float


class MoE(nn.Module):
  """A Switch layer: each token passes through the feed-forward experts that the router chose.

  y = sum_k p_k E_k(x),    E_i(x) = ReLU(x W1_i) W2_i.
  MoE-Mamba, section 3.1 (https://arxiv.org/abs/2401.04081). A dropped token gets zero, and lives on
  in the residual stream.

  Attributes:
    moe: Its config.
    router_init, wi_init, wo_init: Initialise router, first and second matrices.
    dtype: Of the matrix work.
  """

  moe: MoEConfig
  router_init: nn.initializers.Initializer
  wi_init: nn.initializers.Initializer
  wo_init: nn.initializers.Initializer
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B L M'], *, mask: Bool[Array, 'B L'] | None = None
  ) -> tuple[Float[Array, 'B L M'], RoutingAux]:
    """Returns the layer's output and its routing; tokens outside `mask` take no capacity."""
    batch, length, d_model = x.shape
    config = self.moe
    tokens = x.reshape(batch * length, d_model)
    token_mask = None if mask is None else mask.reshape(-1)

    routing = Router(config.num_experts, config.top_k, self.router_init, name='router')(tokens)
    plan = self._plan(routing.expert_index, token_mask)

    d_ff = config.hidden_size(d_model)
    wi = self._experts('wi', self.wi_init, ('embed', 'mlp'), (d_model, d_ff))
    wo = self._experts('wo', self.wo_init, ('mlp', 'embed'), (d_ff, d_model))
    rows = plan.dispatch(tokens.astype(self.dtype))
    rows = plan.matmul(jax.nn.relu(plan.matmul(rows, wi)), wo)
    y = plan.combine(rows, routing.combine_weights)
    aux = routing_aux(routing, plan.dropped_fraction, token_mask)
    return y.reshape(batch, length, d_model), aux

  def _experts(self, name, init, axes, shape):
    init = nn.with_logical_partitioning(init, ('expert', *axes))
    stacked = self.param(name, init, (self.moe.num_experts, *shape), jnp.float32)
    return stacked.astype(self.dtype)

  def _plan(self, expert_index, mask) -> dispatch.Plan:
    config = self.moe
    match config.dispatch:
      case 'dense':
        return dispatch.dense_plan(expert_index, config.num_experts)
      case 'dropless':
        return dispatch.dropless_plan(expert_index, config.num_experts)
      case 'capacity':
        capacity = dispatch.expert_capacity(
          expert_index.shape[0] // config.router_groups,
          config.num_experts,
          config.top_k,
          capacity_factor=config.capacity_factor,
          rounding=config.capacity_rounding,
          multiple=config.capacity_multiple,
        )
        return dispatch.capacity_plan(
          expert_index,
          config.num_experts,
          expert_capacity=capacity,
          num_groups=config.router_groups,
          mask=mask,
        )
