"""Training batches: functions of (seed, step, row), complete in each epoch, mixed as weighed."""

import itertools
import threading

import chex
import numpy as np
import pytest

from ssm_moe.config import DataConfig
from ssm_moe.data import DataError
from ssm_moe.data.pipeline import TrainBatches
from ssm_moe.data.token_files import write_token_folder
from ssm_moe.data.tokenizer import ByteTokenizer

B, L = 4, 16


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Two folders whose bytes differ: lower-case letters in one, upper-case in the other."""
  random = np.random.default_rng(0)
  paths = {}
  for name, first, count in (('lower', 97, 60), ('upper', 65, 30)):
    texts = [
      bytes(random.integers(first, first + 26, size).tolist()).decode()
      for size in random.integers(0, 60, count)
    ]
    path = tmp_path_factory.mktemp('folders') / name
    write_token_folder(path, texts, ByteTokenizer(), source='test')
    paths[name] = str(path)
  return paths


@pytest.fixture(scope='module')
def make(folders, tmp_path_factory):
  cache = tmp_path_factory.mktemp('cache')

  def make(*names, seed=0, batch_size=B, sequence_length=L, rows=None, **changes):
    config = DataConfig(train=tuple(folders.get(name, name) for name in names), **changes)
    return TrainBatches(
      config,
      batch_size=batch_size,
      sequence_length=sequence_length,
      seed=seed,
      vocab_size=257,
      cache_dir=cache,
      rows=rows,
    )

  return make


SETTINGS = {
  'shuffled': dict(names=('lower',)),
  'carried': dict(names=('lower',), carry_state=True),
  'mixed': dict(names=('lower', 'upper', 'induction_heads'), weights=(3.0, 1.0, 2.0)),
}


def build(make, setting, **changes):
  values = dict(SETTINGS[setting]) | changes
  return make(*values.pop('names'), **values)


@pytest.mark.parametrize('setting', SETTINGS)
def test_a_batch_has_these_arrays(make, setting):
  batch = build(make, setting).batch(0)
  assert {name: (values.dtype.name, values.shape) for name, values in batch.items()} == {
    'inputs': ('int32', (B, L)),
    'targets': ('int32', (B, L)),
    'segment_ids': ('int32', (B, L)),
    'loss_mask': ('float32', (B, L)),
    'continues': ('bool', (B,)),
  }


@pytest.mark.parametrize('setting', SETTINGS)
def test_a_run_resumes_at_any_step(make, setting):
  first = build(make, setting)
  batches = [first.batch(step) for step in range(60)]  # more than an epoch
  again = build(make, setting)
  for step in (59, 7, 33):
    chex.assert_trees_all_equal(again.batch(step), batches[step])
  resumed = build(make, setting).iterate(first_step=31)
  for step, batch in zip(range(31, 40), resumed):
    chex.assert_trees_all_equal(batch, batches[step])
  resumed.close()


@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('count', [2, 4])
def test_processes_share_the_same_global_batch(make, setting, count):
  whole = build(make, setting)
  # In turn, not one after the other: a process of a TPU slice may hold any rows.
  parts = [build(make, setting, rows=range(i, B, count)) for i in range(count)]
  for step in (0, 5, 41):
    shares = [part.batch(step) for part in parts]
    for name, rows in whole.batch(step).items():
      joined = np.stack([share[name] for share in shares], axis=1).reshape(rows.shape)
      np.testing.assert_array_equal(joined, rows)


@pytest.mark.parametrize('setting', SETTINGS)
def test_another_seed_gives_other_batches(make, setting):
  orders = [
    np.stack([build(make, setting, seed=seed).batch(step)['targets'] for step in range(20)])
    for seed in (0, 1)
  ]
  assert (orders[0] != orders[1]).any()


def rows(batches, steps):
  return np.concatenate([batches.batch(step)['targets'] for step in steps])


def test_each_epoch_has_every_window_once_in_another_order(make):
  batches = make('lower', batch_size=1)
  (source,) = batches.sources
  count = source.folder.num_tokens // L
  assert batches.num_tokens_per_epoch == count * L < source.folder.num_tokens
  windows = source.folder.tokens[: count * L].reshape(count, L)
  epochs = [rows(batches, range(i * count, (i + 1) * count)) for i in range(3)]
  for epoch in epochs:
    assert sorted(epoch.tolist()) == sorted(windows.tolist())
  for one, other in itertools.combinations([*epochs, windows], 2):
    assert (one != other).any()
  # The next seed's epochs are not this one's epochs moved by one.
  following = rows(make('lower', batch_size=1, seed=1), range(count))
  assert all((following != epoch).any() for epoch in epochs)


@pytest.mark.parametrize(
  ('weights', 'share'),
  [((3.0, 1.0), 0.75), ((1.0, 4.0), 0.2), ((0.5, 0.5), 0.5), ((999.0, 1.0), 0.999)],
)
def test_sources_are_mixed_by_weight(make, weights, share):
  lower = rows(make('lower', 'upper', weights=weights), range(250)) >= 97
  from_lower = (lower & (rows(make('lower', 'upper', weights=weights), range(250)) < 256)).any(1)
  assert abs(from_lower.mean() - share) <= 1 / 1000


def test_without_weights_sources_are_mixed_by_their_tokens(make):
  batches = make('lower', 'upper')
  sizes = [source.folder.num_tokens for source in batches.sources]
  targets = rows(batches, range(250))
  from_lower = ((targets >= 97) & (targets < 256)).any(axis=1)
  assert abs(from_lower.mean() - sizes[0] / sum(sizes)) <= 5 / 1000
  # A mixture runs through the windows of each source as if it were alone.
  alone = rows(make('lower', batch_size=1), range(20))
  assert targets[from_lower][:20].tolist() == alone.tolist()


def test_carried_rows_continue_the_documents_of_the_rows_before(make):
  batches = make('lower', carry_state=True)
  steps = batches.num_tokens_per_epoch // (B * L)
  assert steps == batches.sources[0].folder.num_tokens // (B * L) > 3
  before = None
  continued = 0
  for step in range(2 * steps):
    batch = batches.batch(step)
    if step % steps == 0:
      assert not batch['continues'].any()
    else:
      assert (batch['inputs'][:, 0] == before['targets'][:, -1]).all()
      assert (batch['continues'] == (before['targets'][:, -1] != 256)).all()
      continued += batch['continues'].sum()
    before = batch
  assert continued > 0
  assert not any(make('lower').batch(step)['continues'].any() for step in range(steps))


def test_the_reader_raises_its_errors_and_ends_when_closed(make):
  def readers():
    return [t for t in threading.enumerate() if t.name.startswith('train_batches')]

  batches = make('lower')
  iterator = batches.iterate()
  next(iterator)
  assert readers()
  iterator.close()
  assert not readers()

  def fail(step):
    raise OSError(f'disk gone at step {step}')

  batches.batch = fail
  with pytest.raises(OSError, match='disk gone at step 3'):
    next(batches.iterate(3))
  assert not readers()


def test_reading_ahead_is_bounded(make):
  batches = make('lower', prefetch=3)
  asked = []
  batch = batches.batch
  batches.batch = lambda step: asked.append(step) or batch(step)
  iterator = batches.iterate(10)
  next(iterator)
  next(iterator)
  iterator.close()
  assert asked[:2] == [10, 11] and set(asked) <= set(range(10, 15))


def test_banner_and_tokenizer(make):
  batches = make('lower', 'induction_heads', weights=(1.0, 3.0))
  lines = batches.describe().splitlines()
  assert len(lines) == 2
  assert '60 documents' in lines[0] and 'weight 0.250' in lines[0] and 'weight 0.750' in lines[1]
  assert batches.tokenizer.decode(batches.tokenizer.encode('def f')) == 'def f'
  synthetic = make('selective_copying', sequence_length=64)
  assert synthetic.tokenizer is None and synthetic.num_tokens_per_epoch is None


@pytest.mark.parametrize(
  ('arguments', 'reason'),
  [
    (dict(names=['upper'], sequence_length=10_000), r'upper has \d+ tokens; sequence_length is'),
    (dict(names=['upper'], batch_size=500, carry_state=True), 'it must have batch_size'),
    (dict(names=['induction_heads'], carry_state=True), 'induction_heads has none'),
    (dict(names=['selective_copying']), 'at least 32; it is 16'),
    (dict(names=['upper', 'induction_heads']), 'weights is empty'),
  ],
)
def test_contradictions_are_refused_in_one_line(make, arguments, reason):
  with pytest.raises(DataError, match=reason) as caught:
    make(*arguments.pop('names'), **arguments)
  assert '\n' not in str(caught.value)
