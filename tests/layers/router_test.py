"""Routing numbers worked out by hand."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe.config import RoutingConfig
from ssm_moe.layers import router as router_lib
from tests import tolerances


def _router(kernel, x, bias=None, **fields):
  kernel = jnp.asarray(kernel, jnp.float32)
  config = RoutingConfig(num_experts=kernel.shape[1], **fields)
  params = {'kernel': kernel} | ({} if bias is None else {'selection_bias': jnp.asarray(bias)})
  return router_lib.Router(config, lambda *_: kernel).apply({'params': params}, x)


def test_hand_worked_routes():
  # logits = log of (1, 2, 5): probabilities 1/8, 2/8, 5/8.
  kernel, x = [[0, math.log(2), math.log(5)]], jnp.ones((1, 1))
  routing = _router(kernel, x, top_k=2)
  np.testing.assert_array_equal(routing.routes.expert_index, [[2, 1]])
  np.testing.assert_allclose(routing.routes.combine_weights, [[5 / 8, 2 / 8]], rtol=1e-6)
  np.testing.assert_allclose(routing.router_probs, [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-6)
  routing = _router(kernel, x, top_k=2, weights='renormalized')
  np.testing.assert_allclose(routing.routes.combine_weights, [[5 / 7, 2 / 7]], rtol=1e-6)


def test_hand_worked_sigmoid_scores():
  # sigmoid(log 1, log 2, log 5) = 1/2, 2/3, 5/6: they add up to 2.
  kernel, x = [[0, math.log(2), math.log(5)]], jnp.ones((1, 1))
  routing = _router(kernel, x, top_k=2, score='sigmoid')
  np.testing.assert_array_equal(routing.routes.expert_index, [[2, 1]])
  np.testing.assert_allclose(routing.routes.combine_weights, [[5 / 6, 2 / 3]], rtol=1e-6)
  np.testing.assert_allclose(routing.router_probs, [[1 / 4, 1 / 3, 5 / 12]], rtol=1e-6)


def test_the_bias_selects_and_does_not_weigh():
  kernel, x = [[0, math.log(2), math.log(5)]], jnp.ones((1, 1))
  settings = {'top_k': 1, 'score': 'sigmoid', 'selection_bias_rate': 0.1}
  routing = _router(kernel, x, bias=[0.4, 0.0, 0.0], **settings)  # 0.9 against 5/6
  np.testing.assert_array_equal(routing.routes.expert_index, [[0]])
  np.testing.assert_allclose(routing.routes.combine_weights, [[1 / 2]], rtol=1e-6)

  def loss(params):
    config = RoutingConfig(num_experts=3, **settings)
    router = router_lib.Router(config, nn.initializers.zeros)
    return jnp.sum(router.apply({'params': params}, x).routes.combine_weights)

  gradient = jax.grad(loss)({'kernel': jnp.array(kernel), 'selection_bias': jnp.zeros(3)})
  np.testing.assert_array_equal(gradient['selection_bias'], 0)
  assert np.abs(gradient['kernel']).max() > 0


def test_the_bias_moves_against_the_load():
  # Shares of 1/4: the first has more, the second has less, the others have theirs.
  load = jnp.array([[0.5, 0.0, 0.25, 0.25]])
  moved = router_lib.move_selection_bias(jnp.ones((1, 4)), load, rate=0.01)
  np.testing.assert_allclose(moved, [[0.99, 1.01, 1.0, 1.0]], rtol=1e-6)


def test_routes_are_replayed():
  x = jnp.ones((1, 1))
  routes = router_lib.Routes(jnp.array([[0]]), jnp.array([[0.3]]))
  config = RoutingConfig(num_experts=3)
  params = {'kernel': jnp.array([[0.0, 1.0, 2.0]])}
  router = router_lib.Router(config, nn.initializers.zeros)
  routing = router.apply({'params': params}, x, routes=routes)
  chex.assert_trees_all_equal(routing.routes, routes)


def test_an_undecided_token_is_left_to_the_router():
  x = jnp.eye(3)
  kernel = jnp.array([[5.0, 0.0], [0.0, 5.0], [0.0, 0.1]])  # sure of 0, sure of 1, not sure
  undecided = router_lib.Routes.undecided((3, 1))
  given = jax.tree.map(lambda u, g: u.at[0].set(g), undecided, router_lib.Routes([1], [0.3]))
  own = _router(kernel, x, fallback_threshold=0.6)
  routing = router_lib.Router(
    RoutingConfig(num_experts=2, fallback_threshold=0.6), nn.initializers.zeros
  ).apply({'params': {'kernel': kernel}}, x, routes=given)
  np.testing.assert_array_equal(routing.routes.expert_index, [[1], [1], [2]])
  np.testing.assert_allclose(routing.routes.combine_weights[0], 0.3)
  chex.assert_trees_all_equal(routing.routes.combine_weights[1:], own.routes.combine_weights[1:])
  np.testing.assert_array_equal(routing.fallback, [False, False, True])


def test_a_token_below_the_threshold_takes_the_fallback():
  kernel = [[0, math.log(2), math.log(5)], [0, 0, 0]]
  x = jnp.eye(2)  # best probabilities 5/8 and 1/3
  routing = _router(kernel, x, fallback_threshold=0.5)
  np.testing.assert_array_equal(routing.routes.expert_index, [[2], [3]])
  np.testing.assert_array_equal(routing.fallback, [False, True])
  aux = router_lib.routing_aux(routing, None)
  assert aux.fallback_fraction == 0.5
  np.testing.assert_array_equal(aux.expert_load, [0, 0, 1])  # of what went to experts


def test_arithmetic_is_float32_for_bfloat16_inputs():
  # In bfloat16 the product would be 1.
  routing = _router([[1.001, 0.0]], jnp.ones((1, 1), jnp.bfloat16))
  assert routing.router_logits.dtype == jnp.float32
  assert routing.routes.combine_weights.dtype == jnp.float32
  np.testing.assert_allclose(routing.router_logits[0, 0], 1.001, rtol=1e-6)


@pytest.mark.parametrize('top_k', [1, 2])
def test_weights_are_what_top_k_takes_with_its_gradient(rng, top_k):
  scores = jax.nn.softmax(jax.random.normal(rng, (8, 3)))
  taken, pull = jax.vjp(lambda s: router_lib._take(s, router_lib._best(s, top_k)), scores)
  best, pull_best = jax.vjp(lambda s: jax.lax.top_k(s, top_k)[0], scores)
  chex.assert_trees_all_equal((taken, pull(taken)), (best, pull_best(best)))


@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_load_balancing_loss_is_one_at_perfect_balance(top_k):
  num_experts = 8
  probs = jnp.full((num_experts, num_experts), 1 / num_experts)
  # Token t takes the experts t, t + 1, ...: every expert is taken top_k times.
  index = (jnp.arange(num_experts)[:, None] + jnp.arange(top_k)[None, :]) % num_experts
  load = router_lib.expert_load(index, num_experts)
  np.testing.assert_allclose(load, np.full(num_experts, 1 / num_experts), rtol=1e-6)
  np.testing.assert_allclose(router_lib.load_balancing_loss(probs, load), 1.0, rtol=1e-6)


def test_load_balancing_loss_by_hand():
  # Two of three tokens take expert 0: f = (2/3, 1/3). P = mean of the rows = (0.7, 0.3).
  probs = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
  load = router_lib.expert_load(jnp.array([[0], [0], [1]]), 2)
  expected = 2 * (2 / 3 * 0.7 + 1 / 3 * 0.3)
  np.testing.assert_allclose(router_lib.load_balancing_loss(probs, load), expected, rtol=1e-6)


def test_router_z_loss_at_uniform_routing():
  # All logits 0: logsumexp = log E.
  loss = router_lib.router_z_loss(jnp.zeros((5, 8)))
  np.testing.assert_allclose(loss, math.log(8) ** 2, rtol=1e-6)


def test_entropy_at_uniform_and_at_certain_routing():
  aux = _aux(jnp.zeros((3, 4)))
  np.testing.assert_allclose(aux.router_entropy, math.log(4), rtol=1e-6)
  aux = _aux(jnp.array([[100.0, 0, 0, 0]]))
  np.testing.assert_allclose(aux.router_entropy, 0, atol=1e-6)


def _aux(logits, mask=None):
  probs = jax.nn.softmax(logits)
  weights, index = jax.lax.top_k(probs, 1)
  routing = router_lib.Routing(router_lib.Routes(index, weights), logits, probs)
  return router_lib.routing_aux(routing, None, mask)


def test_masked_tokens_change_nothing():
  keys = jax.random.split(jax.random.key(3), 2)
  logits = jax.random.normal(keys[0], (10, 4))
  noise = 10 * jax.random.normal(keys[1], (10, 4))
  mask = jnp.arange(10) < 6
  masked = _aux(jnp.where(mask[:, None], logits, noise), mask)
  tolerances.assert_close(masked, _aux(logits[:6]), rtol=tolerances.FLOAT32_REORDERED)


def test_uniform_weights_are_shares_with_the_gradient_of_the_score():
  kernel, x = jnp.array([[0.0, 0.3, -0.2, 0.1]]), jnp.array([[0.7], [-1.3]])

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def weights_and_gradient(weights, top_k):
    def total(kernel):
      combined = _router(kernel, x, weights=weights, top_k=top_k).routes.combine_weights
      return jnp.sum(combined[:, -1]), combined

    gradient, combined = jax.grad(total, has_aux=True)(kernel)
    return combined, gradient

  for top_k in (1, 3):
    combined, gradient = weights_and_gradient('uniform', top_k)
    np.testing.assert_array_equal(combined, np.float32(1 / top_k))
    np.testing.assert_array_equal(gradient, weights_and_gradient('raw', top_k)[1])
