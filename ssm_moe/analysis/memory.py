"""Bytes that a training step holds on each device, by kind, without compiling it.

What has a layout is counted exactly: parameters, moments, gradients, batch. What the backward pass
needs of the forward pass is not guessed from a formula but asked of automatic differentiation, by
tracing the model at the size that one device has: its rows of the batch, its share of the channels.
What a compiler adds (padding, copies between layouts, several temporaries at a time) and removes
(what it would rather compute again) is not in it.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe import sharding
from ssm_moe.config import ConfigError, ExperimentConfig, ModelConfig
from ssm_moe.models import lm

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def device_bytes(tree: Any) -> int:
  """Returns what a device holds of a tree of arrays, or of shapes with layouts.

  Raises:
    ConfigError: an array does not divide over the mesh axes that are to split it.
  """
  return sum(
    math.prod(_device_shape(path, leaf)) * leaf.dtype.itemsize
    for path, leaf in jax.tree.leaves_with_path(tree)
  )


def _device_shape(path: Any, leaf: Any) -> tuple[int, ...]:
  try:
    return leaf.sharding.shard_shape(leaf.shape)
  except ValueError:
    layout = leaf.sharding
    sizes = {name: size for name, size in layout.mesh.shape.items() if size > 1}
    raise ConfigError(
      f'config.mesh: {jax.tree_util.keystr(path)} of shape {leaf.shape} is to be split as '
      f'{tuple(layout.spec)}, which {sizes} does not divide'
    ) from None


def train_step_bytes(
  config: ExperimentConfig, mesh: jax.sharding.Mesh, state: Any, batch: Any
) -> dict[str, int]:
  """Returns the bytes per device of a training step, by kind.

  Args:
    config: Of the experiment.
    mesh: That it runs on.
    state: A `TrainState` of shapes with layouts.
    batch: Likewise.
  """
  train = config.train
  parameters = device_bytes(state.params)
  rows = train.batch_size // train.accumulation_steps // sharding.batch_divisor(mesh)
  length = train.sequence_length // mesh.shape['sequence']
  model = _of_one_device(config.model, mesh, rows * length)
  size = {'rows': rows, 'length': length}
  recomputed = 0
  if config.model.remat == 'period':
    one = dataclasses.replace(model, num_periods=1, remat='none')
    recomputed = _residual_bytes(one, state.params, **size)
  moments = device_bytes(state.opt_state)
  adapted = {}
  if state.adapters is not None:
    # With them added, and the gradients of that.
    merged = 2 * _adapted_bytes(state.params, state.adapters)
    adapted = {'adapters': device_bytes(state.adapters) + merged}
  return {
    'parameters': parameters,
    **adapted,
    'optimizer': moments,
    # Of what is trained, of which AdamW has two moments. With accumulation the sum so far and those
    # of the part exist side by side.
    'gradients': min(parameters, moments // 2) * (1 + (train.accumulation_steps > 1)),
    'activations': _residual_bytes(model, state.params, **size),
    'recomputed_activations': recomputed,
    'loss': _loss_bytes(config, mesh, rows),
    'carried_state': device_bytes(state.model_state),
    'batch': device_bytes(batch),
  }


def _adapted_bytes(params: Any, adapters: Any) -> int:
  """Returns the bytes per device of the parameters that have adapters."""
  if not isinstance(params, dict):
    return device_bytes(params)
  return sum(_adapted_bytes(params[name], below) for name, below in adapters.items())


def _of_one_device(config: ModelConfig, mesh: jax.sharding.Mesh, tokens: int) -> ModelConfig:
  """Returns the model with a device's share of channels and heads."""
  shares = mesh.shape['tensor']

  def share(size):
    return size if size % shares else size // shares

  attention, d_model = config.attention, config.d_model
  heads, kv_heads = share(attention.num_heads), attention.kv_heads
  if heads % kv_heads:
    heads = attention.num_heads
  return dataclasses.replace(
    config,
    mamba=dataclasses.replace(config.mamba, d_inner=share(config.mamba.inner_size(d_model))),
    mamba2=_mamba2_share(config, shares),
    attention=dataclasses.replace(
      attention, num_heads=heads, num_kv_heads=kv_heads, head_dim=attention.head_size(d_model)
    ),
    mlp=dataclasses.replace(config.mlp, d_ff=share(config.mlp.hidden_size(d_model))),
    moe=dataclasses.replace(
      config.moe,
      d_ff=share(config.moe.hidden_size(d_model)),
      router_groups=math.gcd(config.moe.router_groups, tokens),
    ),
  )


