"""Small models in the formats of others, made by hand, without the code under test."""

import json

import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}

# Odd sizes: d_model 6, d_inner 12, d_state 5, width 3, rank 2, 7 tokens, 2 layers.
MAMBA = {
  'model_type': 'mamba',
  'architectures': ['MambaForCausalLM'],
  'vocab_size': 7,
  'hidden_size': 6,
  'num_hidden_layers': 2,
  'state_size': 5,
  'conv_kernel': 3,
  'expand': 2,
  'intermediate_size': 12,
  'time_step_rank': 2,
  'layer_norm_epsilon': 1e-3,
  'use_bias': True,
  'use_conv_bias': True,
  'tie_word_embeddings': True,
  'residual_in_fp32': True,
  'hidden_act': 'silu',
  'use_cache': True,
  'transformers_version': '5.0.0',
}
# Heads 3 of size 4, in 3 groups.
MAMBA2 = {
  'model_type': 'mamba2',
  'vocab_size': 7,
  'hidden_size': 6,
  'num_hidden_layers': 2,
  'state_size': 5,
  'conv_kernel': 3,
  'num_heads': 3,
  'head_dim': 4,
  'n_groups': 3,
  'use_bias': False,
  'tie_word_embeddings': False,
  'time_step_limit': [0.0, float('inf')],
  'time_step_rank': 256,
}
STATE_SPACES = {
  'd_model': 6,
  'n_layer': 2,
  'vocab_size': 6,
  'ssm_cfg': {'d_state': 5, 'd_conv': 3, 'conv_bias': False},
  'rms_norm': True,
  'residual_in_fp32': True,
  'fused_add_norm': True,
  'pad_vocab_size_multiple': 4,
}
STATE_SPACES_2 = {
  'd_model': 6,
  'd_intermediate': 0,
  'n_layer': 2,
  'vocab_size': 8,
  'ssm_cfg': {'layer': 'Mamba2', 'd_state': 5, 'd_conv': 3, 'headdim': 4, 'ngroups': 1},
  'attn_layer_idx': [],
  'attn_cfg': {},
  'tie_embeddings': False,
}


def _mamba_mixer(bias, conv_bias, rank):
  shapes = {
    'A_log': (12, 5),
    'D': (12,),
    'in_proj.weight': (24, 6),
    'conv1d.weight': (12, 1, 3),
    'x_proj.weight': (rank + 10, 12),
    'dt_proj.weight': (12, rank),
    'dt_proj.bias': (12,),
    'out_proj.weight': (6, 12),
  }
  shapes |= {'in_proj.bias': (24,), 'out_proj.bias': (6,)} if bias else {}
  return shapes | ({'conv1d.bias': (12,)} if conv_bias else {})


def _mamba2_mixer(groups):
  return {
    'A_log': (3,),
    'D': (3,),
    'dt_bias': (3,),
    'in_proj.weight': (12 + 12 + 2 * groups * 5 + 3, 6),
    'conv1d.weight': (12 + 2 * groups * 5, 1, 3),
    'conv1d.bias': (12 + 2 * groups * 5,),
    'norm.weight': (12,),
    'out_proj.weight': (6, 12),
  }


def _model(mixer, *, embedding, vocab, tied):
  shapes = {f'backbone.{embedding}.weight': (vocab, 6), 'backbone.norm_f.weight': (6,)}
  for depth in range(2):
    shapes[f'backbone.layers.{depth}.norm.weight'] = (6,)
    for name, shape in mixer.items():
      shapes[f'backbone.layers.{depth}.mixer.{name}'] = shape
  return shapes | ({} if tied else {'lm_head.weight': (vocab, 6)})


# Each config, and the shapes of its tensors.
MODELS = {
  'mamba': (
    MAMBA,
    _model(_mamba_mixer(True, True, rank=2), embedding='embeddings', vocab=7, tied=True),
  ),
  'mamba2': (MAMBA2, _model(_mamba2_mixer(3), embedding='embeddings', vocab=7, tied=False)),
  'state_spaces': (
    STATE_SPACES,
    _model(_mamba_mixer(False, False, rank=1), embedding='embedding', vocab=8, tied=True),
  ),
  'state_spaces_2': (
    STATE_SPACES_2,
    _model(_mamba2_mixer(1), embedding='embedding', vocab=8, tied=False),
  ),
}


def tensors_of(shapes, dtype='float32'):
  """Random tensors, no value twice."""
  random = np.random.default_rng(0)
  return {name: random.normal(size=shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def write(folder, config, tensors):
  """Writes a folder with one file of weights."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  safetensors.save_file(tensors, folder / 'model.safetensors')


def read(folder):
  """Returns the config and the tensors of a folder, however many files it has."""
  tensors = {}
  for file in sorted(folder.glob('*.safetensors')):
    tensors |= safetensors.load_file(file)
  return json.loads((folder / 'config.json').read_text()), tensors
