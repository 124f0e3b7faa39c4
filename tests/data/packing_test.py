"""Windows cover the stream exactly, and segment ids change exactly at documents."""

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_moe.data.packing import DocumentStream, Lanes, Windows, empty_row, pad

END = 256
# Short documents, many of them empty, so that windows hold several and begin anywhere.
DOCUMENTS = st.lists(st.lists(st.integers(0, 255), max_size=9), min_size=1, max_size=12)


def layout(documents):
  """The whole stream token by token, from the definition: inputs, targets, document."""
  inputs, targets, owner = [], [], []
  for i, document in enumerate(documents):
    inputs += [END, *document]
    targets += [*document, END]
    owner += [i] * (len(document) + 1)
  return np.array(inputs), np.array(targets), np.array(owner)


@settings(deadline=None)
@given(documents=DOCUMENTS, data=st.data())
def test_any_window_is_that_part_of_the_stream(folder_of, documents, data):
  order = data.draw(st.none() | st.permutations(range(len(documents))))
  stream = DocumentStream(folder_of(documents), None if order is None else np.array(order))
  laid = [documents[i] for i in order] if order is not None else documents
  inputs, targets, owner = layout(laid)
  assert len(stream) == len(targets)
  start = data.draw(st.integers(0, len(targets) - 1))
  stop = data.draw(st.integers(start + 1, len(targets)))
  row = stream.window(start, stop)
  expected = {
    'inputs': inputs[start:stop].astype(np.int32),
    'targets': targets[start:stop].astype(np.int32),
    'segment_ids': (1 + owner[start:stop] - owner[start]).astype(np.int32),
    'loss_mask': np.ones(stop - start, np.float32),
  }
  chex.assert_trees_all_equal(row, expected)
  chex.assert_trees_all_equal_dtypes(row, expected)
  begins = start == 0 or owner[start] != owner[start - 1]
  assert stream.is_document_start(start) == begins


@settings(deadline=None)
@given(documents=DOCUMENTS, length=st.integers(1, 7))
def test_windows_score_every_token_once_but_for_the_partial_last(folder_of, documents, length):
  folder = folder_of(documents)
  windows = Windows(folder, length)
  rows = [windows[i] for i in range(len(windows))]
  seen = np.concatenate([row['targets'] for row in rows]) if rows else np.zeros(0)
  assert len(seen) == folder.num_tokens // length * length
  assert (seen == folder.tokens[: len(seen)]).all()


@settings(deadline=None)
@given(documents=DOCUMENTS)
def test_inputs_of_a_segment_are_its_targets_moved_by_one(folder_of, documents):
  folder = folder_of(documents)
  row = DocumentStream(folder).window(0, folder.num_tokens)
  for i, document in enumerate(documents):
    segment = row['segment_ids'] == i + 1
    assert row['inputs'][segment].tolist() == [END, *document]
    assert row['targets'][segment].tolist() == [*document, END]


@settings(deadline=None)
@given(
  documents=DOCUMENTS, num_lanes=st.integers(1, 3), length=st.integers(1, 4), seed=st.integers(0, 9)
)
def test_lanes_are_consecutive_windows_of_permuted_documents(
  folder_of, documents, num_lanes, length, seed
):
  folder = folder_of(documents)
  lanes = Lanes(folder, num_lanes=num_lanes, length=length, seed=seed)
  steps = lanes.steps_per_epoch
  assert steps == folder.num_tokens // (num_lanes * length)
  # Each document's stretch of the stream occurs whole in some order of the documents: the epoch's
  # stream is found again by following the lanes.
  for epoch in range(2 * bool(steps)):
    rows = [
      [lanes.row(epoch * steps + step, lane) for step in range(steps)] for lane in range(num_lanes)
    ]
    seen = np.concatenate([row['targets'] for lane in rows for row, _ in lane])
    stretches = [[*document, END] for document in documents]
    rest = seen.tolist()
    found = np.split(seen, np.flatnonzero(seen == END) + 1)
    for part in found[:-1]:
      stretches.remove(part.tolist())
      rest = rest[len(part) :]
    # What is left is the beginning of one more document, cut by the epoch's end.
    assert not rest or any(stretch[: len(rest)] == rest for stretch in stretches)
    for lane in rows:
      before = None
      for row, continues in lane:
        # A row goes on in a document if there is a row before it that did not end with one.
        assert continues == (before is not None and before['targets'][-1] != END)
        if before is not None:
          assert row['inputs'][0] == before['targets'][-1]
        before = row


def test_each_epoch_of_lanes_has_another_order(folder_of):
  folder = folder_of([[i] * 3 for i in range(50)])
  lanes = Lanes(folder, num_lanes=2, length=10, seed=0)
  epochs = [
    np.concatenate([lanes.row(epoch * 10 + step, 0)[0]['targets'] for step in range(10)])
    for epoch in range(3)
  ]
  assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()
  again = Lanes(folder, num_lanes=2, length=10, seed=0)
  chex.assert_trees_all_equal(again.row(15, 1), lanes.row(15, 1))


@pytest.mark.parametrize('size', [0, 3, 5])
def test_padding_is_not_scored_and_has_its_own_segment(folder_of, size):
  row = DocumentStream(folder_of([[1], [2, 3, 4]])).window(0, size) if size else empty_row()
  padded = pad(row, 5, END)
  assert padded['loss_mask'].tolist() == [1] * size + [0] * (5 - size)
  assert (padded['inputs'][size:] == END).all() and (padded['targets'][size:] == END).all()
  assert set(padded['segment_ids'][size:]).isdisjoint(row['segment_ids'])
  chex.assert_trees_all_equal({name: values[:size] for name, values in padded.items()}, row)
  chex.assert_trees_all_equal_dtypes(padded, row)
