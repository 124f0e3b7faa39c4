"""Writes after prompts of any length, a few tokens at a time, to be shown as they come."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ssm_moe.config import ModelConfig
from ssm_moe.inference import decoder, loop, prefill
from ssm_moe.inference.sampling import Sampling, row_keys
from ssm_moe.models import lm
from ssm_moe.models.block import PeriodState
from ssm_moe.shapes import Array, Int, Key, PyTree

# Tokens that the device writes before they are looked at. A look takes the host about as long as
# one token; rows that have come to their end waste at most so many.
CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A model, ready to write.

  Attributes:
    params: As `lm.LM` has them, for prompts.
    weights: Of the same, for the tokens after them.
    config: Without capacity.
  """

  params: PyTree
  weights: decoder.DecodeWeights
  config: ModelConfig


def prepare(params: PyTree, config: ModelConfig) -> Prepared:
  """Returns the model of `params`.

  Raises:
    ConfigError: experts choose tokens, so that the model does not go on token by token.
  """
  lm.check_causal(config, 'generation')
  config = lm.without_drops(config)
  return Prepared(params, decoder.make_weights(params, config=config), config)


class Writer:
  """Rows that are being written, each after a prompt of its own.

  What a row is given depends on its prompt, its number, the key and how tokens are drawn: not on
  the other rows.

  Attributes:
    ended: Rows that nobody waits for: those that came to their end of text, and whatever the caller
      adds. When all have, there are no more tokens.
    written: Tokens that each row has.
  """

  def __init__(
    self,
    model: Prepared,
    prompts: Sequence[Sequence[int]],
    key: Key[Array, ''],
    *,
    sampling: Sampling,
    end_of_text: int | None = None,
    state: PeriodState | None = None,
    numbers: Sequence[int] | None = None,
    rewinds: bool = False,
  ):
    """Prepares to read the prompts.

    Args:
      model: What writes.
      prompts: Of each row, at least one token.
      key: Of the draws.
      sampling: How tokens are drawn.
      end_of_text: The token after which a row has ended; none if None.
      state: That prompts of one length go on from, a row for each; nothing if None.
      numbers: Of the rows, which tell their draws apart; 0, 1, ... if None.
      rewinds: Whether `state_after` is to be asked for.
    """
    self._model, self._prompts, self._key, self._before = model, prompts, key, state
    self._sampling, self._end_of_text, self._rewinds = sampling, end_of_text, rewinds
    self._numbers = range(len(prompts)) if numbers is None else numbers
    self._position: loop.Position | None = None
    # With the number of tokens written before.
    self._snapshots: list[tuple[int, loop.Position]] = []
    self.ended, self.written = np.zeros(len(prompts), bool), 0

  def more(self, most: int) -> Int[np.ndarray, 'B n']:
    """Returns the next few tokens of each row, at most `most`; none if all rows have ended."""
    if most < 1 or self.ended.all():
      return np.zeros((len(self._prompts), 0), np.int32)
    if self._position is None:
      self._position = self._first()
      tokens = np.asarray(self._position.token)[:, None]
      if self._end_of_text is not None:
        self.ended |= tokens[:, 0] == self._end_of_text
    else:
      if self._rewinds:
        # The loop takes the memory of the position that it begins with.
        self._snapshots.append((self.written, jax.tree.map(jnp.copy, self._position)))
      tokens, self._position, self.ended = self._advance(self._position, most, self.ended)
    self.written += tokens.shape[1]
    return tokens

  def forget(self, count: int) -> None:
    """Says that `state_after` will not be asked for less than `count` tokens."""
    while len(self._snapshots) > 1 and self._snapshots[1][0] <= count:
      self._snapshots.pop(0)

  def state_after(self, count: int) -> tuple[PeriodState, Int[np.ndarray, 'B']]:
    """Returns the state of `count` tokens and all before them, but for the last, and that one.

    Nothing more is written after this.
    """
    if not count:
      return self._state_of_prompts()
    position = self._position
    if count < self.written:
      at, position = 1, None
      for snapshot in self._snapshots:
        if snapshot[0] <= count:
          at, position = snapshot
      nobody = np.zeros_like(self.ended)
      while at < count:
        tokens, position, _ = self._advance(position, count - at, nobody)
        at += tokens.shape[1]
    return decoder.stacked(position.state), np.asarray(position.token)

  def _state_of_prompts(self) -> tuple[PeriodState, Int[np.ndarray, 'B']]:
    config, state = self._model.config, self._before
    last = np.array([prompt[-1] for prompt in self._prompts], np.int32)
    prompts = [prompt[:-1] for prompt in self._prompts]
    if any(prompts):
      _, state = prefill.prefill(self._model.params, prompts, config=config, state=state)
    elif state is None:
      state = lm.initial_state(config, len(prompts))
    return state, last

  def _first(self) -> loop.Position:
    model = self._model
    logits, state = prefill.prefill(
      model.params, self._prompts, config=model.config, state=self._before
    )
    return _first_draw(
      logits,
      state,
      self._key,
      jnp.asarray(self._numbers, jnp.int32),
      config=model.config,
      sampling=self._sampling,
    )

  def _advance(self, position: loop.Position, count: int, ended: np.ndarray):
    """Returns at most `count` tokens, where rows are then, and which have ended."""
    tokens, position, ended, done = loop.advance_until(
      self._model.weights,
      position,
      jnp.asarray(ended),
      jnp.int32(min(count, CHUNK)),
      config=self._model.config,
      sampling=self._sampling,
      most=CHUNK,
      end_of_text=self._end_of_text,
    )
    return np.asarray(tokens)[:, : int(done)], position, np.array(ended)


@functools.partial(jax.jit, static_argnames=('config', 'sampling'))
def _first_draw(
  logits: Array,
  state: PeriodState,
  key: Key[Array, ''],
  numbers: Int[Array, 'B'],
  *,
  config: ModelConfig,
  sampling: Sampling,
) -> loop.Position:
  return loop.first(logits, decoder.apart(state, config), row_keys(key, numbers), sampling)
