"""Rows are written as if each were alone, in one go or in pieces, today or tomorrow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.config import ConfigError, MoEConfig
from ssm_moe.inference import prefill, writer
from ssm_moe.inference.generate import generate
from ssm_moe.inference.sampling import Sampling
from tests import tolerances
from tests.inference import models

_MOST = writer.CHUNK + 9  # more than one look at the device
_AT_RANDOM = Sampling()
# Of the others, each has nothing here that no other test of its state and its step has.
_NAMES = ['mamba', pytest.param('hybrid', marks=pytest.mark.extended)]
_ROM = pytest.param('rom', marks=pytest.mark.slow)


def _writer(name, prompts, *, sampling=_AT_RANDOM, **options):
  model = writer.prepare(models.params(name), models.MODELS[name])
  return writer.Writer(model, prompts, jax.random.key(5), sampling=sampling, **options)


def _all(rows, most=_MOST):
  parts = []
  while (tokens := rows.more(most - rows.written)).shape[1]:
    parts.append(tokens)
  return np.concatenate(parts, axis=1)


@pytest.mark.parametrize('name', [*_NAMES, _ROM])
def test_rows_of_a_batch_are_written_as_if_alone(name):
  # More rows than experts together, fewer alone: matrices are found in two ways.
  prompts = [models.tokens(i, length) for i, length in enumerate((4, 9, 1, 13, 6))]
  together = _all(_writer(name, prompts))
  assert together.shape == (5, _MOST)
  for i in (1, 3):
    alone = _all(_writer(name, [prompts[i]], numbers=[i]))
    np.testing.assert_array_equal(together[i], alone[0])
  assert len({*together.ravel().tolist()}) > 20


@pytest.mark.slow
@pytest.mark.parametrize('name', _NAMES)
def test_pieces_are_what_is_written_in_one_go(name):
  prompt = models.tokens(3, 7)
  greedy = Sampling(temperature=0.0)
  expected = generate(
    models.params(name),
    jnp.asarray([prompt]),
    jax.random.key(0),
    config=models.MODELS[name],
    num_tokens=_MOST,
    temperature=0.0,
  )
  np.testing.assert_array_equal(_all(_writer(name, [prompt], sampling=greedy)), expected)


@pytest.mark.slow
@pytest.mark.parametrize('name', _NAMES)
def test_the_state_after_any_token_is_that_of_the_text_so_far(name):
  prompt, params = models.tokens(4, 6), models.params(name)
  for count in (0, 3, writer.CHUNK + 4, _MOST):
    rows = _writer(name, [prompt], rewinds=True)
    tokens = _all(rows)[0].tolist()
    state, last = rows.state_after(count)
    text = prompt + tokens[:count]
    assert last.tolist() == text[-1:]
    _, expected = prefill.prefill(params, [text[:-1]], config=models.MODELS[name])
    tolerances.assert_close(state, expected, rtol=tolerances.FLOAT32_REORDERED)


@pytest.mark.slow
def test_rows_end_at_their_end_of_text_and_do_not_hold_up_others():
  prompts = [models.tokens(i, 5) for i in range(3)]
  free = _all(_writer('mamba', prompts))
  end = int(free[1, 3])
  rows = _writer('mamba', prompts, end_of_text=end)
  first = _all(rows, most=writer.CHUNK + 1)
  np.testing.assert_array_equal(first, free[:, : first.shape[1]])
  assert rows.ended[1]
  rows.ended[:] = True
  assert rows.more(5).shape == (3, 0)
  # Alone, it is not written any further.
  alone = _writer('mamba', [prompts[1]], numbers=[1], end_of_text=end)
  assert alone.more(_MOST).shape == (1, 1)
  assert alone.more(_MOST)[0].tolist() == free[1, 1:4].tolist()
  assert alone.more(_MOST).shape == (1, 0)


def test_what_looks_ahead_does_not_write():
  moe = MoEConfig(num_experts=4, choice='expert')
  acausal = dataclasses.replace(models.MODELS['moe_mamba'], moe=moe)
  with pytest.raises(ConfigError, match=r'moe.choice is expert.*generation'):
    writer.prepare({}, acausal)
