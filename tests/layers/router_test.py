"""Routing numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.layers import router as router_lib
from tests import tolerances


def _router(kernel, top_k, x):
  kernel = jnp.asarray(kernel, jnp.float32)
  router = router_lib.Router(kernel.shape[1], top_k, lambda *_: kernel)
  return router.init_with_output(jax.random.key(0), x)[0]


def test_hand_worked_routes():
  # logits = log of (1, 2, 5): probabilities 1/8, 2/8, 5/8.
  routing = _router([[0, math.log(2), math.log(5)]], 2, jnp.ones((1, 1)))
  np.testing.assert_array_equal(routing.expert_index, [[2, 1]])
  np.testing.assert_allclose(routing.combine_weights, [[5 / 8, 2 / 8]], rtol=1e-6)
  np.testing.assert_allclose(routing.router_probs, [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-6)


def test_arithmetic_is_float32_for_bfloat16_inputs():
  routing = _router([[1.0, 0.0]], 1, jnp.ones((1, 1), jnp.bfloat16))
  assert routing.router_logits.dtype == jnp.float32
  assert routing.combine_weights.dtype == jnp.float32


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
  routing = router_lib.Routing(logits, probs, index, weights)
  return router_lib.routing_aux(routing, jnp.zeros(()), mask)


def test_masked_tokens_change_nothing():
  keys = jax.random.split(jax.random.key(3), 2)
  logits = jax.random.normal(keys[0], (10, 4))
  noise = 10 * jax.random.normal(keys[1], (10, 4))
  mask = jnp.arange(10) < 6
  masked = _aux(jnp.where(mask[:, None], logits, noise), mask)
  tolerances.assert_close(masked, _aux(logits[:6]), rtol=tolerances.FLOAT32_REORDERED)
