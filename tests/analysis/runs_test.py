"""Runs that differ in their seed only are one entry; what cannot be compared is said."""

import dataclasses

import pytest

from ssm_moe.analysis import runs
from ssm_moe.config import DataConfig, ExperimentConfig, ModelConfig, SampleConfig, TrainConfig
from ssm_moe.errors import UserError


def run(folder, *, last=10, data=None, model=None, sample=None, **train):
  config = ExperimentConfig(
    data=DataConfig(**(data or {})),
    model=ModelConfig(**(model or {})),
    sample=SampleConfig(**(sample or {})),
    train=TrainConfig(**{'num_steps': last, **train}),
  )
  return runs.Run(folder=folder, config=config, rows=[{'step': last}])


def grouped(*members):
  return {
    entry.name: [r.folder for r in entry.runs]
    for entry in runs.group([m if isinstance(m, tuple) else (None, m) for m in members])
  }


def test_seeds_are_one_entry_in_the_order_of_its_first_run():
  found = grouped(
    run('runs/moe_seed1', seed=1),
    run('runs/dense', model={'d_model': 64}),
    run('runs/moe_seed0', seed=0, data={'cache_dir': 'elsewhere'}, sample={'prompt': 'x'}),
  )
  assert found == {'moe': ['runs/moe_seed1', 'runs/moe_seed0'], 'dense': ['runs/dense']}
  assert list(found) == ['moe', 'dense']


@pytest.mark.parametrize(
  'changes',
  [
    {'num_steps': 7},
    {'batch_size': 8},
    {'data': {'train': ('other.txt',)}},
    {'model': {'dtype': 'bfloat16'}},
  ],
)
def test_all_that_may_change_a_loss_or_a_time_makes_another_entry(changes):
  assert len(grouped(run('a'), run('b', **changes))) == 2


def test_a_name_keeps_runs_apart_and_puts_them_together():
  found = grouped(('here', run('a')), ('there', run('b')), ('here', run('c', seed=1)), run('d'))
  assert found == {'here': ['a', 'c'], 'there': ['b'], 'd': ['d']}
  with pytest.raises(
    UserError, match=r'^x: a and b differ in config\.model\.d_model; .*seed only$'
  ):
    grouped(('x', run('a')), ('x', run('b', model={'d_model': 64})))


@pytest.mark.parametrize(
  ('folders', 'name'),
  [
    (['runs/moe_16'], 'moe_16'),
    (['runs/moe_seed0/'], 'moe_seed0'),
    (['moe_16_seed0', 'moe_16_seed1'], 'moe_16'),
    (['moe_16_seed10', 'moe_16_seed11'], 'moe_16'),
    (['moe_16-s=0', 'moe_16-s=1'], 'moe_16'),
    (['experts0', 'experts1'], 'experts'),
    (['rom', 'rom_2'], 'rom'),
    (['runs/rom/0', 'runs/rom/1'], 'rom'),
    (['runs/rom/seed0', 'runs/rom/seed1'], 'rom'),
  ],
)
def test_an_entry_is_called_after_what_its_folders_share(folders, name):
  assert list(grouped(*(run(folder, seed=i) for i, folder in enumerate(folders)))) == [name]


def test_entries_of_equal_names_are_called_after_their_folders():
  found = grouped(run('a/moe'), run('b/moe', model={'d_model': 64}))
  assert list(found) == ['a/moe', 'b/moe']


def warned(one, other, loss='valid'):
  entries = runs.group([('baseline', one), ('other', other)])
  return runs.warnings(entries[1], entries[0], loss)


@pytest.mark.parametrize(
  ('changes', 'field', 'train_too'),
  [
    ({'data': {'train': ('other.txt',)}}, 'data.train', True),
    ({'data': {'tokenizer': 'tokenizer.json'}}, 'data.tokenizer', True),
    ({'model': {'vocab_size': 300}}, 'model.vocab_size', True),
    ({'sequence_length': 64}, 'train.sequence_length', True),
    ({'data': {'valid': ('other.txt',)}}, 'data.valid', False),
    ({'eval_tokens': 100}, 'train.eval_tokens', False),
  ],
)
def test_losses_of_different_things_are_warned_of(changes, field, train_too):
  message = warned(run('a'), run('b', **changes))
  assert len(message) == 1
  assert message[0].startswith(f'config.{field} is ')
  assert len(warned(run('a'), run('b', **changes), 'train')) == int(train_too)


def test_comparable_runs_raise_no_warning():
  assert warned(run('a'), run('b', seed=1, model={'d_model': 64}, batch_size=8)) == []


def test_equal_seeds_and_unequal_lengths_are_warned_of():
  entry = runs.Entry('x', (run('a'), dataclasses.replace(run('b'), rows=[{'step': 5}])))
  seeds, unfinished, lengths = runs.warnings(entry, entry, 'valid')
  assert unfinished.startswith('b is not finished: 5 of 10 steps')
  assert seeds == 'x has runs of the same seed: [0, 0]'
  assert lengths.endswith('compared up to the shortest: a 10 steps, b 5 steps')
