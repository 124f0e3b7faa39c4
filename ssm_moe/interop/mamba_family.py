"""The family `mamba` of transformers."""

from typing import Any

from ssm_moe.config import MambaConfig, ModelConfig
from ssm_moe.interop import transformers_config
from ssm_moe.interop.family import Family
from ssm_moe.interop.layout import Tensor, model_tensors
from ssm_moe.interop.mamba_tensors import mixer_tensors
from ssm_moe.interop.settings import Settings


def _read(settings: Settings) -> ModelConfig:
  mixer = MambaConfig(
    d_state=settings.size('state_size', 16),
    dt_rank=settings.rank('time_step_rank'),
    **transformers_config.read_mixer(settings),
  )
  return transformers_config.read_model(settings, tied=True, pattern='M', mamba=mixer)


def _write(config: ModelConfig) -> dict[str, Any]:
  common = transformers_config.write_model(config, 'mamba', 'MambaForCausalLM')
  return common | {'time_step_rank': config.mamba.rank(config.d_model)}


def tensors(config: ModelConfig) -> list[Tensor]:
  """Returns the tensors of a model of either family of transformers."""
  return model_tensors(
    config,
    mixer_tensors(config),
    embedding='backbone.embeddings.weight',
    also=('backbone.embedding.weight',),
  )


FAMILY = Family(
  name='mamba',
  recognises=lambda values: values.get('model_type') == 'mamba',
  letters='Mm',
  read=_read,
  write=_write,
  tensors=tensors,
)
