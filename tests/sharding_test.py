import functools

import jax
import jax.numpy as jnp

from ssm_moe import sharding
from ssm_moe.config import MeshConfig


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
