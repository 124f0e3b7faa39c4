"""Moving tokens to their experts and back: plan once, `dispatch`, `matmul`, `combine`.

A plan is made from one routing decision and serves any number of projections. Three kinds obey the
same contract and agree to rounding whenever nothing is dropped:

  dense     every expert on every token, of which the chosen are kept: the oracle
  capacity  a fixed number of rows for each expert; what is over is dropped (Switch)
  dropless  rows sorted by expert, any number for each

An expert index of E, the number of experts, is no expert: what comes back for it is zero. A fourth
plan is made from what experts chose, not tokens: `ExpertChoicePlan`.

Between the calls, rows may pass through any elementwise function.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from ssm_moe.config import RoutingConfig
from ssm_moe.ops import implementation
from ssm_moe.ops.grouped_matmul import grouped_matmul
from ssm_moe.shapes import Array, Bool, Float, Int


class DensePlan(struct.PyTreeNode):
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


class SparsePlan(struct.PyTreeNode):
  """Rows hold the chosen pairs of token and expert only. S is their number.

  Attributes:
    row_assignment: Which assignment, t * K + k, stands in each row; T * K in an empty row.
    assignment_row: Which row each assignment stands in; S if it was dropped.
    group_sizes: Rows of each expert.
    dropped: Assignments over capacity; None if there is no limit.
    expert_capacity: Rows of every expert, filled or not; None if rows are as many as needed.
  """

  row_assignment: Int[Array, 'S']
  assignment_row: Int[Array, 'T K']
  group_sizes: Int[Array, 'E']
  dropped: Bool[Array, 'T K'] | None
  expert_capacity: int | None = struct.field(pytree_node=False)

  def dispatch(self, x: Float[Array, 'T *M']) -> Float[Array, 'S *M']:
    return _take_tokens(x, self.row_assignment, self.assignment_row)

  def matmul(
    self, rows: Float[Array, 'S M'], weights: Float[Array, 'E M *F']
  ) -> Float[Array, 'S *F']:
    if self.expert_capacity is None:
      return grouped_matmul(rows, weights, self.group_sizes)
    return _batched_matmul(rows, weights)

  def combine(
    self, rows: Float[Array, 'S *M'], weights: Float[Array, 'T K'] | None = None
  ) -> Float[Array, 'T *M']:
    taken = _take_rows(rows, self.row_assignment, self.assignment_row)
    if weights is None:
      return taken.sum(axis=1)
    # The weights are float32, and carry the router's gradient: multiplied in that precision.
    if implementation.platform() == 'gpu':
      # XLA joins these to the gather; the einsum would be one product of matrices for each token.
      wide = weights.reshape(weights.shape + (1,) * (taken.ndim - 2))
      return jnp.sum(taken.astype(jnp.float32) * wide, axis=1).astype(rows.dtype)
    # As an einsum, whose gradient for the weights takes 1 ms; as a product and a sum it took 26 ms
    # (4096 rows of 512 on a CPU, jax 0.10).
    return jnp.einsum(
      'tk...,tk->t...',
      taken.astype(jnp.float32),
      weights,
      precision=jax.lax.Precision.HIGHEST,
    ).astype(rows.dtype)


class ExpertChoicePlan(struct.PyTreeNode):
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


Plan = DensePlan | SparsePlan | ExpertChoicePlan


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
  ends = jnp.searchsorted(flat[row_assignment], jnp.arange(num_experts), side='right')
  return SparsePlan(
    row_assignment=row_assignment,
    assignment_row=assignment_row.reshape(expert_index.shape),
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
    row_assignment=row_assignment,
    assignment_row=assignment_row,
    group_sizes=jnp.full((num_experts,), num_groups * expert_capacity, jnp.int32),
    dropped=wanted & ~kept,
    expert_capacity=num_groups * expert_capacity,
  )


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


# Both moves are gathers, forward and backward. By automatic differentiation the backward pass of
# a gather is a scatter-add: on an H200, 0.61 ms for 65536 rows of 1024 against 0.10 ms.


@jax.custom_vjp
def _take_tokens(x, row_assignment, assignment_row):
  """Returns the token of each row; zeros in empty rows."""
  top_k = assignment_row.shape[1]
  return x.at[row_assignment // top_k].get(mode='fill', fill_value=0)


def _take_tokens_forward(x, row_assignment, assignment_row):
  return _take_tokens(x, row_assignment, assignment_row), (row_assignment, assignment_row)


def _take_tokens_backward(residuals, d_rows):
  row_assignment, assignment_row = residuals
  return _take_rows(d_rows, row_assignment, assignment_row).sum(axis=1), None, None


_take_tokens.defvjp(_take_tokens_forward, _take_tokens_backward)


@jax.custom_vjp
def _take_rows(rows, row_assignment, assignment_row):
  """Returns the row of each assignment; zeros for what was dropped."""
  return rows.at[assignment_row].get(mode='fill', fill_value=0)


def _take_rows_forward(rows, row_assignment, assignment_row):
  return _take_rows(rows, row_assignment, assignment_row), (row_assignment, assignment_row)


def _take_rows_backward(residuals, d_taken):
  row_assignment, assignment_row = residuals
  flat = d_taken.reshape(assignment_row.size, *d_taken.shape[2:])
  return flat.at[row_assignment].get(mode='fill', fill_value=0), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)
