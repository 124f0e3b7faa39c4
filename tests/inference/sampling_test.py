"""Filters keep what a plain NumPy loop keeps, and rows draw on their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_moe.errors import UserError
from ssm_moe.inference.sampling import Sampling, candidates, draw, row_keys


def _kept(logits, top_k, top_p):
  """Returns the probability of each token that can be drawn, in float64."""
  order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
  if top_k is not None:
    order = order[:top_k]
  weights = np.exp(np.float64(logits)[order] - max(logits))
  probs, total, kept = weights / weights.sum(), 0.0, {}
  for token, prob in zip(order, probs):
    if top_p is not None and total >= top_p:
      break
    kept[token] = prob
    total += prob
  return {token: prob / total for token, prob in kept.items()}


_LOGITS = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.5, 3.0]), min_size=6, max_size=6)


# Thresholds that no sum of these probabilities meets, but for rounding.
@settings(deadline=None, max_examples=40)
@given(_LOGITS, st.sampled_from([None, 1, 4, 99]), st.sampled_from([None, 1e-9, 0.613]))
def test_what_can_be_drawn_is_what_a_loop_keeps(logits, top_k, top_p):
  sampling = Sampling(top_k=top_k, top_p=top_p)
  values, tokens = candidates(jnp.asarray([logits], jnp.float32), sampling)
  tokens = np.arange(len(logits)) if tokens is None else np.asarray(tokens[0])
  probs = np.asarray(jax.nn.softmax(values[0]), np.float64)
  actual = {int(token): prob for token, prob in zip(tokens, probs) if prob > 0}
  expected = _kept(logits, top_k, top_p)
  assert actual.keys() == expected.keys()
  for token, prob in expected.items():
    assert actual[token] == pytest.approx(prob, rel=1e-5)


def test_draws_have_the_probabilities_of_what_is_kept():
  logits, count = [0.0, 2.0, 1.0, -1.0, 1.5], 4000
  sampling = Sampling(temperature=0.5, top_k=4, top_p=0.9)
  keys = row_keys(jax.random.key(1), jnp.arange(count))
  tokens = draw(jnp.tile(jnp.asarray([logits]), (count, 1)), keys, sampling)
  expected = _kept([value / 0.5 for value in logits], 4, 0.9)
  assert len(expected) == 3
  found = np.bincount(np.asarray(tokens), minlength=5) / count
  for token in range(5):
    prob = expected.get(token, 0)
    deviation = np.sqrt(prob * (1 - prob) / count)
    assert abs(found[token] - prob) <= 4 * deviation


@pytest.mark.parametrize(
  'sampling',
  [pytest.param(Sampling(), marks=pytest.mark.extended), Sampling(top_k=19, top_p=0.99)],
  ids=str,
)
def test_a_row_draws_as_if_it_were_alone(rng, sampling):
  logits = jax.random.normal(rng, (4, 20))
  keys = row_keys(jax.random.key(2), jnp.arange(4))
  together = draw(logits, keys, sampling)
  alone = [
    draw(logits[i : i + 1], row_keys(jax.random.key(2), jnp.array([i])), sampling) for i in range(4)
  ]
  np.testing.assert_array_equal(together, jnp.concatenate(alone))
  assert together.dtype == jnp.int32


def test_temperature_0_takes_the_first_of_the_likeliest():
  logits = jnp.array([[0.0, 2.0, 2.0], [5.0, 1.0, 2.0]])
  keys = row_keys(jax.random.key(0), jnp.arange(2))
  assert draw(logits, keys, Sampling(temperature=0.0, top_k=2)).tolist() == [1, 0]


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'temperature': -1.0}, 'temperature is -1.0; it must be finite and not negative'),
    ({'temperature': float('nan')}, 'temperature is nan; it must be finite'),
    ({'top_k': 0}, 'top_k is 0; it must be at least 1'),
    ({'top_p': 0.0}, 'top_p is 0.0; it must be above 0 and at most 1'),
    ({'top_p': float('nan')}, 'top_p is nan; it must be above 0'),
  ],
)
def test_what_cannot_be_is_refused(settings, message):
  with pytest.raises(UserError, match=f'^{message}'):
    Sampling(**settings)
