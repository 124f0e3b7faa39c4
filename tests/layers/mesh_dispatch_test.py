"""Plans over eight devices equal a plan on one, and move no more than they must."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from ssm_moe import sharding
from ssm_moe.analysis import compiled
from ssm_moe.config import MeshConfig
from ssm_moe.layers import dispatch, mesh_dispatch
from ssm_moe.ops import implementation
from tests.layers import mesh_cases as cases

if jax.device_count() < 8:
  pytest.skip('needs eight devices', allow_module_level=True)

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
  inputs = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  config = cases.routing(kind, groups)
  cases.check_equal_to_one_device(mesh_sizes, config, inputs, cases.FEED_FORWARD, cases.gated)


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
  inputs = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  config = cases.routing(kind, groups)
  cases.check_equal_to_one_device(
    mesh_sizes, config, inputs, cases.FEED_FORWARD, cases.gated, exchange='padded'
  )


@pytest.mark.slow
def test_tokens_outside_the_mask_and_without_expert_go_nowhere(rng):
  expert_index, *others = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  # Every third token has no expert, and the mask leaves out whole devices' tokens.
  expert_index = jnp.where(
    (jnp.arange(cases.TOKENS) % 3 == 0)[:, None], cases.EXPERTS, expert_index
  )
  mask = jnp.arange(cases.TOKENS) % 32 < 24
  for groups in (1, 8):
    cases.check_equal_to_one_device(
      {'expert': 4, 'data': 2},
      cases.routing('capacity', groups, capacity_factor=0.5),
      (expert_index, *others),
      cases.FEED_FORWARD,
      cases.gated,
      exchange='padded',
      mask=mask,
    )


def test_uneven_routing_takes_more_rounds_and_loses_nothing(rng):
  # All first choices are of experts 0 and 1, all on the first device: four times an even share.
  expert_index, *others = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  expert_index = jnp.stack([jnp.arange(cases.TOKENS) % 2, jnp.arange(cases.TOKENS) % 2], axis=1)
  config = cases.routing('dropless')
  cases.check_equal_to_one_device(
    {'expert': 4, 'data': 2},
    config,
    (expert_index, *others),
    cases.FEED_FORWARD,
    cases.gated,
    exchange='padded',
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
  shapes = [(cases.EXPERTS, cases.INPUTS, cases.INNER), (cases.EXPERTS, cases.INNER, cases.INPUTS)]
  inputs = cases.inputs_of(rng, shapes)
  config = cases.routing('dropless')
  cases.check_equal_to_one_device({'fsdp': 4, 'tensor': 2}, config, inputs, axes, jax.nn.relu)


def test_what_does_not_divide_is_planned_for_all_devices_together(rng):
  # Three router groups over two devices: neither number divides the other.
  expert_index, dy, x, weights, matrices = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  inputs = (expert_index[:48], dy[:48], x[:48], weights[:48], matrices)
  config = cases.routing('capacity', 3)
  mesh = sharding.make_mesh(MeshConfig(data=2, tensor=4))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    plan = mesh_dispatch.make_plan(inputs[0], config, num_experts=cases.EXPERTS)
  assert isinstance(plan, dispatch.SparsePlan)
  cases.check_equal_to_one_device(
    {'data': 2, 'tensor': 4}, config, inputs, cases.FEED_FORWARD, cases.gated
  )


def test_devices_sort_their_own_tokens_and_gather_matrices_only(rng):
  inputs = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  run, _ = cases.compile_layer(
    {'fsdp': 8}, cases.routing('dropless'), inputs, cases.FEED_FORWARD, cases.gated
  )
  text = run.as_text()
  gathered = [c for c in compiled.read_step(text).collectives if c.kind == 'all-gather']
  assert {array.shape for c in gathered for array in c.results} == {*cases.FEED_FORWARD_SHAPES}
  sorted_sizes = re.findall(r'= \(?s32\[(\d+)\].* sort\(', text)
  assert {*map(int, sorted_sizes)} == {cases.TOKENS * cases.TOP_K // 8}


def test_exchange_sends_tokens_and_no_expert(rng):
  inputs = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  config = cases.routing('capacity', 8)
  run, _ = cases.compile_layer(
    {'expert': 8}, config, inputs, cases.FEED_FORWARD, cases.gated, exchange='padded'
  )
  collectives = compiled.read_step(run.as_text()).collectives
  assert {c.kind for c in collectives} == {'all-to-all'}
  # There and back, forward and backward: the rows of every expert that a device has tokens for.
  assert len(collectives) == 4
  rows = cases.EXPERTS * dispatch.capacity_of(config, cases.TOKENS)
  assert {c.operand_bytes for c in collectives} == {rows * cases.INPUTS * 4}


@pytest.mark.parametrize('mesh_sizes', [{'fsdp': 8}, {'expert': 2, 'data': 2, 'tensor': 2}])
def test_kernels_can_run_on_each_device(rng, mesh_sizes):
  """They take the place of loops only where the arrays are known to be on one device."""
  seen = []

  def between(rows):
    seen.append(implementation.on_one_device())
    return cases.gated(rows)

  inputs = cases.inputs_of(rng, cases.FEED_FORWARD_SHAPES)
  mesh = sharding.make_mesh(MeshConfig(**mesh_sizes))
  expert_index, _, x, weights, matrices = inputs

  def layer(x, weights, matrices):
    plan = mesh_dispatch.make_plan(
      expert_index, cases.routing('dropless'), num_experts=cases.EXPERTS
    )
    return plan.apply(x, matrices, weights, between=between, axes=cases.FEED_FORWARD)

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    jax.eval_shape(layer, x, weights, matrices)
  assert seen
  assert all(seen)
