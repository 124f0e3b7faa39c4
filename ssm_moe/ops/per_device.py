"""Ops that never look across a mesh: each device runs them on its own part of the arrays.

Left to the compiler, a loop over time is split as well, but what its gradient sums over channels is
added up over devices in each step; and a kernel is not split at all. Inside the map both are seen
whole: one sum at the end, and kernels as on one device.
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


def per_device(
  function: Callable[..., Any],
  arrays: Mapping[str, Array | None],
  axes: Mapping[str, Axes],
  outputs: tuple[Axes, ...],
) -> Any:
  """Returns `function(**arrays)`, with each device of the ambient mesh at its own part.

  Where there is no mesh of several devices, where it does not divide an axis, or inside another
  such map, the function is called as it is.

  Args:
    function: Of arrays by name, to a tuple of arrays; independent along every axis that is split,
      but that it may add up over it in gradients.
    arrays: Its arguments; None stays None.
    axes: Logical axes of each, those of `sharding.RULES` or None.
    outputs: Of each result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes or AxisType.Explicit in mesh.axis_types:
    return function(**arrays)
  present = {name: array for name, array in arrays.items() if array is not None}
  specs = {name: nn.logical_to_mesh_axes(axes[name], sharding.RULES) for name in present}
  if not all(_divides(mesh, specs[name], array) for name, array in present.items()):
    return function(**arrays)
  absent = dict.fromkeys(arrays.keys() - present.keys())
  run = jax.shard_map(
    lambda present: function(**present, **absent),
    mesh=mesh,
    in_specs=(specs,),
    out_specs=tuple(nn.logical_to_mesh_axes(out, sharding.RULES) for out in outputs),
    # Loops inside begin with zeros, of which the check would want to be told that they vary. The
    # gradient of what a device has whole is added up over devices without it too.
    check_vma=False,
  )
  return run(present)


def _divides(mesh: AbstractMesh, spec: PartitionSpec, array: Array) -> bool:
  sizes = (functools.reduce(int.__mul__, map(mesh.shape.get, _names(over)), 1) for over in spec)
  return all(axis % size == 0 for axis, size in zip(array.shape, sizes))


def _names(over: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if over is None else (over,) if isinstance(over, str) else over
