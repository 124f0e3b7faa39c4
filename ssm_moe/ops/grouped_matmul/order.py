"""Between the order of tokens and the order of experts."""

from typing import no_type_check

import jax
from flax import struct

from ssm_moe.shapes import Array, Float, Int


@no_type_check  # JAX rebuilds it with shapes and layouts in place of arrays
class RowOrder(struct.PyTreeNode):
  """Where the chosen pairs of token and expert, the assignments, stand among rows.

  Of T tokens, each with K assignments, and S rows.

  Attributes:
    row_assignment: Which assignment, t * K + k, stands in each row; T * K in an empty row.
    assignment_row: Which row each assignment stands in; S if it has none.
  """

  row_assignment: Int[Array, 'S']
  assignment_row: Int[Array, 'T K']

  @property
  def top_k(self) -> int:
    return self.assignment_row.shape[1]

  def take(self, x: Float[Array, 'T *M']) -> Float[Array, 'S *M']:
    """Returns the token of each row; zeros in empty rows."""
    return _take_tokens(x, self.row_assignment, self.assignment_row)

  def put(self, rows: Float[Array, 'S *M']) -> Float[Array, 'T K *M']:
    """Returns the row of each assignment; zeros for those that have none."""
    return _take_rows(rows, self.row_assignment, self.assignment_row)


# Both moves are gathers, forward and backward. By automatic differentiation the backward pass of
# a gather is a scatter-add: on an H200, 0.61 ms for 65536 rows of 1024 against 0.10 ms.


@jax.custom_vjp
def _take_tokens(x, row_assignment, assignment_row):
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
  return rows.at[assignment_row].get(mode='fill', fill_value=0)


def _take_rows_forward(rows, row_assignment, assignment_row):
  return _take_rows(rows, row_assignment, assignment_row), (row_assignment, assignment_row)


def _take_rows_backward(residuals, d_taken):
  row_assignment, assignment_row = residuals
  flat = d_taken.reshape(assignment_row.size, *d_taken.shape[2:])
  return flat.at[row_assignment].get(mode='fill', fill_value=0), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)
