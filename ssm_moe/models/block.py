"""One period of a model: its layers in groups, each before a norm and around a residual."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import LAYER_WORDS, ModelConfig, RoMConfig
from ssm_moe.layers import attention, initializers, mamba, mamba2
from ssm_moe.layers.attention import Attention
from ssm_moe.layers.mamba import Mamba
from ssm_moe.layers.mamba2 import Mamba2
from ssm_moe.layers.mlp import MLP
from ssm_moe.layers.moe import MoE
from ssm_moe.layers.norm import make_norm
from ssm_moe.layers.router import Routes, Routing, RoutingAux
from ssm_moe.shapes import Array, Bool, Float, Int
from ssm_moe.sharding import constrain_stream

# By layer name; a layer without state is absent.
PeriodState = dict[str, Any]
# By router: the name of the layer, and /projection where each projection has its own.
PeriodAux = dict[str, RoutingAux]
PeriodRoutes = dict[str, Routes]

_FEED_FORWARDS = 'FE'


def layer_names(config: ModelConfig) -> dict[str, str]:
  """Returns the letter of each layer of a period, by its name in the parameters."""
  return {f'{LAYER_WORDS[letter]}_{i}': letter for i, letter in enumerate(config.layers)}


class RouterPlace(NamedTuple):
  """Where a router sits in a model.

  Attributes:
    name: Depth and kind of its layer and, where each has its own router, the projection.
    depth: Of its layer, counted over all layers, routed or not, from 0.
    letter: Of its layer, in the pattern.
    router: Its name in a period's routing.
    period: Which one.
  """

  name: str
  depth: int
  letter: str
  router: str
  period: int


def routers_by_depth(routers: Iterable[str], config: ModelConfig) -> list[RouterPlace]:
  """Returns the places, in all periods, of the routers of one; from the first layer to the last."""
  names = layer_names(config)
  places = []
  for period in range(config.num_periods):
    for i, (layer, letter) in enumerate(names.items()):
      for router in routers:
        of_layer, _, projection = router.partition('/')
        if of_layer == layer:
          depth = period * len(names) + i
          kind = layer.rpartition('_')[0] + (f' {projection}' if projection else '')
          places.append(RouterPlace(f'{depth:02d} {kind}', depth, letter, router, period))
  return places


def layer_groups(config: ModelConfig) -> list[dict[str, str]]:
  """Returns the same in groups that share a norm and a residual."""
  layers = iter(layer_names(config).items())
  return [dict(next(layers) for _ in group) for group in config.groups]


def num_residual_branches(config: ModelConfig) -> int:
  """Returns how many outputs are added to the residual stream."""
  return len(config.layers) * config.num_periods


def initial_state(config: ModelConfig, batch: int) -> PeriodState:
  """Returns the state of one period before any token."""
  shared = {'d_model': config.d_model, 'batch': batch, 'dtype': jnp.dtype(config.dtype)}
  state = {}
  for name, letter in layer_names(config).items():
    match letter:
      case 'M' | 'm':
        state[name] = mamba.initial_state(config.mamba, **shared)
      case 'S' | 's':
        state[name] = mamba2.initial_state(config.mamba2, **shared)
      case 'A' | 'W':
        window = config.attention.window if letter == 'W' else None
        state[name] = attention.initial_state(config.attention, window=window, **shared)
  return state


def keep_rows(state: PeriodState, keep: Bool[Array, 'B']) -> PeriodState:
  """Zeroes the state of rows that start a new document. Leaves are [periods, B, ...]."""

  def masked(leaf):
    kept = keep.reshape((1, -1) + (1,) * (leaf.ndim - 2))
    return jnp.where(kept, leaf, jnp.zeros_like(leaf))

  return jax.tree.map(masked, state)


class _Decided:
  """The shared decisions that later layers of the period can take over."""

  def __init__(self):
    self._of_period: Routing | None = None
    self._latest: Routing | None = None

  def given(self, config: ModelConfig, letter: str) -> Routing | None:
    """Returns the decision that a layer is to take over; None if it decides itself."""
    if letter == 'E':
      return self._latest if config.moe.routing == 'mixer' else None
    rom = config.routing_of(letter)
    return self._of_period if rom is not None and rom.kind == 'period' else None

  def keep(self, config: ModelConfig, letter: str, routing: Routing | None) -> None:
    """Takes note of what a layer decided, or took over."""
    if routing is None:
      return
    self._latest = routing
    if config.routing_of(letter).kind == 'period':
      self._of_period = routing


class Period(nn.Module):
  """x = x + sum over the layers of a group of layer(norm(x)), for each group of the pattern.

  MoE-Mamba, section 3.2: M and E in turn, or M+E in parallel (3.3); Mamba and Routing Mamba: M
  alone; Samba: M F W F.

  Attributes:
    config: Of the model.
    record_routes: Whether to report every token's routes.
    dropout: Part of a layer's outputs that is zeroed, the others being scaled up.
  """

  config: ModelConfig
  record_routes: bool = False
  dropout: float = 0.0

  def setup(self):
    make = {
      'mamba': self._mamba,
      'mamba2': self._mamba2,
      'attention': self._attention,
      'window': self._attention,
      'mlp': self._mlp,
      'moe': self._moe,
    }
    self.drop = nn.Dropout(self.dropout, deterministic=not self.dropout)
    self.norm = {next(iter(g)): make_norm(self.config.norm) for g in layer_groups(self.config)}
    self.layer = {
      name: make[LAYER_WORDS[letter]](letter) for name, letter in layer_names(self.config).items()
    }

  def __call__(
    self,
    x: Float[Array, 'B L M'],
    state: PeriodState | None = None,
    segment_ids: Int[Array, 'B L'] | None = None,
    mask: Bool[Array, 'B L'] | None = None,
    routes: PeriodRoutes | None = None,
  ) -> tuple[Float[Array, 'B L M'], tuple[PeriodState, PeriodAux]]:
    """Returns the residual stream after the period, its new state and its routing."""
    new_state, new_aux = {}, {}
    decided = _Decided()
    for group in layer_groups(self.config):
      normed = constrain_stream(self.norm[next(iter(group))](x.astype(jnp.float32)))
      for name, letter in group.items():
        of_layer = _of_layer(routes or {}, name)
        given = decided.given(self.config, letter)
        if letter in _FEED_FORWARDS:
          y, aux = self._feed_forward(name, letter, normed, mask, of_layer.get(''), given)
        else:
          before = None if state is None else state[name]
          options = {'segment_ids': segment_ids, 'mask': mask, 'state': before}
          if letter in 'MS':
            options |= {'routes': of_layer, 'given': given}
          y, new_state[name], aux, *routing = self.layer[name](normed, **options)
          decided.keep(self.config, letter, *routing or [None])
        for router, reported in aux.items():
          new_aux[f'{name}/{router}' if router else name] = reported
        x = constrain_stream(x + self.drop(y).astype(x.dtype))
    return x, (new_state, new_aux)

  def step(
    self, x: Float[Array, 'B M'], state: PeriodState
  ) -> tuple[Float[Array, 'B M'], PeriodState]:
    """Runs one more token through the period; none is dropped, whatever the dispatch."""
    new_state = {}
    decided = _Decided()
    for group in layer_groups(self.config):
      normed = constrain_stream(self.norm[next(iter(group))](x.astype(jnp.float32)))
      for name, letter in group.items():
        given = decided.given(self.config, letter)
        if letter in _FEED_FORWARDS:
          y = self._feed_forward(name, letter, normed[:, None], None, None, given, drops=False)[0][
            :, 0
          ]
        else:
          options = {'given': given} if letter in 'MS' else {}
          y, new_state[name], *routing = self.layer[name].step(normed, state[name], **options)
          decided.keep(self.config, letter, *routing or [None])
        x = constrain_stream(x + y.astype(x.dtype))
    return x, new_state

  def _feed_forward(
    self, name, letter, x, mask, routes, given, drops=True
  ) -> tuple[Array, PeriodAux]:
    if letter == 'F':
      return self.layer[name](x), {}
    y, aux = self.layer[name](x, mask=mask, routes=routes, given=given, drops=drops)
    return y, {'': aux}

  def _mamba(self, letter: str) -> Mamba:
    return Mamba(_without_experts(self.config.mamba, letter), **self._mixer())

  def _mamba2(self, letter: str) -> Mamba2:
    return Mamba2(_without_experts(self.config.mamba2, letter), **self._mixer())

  def _mixer(self) -> dict[str, Any]:
    return {
      'd_model': self.config.d_model,
      'router_init': self._linear,
      'output_scale': self._output_scale(),
      'dtype': jnp.dtype(self.config.dtype),
      'record_routes': self.record_routes,
    }

  def _attention(self, letter: str) -> Attention:
    config = self.config
    heads = config.attention.num_heads * config.attention.head_size(config.d_model)
    return Attention(
      config.attention,
      config.d_model,
      window=config.attention.window if letter == 'W' else None,
      kernel_init=self._linear(config.d_model),
      out_init=self._output(heads),
      dtype=jnp.dtype(config.dtype),
      implementation=config.attention.implementation,
    )

  def _mlp(self, letter: str) -> MLP:
    del letter
    config = self.config
    d_ff = config.mlp.hidden_size(config.d_model)
    return MLP(
      d_ff,
      config.mlp.activation,
      wi_init=self._linear(config.d_model),
      wo_init=self._output(d_ff),
      dtype=jnp.dtype(config.dtype),
    )

  def _moe(self, letter: str) -> MoE:
    del letter
    config = self.config
    d_ff = config.moe.hidden_size(config.d_model)
    # llm-random counts the experts into the fan-in of the second matrix.
    experts = config.moe.num_experts if config.initialization == 'moe_mamba' else 1
    return MoE(
      config.moe,
      router_init=self._linear(config.d_model),
      wi_init=self._linear(config.d_model),
      wo_init=self._output(experts * d_ff),
      dtype=jnp.dtype(config.dtype),
      record_routes=self.record_routes,
    )

  def _linear(self, fan_in: int) -> nn.initializers.Initializer:
    if self.config.initialization == 'samba':
      return initializers.linear(fan_in)
    return initializers.truncated_normal(fan_in)

  def _output(self, fan_in: int) -> nn.initializers.Initializer:
    """Returns the initializer of a matrix whose product is added to the residual stream."""
    if self.config.initialization == 'samba':
      return initializers.linear(fan_in, self._output_scale())
    return initializers.truncated_normal(fan_in)

  def _output_scale(self) -> float:
    samba = self.config.initialization == 'samba'
    return num_residual_branches(self.config) ** -0.5 if samba else 1.0


def _without_experts(config: Any, letter: str) -> Any:
  return dataclasses.replace(config, rom=RoMConfig()) if letter.islower() else config


def _of_layer(routes: PeriodRoutes, name: str) -> dict[str, Routes]:
  """Returns the routes of a layer, by router."""
  split = ((key.partition('/'), value) for key, value in routes.items())
  return {router: value for (layer, _, router), value in split if layer == name}
