import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from ssm_moe import sharding
from ssm_moe.analysis import chips
from ssm_moe.config import ConfigError, MeshConfig
from tests import tpu


def test_an_activation_keeps_to_the_rows_of_the_batch():
  mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))

  @functools.partial(jax.jit, out_shardings=None)
  def double(x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return sharding.constrain(2 * x, 'batch', None)

  # Split by columns, as the product with a matrix that is split by columns would be.
  columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp'))
  y = double(jax.device_put(jnp.ones((8, 4)), columns))
  assert {shard.data.shape for shard in y.addressable_shards} == {(2, 4)}


def test_without_a_mesh_an_activation_is_left_alone():
  x = jnp.ones((8, 4))
  assert sharding.constrain(x, 'batch', None) is x


def test_an_axis_that_is_no_multiple_of_its_devices_is_left_whole():
  mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
  tree = {
    size: nn.LogicallyPartitioned(jnp.zeros((size, 8)), ('vocab', 'embed')) for size in (256, 257)
  }
  specs = jax.tree.map(lambda layout: layout.spec, sharding.tree_shardings(mesh, tree))
  assert specs == {256: PartitionSpec('tensor', 'fsdp'), 257: PartitionSpec(None, 'fsdp')}
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    x = jax.jit(lambda: sharding.constrain(jnp.zeros((3, 257)), 'batch', 'vocab'))()
  assert x.shape == (3, 257)


@tpu.needs_compiler
@pytest.mark.parametrize('topology', ['v5p:4x4x4', 'v5e:8x8', 'v6e:8x8'])
def test_an_axis_may_be_a_part_of_a_side_of_the_slice(topology):
  mesh = sharding.make_mesh(MeshConfig(fsdp=8, expert=4, tensor=2), chips.devices(topology))
  assert {name: size for name, size in mesh.shape.items() if size > 1} == {
    'fsdp': 8,
    'expert': 4,
    'tensor': 2,
  }


@pytest.mark.parametrize(
  ('axes', 'message'),
  [
    ({'tensor': 3}, 'tensor 3 does not make the number of devices, 8; tensor 1, 2, 4 or 8 would'),
    ({'tensor': 3, 'expert': 2}, 'expert 2 * tensor 3 .*; tensor 1, 2 or 4 would'),
    ({'tensor': 4, 'fsdp': 4}, 'fsdp 4 * tensor 4 .*; fsdp 1 or 2, or tensor 1 or 2 would'),
    ({'tensor': 3, 'expert': 5}, '; the product must be 1, 2, 4 or 8'),
    ({'data': 4, 'tensor': 4}, '; data 2, or mesh.data left unset, or tensor 2 would'),
    ({'data': 3, 'tensor': 5}, '; the product must be 8'),
    ({'data': 1}, ': 1 does not .*; data 8, or mesh.data left unset would'),
  ],
)
def test_a_mesh_that_does_not_fit_says_what_would(axes, message):
  with pytest.raises(ConfigError, match=f'{message.replace("* ", "[*] ")}$'):
    sharding.make_mesh(MeshConfig(**axes))


def test_every_choice_that_is_named_makes_a_mesh():
  for axes in ({'tensor': 3}, {'tensor': 4, 'fsdp': 4}, {'data': 4, 'tensor': 4}):
    with pytest.raises(ConfigError) as error:
      sharding.mesh_sizes(MeshConfig(**axes), 8)
    choices = str(error.value).partition('; ')[2].removesuffix(' would').split(', or ')
    for choice in choices:
      if choice == 'mesh.data left unset':
        sharding.mesh_sizes(MeshConfig(**axes | {'data': None}), 8)
        continue
      name, *sizes = choice.replace(',', '').replace(' or', '').split()
      for size in sizes:
        assert sharding.mesh_sizes(MeshConfig(**axes | {name: int(size)}), 8)[name] == int(size)
