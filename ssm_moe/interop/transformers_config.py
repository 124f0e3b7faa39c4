"""What the families of `transformers` share in their config.json."""

from typing import Any

from ssm_moe.config import ModelConfig, NormConfig
from ssm_moe.interop.family import expand_of, mixer_of
from ssm_moe.interop.settings import Settings

# What is written down of a class, of labels, of tokens and of generation.
_OF_ANY_MODEL = """
  _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
  bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
  cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
  early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
  finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder
  label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups
  num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
  prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
  return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
  tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
  transformers_version typical_p use_bfloat16 use_cache
"""
# Initial values, implementations, and what was copied from a config.json of state-spaces; what
# `norm_before_gate` says, transformers does not do.
_OF_MAMBA = """
  chunk_size fused_add_norm initializer_range norm_before_gate pad_vocab_size_multiple
  rescale_prenorm_residual time_step_init_scheme time_step_scale use_associative_scan use_mambapy
"""


def read_model(settings: Settings, *, tied: bool, **mixer: Any) -> ModelConfig:
  """Returns the model around a mixer.

  Args:
    settings: Of the config.json; what the mixer needs has been asked for.
    tied: Whether embedding and head are one by default.
    mixer: Fields of `ModelConfig` that say what the layers are.
  """
  d_model, num_layers = settings.size('hidden_size'), settings.size('num_hidden_layers')
  settings.only('hidden_act', 'silu', 'swish')
  # Written by some versions besides the keys that count.
  settings.only('d_model', d_model)
  settings.only('n_layer', num_layers)
  settings.only('rms_norm', True)
  settings.only('ssm_cfg', {})
  settings.ignore(_OF_ANY_MODEL.split())
  settings.ignore(_OF_MAMBA.split())
  return ModelConfig(
    vocab_size=settings.size('vocab_size'),
    d_model=d_model,
    num_periods=num_layers,
    norm=NormConfig(epsilon=epsilon_of(settings)),
    tie_embeddings=settings.flag('tie_word_embeddings', tied),
    residual_dtype='float32' if settings.flag('residual_in_fp32', True) else 'bfloat16',
    **mixer,
  )


def epsilon_of(settings: Settings) -> float:
  """Returns what norms add to the mean square."""
  return settings.number('layer_norm_epsilon', 1e-5)


def read_mixer(settings: Settings) -> dict[str, Any]:
  """Returns the fields that `MambaConfig` and `Mamba2Config` share."""
  d_model, expand = settings.size('hidden_size'), settings.size('expand', 2)
  for key in ('intermediate_size', 'd_inner'):
    settings.only(key, expand * d_model)
  return {
    'expand': expand,
    'd_conv': settings.size('conv_kernel', 4),
    'bias': settings.flag('use_bias', False),
    'conv_bias': settings.flag('use_conv_bias', True),
    'dt_min': settings.number('time_step_min', 1e-3),
    'dt_max': settings.number('time_step_max', 1e-1),
    'dt_init_floor': settings.number('time_step_floor', 1e-4),
  }


def write_model(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
  """Returns the keys that the families share."""
  mixer = mixer_of(config)[1]
  return {
    'architectures': [architecture],
    'model_type': model_type,
    'vocab_size': config.vocab_size,
    'hidden_size': config.d_model,
    'num_hidden_layers': len(config.layers) * config.num_periods,
    'layer_norm_epsilon': config.norm.epsilon,
    'tie_word_embeddings': config.tie_embeddings,
    'residual_in_fp32': config.residual_dtype == 'float32',
    'hidden_act': 'silu',
    'expand': expand_of(config),
    'intermediate_size': mixer.inner_size(config.d_model),
    'state_size': mixer.d_state,
    'conv_kernel': mixer.d_conv,
    'use_bias': mixer.bias,
    'use_conv_bias': mixer.conv_bias,
    'time_step_min': mixer.dt_min,
    'time_step_max': mixer.dt_max,
    'time_step_floor': mixer.dt_init_floor,
  }
