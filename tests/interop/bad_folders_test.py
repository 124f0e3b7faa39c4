"""What is missing, unknown, damaged or does not fit is one line that names it."""

import json
import os
import pathlib
import pickle
import re
import sys

import jax
import numpy as np
import pytest

from ssm_moe.config import (
  Mamba2Config,
  MambaConfig,
  ModelConfig,
  NormConfig,
  RoMConfig,
)
from ssm_moe.errors import UserError
from ssm_moe.interop import huggingface, layout
from tests.interop import published
from tests.training import full_disk

_ABSENT = object()


def _refused(folder, match):
  with pytest.raises(UserError, match=match) as caught:
    huggingface.load(folder)
  assert '\n' not in str(caught.value) and str(folder) in str(caught.value)


# Of a model: a key (a dot goes into a group), a value, and what is said of it.
_SETTINGS = [
  ('mamba', 'model_type', 'falcon_mamba', "'falcon_mamba'; there are: mamba, mamba2, state_spaces"),
  ('mamba', 'model_type', ['mamba'], 'there are: mamba'),
  ('mamba', 'hidden_act', 'gelu', 'hidden_act is "gelu"; it must be "silu" or "swish"'),
  ('mamba', 'num_hidden_layers', 10**9, 'lists 1000000000 layers; there are '),
  ('state_spaces_2', 'vocab_size', 2**31 - 1, 'describes arrays that are too large'),
  ('mamba', 'hidden_size', _ABSENT, 'hidden_size is absent; it must be a whole number'),
  ('mamba', 'hidden_size', 6.0, 'hidden_size is 6.0; it must be a whole number of at least 1'),
  ('mamba', 'state_size', 0, 'state_size is 0; it must be a whole number of at least 1'),
  ('mamba', 'use_bias', 1, 'use_bias is 1; it must be true or false'),
  ('mamba', 'layer_norm_epsilon', 'x', 'layer_norm_epsilon is "x"; it must be a positive number'),
  ('mamba', 'intermediate_size', 13, 'intermediate_size is 13; it must be 12'),
  ('mamba', 'expand', 1.5, 'expand is 1.5; it must be a whole number'),
  ('mamba', 'time_step_rank', 'many', 'time_step_rank is "many"; it must be a whole number'),
  ('mamba', 'time_step_max', 1e-9, 'dt_min is 0.001; at most dt_max'),
  ('mamba', 'quantization_config', {}, 'quantization_config is a key that ssm_moe does not know'),
  ('mamba2', 'time_step_limit', [0.0, 1.0], r'limit is \[0.0, 1.0\]; it must be \[0.0, Infinity\]'),
  ('mamba2', 'num_heads', 4, 'num_heads is 4; times head_dim, 4, it must be 12'),
  ('mamba2', 'n_groups', 2, 'num_groups is 2; it must divide the 3 heads'),
  ('state_spaces', 'rms_norm', False, 'rms_norm is false; it must be true'),
  ('state_spaces', 'd_intermediate', 8, 'd_intermediate is 8; it must be 0'),
  ('state_spaces', 'attn_layer_idx', [1], r'attn_layer_idx is \[1\]; it must be \[\]'),
  ('state_spaces', 'ssm_cfg', None, 'ssm_cfg is null; it must be an object'),
  ('state_spaces', 'ssm_cfg.layer', 'Mamba3', 'layer is "Mamba3"; it must be "Mamba1" or "Mamba2"'),
  ('state_spaces', 'ssm_cfg.d_ssm', 8, 'ssm_cfg.d_ssm is a key that ssm_moe does not know'),
  ('state_spaces_2', 'ssm_cfg.d_ssm', 8, 'ssm_cfg.d_ssm is 8; it must be null or 12'),
  (
    'state_spaces_2',
    'ssm_cfg.norm_before_gate',
    True,
    'norm_before_gate is true; it must be false',
  ),
]


