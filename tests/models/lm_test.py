"""Properties that every architecture has."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe.config import (
  AttentionConfig,
  ConfigError,
  Mamba2Config,
  MambaConfig,
  MLPConfig,
  ModelConfig,
  MoEConfig,
  RoMConfig,
)
from ssm_moe.layers.router import Routes, RoutingAux
from ssm_moe.models import lm
from ssm_moe.models.block import Period
from tests import tolerances

_BATCH, _LENGTH, _VOCAB = 2, 12, 23

_ROM = MambaConfig(d_state=4, rom=RoMConfig(kind='shared', num_experts=4))
_MOE = MoEConfig(num_experts=4, dispatch='dropless')
_SMALL = ModelConfig(vocab_size=_VOCAB, d_model=8, num_periods=2, mamba=MambaConfig(d_state=4))
_MODELS = {
  'mamba': _SMALL,
  'moe_mamba': dataclasses.replace(_SMALL, pattern='M E', moe=_MOE, tie_embeddings=False),
  'rom': dataclasses.replace(_SMALL, mamba=_ROM),
  'rom_and_moe': dataclasses.replace(
    _SMALL,
    pattern='ME',
    moe=dataclasses.replace(_MOE, routing='mixer', activation='swiglu', num_shared_experts=1),
    mamba=_ROM,
    tie_embeddings=False,
  ),
  'samba': dataclasses.replace(
    _SMALL,
    pattern='M F W F',
    mamba=_ROM,
    attention=AttentionConfig(num_heads=2, window=4),
    mlp=MLPConfig(activation='swiglu'),
  ),
  'parallel': dataclasses.replace(_SMALL, pattern='M+E', moe=_MOE),
  'mamba2': dataclasses.replace(
    _SMALL,
    pattern='S A s',
    mamba2=Mamba2Config(
      head_dim=4, d_state=6, rom=RoMConfig(kind='shared', num_experts=4, top_k=2)
    ),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, cache_length=32),
  ),
  'period': dataclasses.replace(
    _SMALL, pattern='M M', mamba=MambaConfig(d_state=4, rom=RoMConfig(kind='period'))
  ),
}
# Each has something that no other of the first two has; what the third have, others have too.
_FAST = ('mamba', 'rom_and_moe')
_SLOW = ('samba', 'parallel', 'period', 'mamba2')
_PARAMS = [
  name
  if name in _FAST
  else pytest.param(name, marks=pytest.mark.slow if name in _SLOW else pytest.mark.extended)
  for name in _MODELS
]


@functools.cache
def _built(name):
  key = jax.random.key(0)
  module = lm.LM(_MODELS[name])
  tokens = jax.random.randint(key, (_BATCH, _LENGTH), 0, _VOCAB)
  return module, nn.unbox(jax.jit(module.init)(key, tokens)), tokens


@pytest.fixture(params=_PARAMS)
def model(request):
  return _built(request.param)


@functools.partial(jax.jit, static_argnums=0)
def _logits(module, variables, tokens, **options):
  output = module.apply(variables, tokens, **options)
  return module.apply(variables, output.hidden, method='logits'), output


@functools.partial(jax.jit, static_argnums=0)
def _step(module, variables, tokens, state):
  return module.apply(variables, tokens, state, method='step')


def test_no_gradient_from_later_tokens(model):
  module, variables, tokens = model

  # Each position gets a token of its own, so that the gradient of its embedding is its alone.
  vocab_size = _VOCAB + tokens.size
  wider = lm.LM(dataclasses.replace(module.config, vocab_size=vocab_size))
  ids = _VOCAB + jnp.arange(tokens.size).reshape(tokens.shape)

  def one_output(embedded):
    table = jnp.concatenate([variables['params']['embedding'], embedded])
    params = variables['params'] | {'embedding': table}
    if 'head' in params:
      params['head'] = jnp.zeros((module.config.d_model, vocab_size))
    return wider.apply({'params': params}, ids).hidden[:, 5].sum()

  embedded = variables['params']['embedding'][tokens.reshape(-1)]
  gradient = jax.jit(jax.grad(one_output))(embedded).reshape(_BATCH, _LENGTH, -1)
  reached = np.abs(gradient).sum(axis=(0, 2)) > 0
  np.testing.assert_array_equal(reached, np.arange(_LENGTH) <= 5)


def test_sequence_equals_prefill_and_steps(model):
  module, variables, tokens = model
  logits, output = _logits(module, variables, tokens)
  state = _logits(module, variables, tokens[:, :7])[1].state
  for t in range(7, _LENGTH):
    one, state = _step(module, variables, tokens[:, t], state)
    tolerances.assert_close(one, logits[:, t], rtol=tolerances.FLOAT32_REORDERED)
  tolerances.assert_close(state, output.state, rtol=tolerances.FLOAT32_REORDERED)


def test_steps_from_the_initial_state(model):
  module, variables, tokens = model
  logits, _ = _logits(module, variables, tokens[:, :1])
  state = lm.initial_state(module.config, _BATCH)
  one, _ = _step(module, variables, tokens[:, 0], state)
  tolerances.assert_close(one, logits[:, 0], rtol=tolerances.FLOAT32_REORDERED)


def test_a_step_drops_nothing(rng):
  dropless = _MODELS['moe_mamba']
  # At this capacity one row in all would be kept, and seven groups do not divide two tokens.
  tight = {'dispatch': 'capacity', 'capacity_factor': 0.1, 'router_groups': 7}
  rom = dataclasses.replace(_ROM.rom, **tight)
  config = dataclasses.replace(
    dropless,
    moe=dataclasses.replace(_MOE, **tight),
    mamba=dataclasses.replace(_ROM, rom=rom),
  )
  tokens = jax.random.randint(rng, (_BATCH, 7), 0, _VOCAB)
  variables = nn.unbox(jax.jit(lm.LM(config).init)(rng, tokens))
  state = lm.initial_state(config, _BATCH)
  logits, _ = _step(lm.LM(config), variables, tokens[:, 0], state)
  free = dataclasses.replace(config, moe=_MOE, mamba=_ROM)
  expected, _ = _step(lm.LM(free), variables, tokens[:, 0], state)
  chex.assert_trees_all_equal(logits, expected)


def test_packed_documents_equal_each_alone(model):
  module, variables, tokens = model
  ids = jnp.broadcast_to(jnp.where(jnp.arange(_LENGTH) < 5, 1, 2), tokens.shape)
  packed, output = _logits(module, variables, tokens, segment_ids=ids)
  first, _ = _logits(module, variables, tokens[:, :5])
  second, end = _logits(module, variables, tokens[:, 5:])
  expected = jnp.concatenate([first, second], axis=1)
  tolerances.assert_close(packed, expected, rtol=tolerances.FLOAT32_REORDERED)
  tolerances.assert_close(output.state, end.state, rtol=tolerances.FLOAT32_REORDERED)


def test_padding_changes_nothing_that_counts(model):
  module, variables, tokens = model
  padded = jnp.pad(tokens, ((0, 0), (0, 4)), constant_values=3)
  mask = jnp.pad(jnp.ones_like(tokens), ((0, 0), (0, 4))) > 0
  ids = mask.astype(jnp.int32)
  logits, output = _logits(module, variables, padded, segment_ids=ids, mask=mask)
  expected, alone = _logits(module, variables, tokens)
  tolerances.assert_close(
    (logits[:, :_LENGTH], output.aux), (expected, alone.aux), rtol=tolerances.FLOAT32_REORDERED
  )


def _value_and_gradient(config, variables, tokens):
  def loss(variables):
    logits, output = _logits(lm.LM(config), variables, tokens)
    return jnp.mean(logits**2) + lm.auxiliary_loss(output.aux, config)

  return jax.jit(jax.value_and_grad(loss))(variables)


@pytest.mark.slow
@pytest.mark.parametrize('change', [{'remat': 'period'}, {'scan_periods': False}])
@pytest.mark.parametrize('model', ['rom_and_moe'], indirect=True)
def test_rematerialised_and_unrolled_equal_the_scan(model, change):
  module, variables, tokens = model
  changed = dataclasses.replace(module.config, **change)
  tolerances.assert_close(
    _value_and_gradient(changed, variables, tokens),
    _value_and_gradient(module.config, variables, tokens),
    rtol=tolerances.FLOAT32_REORDERED,
  )


@pytest.mark.slow
def test_remat_keeps_less_memory(rng):
  # One number proves that the option does something: the residuals kept for the backward pass.
  tokens = jnp.zeros((4, 256), jnp.int32)
  sizes = {}
  for remat in ('none', 'period'):
    config = dataclasses.replace(_SMALL, d_model=32, num_periods=6, remat=remat)
    variables = jax.eval_shape(lm.LM(config).init, rng, tokens)
    variables = nn.unbox(variables)

    def loss(variables, config=config):
      return jnp.sum(lm.LM(config).apply(variables, tokens).hidden)

    compiled = jax.jit(jax.grad(loss)).lower(variables).compile()
    sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
  assert sizes['period'] < 0.7 * sizes['none'], sizes


def test_scanned_periods_equal_a_loop(model):
  module, variables, tokens = model
  params = variables['params']
  one_period = jax.jit(lambda own, x: Period(module.config).apply({'params': own}, x))
  x = params['embedding'][tokens]
  for period in range(module.config.num_periods):
    own = jax.tree.map(lambda leaf, period=period: leaf[period], params['periods'])
    x, _ = one_period(own, x)
  scale = params['final_norm']['scale']
  x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale[None, None, :]
  hidden = _logits(module, variables, tokens)[1].hidden
  tolerances.assert_close(hidden, x, rtol=tolerances.FLOAT32_REORDERED)


def test_routes_that_were_recorded_can_be_replayed(model):
  module, variables, tokens = model
  recording = lm.LM(module.config, record_routes=True)
  aux = jax.eval_shape(lambda v, t: recording.apply(v, t).aux, variables, tokens)
  if not aux:
    return
  undecided = {
    name: Routes.undecided(reported.routes.expert_index.shape) for name, reported in aux.items()
  }
  own, output = _logits(recording, variables, tokens, routes=undecided)
  tolerances.assert_close(
    own, _logits(module, variables, tokens)[0], rtol=tolerances.FLOAT32_REORDERED
  )
  routes = {name: reported.routes for name, reported in output.aux.items()}
  # To the bit: it is the same program.
  logits, again = _logits(recording, variables, tokens, routes=routes)
  chex.assert_trees_all_equal(logits, own)
  # A later period's decision, and that alone, is changed.
  name, chosen = next(iter(routes.items()))
  moved = chosen.expert_index.at[1].set((chosen.expert_index[1] + 1) % 4)
  routes[name] = chosen.replace(expert_index=moved)
  changed, after = _logits(recording, variables, tokens, routes=routes)
  assert not np.allclose(changed, logits)
  before, now = (output.aux[name].expert_load[0] for output in (again, after))
  chex.assert_trees_all_equal(before, now)


def test_selection_biases_move_against_the_load(rng):
  rom = RoMConfig(kind='independent', weight_at='each', num_experts=4, selection_bias_rate=0.5)
  moe = MoEConfig(num_experts=4, score='sigmoid', selection_bias_rate=0.25)
  config = dataclasses.replace(_SMALL, pattern='ME', mamba=MambaConfig(d_state=4, rom=rom), moe=moe)
  tokens = jax.random.randint(rng, (_BATCH, _LENGTH), 0, _VOCAB)
  params = nn.unbox(jax.jit(lm.LM(config).init)(rng, tokens))['params']
  aux = _logits(lm.LM(config), {'params': params}, tokens)[1].aux
  moved = lm.with_moved_biases(params, aux, config)
  routers = {
    'moe_1': ('layer_moe_1', 'router', 0.25),
    'mamba_0/gate': ('layer_mamba_0', 'routing', 0.5),
  }
  for name, (layer, key, rate) in routers.items():
    router = moved['periods'][layer][key]
    router = router.get('router_gate', router)
    expected = rate * np.sign(1 / 4 - aux[name].expert_load)
    np.testing.assert_allclose(router['selection_bias'], expected, rtol=1e-6)
  changed = jax.tree.leaves_with_path(
    jax.tree.map(lambda a, b: bool((a != b).any()), moved, params)
  )
  assert {path[-1].key for path, different in changed if different} == {'selection_bias'}


@pytest.mark.slow
def test_what_looks_ahead_is_refused_unless_asked_for(rng):
  acausal = dataclasses.replace(_MODELS['parallel'], moe=MoEConfig(num_experts=4, choice='expert'))
  with pytest.raises(ConfigError, match=r'moe.choice is expert.*sampling.*allow_acausal'):
    lm.check_causal(acausal, 'sampling')
  allowed = dataclasses.replace(acausal.moe, allow_acausal=True)
  lm.check_causal(dataclasses.replace(acausal, moe=allowed), 'sampling')
  # And it does look ahead.
  tokens = jax.random.randint(rng, (1, _LENGTH), 0, _VOCAB)
  module = lm.LM(dataclasses.replace(acausal, d_model=16))
  variables = nn.unbox(jax.jit(module.init)(rng, tokens))
  earlier = [
    _logits(module, variables, tokens.at[0, -1].set(token))[0][:, :-1] for token in range(8)
  ]
  assert any(not np.array_equal(earlier[0], other) for other in earlier[1:])


def test_auxiliary_loss_is_the_mean_over_layers_times_the_coefficient():
  layer = RoutingAux(
    load_balancing_loss=jnp.array([1.0, 3.0]),  # of two periods
    router_z_loss=jnp.zeros(2),
    expert_load=jnp.zeros((2, 4)),
    router_entropy=jnp.zeros(2),
    dropped_fraction=jnp.zeros(2),
    fallback_fraction=jnp.zeros(2),
  )
  aux = {'moe_1': layer}
  config = dataclasses.replace(_MODELS['moe_mamba'], moe=MoEConfig(load_balancing_coefficient=0.01))
  chex.assert_trees_all_close(lm.auxiliary_loss(aux, config), 0.02)


@pytest.mark.parametrize('name', _PARAMS)
def test_bfloat16_runs_and_stays_near(name):
  module, variables, tokens = _built(name)
  config = module.config
  logits, recorded = _logits(lm.LM(config, record_routes=True), variables, tokens)
  # With the same routes: rounding decides near-ties, and another expert is no rounding error.
  routes = {name: reported.routes for name, reported in recorded.aux.items()}
  half, output = _logits(
    lm.LM(dataclasses.replace(config, dtype='bfloat16')), variables, tokens, routes=routes
  )
  assert half.dtype == jnp.float32 and output.hidden.dtype == jnp.bfloat16
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), variables)
  nearby, _ = _logits(lm.LM(config), rounded, tokens, routes=routes)
  # As a whole, not element by element: the errors of all layers meet in each logit.
  error, sensitivity = (np.sqrt(np.mean(np.square(x - logits))) for x in (half, nearby))
  assert 0 < error <= tolerances.BFLOAT16_OVER_ROUNDED_PARAMETERS * sensitivity


def test_moe_mamba_initial_values(rng):
  config = dataclasses.replace(_MODELS['moe_mamba'], initialization='moe_mamba', d_model=64)
  params = nn.unbox(jax.jit(lm.LM(config).init)(rng, jnp.zeros((1, 2), jnp.int32)))['params']
  # Deviation sqrt(0.1 / fan-in); W2 counts the experts into its fan-in. Of the embedding, whose
  # deviation of 0.316 is cut at 0.2, the bound is what shows.
  layer = params['periods']['layer_moe_1']
  for kernel, fan_in in (
    (layer['wi'], 64),
    (layer['wo'], 4 * 192),
    (layer['router']['kernel'], 64),
  ):
    expected = (0.1 / fan_in) ** 0.5
    assert abs(float(jnp.std(kernel)) / expected - 1) < 0.15
  assert 0.19 < float(jnp.abs(params['embedding']).max()) <= 0.2
