"""Every row of every config builds, learns when small, and says how it is run."""

import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe import sharding
from ssm_moe.config import ExperimentConfig, OptimizerConfig, TrainConfig
from ssm_moe.models import accounting
from ssm_moe.training import step as step_lib
from ssm_moe.training.optimizer import make_optimizer
from tests import config_files

ROOT = pathlib.Path(__file__).parents[2]
FILES_WITH_ROWS = [path for path in config_files.FILES if 'ROWS' in runpy.run_path(str(path))]


def test_there_are_the_configs_of_the_papers():
  expected = {'mamba_26m', 'moe_mamba_26m', 'mamba_115m', 'rom_115m'}
  assert expected | {'quickstart:rom', 'quickstart:mamba'} <= set(config_files.NAMES)


@pytest.mark.parametrize('name', config_files.FIRST)
def test_builds_a_state_and_a_step(name):
  config = config_files.load(name)
  optimizer = make_optimizer(config.optimizer, config.train.num_steps)
  shape = (config.train.batch_size, config.train.sequence_length)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, dtype in (
      ('inputs', jnp.int32),
      ('targets', jnp.int32),
      ('segment_ids', jnp.int32),
      ('loss_mask', jnp.float32),
    )
  } | {'continues': jax.ShapeDtypeStruct(shape[:1], jnp.bool_)}
  with jax.numpy_dtype_promotion('standard'):  # optax multiplies float32 by int32 counts
    boxed = jax.eval_shape(
      lambda key: step_lib.init_train_state(config, optimizer, key), jax.random.key(0)
    )
    state = nn.unbox(boxed)
    after, metrics = jax.eval_shape(step_lib.make_train_step(config, optimizer), state, batch)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert (metrics.loss.shape, metrics.loss.dtype) == ((), jnp.float32)
  routed = any(config.model.routing_of(letter) for letter in config.model.layers)
  assert bool(metrics.aux) == routed
  # Parameters and moments are stored in float32, whatever the computation is done in.
  assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {'float32', 'int32'}
  mesh = sharding.make_mesh(config.mesh)
  layouts = step_lib.state_shardings(mesh, boxed)
  assert jax.tree.structure(layouts) == jax.tree.structure(state)
  assert config.train.batch_size // config.train.accumulation_steps % 8 == 0  # eight devices


def _losses_of_three_steps(model):
  config = ExperimentConfig(
    model=model,
    optimizer=OptimizerConfig(peak_learning_rate=1e-2, schedule='constant', warmup_fraction=0.0),
    train=TrainConfig(batch_size=8, sequence_length=16, num_steps=3),
  )
  optimizer = make_optimizer(config.optimizer, config.train.num_steps)
  # Each token follows from the one before: something to learn.
  first = np.random.default_rng(0).integers(0, 31, (8, 1))
  tokens = ((first + 3 * np.arange(17)[None, :]) % 31).astype(np.int32)
  batch = {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'segment_ids': np.ones((8, 16), np.int32),
    'loss_mask': np.ones((8, 16), np.float32),
    'continues': np.zeros(8, bool),
  }
  with jax.numpy_dtype_promotion('standard'):
    init = jax.jit(lambda key: nn.unbox(step_lib.init_train_state(config, optimizer, key)))
    state = init(jax.random.key(0))
    train_step = jax.jit(step_lib.make_train_step(config, optimizer))
    losses = []
    for _ in range(3):
      state, metrics = train_step(state, batch)
      losses.append(float(metrics.loss))
  return losses


@pytest.mark.slow
@pytest.mark.parametrize('name', config_files.VARIED)
def test_a_shrunken_version_learns(name):
  losses = _losses_of_three_steps(config_files.shrunken(config_files.load(name).model))
  assert np.isfinite(losses).all() and losses[0] > losses[1] > losses[2], losses


def test_the_models_of_the_quickstart_have_the_same_active_size():
  sizes = [
    accounting.account(config_files.load(name).model, sequence_length=256)['active_params']
    for name in config_files.NAMES
    if name.startswith('quickstart:')
  ]
  assert len(sizes) == 3 and max(sizes) < 1.02 * min(sizes), sizes


def test_the_models_of_the_ordering_have_the_same_active_size():
  sizes = [
    accounting.account(config_files.load(name).model, sequence_length=256)['active_params']
    for name in config_files.NAMES
    if name.startswith('ordering:')
  ]
  assert len(sizes) == 8 and max(sizes) < 1.04 * min(sizes), sizes


@pytest.mark.parametrize('path', FILES_WITH_ROWS, ids=config_files.name_of)
def test_a_row_that_there_is_not_is_an_error_that_names_the_rows(path):
  names = runpy.run_path(str(path))
  with pytest.raises(ValueError, match=', '.join(names['ROWS'])):
    names['get_config']('no_such_row')


@pytest.mark.parametrize('path', config_files.FILES, ids=config_files.name_of)
def test_its_docstring_is_a_lab_note(path):
  text = path.read_text()
  note = text.split('"""')[1]
  if path.stem != 'quickstart':  # whose figures are in the README too
    assert re.search(r'^Result: \S', note, re.MULTILINE), 'the figures, or "not yet run"'
  named = set(re.findall(r'experiments/\S+\.py', note))
  assert (
    f'experiments/configs/{config_files.name_of(path)}.py' in named
    and 'experiments/train.py' in named
  )
  assert all((ROOT / name).exists() for name in named)
  assert len(text.splitlines()) <= 60
