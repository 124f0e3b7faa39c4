"""The model as generation runs it: each period's weights apart, in the dtype of the matrix work.

`lm.LM` stacks the parameters of all periods, and casts a matrix where it is used. In a loop over
tokens that would copy every matrix out of its stack, and cast it, in each step: several times the
bytes that a step has to read. Here both are done once, before the loop. States are apart as well,
so that each is written in place.
"""

import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct

from ssm_moe.config import ModelConfig
from ssm_moe.layers.norm import make_norm
from ssm_moe.models import lm
from ssm_moe.models.block import Period, PeriodState
from ssm_moe.shapes import Array, Float, Int, PyTree

# Of each period, by layer name.
DecodeState = tuple[PeriodState, ...]

# The head has so many columns for tokens or a multiple: products of matrices whose rows are not
# aligned are slow, or XLA pads them in every step.
_COLUMNS = 128
# What layers use in float32, besides vectors, which are too small to matter.
_FLOAT32 = ('A_log', 'selection_bias', 'router')


@no_type_check  # JAX rebuilds it with shapes and layouts in place of arrays
class DecodeWeights(struct.PyTreeNode):
  """The parameters of a model, laid out for steps of one token.

  Attributes:
    embedding: In the dtype of the residual stream.
    head: Makes logits; rows beyond the vocabulary are zero.
    final_norm: Of the stream before the head; empty if the model has none.
    periods: Parameters of each.
  """

  embedding: Float[Array, 'V M']
  head: Float[Array, 'padded_V M']
  final_norm: PyTree
  periods: tuple[PyTree, ...]


@functools.partial(jax.jit, static_argnames='config')
def make_weights(params: PyTree, *, config: ModelConfig) -> DecodeWeights:
  """Returns the weights of `params`, those of an `lm.LM`."""
  dtype = jnp.dtype(config.dtype)
  embedding = params['embedding']
  head = embedding if config.tie_embeddings else params['head'].T
  return DecodeWeights(
    embedding=embedding.astype(jnp.dtype(config.residual_dtype)),
    head=jnp.pad(head.astype(dtype), ((0, -config.vocab_size % _COLUMNS), (0, 0))),
    final_norm=params.get('final_norm', {}),
    periods=apart(
      jax.tree.map_with_path(functools.partial(_cast, dtype), params['periods']), config
    ),
  )


def apart(stacked: PyTree, config: ModelConfig) -> tuple[PyTree, ...]:
  """Returns the parameters or the state of each period, out of those of all."""
  return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(config.num_periods))


def stacked(periods: tuple[PyTree, ...]) -> PyTree:
  """Undoes `apart`."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *periods)


def step(
  weights: DecodeWeights, tokens: Int[Array, 'B'], state: DecodeState, *, config: ModelConfig
) -> tuple[Float[Array, 'B V'], DecodeState]:
  """Returns the float32 logits after one more token, and the state for the next.

  Equal to the method `step` of `lm.LM`.
  """
  period, new_state = Period(config), []
  x = weights.embedding[tokens]
  for params, before in zip(weights.periods, state, strict=True):
    x, after = period.apply({'params': params}, x, before, method='step')
    new_state.append(after)
  if config.final_norm:
    x = make_norm(config.norm).apply({'params': weights.final_norm}, x.astype(jnp.float32))
  x = x.astype(jnp.dtype(config.dtype))
  logits = jnp.einsum('bm,vm->bv', x, weights.head, preferred_element_type=jnp.float32)
  return logits[:, : config.vocab_size], tuple(new_state)


def initial_state(config: ModelConfig, batch: int) -> DecodeState:
  """Returns the state before any token."""
  return apart(lm.initial_state(config, batch), config)


def _cast(dtype: jnp.dtype, path: tuple, leaf: Array) -> Array:
  """Casts matrices that layers would cast; `leaf` has all periods."""
  names = [key.key for key in path]
  kept = any(name.startswith(_FLOAT32) for name in names)
  return leaf if kept or leaf.ndim < 3 else leaf.astype(dtype)
