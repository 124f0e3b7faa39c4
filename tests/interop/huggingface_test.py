"""Folders of others are read and written without the loss of a bit; what does not fit is named."""

import json

import jax
import numpy as np
import pytest

from ssm_moe.config import (
  Mamba2Config,
  MambaConfig,
  ModelConfig,
  NormConfig,
)
from ssm_moe.errors import UserError
from ssm_moe.interop import huggingface, layout
from tests.interop import published


def _assert_same(actual, expected):
  assert actual.keys() == expected.keys()
  for name, tensor in expected.items():
    assert actual[name].dtype == tensor.dtype, name
    np.testing.assert_array_equal(actual[name], tensor, err_msg=name)


def model_tensor(tensors, word):
  (name,) = (name for name in tensors if word in name)
  return tensors[name]


@pytest.mark.parametrize('name', published.MODELS)
def test_what_is_read_is_written_again(tmp_path, name):
  config, shapes = published.MODELS[name]
  tensors = published.tensors_of(shapes)
  published.write(tmp_path / 'theirs', config, tensors)
  model, params = huggingface.load(tmp_path / 'theirs')
  leaves = jax.tree.leaves(params)
  assert all(type(leaf) is np.ndarray and leaf.dtype == np.float32 for leaf in leaves)
  assert sum(leaf.size for leaf in leaves) == sum(tensor.size for tensor in tensors.values())
  family = 'state_spaces' if 'd_model' in config else None
  huggingface.save(tmp_path / 'ours', model, params, family=family)
  written, again = published.read(tmp_path / 'ours')
  _assert_same(again, tensors)
  assert written.pop('vocab_size') == len(model_tensor(again, 'embedding'))
  for theirs, ours in (
    (config, written),
    (config.get('ssm_cfg', {}), written.get('ssm_cfg', {})),
  ):
    shared = theirs.keys() & ours.keys() - {'ssm_cfg', 'pad_vocab_size_multiple'}
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
  assert huggingface.load(tmp_path / 'ours')[0] == model


_MIXERS = {'dt_min': 2e-3, 'd_conv': 3, 'expand': 3, 'd_state': 5}
_CONFIGS = {
  'mamba': ModelConfig(
    vocab_size=9, d_model=5, pattern='M m', num_periods=2, mamba=MambaConfig(**_MIXERS)
  ),
  'mamba_biases': ModelConfig(
    vocab_size=9,
    d_model=5,
    num_periods=3,
    tie_embeddings=False,
    norm=NormConfig(epsilon=1e-4),
    mamba=MambaConfig(bias=True, conv_bias=False, dt_rank=3, **_MIXERS),
  ),
  'mamba2': ModelConfig(
    vocab_size=9,
    d_model=8,
    pattern='S',
    num_periods=2,
    mamba2=Mamba2Config(head_dim=4, num_groups=2, bias=True, **_MIXERS),
  ),
}


def _random_params(config):
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: random.normal(size=leaf.shape).astype(np.float32), layout.param_shapes(config)
  )


@pytest.mark.parametrize('family', [None, 'state_spaces'])
@pytest.mark.parametrize('name', _CONFIGS)
def test_export_then_import_is_the_identity(tmp_path, name, family):
  config = _CONFIGS[name]
  if family is not None and config.norm != NormConfig():
    pytest.skip('the format has no epsilon')
  params = _random_params(config)
  huggingface.save(tmp_path / 'folder', config, params, family=family)
  loaded, again = huggingface.load(tmp_path / 'folder')
  assert loaded.layers * loaded.num_periods == ('M' if 'S' not in config.pattern else 'S',) * (
    len(config.layers) * config.num_periods
  )
  if len(config.layers) == 1:
    assert loaded == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
  else:  # the layers of one period are periods there
    first = params['periods']['layer_mamba_0']['A_log'], params['periods']['layer_mamba_1']['A_log']
    expected = np.stack(first, axis=1).reshape(-1, *first[0].shape[1:])
    np.testing.assert_array_equal(again['periods']['layer_mamba_0']['A_log'], expected)


