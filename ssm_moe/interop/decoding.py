"""Continues prompts of any lengths together, until each has what it is to have."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from ssm_moe.config import ModelConfig
from ssm_moe.inference.sampling import Sampling
from ssm_moe.inference.writer import CHUNK, Writer, prepare
from ssm_moe.interop.likelihood import batches
from ssm_moe.shapes import Int, PyTree

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
  model = prepare(params, config)
  for temperature in sorted(set(temperatures)):
    alike = [index for index, own in enumerate(temperatures) if own == temperature]
    lengths = [len(prompts[index]) for index in alike]
    for places, num_rows, _ in batches(lengths, batch_tokens, _MOST_ROWS):
      batch = [alike[place] for place in places]
      filler = [[0]] * (num_rows - len(batch))
      rows = Writer(
        model,
        [*(prompts[index].tolist() for index in batch), *filler],
        jax.random.key(seed),
        sampling=Sampling(temperature=temperature),
        numbers=[*batch, *[0] * len(filler)],
      )
      rows.ended[len(batch) :] = True
      written: list[list[int]] = [[] for _ in batch]
      while not rows.ended.all():
        new = rows.more(CHUNK)
        for row, index in enumerate(batch):
          if not rows.ended[row]:
            written[row] += new[row].tolist()
            rows.ended[row] = is_done(index, written[row])
      yield from zip(batch, written)
