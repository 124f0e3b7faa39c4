import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ssm_moe import sharding
from ssm_moe.config import MeshConfig
from ssm_moe.ops import implementation as implementation_lib
from ssm_moe.training.losses import cross_entropy_sum
from tests import gpu, tolerances

_BATCH, _LENGTH, _D_MODEL, _VOCAB = 3, 10, 8, 17


def _inputs(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(5), 4)
  hidden = jax.random.normal(keys[0], (_BATCH, _LENGTH, _D_MODEL)).astype(dtype)
  head = jax.random.normal(keys[1], (_D_MODEL, _VOCAB))
  targets = jax.random.randint(keys[2], (_BATCH, _LENGTH), 0, _VOCAB)
  weights = (jax.random.uniform(keys[3], (_BATCH, _LENGTH)) < 0.7).astype(jnp.float32)
  return hidden, head, targets, weights


def _whole(hidden, head, targets, weights):
  logits = jnp.einsum('blm,mv->blv', hidden, head)
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  return -jnp.sum(chosen * weights)


@pytest.mark.parametrize(
  ('chunk', 'platform'), [(1, 'cpu'), (9, 'cpu'), (12, 'cpu'), (30, 'gpu'), (1000, 'gpu')]
)
def test_any_chunk_equals_the_whole(chunk, platform):
  hidden, head, targets, weights = _inputs()

  def chunked(hidden, head):
    with implementation_lib.compiling_for(platform):
      return 0.25 * cross_entropy_sum(hidden, head, targets, weights, chunk=chunk)

  def whole(hidden, head):
    return 0.25 * _whole(hidden, head, targets, weights)

  for transform in (lambda f: f, lambda f: jax.value_and_grad(f, argnums=(0, 1))):
    tolerances.assert_close(
      jax.jit(transform(chunked))(hidden, head),
      jax.jit(transform(whole))(hidden, head),
      rtol=tolerances.FLOAT32_REORDERED,
    )


def test_bfloat16_hidden_states_keep_a_float32_loss():
  hidden, head, targets, weights = _inputs(jnp.bfloat16)
  function = functools.partial(cross_entropy_sum, chunk=8)
  loss, gradient = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(
    hidden, head, targets, weights
  )
  assert loss.dtype == jnp.float32
  assert gradient[0].dtype == jnp.bfloat16 and gradient[1].dtype == jnp.float32
  expected = _whole(hidden.astype(jnp.float32), head, targets, weights)
  tolerances.assert_close(loss, expected, rtol=tolerances.BFLOAT16)


def test_uniform_logits_cost_log_v():
  _, head, targets, weights = _inputs()
  loss = cross_entropy_sum(jnp.zeros((_BATCH, _LENGTH, _D_MODEL)), head, targets, weights, chunk=7)
  np.testing.assert_allclose(loss, np.log(_VOCAB) * weights.sum(), rtol=1e-6)


def test_what_has_no_weight_gives_no_gradient():
  hidden, head, targets, weights = _inputs()
  gradient = jax.grad(cross_entropy_sum)(hidden, head, targets, weights, chunk=8)
  silent = np.asarray(jnp.all(gradient == 0, axis=-1))
  np.testing.assert_array_equal(silent, np.asarray(weights) == 0)


def test_logits_of_the_whole_batch_never_exist():
  batch, length, vocab, chunk = 4, 512, 1000, 64
  shapes = (
    jax.ShapeDtypeStruct((batch, length, _D_MODEL), jnp.float32),
    jax.ShapeDtypeStruct((_D_MODEL, vocab), jnp.float32),
    jax.ShapeDtypeStruct((batch, length), jnp.int32),
    jax.ShapeDtypeStruct((batch, length), jnp.float32),
  )

  def loss(*arguments):
    return cross_entropy_sum(*arguments, chunk=chunk)

  compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
  all_logits = 4 * batch * length * vocab
  # A few arrays of one chunk, which is 1/32 of all, and the hidden states' gradient.
  assert compiled.memory_analysis().temp_size_in_bytes < all_logits / 4
  chex.assert_shape(jax.eval_shape(loss, *shapes), ())


