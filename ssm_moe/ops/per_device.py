"""Ops along time: each device of a mesh runs them on its own part of the arrays.

Left to the compiler, a loop over time is split as well, but what its gradient sums over channels is
added up over devices in each step; and a kernel is not split at all. Inside the map both are seen
whole: one sum at the end, and kernels as on one device.

Rows and channels are independent. Where time is split too, an op says what its pieces hand on to
each other: see `sequence_parallel`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ssm_moe import sharding
from ssm_moe.shapes import Array

Axes = tuple[str | None, ...]

_TIME = 'sequence'


def per_device(
  function: Callable[..., Any],
  arrays: Mapping[str, Array | None],
  axes: Mapping[str, Axes],
  outputs: tuple[Axes, ...],
  *,
  in_pieces: Callable[..., Any] | None = None,
  least_piece: int = 1,
) -> Any:
  """Returns `function(**arrays)`, with each device of the ambient mesh at its own part.

  Where there is no mesh of several devices, where it does not divide rows or channels, or inside
  another such map, the function is called as it is.

  Args:
    function: Of arrays by name, to a tuple of arrays; independent along every axis that is split,
      but that it may add up over it in gradients.
    arrays: Its arguments; None stays None.
    axes: Logical axes of each, those of `sharding.RULES` or None; 'sequence' is time.
    outputs: Of each result.
    in_pieces: What to call in place of `function` where time is split: a device has a piece of it,
      those along the mesh axis `sequence` follow each other. If None, a device has all of time.
    least_piece: Tokens; time that would be cut into smaller pieces is not split.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes or AxisType.Explicit in mesh.axis_types:
    return function(**arrays)
  present = {name: array for name, array in arrays.items() if array is not None}
  pieces = mesh.shape.get(_TIME, 1)
  lengths = {
    n for name, v in present.items() for n, over in zip(v.shape, axes[name]) if over == _TIME
  }
  if in_pieces is None or any(n % pieces or n // pieces < least_piece for n in lengths):
    pieces = 1

  def spec(logical: Axes) -> PartitionSpec:
    kept = tuple(None if name == _TIME and pieces == 1 else name for name in logical)
    return nn.logical_to_mesh_axes(kept, sharding.RULES)

  specs = {name: spec(axes[name]) for name in present}
  if not all(_divides(mesh, specs[name], array) for name, array in present.items()):
    return function(**arrays)
  absent = dict.fromkeys(arrays.keys() - present.keys())
  of_device = function if pieces == 1 else in_pieces
  run = jax.shard_map(
    lambda present: of_device(**present, **absent),
    mesh=mesh,
    in_specs=({name: _naming_all(mesh, spec) for name, spec in specs.items()},),
    out_specs=tuple(spec(out) for out in outputs),
    # Loops inside begin with zeros, of which the check would want to be told that they vary. The
    # gradient of what a device has whole is added up over devices without it too.
    check_vma=False,
  )
  return run(present)


def _naming_all(mesh: AbstractMesh, spec: PartitionSpec) -> PartitionSpec:
  """Names the axes of one device as well, so that gradients are not added up over them."""
  named = {name for over in spec for name in _names(over)}
  ones = tuple(n for n in mesh.axis_names if mesh.shape[n] == 1 and n not in named)
  return PartitionSpec(_names(spec[0]) + ones, *spec[1:])


def _divides(mesh: AbstractMesh, spec: PartitionSpec, array: Array) -> bool:
  sizes = (functools.reduce(int.__mul__, map(mesh.shape.get, _names(over)), 1) for over in spec)
  return all(axis % size == 0 for axis, size in zip(array.shape, sizes))


def _names(over: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if over is None else (over,) if isinstance(over, str) else over
