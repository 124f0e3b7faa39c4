"""Moving tokens to their experts and back: plan once, `apply` to any number of projections.

To apply is to `dispatch`, `matmul` and `combine`. Three kinds of plan obey the same contract, and
agree to rounding whenever nothing is dropped; `mesh_dispatch` makes them over several devices:

  dense     every expert on every token, of which the chosen are kept: the oracle
  capacity  a fixed number of rows for each expert; what is over is dropped (Switch)
  dropless  rows sorted by expert, any number for each

An expert index of E, the number of experts, is no expert: what comes back for it is zero. A fourth
plan is made from what experts chose, not tokens: `ExpertChoicePlan`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, no_type_check

import jax
import jax.numpy as jnp
from flax import struct

from ssm_moe.config import RoutingConfig
from ssm_moe.ops import implementation
from ssm_moe.ops.grouped_matmul import RowOrder, grouped_matmul
from ssm_moe.shapes import Array, Bool, Float, Int

Between = Callable[[Array], Array]
# Makes the matrix of what is held of it.
Whole = Callable[[Any], Array]


def as_it_is(rows: Array) -> Array:
  """Returns its argument."""
  return rows


class Plan(struct.PyTreeNode):
  """What is made of one routing decision.

  Attributes:
    dropped: Assignments that no row has; None if that cannot be.
  """

  def apply(
    self,
    x: Float[Array, 'T M'],
    matrices: Sequence[Float[Array, 'E ...']],
    weights: Float[Array, 'T K'] | None = None,
    *,
    between: Between = as_it_is,
    axes: Sequence[tuple[str, ...]] | None = None,
  ) -> Float[Array, 'T ...']:
    """Returns sum_k w_k f_k(x), where f_e multiplies by the matrices of expert e in turn.

    Args:
      x: Tokens, in the dtype of the matrices.
      matrices: One or more for each expert.
      weights: Of each token's experts; 1 if None.
      between: An elementwise function of what one matrix gives the next.
      axes: Logical axes of each of the matrices, which tell what of it a device has; the whole, if
        None. Of no matter to plans for one device.
    """
    raise NotImplementedError


class RowPlan(Plan):
  """A plan for one device: tokens become rows. Which axes rows have is the plan's own matter."""

  def dispatch(self, x: Float[Array, 'T *M']) -> Float[Array, '...']:
    """Returns the rows of tokens."""
    raise NotImplementedError

  def matmul(
    self, rows: Float[Array, '...'], weights: Float[Array, 'E M *F']
  ) -> Float[Array, '...']:
    """Multiplies each row with its expert's matrix."""
    raise NotImplementedError

  def combine(
    self, rows: Float[Array, '...'], weights: Float[Array, 'T K'] | None = None
  ) -> Float[Array, 'T *M']:
    """Adds up the rows of each token, each times its weight."""
    raise NotImplementedError

  def matmuls(
    self,
    rows: Float[Array, '...'],
    matrices: Sequence[Any],
    between: Between = as_it_is,
    whole: Whole | None = None,
  ) -> Float[Array, '...']:
    """Multiplies by one matrix after the other; `whole` as in `apply`."""
    for i, matrix in enumerate(matrices):
      rows = _with_whole(self.matmul, whole)(between(rows) if i else rows, matrix)
    return rows

  def apply(
    self,
    x: Float[Array, 'T M'],
    matrices: Sequence[Any],
    weights: Float[Array, 'T K'] | None = None,
    *,
    between: Between = as_it_is,
    axes: Sequence[tuple[str, ...]] | None = None,
    whole: Whole | None = None,
  ) -> Float[Array, 'T ...']:
    """Does what a plan does; `whole` makes the matrices of `matrices`, anew in the backward pass.

    So what is gathered of other devices is not kept from one pass to the other.
    """
    del axes
    return self.combine(self.matmuls(self.dispatch(x), matrices, between, whole), weights)


