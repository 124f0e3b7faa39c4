"""Plans over eight devices equal a plan on one, and move no more than they must."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding

from ssm_moe import sharding
from ssm_moe.analysis import compiled
from ssm_moe.config import MeshConfig, RoutingConfig
from ssm_moe.layers import dispatch, mesh_dispatch
from ssm_moe.ops import implementation
from tests import tolerances

if jax.device_count() < 8:
  pytest.skip('needs eight devices', allow_module_level=True)

_TOKENS, _TOP_K, _EXPERTS, _IN, _INNER = 64, 2, 8, 16, 24
_ROWS = ('batch', None)
_FEED_FORWARD = [('expert', 'embed', 'branch', 'mlp'), ('expert', 'mlp', 'embed')]


def _config(kind, groups=1, **options):
  options |= {'dispatch': kind, 'router_groups': groups}
  return RoutingConfig(num_experts=_EXPERTS, top_k=_TOP_K, **options)


def _inputs(key, shapes):
  keys = jax.random.split(key, len(shapes) + 4)
  scores = jax.random.uniform(keys[0], (_TOKENS, _EXPERTS))
  expert_index = jax.lax.top_k(scores, _TOP_K)[1]
  x = jax.random.normal(keys[1], (_TOKENS, shapes[0][1]))
  weights = jax.random.uniform(keys[2], (_TOKENS, _TOP_K))
  dy = jax.random.normal(keys[3], (_TOKENS, shapes[-1][-1]))
  matrices = [jax.random.normal(k, shape) for k, shape in zip(keys[4:], shapes)]
  return expert_index, dy, x, weights, matrices


def _gated(rows):
  return jax.nn.relu(rows[:, 0]) * rows[:, 1]


_FEED_FORWARD_SHAPES = [(_EXPERTS, _IN, 2, _INNER), (_EXPERTS, _INNER, _IN)]


def _compile(mesh_sizes, config, inputs, axes, between, *, exchange=False, mask=None):
  """Returns the compiled function to the result, what was dropped and all gradients."""
  mesh = sharding.make_mesh(MeshConfig(**mesh_sizes), None if mesh_sizes else jax.devices()[:1])
  expert_index, dy, x, weights, matrices = inputs
  rows, *of_matrices = (
    NamedSharding(mesh, nn.logical_to_mesh_axes(names, sharding.RULES)) for names in (_ROWS, *axes)
  )

  def run(expert_index, dy, *arguments):
    def layer(x, weights, matrices):
      plan = mesh_dispatch.make_plan(
        expert_index, config, num_experts=_EXPERTS, exchange_tokens=exchange, mask=mask
      )
      return plan.apply(x, matrices, weights, between=between, axes=axes), plan.dropped

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      y, pull, dropped = jax.vjp(layer, *arguments, has_aux=True)
      return y, dropped, pull(dy)

  layouts = (rows, rows, rows, rows, of_matrices)
  arguments = jax.device_put((expert_index, dy, x, weights, matrices), layouts)
  run = jax.jit(run, in_shardings=layouts, out_shardings=(rows, rows, layouts[2:]))
  return run.lower(*arguments).compile(), arguments


def _check_equal_to_one_device(mesh_sizes, config, inputs, axes, between, **options):
  results = []
  for sizes in (mesh_sizes, {}):
    run, arguments = _compile(sizes, config, inputs, axes, between, **options)
    results.append(jax.tree.map(np.asarray, run(*arguments)))
  (y, dropped, gradients), (one_y, one_dropped, one_gradients) = results
  if config.dispatch == 'capacity':
    assert one_dropped.any()
    np.testing.assert_array_equal(dropped, one_dropped)
  tolerances.assert_close((y, gradients), (one_y, one_gradients), rtol=tolerances.FLOAT32_REORDERED)


_slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  ('mesh_sizes', 'kind', 'groups'),
  [
    _slow({'data': 8}, 'dropless', 1),
    ({'fsdp': 8}, 'dropless', 1),
    ({'fsdp': 4, 'data': 2}, 'capacity', 8),
    _slow({'fsdp': 8}, 'capacity', 2),  # a group on four devices
    _slow({'data': 2, 'fsdp': 2, 'tensor': 2}, 'dropless', 1),
    ({'fsdp': 2, 'expert': 2, 'tensor': 2}, 'capacity', 1),
    _slow({'tensor': 8}, 'capacity', 1),
  ],
)
def test_gathered_experts_equal_one_device(rng, mesh_sizes, kind, groups):
  inputs = _inputs(rng, _FEED_FORWARD_SHAPES)
  config = _config(kind, groups)
  _check_equal_to_one_device(mesh_sizes, config, inputs, _FEED_FORWARD, _gated)


@pytest.mark.parametrize(
  ('mesh_sizes', 'kind', 'groups'),
  [
    ({'expert': 4, 'fsdp': 2}, 'capacity', 16),
    _slow({'expert': 8}, 'dropless', 1),
    ({'expert': 2, 'data': 2, 'tensor': 2}, 'capacity', 2),  # dropless after the drops
    _slow({'expert': 4, 'fsdp': 2}, 'dropless', 1),
  ],
)
def test_exchanged_tokens_equal_one_device(rng, mesh_sizes, kind, groups):
  inputs = _inputs(rng, _FEED_FORWARD_SHAPES)
  config = _config(kind, groups)
  _check_equal_to_one_device(mesh_sizes, config, inputs, _FEED_FORWARD, _gated, exchange=True)


@pytest.mark.slow
def test_tokens_outside_the_mask_and_without_expert_go_nowhere(rng):
  expert_index, *others = _inputs(rng, _FEED_FORWARD_SHAPES)
  # Every third token has no expert, and the mask leaves out whole devices' tokens.
  expert_index = jnp.where((jnp.arange(_TOKENS) % 3 == 0)[:, None], _EXPERTS, expert_index)
  mask = jnp.arange(_TOKENS) % 32 < 24
  for groups in (1, 8):
    _check_equal_to_one_device(
      {'expert': 4, 'data': 2},
      _config('capacity', groups, capacity_factor=0.5),
      (expert_index, *others),
      _FEED_FORWARD,
      _gated,
      exchange=True,
      mask=mask,
    )


def test_uneven_routing_takes_more_rounds_and_loses_nothing(rng):
  # All first choices are of experts 0 and 1, all on the first device: four times an even share.
  expert_index, *others = _inputs(rng, _FEED_FORWARD_SHAPES)
  expert_index = jnp.stack([jnp.arange(_TOKENS) % 2, jnp.arange(_TOKENS) % 2], axis=1)
  config = _config('dropless')
  _check_equal_to_one_device(
    {'expert': 4, 'data': 2},
    config,
    (expert_index, *others),
    _FEED_FORWARD,
    _gated,
    exchange=True,
  )


@pytest.mark.parametrize(
  'axes',
  [
    # The first product would be a sum over devices, and the next one is not linear in it.
    [('expert', 'inner', 'mlp'), ('expert', 'mlp', 'embed')],
    _slow([('expert', 'inner', 'rank'), ('expert', 'rank', 'inner')]),
  ],
)
def test_bottlenecks_are_whole_where_their_sum_is_not_linear(rng, axes):
  shapes = [(_EXPERTS, _IN, _INNER), (_EXPERTS, _INNER, _IN)]
  inputs = _inputs(rng, shapes)
  config = _config('dropless')
  _check_equal_to_one_device({'fsdp': 4, 'tensor': 2}, config, inputs, axes, jax.nn.relu)


def test_what_does_not_divide_is_planned_for_all_devices_together(rng):
  # Three router groups over two devices: neither number divides the other.
  expert_index, dy, x, weights, matrices = _inputs(rng, _FEED_FORWARD_SHAPES)
  inputs = (expert_index[:48], dy[:48], x[:48], weights[:48], matrices)
  config = _config('capacity', 3)
  mesh = sharding.make_mesh(MeshConfig(data=2, tensor=4))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    plan = mesh_dispatch.make_plan(inputs[0], config, num_experts=_EXPERTS)
  assert isinstance(plan, dispatch.SparsePlan)
  _check_equal_to_one_device({'data': 2, 'tensor': 4}, config, inputs, _FEED_FORWARD, _gated)


def test_devices_sort_their_own_tokens_and_gather_matrices_only(rng):
  inputs = _inputs(rng, _FEED_FORWARD_SHAPES)
  run, _ = _compile({'fsdp': 8}, _config('dropless'), inputs, _FEED_FORWARD, _gated)
  text = run.as_text()
  gathered = [c for c in compiled.read_step(text).collectives if c.kind == 'all-gather']
  assert {array.shape for c in gathered for array in c.results} == {*_FEED_FORWARD_SHAPES}
  sorted_sizes = re.findall(r'= \(?s32\[(\d+)\].* sort\(', text)
  assert {*map(int, sorted_sizes)} == {_TOKENS * _TOP_K // 8}


def test_exchange_sends_tokens_and_no_expert(rng):
  inputs = _inputs(rng, _FEED_FORWARD_SHAPES)
  config = _config('capacity', 8)
  run, _ = _compile({'expert': 8}, config, inputs, _FEED_FORWARD, _gated, exchange=True)
  collectives = compiled.read_step(run.as_text()).collectives
  assert {c.kind for c in collectives} == {'all-to-all'}
  # There and back, forward and backward: the rows of every expert that a device has tokens for.
  assert len(collectives) == 4
  rows = _EXPERTS * dispatch.capacity_of(config, _TOKENS)
  assert {c.operand_bytes for c in collectives} == {rows * _IN * 4}


@pytest.mark.parametrize('mesh_sizes', [{'fsdp': 8}, {'expert': 2, 'data': 2, 'tensor': 2}])
def test_kernels_can_run_on_each_device(rng, mesh_sizes):
  """They take the place of loops only where the arrays are known to be on one device."""
  seen = []

  def between(rows):
    seen.append(implementation.on_one_device())
    return _gated(rows)

  inputs = _inputs(rng, _FEED_FORWARD_SHAPES)
  mesh = sharding.make_mesh(MeshConfig(**mesh_sizes))
  expert_index, _, x, weights, matrices = inputs

  def layer(x, weights, matrices):
    plan = mesh_dispatch.make_plan(expert_index, _config('dropless'), num_experts=_EXPERTS)
    return plan.apply(x, matrices, weights, between=between, axes=_FEED_FORWARD)

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    jax.eval_shape(layer, x, weights, matrices)
  assert seen
  assert all(seen)
