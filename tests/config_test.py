"""Every field can be overridden, and every mistake is one line that names it."""

import dataclasses

import numpy as np
import pytest
from ml_collections import config_dict

from ssm_moe import config as config_lib


def _leaves(values, path=''):
  for key, value in values.items():
    if isinstance(value, (dict, config_dict.ConfigDict)):
      yield from _leaves(value, f'{path}{key}.')
    else:
      yield path + key


def test_defaults_round_trip():
  assert config_lib.from_config_dict(config_lib.defaults()) == config_lib.ExperimentConfig()
  plain = config_lib.to_dict(config_lib.ExperimentConfig())
  assert config_lib.from_config_dict(plain) == config_lib.ExperimentConfig()


def test_every_field_is_in_the_defaults():
  flat = sorted(_leaves(config_lib.defaults()))
  assert flat == sorted(_leaves(config_lib.to_dict(config_lib.ExperimentConfig())))
  assert 'model.mamba.d_inner' in flat  # optional scalars too


def test_an_optional_scalar_takes_its_type_only():
  config = config_lib.defaults()
  config.model.mamba.d_inner = 96
  assert config_lib.from_config_dict(config).model.mamba.d_inner == 96
  with pytest.raises(TypeError):
    config.model.mamba.d_inner = 'wide'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model': {'d_modl': 1}}, r'config.model.d_modl does not exist; .* d_model'),
    ({'modle': {}}, r'config.modle does not exist; .* model'),
    ({'model': {'d_model': '1'}}, r"config.model.d_model is '1'; it must be of type int"),
    ({'model': {'d_model': True}}, r'config.model.d_model is True; it must be of type int'),
    ({'model': {'d_model': 0}}, r'config.model.d_model is 0; it must be positive'),
    ({'model': {'pattern': 'MX'}}, r"config.model.pattern is 'MX'; it must be letters out of M"),
    ({'model': {'dtype': 'int8'}}, r"config.model.dtype is 'int8'; it must be one of float32, bf"),
    ({'model': {'moe': {'top_k': 33}}}, r'config.model.moe.top_k is 33; .* num_experts, 32'),
    ({'model': {'mamba': {'rom': {'top_k': 9}}}}, r'config.model.mamba.rom.top_k is 9; .* 8'),
    (
      {'model': {'moe': {'weights': 'renormalized'}}},
      r'config.model.moe.weights is renormalized; with top_k 1 .* it must be raw',
    ),
    (
      {'model': {'mamba': {'rom': {'kind': 'independent'}}}},
      r'config.model.mamba.rom.weight_at is out; .* each or straight_through',
    ),
    (
      {'model': {'mamba': {'rom': {'expert_projections': ('out', 'in')}}}},
      r"expert_projections\[1\] is 'in'; it must be one of conv, gate, out, x, dt",
    ),
    (
      {'model': {'moe': {'choice': 'expert', 'selection_bias_rate': 0.1}}},
      r'config.model.moe.selection_bias_rate .* choice expert it must be 0',
    ),
    (
      {'model': {'moe': {'fallback_threshold': 0.5}}},
      r'num_shared_experts must be at least 1',
    ),
    (
      {'model': {'pattern': 'E', 'moe': {'routing': 'mixer'}}},
      r"config.model.moe.routing is mixer; before E, pattern 'E' must have a mixer",
    ),
    (
      {
        'model': {
          'pattern': 'ME',
          'moe': {'routing': 'mixer'},
          'mamba': {'rom': {'kind': 'period'}},
        }
      },
      r'config.model.moe.num_experts is 32; with routing by the mixer it must be 8',
    ),
    ({'model': {'pattern': 'S', 'd_model': 80}}, r'mamba2.head_dim is 64; it must divide .* 160'),
    ({'model': {'pattern': 'A', 'd_model': 100}}, r'attention.num_heads is 8; .* d_model, 100'),
    ({'model': 3}, r'config.model is 3; it is a group of fields'),
    ({'train': {'batch_size': 8, 'accumulation_steps': 3}}, r'config.train.batch_size is 8; .* 3'),
    ({'data': {'train': 'stdlib'}}, r"config.data.train is 'stdlib'; it must be a tuple"),
    ({'data': {'weights': (1.0, 2.0)}}, r'config.data.weights has 2 values; .* 1 train'),
    ({'optimizer': {'schedule': 'wsd', 'warmup_fraction': 0.9}}, r'add up to more than 1'),
    ({'optimizer': {'beta1': 1.0}}, r'config.optimizer.beta1 is 1.0; .* at least 0 and below 1'),
    ({'optimizer': {'warmup_fraction': 2}}, r'warmup_fraction is 2.0; it must be between 0 and 1'),
    ({'optimizer': {'peak_learning_rate': float('inf')}}, r'rate is inf; it must be finite'),
    ({'optimizer': {'epsilon': 10**400}}, r'config.optimizer.epsilon is inf; it must be finite'),
    ({'train': {'seed': 2**32}}, r'config.train.seed is 4294967296; it must be below 2\*\*32'),
    ({'train': {'num_steps': 10**20}}, r'config.train.num_steps is 1\d*; it must fit in 64 bits'),
    ({'data': {'weights': ('1',)}}, r"config.data.weights\[0\] is '1'; it must be of type float"),
    ({'data': {'train': ('stdlib', '')}}, r'config.data.train holds an empty name'),
  ],
)
def test_a_mistake_is_one_line_that_names_it(change, message):
  with pytest.raises(config_lib.ConfigError, match=message) as caught:
    config_lib.from_config_dict(change)
  assert '\n' not in str(caught.value)