def _with_whole(multiply: Callable[..., Array], whole: Whole | None) -> Callable[..., Array]:
  """Returns `multiply(rows, matrix)` as a function of rows and what `whole` makes a matrix of."""
  if whole is None:
    return multiply
  # Of the product nothing is done twice: only what its gradient reads is made again. Periods are a
  # loop, over whose ends the compiler cannot join that to the first time; told to prevent it, a
  # layer that is recomputed would gather three times, not twice.
  return jax.checkpoint(lambda rows, matrix: multiply(rows, whole(matrix)), prevent_cse=False)


class DensePlan(RowPlan):
  """Every expert on every token. Rows are [E, T, ...]."""

  expert_index: Int[Array, 'T K']
  num_experts: int = struct.field(pytree_node=False)
  dropped: None = None

  def dispatch(self, x: Float[Array, 'T *M']) -> Float[Array, 'E T *M']:
    return jnp.broadcast_to(x[None], (self.num_experts, *x.shape))

  def matmul(
    self, rows: Float[Array, 'E T M'], weights: Float[Array, 'E M *F']
  ) -> Float[Array, 'E T *F']:
    return jnp.einsum('etm,em...->et...', rows, weights)

  def combine(
    self, rows: Float[Array, 'E T *M'], weights: Float[Array, 'T K'] | None = None
  ) -> Float[Array, 'T *M']:
    chosen = jax.nn.one_hot(self.expert_index, self.num_experts, dtype=jnp.float32)
    if weights is not None:
      chosen = chosen * weights[:, :, None]
    chosen = chosen.sum(axis=1)
    return jnp.einsum('te,et...->t...', chosen, rows.astype(jnp.float32)).astype(rows.dtype)


@no_type_check  # JAX rebuilds it with shapes and layouts in place of arrays
class SparsePlan(RowPlan):
  """Rows hold the chosen pairs of token and expert only. S is their number.

  Attributes:
    order: Which assignment stands in which row; those that were dropped in none.
    group_sizes: Rows of each expert.
    dropped: Assignments over capacity; None if there is no limit.
    expert_capacity: Rows of every expert, filled or not; None if rows are as many as needed.
  """

  order: RowOrder
  group_sizes: Int[Array, 'E']
  dropped: Bool[Array, 'T K'] | None
  expert_capacity: int | None = struct.field(pytree_node=False)

  def dispatch(self, x: Float[Array, 'T *M']) -> Float[Array, 'S *M']:
    return self.order.take(x)

  def matmul(
    self, rows: Float[Array, 'S M'], weights: Float[Array, 'E M *F']
  ) -> Float[Array, 'S *F']:
    if self.expert_capacity is None:
      return grouped_matmul(rows, weights, self.group_sizes)
    return _batched_matmul(rows, weights)

  def combine(
    self, rows: Float[Array, 'S *M'], weights: Float[Array, 'T K'] | None = None
  ) -> Float[Array, 'T *M']:
    return sum_choices(self.order.put(rows), weights)

  def apply(
    self,
    x: Float[Array, 'T M'],
    matrices: Sequence[Any],
    weights: Float[Array, 'T K'] | None = None,
    *,
    between: Between = as_it_is,
    axes: Sequence[tuple[str, ...]] | None = None,
    whole: Whole | None = None,
  ) -> Float[Array, 'T ...']:
    if self.expert_capacity is not None:
      return super().apply(x, matrices, weights, between=between, axes=axes, whole=whole)
    rows = multiply_rows(x, matrices, self.group_sizes, between, self.order, whole)
    return sum_choices(rows, weights)


def multiply_rows(
  rows: Float[Array, 'R M'],
  matrices: Sequence[Any],
  group_sizes: Int[Array, 'E'],
  between: Between = as_it_is,
  order: RowOrder | None = None,
  whole: Whole | None = None,
) -> Float[Array, 'S ...'] | Float[Array, 'T K ...']:
  """Multiplies rows, sorted by expert, by one matrix of their expert after the other.

  Args:
    rows: Or tokens, with `order`: they are taken in that order, and products put back.
    group_sizes: Rows of each expert.
    matrices, between, whole: As in `RowPlan.apply`.
  """
  # Where a kernel can, products write in the order of tokens by themselves, and do the ReLU.
  last = len(matrices) - 1
  fused = between is jax.nn.relu
  for i, matrix in enumerate(matrices):
    multiply = functools.partial(
      grouped_matmul,
      group_sizes=group_sizes,
      take=order if i == 0 else None,
      put=order if i == last else None,
      relu=fused and i < last,
    )
    rows = _with_whole(multiply, whole)(between(rows) if i and not fused else rows, matrix)
  return rows


