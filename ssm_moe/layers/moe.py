"""The sparse feed-forward layer of MoE-Mamba."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import MoEConfig
from ssm_moe.layers import dispatch, mesh_dispatch
from ssm_moe.layers.mlp import MLP, activation_of
from ssm_moe.layers.router import Router, Routes, Routing, RoutingAux, routing_aux
from ssm_moe.layers.token_order import TokenOrder, token_order
from ssm_moe.shapes import Array, Bool, Float


class MoE(nn.Module):
  """A Switch layer: each token passes through the feed-forward experts that the router chose.

  y = sum_k p_k E_k(x),    E_i(x) = ReLU(x W1_i) W2_i.
  MoE-Mamba, section 3.1 (https://arxiv.org/abs/2401.04081). A dropped token gets zero, and lives on
  in the residual stream. Shared experts, which every token passes through unweighted besides:
  section 3.2 of DeepSeekMoE (https://arxiv.org/abs/2401.06066).

  Attributes:
    moe: Its config.
    router_init, wi_init, wo_init: Initialise router, first and second matrices.
    dtype: Of the matrix work.
    record_routes: Whether to report every token's routes.
  """

  moe: MoEConfig
  router_init: nn.initializers.Initializer
  wi_init: nn.initializers.Initializer
  wo_init: nn.initializers.Initializer
  dtype: jnp.dtype
  record_routes: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B L M'],
    *,
    mask: Bool[Array, 'B L'] | None = None,
    routes: Routes | None = None,
    given: Routing | None = None,
    drops: bool = True,
  ) -> tuple[Float[Array, 'B L M'], RoutingAux]:
    """Returns the layer's output and its routing.

    Args:
      x: Input.
      mask: Tokens that count in statistics and take capacity; all if None.
      routes: Decisions to take in place of the router's own; all tokens', where experts choose.
      given: What a mixer has decided, where `moe.routing` is to take that.
      drops: Whether tokens over capacity are dropped, where the dispatch does so.
    """
    batch, length, d_model = x.shape
    config = self.moe
    # Experts compare the tokens of a group as the rows of the batch have them.
    by_rows = config.choice == 'expert'
    order = TokenOrder(batch, length) if by_rows else token_order(batch, length)
    tokens = order.flatten(x)
    token_mask = None if mask is None else order.flatten(mask)
    routes = None if routes is None else order.from_rows(routes)

    if config.routing == 'mixer':
      routing = given if routes is None else given.replace(routes=routes.or_else(given.routes))
    else:
      routing = Router(config, self.router_init, name='router')(tokens, routes=routes)
    if config.choice == 'expert':
      plan, routing = self._expert_choice(routing, routes, token_mask)
    else:
      plan = mesh_dispatch.make_plan(
        routing.routes.expert_index,
        config,
        num_experts=config.num_experts,
        mask=token_mask,
        drops=drops,
        exchange=config.exchange,
        order=order,
      )

    matrices, axes = self._experts(d_model)
    y = plan.apply(
      tokens.astype(self.dtype),
      matrices,
      routing.routes.combine_weights,
      between=activation_of(config.activation),
      axes=axes,
    )
    y = order.unflatten(y)
    if config.num_shared_experts:
      y = y + self._shared_experts(d_model)(x)
    aux = routing_aux(routing, plan.dropped, token_mask, record=self.record_routes)
    return y, aux.replace(routes=order.by_rows(aux.routes), dropped=order.by_rows(aux.dropped))

  def _experts(self, d_model: int) -> tuple[list[Array], list[tuple[str, ...]]]:
    """Returns the two matrices of each expert, and their logical axes."""
    d_ff = self.moe.hidden_size(d_model)
    gated = self.moe.activation == 'swiglu'
    inner = ('branch', 'mlp') if gated else ('mlp',)
    sizes = (2, d_ff) if gated else (d_ff,)
    axes = [('expert', 'embed', *inner), ('expert', 'mlp', 'embed')]
    wi = self._stacked('wi', self.wi_init, axes[0], (d_model, *sizes))
    return [wi, self._stacked('wo', self.wo_init, axes[1], (d_ff, d_model))], axes

  def _stacked(self, name, init, axes, shape):
    init = nn.with_logical_partitioning(init, axes)
    stacked = self.param(name, init, (self.moe.num_experts, *shape), jnp.float32)
    return stacked.astype(self.dtype)

  def _shared_experts(self, d_model: int) -> MLP:
    config = self.moe
    return MLP(
      config.num_shared_experts * config.hidden_size(d_model),
      config.activation,
      self.wi_init,
      self.wo_init,
      self.dtype,
      name='shared_experts',
    )

  def _expert_choice(
    self, routing: Routing, routes: Routes | None, mask: Bool[Array, 'T'] | None
  ) -> tuple[dispatch.Plan, Routing]:
    """Returns the plan, and the routing with what came of it: a column of routes an expert."""
    config = self.moe
    if routes is None:
      sigmoid = config.score == 'sigmoid'
      scores = jax.nn.sigmoid(routing.router_logits) if sigmoid else routing.router_probs
    else:
      # As many are marked for each expert as it chose, so that it chooses the same again.
      scores = (routes.expert_index < config.num_experts).astype(jnp.float32)
    plan = dispatch.expert_choice_plan(
      scores,
      expert_capacity=dispatch.capacity_of(config, scores.shape[0]),
      num_groups=config.router_groups,
      mask=mask,
    )
    if routes is None:
      expert_index = jnp.where(plan.chosen(), jnp.arange(config.num_experts), config.num_experts)
      routing = routing.replace(routes=Routes(expert_index, scores))
    return plan, routing
