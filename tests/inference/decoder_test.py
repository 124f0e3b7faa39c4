"""A step of generation is the step of the model, on weights that were laid out once."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe.config import AttentionConfig, MambaConfig
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
  params = jax.eval_shape(lm.LM(config).init, jax.random.key(0), jnp.zeros((1, 7), jnp.int32))
  weights = jax.eval_shape(
    functools.partial(decoder.make_weights, config=config), nn.unbox(params)['params']
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
  return compiled.memory_analysis(), weights, position, compiled.as_text()


def _bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# A batch, or a window, at which the state is nearly all that there is; a copy of it would be a
# temporary.
@pytest.mark.parametrize(
  ('name', 'batch', 'changes'),
  [
    ('mamba', 512, {'mamba': MambaConfig(d_state=16)}),
    pytest.param(
      'hybrid',
      8,
      {'attention': AttentionConfig(num_heads=4, num_kv_heads=2, window=8192)},
      marks=pytest.mark.extended,
    ),
  ],
)
def test_the_state_is_written_in_place(name, batch, changes):
  memory, weights, position, _ = _compiled(name, batch, **changes)
  state = _bytes(position.state)
  assert state > 10 * _bytes(weights)
  assert memory.alias_size_in_bytes >= state
  assert memory.temp_size_in_bytes < 0.9 * state, memory


def test_nothing_as_large_as_a_matrix_is_made_in_the_loop():
  _, weights, _, text = _compiled('mamba', batch=1, d_model=64)
  smallest = weights.periods[0]['layer_mamba_0']['out_proj']['kernel'].size
  body = re.search(r' while\(.*body=%?([\w.-]+)', text)[1]
  made = re.search(rf'^%?{re.escape(body)} .*?^}}', text, re.MULTILINE | re.DOTALL)[0]
  sizes = {}
  for name, shape, kind in re.findall(r'%?([\w.-]+) = \w+\[([\d,]*)\]\S* ([\w-]+)\(', made):
    if kind not in ('parameter', 'get-tuple-element', 'bitcast'):
      sizes[name] = math.prod(map(int, filter(None, shape.split(','))))
  assert len(sizes) > 20
  assert max(sizes.values()) < smallest, sizes
