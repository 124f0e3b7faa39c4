"""The router, its losses and its statistics. All arithmetic is float32.

The shapes of the trees here are not checked at run time (no_type_check): JAX rebuilds trees with
shapes, shardings or axis numbers in place of arrays.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from ssm_moe.config import RoutingConfig
from ssm_moe.shapes import Array, Bool, Float, Int

_UNDECIDED = -1


@no_type_check
class Routes(struct.PyTreeNode):
  """Which experts each token takes, and with what weight: what a record of a run holds.

  Routes may be given to a model in place of its own decisions. Rows of `undecided` routes then
  leave the token to the router; so a model that decides and one that is told are one compiled
  program, and equal decisions give equal results to the bit.

  Attributes:
    expert_index: The chosen experts, the best first; the index E stands for the fallback.
    combine_weights: What each chosen expert's output is multiplied with.
  """

  expert_index: Int[Array, '*P T K']
  combine_weights: Float[Array, '*P T K']

  @classmethod
  def undecided(cls, shape: tuple[int, ...]) -> 'Routes':
    """Returns routes [*P, T, K] that leave every token to the router."""
    return cls(jnp.full(shape, _UNDECIDED, jnp.int32), jnp.zeros(shape, jnp.float32))

  def or_else(self, own: 'Routes') -> 'Routes':
    """Returns these routes, and `own` for the tokens that are undecided here."""
    undecided = self.expert_index[:, :1] == _UNDECIDED
    return jax.tree.map(lambda given, mine: jnp.where(undecided, mine, given), self, own)


@no_type_check
class Routing(struct.PyTreeNode):
  """What a router decided.

  Attributes:
    routes: Experts and weights of each token.
    router_logits: Of every expert.
    router_probs: Scores that add up to 1: the softmax, or sigmoids divided by their sum.
    fallback: Tokens whose best score was below the threshold; None without one.
  """

  routes: Routes
  router_logits: Float[Array, 'T E']
  router_probs: Float[Array, 'T E']
  fallback: Bool[Array, 'T'] | None = None

  @property
  def num_experts(self) -> int:
    return self.router_logits.shape[1]


@no_type_check
class RoutingAux(struct.PyTreeNode):
  """What a routed layer reports beside its output: losses without coefficient, and statistics.

  A model's are stacked over its periods, P.

  Attributes:
    load_balancing_loss: 1.0 at perfect balance.
    router_z_loss: Mean squared logsumexp of the logits.
    expert_load: Fraction of the assignments that each expert has; adds up to 1.
    router_entropy: Mean entropy of the router's probabilities, in nats.
    dropped_fraction: Assignments over capacity, of all assignments.
    fallback_fraction: Tokens that took the fallback, of all.
    routes: Of every token, if they are recorded; else None.
    dropped: Assignments over capacity, if routes are recorded; else None.
  """

  load_balancing_loss: Float[Array, '*P']
  router_z_loss: Float[Array, '*P']
  expert_load: Float[Array, '*P E']
  router_entropy: Float[Array, '*P']
  dropped_fraction: Float[Array, '*P']
  fallback_fraction: Float[Array, '*P']
  routes: Routes | None = None
  dropped: Bool[Array, '*P T K'] | None = None


class Router(nn.Module):
  """Scores every expert for each token, and chooses top_k by score.

  p = softmax(x W_r) or sigmoid(x W_r);  chosen = TopK(p + b);  weights = p at the chosen.
  Softmax: equations 1-2 of Switch Transformers (https://arxiv.org/abs/2101.03961), as in both
  papers. Sigmoid and the bias b, which the selection alone sees and which no gradient reaches:
  section 2.1.2 of DeepSeek-V3 (https://arxiv.org/abs/2412.19437).

  Attributes:
    config: How to score, choose and weigh.
    kernel_init: Of W_r.
  """

  config: RoutingConfig
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x: Float[Array, 'T M'], *, routes: Routes | None = None) -> Routing:
    """Decides for each token, or takes the decision that `routes` has for it."""
    config = self.config
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(self.kernel_init, ('embed', 'router')),
      (x.shape[-1], config.num_experts),
      jnp.float32,
    )
    # HIGHEST: on GPU and TPU a float32 matmul would else round its inputs to 10 or 7 bits, and
    # near-ties would be decided by that rounding.
    router_logits = jnp.dot(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    if config.score == 'softmax':
      scores = router_probs = jax.nn.softmax(router_logits, axis=-1)
    else:
      scores = jax.nn.sigmoid(router_logits)
      router_probs = scores / jnp.sum(scores, axis=-1, keepdims=True)
    bias = self._selection_bias()
    expert_index = _best(scores if bias is None else scores + bias[None, :], config.top_k)
    weights = _take(scores, expert_index)
    if config.weights == 'renormalized':
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    elif config.weights == 'uniform':
      # The difference is exactly 0, where weights + (1 / K - weights) could be off by a rounding.
      weights = 1 / config.top_k + (weights - jax.lax.stop_gradient(weights))
    if config.fallback_threshold:
      unsure = jnp.max(scores, axis=-1) < config.fallback_threshold
      expert_index = jnp.where(unsure[:, None], config.num_experts, expert_index)
    decided = Routes(expert_index, weights)
    if routes is not None:
      decided = routes.or_else(decided)
    fallback = None
    if config.fallback_threshold:
      fallback = jnp.all(decided.expert_index == config.num_experts, axis=1)
    return Routing(decided, router_logits, router_probs, fallback)

  def _selection_bias(self) -> Float[Array, 'E'] | None:
    """Kept with the parameters, which whoever runs the model needs; `training` moves it."""
    if not self.config.selection_bias_rate:
      return None
    bias = self.param(
      'selection_bias',
      nn.with_logical_partitioning(nn.initializers.zeros, ('router',)),
      (self.config.num_experts,),
      jnp.float32,
    )
    return jax.lax.stop_gradient(bias)


def _best(scores: Float[Array, 'T E'], top_k: int) -> Int[Array, 'T K']:
  """Returns the experts with the highest scores, the highest first; of equal ones the first."""
  # Not by top_k: it sorts each row (22 us for 32768 tokens on an H200), and over a mesh all scores
  # would be sent to every device.
  chosen = []
  for _ in range(top_k):
    best = jnp.argmax(scores, axis=-1)
    chosen.append(best.astype(jnp.int32))
    scores = jnp.where(jax.nn.one_hot(best, scores.shape[-1], dtype=jnp.bool_), -jnp.inf, scores)
  return jnp.stack(chosen, axis=-1)


def _take(scores: Float[Array, 'T E'], expert_index: Int[Array, 'T K']) -> Float[Array, 'T K']:
  # Not by indexing, whose gradient is a scatter: 75 us on an H200, where this joins what is around.
  chosen = expert_index[:, :, None] == jnp.arange(scores.shape[1])[None, None, :]
  return jnp.sum(jnp.where(chosen, scores[:, None, :], 0), axis=-1)


def move_selection_bias(
  bias: Float[Array, '*P E'], load: Float[Array, '*P E'], rate: float
) -> Float[Array, '*P E']:
  """Raises the bias of experts below their share of the load, and lowers the others', by `rate`.

  Algorithm 1 of Loss-Free Balancing (https://arxiv.org/abs/2408.15664).
  """
  return bias + rate * jnp.sign(1 / load.shape[-1] - load)


def expert_load(
  expert_index: Int[Array, 'T K'], num_experts: int, mask: Bool[Array, 'T'] | None = None
) -> Float[Array, 'E']:
  """Returns the fraction of assignments that each expert has, over the tokens in `mask`.

  An index of E is an assignment to no expert, and does not count.
  """
  chosen = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.float32).sum(axis=1)
  load = _mean(chosen, mask)
  return load / jnp.maximum(jnp.sum(load), jnp.finfo(jnp.float32).tiny)


def load_balancing_loss(
  router_probs: Float[Array, 'T E'], load: Float[Array, 'E'], mask: Bool[Array, 'T'] | None = None
) -> Float[Array, '']:
  """Returns E sum_e f_e P_e: 1.0 at perfect balance, for every top_k.

  f_e is the fraction of assignments and P_e the mean probability of expert e. Equations 4-6 of
  Switch Transformers (https://arxiv.org/abs/2101.03961), with f_e divided by K.
  """
  return router_probs.shape[1] * jnp.dot(load, _mean(router_probs, mask))


def router_z_loss(
  router_logits: Float[Array, 'T E'], mask: Bool[Array, 'T'] | None = None
) -> Float[Array, '']:
  """Returns the mean over tokens of logsumexp(logits) ** 2, which keeps logits small.

  Equation 5 of ST-MoE (https://arxiv.org/abs/2202.08906).
  """
  return _mean(jax.nn.logsumexp(router_logits, axis=-1) ** 2, mask)


def routing_aux(
  routing: Routing,
  dropped: Bool[Array, 'T K'] | None,
  mask: Bool[Array, 'T'] | None = None,
  *,
  record: bool = False,
) -> RoutingAux:
  """Returns the losses and statistics of a layer's decisions.

  Args:
    routing: The decisions.
    dropped: Assignments over capacity; None if there are none.
    mask: Tokens that count; all if None.
    record: Whether to return every token's routes as well.
  """
  load = expert_load(routing.routes.expert_index, routing.num_experts, mask)
  log_probs = jnp.log(jnp.maximum(routing.router_probs, jnp.finfo(jnp.float32).tiny))
  entropy = -jnp.sum(routing.router_probs * log_probs, axis=-1)
  zero = jnp.zeros((), jnp.float32)
  if record and dropped is None:
    dropped = jnp.zeros(routing.routes.expert_index.shape, jnp.bool_)
  fallback = routing.fallback
  return RoutingAux(
    load_balancing_loss=load_balancing_loss(routing.router_probs, load, mask),
    router_z_loss=router_z_loss(routing.router_logits, mask),
    expert_load=load,
    router_entropy=_mean(entropy, mask),
    dropped_fraction=zero if dropped is None else _mean(jnp.mean(dropped, axis=1), mask),
    fallback_fraction=zero if fallback is None else _mean(fallback.astype(jnp.float32), mask),
    routes=routing.routes if record else None,
    dropped=dropped if record else None,
  )


def _mean(values: Array, mask: Array | None) -> Array:
  """Returns the mean over tokens, of those in `mask`."""
  if mask is None:
    return jnp.mean(values, axis=0)
  weights = mask.astype(values.dtype)
  shaped = weights.reshape(weights.shape + (1,) * (values.ndim - 1))
  return jnp.sum(values * shaped, axis=0) / jnp.maximum(jnp.sum(weights), 1)
