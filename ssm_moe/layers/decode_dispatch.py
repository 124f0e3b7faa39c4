"""Plans for generation, where a step has few tokens and drops none of them.

Reading matrices is what takes time then. `ChosenPlan` reads those that were chosen and no other; a
grouped matmul reads each matrix that any token has chosen once, after a sort.
"""

from typing import no_type_check

import jax.numpy as jnp
from flax import struct

from ssm_moe.config import RoutingConfig
from ssm_moe.layers import dispatch
from ssm_moe.ops import implementation
from ssm_moe.shapes import Array, Float, Int


def make_plan(
  expert_index: Int[Array, 'T K'], config: RoutingConfig, *, num_experts: int
) -> dispatch.Plan:
  """Makes the plan for the tokens of a step; `dispatch.make_plan` makes those of sequences.

  With as many assignments as experts, at most 1.6 times as many matrices are read as with each once
  (even routing leaves a share of 1/e of the experts without a token), of which caches keep a part;
  for that, sorting and one kernel a group are saved. With more the factor grows without limit.

  Args:
    expert_index: Chosen experts, the best first.
    config: Its kind of dispatch is obeyed if it is dense, which drops nothing.
    num_experts: Matrices there are.
  """
  if config.dispatch == 'dense':
    return dispatch.dense_plan(expert_index, num_experts)
  if expert_index.size <= num_experts:
    return ChosenPlan(expert_index, num_experts)
  return dispatch.dropless_plan(expert_index, num_experts)


@no_type_check  # JAX rebuilds it with shapes and layouts in place of arrays
class ChosenPlan(dispatch.RowPlan):
  """Each assignment is a row, multiplied with its own expert's matrix. S is T K."""

  expert_index: Int[Array, 'T K']
  num_experts: int = struct.field(pytree_node=False)
  dropped: None = None

  def dispatch(self, x: Float[Array, 'T *M']) -> Float[Array, 'S *M']:
    return jnp.repeat(x, self.expert_index.shape[1], axis=0)

  def matmul(
    self, rows: Float[Array, 'S M'], weights: Float[Array, 'E M *F']
  ) -> Float[Array, 'S *F']:
    expert = self.expert_index.reshape(-1)
    chosen = weights.at[expert].get(mode='clip')
    if implementation.platform() == 'gpu':
      # Not a product of matrices, for which XLA would first copy those that were chosen.
      wide = rows.astype(jnp.float32).reshape(rows.shape + (1,) * (weights.ndim - 2))
      products = jnp.sum(wide * chosen.astype(jnp.float32), axis=1)
    else:
      # The copy is worth its time: on a CPU core, for one row of 128 x 512, 14 us against 697.
      products = jnp.einsum('sm,sm...->s...', rows, chosen, preferred_element_type=jnp.float32)
    products = products.astype(rows.dtype)
    is_one = (expert < self.num_experts).reshape((-1,) + (1,) * (products.ndim - 1))
    return jnp.where(is_one, products, 0)

  def combine(
    self, rows: Float[Array, 'S *M'], weights: Float[Array, 'T K'] | None = None
  ) -> Float[Array, 'T *M']:
    return dispatch.sum_choices(rows.reshape(*self.expert_index.shape, *rows.shape[1:]), weights)
