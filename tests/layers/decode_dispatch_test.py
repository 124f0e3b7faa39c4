"""Few tokens read the matrices that they chose, many are sorted: with the same result."""

import functools

import jax
import numpy as np
import pytest

from ssm_moe.config import RoutingConfig
from ssm_moe.layers import decode_dispatch, dispatch
from ssm_moe.ops import implementation
from tests import tolerances

_TOKENS, _IN, _EXPERTS = 5, 6, 4


def _expert_index(top_k):
  scores = jax.random.uniform(jax.random.key(1), (_TOKENS, _EXPERTS))
  return jax.lax.top_k(scores, top_k)[1]


@pytest.mark.parametrize('top_k', [2, pytest.param(1, marks=pytest.mark.extended)])
@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_chosen_matrices_give_what_a_grouped_matmul_does(rng, top_k, platform):
  keys = jax.random.split(rng, 4)
  # One token goes to no expert: what comes back is zero.
  expert_index = _expert_index(top_k).at[1].set(_EXPERTS)
  x = jax.random.normal(keys[0], (_TOKENS, _IN))
  # Two output axes, as conv and gate have, and a second matrix after a nonlinearity.
  first = jax.random.normal(keys[1], (_EXPERTS, _IN, 2, 3))
  second = jax.random.normal(keys[2], (_EXPERTS, _IN, _IN))
  weights = jax.random.uniform(keys[3], (_TOKENS, top_k))

  @functools.partial(jax.jit, static_argnums=0)
  def run(make, expert_index):
    plan = make(expert_index)
    branches = plan.apply(x, [first])
    return branches, plan.apply(x, [second, second], weights, between=jax.nn.relu)

  chosen = functools.partial(decode_dispatch.ChosenPlan, num_experts=_EXPERTS)
  dropless = functools.partial(dispatch.dropless_plan, num_experts=_EXPERTS)
  expected = run(dropless, expert_index)
  with implementation.compiling_for(platform):
    actual = jax.jit(lambda index: run.__wrapped__(chosen, index))(expert_index)
  tolerances.assert_close(actual, expected, rtol=tolerances.FLOAT32_REORDERED)
  assert not np.asarray(actual[0][1]).any() and np.asarray(actual[0][2]).any()


@pytest.mark.parametrize(
  ('kind', 'tokens', 'top_k', 'expected'),
  [
    ('dropless', 4, 1, decode_dispatch.ChosenPlan),
    ('capacity', 2, 2, decode_dispatch.ChosenPlan),
    ('dropless', 5, 1, dispatch.SparsePlan),
    ('capacity', 3, 2, dispatch.SparsePlan),
    ('dense', 4, 1, dispatch.DensePlan),
  ],
)
def test_as_many_assignments_as_experts_are_few(kind, tokens, top_k, expected):
  routing = RoutingConfig(num_experts=_EXPERTS, top_k=top_k, dispatch=kind)
  index = _expert_index(top_k)[:tokens]
  plan = decode_dispatch.make_plan(index, routing, num_experts=_EXPERTS)
  assert type(plan) is expected and plan.dropped is None
