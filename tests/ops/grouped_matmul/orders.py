"""Products that read and write in the order of tokens, against the same by plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np

from ssm_moe.ops.grouped_matmul import RowOrder, grouped_matmul, reference


def random_order(num_rows, top_k):
  row_assignment = np.random.default_rng(5).permutation(num_rows)
  assignment_row = np.argsort(row_assignment).reshape(-1, top_k)
  return RowOrder(jnp.array(row_assignment, jnp.int32), jnp.array(assignment_row, jnp.int32))


def value_and_gradients(implementation, order, take, put, x, weights, sizes, cotangent):
  def run(x, weights):
    return grouped_matmul(
      x,
      weights,
      sizes,
      take=order if take else None,
      put=order if put else None,
      implementation=implementation,
    )

  value, pull = jax.vjp(run, x, weights)
  return value, *pull(cotangent)


def by_indexing(order, take, put, x, weights, sizes, cotangent):
  def run(x, weights):
    rows = x[order.row_assignment // order.assignment_row.shape[1]] if take else x
    products = reference.grouped_matmul(rows, weights, sizes)
    return products[order.assignment_row] if put else products

  value, pull = jax.vjp(run, x, weights)
  return value, *pull(cotangent)
