"""The language model: embedding, periods of layers, norm, head."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from ssm_moe import sharding
from ssm_moe.config import ConfigError, ModelConfig
from ssm_moe.layers import initializers
from ssm_moe.layers.norm import make_norm
from ssm_moe.layers.router import move_selection_bias
from ssm_moe.models import block
from ssm_moe.models.block import Period, PeriodAux, PeriodRoutes, PeriodState, layer_names
from ssm_moe.shapes import Array, Bool, Float, Int, Key, PyTree


class LMOutput(struct.PyTreeNode):
  """What the model says of a batch of sequences.

  Attributes:
    hidden: The stream before the head; `head_matrix` makes logits of it.
    state: By layer name, each leaf stacked over the periods: what the next window starts from.
    aux: By layer name, each leaf stacked over the periods: losses and statistics of routed layers.
  """

  hidden: Float[Array, 'B L M']
  state: PeriodState
  aux: PeriodAux


class LM(nn.Module):
  """A stack of periods over token embeddings.

  Initialisation 'samba': linear maps as PyTorch's default, embedding and head normal with deviation
  0.02, output projections divided by sqrt(residual branches), as in the code of Samba
  (https://arxiv.org/abs/2406.07522). 'moe_mamba': embedding, head, router and experts normal with
  variance 0.1 / fan-in, cut at 0.2, Mamba as in its authors' code; so does the code of MoE-Mamba
  (https://arxiv.org/abs/2401.04081).

  Attributes:
    config: Of the model.
    record_routes: Whether `aux` is to hold every token's routes.
    dropout: Of layers' outputs, by an rng of that name; 0 for all but training.
  """

  config: ModelConfig
  record_routes: bool = False
  dropout: float = 0.0

  def setup(self):
    config = self.config
    moe_mamba = config.initialization == 'moe_mamba'
    embed_init = initializers.truncated_normal(1) if moe_mamba else nn.initializers.normal(0.02)
    self.embedding = self.param(
      'embedding',
      nn.with_logical_partitioning(embed_init, ('vocab', 'embed')),
      (config.vocab_size, config.d_model),
      jnp.float32,
    )
    if not config.tie_embeddings:
      head_init = (
        initializers.truncated_normal(config.d_model) if moe_mamba else nn.initializers.normal(0.02)
      )
      self.head = self.param(
        'head',
        nn.with_logical_partitioning(head_init, ('embed', 'vocab')),
        (config.d_model, config.vocab_size),
        jnp.float32,
      )
    if config.final_norm:
      self.final_norm = make_norm(config.norm)
    self.periods = self._stack({'__call__': (0, nn.broadcast, nn.broadcast, 0), 'step': (0,)})

  def __call__(
    self,
    tokens: Int[Array, 'B L'],
    *,
    segment_ids: Int[Array, 'B L'] | None = None,
    mask: Bool[Array, 'B L'] | None = None,
    state: PeriodState | None = None,
    routes: PeriodRoutes | None = None,
  ) -> LMOutput:
    """Runs over sequences.

    Args:
      tokens: Inputs; the output at each says what comes next.
      segment_ids: Document of each token: nothing flows from one to the next. The first position
        continues the document that `state` comes from.
      mask: Tokens that count in routing statistics and take expert capacity; all if None.
      state: From the window before; nothing if None.
      routes: Decisions to take in place of the routers' own, as `aux` records them; of all routers
        that are named.
    """
    x = self._embed(tokens)
    x, (state, aux) = self.periods(x, state, segment_ids, mask, routes)
    return LMOutput(self._normalize(x), state, aux)

  def step(
    self, tokens: Int[Array, 'B'], state: PeriodState
  ) -> tuple[Float[Array, 'B V'], PeriodState]:
    """Returns the float32 logits after one more token, and the state for the next.

    No token is dropped, whatever the dispatch: equal to `__call__` where that drops nothing.
    """
    x, state = self.periods.step(self._embed(tokens), state)
    return self.logits(self._normalize(x)), state

  def logits(self, hidden: Float[Array, '*B M']) -> Float[Array, '*B V']:
    """Returns float32 logits. Training never does this for a whole batch: see `losses`."""
    head = self.embedding.T if self.config.tie_embeddings else self.head
    return jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)

  def _embed(self, tokens: Array) -> Array:
    table = self.embedding.astype(jnp.dtype(self.config.residual_dtype))
    if tokens.ndim == 2:
      # Else each device would look up its columns of all tokens, and send them to where rows are.
      table = sharding.constrain(table, 'vocab', None)
    return sharding.constrain_stream(table[tokens])

  def _normalize(self, x: Array) -> Array:
    if self.config.final_norm:
      x = self.final_norm(x.astype(jnp.float32))
    return sharding.constrain_stream(x.astype(jnp.dtype(self.config.dtype)))

  def _stack(self, in_axes: dict[str, Any]) -> nn.Module:
    """Returns all periods as one module, its parameters stacked over them."""
    period = Period
    if self.config.remat == 'period':
      period = nn.remat(Period, prevent_cse=not self.config.scan_periods)
    # With several methods, flax reads every option from the method's own entry.
    options = {
      'variable_axes': {'params': 0},
      'split_rngs': {'params': True, 'dropout': True},
      'length': self.config.num_periods,
      'unroll': 1 if self.config.scan_periods else self.config.num_periods,
      'metadata_params': {nn.PARTITION_NAME: 'layers'},
    }
    methods = {name: {**options, 'in_axes': axes} for name, axes in in_axes.items()}
    scanned = nn.scan(period, methods=methods)
    return scanned(self.config, self.record_routes, self.dropout)


def head_matrix(params: Any, config: ModelConfig) -> Float[Array, 'M V']:
  """Returns the matrix that makes logits of hidden states."""
  return params['embedding'].T if config.tie_embeddings else params['head']


def boxed_params(config: ModelConfig, key: Key[Array, '']) -> PyTree:
  """Returns new parameters in flax boxes with their logical axes.

  Under `jax.eval_shape` they are shapes alone, and under `flax.linen.unbox` without boxes.
  """
  groups = [routing.router_groups for routing in config.routings().values()]
  tokens = jnp.zeros((1, math.lcm(*groups)), jnp.int32)
  return LM(config).init(key, tokens)['params']


def initial_state(config: ModelConfig, batch: int) -> PeriodState:
  """Returns the state before any token, stacked over the periods."""
  state = block.initial_state(config, batch)
  return jax.tree.map(lambda leaf: jnp.stack([leaf] * config.num_periods), state)


def auxiliary_loss(aux: PeriodAux, config: ModelConfig) -> Float[Array, '']:
  """Returns the routing losses, each the mean over the layers of a kind, times its coefficient.

  The mean, not the sum, as in MoE-Mamba's code: the coefficient then means the same at any depth.
  """
  total = jnp.zeros((), jnp.float32)
  for letter in dict.fromkeys(config.layers):
    names = [name for name, kind in layer_names(config).items() if kind == letter]
    layers = [reported for key, reported in aux.items() if key.partition('/')[0] in names]
    if not layers:
      continue
    settings = config.routing_of(letter)
    balance = jnp.mean(jnp.stack([layer.load_balancing_loss for layer in layers]))
    z = jnp.mean(jnp.stack([layer.router_z_loss for layer in layers]))
    total += settings.load_balancing_coefficient * balance + settings.router_z_coefficient * z
  return total


def with_moved_biases(params: Any, aux: PeriodAux, config: ModelConfig) -> Any:
  """Returns the parameters after a training step has moved every router's selection bias."""
  names = layer_names(config)
  for key, reported in aux.items():
    layer, _, projection = key.partition('/')
    settings = config.routing_of(names[layer])
    if not settings.selection_bias_rate:
      continue
    path = [f'layer_{layer}', f'router_{projection}' if projection else 'router', 'selection_bias']
    if names[layer] != 'E':
      path.insert(1, 'routing')
    move = functools.partial(
      move_selection_bias, load=reported.expert_load, rate=settings.selection_bias_rate
    )
    params = _replaced(params, ['periods', *path], move)
  return params


def without_drops(config: ModelConfig) -> ModelConfig:
  """Returns the model without expert capacity.

  Capacity is a device of training: with it, what is said of a sequence would depend on those that
  happen to be beside it, and a step of generation would drop tokens.
  """

  def dropless(routing):
    if routing.dispatch != 'capacity':
      # Groups decide nothing else, and would have to divide every batch.
      return dataclasses.replace(routing, router_groups=1)
    return dataclasses.replace(routing, dispatch='dropless', router_groups=1)

  return dataclasses.replace(
    config,
    mamba=dataclasses.replace(config.mamba, rom=dropless(config.mamba.rom)),
    mamba2=dataclasses.replace(config.mamba2, rom=dropless(config.mamba2.rom)),
    moe=dropless(config.moe),
  )


def check_causal(config: ModelConfig, purpose: str) -> None:
  """Raises unless no token's logits depend on later tokens, or that is asked for by name.

  Args:
    config: Of the model.
    purpose: What is to be done with it, for the message.

  Raises:
    ConfigError: experts choose tokens.
  """
  if 'E' in config.layers and config.moe.choice == 'expert' and not config.moe.allow_acausal:
    raise ConfigError(
      f'config.model.moe.choice is expert, which looks at later tokens: {purpose} would not be '
      'autoregressive; it must be token, or set moe.allow_acausal to have it nevertheless'
    )


def _replaced(tree: Any, path: list[str], change: Callable[[Array], Array]) -> Any:
  """Returns nested dictionaries in which the leaf at `path` is changed."""
  if not path:
    return change(tree)
  return {**tree, path[0]: _replaced(tree[path[0]], path[1:], change)}
