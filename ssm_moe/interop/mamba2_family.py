"""The family `mamba2` of transformers."""

import math
from typing import Any

from ssm_moe.config import Mamba2Config, ModelConfig
from ssm_moe.errors import UserError
from ssm_moe.interop import mamba_family, transformers_config
from ssm_moe.interop.family import Family
from ssm_moe.interop.settings import Settings

# Infinity is no JSON: later versions write it the second way.
_NO_LIMIT = ([0.0, math.inf], [0.0, {'__float__': 'Infinity'}])


def _read(settings: Settings) -> ModelConfig:
  d_inner = settings.size('hidden_size') * settings.size('expand', 2)
  head_dim = settings.size('head_dim', 64)
  num_heads = settings.size('num_heads', 128)
  if num_heads * head_dim != d_inner:
    settings.refuse('num_heads', f'times head_dim, {head_dim}, it must be {d_inner}, the d_inner')
  settings.only('time_step_limit', *_NO_LIMIT)
  settings.ignore(['time_step_rank'])  # of Mamba-1
  mixer = Mamba2Config(
    head_dim=head_dim,
    d_state=settings.size('state_size', 128),
    num_groups=settings.size('n_groups', 8),
    norm_epsilon=transformers_config.epsilon_of(settings),
    **transformers_config.read_mixer(settings),
  )
  return transformers_config.read_model(settings, tied=False, pattern='S', mamba2=mixer)


def _write(config: ModelConfig) -> dict[str, Any]:
  mixer = config.mamba2
  if mixer.norm_epsilon != config.norm.epsilon:
    raise UserError(
      f'config.model.mamba2.norm_epsilon is {mixer.norm_epsilon}; in the format mamba2 it is that '
      f'of the other norms, {config.norm.epsilon}'
    )
  common = transformers_config.write_model(config, 'mamba2', 'Mamba2ForCausalLM')
  return common | {
    'num_heads': mixer.num_heads(config.d_model),
    'head_dim': mixer.head_dim,
    'n_groups': mixer.num_groups,
  }


FAMILY = Family(
  name='mamba2',
  recognises=lambda values: values.get('model_type') == 'mamba2',
  letters='Ss',
  read=_read,
  write=_write,
  tensors=mamba_family.tensors,
)
