"""Plans over a mesh: each device plans for its own tokens, and multiplies them itself.

Left to the compiler, a sort of all tokens would bring them all to every device. Here plans are made
and applied inside `jax.shard_map`: of a batch that is split over devices, each sorts its part. What
is held in parts of the matrices is gathered before a product, and again in the backward pass; their
gradients are scattered back. Where experts are split too, either their matrices are gathered as
well, or tokens are exchanged: each goes to the device that has its expert, and comes back.

Drops are those of one device. A device has whole router groups, or a group lies on several devices:
then they tell each other how many tokens want each expert. What the mesh does not split evenly is
left to the compiler.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from absl import logging
from flax import struct
from jax.sharding import AbstractMesh, PartitionSpec

from ssm_moe import sharding
from ssm_moe.config import RoutingConfig
from ssm_moe.layers import dispatch, exchange
from ssm_moe.shapes import Array, Bool, Float, Int

# Of a parameter's axes: the mesh axes that split each.
Layout = tuple[tuple[str, ...], ...]


def make_plan(
  expert_index: Int[Array, 'T K'],
  config: RoutingConfig,
  *,
  num_experts: int,
  mask: Bool[Array, 'T'] | None = None,
  drops: bool = True,
  exchange_tokens: bool = False,
) -> dispatch.Plan:
  """Makes the plan that `config.dispatch` names, over the mesh that is traced for, if any.

  Args:
    expert_index: Chosen experts, the best first; tokens are those of row after row of the batch.
    config: The kind of dispatch and its capacity.
    num_experts: Matrices there are.
    mask: Tokens outside it take no capacity.
    drops: If not, a plan that would drop tokens is made dropless.
    exchange_tokens: Whether tokens go to the devices of their experts, where experts are split;
      else the matrices of all experts are gathered.
  """
  make = functools.partial(dispatch.make_plan, num_experts=num_experts, drops=drops)
  mesh = sharding.mesh_to_map()
  if mesh is None or config.dispatch == 'dense':
    return make(expert_index, config, mask=mask)
  shards, num_tokens = sharding.batch_divisor(mesh), expert_index.shape[0]
  dropping = config.dispatch == 'capacity' and drops
  reason = _indivisible(num_tokens, config.router_groups if dropping else shards, shards)
  if reason is not None:
    _log_once(f'tokens are planned for all devices together: {reason}')
    return make(expert_index, config, mask=mask)
  rows = sharding.mapped_rows(mesh)
  spread = dropping and config.router_groups % shards != 0
  if dropping and not spread:
    config = dataclasses.replace(config, router_groups=config.router_groups // shards)

  def plan_own_tokens(expert_index, mask):
    if not spread:
      return make(expert_index, config, mask=mask)
    return _plan_part_of_group(
      expert_index,
      num_experts,
      expert_capacity=dispatch.capacity_of(config, num_tokens),
      group_devices=shards // config.router_groups,
      rows=rows,
      mask=mask,
    )

  spec = PartitionSpec(rows)
  plans = _map_devices(plan_own_tokens, mesh, (spec, spec), spec)(expert_index, mask)
  experts_split = mesh.shape['expert'] > 1 and num_experts % mesh.shape['expert'] == 0
  return MeshPlan(plans, exchange_tokens and experts_split)


def _plan_part_of_group(
  expert_index: Int[Array, 'T K'],
  num_experts: int,
  *,
  expert_capacity: int,
  group_devices: int,
  rows: tuple[str, ...],
  mask: Bool[Array, 'T'] | None,
) -> dispatch.SparsePlan:
  """Drops what `dispatch.capacity_plan` would, where a router group lies on several devices.

  How many rows of an expert's are here is not known before, so what is left is planned dropless.

  Args:
    expert_index: Of this device's tokens.
    num_experts: E.
    expert_capacity: C, rows of an expert in a group.
    group_devices: Devices that a group lies on, one after the other along `rows`.
    rows: Mesh axes.
    mask: Tokens outside it take no rows.
  """
  place, wanted, counts = dispatch.queue(expert_index, num_experts, mask)
  of_devices = jax.lax.all_gather(counts, rows)
  device, devices = jax.lax.axis_index(rows), jnp.arange(of_devices.shape[0])

  def total(which):
    return jnp.sum(jnp.where(which[:, None, None], of_devices, 0), axis=0)

  in_group = devices // group_devices == device // group_devices
  of_group, earlier = total(in_group), total(in_group & (devices < device))
  # First choices, of all devices, come before second choices.
  ahead = jnp.cumsum(of_group, axis=0) - of_group + earlier
  chosen = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.int32)
  kept = wanted & (place + jnp.sum(chosen * ahead[None], axis=2) < expert_capacity)
  plan = dispatch.dropless_plan(jnp.where(kept, expert_index, num_experts), num_experts)
  return plan.replace(dropped=wanted & ~kept)


@no_type_check  # JAX rebuilds it with shapes and layouts in place of arrays
class MeshPlan(dispatch.Plan):
  """A plan for each device.

  Attributes:
    plans: Their arrays, joined along the first axis.
    exchange_tokens: Whether tokens go to the devices of their experts.
  """

  plans: dispatch.SparsePlan
  exchange_tokens: bool = struct.field(pytree_node=False)

  @property
  def dropped(self) -> Bool[Array, 'T K'] | None:
    return self.plans.dropped

  def apply(
    self,
    x: Float[Array, 'T M'],
    matrices: Sequence[Float[Array, 'E ...']],
    weights: Float[Array, 'T K'] | None = None,
    *,
    between: dispatch.Between = dispatch.as_it_is,
    axes: Sequence[tuple[str, ...]] | None = None,
  ) -> Float[Array, 'T ...']:
    mesh = jax.sharding.get_abstract_mesh()
    layouts = [
      sharding.mapped_layout(mesh, names, matrix.shape)
      for names, matrix in zip(axes or [()] * len(matrices), matrices, strict=True)
    ]
    exchanges = self.exchange_tokens and all(layout[0] == ('expert',) for layout in layouts)
    # Of what these split a device keeps its part; over other axes it gathers the whole.
    kept = {'expert'} if exchanges else set()
    if _channels_stay_apart(layouts):
      kept.add('tensor')
    gathers = [_gathers(layout, kept) for layout in layouts]
    # Of the channels: what a device takes of each token, and what it has of the result.
    inputs, *outputs = (
      'tensor' if 'tensor' in kept & {*names} else None
      for names in (layouts[0][1], *layouts[-1][2:])
    )
    partial_sums = 'tensor' in kept & {*layouts[-1][1]}

    def apply_own(plan, x, matrices, weights):
      options = {'between': between}
      if any(gathers):
        matrices = [_Part(matrix, gather) for matrix, gather in zip(matrices, gathers)]
        options['whole'] = _Part.whole
      if exchanges:
        y = exchange.apply(plan, x, matrices, weights, axis_name='expert', **options)
      else:
        y = plan.apply(x, matrices, weights, **options)
      return _sum_over(y, 'tensor') if partial_sums else y

    rows, ones = sharding.mapped_rows(mesh), tuple(n for n in mesh.axis_names if mesh.shape[n] == 1)
    in_specs = (
      PartitionSpec(rows),
      PartitionSpec(rows, inputs),
      [PartitionSpec(layout[0] + ones, *layout[1:]) for layout in layouts],
      PartitionSpec(rows),
    )
    mapped = _map_devices(apply_own, mesh, in_specs, PartitionSpec(rows, *outputs))
    return mapped(self.plans, x, list(matrices), weights)


@no_type_check
class _Part(struct.PyTreeNode):
  """What a device has of the experts' matrices.

  Attributes:
    part: Its array.
    gathers: Axis of the array and mesh axis of each gather that makes it whole.
  """

  part: Float[Array, '...']
  gathers: tuple[tuple[int, str], ...] = struct.field(pytree_node=False)

  def whole(self) -> Float[Array, '...']:
    # In the dtype of the product; the gradient is a reduce-scatter in that dtype.
    whole = self.part
    for axis, mesh_axis in self.gathers:
      whole = jax.lax.all_gather(whole, mesh_axis, axis=axis, tiled=True)
    return whole


def _gathers(layout: Layout, kept: set[str]) -> tuple[tuple[int, str], ...]:
  # The last of several mesh axes splits finest, and is gathered first.
  return tuple(
    (axis, name)
    for axis, names in enumerate(layout)
    for name in reversed(names)
    if name not in kept
  )


def _channels_stay_apart(layouts: Sequence[Layout]) -> bool:
  """Returns whether a device that has some channels can multiply by all matrices in turn.

  Each product but the last must then be whole in itself, and have the channels that the next takes.
  """
  takes = ['tensor' in layout[1] for layout in layouts]
  makes = [any('tensor' in names for names in layout[2:]) for layout in layouts]
  return makes[:-1] == takes[1:] and not any(takes[:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_over(y: Array, axis_name: str) -> Array:
  return jax.lax.psum(y, axis_name)


def _sum_over_backward(axis_name, _, dy):
  # Of a result that all devices have, each is handed its share of the cotangent. JAX's own rule
  # adds the shares up, by one more message; but they are equal.
  return (dy * jax.lax.axis_size(axis_name),)


_sum_over.defvjp(lambda y, axis_name: (_sum_over(y, axis_name), None), _sum_over_backward)


def _map_devices(
  function: Callable[..., Any], mesh: AbstractMesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  return jax.shard_map(
    function,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=set(sharding.mapped_axes(mesh)),
    # Kernels do not say over which axes their results vary.
    check_vma=False,
  )


def _indivisible(num_tokens: int, num_groups: int, shards: int) -> str | None:
  if num_tokens % shards:
    return f'{num_tokens} tokens are no multiple of the {shards} devices that rows are split over'
  if num_groups % shards and shards % num_groups:
    return (
      f'router_groups is {num_groups}, neither a multiple nor a divisor of the {shards} devices '
      'that rows are split over'
    )
  return None


@functools.cache
def _log_once(message: str) -> None:
  logging.warning(message)
