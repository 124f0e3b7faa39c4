"""How the arrays of a training step lie on a mesh: what splits each axis, and what a device holds.

No device is needed: an `AbstractMesh` will do. Bytes of what autodiff keeps are in `memory`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ssm_moe import sharding
from ssm_moe.analysis import memory
from ssm_moe.config import ExperimentConfig, ModelConfig
from ssm_moe.config.model import LAYER_WORDS

# Axes of a logical name, or of a mesh, for each axis of an array; None and () where there is none.
_Names = tuple[str | None, ...]


_LOGITS = ('batch', 'sequence', 'vocab')


class Row(NamedTuple):
  """An array.

  Attributes:
    name: Its path in the tree that it is of.
    shape: Of all of it.
    dtype: Of its elements.
    logical_axes: Name of each axis; None has none.
    mesh_axes: By axis, the mesh axes of more than one device that split it.
    num_bytes: Held by each device.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  logical_axes: _Names
  mesh_axes: tuple[tuple[str, ...], ...]
  num_bytes: int


def rows_of(tree: Any, logical_axes: Any) -> list[Row]:
  """Returns a row for each array of a tree.

  Args:
    tree: Of shapes with layouts.
    logical_axes: The same tree of `PartitionSpec`s of logical names, or one for all arrays, as far
      as they have axes.

  Raises:
    ConfigError: an array does not divide over the mesh axes that are to split it.
  """
  leaves = jax.tree.leaves_with_path(tree)
  if isinstance(logical_axes, PartitionSpec):
    axes = [logical_axes] * len(leaves)
  else:
    axes = jax.tree.leaves(logical_axes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
  return [
    _row(jax.tree_util.keystr(path, simple=True, separator='/'), leaf, names)
    for (path, leaf), names in zip(leaves, axes)
  ]


def _row(name: str, leaf: jax.ShapeDtypeStruct, logical_axes: Iterable[str | None]) -> Row:
  sizes = leaf.sharding.mesh.shape
  split = (
    tuple(axis for axis in _as_tuple(entry) if sizes[axis] > 1)
    for entry in _filled(leaf.sharding.spec, leaf.ndim)
  )
  return Row(
    name,
    leaf.shape,
    str(leaf.dtype),
    _filled(logical_axes, leaf.ndim),
    tuple(split),
    memory.device_bytes({name: leaf}),
  )


def _as_tuple(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return (entry,) if isinstance(entry, str) else entry or ()


def _filled(names: Iterable, ndim: int) -> tuple:
  names = tuple(names)[:ndim]
  return names + (None,) * (ndim - len(names))


def follow(rows: list[Row], parameters: list[Row]) -> tuple[list[Row], list[Row]]:
  """Splits rows in those that lie exactly as the parameter that their name ends with, and others.

  Args:
    rows: Of an optimizer's state.
    parameters: Of the model.
  """
  by_name = {row.name: row[1:] for row in parameters}

  def follows(row: Row) -> bool:
    parts = row.name.split('/')
    names = ('/'.join(parts[i:]) for i in range(len(parts)))
    return any(by_name.get(name) == row[1:] for name in names)

  return [row for row in rows if follows(row)], [row for row in rows if not follows(row)]


def activations(config: ExperimentConfig, mesh: Mesh | AbstractMesh) -> list[Row]:
  """Returns the main activations of a layer of each kind, and of the loss.

  Of an MoE layer the rows that experts get, if they get equally many.

  Args:
    config: Of the experiment.
    mesh: That it runs on.
  """
  model, train = config.model, config.train
  batch = train.batch_size // train.accumulation_steps
  length = train.sequence_length
  stream = ('stream', model.residual_dtype, (batch, length, model.d_model), ('batch', 'sequence'))
  layers = [
    (name, model.dtype, shape, axes)
    for letter in dict.fromkeys(model.layers)
    for name, shape, axes in _of_layer(letter, model, batch, length)
  ]
  columns = min(max(train.loss_chunk // batch, 1), length)
  logits = ('logits of a chunk', 'float32', (batch, columns, model.vocab_size), _LOGITS)
  rows = {}
  for name, dtype, shape, axes in (stream, *layers, logits):
    axes = _filled(axes, len(shape))
    rows[name] = _row(name, _laid_out(mesh, shape, axes, dtype), axes)
  return list(rows.values())


def _of_layer(
  letter: str, model: ModelConfig, batch: int, length: int
) -> list[tuple[str, tuple[int, ...], _Names]]:
  """Returns name, shape and logical axes of the widest activations of a layer."""
  rows, names = (batch, length), ('batch', 'sequence')
  match letter:
    case 'M' | 'm' | 'S' | 's':
      mixer = LAYER_WORDS[letter]
      d_inner = getattr(model, mixer).inner_size(model.d_model)
      return [(f'{mixer}: x, z and y, each', (*rows, d_inner), (*names, 'inner'))]
    case 'A' | 'W':
      heads, size = model.attention.num_heads, model.attention.head_size(model.d_model)
      return [('attention: queries', (*rows, heads, size), (*names, 'heads', 'head_dim'))]
    case 'F':
      return [('mlp: hidden', (*rows, model.mlp.hidden_size(model.d_model)), (*names, 'mlp'))]
  chosen = batch * length * model.moe.top_k
  return [
    ('moe: rows of experts', (chosen, model.d_model), ('batch',)),
    ('moe: hidden', (chosen, model.moe.hidden_size(model.d_model)), ('batch', 'mlp')),
  ]


def _laid_out(
  mesh: Mesh | AbstractMesh, shape: tuple[int, ...], axes: _Names, dtype: str
) -> jax.ShapeDtypeStruct:
  spec = sharding.spec_of(mesh, tuple(_filled(axes, len(shape))), shape)
  layout = NamedSharding(mesh, spec)
  return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=layout)


def table(sections: dict[str, list[Row]]) -> list[str]:
  """Returns lines of text: the arrays of each section below its title."""
  cells = {
    title: [
      (
        f'  {row.name}',
        ' x '.join(map(str, row.shape)) or '-',
        row.dtype,
        ', '.join(name or '-' for name in row.logical_axes) or '-',
        ', '.join('*'.join(names) or '-' for names in row.mesh_axes) or '-',
        f'{row.num_bytes:,}',
      )
      for row in rows
    ]
    for title, rows in sections.items()
  }
  head = ('', 'shape', 'dtype', 'logical axes', 'split over', 'bytes per device')
  columns = list(zip(head, *(cell for rows in cells.values() for cell in rows)))
  *widths, last = (max(map(len, column)) for column in columns)

  def line(cell: tuple[str, ...]) -> str:
    return '  '.join([*(f'{x:{n}}' for x, n in zip(cell, widths)), f'{cell[-1]:>{last}}'])

  lines = [line(head)]
  for title, rows in cells.items():
    lines += ['', title, *map(line, rows)]
  return lines
