"""Plans over a mesh: each device plans for its own tokens, and multiplies them itself.

Left to the compiler, a sort of all tokens would bring them all to every device. Here plans are made
and applied inside `jax.shard_map`: of a batch that is split over devices, each sorts its part. What
is held in parts of the matrices is gathered before a product, and again in the backward pass; their
gradients are scattered back. Where experts are split too, either their matrices are gathered as
well, or tokens are exchanged: each goes to the device that has its expert, and comes back.

Drops are those of one device. A device has whole router groups, or a group lies on several devices:
then they tell each other how many tokens want each expert. Earlier tokens of the batch come first,
also where time is split and a device has a run of tokens of each of its rows. What the mesh does
not split evenly is left to the compiler.
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
from ssm_moe.config.routing import Exchange
from ssm_moe.layers import decode_dispatch, dispatch
from ssm_moe.layers import exchange as exchange_lib
from ssm_moe.layers.token_order import TokenOrder
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
  exchange: Exchange | None = None,
  order: TokenOrder | None = None,
) -> dispatch.Plan:
  """Makes the plan that `config.dispatch` names, over the mesh that is traced for, if any.

  Args:
    expert_index: Chosen experts, the best first.
    config: The kind of dispatch and its capacity.
    num_experts: Matrices there are.
    mask: Tokens outside it take no capacity.
    drops: If not, none is dropped: for a step of generation, which has a few tokens.
    exchange: How tokens go to the devices of their experts, where experts are split; if None, the
      matrices of all experts are gathered.
    order: Of the tokens; row after row of the batch if None.
  """
  make = functools.partial(dispatch.make_plan, num_experts=num_experts, drops=drops)
  mesh = sharding.mesh_to_map()
  if mesh is None and not drops:
    return decode_dispatch.make_plan(expert_index, config, num_experts=num_experts)
  if mesh is None or config.dispatch == 'dense':
    return make(expert_index, config, mask=mask)
  shards, num_tokens = sharding.token_divisor(mesh), expert_index.shape[0]
  pieces = 1 if order is None else order.pieces
  run = num_tokens // shards if pieces == 1 else order.run
  dropping = config.dispatch == 'capacity' and drops
  groups = config.router_groups if dropping else 1
  group = num_tokens // groups if dropping else run
  dropped = None
  reason = _indivisible(num_tokens, shards, groups, run)
  if reason is not None:
    _log_once(f'tokens are planned for all devices together: {reason}')
    if pieces == 1:
      return make(expert_index, config, mask=mask)
    # In rows they would be on other devices: together they decide what is dropped, and no more.
    by_rows = order.by_rows((expert_index, mask))
    dropped = order.from_rows(make(by_rows[0], config, mask=by_rows[1]).dropped)
    left_out = dropped if mask is None else dropped | ~mask[:, None]
    expert_index, mask = jnp.where(left_out, num_experts, expert_index), None
    config = dataclasses.replace(config, dispatch='dropless')
  spread = dropping and dropped is None and group > run
  if dropping and not spread:
    config = dataclasses.replace(config, router_groups=num_tokens // shards // group)
  rows = sharding.mapped_rows(mesh)

  def plan_own_tokens(expert_index, mask):
    if not spread:
      return make(expert_index, config, mask=mask)
    return _plan_part_of_group(
      expert_index,
      num_experts,
      expert_capacity=dispatch.capacity_of(config, num_tokens),
      group_runs=group // run,
      run=run,
      pieces=pieces,
      rows=rows,
      mask=mask,
    )

  spec = PartitionSpec(rows)
  plans = _map_devices(plan_own_tokens, mesh, (spec, spec), spec)(expert_index, mask)
  if dropped is not None:
    plans = plans.replace(dropped=dropped)
  experts_split = mesh.shape['expert'] > 1 and num_experts % mesh.shape['expert'] == 0
  return MeshPlan(plans, exchange if experts_split else None)


def _plan_part_of_group(
  expert_index: Int[Array, 'T K'],
  num_experts: int,
  *,
  expert_capacity: int,
  group_runs: int,
  run: int,
  pieces: int,
  rows: tuple[str, ...],
  mask: Bool[Array, 'T'] | None,
) -> dispatch.SparsePlan:
  """Drops what `dispatch.capacity_plan` would, where a router group lies on several devices.

  How many rows of an expert's are here is not known before, so what is left is planned dropless.

  Args:
    expert_index: Of this device's tokens.
    num_experts: E.
    expert_capacity: C, rows of an expert in a group.
    group_runs: Runs of tokens that make a group, one after the other in the rows of the batch.
    run: Tokens that follow each other there. A device has one or more such runs.
    pieces: Devices, the last along `rows`, that runs of one row lie on, one on each.
    rows: Mesh axes.
    mask: Tokens outside it take no rows.
  """
  top_k = expert_index.shape[1]
  cut = expert_index.reshape(-1, run, top_k)
  of_run = functools.partial(dispatch.queue, num_experts=num_experts)
  if mask is None:
    place, wanted, counts = jax.vmap(of_run)(cut)
  else:
    place, wanted, counts = jax.vmap(lambda i, m: of_run(i, mask=m))(cut, mask.reshape(-1, run))

  # [devices of a row's pieces, runs, pieces]: in this order the batch has them.
  runs = jax.lax.all_gather(counts, rows)
  runs = runs.reshape(-1, pieces, *counts.shape).swapaxes(1, 2)
  groups = runs.reshape(-1, group_runs, *counts.shape[1:])
  earlier = jnp.cumsum(groups, axis=1) - groups
  # First choices, of all runs, come before second choices.
  of_group = jnp.sum(groups, axis=1, keepdims=True)
  ahead = (jnp.cumsum(of_group, axis=2) - of_group + earlier).reshape(runs.shape)
  device = jax.lax.axis_index(rows)
  ahead = ahead[device // pieces, :, device % pieces]

  chosen = jax.nn.one_hot(cut, num_experts, dtype=jnp.int32)
  kept = wanted & (place + jnp.sum(chosen * ahead[:, None], axis=3) < expert_capacity)
  kept, wanted = kept.reshape(-1, top_k), wanted.reshape(-1, top_k)
  plan = dispatch.dropless_plan(jnp.where(kept, expert_index, num_experts), num_experts)
  return plan.replace(dropped=wanted & ~kept)


@no_type_check  # JAX rebuilds it with shapes and layouts in place of arrays
class MeshPlan(dispatch.Plan):
  """A plan for each device.

  Attributes:
    plans: Their arrays, joined along the first axis.
    exchange: How tokens go to the devices of their experts; None if they do not.
  """

  plans: dispatch.SparsePlan
  exchange: Exchange | None = struct.field(pytree_node=False)

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
    exchanges = self.exchange is not None and all(
      layout[0][:1] == ('expert',) for layout in layouts
    )
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
        options |= {'axis_name': 'expert', 'exchange': self.exchange}
        y = exchange_lib.apply(plan, x, matrices, weights, **options)
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


def _indivisible(num_tokens: int, shards: int, groups: int, run: int) -> str | None:
  """Returns why devices cannot plan by themselves.

  Args:
    num_tokens: T.
    shards: Devices that they are split over.
    groups: G; 1 if nothing is dropped.
    run: Tokens of a device that follow each other in the rows of the batch.
  """
  if num_tokens % shards:
    return f'{num_tokens} tokens are no multiple of the {shards} devices that they are split over'
  group = num_tokens // groups
  if group % run and run % group:
    return (
      f'router_groups is {groups}, which makes groups of {group} tokens: neither a multiple nor a '
      f'divisor of the {run} that a device has of a row'
    )
  return None


@functools.cache
def _log_once(message: str) -> None:
  logging.warning(message)
