"""A model whose sequences are split over devices equals itself on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from ssm_moe import sharding
from ssm_moe.analysis import compiled
from ssm_moe.config import (
  AttentionConfig,
  Mamba2Config,
  MambaConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  RoMConfig,
)
from ssm_moe.models import lm
from tests import tolerances

if jax.device_count() < 8:
  pytest.skip('needs eight devices', allow_module_level=True)

_ROWS, _LENGTH = 4, 32

_MODELS = {
  'mamba': {},
  'mamba2': {'pattern': 'S', 'mamba2': Mamba2Config(head_dim=8, d_state=4)},
  'rom': {'mamba': MambaConfig(d_state=4, rom=RoMConfig(kind='shared', num_experts=4))},
  'dense_output': {
    'mamba': MambaConfig(
      d_state=4,
      rom=RoMConfig(kind='shared', num_experts=4, expert_projections=('conv', 'gate')),
    )
  },
  # A router group is half a row, which lies on several devices.
  'moe_mamba': {'pattern': 'M E', 'moe': MoEConfig(num_experts=4, router_groups=8)},
  'moe_one_group': {'pattern': 'M E', 'moe': MoEConfig(num_experts=4, top_k=2)},
  'dropless': {'pattern': 'M E', 'moe': MoEConfig(num_experts=4, dispatch='dropless')},
  'experts_choose': {
    'pattern': 'M E',
    'moe': MoEConfig(num_experts=4, router_groups=8, choice='expert', allow_acausal=True),
  },
  'each_projection': {
    'mamba': MambaConfig(
      d_state=4,
      rom=RoMConfig(
        kind='independent',
        num_experts=4,
        dispatch='capacity',
        router_groups=16,
        weight_at='each',
        expert_projections=('conv', 'gate', 'x', 'out'),
      ),
    )
  },
  'hybrid': {
    'pattern': 'S+E W',
    'mamba2': Mamba2Config(
      head_dim=8, d_state=4, num_groups=2, rom=RoMConfig(kind='shared', num_experts=4)
    ),
    'attention': AttentionConfig(num_heads=2, window=4, cache_length=16),
    'moe': MoEConfig(num_experts=4, dispatch='dropless', num_shared_experts=1),
  },
}

_MESHES = {
  'sequence': {'sequence': 8},
  'product': {'sequence': 2, 'tensor': 2, 'data': 2},
  'experts': {'sequence': 2, 'expert': 2, 'fsdp': 2},
}

_slow = functools.partial(pytest.param, marks=pytest.mark.slow)
_extended = functools.partial(pytest.param, marks=pytest.mark.extended)


def _config(name):
  shared = {'vocab_size': 32, 'd_model': 16, 'num_periods': 1, 'mamba': MambaConfig(d_state=4)}
  return ModelConfig(**(shared | _MODELS[name]))


def _run(config, mesh, run):
  """Returns `run(net, params, tokens, ids)`, jitted for the mesh, and its arguments' shapes."""
  net = lm.LM(config, record_routes=True)

  def on_mesh(params, *arguments):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return run(net, params, *arguments)

  tokens = jnp.zeros((1, _ROWS * _LENGTH), jnp.int32)
  boxed = jax.eval_shape(lambda key: lm.LM(config).init(key, tokens), jax.random.key(0))
  layouts = sharding.tree_shardings(mesh, boxed)
  init = jax.jit(lambda key: nn.unbox(lm.LM(config).init(key, tokens)), out_shardings=layouts)
  return jax.jit(on_mesh), init, layouts


def _loss_and_gradients(net, params, tokens, ids, state):
  def loss(params):
    output = net.apply(params, tokens, segment_ids=ids, state=state)
    total = jnp.sum(jnp.sin(output.hidden)) + lm.auxiliary_loss(output.aux, net.config)
    return total, (output.hidden, output.aux, output.state)

  return jax.value_and_grad(loss, has_aux=True)(params)


def _results(name, mesh_sizes):
  config = _config(name)
  mesh = sharding.make_mesh(MeshConfig(**mesh_sizes), None if mesh_sizes else jax.devices()[:1])
  run, init, _ = _run(config, mesh, _loss_and_gradients)
  tokens = jax.random.randint(jax.random.key(1), (_ROWS, _LENGTH), 0, 32)
  # Documents end inside of pieces and between two.
  ends = jnp.array([[5, 21], [8, 9], [16, 31], [4, 12]])
  ids = jnp.sum(jnp.arange(_LENGTH)[None, :, None] >= ends[:, None, :], axis=2)
  layout = sharding.token_sharding(mesh)
  state = jax.tree.map(
    lambda leaf: leaf + jnp.full((), 0.1).astype(leaf.dtype), lm.initial_state(config, _ROWS)
  )
  state = jax.device_put(state, sharding.carried_state_sharding(mesh))
  given = (jax.device_put(tokens, layout), jax.device_put(ids, layout), state)
  return jax.device_get(run(init(jax.random.key(0)), *given))


@pytest.mark.parametrize(
  ('name', 'mesh'),
  [
    _slow('rom', 'product'),
    _slow('moe_mamba', 'sequence'),
    _slow('mamba2', 'sequence'),
    *(
      _extended(name, mesh)
      for name in _MODELS
      for mesh in _MESHES
      if (name, mesh) not in (('rom', 'product'), ('moe_mamba', 'sequence'), ('mamba2', 'sequence'))
    ),
  ],
)
def test_devices_equal_one(name, mesh):
  """Loss, gradients, output, state, and every token's experts and drops."""
  spread, single = (_results(name, sizes) for sizes in (_MESHES[mesh], {}))
  tolerances.assert_close(spread, single, rtol=tolerances.FLOAT32_REORDERED)


@pytest.mark.parametrize(
  'name', [_slow('rom'), *map(_extended, ('mamba', 'mamba2', 'moe_mamba', 'moe_one_group'))]
)
def test_what_layers_send_does_not_depend_on_the_length(name):
  config = _config(name)
  if name == 'moe_one_group':  # top_k of several is left to the compiler, which gathers scores
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, top_k=1))
  mesh = sharding.make_mesh(MeshConfig(sequence=8))

  def gradients(net, params, tokens, ids):
    return _loss_and_gradients(net, params, tokens, ids, None)[1]

  run, init, layouts = _run(config, mesh, gradients)
  sent = []
  for length in (32, 64):
    tokens = jax.ShapeDtypeStruct(
      (_ROWS, length), jnp.int32, sharding=sharding.token_sharding(mesh)
    )
    params = jax.tree.map(
      lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
      jax.eval_shape(init, jax.random.key(0)),
      layouts,
    )
    step = compiled.read_step(run.lower(params, tokens, tokens).compile().as_text())
    sent.append(sorted((c.kind, c.times, c.operand_bytes) for c in step.collectives))
  assert sent[0] == sent[1]
  assert sent[0]
