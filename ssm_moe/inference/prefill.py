"""Reading prompts: all tokens of a window at once, by the scan of training, the state carried on.

Prompts of different length end together, and padding stands before them as a document of its own:
where a document begins, convolution, scan and attention start anew, so that nothing of it reaches
the prompt, its state or its positions.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ssm_moe.config import ModelConfig
from ssm_moe.models import block, lm
from ssm_moe.models.block import PeriodState
from ssm_moe.shapes import Array, Bool, Float, Int, PyTree

# Tokens of a row that are read at once: a long document takes the memory of these, not of all.
WINDOW = 8192
_LEAST = 16


@functools.partial(jax.jit, static_argnames='config')
def read(
  params: PyTree,
  tokens: Int[Array, 'B L'],
  *,
  config: ModelConfig,
  segment_ids: Int[Array, 'B L'] | None = None,
  state: PeriodState | None = None,
  keep: Bool[Array, 'B'] | None = None,
) -> tuple[Float[Array, 'B V'], PeriodState]:
  """Returns the logits after the last token of each row, and the state.

  Args:
    params: Of the model.
    tokens: One window.
    config: Of the model. No token is dropped, whatever it says of training.
    segment_ids: Document of each token; all one if None.
    state: From the window before; nothing if None.
    keep: Rows that go on from `state`; the others begin anew. All if None.
  """
  if keep is not None:
    state = block.keep_rows(state, keep)
  model, variables = lm.LM(lm.without_drops(config)), {'params': params}
  output = model.apply(variables, tokens, segment_ids=segment_ids, state=state)
  return model.apply(variables, output.hidden[:, -1], method='logits'), output.state


def prefill(
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  *,
  config: ModelConfig,
  state: PeriodState | None = None,
  window: int = WINDOW,
) -> tuple[Float[Array, 'B V'], PeriodState]:
  """Returns the logits after each prompt, and the state: those of the prompt alone.

  Lengths are rounded up, so that prompts of many lengths need few compilations.

  Args:
    params: Of the model.
    prompts: Tokens of each row, at least one.
    config: Of the model.
    state: That the prompts go on from; they must then be of one length. Nothing if None.
    window: Tokens of a row that are read at once.

  Raises:
    ValueError: a prompt without tokens, or prompts of several lengths that are to go on.
  """
  lengths = np.array([len(prompt) for prompt in prompts])
  if lengths.size == 0 or lengths.min() == 0:
    raise ValueError('prefill: every prompt must have at least one token')
  if state is not None and (lengths != lengths[0]).any():
    raise ValueError('prefill: prompts that go on from a state must be of one length')
  sizes = list(_windows(int(lengths.max()), window, padded=state is None))
  total = sum(sizes)
  tokens = np.zeros((len(prompts), total), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[total - len(prompt) :] = prompt
  padding, start = total - lengths, 0
  for size in sizes:
    stop = start + size
    options = {}
    if (padding > start).any():
      options['segment_ids'] = jnp.asarray(
        np.arange(start, stop)[None] >= padding[:, None], 'int32'
      )
    if state is not None and (padding >= start).any() and start:
      options['keep'] = jnp.asarray(padding < start)
    logits, state = read(params, tokens[:, start:stop], config=config, state=state, **options)
    start = stop
  return logits, state


def _windows(longest: int, window: int, *, padded: bool) -> Iterator[int]:
  """Yields the lengths of the windows. The first is shorter, and has the padding."""
  full = (longest - 1) // window
  first = longest - full * window
  if padded:
    # By at most a quarter.
    multiple = max(_LEAST, 1 << max((first - 1).bit_length() - 3, 0))
    first = min(-(-first // multiple) * multiple, window)
  yield first
  for _ in range(full):
    yield window
