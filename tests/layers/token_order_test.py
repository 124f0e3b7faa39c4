"""Tokens of a batch whose time is split: each device keeps its own, and drops are those of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe import sharding
from ssm_moe.analysis import compiled
from ssm_moe.config import MeshConfig, RoutingConfig
from ssm_moe.layers import mesh_dispatch
from ssm_moe.layers.token_order import TokenOrder, token_order

if jax.device_count() < 8:
  pytest.skip('needs eight devices', allow_module_level=True)

_ROWS, _LENGTH, _EXPERTS = 4, 24, 4
# A device has two rows, and of each 6 tokens that follow each other.
_MESH = sharding.make_mesh(MeshConfig(data=2, sequence=4), jax.devices()[:8])


def _on_mesh(function, *arguments):
  def traced(*arguments):
    with jax.sharding.use_abstract_mesh(_MESH.abstract_mesh):
      return function(*arguments)

  placed = jax.device_put(arguments, sharding.token_sharding(_MESH))
  return jax.jit(traced).lower(*placed).compile(), placed


def test_a_device_keeps_its_tokens():
  x = jnp.arange(_ROWS * _LENGTH * 3).reshape(_ROWS, _LENGTH, 3)

  def there_and_back(x):
    order = token_order(_ROWS, _LENGTH)
    tokens = order.flatten(x)
    return tokens, order.unflatten(2 * tokens), order.by_rows(tokens)

  run, placed = _on_mesh(there_and_back, x)
  tokens, doubled, by_rows = run(*placed)
  np.testing.assert_array_equal(doubled, 2 * x)
  np.testing.assert_array_equal(by_rows, x.reshape(-1, 3))
  assert tokens.sharding.shard_shape(tokens.shape) == (12, 3)
  np.testing.assert_array_equal(tokens.addressable_shards[1].data, x[:2, 6:12].reshape(-1, 3))
  alone, placed = _on_mesh(lambda x: token_order(_ROWS, _LENGTH).flatten(x), x)
  assert compiled.read_step(alone.as_text()).collectives == ()


@pytest.mark.parametrize(('batch', 'length'), [(4, 22), (3, 24), (4, 1)])
def test_what_does_not_divide_goes_row_after_row(batch, length):
  with jax.sharding.use_abstract_mesh(_MESH.abstract_mesh):
    assert token_order(batch, length) == TokenOrder(batch, length, pieces=1)
  assert token_order(_ROWS, _LENGTH) == TokenOrder(_ROWS, _LENGTH, pieces=1)  # without a mesh


@pytest.mark.parametrize(
  'groups',
  [
    pytest.param(1, id='all_rows'),
    pytest.param(8, id='two_runs'),
    pytest.param(32, id='half_a_run'),
    pytest.param(24, id='neither_multiple_nor_divisor_of_a_run'),
    *(pytest.param(g, marks=pytest.mark.extended) for g in (2, 4, 16, 48)),
  ],
)
def test_drops_are_those_of_one_device(groups):
  keys = jax.random.split(jax.random.key(0), 3)
  scores = jax.random.uniform(keys[0], (_ROWS, _LENGTH, _EXPERTS))
  expert_index = jax.lax.top_k(scores, 2)[1]
  mask = jax.random.uniform(keys[1], (_ROWS, _LENGTH)) < 0.9
  x = jax.random.normal(keys[2], (_ROWS, _LENGTH, 3))
  factors = jnp.arange(1.0, 1 + _EXPERTS)[:, None, None] * jnp.eye(3)[None]
  config = RoutingConfig(
    num_experts=_EXPERTS, top_k=2, dispatch='capacity', router_groups=groups, capacity_factor=0.8
  )

  def route(expert_index, mask, x):
    order = token_order(_ROWS, _LENGTH)
    plan = mesh_dispatch.make_plan(
      order.flatten(expert_index),
      config,
      num_experts=_EXPERTS,
      mask=order.flatten(mask),
      order=order,
    )
    y = plan.apply(order.flatten(x), [factors], axes=[('expert', 'embed', 'mlp')])
    return order.by_rows(plan.dropped), order.unflatten(y)

  dropped, y = jax.jit(route)(expert_index, mask, x)
  assert dropped.any()
  run, placed = _on_mesh(route, expert_index, mask, x)
  spread, y_spread = run(*placed)
  np.testing.assert_array_equal(spread, dropped)
  np.testing.assert_allclose(y_spread, y, rtol=1e-5)
