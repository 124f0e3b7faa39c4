"""The benchmark of generation: real states of the context's length, records, a table."""

import dataclasses

import jax
import pytest

from ssm_moe.analysis import benchmark_decode
from ssm_moe.config import AttentionConfig, ModelConfig
from tests.inference import models

_SETTINGS = benchmark_decode.Settings(
  batch_sizes=(1, 4), contexts=(8, 16), repeats=2, num_tokens=3, prefill_tokens=32, unroll=1
)


@pytest.mark.extended
def test_every_batch_and_context_has_its_records():
  config = dataclasses.replace(
    models.SMALL, pattern='A', num_periods=1, attention=AttentionConfig(num_heads=2)
  )
  model = benchmark_decode.Model('attention', config)
  assert model.error(8) < 1e-4
  records = list(model.measure(_SETTINGS))
  assert [(r['context'], r['batch_size'], r['pass']) for r in records] == [
    (context, batch, kind)
    for context in (8, 16)
    for batch in (1, 4)
    for kind in ('decode', 'prefill')
  ]
  for record in records:
    assert 0 < record['min_ms'] <= record['median_ms'] <= record['max_ms']
    tokens = record['batch_size'] * (record['context'] if record['pass'] == 'prefill' else 1)
    assert record['tokens_per_second'] == pytest.approx(1e3 * tokens / record['median_ms'])
  # Keys and values of the whole context, and two counters.
  assert records[2]['state_bytes'] == 4 * (2 * 8 * 16 * 4 + 8)
  lines = benchmark_decode.table(records).splitlines()
  assert len(lines) == 3 and 'ms a token, 16' in lines[0]

  position, times = model._position(model._of_context(16), 4, 16, _SETTINGS)
  # Two rows at a time, all timed together.
  assert len(times) == 1
  (state,) = position.state
  assert state['attention_0'].filled.tolist() == [16] * 4
  assert (abs(state['attention_0'].keys).min(axis=(1, 3)) > 0).all()
  assert len({float(row.sum()) for row in state['attention_0'].keys}) == 4


def test_what_has_no_memory_is_said(monkeypatch):
  model = benchmark_decode.Model.__new__(benchmark_decode.Model)
  model.name, model._config = 'model', ModelConfig(pattern='A')

  def refuse(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')
    yield

  monkeypatch.setattr(model, '_measure', refuse)
  settings = dataclasses.replace(_SETTINGS, batch_sizes=(64,), contexts=(65536,))
  (said,) = model.measure(settings)
  gib = 64 * 65536 * 128 * 2 * 4 * 4 / 2**30
  assert said == f'model, batch 64, context 65536: no memory; the state is {gib:.1f} GiB'


def test_the_table_says_what_is_missing():
  shared = {'name': 'a', 'batch_size': 8, 'tokens_per_second': 7.0, 'state_bytes': 2**21}
  records = [
    shared | {'pass': 'decode', 'context': 1024, 'median_ms': 1.25},
    shared | {'pass': 'prefill', 'context': 1024, 'median_ms': 3.0},
    shared | {'pass': 'decode', 'context': 4096, 'median_ms': 2.0, 'batch_size': 1},
    shared | {'pass': 'prefill', 'context': 4096, 'median_ms': 3.0, 'batch_size': 1},
  ]
  _, *rows = (line.split('  ') for line in benchmark_decode.table(records).splitlines())
  cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
  assert cells == [
    ['a', '8', '1.250', '-', '7', '2.0', '7'],
    ['a', '1', '-', '2.000', '7', '2.0', '7'],
  ]
