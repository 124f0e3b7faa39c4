"""Scores are those of the logits, however many of these are in memory at one time."""

import numpy as np
import pytest

from ssm_moe.models import scoring
from tests import tolerances
from tests.models import small_model


@pytest.mark.parametrize('columns', [3, 100])
def test_scores_do_not_depend_on_chunks(monkeypatch, columns):
  batch, length = 2, 8 if columns == 3 else 9  # what was compiled for one is not the other's
  monkeypatch.setattr(scoring, '_LOGITS', columns * batch * small_model.CONFIG.vocab_size)
  tokens = np.random.default_rng(0).integers(0, 257, (batch, length + 1), np.int32)
  # One that the model would have chosen.
  tokens[1, 4] = small_model.greedy(tokens[1, :4], 1)[0]
  scores, state = scoring.score_window(
    small_model.params(),
    None,
    tokens[:, :-1],
    tokens[:, 1:],
    np.ones((batch, length), bool),
    config=small_model.CONFIG,
  )
  assert state is None
  for row, nats, likeliest in zip(tokens, np.asarray(scores.nats), np.asarray(scores.likeliest)):
    logits = small_model.logits(row[:-1])
    expected = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(length), row[1:]]
    tolerances.assert_close(nats, expected, rtol=tolerances.FLOAT32_REORDERED)
    np.testing.assert_array_equal(likeliest, logits.argmax(axis=-1) == row[1:])
  assert scores.likeliest[1, 3]
