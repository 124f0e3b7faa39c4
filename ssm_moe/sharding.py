"""Device meshes, and the one table from logical axes to mesh axes.

Modules name logical axes only (`nn.with_logical_partitioning(init, ('embed', 'inner'))`); which
mesh axis, if any, each goes over is decided here.
"""

import math

import jax
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ssm_moe.config import ConfigError, MeshConfig

MESH_AXES = ('data', 'fsdp', 'expert', 'tensor', 'sequence')
# Those that rows of a batch are split over.
BATCH_AXES = ('data', 'fsdp', 'expert')

# Logical axes of parameters and activations, and the mesh axes that split them; None keeps a copy
# on every device. d_inner goes over `tensor`, because every channel of an SSM is independent.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  ('batch', BATCH_AXES),
  ('sequence', 'sequence'),  # time, of activations
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
  ('adapter', None),  # the low rank
)


# Where it divides, fsdp splits stacks of experts by expert: their parts are gathered as they lie,
# while those of a later axis have to be transposed (two H200s: 2 of 70 ms of a step).
_BY_EXPERT = (('expert', ('expert', 'fsdp')), *RULES)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """Builds the mesh of `config` over all devices.

  Raises:
    ConfigError: the axes do not multiply to the device count.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(config, len(devices))
  # jax.make_mesh would stop where an axis is a part of a torus' side, as 2 is of 4.
  laid_out = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )
  return Mesh(laid_out, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def abstract_mesh(config: MeshConfig, num_devices: int | None = None) -> AbstractMesh:
  """Returns the mesh of `config` without devices: layouts can be named on it, and bytes counted.

  Args:
    config: Sizes of the axes.
    num_devices: How many there are to be; if None, as many as the axes that are set need.

  Raises:
    ConfigError: as `make_mesh`.
  """
  if num_devices is None:
    num_devices = math.prod(getattr(config, name) or 1 for name in MESH_AXES)
  sizes = mesh_sizes(config, num_devices)
  types = (AxisType.Auto,) * len(MESH_AXES)
  return AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=types)


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """Returns the devices along each axis; `data` takes what the others leave, if it is not set.

  Raises:
    ConfigError: the axes do not multiply to the device count; the message has what would.
  """
  sizes = {name: getattr(config, name) for name in MESH_AXES}
  others = math.prod(size for name, size in sizes.items() if name != 'data')
  axes = ' * '.join(f'{name} {size}' for name, size in sizes.items() if size and size > 1)
  if sizes['data'] is None:
    sizes['data'] = num_devices // others
  if sizes['data'] * others != num_devices:
    raise ConfigError(
      f'config.mesh: {axes or 1} does not make the number of devices, {num_devices}; '
      f'{_sizes_that_do(config, num_devices)}'
    )
  return sizes


def _sizes_that_do(config: MeshConfig, num_devices: int) -> str:
  """Returns what each axis of a mesh that does not fit could be, if the others stay."""
  sizes = {name: getattr(config, name) or 1 for name in MESH_AXES}
  options = []
  for name, size in sizes.items():
    left, rest = divmod(num_devices, math.prod(sizes.values()) // size)
    is_set = config.data is not None if name == 'data' else size > 1
    if is_set and not rest:
      options.append(f'{name} {one_of([left] if config.data else divisors(left))}')
      if name == 'data':
        options.append('mesh.data left unset')
  if not options:
    product = [num_devices] if config.data else divisors(num_devices)
    return f'the product must be {one_of(product)}'
  return f'{", or ".join(options)} would'


def divisors(number: int) -> list[int]:
  return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def one_of(numbers: list[int]) -> str:
  """Returns '1, 2 or 4'."""
  *most, last = map(str, numbers)
  return f'{", ".join(most)} or {last}' if most else last


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Lays an activation out by its logical axes on the mesh that is traced for, if any."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return x
  spec = spec_of(mesh, axes, x.shape)
  return jax.lax.with_sharding_constraint(x, spec)


def axis_size(name: str) -> int:
  """Returns the devices along an axis of the mesh that is traced for; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty or name not in mesh.shape else mesh.shape[name]