def sum_choices(
  chosen: Float[Array, 'T K *M'], weights: Float[Array, 'T K'] | None
) -> Float[Array, 'T *M']:
  """Adds up what a token's experts made, each times its weight."""
  if weights is None:
    return chosen.sum(axis=1)
  # The weights are float32, and carry the router's gradient: multiplied in that precision.
  if implementation.platform() == 'gpu':
    # XLA joins these to what comes before; the einsum would be one product of matrices for each
    # token.
    wide = weights.reshape(weights.shape + (1,) * (chosen.ndim - 2))
    return jnp.sum(chosen.astype(jnp.float32) * wide, axis=1).astype(chosen.dtype)
  # As an einsum, whose gradient for the weights takes 1 ms; as a product and a sum it took 26 ms
  # (4096 rows of 512 on a CPU, jax 0.10).
  return jnp.einsum(
    'tk...,tk->t...',
    chosen.astype(jnp.float32),
    weights,
    precision=jax.lax.Precision.HIGHEST,
  ).astype(chosen.dtype)


class ExpertChoicePlan(RowPlan):
  """Each expert holds the tokens that it chose; a token may be with none, or with all.

  Attributes:
    row_token: Token of each row, sorted by expert.
    num_tokens: T.
    num_experts: E.
  """

  row_token: Int[Array, 'S']
  num_tokens: int = struct.field(pytree_node=False)
  num_experts: int = struct.field(pytree_node=False)

  @property
  def dropped(self) -> Bool[Array, 'T E']:
    """Tokens that no expert chose, the same for every expert."""
    left_out = ~jnp.any(self.chosen(), axis=1, keepdims=True)
    return jnp.broadcast_to(left_out, (self.num_tokens, self.num_experts))

  def chosen(self) -> Bool[Array, 'T E']:
    """Returns whether each expert chose each token."""
    nobody = jnp.zeros((self.num_tokens, self.num_experts), jnp.bool_)
    return nobody.at[self.row_token, self._row_expert()].set(True)

  def dispatch(self, x: Float[Array, 'T *M']) -> Float[Array, 'S *M']:
    return x[self.row_token]

  def matmul(
    self, rows: Float[Array, 'S M'], weights: Float[Array, 'E M *F']
  ) -> Float[Array, 'S *F']:
    return _batched_matmul(rows, weights)

  def combine(
    self, rows: Float[Array, 'S *M'], weights: Float[Array, 'T E'] | None = None
  ) -> Float[Array, 'T *M']:
    values = rows.astype(jnp.float32)
    if weights is not None:
      chosen = weights[self.row_token, self._row_expert()]
      values = values * chosen.reshape(chosen.shape + (1,) * (rows.ndim - 1))
    total = jnp.zeros((self.num_tokens, *rows.shape[1:]), jnp.float32)
    return total.at[self.row_token].add(values).astype(rows.dtype)

  def _row_expert(self) -> Int[Array, 'S']:
    return jnp.arange(self.num_experts).repeat(self.row_token.shape[0] // self.num_experts)


def _batched_matmul(rows: Array, weights: Array) -> Array:
  """Multiplies when every expert has equally many rows."""
  num_experts = weights.shape[0]
  batched = rows.reshape(num_experts, rows.shape[0] // num_experts, rows.shape[1])
  products = jnp.einsum('ecm,em...->ec...', batched, weights)
  return products.reshape(rows.shape[0], *weights.shape[2:])


def make_plan(
  expert_index: Int[Array, 'T K'],
  config: RoutingConfig,
  *,
  num_experts: int,
  mask: Bool[Array, 'T'] | None = None,
  drops: bool = True,
) -> Plan:
  """Makes the plan that `config.dispatch` names.

  Args:
    expert_index: Chosen experts, the best first.
    config: The kind of dispatch and its capacity.
    num_experts: Matrices there are: one more than the config's, where a fallback is one of them.
    mask: Tokens outside it take no capacity.
    drops: If not, a plan that would drop tokens is made dropless: for generation, where a few
      tokens at a time are no fair share of a batch.
  """
  match config.dispatch if drops or config.dispatch == 'dense' else 'dropless':
    case 'dense':
      return dense_plan(expert_index, num_experts)
    case 'dropless':
      return dropless_plan(expert_index, num_experts)
    case 'capacity':
      return capacity_plan(
        expert_index,
        num_experts,
        expert_capacity=capacity_of(config, expert_index.shape[0]),
        num_groups=config.router_groups,
        mask=mask,
      )


def capacity_of(config: RoutingConfig, num_tokens: int) -> int:
  """Returns the rows of an expert in each router group, of `num_tokens` in all groups."""
  return expert_capacity(
    num_tokens // config.router_groups,
    config.num_experts,
    config.top_k,
    capacity_factor=config.capacity_factor,
    rounding=config.capacity_rounding,
    multiple=config.capacity_multiple,
  )


def dense_plan(expert_index: Int[Array, 'T K'], num_experts: int) -> DensePlan:
  """Plans every expert on every token."""
  return DensePlan(expert_index, num_experts)


def dropless_plan(expert_index: Int[Array, 'T K'], num_experts: int) -> SparsePlan:
  """Sorts the assignments by expert, stable in the token: the one sort of a routed layer."""
  flat = expert_index.reshape(-1)
  row_assignment = jnp.argsort(flat, stable=True)
  num_rows = flat.shape[0]
  assignment_row = (
    jnp.zeros_like(row_assignment)
    .at[row_assignment]
    .set(jnp.arange(num_rows, dtype=row_assignment.dtype), unique_indices=True)
  )
  # Unrolled: as a loop it takes 0.1 ms on an H200, most of it between its small kernels.
  ends = jnp.searchsorted(
    flat[row_assignment], jnp.arange(num_experts), side='right', method='scan_unrolled'
  )
  return SparsePlan(
    RowOrder(row_assignment, assignment_row.reshape(expert_index.shape)),
    group_sizes=jnp.diff(ends, prepend=0).astype(jnp.int32),
    dropped=None,
    expert_capacity=None,
  )


def capacity_plan(
  expert_index: Int[Array, 'T K'],
  num_experts: int,
  *,
  expert_capacity: int,
  num_groups: int = 1,
  mask: Bool[Array, 'T'] | None = None,
) -> SparsePlan:
  """Gives each expert a fixed number of rows in each router group, and drops what is over.

  All first choices come before all second choices; among equals, earlier tokens come first.

  Args:
    expert_index: Chosen experts, likeliest first.
    num_experts: E.
    expert_capacity: C, rows of an expert in a group.
    num_groups: G, router groups: consecutive runs of T / G tokens, which do not see each other.
      Rows are ordered by expert, then group.
    mask: Tokens outside it take no rows and are not counted as dropped.

  Raises:
    ValueError: T is not a multiple of `num_groups`.
  """
  num_tokens, top_k = expert_index.shape
  if num_tokens % num_groups:
    raise ValueError(f'{num_tokens} tokens do not divide into {num_groups} router groups')
  group_tokens = num_tokens // num_groups
  chosen = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.int32)
  if mask is not None:
    chosen = jnp.where(mask[:, None, None], chosen, 0)
  # [G, K, T / G, E]: in this order assignments queue for their expert.
  queue = chosen.reshape(num_groups, group_tokens, top_k, num_experts).swapaxes(1, 2)
  queue = queue.reshape(num_groups, top_k * group_tokens, num_experts)
  place = ((jnp.cumsum(queue, axis=1) - 1) * queue).sum(axis=2)
  wanted = queue.sum(axis=2) > 0
  place = place.reshape(num_groups, top_k, group_tokens).swapaxes(1, 2).reshape(num_tokens, top_k)
  wanted = wanted.reshape(num_groups, top_k, group_tokens).swapaxes(1, 2)
  wanted = wanted.reshape(num_tokens, top_k)

  num_rows = num_experts * num_groups * expert_capacity
  group = (jnp.arange(num_tokens) // group_tokens)[:, None]
  row = (expert_index * num_groups + group) * expert_capacity + place
  kept = wanted & (place < expert_capacity)
  assignment_row = jnp.where(kept, row, num_rows)
  num_assignments = num_tokens * top_k
  row_assignment = jnp.full((num_rows,), num_assignments, jnp.int32)
  row_assignment = row_assignment.at[assignment_row.reshape(-1)].set(
    jnp.arange(num_assignments, dtype=jnp.int32), mode='drop'
  )
  return SparsePlan(
    RowOrder(row_assignment, assignment_row),
    group_sizes=jnp.full((num_experts,), num_groups * expert_capacity, jnp.int32),
    dropped=wanted & ~kept,
    expert_capacity=num_groups * expert_capacity,
  )


def queue(
  expert_index: Int[Array, 'T K'], num_experts: int, mask: Bool[Array, 'T'] | None = None
) -> tuple[Int[Array, 'T K'], Bool[Array, 'T K'], Int[Array, 'K E']]:
  """Lets assignments queue for their expert, those of each choice on their own.

  Returns:
    How many earlier tokens want the same expert by the same choice, whether an assignment wants an
    expert at all, and how many want each, by choice.
  """
  chosen = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.int32)
  if mask is not None:
    chosen = jnp.where(mask[:, None, None], chosen, 0)
  before = jnp.cumsum(chosen, axis=0) - chosen
  return jnp.sum(before * chosen, axis=2), jnp.any(chosen > 0, axis=2), jnp.sum(chosen, axis=0)


def expert_choice_plan(
  scores: Float[Array, 'T E'],
  *,
  expert_capacity: int,
  num_groups: int = 1,
  mask: Bool[Array, 'T'] | None = None,
) -> ExpertChoicePlan:
  """Lets each expert choose, in each router group, the tokens that it scores highest.

  Expert Choice, section 3.2 (https://arxiv.org/abs/2202.09368). Whether a token is chosen depends
  on every token of its group, later ones as well.

  Args:
    scores: Of each expert for each token.
    expert_capacity: C, tokens that an expert chooses in a group; at most all there are.
    num_groups: G, router groups: consecutive runs of T / G tokens.
    mask: Tokens outside it are chosen last.

  Raises:
    ValueError: T is not a multiple of `num_groups`.
  """
  num_tokens, num_experts = scores.shape
  if num_tokens % num_groups:
    raise ValueError(f'{num_tokens} tokens do not divide into {num_groups} router groups')
  if mask is not None:
    scores = jnp.where(mask[:, None], scores, -1.0)
  group_tokens = num_tokens // num_groups
  by_expert = scores.T.reshape(num_experts, num_groups, group_tokens)
  _, chosen = jax.lax.top_k(by_expert, min(expert_capacity, group_tokens))
  chosen = chosen + (jnp.arange(num_groups) * group_tokens)[None, :, None]
  return ExpertChoicePlan(chosen.reshape(-1), num_tokens, num_experts)


def expert_capacity(
  num_tokens: int,
  num_experts: int,
  top_k: int,
  *,
  capacity_factor: float,
  rounding: Literal['up', 'down'] = 'up',
  multiple: int = 1,
) -> int:
  """Returns capacity_factor * T * K / E, rounded up or down to a multiple; at least one multiple.

  `num_tokens` is the number in one router group.
  """
  exact = capacity_factor * num_tokens * top_k / num_experts
  # A float product such as 1.1 * 10 is a hair above the integer it means: 1e-9 takes that back.
  steps = (
    math.ceil(exact / multiple - 1e-9) if rounding == 'up' else math.floor(exact / multiple + 1e-9)
  )
  return max(steps, 1) * multiple
