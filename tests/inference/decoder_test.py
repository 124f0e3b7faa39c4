"""A step of generation is the step of the model, on weights that were laid out once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.inference import decoder, loop
from ssm_moe.inference.sampling import Sampling, row_keys
from ssm_moe.models import lm
from tests import tolerances
from tests.inference import models

_CASES = [
  ('mamba', 'float32'),
  pytest.param('hybrid', 'bfloat16', marks=pytest.mark.slow),
  pytest.param('rom', 'bfloat16', marks=pytest.mark.slow),
  *(
    pytest.param(name, dtype, marks=pytest.mark.extended)
    for name, dtype in (('mamba', 'bfloat16'), ('rom', 'float32'), ('moe_mamba', 'float32'))
  ),
]


@pytest.mark.parametrize(('name', 'dtype'), _CASES)
def test_equals_the_step_of_the_model(name, dtype):
  # In bfloat16 too: weights are rounded where layers would have rounded them, and nowhere else.
  config = dataclasses.replace(models.MODELS[name], dtype=dtype)
  tokens, numbers = jnp.array([5, 200, 31]), np.random.default_rng(0)
  before = jax.tree.map(
    # Of counters: a few tokens, not the same in each row.
    lambda leaf: jnp.asarray(numbers.uniform(1, 4, leaf.shape).astype(leaf.dtype)),
    lm.initial_state(config, 3),
  )

  @jax.jit
  def both(params, before):
    weights, state = decoder.make_weights(params, config=config), decoder.apart(before, config)
    logits, state = decoder.step(weights, tokens, state, config=config)
    expected = lm.LM(config).apply({'params': params}, tokens, before, method='step')
    actual = logits, decoder.stacked(state)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (actual, expected))

  actual, expected = both(models.params(name), before)
  assert actual[0].shape == (3, models.VOCAB)
  tolerances.assert_close(actual, expected, rtol=tolerances.FLOAT32_REORDERED)


def _compiled(name, batch, **changes):
  config = dataclasses.replace(models.MODELS[name], **changes)
  weights = jax.eval_shape(
    functools.partial(decoder.make_weights, config=config), models.params(name)
  )
  position = jax.eval_shape(
    lambda: loop.Position(
      token=jnp.zeros(batch, jnp.int32),
      state=decoder.initial_state(config, batch),
      keys=row_keys(jax.random.key(0), jnp.arange(batch)),
      drawn=jnp.zeros(batch, jnp.int32),
    )
  )
  compiled = loop.advance.lower(
    weights, position, config=config, sampling=Sampling(temperature=0.0), num_tokens=4
  ).compile()
  return compiled.memory_analysis(), weights, position


def _bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', ['mamba', pytest.param('hybrid', marks=pytest.mark.extended)])
def test_the_state_is_written_in_place(name):
  # A batch at which the state is nearly all that there is; a copy of it would be a temporary.
  memory, weights, position = _compiled(name, batch=512)
  state = _bytes(position.state)
  assert state > 5 * _bytes(weights)
  assert memory.alias_size_in_bytes >= state
  assert memory.temp_size_in_bytes < state, memory


def test_the_loop_has_no_copy_of_the_weights():
  memory, weights, _ = _compiled('mamba', batch=1)
  # Of the head, whose rows are read by columns, there is one.
  assert memory.temp_size_in_bytes < 1.5 * _bytes(weights.head), memory