def constrain_stream(x: jax.Array) -> jax.Array:
  """Lays out what has the model's width last, [B, L, M] or [B, M], by its rows and time."""
  time = ('sequence',) if x.ndim == 3 else ()
  return constrain(x, 'batch', *time, None)


def batch_divisor(mesh: Mesh | AbstractMesh) -> int:
  """Returns the number of devices that rows of a batch are split over."""
  return math.prod(mesh.shape[name] for name in BATCH_AXES)


def token_divisor(mesh: Mesh | AbstractMesh) -> int:
  """Returns the number of devices that the tokens of a batch are split over."""
  return batch_divisor(mesh) * mesh.shape['sequence']


def mesh_to_map() -> AbstractMesh | None:
  """Returns the mesh that is traced for, where `jax.shard_map` over it tells devices apart.

  None if there is none, or if what is traced is one device's part already.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes or mesh.axis_names != MESH_AXES:
    return None
  return mesh if any(mesh.shape[name] > 1 for name in mapped_axes(mesh)) else None


def mapped_axes(mesh: AbstractMesh) -> tuple[str, ...]:
  """Returns the axes for `jax.shard_map` around what a device does with its tokens by itself.

  Those of size one are among them: with no axis left to the compiler, kernels can run inside.
  """
  return tuple(mesh.axis_names)


def mapped_rows(mesh: AbstractMesh) -> tuple[str, ...]:
  """Returns those of them that tokens are split over, with all that have size one.

  A layout names the latter too, so that gradients are not summed over them.
  """
  split = (*BATCH_AXES, 'sequence')
  return tuple(n for n in mapped_axes(mesh) if n in split or mesh.shape[n] == 1)


def spec_of(
  mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> PartitionSpec:
  """Returns the layout of an array by its logical axes.

  An axis that is no multiple of its devices, as an odd vocabulary, is left whole.
  """
  rules = RULES
  if mesh.shape['fsdp'] > 1 and 'expert' in axes:
    parts = mesh.shape['expert'] * mesh.shape['fsdp']
    rules = RULES if shape[axes.index('expert')] % parts else _BY_EXPERT
  spec = nn.logical_to_mesh_axes(axes, rules)

  def fits(size, entry):
    return size % math.prod(mesh.shape[name] for name in _names(entry)) == 0

  return PartitionSpec(*(own if fits(size, own) else None for size, own in zip(shape, spec)))


def mapped_layout(
  mesh: AbstractMesh, axes: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[tuple[str, ...], ...]:
  """Returns the mesh axes of more than one device that split each axis of a parameter.

  Args:
    mesh: That is mapped over.
    axes: Logical axes; () if each device has all of it.
    shape: Of the whole parameter.
  """
  mapped = mapped_axes(mesh)
  spec = spec_of(mesh, axes, shape)
  names = [_names(entry) for entry in spec] + [()] * (len(shape) - len(spec))
  return tuple(tuple(n for n in own if n in mapped and mesh.shape[n] > 1) for own in names)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return (entry,) if isinstance(entry, str) else entry or ()


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the layout of arrays whose first axis is the batch."""
  return NamedSharding(mesh, nn.logical_to_mesh_axes(('batch',), RULES))


def token_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the layout of arrays whose first axes are the batch and time."""
  return NamedSharding(mesh, nn.logical_to_mesh_axes(('batch', 'sequence'), RULES))


def carried_state_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the layout of model state: periods first, then the batch."""
  return NamedSharding(mesh, nn.logical_to_mesh_axes(('layers', 'batch'), RULES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the layout of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, boxed_tree):
  """Returns the layout of each leaf of a tree whose arrays carry logical axes (flax boxes)."""
  names = nn.get_partition_spec(boxed_tree)

  def layout(axes, leaf):
    return NamedSharding(mesh, spec_of(mesh, tuple(axes), leaf.shape))

  return jax.tree.map(
    layout, names, nn.unbox(boxed_tree), is_leaf=lambda x: isinstance(x, PartitionSpec)
  )
