"""Evaluation scores every token of whole documents once, and knows their bytes exactly."""

import chex
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ssm_moe.config import DataConfig
from ssm_moe.data import DataError, evaluation
from ssm_moe.data.evaluation import EvalBatches
from ssm_moe.data.sources import TextSource
from ssm_moe.data.tokenizer import ByteTokenizer

END = 256


@pytest.fixture(scope='module')
def make(folder_of):
  """Makes batches over lists of documents, one list a source."""

  def make(*documents, names=(), batch_size=3, sequence_length=8, **changes):
    with pytest.MonkeyPatch.context() as patch:
      if documents:
        opened = tuple(TextSource('memory', folder_of(d), ByteTokenizer()) for d in documents)
        patch.setattr(evaluation, 'open_sources', lambda *args, **kwargs: opened)
      return EvalBatches(
        DataConfig(valid=names),
        batch_size=batch_size,
        sequence_length=sequence_length,
        vocab_size=257,
        cache_dir='unused',
        **changes,
      )

  return make


def scored(batches):
  """The targets that are scored, in order."""
  return [
    target
    for batch in batches
    for row, mask in zip(batch['targets'], batch['loss_mask'])
    for target in row[mask == 1].tolist()
  ]


DOCUMENTS = st.lists(st.lists(st.integers(0, 255), max_size=20), min_size=1, max_size=8)


@settings(deadline=None)
@given(
  sources=st.lists(DOCUMENTS, min_size=1, max_size=2),
  batch_size=st.integers(1, 4),
  sequence_length=st.integers(1, 9),
)
def test_every_token_of_every_document_is_scored_once(make, sources, batch_size, sequence_length):
  documents = [document for source in sources for document in source]
  assume(any(documents))
  batches = make(*sources, batch_size=batch_size, sequence_length=sequence_length)
  assert scored(batches) == [token for document in documents for token in [*document, END]]
  assert batches.num_tokens == sum(len(document) + 1 for document in documents)
  assert batches.num_bytes == sum(map(len, documents))
  assert batches.num_documents == len(documents)
  assert scored(batches) == scored(batches)  # again, from the start
  count = 0
  for batch in batches:
    chex.assert_shape(
      [batch[name] for name in ('inputs', 'targets', 'segment_ids', 'loss_mask')],
      (batch_size, sequence_length),
    )
    assert not batch['continues'].any()
    padding = batch['loss_mask'] == 0
    for row, mask in zip(batch['segment_ids'], padding):
      assert set(row[mask]).isdisjoint(row[~mask])
    count += 1
  assert count == batches.num_batches


@settings(deadline=None)
@given(documents=DOCUMENTS, eval_tokens=st.integers(1, 60))
def test_as_many_whole_documents_as_fit_but_at_least_one(make, documents, eval_tokens):
  assume(documents[0])
  batches = make(documents, eval_tokens=eval_tokens)
  count = batches.num_documents
  assert scored(batches) == [t for document in documents[:count] for t in [*document, END]]
  assert batches.num_bytes == sum(map(len, documents[:count]))
  assert count >= 1
  assert count == 1 or batches.num_tokens <= eval_tokens
  if count < len(documents):
    assert batches.num_tokens + len(documents[count]) + 1 > eval_tokens


def test_sources_share_the_tokens_by_size(make):
  batches = make([[1] * 9] * 30, [[2] * 9] * 10, eval_tokens=200)
  targets = scored(batches)
  assert (targets.count(1), targets.count(2)) == (9 * 15, 9 * 5)


@pytest.mark.parametrize('count', [2, 3])
def test_processes_share_the_same_batches(make, count):
  documents = [[i] * (i % 7) for i in range(40)]
  whole = list(make(documents, batch_size=6))
  parts = [
    list(make(documents, batch_size=6, rows=range(6 * i // count, 6 * (i + 1) // count)))
    for i in range(count)
  ]
  assert {len(part) for part in parts} == {len(whole)}
  for step, batch in enumerate(whole):
    joined = {name: np.concatenate([part[step][name] for part in parts]) for name in batch}
    chex.assert_trees_all_equal(joined, batch)


def test_synthetic_tasks_have_fixed_examples_and_no_bytes(make):
  batches = make(names=('induction_heads',), eval_tokens=80)
  assert batches.num_bytes is None and batches.tokenizer is None
  assert batches.num_tokens == 10 == len(scored(batches))
  assert scored(batches) == scored(make(names=('induction_heads',), eval_tokens=80))


def test_standard_library_by_name(tmp_path):
  batches = EvalBatches(
    DataConfig(),
    batch_size=4,
    sequence_length=512,
    vocab_size=257,
    cache_dir=tmp_path,
    eval_tokens=20_000,
  )
  text = batches.tokenizer.decode(scored(batches))
  assert len(text.replace('<|endoftext|>', '').encode()) == batches.num_bytes
  assert batches.num_tokens <= 20_000
  assert 'stdlib' in batches.describe()


def test_documents_without_a_byte_are_refused(make):
  with pytest.raises(DataError, match=r'config\.data\.valid: the documents .* are all empty'):
    make([[], []])
  with pytest.raises(DataError, match='are all empty'):
    make([[], [1, 2, 3]], eval_tokens=1)
  assert make([[], []], [[1]]).num_bytes == 1
