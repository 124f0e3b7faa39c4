"""Synthetic examples follow their task's rule, and depend on seed, split and index alone."""

import chex
import numpy as np
import pytest

from ssm_moe.data import DataError
from ssm_moe.data.synthetic import MARKER, NAMES, NOISE, NUM_COPIED, VOCAB_SIZE, SyntheticTask


@pytest.mark.parametrize('length', [32, 33, 128])
def test_selective_copying_asks_for_the_data_tokens_in_order(length):
  for i in range(50):
    row = SyntheticTask('selective_copying').example(i, length, seed=1, split='train')
    context, asked = np.split(row['inputs'], [length - NUM_COPIED])
    data = context[context != NOISE]
    assert MARKER not in data and len(data) == NUM_COPIED
    assert (asked == MARKER).all()
    scored = row['loss_mask'] == 1
    assert (row['targets'][scored] == data).all()
    assert scored.sum() == row['loss_mask'].sum() == NUM_COPIED


@pytest.mark.parametrize('length', [3, 4, 64])
def test_induction_heads_ask_for_what_followed_the_marker(length):
  firsts = set()
  for i in range(50):
    row = SyntheticTask('induction_heads').example(i, length, seed=1, split='train')
    first, last = np.flatnonzero(row['inputs'] == MARKER)
    assert last == length - 1
    assert row['targets'][-1] == row['inputs'][first + 1]
    assert np.flatnonzero(row['loss_mask']).tolist() == [length - 1]
    firsts.add(int(first))
  assert firsts <= set(range(length - 2))
  assert len(firsts) > 1 or length == 3


@pytest.mark.parametrize('name', NAMES)
def test_examples_are_functions_of_seed_split_and_index(name):
  task = SyntheticTask(name)

  def example(index=3, seed=5, split='train'):
    return task.example(index, 64, seed=seed, split=split)

  chex.assert_trees_all_equal(example(), example())
  for other in (example(index=4), example(seed=6), example(split='valid'), example(5, 3)):
    assert (other['inputs'] != example()['inputs']).any()
  row = example()
  assert max(row['inputs'].max(), row['targets'].max()) < VOCAB_SIZE == task.vocab_size
  assert {name: (values.dtype.name, values.shape) for name, values in row.items()} == {
    'inputs': ('int32', (64,)),
    'targets': ('int32', (64,)),
    'segment_ids': ('int32', (64,)),
    'loss_mask': ('float32', (64,)),
  }


@pytest.mark.parametrize(('name', 'least'), [('selective_copying', 32), ('induction_heads', 3)])
def test_too_short_a_sequence_is_an_error(name, least):
  SyntheticTask(name).check_length(least)
  with pytest.raises(DataError, match=f'at least {least}; it is {least - 1}'):
    SyntheticTask(name).check_length(least - 1)
