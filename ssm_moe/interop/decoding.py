"""Continues prompts of any lengths together, until each has what it is to have.

Prompts are filled up in front, in a segment of their own: the first token of a prompt then starts
from nothing, as at the start of a document, and all prompts of a batch end at the same place.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ssm_moe.config import ModelConfig
from ssm_moe.interop.likelihood import PIECE, batches
from ssm_moe.models import lm, scoring
from ssm_moe.models.block import PeriodState
from ssm_moe.ops import implementation
from ssm_moe.shapes import Array, Float, Int, Key, PyTree

_STEPS = 32  # tokens that are written before the host looks at them
_MOST_ROWS = 64


def continuations(
  params: PyTree,
  config: ModelConfig,
  prompts: Sequence[Int[np.ndarray, '_']],
  *,
  is_done: Callable[[int, list[int]], bool],
  temperatures: Sequence[float],
  batch_tokens: int,
  seed: int = 0,
) -> Iterator[tuple[int, list[int]]]:
  """Yields the index of each prompt and the tokens that continue it; some more than were needed.

  Args:
    params: Of the model, on one device.
    config: Of the model. No token is dropped, whatever the dispatch of training.
    prompts: At least one token each.
    is_done: Of a prompt's index and what continues it so far: whether that is enough.
    temperatures: Of each prompt; 0 takes the likeliest token.
    batch_tokens: About so many are read at one time, but at least one piece.
    seed: Of the draws.

  Raises:
    ConfigError: experts choose tokens, so that the model does not go on token by token.
  """
  lm.check_causal(config, 'generation')
  key = jax.random.key(seed)
  for batch, rows, length in batches(map(len, prompts), batch_tokens, _MOST_ROWS):
    tokens, segment_ids = np.zeros((2, rows, length), np.int32)
    heat = np.zeros(rows, np.float32)
    for row, index in enumerate(batch):
      size = len(prompts[index])
      tokens[row, length - size :] = prompts[index]
      segment_ids[row, length - size :] = 1
      heat[row] = temperatures[index]
    state = None
    for start in range(0, length, PIECE):
      part = slice(start, start + PIECE)
      logits, state = _read(params, state, tokens[:, part], segment_ids[:, part], config=config)
    written: list[list[int]] = [[] for _ in batch]
    done = [False for _ in batch]
    while not all(done):
      key, own = jax.random.split(key)
      new, logits, state = _write(params, logits, state, heat, own, config=config)
      for row, index in enumerate(batch):
        if not done[row]:
          written[row] += np.asarray(new)[:, row].tolist()
          done[row] = is_done(index, written[row])
    yield from zip(batch, written)


@functools.partial(jax.jit, static_argnames=('config',))
def _read(
  params: PyTree,
  state: PeriodState | None,
  tokens: Int[Array, 'B L'],
  segment_ids: Int[Array, 'B L'],
  *,
  config: ModelConfig,
) -> tuple[Float[Array, 'B V'], PeriodState]:
  """Returns the logits behind the last token, and the state there."""
  model = lm.LM(scoring.without_drops(config))
  with implementation.on_devices(1):
    output = model.apply(
      {'params': params}, tokens, segment_ids=segment_ids, mask=segment_ids > 0, state=state
    )
    logits = model.apply({'params': params}, output.hidden[:, -1], method='logits')
  return logits, output.state


@functools.partial(jax.jit, static_argnames=('config',))
def _write(
  params: PyTree,
  logits: Float[Array, 'B V'],
  state: PeriodState,
  temperatures: Float[Array, 'B'],
  key: Key[Array, ''],
  *,
  config: ModelConfig,
) -> tuple[Int[Array, 'steps B'], Float[Array, 'B V'], PeriodState]:
  """Draws the next tokens, one after the other; returns them, and what goes on behind them."""
  model = lm.LM(scoring.without_drops(config))

  def one_token(carry, key):
    logits, state = carry
    heat = temperatures[:, None]
    drawn = jax.random.categorical(key, logits / jnp.where(heat > 0, heat, 1), axis=-1)
    token = jnp.where(temperatures > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
    return model.apply({'params': params}, token, state, method='step'), token

  with implementation.on_devices(1):
    (logits, state), tokens = jax.lax.scan(
      one_token, (logits, state), jax.random.split(key, _STEPS)
    )
  return tokens, logits, state
