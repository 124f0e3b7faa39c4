"""A folder with parameters from elsewhere is read, and trained on, as that of a run."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn

from ssm_moe.config import OptimizerConfig
from ssm_moe.errors import UserError
from ssm_moe.models import lm
from ssm_moe.training import first_checkpoint, trained
from ssm_moe.training import workdir as workdir_lib
from ssm_moe.training.checkpoint import SaveError
from tests.training import full_disk, small_run

CONFIG = small_run.make_config('text.jsonl')


def host_params(model=CONFIG.model):
  """Every value another, on the host."""
  shapes = nn.unbox(jax.eval_shape(lambda key: lm.boxed_params(model, key), jax.random.key(0)))
  random = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)


def test_config_tokenizer_and_parameters_are_read_back(tmp_path):
  params = host_params()
  workdir = tmp_path / 'new' / 'run'
  first_checkpoint.write(workdir, CONFIG, params, origin='a test', tokenizer=b'{"a": 1}')
  assert sorted(path.name for path in workdir.iterdir()) == [
    'checkpoints',
    'config.json',
    'tokenizer.json',
  ]
  experiment = workdir_lib.read_config(workdir)
  assert experiment.model == CONFIG.model
  assert experiment.data.tokenizer == str(workdir / 'tokenizer.json')
  assert (workdir / 'tokenizer.json').read_bytes() == b'{"a": 1}'
  with jax.numpy_dtype_promotion('standard'):
    restored, step = trained.read_params(workdir, experiment)
  assert step == 0
  chex.assert_trees_all_equal(jax.device_get(restored), params)


@pytest.mark.slow
def test_a_run_begins_with_the_parameters_whatever_else_it_changes(tmp_path, capfd):
  params = host_params()
  first_checkpoint.write(tmp_path / 'run', CONFIG, params, origin='a test')
  # Other arrays of the optimizer and of the data than the folder's config would have, and steps too
  # small to move a float32.
  config = dataclasses.replace(
    small_run.make_config(small_run.write_text(tmp_path), num_steps=1),
    optimizer=OptimizerConfig(peak_learning_rate=1e-30, clip_norm=None),
  )
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, carry_state=True))
  small_run.run(config, tmp_path / 'run')
  assert 'begins   with the parameters of a test' in capfd.readouterr().err
  state, _ = small_run.arrays(config, tmp_path / 'run')
  assert state.step == 1
  chex.assert_trees_all_equal(state.params, params)


def test_nothing_is_written_over_and_nothing_is_left_of_a_failure(tmp_path):
  params = host_params()
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'file').touch()
  before = small_run.snapshot(tmp_path)
  with pytest.raises(UserError, match='mine exists already'):
    first_checkpoint.write(tmp_path / 'mine', CONFIG, params, origin='a test')
  with pytest.raises(ValueError, match=r'params: embedding is \(\(257, 8\).*has \(\(258, 8\)'):
    model = dataclasses.replace(CONFIG.model, vocab_size=258)
    experiment = dataclasses.replace(CONFIG, model=model)
    first_checkpoint.write(tmp_path / 'run', experiment, params, origin='a test')
  where = f'^{tmp_path}/run/checkpoints/00000000: the checkpoint cannot be saved: File too large'
  with full_disk.beyond(5_000), pytest.raises(SaveError, match=where):
    first_checkpoint.write(tmp_path / 'run', CONFIG, params, origin='a test')
  assert small_run.snapshot(tmp_path) == before
