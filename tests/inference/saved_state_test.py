"""A saved state comes back to the bit, and nothing else is taken for one."""

import dataclasses
import functools
import json
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.config import Mamba2Config
from ssm_moe.errors import UserError
from ssm_moe.inference import saved_state
from ssm_moe.models import lm
from tests.inference import models

_CONFIG = dataclasses.replace(models.MODELS['hybrid'], dtype='bfloat16')


def _document(config=_CONFIG):
  numbers = np.random.default_rng(0)
  state = jax.tree.map(
    lambda leaf: jnp.asarray((9 * numbers.normal(size=leaf.shape)).astype(leaf.dtype)),
    jax.eval_shape(lambda: lm.initial_state(config, 1)),
  )
  return saved_state.Document(state, token=7, num_tokens=123)


@pytest.fixture
def file(tmp_path):
  saved_state.save(tmp_path / 'state', _document(), _CONFIG, 'of this')
  return tmp_path / 'state'


def test_comes_back_to_the_bit(file):
  loaded = saved_state.load(file, _CONFIG, 'of this')
  chex.assert_trees_all_equal(loaded, _document())
  chex.assert_trees_all_equal_dtypes(loaded.state, _document().state)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.state)} == {
    'bfloat16',
    'float32',
    'int32',
  }
  assert [path.name for path in file.parent.iterdir()] == ['state']


def test_how_a_model_is_run_does_not_matter(file):
  changed = dataclasses.replace(
    _CONFIG,
    scan_periods=False,
    mamba=dataclasses.replace(_CONFIG.mamba, scan_implementation='chunked'),
  )
  saved_state.load(file, changed, 'of this')


@pytest.mark.parametrize(
  ('changes', 'model', 'message'),
  [
    ({}, 'of another', 'the state of another checkpoint or tokenizer'),
    ({'d_model': 32}, 'of this', 'the state of another model: model.d_model is 16 there and 32 he'),
    (
      {'mamba2': Mamba2Config(head_dim=4, d_state=8)},
      'of this',
      'the state of another model: model.mamba2.d_state is 6 there and 8 here',
    ),
  ],
)
def test_that_of_another_model_is_refused(file, changes, model, message):
  with pytest.raises(UserError, match=f'^{file}: {message}'):
    saved_state.load(file, dataclasses.replace(_CONFIG, **changes), model)


def _rewrite(file, **changes):
  with np.load(file) as archive:
    arrays = dict(archive)
  header = json.loads(arrays.pop('header').tobytes())
  for key, value in changes.items():
    if key in header:
      header[key] = value
    else:
      arrays.update(value)
  np.savez(file.open('wb'), header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


def test_another_version_is_refused(file):
  _rewrite(file, version=2)
  with pytest.raises(UserError, match='a saved state of version 2; this code reads 1'):
    saved_state.load(file, _CONFIG, 'of this')


def test_an_array_of_another_shape_is_named(file):
  _rewrite(file, arrays={'mamba2_0/ssm_state': np.zeros((1, 1, 8, 4, 9), np.float32)})
  with pytest.raises(UserError, match=r'mamba2_0/ssm_state is float32 \(1, 1, 8, 4, 9\); it mus'):
    saved_state.load(file, _CONFIG, 'of this')


@pytest.mark.parametrize(
  'damage',
  [
    lambda content: b'',
    lambda content: b'a text',
    lambda content: content[: len(content) // 2],
    lambda content: content.replace(b'num_tokens', b'num_tokenz'),
    lambda content: pickle.dumps({'header': 1}),
  ],
  ids=['empty', 'text', 'half', 'changed', 'pickle'],
)
def test_what_is_damaged_is_refused(file, damage):
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(UserError, match=f'^{file}: not a saved state, or damaged$'):
    saved_state.load(file, _CONFIG, 'of this')


def test_no_object_is_unpickled(file, tmp_path):
  class Trap:
    def __reduce__(self):
      return (tmp_path.joinpath('sprung').touch, ())

  np.savez(file.open('wb'), header=np.array([Trap()], object))
  with pytest.raises(UserError, match='not a saved state, or damaged'):
    saved_state.load(file, _CONFIG, 'of this')
  assert not (tmp_path / 'sprung').exists()


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r'none: cannot be read \(No such file'):
    saved_state.load(tmp_path / 'none', _CONFIG, 'of this')


def test_parameters_and_tokenizers_are_told_apart():
  params = {'a': jnp.arange(3.0), 'b': jnp.ones(2)}
  first = functools.partial(saved_state.fingerprint, tokenizer_sha256='bytes')
  assert first(params) == first(dict(params))
  others = [first(params | {'a': jnp.arange(3.0) + 1}), saved_state.fingerprint(params, 'other')]
  assert len({first(params), *others}) == 3
