"""Device meshes, and the one table from logical axes to mesh axes.

Modules name logical axes only (`nn.with_logical_partitioning(init, ('embed', 'inner'))`); which
mesh axis, if any, each goes over is decided here.
"""

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ssm_moe.config import ConfigError, MeshConfig

MESH_AXES = ('data', 'fsdp', 'expert', 'tensor', 'sequence')

# Logical axes of parameters and activations, and the mesh axes that split them; None keeps a copy
# on every device. d_inner goes over `tensor`, because every channel of an SSM is independent.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  ('batch', ('data', 'fsdp', 'expert')),
  ('vocab', 'tensor'),
  ('embed', 'fsdp'),
  ('inner', 'tensor'),
  ('mlp', 'tensor'),
  ('expert', 'expert'),
  ('heads', 'tensor'),
  ('kv_heads', None),
  ('head_dim', None),
  ('groups', None),
  ('branch', None),  # conv and gate, side by side in one projection
  ('layers', None),
  ('norm', None),
  ('state', None),
  ('rank', None),
  ('conv', None),
  ('router', None),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """Builds the mesh of `config` over all devices.

  Raises:
    ConfigError: the axes do not multiply to the device count.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {name: getattr(config, name) for name in MESH_AXES}
  others = 1
  for name, size in sizes.items():
    others *= 1 if name == 'data' else size
  if sizes['data'] is None:
    sizes['data'] = max(len(devices) // others, 1)
  if sizes['data'] * others != len(devices):
    axes = ' * '.join(f'{name} {size}' for name, size in sizes.items() if size > 1) or '1'
    raise ConfigError(
      f'config.mesh: {axes} does not make the number of devices, {len(devices)}; '
      'leave mesh.data unset and the other axes must divide that number'
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
    devices=devices,
  )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Lays an activation out by its logical axes on the mesh that is traced for, if any."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return x
  return jax.lax.with_sharding_constraint(x, nn.logical_to_mesh_axes(axes, RULES))


def batch_divisor(mesh: Mesh) -> int:
  """Returns the number of devices that rows of a batch are split over."""
  return mesh.shape['data'] * mesh.shape['fsdp'] * mesh.shape['expert']


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the layout of arrays whose first axis is the batch."""
  return NamedSharding(mesh, nn.logical_to_mesh_axes(('batch',), RULES))


def carried_state_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the layout of model state: periods first, then the batch."""
  return NamedSharding(mesh, nn.logical_to_mesh_axes(('layers', 'batch'), RULES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the layout of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, boxed_tree):
  """Returns the layout of each leaf of a tree whose arrays carry logical axes (flax boxes)."""
  return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed_tree), mesh, RULES)
