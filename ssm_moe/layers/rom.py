"""Routing Mamba: who decides for each routed projection of a mixer, and where weights apply."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import RoMConfig
from ssm_moe.layers import dispatch, mesh_dispatch
from ssm_moe.layers.projection import Decision
from ssm_moe.layers.router import Router, Routes, Routing, RoutingAux, routing_aux
from ssm_moe.layers.token_order import token_order
from ssm_moe.shapes import Array, Bool, Float

# What a mixer reports, by router: '' is the one of the whole layer, else the projection's name.
MixerAux = dict[str, RoutingAux]
MixerRoutes = dict[str, Routes]


def num_matrices(rom: RoMConfig) -> int:
  """Returns how many matrices a routed projection has: one more where a fallback is one of them."""
  return rom.num_experts + bool(rom.fallback_threshold)


def experts_of(rom: RoMConfig, projection: str) -> dict[str, int | None]:
  """Returns the fields of `Projection` that make a mixer's projection routed, if it is."""
  if rom.kind == 'none' or projection not in rom.expert_projections:
    return {'num_experts': None, 'bottleneck': None}
  return {'num_experts': num_matrices(rom), 'bottleneck': rom.bottleneck}


def one_in_projection(rom: RoMConfig) -> bool:
  """Whether conv and gate can be one matmul: both dense, or both under one decision."""
  routed = {name for name in ('conv', 'gate') if experts_of(rom, name)['num_experts']}
  if not routed:
    return True
  return len(routed) == 2 and rom.kind != 'independent' and rom.bottleneck is None


class ProjectionRouting(nn.Module):
  """The routers of a mixer: one for all its routed projections, or one for each.

  Shared: the decision is made once, from the layer's input (Routing Mamba,
  https://arxiv.org/abs/2506.18145). Independent: each projection's router reads what the projection
  reads (MoE-Mamba, section 4.4, https://arxiv.org/abs/2401.04081).

  Attributes:
    rom: Its config.
    router_init: Gives a router's initializer by its fan-in.
    record: Whether to report every token's routes.
  """

  rom: RoMConfig
  router_init: Callable[[int], nn.initializers.Initializer]
  record: bool = False

  def __call__(
    self,
    x: Float[Array, 'B L M'],
    *,
    mask: Bool[Array, 'B L'] | None = None,
    routes: MixerRoutes | None = None,
    given: Routing | None = None,
    drops: bool = True,
  ) -> 'Decisions':
    """Opens the decisions of one pass over the layer.

    Args:
      x: The layer's input.
      mask: Tokens that count in statistics and take capacity; all if None.
      routes: By router, decisions to take in place of the routers' own.
      given: What a layer before has decided for the whole period; None decides here.
      drops: Whether tokens over capacity are dropped, where the dispatch does so.
    """
    return Decisions(self, x, mask, routes or {}, given, drops)

  @nn.compact
  def decide(self, name: str, x: Float[Array, 'T M'], routes: Routes | None) -> Routing:
    """Runs the router `name`."""
    router = Router(
      self.rom, self.router_init(x.shape[-1]), name=f'router_{name}' if name else 'router'
    )
    return router(x, routes=routes)


class Decisions:
  """The decisions of one pass, made as the projections ask for them.

  Attributes:
    aux: What the routers that were asked report.
    routing: The decision that all projections share; None if each has its own.
  """

  def __init__(self, routing_module, x, mask, routes, given, drops):
    self._module, self._rom = routing_module, routing_module.rom
    self._order = token_order(*x.shape[:2])
    self._mask = None if mask is None else self._order.flatten(mask)
    self._routes, self._drops = routes, drops
    self.aux: MixerAux = {}
    self.routing: Routing | None = None
    if self._rom.kind in ('shared', 'period'):
      self.routing, self._plan = (
        self._decide('', x) if given is None else (given, self._make_plan(given))
      )

  def of(self, projection: str, x: Float[Array, 'B L M']) -> Decision | None:
    """Returns the decision for a projection that reads `x`; None for one that is not routed."""
    if self._rom.kind == 'none' or projection not in self._rom.expert_projections:
      return None
    if self.routing is None:
      routing, plan = self._decide(projection, x)
      return Decision(plan, self._weights(routing), self._order)
    weighted = projection == 'out' or self._rom.weight_at == 'each'
    weights = self._weights(self.routing) if weighted else self._mean_weights(self.routing)
    return Decision(self._plan, weights, self._order)

  def scale_output(self, y: Float[Array, 'B L M']) -> Float[Array, 'B L M']:
    """Applies the shared weight to the mixer's output, where no routed projection has had it.

    Else the router would get no gradient.
    """
    rom = self._rom
    if self.routing is None or 'out' in rom.expert_projections or rom.weight_at == 'each':
      return y
    weight = self._order.unflatten(jnp.sum(self._weights(self.routing), axis=1, keepdims=True))
    return (y.astype(jnp.float32) * weight).astype(y.dtype)

  def _decide(self, name: str, x: Array) -> tuple[Routing, dispatch.Plan]:
    order = self._order
    routes = self._routes.get(name)
    routing = self._module.decide(
      name, order.flatten(x), None if routes is None else order.from_rows(routes)
    )
    plan = self._make_plan(routing)
    aux = routing_aux(routing, plan.dropped, self._mask, record=self._module.record)
    self.aux[name] = aux.replace(
      routes=order.by_rows(aux.routes), dropped=order.by_rows(aux.dropped)
    )
    return routing, plan

  def _make_plan(self, routing: Routing) -> dispatch.Plan:
    return mesh_dispatch.make_plan(
      routing.routes.expert_index,
      self._rom,
      num_experts=num_matrices(self._rom),
      mask=self._mask,
      drops=self._drops,
      order=self._order,
    )

  def _weights(self, routing: Routing) -> Float[Array, 'T K']:
    weights = routing.routes.combine_weights
    if self._rom.weight_at == 'straight_through':
      return weights + jax.lax.stop_gradient(1 - weights)
    return weights

  def _mean_weights(self, routing: Routing) -> Float[Array, 'T K'] | None:
    """Of projections that the router's weight does not reach; None adds their experts up."""
    if self._rom.weights != 'uniform' or self._rom.top_k == 1:
      return None
    return jax.lax.stop_gradient(routing.routes.combine_weights)