def _mamba2_share(config: ModelConfig, shares: int) -> Any:
  mamba2 = config.mamba2
  heads = mamba2.num_heads(config.d_model)
  # A small model without Mamba-2 may have no room for a head of it.
  if not heads or heads % shares or (heads // shares) % mamba2.num_groups:
    return mamba2
  return dataclasses.replace(mamba2, d_inner=heads // shares * mamba2.head_dim)


def _residual_bytes(config: ModelConfig, sharded_params: Any, *, rows: int, length: int) -> int:
  """Returns what the backward pass of a model keeps of the forward pass, besides parameters.

  Args:
    config: As one device has it.
    sharded_params: Of the whole model, with layouts: a copy of a parameter, in bfloat16 say, is cut
      as the parameter is.
    rows: B of the device.
    length: L.
  """
  model = lm.LM(config)
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))['params']

  def kept(params, tokens, segment_ids):
    def run(params):
      output = model.apply({'params': params}, tokens, segment_ids=segment_ids)
      return output.hidden, lm.auxiliary_loss(output.aux, config)

    _, pullback = jax.vjp(run, params)
    inputs = {id(leaf) for leaf in jax.tree.leaves((params, tokens, segment_ids))}
    residuals = {id(leaf): leaf for leaf in jax.tree.leaves(pullback)}
    return [leaf for key, leaf in residuals.items() if key not in inputs]

  whole = dict(jax.tree.leaves_with_path(sharded_params))
  copies = {}
  for path, leaf in jax.tree.leaves_with_path(params):
    if path in whole and leaf.ndim > 1:
      copies[leaf.shape] = math.prod(whole[path].sharding.shard_shape(whole[path].shape))
  return sum(
    copies.get(leaf.shape, leaf.size) * leaf.dtype.itemsize
    for leaf in jax.eval_shape(kept, params, tokens, tokens)
  )


def _loss_bytes(config: ExperimentConfig, mesh: jax.sharding.Mesh, rows: int) -> int:
  """The gradients that the loss makes in its forward pass, and the logits of one chunk."""
  model, length = config.model, config.train.sequence_length // mesh.shape['sequence']
  vocab = -(-model.vocab_size // mesh.shape['tensor'])
  chunk = min(max(config.train.loss_chunk // rows, 1), length) * rows
  itemsize = jnp.dtype(model.dtype).itemsize
  d_hidden = rows * length * model.d_model * itemsize
  d_head = vocab * model.d_model * 4 // mesh.shape['fsdp']
  return d_hidden + d_head + chunk * vocab * (2 * 4 + itemsize)  # logits, probabilities, gradient


def remedy(config: ExperimentConfig, mesh: jax.sharding.Mesh, bytes_by_kind: dict[str, int]) -> str:
  """Returns what would make a training step smaller, the most promising first.

  Args:
    config: Of the experiment.
    mesh: That it runs on.
    bytes_by_kind: From `train_step_bytes`.
  """
  train, rows = config.train, sharding.batch_divisor(mesh)
  of_state = sum(bytes_by_kind[kind] for kind in ('parameters', 'optimizer', 'gradients'))
  activations = []
  if config.model.remat == 'none':
    activations.append('--config.model.remat=period')
  if train.batch_size // train.accumulation_steps > rows:
    activations.append('more config.train.accumulation_steps')
    activations.append('a smaller config.train.batch_size')
  else:
    activations.append('a shorter config.train.sequence_length')
  state = ['more config.mesh.fsdp' if mesh.size > mesh.shape['fsdp'] else 'a larger slice']
  state_first = of_state > sum(bytes_by_kind.values()) / 2
  options = state + activations if state_first else activations + state
  return ', '.join(options[:-1]) + f' or {options[-1]}'


def required_bytes(message: str) -> int | None:
  """Returns how much memory the TPU compiler says that a program needs; None if it does not.

  Args:
    message: Of its error. What it calls temporaries has arguments and results in it.
  """
  for pattern in (
    r'temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM',
    r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm',
  ):
    found = re.search(pattern, message)
    if found:
      return int(float(found.group(1)) * _UNITS[found.group(2)])
  return None
