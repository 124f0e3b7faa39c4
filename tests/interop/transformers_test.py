"""Logits and greedy continuations equal those of `transformers` in PyTorch, on random weights."""

import functools
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.errors import UserError
from ssm_moe.interop import huggingface
from ssm_moe.models import lm
from tests import tolerances
from tests.interop import published

_ROWS, _PROMPT, _WRITTEN = 6, 11, 6

# Odd sizes; tied and untied; with and without each bias; groups; a state of any size.
_MAMBA = {
  'usual': {'hidden_size': 10, 'state_size': 16},
  'odd': {
    'hidden_size': 7,
    'state_size': 3,
    'conv_kernel': 3,
    'expand': 3,
    'time_step_rank': 2,
    'use_bias': True,
    'tie_word_embeddings': False,
    'layer_norm_epsilon': 1e-2,
  },
  'no_conv_bias': {'hidden_size': 10, 'state_size': 1, 'use_conv_bias': False},
}
_MAMBA2 = {
  'usual': {'hidden_size': 16, 'num_heads': 4, 'head_dim': 8, 'n_groups': 1, 'state_size': 16},
  'odd': {
    'hidden_size': 9,
    'num_heads': 6,
    'head_dim': 3,
    'n_groups': 2,
    'state_size': 5,
    'conv_kernel': 3,
    'use_bias': True,
    'tie_word_embeddings': True,
    'layer_norm_epsilon': 1e-2,
    # Shorter than the prompt: states are handed on between chunks.
    'chunk_size': 4,
  },
  'no_conv_bias': {
    'hidden_size': 12,
    'num_heads': 6,
    'head_dim': 4,
    'n_groups': 3,
    'state_size': 7,
    'use_conv_bias': False,
  },
}


def _classes(transformers, kind):
  if kind == 'mamba':
    return transformers.MambaConfig, transformers.MambaForCausalLM
  return transformers.Mamba2Config, transformers.Mamba2ForCausalLM


def _theirs(torch, transformers, kind, fields, folder):
  """Writes a model with random weights; returns its tokens, logits and greedy continuation."""
  make_config, make_model = _classes(transformers, kind)
  torch.manual_seed(0)
  config = make_config(vocab_size=29, num_hidden_layers=2, eos_token_id=None, **fields)
  model = make_model(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():  # biases, skips and scales are all alike at first
      parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokens = torch.randint(0, 29, (_ROWS, _PROMPT))
    logits = model(tokens).logits
    written = model.generate(
      tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=_WRITTEN, do_sample=False
    )
  return tokens.numpy().astype(np.int32), logits.numpy(), written[:, _PROMPT:].numpy()


@functools.partial(jax.jit, static_argnums=0)
def _ours(config, params, tokens):
  """Returns the logits of all tokens and what greedy steps write after the last."""
  model = lm.LM(config)
  output = model.apply({'params': params}, tokens)
  logits = model.apply({'params': params}, output.hidden, method='logits')

  def step(carry, _):
    last, state = carry
    following = jnp.argmax(last, axis=-1).astype(jnp.int32)
    return model.apply({'params': params}, following, state, method='step'), following

  _, written = jax.lax.scan(step, (logits[:, -1], output.state), length=_WRITTEN)
  return logits, written.T


def _check_pickle(torch, folder):
  """Has a folder with a pickle refused, runs the command that this names, and reads it."""
  tensors = published.read(folder)[1]
  expected = huggingface.load(folder)[1]
  (folder / 'model.safetensors').unlink()
  state = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
  state['lm_head.weight'] = state['backbone.embeddings.weight']  # one memory, as when tied
  torch.save(state, folder / 'pytorch_model.bin')
  with pytest.raises(UserError, match='convert them first: python -c ') as refused:
    huggingface.load(folder)
  *_, program = shlex.split(str(refused.value).partition('first: ')[2])
  exec(program, {})
  jax.tree.map(np.testing.assert_array_equal, huggingface.load(folder)[1], expected)


# One test, since it takes seconds to import PyTorch into a process.
@pytest.mark.slow
def test_logits_and_continuations_equal_those_of_transformers(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  for kind, configs in {'mamba': _MAMBA, 'mamba2': _MAMBA2}.items():
    for name, fields in configs.items():
      what = f'{kind} {name}: '
      folder = tmp_path / kind / name
      tokens, expected, continuation = _theirs(torch, transformers, kind, fields, folder)
      config, params = huggingface.load(folder)
      logits, written = _ours(config, params, tokens)
      tolerances.assert_close(logits, expected, rtol=tolerances.FLOAT32_REORDERED, what=what)
      np.testing.assert_array_equal(written, continuation, err_msg=what)
      assert len(np.unique(written)) > 3, f'{what}says nothing'
      # And what is written here is read there.
      huggingface.save(folder / 'ours', config, params)
      again = _classes(transformers, kind)[1].from_pretrained(folder / 'ours')
      with torch.no_grad():
        logits = again(torch.tensor(tokens)).logits.numpy()
      tolerances.assert_close(logits, expected, rtol=tolerances.FLOAT32_REORDERED, what=what)
  _check_pickle(torch, tmp_path / 'mamba' / 'usual')