def test_large_models_have_several_files(tmp_path):
  config = _CONFIGS['mamba_biases']
  params = _random_params(config)
  huggingface.save(tmp_path / 'one', config, params)
  huggingface.save(tmp_path / 'many', config, params, shard_bytes=1500)
  _, whole = published.read(tmp_path / 'one')
  files = sorted(path.name for path in (tmp_path / 'many').glob('*.safetensors'))
  assert len(files) > 3 and files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  for file in files:
    size = (tmp_path / 'many' / file).stat().st_size
    assert size < 1500 + 1500, file  # tensors, and the header
  index = json.loads((tmp_path / 'many' / 'model.safetensors.index.json').read_text())
  assert index['weight_map'].keys() == whole.keys()
  assert index['metadata']['total_size'] == sum(tensor.nbytes for tensor in whole.values())
  _assert_same(published.read(tmp_path / 'many')[1], whole)
  jax.tree.map(np.testing.assert_array_equal, huggingface.load(tmp_path / 'many')[1], params)


def test_bfloat16_is_read_exactly_and_written_if_asked_for(tmp_path):
  config, shapes = published.MODELS['mamba2']
  tensors = published.tensors_of(shapes, 'bfloat16')
  published.write(tmp_path / 'half', config, tensors)
  model, params = huggingface.load(tmp_path / 'half')
  assert model.dtype == 'bfloat16' and model.residual_dtype == 'float32'
  huggingface.save(tmp_path / 'again', model, params, dtype='bfloat16')
  written, again = published.read(tmp_path / 'again')
  assert written['dtype'] == 'bfloat16'
  _assert_same(again, tensors)
  huggingface.save(tmp_path / 'full', model, params)
  _assert_same(
    published.read(tmp_path / 'full')[1],
    {name: tensor.astype(np.float32) for name, tensor in tensors.items()},
  )
  # Rounded to the nearest, the even one of two.
  params['final_norm']['scale'][:] = 1 + np.array([1, 3, 1.0001, 2, 0, -1]) * 2.0**-8
  huggingface.save(tmp_path / 'rounded', model, params, dtype='bfloat16')
  rounded = published.read(tmp_path / 'rounded')[1]['backbone.norm_f.weight']
  expected = 1 + np.array([0, 4, 2, 2, 0, -1]) * 2.0**-8
  np.testing.assert_array_equal(rounded.astype(np.float64), expected)


def test_a_tied_head_that_is_there_must_be_the_embedding(tmp_path):
  config, shapes = published.MODELS['mamba']
  tensors = published.tensors_of(shapes)
  embedding = tensors['backbone.embeddings.weight']
  published.write(tmp_path, config, tensors | {'lm_head.weight': embedding})
  params = huggingface.load(tmp_path)[1]
  np.testing.assert_array_equal(params['embedding'], embedding)
  published.write(tmp_path, config, tensors | {'lm_head.weight': embedding + 1})
  with pytest.raises(UserError, match=r'lm_head\.weight is not backbone\.embeddings\.weight'):
    huggingface.load(tmp_path)


def test_what_is_beside_the_weights(tmp_path):
  config = _CONFIGS['mamba']
  huggingface.save(
    tmp_path / 'f', config, _random_params(config), tokenizer=b'{"x": 1}', end_of_text=8
  )
  assert (tmp_path / 'f' / 'tokenizer.json').read_bytes() == b'{"x": 1}'
  written, _ = published.read(tmp_path / 'f')
  assert {written[f'{name}_token_id'] for name in ('bos', 'eos', 'pad')} == {8}
  (file,) = (tmp_path / 'f').glob('*.safetensors')
  assert file.stat().st_mode == (tmp_path / 'f' / 'config.json').stat().st_mode
