"""Plans against the dense oracle, against hand-worked routes, and with identity experts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_moe.layers import dispatch
from ssm_moe.ops import implementation
from tests import tolerances

_TOKENS, _IN, _OUT, _EXPERTS = 24, 5, 7, 4


def _routes(key, top_k):
  scores = jax.random.uniform(key, (_TOKENS, _EXPERTS))
  return jax.lax.top_k(scores, top_k)[::-1]


def _plans(expert_index, capacity=None, num_groups=1):
  top_k = expert_index.shape[1]
  return {
    'dense': dispatch.dense_plan(expert_index, _EXPERTS),
    'dropless': dispatch.dropless_plan(expert_index, _EXPERTS),
    'capacity': dispatch.capacity_plan(
      expert_index,
      _EXPERTS,
      expert_capacity=_TOKENS * top_k if capacity is None else capacity,
      num_groups=num_groups,
    ),
  }


def _layer(plan, x, weights, combine_weights):
  return plan.apply(x, [weights, weights.swapaxes(1, 2)], combine_weights, between=jax.nn.relu)


@pytest.mark.parametrize('weighted', [True, pytest.param(False, marks=pytest.mark.extended)])
@pytest.mark.parametrize('top_k', [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', ['dropless', 'capacity'])
def test_agrees_with_the_dense_oracle_when_nothing_is_dropped(rng, kind, top_k, weighted):
  keys = jax.random.split(rng, 4)
  expert_index, combine_weights = _routes(keys[0], top_k)
  x = jax.random.normal(keys[1], (_TOKENS, _IN))
  weights = jax.random.normal(keys[2], (_EXPERTS, _IN, _OUT))
  cotangent = jax.random.normal(keys[3], (_TOKENS, _IN))
  results = {}
  for name in ('dense', kind):

    def run(x, weights, combine_weights, name=name):
      used = combine_weights if weighted else None
      return _layer(_plans(expert_index)[name], x, weights, used)

    @jax.jit
    def both(x, weights, combine_weights, cotangent, run=run):
      y, pull = jax.vjp(run, x, weights, combine_weights)
      return y, *pull(cotangent)

    results[name] = both(x, weights, combine_weights, cotangent)
  tolerances.assert_close(
    results[kind], results['dense'], rtol=tolerances.FLOAT32_REORDERED, what=kind
  )


@pytest.mark.parametrize('axes', [(), (3,)])
def test_weights_are_multiplied_on_a_gpu_as_elsewhere(rng, axes):
  expert_index, combine_weights = _routes(rng, 2)
  plan = _plans(expert_index)['capacity']
  x = jax.random.normal(rng, (_TOKENS, *axes, _IN))

  def run(platform):
    def combine(x, weights):
      with implementation.compiling_for(platform):
        return plan.combine(plan.dispatch(x), weights)

    y, pull = jax.vjp(combine, x, combine_weights)
    return y, pull(x)

  tolerances.assert_close(run('gpu'), run('cpu'), rtol=tolerances.FLOAT32_REORDERED)


@pytest.mark.parametrize('kind', ['dense', 'dropless', 'capacity'])
def test_identity_experts_give_the_input_back(rng, kind):
  expert_index, _ = _routes(rng, 1)
  x = jax.random.normal(rng, (_TOKENS, _IN))
  identity = jnp.broadcast_to(jnp.eye(_IN), (_EXPERTS, _IN, _IN))
  plan = _plans(expert_index)[kind]
  y = plan.combine(plan.matmul(plan.dispatch(x), identity))
  chex.assert_trees_all_equal(y, x)
  assert plan.dropped is None or not plan.dropped.any()


def test_capacity_drops_the_latest_tokens_of_an_expert():
  # Expert 0 is wanted by tokens 0, 1, 3; expert 1 by tokens 2, 4; two places each: token 3 is over.
  expert_index = jnp.array([0, 0, 1, 0, 1])[:, None]
  plan = dispatch.capacity_plan(expert_index, 2, expert_capacity=2)
  x = jnp.arange(1.0, 6.0)[:, None]
  np.testing.assert_array_equal(plan.dispatch(x)[:, 0], [1, 2, 3, 5])
  np.testing.assert_array_equal(plan.combine(plan.dispatch(x))[:, 0], [1, 2, 3, 0, 5])
  np.testing.assert_array_equal(plan.dropped[:, 0], [0, 0, 0, 1, 0])


def test_first_choices_come_before_second_choices():
  # Token 0 has expert 1 as its second choice, tokens 1 and 2 as their first: with two places the
  # first choices win, though token 0 stands earlier.
  expert_index = jnp.array([[0, 1], [1, 0], [1, 0]])
  plan = dispatch.capacity_plan(expert_index, 2, expert_capacity=2)
  # Expert 0: token 0 first, then token 1's second choice. Expert 1: tokens 1 and 2.
  np.testing.assert_array_equal(plan.dropped, [[0, 1], [0, 0], [0, 1]])
  np.testing.assert_array_equal(plan.order.assignment_row == 4, plan.dropped)


def test_tokens_outside_the_mask_take_no_place():
  expert_index = jnp.zeros((4, 1), jnp.int32)
  mask = jnp.array([False, True, False, True])
  plan = dispatch.capacity_plan(expert_index, 2, expert_capacity=2, mask=mask)
  x = jnp.arange(1.0, 5.0)[:, None]
  np.testing.assert_array_equal(plan.combine(plan.dispatch(x))[:, 0], [0, 2, 0, 4])
  assert not plan.dropped.any()


def test_router_groups_do_not_see_each_other(rng):
  expert_index, _ = _routes(rng, 1)
  x = jax.random.normal(rng, (_TOKENS, _IN))
  half = _TOKENS // 2
  whole = dispatch.capacity_plan(expert_index, _EXPERTS, expert_capacity=2, num_groups=2)
  parts = [
    dispatch.capacity_plan(part, _EXPERTS, expert_capacity=2)
    for part in (expert_index[:half], expert_index[half:])
  ]
  y = whole.combine(whole.dispatch(x))
  expected = [plan.combine(plan.dispatch(part)) for plan, part in zip(parts, (x[:half], x[half:]))]
  chex.assert_trees_all_equal(y, jnp.concatenate(expected))
  assert whole.dropped.any()
  np.testing.assert_array_equal(whole.dropped, jnp.concatenate([plan.dropped for plan in parts]))


@pytest.mark.parametrize('kind', ['dense', 'dropless', 'capacity'])
def test_the_index_after_the_last_is_no_expert(rng, kind):
  expert_index = jnp.array([[1], [_EXPERTS], [0], [_EXPERTS], [1]])
  x = jax.random.normal(rng, (5, _IN))
  plan = _plans(expert_index, capacity=5)[kind]
  weights = jax.random.normal(rng, (_EXPERTS, _IN, _OUT))

  def run(x):
    return plan.combine(plan.matmul(plan.dispatch(x), weights))

  expected = jnp.einsum('tm,tmf->tf', x, weights[expert_index[:, 0] % _EXPERTS])
  expected = jnp.where(expert_index < _EXPERTS, expected, 0)
  tolerances.assert_close(jax.jit(run)(x), expected, rtol=tolerances.FLOAT32_REORDERED)
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(run(x))))(x)
  reached = np.abs(gradient).sum(axis=1) > 0
  np.testing.assert_array_equal(reached, expert_index[:, 0] < _EXPERTS)
  assert plan.dropped is None or not plan.dropped.any()


def test_experts_choose_their_best_tokens():
  # Expert 0 scores tokens 1 and 3 highest, expert 1 tokens 3 and 0: nobody chooses token 2.
  scores = jnp.array([[0.2, 0.8], [0.9, 0.1], [0.3, 0.2], [0.6, 0.9]])
  plan = dispatch.expert_choice_plan(scores, expert_capacity=2)
  np.testing.assert_array_equal(plan.row_token, [1, 3, 3, 0])
  np.testing.assert_array_equal(plan.chosen(), [[0, 1], [1, 0], [0, 0], [1, 1]])
  np.testing.assert_array_equal(plan.dropped, [[0, 0], [0, 0], [1, 1], [0, 0]])
  x = jnp.arange(1.0, 5.0)[:, None]
  y = plan.combine(plan.matmul(plan.dispatch(x), jnp.ones((2, 1, 1))), scores)
  np.testing.assert_allclose(y[:, 0], [0.8 * 1, 0.9 * 2, 0, (0.6 + 0.9) * 4], rtol=1e-6)


def test_expert_choice_equals_every_expert_on_every_token(rng):
  # With capacity for all, every expert takes every token: the dense oracle with top_k = E.
  keys = jax.random.split(rng, 3)
  scores = jax.random.uniform(keys[0], (_TOKENS, _EXPERTS))
  x = jax.random.normal(keys[1], (_TOKENS, _IN))
  weights = jax.random.normal(keys[2], (_EXPERTS, _IN, _OUT))
  everyone = jnp.broadcast_to(jnp.arange(_EXPERTS), scores.shape)

  def run(x, weights, scores, chosen):
    plan = (
      dispatch.expert_choice_plan(scores, expert_capacity=_TOKENS)
      if chosen
      else dispatch.dense_plan(everyone, _EXPERTS)
    )
    return jnp.sum(jnp.sin(_layer(plan, x, weights, scores)))

  actual, expected = (
    jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)), static_argnums=3)(
      x, weights, scores, chosen
    )
    for chosen in (True, False)
  )
  tolerances.assert_close(actual, expected, rtol=tolerances.FLOAT32_REORDERED)


def test_experts_choose_in_each_group_and_padding_last(rng):
  scores = jax.random.uniform(rng, (_TOKENS, _EXPERTS))
  half = _TOKENS // 2
  whole = dispatch.expert_choice_plan(scores, expert_capacity=3, num_groups=2)
  parts = [dispatch.expert_choice_plan(part, expert_capacity=3) for part in jnp.split(scores, 2)]
  np.testing.assert_array_equal(whole.chosen(), jnp.concatenate([p.chosen() for p in parts]))
  mask = jnp.arange(_TOKENS) < half
  masked = dispatch.expert_choice_plan(scores, expert_capacity=3, mask=mask)
  np.testing.assert_array_equal(masked.chosen()[:half], parts[0].chosen())
  assert not masked.chosen()[half:].any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, _EXPERTS - 1), min_size=_TOKENS, max_size=_TOKENS))
def test_dropless_rows_are_sorted_and_complete(choices):
  plan = dispatch.dropless_plan(jnp.array(choices)[:, None], _EXPERTS)
  np.testing.assert_array_equal(plan.group_sizes, np.bincount(choices, minlength=_EXPERTS))
  expected = np.argsort(choices, kind='stable')
  np.testing.assert_array_equal(plan.order.row_assignment, expected)
  np.testing.assert_array_equal(plan.order.assignment_row[:, 0][expected], np.arange(_TOKENS))


def test_gradients_are_gathers_not_scatters(rng):
  expert_index, weights = _routes(rng, 2)
  x = jax.random.normal(rng, (_TOKENS, _IN))
  for name in ('dropless', 'capacity'):
    plan = _plans(expert_index)[name]

    def loss(x, plan=plan):
      return jnp.sum(plan.combine(plan.dispatch(x), weights) ** 2)

    assert 'scatter' not in str(jax.make_jaxpr(jax.grad(loss))(x)), name


@pytest.mark.parametrize(
  ('tokens', 'factor', 'rounding', 'multiple', 'expected'),
  [
    (100, 1.0, 'up', 1, 13),  # 100 / 8 = 12.5
    (100, 1.0, 'down', 1, 12),
    (100, 1.25, 'up', 8, 16),  # 15.6
    (400, 1.1, 'up', 1, 55),  # 55 exactly, though 1.1 * 400 / 8 is 55.00000000000001
    (360, 1.4, 'down', 1, 63),  # 63 exactly, though 1.4 * 360 / 8 is 62.99999999999999
    (4, 1.0, 'down', 4, 4),  # never none
  ],
)
def test_expert_capacity(tokens, factor, rounding, multiple, expected):
  capacity = dispatch.expert_capacity(
    tokens, 8, 1, capacity_factor=factor, rounding=rounding, multiple=multiple
  )
  assert capacity == expected


def test_groups_must_divide_the_tokens():
  with pytest.raises(ValueError, match='24 tokens do not divide into 5 router groups'):
    dispatch.capacity_plan(jnp.zeros((24, 1), jnp.int32), _EXPERTS, expert_capacity=2, num_groups=5)
