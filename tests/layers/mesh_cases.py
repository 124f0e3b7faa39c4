"""A routed layer over eight devices beside the same on one."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from ssm_moe import sharding
from ssm_moe.config import MeshConfig, RoutingConfig
from ssm_moe.layers import mesh_dispatch
from tests import tolerances

TOKENS, TOP_K, EXPERTS, INPUTS, INNER = 64, 2, 8, 16, 24
_ROWS = ('batch', None)
FEED_FORWARD = [('expert', 'embed', 'branch', 'mlp'), ('expert', 'mlp', 'embed')]


def routing(kind, groups=1, **options):
  options |= {'dispatch': kind, 'router_groups': groups}
  return RoutingConfig(num_experts=EXPERTS, top_k=TOP_K, **options)


def inputs_of(key, shapes):
  keys = jax.random.split(key, len(shapes) + 4)
  scores = jax.random.uniform(keys[0], (TOKENS, EXPERTS))
  expert_index = jax.lax.top_k(scores, TOP_K)[1]
  x = jax.random.normal(keys[1], (TOKENS, shapes[0][1]))
  weights = jax.random.uniform(keys[2], (TOKENS, TOP_K))
  dy = jax.random.normal(keys[3], (TOKENS, shapes[-1][-1]))
  matrices = [jax.random.normal(k, shape) for k, shape in zip(keys[4:], shapes)]
  return expert_index, dy, x, weights, matrices


def gated(rows):
  return jax.nn.relu(rows[:, 0]) * rows[:, 1]


FEED_FORWARD_SHAPES = [(EXPERTS, INPUTS, 2, INNER), (EXPERTS, INNER, INPUTS)]


def compile_layer(mesh_sizes, config, inputs, axes, between, *, exchange=None, mask=None):
  """Returns the compiled function to the result, what was dropped and all gradients."""
  mesh = sharding.make_mesh(MeshConfig(**mesh_sizes), None if mesh_sizes else jax.devices()[:1])
  expert_index, dy, x, weights, matrices = inputs
  rows, *of_matrices = (
    NamedSharding(mesh, sharding.spec_of(mesh, names, array.shape))
    for names, array in zip((_ROWS, *axes), (x, *matrices))
  )

  def run(expert_index, dy, *arguments):
    def layer(x, weights, matrices):
      plan = mesh_dispatch.make_plan(
        expert_index, config, num_experts=EXPERTS, exchange=exchange, mask=mask
      )
      return plan.apply(x, matrices, weights, between=between, axes=axes), plan.dropped

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      y, pull, dropped = jax.vjp(layer, *arguments, has_aux=True)
      return y, dropped, pull(dy)

  layouts = (rows, rows, rows, rows, of_matrices)
  arguments = jax.device_put((expert_index, dy, x, weights, matrices), layouts)
  run = jax.jit(run, in_shardings=layouts, out_shardings=(rows, rows, layouts[2:]))
  return run.lower(*arguments).compile(), arguments


def check_equal_to_one_device(mesh_sizes, config, inputs, axes, between, **options):
  results = []
  for sizes in (mesh_sizes, {}):
    run, arguments = compile_layer(sizes, config, inputs, axes, between, **options)
    results.append(jax.tree.map(np.asarray, run(*arguments)))
  (y, dropped, gradients), (one_y, one_dropped, one_gradients) = results
  if config.dispatch == 'capacity':
    assert one_dropped.any()
    np.testing.assert_array_equal(dropped, one_dropped)
  tolerances.assert_close((y, gradients), (one_y, one_gradients), rtol=tolerances.FLOAT32_REORDERED)


def check_exchanged(mesh_sizes, config, inputs, exchange='padded', **options):
  """Of a gated feed-forward layer whose tokens go to their experts."""
  check_equal_to_one_device(
    mesh_sizes, config, inputs, FEED_FORWARD, gated, exchange=exchange, **options
  )