class TestOnAGPU:
  pytestmark = gpu.MARKS

  @pytest.mark.parametrize('chunk', [700, 4096])
  def test_the_kernel_gives_what_xla_gives(self, chunk):
    keys = jax.random.split(jax.random.key(6), 4)
    hidden = jax.random.normal(keys[0], (4, 500, 128), jnp.bfloat16)
    head = jax.random.normal(keys[1], (128, 50277)) / 4
    targets = jax.random.randint(keys[2], (4, 500), 0, 50277)
    weights = (jax.random.uniform(keys[3], (4, 500)) < 0.7).astype(jnp.float32)

    def value_and_gradients(implementation):
      loss = functools.partial(cross_entropy_sum, chunk=chunk, implementation=implementation)
      with implementation_lib.on_devices(1):
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
          hidden, head, targets, weights
        )
        return value, gradients, jax.jit(loss)(hidden, head, targets, weights)

    tolerances.assert_close(
      value_and_gradients('triton_gpu'), value_and_gradients('xla'), rtol=tolerances.BFLOAT16
    )


def _on_mesh(axes, inputs, chunk=16):
  """Lowers loss and gradients for a mesh, and puts the inputs there as a training step has them."""
  mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[: math.prod(axes.values())])

  def loss(hidden, head, targets, weights):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return cross_entropy_sum(hidden, head, targets, weights, chunk=chunk)

  tokens = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, 'sequence'))
  fsdp = NamedSharding(mesh, PartitionSpec('fsdp', 'tensor'))
  layouts = (tokens, fsdp, tokens, tokens)
  function = jax.jit(
    lambda *inputs: (loss(*inputs), *jax.value_and_grad(loss, (0, 1))(*inputs)),
    in_shardings=layouts,
    out_shardings=(None, None, (tokens, fsdp)),
  )
  return function.lower(*inputs), jax.device_put(inputs, layouts)


def _mesh_inputs(rows=8, length=12):
  keys = jax.random.split(jax.random.key(6), 4)
  hidden = jax.random.normal(keys[0], (rows, length, 16))
  head = jax.random.normal(keys[1], (16, 34))
  targets = jax.random.randint(keys[2], (rows, length), 0, 34)
  weights = (jax.random.uniform(keys[3], (rows, length)) < 0.7).astype(jnp.float32)
  return hidden, head, targets, weights


@pytest.mark.parametrize(
  'axes',
  [
    {'data': 2, 'fsdp': 2, 'tensor': 2},
    {'fsdp': 2, 'expert': 2, 'sequence': 2},
    pytest.param({'sequence': 4, 'tensor': 2}, marks=pytest.mark.slow),
    pytest.param({'data': 8}, marks=pytest.mark.slow),
  ],
  ids=lambda axes: '_'.join(f'{name}{size}' for name, size in axes.items()),
)
def test_a_mesh_changes_nothing(axes):
  inputs = _mesh_inputs()
  lowered, placed = _on_mesh(axes, inputs)
  expected = jax.value_and_grad(lambda *own: _whole(*own, *inputs[2:]), (0, 1))(*inputs[:2])
  tolerances.assert_close(
    lowered.compile()(*placed), (expected[0], *expected), rtol=tolerances.FLOAT32_REORDERED
  )


def test_what_a_mesh_does_not_divide_is_left_to_the_compiler():
  inputs = _mesh_inputs(rows=3)
  mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    loss = jax.jit(functools.partial(cross_entropy_sum, chunk=8))(*inputs)
  tolerances.assert_close(loss, _whole(*inputs), rtol=tolerances.FLOAT32_REORDERED)


def test_the_head_is_gathered_once_and_not_for_each_chunk():
  lowered, _ = _on_mesh({'data': 2, 'fsdp': 4}, _mesh_inputs())
  text = lowered.compile().as_text()
  computations = re.split(r'\n(?=%|ENTRY)', text)
  sent = [
    c.split(' ')[0] for c in computations if re.search(r' (all|reduce)-(gather|reduce|scatter)', c)
  ]
  assert 'body=' in text and set(sent) == {'ENTRY'}
