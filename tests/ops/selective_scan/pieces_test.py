"""Pieces of a row, run side by side, equal the whole: with the reference as the scan of a piece."""

import jax
import jax.numpy as jnp
import pytest

from ssm_moe.ops.selective_scan import cases, pieces, reference
from tests.tolerances import FLOAT32_REORDERED, assert_close

_LENGTH = 45
_OF_TIME = ('x', 'dt', 'B', 'C', 'z', 'segment_ids')


@pytest.mark.parametrize(('number', 'segments'), [(3, None), (3, 30), (5, 3)])
def test_pieces_equal_the_whole(number, segments):
  fused = {'D': True, 'z': True, 'dt_bias': True, 'dt_softplus': True, 'h0': True}
  case = cases.Case(name='pieces', length=_LENGTH, segments=segments, **fused)
  arguments = cases.make_inputs(case, jax.random.key(0))
  softplus, ids = arguments.pop('dt_softplus'), arguments['segment_ids']
  cotangents = cases.make_cotangents(case, jax.random.key(1))

  def to_rows(v):
    return v.reshape(case.batch * number, -1, *v.shape[2:])

  def from_rows(v):
    return v.reshape(case.batch, number, *v.shape[1:])

  def scan(x, A, h0, **others):
    return reference.selective_scan(x=x, A=A, h0=h0, **others, dt_softplus=softplus)

  @jax.jit
  def whole(dy, dh, x, A, h0, **others):
    outputs, pullback = jax.vjp(lambda x, A, h0: scan(x, A, h0, **others), x, A, h0)
    return outputs, pullback((dy, dh))

  @jax.jit
  def in_pieces(dy, dh, x, A, h0, **others):
    x, dy = to_rows(x), to_rows(dy)
    others = {k: to_rows(v) if k in _OF_TIME and v is not None else v for k, v in others.items()}
    # A reset at the first token of a piece, which the reference cannot see from inside.
    keeps = jnp.ones((case.batch * number, 1, 1))
    if ids is not None:
      same = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
      keeps = to_rows(same)[:, :1, None].astype(jnp.float32)
    zero = jnp.zeros((case.batch * number, *h0.shape[1:]))

    def enter(x, A, entering):
      return scan(x, A, entering * keeps, **others)

    decays = from_rows(enter(0 * x, A, zero + 1)[1])
    carries = from_rows(enter(x, A, zero)[1])
    entering = pieces.join(h0, carries[:, :-1], decays[:, :-1]).reshape(zero.shape)
    (y, h), pullback = jax.vjp(enter, x, A, entering)
    carries = from_rows(pullback((dy, zero))[2])
    leaving = pieces.join(dh, carries[:, 1:], decays[:, 1:], from_right=True)
    dx, dA, dh0 = pullback((dy, leaving.reshape(zero.shape)))
    y, dx = (v.reshape(case.batch, _LENGTH, -1) for v in (y, dx))
    return (y, from_rows(h)[:, -1]), (dx, dA, from_rows(dh0)[:, 0])

  expected = whole(*cotangents, **arguments)
  assert_close(in_pieces(*cotangents, **arguments), expected, rtol=FLOAT32_REORDERED)


def test_what_enters_the_edge_is_zero_if_not_said():
  carries = jnp.full((1, 2, 1, 1), 3.0)
  decays = jnp.full((1, 2, 1, 1), 0.5)
  assert pieces.join(None, carries, decays).ravel().tolist() == [0, 3, 4.5]
  assert pieces.join(None, carries, decays, from_right=True).ravel().tolist() == [4.5, 3, 0]


@pytest.mark.parametrize(
  ('length', 'number', 'tokens'), [(16384, 4, 4096), (100, 3, 48), (100, 5, 32), (7, 3, 16)]
)
def test_pieces_are_whole_tiles(length, number, tokens):
  assert pieces.tokens_of_piece(length, number, 16) == tokens