@pytest.mark.parametrize(('name', 'key', 'value', 'message'), _SETTINGS)
def test_a_config_that_is_not_known_is_refused_by_key(tmp_path, name, key, value, message):
  config = json.loads(json.dumps(published.MODELS[name][0]))
  group, _, below = key.rpartition('.')
  values = config[group] if group else config
  values[below] = value
  if value is _ABSENT:
    del values[below]
  published.write(tmp_path, config, published.tensors_of(published.MODELS[name][1]))
  _refused(tmp_path, message)


def _without(tensors, name):
  return {key: tensor for key, tensor in tensors.items() if key != name}


_CONV = 'backbone.layers.1.mixer.conv1d.weight'
_TENSORS = {
  'missing': (lambda t: _without(t, _CONV), f'has no tensor {_CONV}'),
  'head missing': (lambda t: _without(t, 'lm_head.weight'), 'has no tensor lm_head.weight'),
  'unknown': (
    lambda t: t | {'backbone.layers.2.norm.weight': t['backbone.norm_f.weight']},
    'backbone.layers.2.norm.weight is no tensor of such a model',
  ),
  'wrong shape': (
    lambda t: t | {_CONV: t[_CONV][:, 0]},
    rf'{_CONV} has the shape \[42, 3\]; by config.json it must be \[42, 1, 3\]',
  ),
  'integers': (lambda t: t | {_CONV: t[_CONV].astype(np.int8)}, f'{_CONV} is of type I8; it must'),
}


@pytest.mark.parametrize('name', _TENSORS)
def test_tensors_that_do_not_fit_are_named(tmp_path, name):
  config, shapes = published.MODELS['mamba2']
  change, message = _TENSORS[name]
  published.write(tmp_path, config, change(published.tensors_of(shapes)))
  _refused(tmp_path, message)


def _damage(folder, name, contents):
  (folder / name).write_bytes(contents)


def _index(folder, weight_map):
  (folder / 'model.safetensors').rename(folder / 'a.safetensors')
  text = json.dumps({'metadata': {}, 'weight_map': weight_map})
  (folder / 'model.safetensors.index.json').write_text(text)


def _two_files(folder):
  _index(folder, {'x': 'a.safetensors', 'y': 'b.safetensors'})
  (folder / 'b.safetensors').write_bytes((folder / 'a.safetensors').read_bytes())


def _unpickled_is_seen(folder):
  """Puts a pickle in place of the weights that leaves a trace if it is loaded."""
  (folder / 'model.safetensors').unlink()
  with (folder / 'pytorch_model.bin').open('wb') as file:
    pickle.dump(_Trace(folder / 'trace'), file)


class _Trace:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


_FILES = {
  'no weights': (
    lambda f: (f / 'model.safetensors').unlink(),
    'has neither model.safetensors nor model.safetensors.index.json',
  ),
  'a pickle': (
    _unpickled_is_seen,
    r'pytorch_model\*.bin, pickles, .* convert them first: python -c .*weights_only=True',
  ),
  'no config': (lambda f: (f / 'config.json').unlink(), 'config.json cannot be read'),
  'config no JSON': (lambda f: _damage(f, 'config.json', b'{'), 'config.json is not JSON'),
  'config no object': (lambda f: _damage(f, 'config.json', b'[]'), 'config.json holds no config'),
  'cut short': (
    lambda f: _damage(f, 'model.safetensors', (f / 'model.safetensors').read_bytes()[:-1]),
    'model.safetensors is not a whole safetensors file',
  ),
  'no header': (
    lambda f: _damage(f, 'model.safetensors', b'abc'),
    'model.safetensors is not a whole safetensors file',
  ),
  'empty': (
    lambda f: _damage(f, 'model.safetensors', b''),
    'model.safetensors is not a whole safetensors file',
  ),
  'a part missing': (
    lambda f: _index(f, {'x': 'b.safetensors'}),
    'b.safetensors cannot be read',
  ),
  'a part elsewhere': (
    lambda f: _index(f, {'x': '../a.safetensors'}),
    "'../a.safetensors' is no file of the folder",
  ),
  'a part that is no name': (lambda f: _index(f, {'x': 3}), 'is no file of the folder'),
  'an index of nothing': (lambda f: _index(f, []), 'is not an index of safetensors files'),
  'two of one name': (_two_files, 'is both in a.safetensors and in b.safetensors'),
}