def test_an_integer_serves_as_float():
  config = config_lib.from_config_dict({'optimizer': {'weight_decay': 0}})
  assert config.optimizer.weight_decay == 0.0


@pytest.fixture
def unchecked(request):
  if request.config.getoption('jaxtyping_packages'):
    pytest.skip('where types are checked at run time, they answer before the class does')


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: config_lib.ModelConfig(d_model='8'), r"^d_model is '8'; it must be of type int$"),
    (lambda: config_lib.MoEConfig(dispatch='droples'), r"^dispatch is 'droples'; .* one of dropl"),
    (lambda: config_lib.RoMConfig(kind='sharded'), r"^kind is 'sharded'; it must be one of none"),
    (
      lambda: config_lib.RoMConfig(expert_projections=('conv', 'y')),
      r'^expert_projections\[1\] is',
    ),
    (lambda: config_lib.ModelConfig(dtype=np.dtype('float32')), r'^dtype is .* one of float32'),
    (lambda: config_lib.ModelConfig(moe=config_lib.RoMConfig()), r'^moe is .* of type MoEConfig'),
    (lambda: config_lib.ExperimentConfig(train={'seed': 1}), r'^train is .* of type TrainConfig$'),
    (lambda: dataclasses.replace(config_lib.MLPConfig(), d_ff=1.5), r'^d_ff is 1.5; .* type int$'),
  ],
)
def test_a_mistake_in_python_is_told_like_one_in_a_file(make, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    make()


def _dataclasses(cls):
  yield cls
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      yield from _dataclasses(field.type)


@pytest.mark.usefixtures('unchecked')
def test_every_field_of_every_config_checks_its_type():
  for cls in _dataclasses(config_lib.ExperimentConfig):
    for field in dataclasses.fields(cls):
      with pytest.raises(config_lib.ConfigError, match=f'^{field.name} is <object'):
        cls(**{field.name: object()})


@pytest.mark.usefixtures('unchecked')
def test_what_is_built_in_python_can_be_hashed_and_equals_what_a_file_says():
  built = config_lib.DataConfig(train=['a', 'b'], weights=[1, 2])
  assert built == config_lib.DataConfig(train=('a', 'b'), weights=(1.0, 2.0))
  assert hash(built) == hash(config_lib.from_config_dict(config_lib.to_dict(built), type(built)))


def test_configs_are_immutable():
  with pytest.raises(dataclasses.FrozenInstanceError):
    config_lib.ExperimentConfig().train.num_steps = 3
