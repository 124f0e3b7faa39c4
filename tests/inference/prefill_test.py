"""Prompts of different length, read together in windows, leave what each leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.inference import prefill
from tests import tolerances
from tests.inference import models

_NAMES = ['mamba', pytest.param('hybrid', marks=pytest.mark.slow)]


def _alone(name, prompt):
  tokens = jnp.asarray([prompt])
  return prefill.read(models.params(name), tokens, config=models.MODELS[name])


def _row(result, i):
  """Returns the logits and the state of a row; the batch is the state's second axis."""
  logits, state = result
  return logits[i], jax.tree.map(lambda leaf: leaf[:, i], state)


@pytest.mark.parametrize('name', _NAMES)
def test_a_batch_equals_each_prompt_alone(name):
  # In three windows of 8: one begins where the last does, after windows that are padding to it; the
  # other within the first.
  prompts = [models.tokens(i, length) for i, length in enumerate((8, 20))]
  config = models.MODELS[name]
  together = prefill.prefill(models.params(name), prompts, config=config, window=8)
  for i, prompt in enumerate(prompts):
    expected = _row(_alone(name, prompt), 0)
    tolerances.assert_close(_row(together, i), expected, rtol=tolerances.FLOAT32_REORDERED)


@pytest.mark.extended  # `samples_test` has the same of a document
@pytest.mark.parametrize('name', _NAMES)
def test_a_prompt_goes_on_from_a_state(name):
  prompt, config = models.tokens(1, 20), models.MODELS[name]
  _, state = _alone(name, prompt[:8])
  rest = prefill.prefill(models.params(name), [prompt[8:]], config=config, state=state, window=8)
  tolerances.assert_close(
    _row(rest, 0), _row(_alone(name, prompt), 0), rtol=tolerances.FLOAT32_REORDERED
  )


@pytest.mark.parametrize(
  ('longest', 'windows'),
  [
    (1, [16]),
    (17, [32]),
    (100, [112]),
    (2000, [2048]),
    (8192, [8192]),
    (8193, [16, 8192]),
  ],
)
def test_lengths_are_rounded_up(longest, windows):
  assert list(prefill._windows(longest, 8192, padded=True)) == windows
  exact = list(prefill._windows(longest, 8192, padded=False))
  assert sum(exact) == longest and exact[1:] == windows[1:]


def test_few_lengths_and_little_padding():
  sizes = [sum(prefill._windows(n, 8192, padded=True)) for n in range(64, 8193)]
  assert len(set(sizes)) < 40
  assert max(size / n for n, size in zip(range(64, 8193), sizes)) <= 1.25


@pytest.mark.parametrize(
  ('prompts', 'state', 'message'),
  [
    ([], None, 'every prompt must have at least one token'),
    ([[1], []], None, 'every prompt must have at least one token'),
    ([[1], [1, 2]], {}, 'from a state must be of one length'),
  ],
)
def test_what_cannot_be_read_is_refused(prompts, state, message):
  with pytest.raises(ValueError, match=message):
    prefill.prefill({}, prompts, config=models.SMALL, state=state)


@pytest.mark.extended
def test_padding_is_never_a_prompt():
  # The token that padding is made of is one of the vocabulary: in a prompt it counts.
  zeros = [models.tokens(1, 4), [0, 0, *models.tokens(1, 4)]]
  logits, _ = prefill.prefill(models.params('mamba'), zeros, config=models.SMALL, window=8)
  assert not np.allclose(logits[0], logits[1])