@pytest.mark.parametrize('name', _FILES)
def test_files_that_are_missing_or_damaged_are_named(tmp_path, name):
  config, shapes = published.MODELS['mamba']
  published.write(tmp_path, config, published.tensors_of(shapes))
  change, message = _FILES[name]
  change(tmp_path)
  _refused(tmp_path, message)
  assert not (tmp_path / 'trace').exists(), 'the pickle was loaded'


_HEADS = Mamba2Config(head_dim=4)
_ROM = RoMConfig(kind='shared', num_experts=2)
_UNWRITABLE = [
  ({'pattern': 'M E'}, None, "pattern is 'M E'; in the format mamba all layers are M"),
  ({'pattern': 'M S'}, None, "pattern is 'M S'; in the format mamba all layers are M"),
  ({'pattern': 'M S'}, 'state_spaces', "pattern is 'M S'; in the format state_spaces all"),
  ({'pattern': 'M+M'}, None, "pattern is 'M\\+M'; in the format mamba all layers are M"),
  ({'pattern': 'F'}, None, "pattern is 'F'; in the format mamba all layers are M"),
  ({'mamba': MambaConfig(rom=_ROM)}, None, "mamba.rom.kind is 'shared'; .* it must be none"),
  ({'mamba': MambaConfig(d_inner=9)}, None, 'mamba.d_inner is 9; .* a multiple of d_model'),
  ({'norm': NormConfig(kind='layer')}, None, "norm.kind is 'layer'; in the format mamba it is rms"),
  ({'final_norm': False}, None, 'final_norm is False; in the format mamba it is True'),
  ({'norm': NormConfig(epsilon=1e-3)}, 'state_spaces', 'norm.epsilon is 0.001; in the format'),
  (
    {'pattern': 'S', 'mamba2': Mamba2Config(head_dim=4, norm_epsilon=1e-3)},
    None,
    'mamba2.norm_epsilon is 0.001; in the format mamba2 it is that of the other norms, 1e-05',
  ),
  ({}, 'gguf', "the format 'gguf' does not exist; there are: mamba, mamba2, state_spaces"),
]


@pytest.mark.parametrize(('fields', 'family', 'message'), _UNWRITABLE)
def test_a_model_that_no_format_holds_is_refused_by_field(tmp_path, fields, family, message):
  config = ModelConfig(**({'d_model': 8, 'mamba2': _HEADS} | fields))
  for act in (
    lambda: huggingface.check_savable(config, family),
    lambda: huggingface.save(tmp_path / 'f', config, {}, family=family),
  ):
    with pytest.raises(UserError, match=message):
      act()
  assert not list(tmp_path.iterdir())


def test_nothing_is_written_over_and_nothing_is_left_of_a_failure(tmp_path):
  config = ModelConfig(vocab_size=300, d_model=8, num_periods=1)
  params = jax.tree.map(np.asarray, layout.param_shapes(config))
  (tmp_path / 'mine').mkdir()
  with pytest.raises(UserError, match='mine exists already'):
    huggingface.save(tmp_path / 'mine', config, params)
  with (
    full_disk.beyond(5_000),
    pytest.raises(OSError, match=re.escape(os.strerror(27))) as caught,
  ):
    huggingface.save(tmp_path / 'new' / 'folder', config, params)
  assert caught.value.filename == str(tmp_path / 'new' / 'folder')
  assert [path.name for path in tmp_path.rglob('*')] == ['mine']


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
  config, shapes = published.MODELS['mamba']
  published.write(tmp_path, config, published.tensors_of(shapes))
  monkeypatch.setitem(sys.modules, 'safetensors', None)
  with pytest.raises(
    UserError, match=r"needs? the package safetensors: pip install 'ssm_moe\[hf\]'"
  ):
    huggingface.load(tmp_path)
