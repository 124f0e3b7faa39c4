"""How the tokens of a batch become one axis, on one device and on many.

Row after row, a batch whose time is split over devices would be mixed up: the tokens of a device
are then many short runs, which no layout of one axis can name, and the compiler would gather all.
So there they go device after device, and in each row after row of its piece of time.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from ssm_moe import sharding
from ssm_moe.shapes import Array


class TokenOrder(NamedTuple):
  """The order of the tokens of a batch [B, L] along one axis [T].

  Attributes:
    batch: Rows, B.
    length: L.
    pieces: Devices that time is split over, whose tokens stay together; 1: row after row.
  """

  batch: int
  length: int
  pieces: int = 1

  @property
  def run(self) -> int:
    """Tokens of a row that follow each other."""
    return self.length // self.pieces

  def flatten(self, x: Array) -> Array:
    """Returns [B, L, ...] as [T, ...]."""
    rows, tokens = self._layouts()
    return self._on_devices(lambda x: x.reshape(-1, *x.shape[2:]), rows, tokens)(x)

  def unflatten(self, tokens: Array) -> Array:
    """Undoes `flatten`."""
    run = self.run
    return self._on_devices(lambda x: x.reshape(-1, run, *x.shape[1:]), *reversed(self._layouts()))(
      tokens
    )

  def by_rows(self, tree: Any) -> Any:
    """Returns arrays [T, ...] with their tokens row after row."""
    if self.pieces == 1:
      return tree
    return jax.tree.map(lambda v: self.unflatten(v).reshape(v.shape), tree)

  def from_rows(self, tree: Any) -> Any:
    """Undoes `by_rows`."""
    if self.pieces == 1:
      return tree
    return jax.tree.map(lambda v: self.flatten(v.reshape(self.batch, -1, *v.shape[1:])), tree)

  def _layouts(self) -> tuple[PartitionSpec, PartitionSpec]:
    if self.pieces == 1:
      return PartitionSpec(), PartitionSpec()
    mesh = jax.sharding.get_abstract_mesh()
    rows = sharding.mapped_rows(mesh)
    of_batch = tuple(name for name in rows if name != 'sequence')
    return PartitionSpec(of_batch, 'sequence'), PartitionSpec(rows)

  def _on_devices(self, function, before: PartitionSpec, after: PartitionSpec):
    if self.pieces == 1:
      return function
    names = {name for over in before for name in (over if isinstance(over, tuple) else (over,))}
    # What splits other axes is left to the compiler.
    return jax.shard_map(
      function, in_specs=before, out_specs=after, axis_names=names, check_vma=False
    )


def token_order(batch: int, length: int) -> TokenOrder:
  """Returns the order of tokens on the mesh that is traced for, if any."""
  mesh = sharding.mesh_to_map()
  if mesh is None or batch % sharding.batch_divisor(mesh) or length % mesh.shape['sequence']:
    return TokenOrder(batch, length)
  return TokenOrder(batch, length, mesh.shape['sequence'])
