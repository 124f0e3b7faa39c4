"""How well a model predicts each token of a sequence, whatever its length.

For evaluations that ask about single tokens: one window may be the whole sequence, or go on from
the state that the window before it left. Memory for logits does not grow with the length.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssm_moe.config import ModelConfig
from ssm_moe.models import lm
from ssm_moe.models.block import PeriodState, keep_rows
from ssm_moe.ops import implementation
from ssm_moe.ops.softmax_cross_entropy import softmax_cross_entropy
from ssm_moe.shapes import Array, Bool, Float, Int, PyTree

# Logits that exist at one time: 256 MiB in float32.
_LOGITS = 1 << 26


class TokenScores(NamedTuple):
  """What a model thought of each target before it saw it.

  Attributes:
    nats: -log p(target), float32.
    likeliest: Whether no token was likelier; of equals, the first counts.
  """

  nats: Float[Array, 'B L']
  likeliest: Bool[Array, 'B L']


@functools.partial(jax.jit, static_argnames=('config',))
def score_window(
  params: PyTree,
  state: PeriodState | None,
  inputs: Int[Array, 'B L'],
  targets: Int[Array, 'B L'],
  mask: Bool[Array, 'B L'],
  continues: Bool[Array, 'B'] | None = None,
  *,
  config: ModelConfig,
) -> tuple[TokenScores, PeriodState | None]:
  """Scores the next window of every row.

  Args:
    params: Of the model, on one device.
    state: What the window before left; None, and there was none, and none is kept.
    inputs: Tokens that are read.
    targets: What comes next, at each.
    mask: Where a token is no padding. Padding stands behind a row's last token.
    continues: Rows that go on from `state`; the others start from nothing. All if None.
    config: Of the model; no token is dropped, whatever it says.

  Returns:
    The scores, and the state for the next window.
  """
  config = lm.without_drops(config)
  if state is not None and continues is not None:
    state = keep_rows(state, continues)
  with implementation.on_devices(1):
    output = lm.LM(config).apply({'params': params}, inputs, mask=mask, state=state)
    head = lm.head_matrix(params, config).astype(output.hidden.dtype)
    scores = _score(output.hidden, head, targets)
  return scores, None if state is None else output.state


def _score(
  hidden: Float[Array, 'B L M'], head: Float[Array, 'M V'], targets: Int[Array, 'B L']
) -> TokenScores:
  batch, length = targets.shape
  columns = min(max(_LOGITS // (batch * head.shape[1]), 1), length)

  def of_chunk(chunk):
    x, expected = chunk
    logits = jnp.einsum('blm,mv->blv', x, head, preferred_element_type=jnp.float32)
    nats, _ = softmax_cross_entropy(logits, expected, jnp.ones(expected.shape, jnp.float32))
    return TokenScores(nats, jnp.argmax(logits, axis=-1).astype(expected.dtype) == expected)

  def cut(x):
    x = jnp.pad(x, [(0, 0), (0, -length % columns)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, -1, columns, *x.shape[2:]).swapaxes(0, 1)

  def join(x):
    return x.swapaxes(0, 1).reshape(batch, -1)[:, :length]

  return jax.tree.map(join, jax.lax.map(of_chunk, (cut(hidden), cut(targets))))
