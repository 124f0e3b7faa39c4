"""What a model's routers decide, token by token; decisions given back, and wrong ones put in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_moe.analysis.documents import Window
from ssm_moe.config import ModelConfig
from ssm_moe.layers.router import Routes
from ssm_moe.models import lm
from ssm_moe.models.block import PeriodRoutes, PeriodState, keep_rows, routers_by_depth
from ssm_moe.shapes import Array, Bool, Float, Int, PyTree


class Layer(NamedTuple):
  """A routed layer; of a mixer with several routers, one of them.

  Attributes:
    name: Depth, kind and, where each has its own router, projection.
    depth: Counted over all layers, routed or not, from 0.
    router: Its name in a period.
    period: Which one.
    num_experts: E.
    top_k: Columns of its routes: K, or E where experts choose tokens.
    experts_choose: Whether they do.
    has_fallback: Whether a token may take none of the experts, but what stands in for them.
  """

  name: str
  depth: int
  router: str
  period: int
  num_experts: int
  top_k: int
  experts_choose: bool
  has_fallback: bool


class Traced(NamedTuple):
  """What a model did with a window, on the host but for `hidden`.

  Attributes:
    hidden: The stream before the head.
    nats: Of each target.
    routes: By router, stacked over the periods: [periods, T, K].
    dropped: Assignments over capacity, likewise.
    router_entropy: By router, a number a period: means over the tokens that are no padding.
  """

  hidden: Float[Array, 'B L M']
  nats: Float[np.ndarray, 'B L']
  routes: PeriodRoutes
  dropped: dict[str, Bool[np.ndarray, 'P T K']]
  router_entropy: dict[str, Float[np.ndarray, 'P']]


class Tracer:
  """A model that reports every decision.

  Attributes:
    layers: Those that are routed, from the first to the last.

  Args:
    params: Of the model, without flax boxes.
    config: Of the model.

  Raises:
    ConfigError: experts choose tokens, so that a decision depends on later tokens.
  """

  def __init__(self, params: PyTree, config: ModelConfig):
    lm.check_causal(config, 'the audit')
    self.config = config
    self._params = params
    self._model = lm.LM(config, record_routes=True)
    self._forward = jax.jit(self._forward_of)
    # Apart from the model, so that equal hidden states have equal logits, whoever decided.
    self._nats = jax.jit(self._nats_of)
    self._difference = jax.jit(self._difference_of)
    self.layers = self._find_layers()

  def start(self) -> 'Pass':
    """Begins a pass over windows."""
    return Pass(self)

  def difference(self, window: Window, one: Traced, other: Traced) -> float:
    """Returns the largest absolute difference of a logit, over the tokens that are no padding."""
    return float(self._difference(self._params, one.hidden, other.hidden, window.real))

  def run(
    self, window: Window, state: PeriodState, routes: PeriodRoutes | None
  ) -> tuple[Traced, PeriodState]:
    if routes is None:
      routes = self._undecided(window.inputs.size)
    hidden, state, aux = self._forward(self._params, state, _arrays(window), routes)
    nats = self._nats(self._params, hidden, window.targets)
    nats, aux = jax.device_get((nats, aux))
    return Traced(
      hidden,
      nats,
      {name: layer.routes for name, layer in aux.items()},
      {name: layer.dropped for name, layer in aux.items()},
      {name: layer.router_entropy for name, layer in aux.items()},
    ), state

  def _undecided(self, num_tokens: int) -> PeriodRoutes:
    return {
      layer.router: Routes.undecided((self.config.num_periods, num_tokens, layer.top_k))
      for layer in self.layers
    }

  def _forward_of(self, params, state, window, routes):
    output = self._model.apply(
      {'params': params},
      window['inputs'],
      segment_ids=window['segment_ids'],
      mask=window['segment_ids'] > 0,
      state=keep_rows(state, window['continues']),
      routes=routes,
    )
    return output.hidden, output.state, output.aux

  def _logits(self, params, hidden):
    return self._model.apply({'params': params}, hidden, method='logits')

  def _nats_of(self, params, hidden, targets):
    def of_row(row):
      logits = self._logits(params, row[0])
      chosen = jnp.take_along_axis(logits, row[1][:, None], axis=-1)[:, 0]
      return jax.nn.logsumexp(logits, axis=-1) - chosen

    # Row by row: logits of a whole window can be larger than the model.
    return jax.lax.map(of_row, (hidden, targets))

  def _difference_of(self, params, one, other, real):
    def of_row(row):
      gap = jnp.abs(self._logits(params, row[0]) - self._logits(params, row[1]))
      return jnp.max(jnp.where(row[2], jnp.max(gap, axis=-1), 0))

    return jnp.max(jax.lax.map(of_row, (one, other, real)))

  def _find_layers(self) -> list[Layer]:
    tokens = jax.ShapeDtypeStruct((1, self.config.moe.router_groups), jnp.int32)
    aux = jax.eval_shape(lambda p, t: self._model.apply({'params': p}, t).aux, self._params, tokens)
    return [
      Layer(
        place.name,
        place.depth,
        place.router,
        place.period,
        aux[place.router].expert_load.shape[-1],
        aux[place.router].routes.expert_index.shape[-1],
        place.letter == 'E' and self.config.moe.choice == 'expert',
        bool(self.config.routing_of(place.letter).fallback_threshold),
      )
      for place in routers_by_depth(aux, self.config)
    ]


class Pass:
  """One pass over windows, in order: it carries the state from each to the next."""

  def __init__(self, tracer: Tracer):
    self._tracer = tracer
    self._state: PeriodState | None = None

  def run(self, window: Window, routes: PeriodRoutes | None = None) -> Traced:
    """Runs over a window; with `routes`, which must name every router, as these decide."""
    if self._state is None:
      self._state = lm.initial_state(self._tracer.config, window.inputs.shape[0])
    traced, self._state = self._tracer.run(window, self._state, routes)
    return traced


class Totals:
  """Sums over the windows of a pass."""

  def __init__(self, layers: list[Layer]):
    self._layers = layers
    self.tokens, self.nats = 0, 0.0
    self._load = [np.zeros(layer.num_experts, np.int64) for layer in layers]
    self._sums = np.zeros((len(layers), 4))  # dropped, fallback, entropy, top weight

  @property
  def loss(self) -> float:
    """Mean nats a token."""
    return self.nats / self.tokens

  def add(self, window: Window, traced: Traced) -> None:
    real = window.real.reshape(-1)
    count = int(real.sum())
    self.tokens += count
    self.nats += float(traced.nats.reshape(-1)[real].astype(np.float64).sum())
    for i, layer in enumerate(self._layers):
      routes = routes_of(traced.routes, layer)
      experts = routes.expert_index[real]
      self._load[i] += np.bincount(
        experts[experts < layer.num_experts], minlength=layer.num_experts
      )
      dropped = traced.dropped[layer.router][layer.period][real]
      entropy = count * float(traced.router_entropy[layer.router][layer.period])
      top = routes.combine_weights[real].max(axis=1).astype(np.float64).sum()
      self._sums[i] += (
        dropped.mean(axis=1).sum(),
        fallback(experts, layer).sum(),
        entropy,
        top,
      )

  def loads(self) -> list[Float[np.ndarray, '_']]:
    """Returns the share of the assignments that each expert of each layer has."""
    return [load / max(load.sum(), 1) for load in self._load]

  def summary(self) -> list[dict[str, Any]]:
    """Returns, for each layer, its loads and means over the tokens."""
    keys = ('dropped_fraction', 'fallback_fraction', 'router_entropy', 'top_weight')
    return [
      {
        'layer': layer.depth,
        'name': layer.name,
        'router': layer.router,
        'expert_load': load.tolist(),
        **dict(zip(keys, (sums / max(self.tokens, 1)).tolist())),
      }
      for layer, load, sums in zip(self._layers, self.loads(), self._sums)
    ]


def routes_of(routes: PeriodRoutes, layer: Layer) -> Routes:
  """Returns the routes of one layer, [T, K]."""
  return jax.tree.map(lambda leaf: leaf[layer.period], routes[layer.router])


def fallback(experts: Int[np.ndarray, 'T K'], layer: Layer) -> Bool[np.ndarray, 'T']:
  """Returns which tokens took no routed expert, but what stands in for them."""
  if layer.experts_choose:
    return np.zeros(len(experts), bool)
  return (experts == layer.num_experts).all(axis=1)


def inject(
  routes: PeriodRoutes, layers: list[Layer], window: Window, *, rate: float, seed: int
) -> tuple[PeriodRoutes, Bool[np.ndarray, 'layers T']]:
  """Sends a share of the tokens to other experts than theirs, with the weights that they had.

  A token's experts are all replaced, by a random choice of those that it had not taken (and of its
  own, where there are too few others). A greater rate changes the tokens of a smaller one, too.

  Args:
    routes: Of a pass without faults; left as they are.
    layers: Where to do so; none in which experts choose tokens.
    window: Which window it is; padding is left as it is.
    rate: Expected share of the tokens of each layer.
    seed: Of the random choices; each layer and window has its own.

  Returns:
    The routes, and for each of `layers` the tokens that are changed.
  """
  index = {name: np.array(of_router.expert_index) for name, of_router in routes.items()}
  real = window.real.reshape(-1)
  changed = np.zeros((len(layers), len(real)), bool)
  for i, layer in enumerate(layers):
    key = (seed, window.index, layer.depth, *layer.router.encode())
    random = np.random.default_rng(np.random.SeedSequence(key))
    picked = (random.random(len(real)) < rate) & real
    order = random.random((len(real), layer.num_experts))
    experts = index[layer.router][layer.period]
    taken = (experts[:, :, None] == np.arange(layer.num_experts)).any(axis=1)
    others = np.argsort(order + taken, axis=1)[:, : layer.top_k].astype(experts.dtype)
    changed[i] = picked & (others != experts).any(axis=1)
    experts[picked] = others[picked]
  new = {name: Routes(index[name], routes[name].combine_weights) for name in routes}
  return new, changed


def _arrays(window: Window) -> dict[str, np.ndarray]:
  return {
    'inputs': window.inputs,
    'segment_ids': window.segment_ids,
    'continues': window.continues,
  }
