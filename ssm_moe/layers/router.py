"""The router, its losses and its statistics. All arithmetic is float32."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from ssm_moe.shapes import Array, Bool, Float, Int


class Routing(struct.PyTreeNode):
  """Where each token goes.

  Attributes:
    router_logits: Of every expert.
    router_probs: Their softmax.
    expert_index: The chosen experts, likeliest first.
    combine_weights: Router probability of each, not renormalised over the chosen.
  """

  router_logits: Float[Array, 'T E']
  router_probs: Float[Array, 'T E']
  expert_index: Int[Array, 'T K']
  combine_weights: Float[Array, 'T K']


class RoutingAux(struct.PyTreeNode):
  """What a routed layer reports beside its output: losses without coefficient, and statistics.

  Attributes:
    load_balancing_loss: 1.0 at perfect balance.
    router_z_loss: Mean squared logsumexp of the logits.
    expert_load: Fraction of the assignments that each expert was chosen for; adds up to 1.
    router_entropy: Mean entropy of the router's probabilities, in nats.
    dropped_fraction: Assignments over capacity, of all assignments.
  """

  load_balancing_loss: Float[Array, '']
  router_z_loss: Float[Array, '']
  expert_load: Float[Array, 'E']
  router_entropy: Float[Array, '']
  dropped_fraction: Float[Array, '']


class Router(nn.Module):
  """Scores every expert for each token, and chooses top_k by softmax probability.

  p = softmax(x W_r);  chosen = TopK(p);  weights = p at the chosen.
  Equations 1-2 of Switch Transformers (https://arxiv.org/abs/2101.03961), as in both papers.

  Attributes:
    num_experts: E.
    top_k: K.
    kernel_init: Of W_r.
  """

  num_experts: int
  top_k: int
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x: Float[Array, 'T M']) -> Routing:
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(self.kernel_init, ('embed', 'router')),
      (x.shape[-1], self.num_experts),
      jnp.float32,
    )
    # HIGHEST: on GPU and TPU a float32 matmul would else round its inputs to 10 or 7 bits, and
    # near-ties would be decided by that rounding.
    router_logits = jnp.dot(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    router_probs = jax.nn.softmax(router_logits, axis=-1)
    combine_weights, expert_index = jax.lax.top_k(router_probs, self.top_k)
    return Routing(router_logits, router_probs, expert_index, combine_weights)


def expert_load(
  expert_index: Int[Array, 'T K'], num_experts: int, mask: Bool[Array, 'T'] | None = None
) -> Float[Array, 'E']:
  """Returns the fraction of assignments that chose each expert, over the tokens in `mask`."""
  chosen = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.float32).sum(axis=1)
  return _mean(chosen, mask) / expert_index.shape[1]


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
  routing: Routing, dropped_fraction: Float[Array, ''], mask: Bool[Array, 'T'] | None = None
) -> RoutingAux:
  """Returns the losses and statistics of a layer's decisions."""
  load = expert_load(routing.expert_index, routing.router_probs.shape[1], mask)
  log_probs = jax.nn.log_softmax(routing.router_logits, axis=-1)
  entropy = -jnp.sum(routing.router_probs * log_probs, axis=-1)
  return RoutingAux(
    load_balancing_loss=load_balancing_loss(routing.router_probs, load, mask),
    router_z_loss=router_z_loss(routing.router_logits, mask),
    expert_load=load,
    router_entropy=_mean(entropy, mask),
    dropped_fraction=dropped_fraction,
  )


def _mean(values: Array, mask: Array | None) -> Array:
  """Returns the mean over tokens, of those in `mask`."""
  if mask is None:
    return jnp.mean(values, axis=0)
  weights = mask.astype(values.dtype)
  shaped = weights.reshape(weights.shape + (1,) * (values.ndim - 1))
  return jnp.sum(values * shaped, axis=0) / jnp.maximum(jnp.sum(weights), 1)
