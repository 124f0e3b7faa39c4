"""What is generated is what full forward passes say, whatever the model was trained with."""

import dataclasses
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe.config import MambaConfig, ModelConfig, MoEConfig, RoMConfig
from ssm_moe.inference.generate import generate
from ssm_moe.models import lm

_VOCAB = 31
# With tied embeddings an untrained model repeats what it reads.
_SMALL = {
  'vocab_size': _VOCAB,
  'd_model': 16,
  'num_periods': 2,
  'tie_embeddings': False,
  'mamba': MambaConfig(d_state=4),
}
_MODELS = {
  'mamba': ModelConfig(**_SMALL),
  'rom': ModelConfig(
    **(_SMALL | {'mamba': MambaConfig(d_state=4, rom=RoMConfig(kind='shared', num_experts=4))})
  ),
  # Groups that a prompt does not fill, and a capacity that would drop most of its tokens.
  'moe_mamba': ModelConfig(
    **_SMALL,
    pattern='M E',
    moe=MoEConfig(num_experts=4, capacity_factor=0.25, router_groups=8),
  ),
}


@functools.cache
def _params(name):
  init = jax.jit(lambda key: lm.LM(_MODELS[name]).init(key, jnp.zeros((1, 8), jnp.int32)))
  return nn.unbox(init(jax.random.key(0)))['params']


def _prompt(length):
  return jax.random.randint(jax.random.key(3), (2, length), 0, _VOCAB, jnp.int32)


def _dropless_logits(config, params, tokens):
  moe = dataclasses.replace(config.moe, dispatch='dropless', router_groups=1)
  network = lm.LM(dataclasses.replace(config, moe=moe))

  @jax.jit
  def logits(params, tokens):
    output = network.apply({'params': params}, tokens)
    return network.apply({'params': params}, output.hidden, method='logits')

  return logits(params, tokens)


@pytest.mark.parametrize(
  ('name', 'length'),
  [
    ('rom', 5),
    ('moe_mamba', 5),
    ('mamba', 1),
    pytest.param('mamba', 5, marks=pytest.mark.extended),
  ],
)
def test_temperature_0_takes_the_likeliest_token_of_a_full_forward_pass(name, length):
  config, params = _MODELS[name], _params(name)
  prompt = _prompt(length)
  tokens = generate(
    params, prompt, jax.random.key(0), config=config, num_tokens=12, temperature=0.0
  )
  chex.assert_shape(tokens, (2, 12))
  assert len(set(np.asarray(tokens).ravel().tolist())) > 3
  # Every model is causal: one pass over prompt and answer holds all the passes of greedy decoding.
  logits = _dropless_logits(config, params, jnp.concatenate([prompt, tokens], axis=1))
  np.testing.assert_array_equal(tokens, jnp.argmax(logits[:, length - 1 : -1], axis=-1))


def test_a_single_token_is_the_first_of_many():
  config, params = _MODELS['mamba'], _params('mamba')
  one, many = (
    generate(params, _prompt(5), jax.random.key(0), config=config, num_tokens=n, temperature=0.0)
    for n in (1, 12)
  )
  chex.assert_shape(one, (2, 1))
  assert one.dtype == many.dtype == jnp.int32
  np.testing.assert_array_equal(one, many[:, :1])


def test_no_tokens_are_written_where_none_are_asked_for():
  tokens = generate(
    _params('mamba'),
    _prompt(5),
    jax.random.key(0),
    config=_MODELS['mamba'],
    num_tokens=0,
    temperature=1.0,
  )
  chex.assert_shape(tokens, (2, 0))
  assert tokens.dtype == jnp.int32


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    (dict(prompt=_prompt(0)), ValueError, r'prompt has shape \(2, 0\); .* at least one token'),
    (dict(prompt=_prompt(5)[0]), ValueError, r'prompt has shape \(5,\); it must be \[B, L\]'),
    (dict(prompt=_prompt(5) / 2), TypeError, 'prompt is float32; it must be integer'),
    (dict(num_tokens=-1), ValueError, 'num_tokens is -1; it must be finite and not negative'),
    (dict(temperature=-0.5), ValueError, 'temperature is -0.5; it must be finite and not neg'),
    (dict(temperature=float('nan')), ValueError, 'temperature is nan; it must be finite'),
  ],
)
def test_what_cannot_be_continued_is_refused(change, error, message):
  arguments = dict(prompt=_prompt(5), num_tokens=3, temperature=1.0) | change
  with pytest.raises(error, match=f'^generate: {message}'):
    # Where types are checked at run time, they would answer before the function does.
    inspect.unwrap(generate)({}, key=jax.random.key(0), config=_MODELS['mamba'], **arguments)


def test_the_key_decides_and_nothing_else():
  def draw(seed):
    return generate(
      _params('mamba'),
      _prompt(5),
      jax.random.key(seed),
      config=_MODELS['mamba'],
      num_tokens=12,
      temperature=1.0,
    )

  np.testing.assert_array_equal(draw(1), draw(1))
  assert (draw(1) != draw(2)).any()


@pytest.mark.parametrize('temperature', [0.5, 2.0])
def test_draws_follow_the_probabilities_at_the_temperature(temperature):
  # One token after one prompt, 4000 times: frequencies within four deviations of softmax(l / t).
  config, params, count = _MODELS['mamba'], _params('mamba'), 4000
  params = params | {'head': 16 * params['head']}  # else nearly flat
  prompt = jnp.tile(_prompt(5)[:1], (count, 1))
  tokens = generate(
    params, prompt, jax.random.key(9), config=config, num_tokens=1, temperature=temperature
  )
  logits = _dropless_logits(config, params, prompt[:1])[0, -1]
  expected = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
  assert expected.max() > 2 / _VOCAB
  found = np.bincount(np.asarray(tokens)[:, 0], minlength=_VOCAB) / count
  deviation = np.sqrt(expected * (1 - expected) / count)
  assert (np.abs(found - expected) <= 4 * deviation + 1 / count).all()
