"""Every implementation gives what the formula gives in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.ops.softmax_cross_entropy import softmax_cross_entropy
from tests import gpu, tolerances

_ANYWHERE = ['reference', 'xla']


def _on_gpu(*values):
  return pytest.param(*values, marks=gpu.MARKS)


_IMPLEMENTATIONS = [*_ANYWHERE, _on_gpu('triton_gpu')]


def _arguments(shape, vocab_size, logits_of=lambda rng, logits: 3 * logits):
  """Targets at both edges and between, weights of zero among others, padding that is no number."""
  *tokens, columns = shape
  rng = np.random.default_rng(columns)
  logits = logits_of(rng, rng.normal(size=shape)).astype(np.float32)
  targets = rng.integers(0, vocab_size, size=tokens, dtype=np.int32)
  targets.flat[0], targets.flat[-1] = 0, vocab_size - 1
  weights = rng.choice([0, 1, 2.5], size=tokens).astype(np.float32)
  weights.flat[-1] = 1
  chosen = np.take_along_axis(logits, targets[..., None], axis=-1)
  np.put_along_axis(logits, targets[..., None], np.where(chosen == -np.inf, 0, chosen), axis=-1)
  logits[..., vocab_size:] = np.nan
  return logits, targets, weights


def _expected(logits, targets, weights, vocab_size):
  """Subtracts the largest logit first, in float64."""
  tokens = logits[..., :vocab_size].astype(np.float64)
  shifted = tokens - tokens.max(axis=-1, keepdims=True)
  exps = np.exp(shifted)
  sums = exps.sum(axis=-1, keepdims=True)
  is_target = np.arange(vocab_size) == targets[..., None]
  chosen = np.where(is_target, shifted, 0).sum(axis=-1)
  gradient = np.zeros(logits.shape)
  gradient[..., :vocab_size] = (exps / sums - is_target) * weights[..., None]
  return (np.log(sums[..., 0]) - chosen) * weights, gradient


def _check(implementation, arguments, vocab_size, dtype):
  losses, gradient = softmax_cross_entropy(
    *map(jnp.asarray, arguments),
    vocab_size=vocab_size,
    gradient_dtype=dtype,
    implementation=implementation,
  )
  alone, none = softmax_cross_entropy(
    *map(jnp.asarray, arguments), vocab_size=vocab_size, implementation=implementation
  )
  assert none is None and losses.dtype == jnp.float32 and gradient.dtype == dtype
  expected_losses, expected_gradient = _expected(*arguments, vocab_size)
  for actual in (losses, alone):
    tolerances.assert_close(actual, expected_losses, rtol=tolerances.FLOAT32_REORDERED)
  rtol = tolerances.BY_DTYPE[jnp.dtype(dtype).name]
  tolerances.assert_close(gradient, expected_gradient, rtol=rtol)
  gradient = np.asarray(gradient)
  assert not gradient[..., vocab_size:].any()
  assert not gradient[arguments[2] == 0].any()


def _large(rng, logits):
  """A row of equal numbers among rows of numbers far apart."""
  logits *= 1e4
  logits[4] = 88.0
  return logits


def _huge(rng, logits):
  """Near the largest number there is: the least that a program begins with is not far below."""
  logits[:] = -5e37
  logits[:, 3] = 5e37
  return logits


def _impossible_tokens(rng, logits):
  """A third of the tokens, and every one of the first half, has no probability."""
  logits[rng.random(logits.shape) < 0.3] = -np.inf
  logits[..., : logits.shape[-1] // 2] = -np.inf
  return logits


_CASES = {
  'plain': ((7, 384), 384),
  'padded': ((5, 3, 128), 77),
  'one': ((1, 4), 1),
  'several_rows_a_program': ((1061, 12), 10),
  'vocabulary_of_a_model': ((3, 50304), 50277),
}
_CASES_ON_A_GPU = {
  'several_large_rows': ((301, 50304), 50277),
  'two_programs': ((331, 9000), 8999),
  'as_many_as_fit': ((5, 57344), 57344),
}


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('case', [*_CASES, *map(_on_gpu, _CASES_ON_A_GPU)])
@pytest.mark.parametrize('implementation', _IMPLEMENTATIONS)
def test_equals_the_formula(implementation, case, dtype):
  shape, vocab_size = (_CASES | _CASES_ON_A_GPU)[case]
  _check(implementation, _arguments(shape, vocab_size), vocab_size, dtype)


@pytest.mark.parametrize('implementation', _IMPLEMENTATIONS)
def test_a_gradient_of_float16_equals_the_formula(implementation):
  shape, vocab_size = _CASES['padded']
  _check(implementation, _arguments(shape, vocab_size), vocab_size, jnp.float16)


@pytest.mark.parametrize('columns', [64, 20000])
@pytest.mark.parametrize('logits_of', [_large, _huge, _impossible_tokens])
@pytest.mark.parametrize('implementation', _IMPLEMENTATIONS)
def test_extreme_logits_never_give_nan(implementation, logits_of, columns):
  vocab_size = columns - 3
  arguments = _arguments((9, columns), vocab_size, logits_of)
  _check(implementation, arguments, vocab_size, jnp.bfloat16)


@pytest.mark.parametrize('implementation', _IMPLEMENTATIONS)
def test_what_is_not_finite_is_not_hidden(implementation):
  logits = np.zeros((4, 256), np.float32)
  logits[1, 200], logits[2, 7] = np.nan, np.inf
  logits[3, 0] = -np.inf  # its target
  losses, gradient = softmax_cross_entropy(
    jnp.asarray(logits),
    jnp.zeros(4, jnp.int32),
    jnp.ones(4),
    gradient_dtype=jnp.float32,
    implementation=implementation,
  )
  np.testing.assert_array_equal(np.isfinite(losses), [True, False, False, False])
  assert losses[3] == jnp.inf
  np.testing.assert_array_equal(np.isfinite(gradient).all(axis=1), [True, False, False, True])


@pytest.mark.parametrize('implementation', [_on_gpu('triton_gpu')])
def test_two_runs_are_equal_to_the_bit(implementation):
  run = jax.jit(
    lambda *arguments: softmax_cross_entropy(
      *arguments, vocab_size=50277, gradient_dtype=jnp.bfloat16, implementation=implementation
    )
  )
  arguments = tuple(map(jnp.asarray, _arguments((600, 50304), 50277)))
  chex.assert_trees_all_equal(run(*arguments), run(*arguments))


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    ({'targets': jnp.zeros(3, jnp.int32)}, ValueError, r'targets has shape \(3,\).*\(2,\)'),
    ({'weights': jnp.zeros((2, 1))}, ValueError, r'weights has shape \(2, 1\)'),
    ({'vocab_size': 9}, ValueError, 'vocab_size is 9; it must be 1 to 8'),
    ({'logits': jnp.zeros((2, 8), jnp.bfloat16)}, TypeError, 'logits is bfloat16'),
    ({'targets': jnp.zeros(2)}, TypeError, 'targets is float32; it must be integer'),
    ({'implementation': 'fast'}, ValueError, "no implementation 'fast'"),
  ],
)
def test_what_does_not_fit_is_named(changes, error, message):
  arguments = {
    'logits': jnp.zeros((2, 8)),
    'targets': jnp.zeros(2, jnp.int32),
    'weights': jnp.ones(2),
  }
  with pytest.raises(error, match=message):
    softmax_cross_entropy(**(arguments | changes))
