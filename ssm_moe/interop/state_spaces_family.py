"""The format of state-spaces, the authors of Mamba and Mamba-2 (`mamba_ssm`)."""

import math
from typing import Any

from ssm_moe.config import Mamba2Config, MambaConfig, ModelConfig
from ssm_moe.errors import UserError
from ssm_moe.interop.family import Family, expand_of, mixer_of
from ssm_moe.interop.layout import Tensor, model_tensors
from ssm_moe.interop.mamba_tensors import mixer_tensors
from ssm_moe.interop.settings import Settings

_EPSILON = 1e-5  # of all norms; no key of the format
_LAYERS = {'M': 'Mamba1', 'S': 'Mamba2'}
# Initial values and implementations, of both mixers.
_IGNORED = """
  A_init_range chunk_size conv_init dt_init dt_scale sequence_parallel use_fast_path
  use_mem_eff_path
"""


def _recognises(values: dict[str, Any]) -> bool:
  return 'model_type' not in values and {'d_model', 'n_layer'} <= values.keys()


def _read(settings: Settings) -> ModelConfig:
  d_model = settings.size('d_model')
  mixer_settings = settings.group('ssm_cfg')
  mixer_settings.ignore(_IGNORED.split())
  if mixer_settings.only('layer', *_LAYERS.values()) == 'Mamba1':
    layers = {'pattern': 'M', 'mamba': _read_mamba(mixer_settings)}
  else:
    layers = {'pattern': 'S', 'mamba2': _read_mamba2(mixer_settings, d_model)}
  mixer_settings.close()
  settings.only('d_intermediate', 0)
  settings.only('attn_layer_idx', [])
  settings.only('rms_norm', True)
  settings.ignore(['attn_cfg', 'fused_add_norm'])
  multiple = settings.size('pad_vocab_size_multiple', 8)
  return ModelConfig(
    # With the rows that no token has.
    vocab_size=-(-settings.size('vocab_size') // multiple) * multiple,
    d_model=d_model,
    num_periods=settings.size('n_layer'),
    tie_embeddings=settings.flag('tie_embeddings', True),
    residual_dtype='float32' if settings.flag('residual_in_fp32', True) else 'bfloat16',
    **layers,
  )


def _read_mamba(settings: Settings) -> MambaConfig:
  return MambaConfig(
    d_state=settings.size('d_state', 16),
    dt_rank=settings.rank('dt_rank'),
    **_read_mixer(settings),
  )


def _read_mamba2(settings: Settings, d_model: int) -> Mamba2Config:
  settings.only('D_has_hdim', False)
  settings.only('rmsnorm', True)
  settings.only('norm_before_gate', False)
  settings.only('dt_limit', [0.0, math.inf])
  mixer = _read_mixer(settings)
  settings.only('d_ssm', None, mixer['expand'] * d_model)
  return Mamba2Config(
    head_dim=settings.size('headdim', 64),
    d_state=settings.size('d_state', 128),
    num_groups=settings.size('ngroups', 1),
    **mixer,
  )


def _read_mixer(settings: Settings) -> dict[str, Any]:
  return {
    'expand': settings.size('expand', 2),
    'd_conv': settings.size('d_conv', 4),
    'bias': settings.flag('bias', False),
    'conv_bias': settings.flag('conv_bias', True),
    'dt_min': settings.number('dt_min', 1e-3),
    'dt_max': settings.number('dt_max', 1e-1),
    'dt_init_floor': settings.number('dt_init_floor', 1e-4),
  }


def _write(config: ModelConfig) -> dict[str, Any]:
  name, mixer = mixer_of(config)
  epsilons = {'norm.epsilon': config.norm.epsilon}
  layer = {
    'layer': _LAYERS[config.layers[0].upper()],
    'd_state': mixer.d_state,
    'd_conv': mixer.d_conv,
    'expand': expand_of(config),
    'bias': mixer.bias,
    'conv_bias': mixer.conv_bias,
    'dt_min': mixer.dt_min,
    'dt_max': mixer.dt_max,
    'dt_init_floor': mixer.dt_init_floor,
  }
  if name == 'mamba':
    layer |= {'dt_rank': mixer.rank(config.d_model)}
  else:
    epsilons |= {'mamba2.norm_epsilon': mixer.norm_epsilon}
    layer |= {'headdim': mixer.head_dim, 'ngroups': mixer.num_groups}
  for field, epsilon in epsilons.items():
    if epsilon != _EPSILON:
      raise UserError(
        f'config.model.{field} is {epsilon}; in the format state_spaces it is {_EPSILON}'
      )
  return {
    'd_model': config.d_model,
    'd_intermediate': 0,
    'n_layer': len(config.layers) * config.num_periods,
    'vocab_size': config.vocab_size,
    'ssm_cfg': layer,
    'attn_layer_idx': [],
    'attn_cfg': {},
    'rms_norm': True,
    'residual_in_fp32': config.residual_dtype == 'float32',
    'fused_add_norm': True,
    'pad_vocab_size_multiple': 1,
    'tie_embeddings': config.tie_embeddings,
  }


def _tensors(config: ModelConfig) -> list[Tensor]:
  return model_tensors(config, mixer_tensors(config), embedding='backbone.embedding.weight')


FAMILY = Family(
  name='state_spaces',
  recognises=_recognises,
  letters='MmSs',
  read=_read,
  write=_write,
  tensors=_tensors,
)
