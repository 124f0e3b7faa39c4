"""The script finds runs, groups them, and answers with a table, JSON or one line."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from absl import flags

from ssm_moe import config as config_lib
from ssm_moe.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def _module():
  spec = importlib.util.spec_from_file_location('compare', ROOT / 'experiments' / 'compare.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  # Another script in the same process may define flags of the same names.
  for name in ('format', 'loss', 'output', 'plot'):
    delattr(flags.FLAGS, name)
  return module


compare = _module()


def write_run(folder, *, speed=1.0, seed=0, evaluations=True, last=400, tail='', **model):
  folder.mkdir(parents=True)
  config = config_lib.ExperimentConfig(
    model=config_lib.ModelConfig(**model), train=config_lib.TrainConfig(seed=seed, num_steps=400)
  )
  (folder / 'config.json').write_text(json.dumps(config_lib.to_dict(config)))
  with (folder / 'metrics.jsonl').open('w') as file:
    for step in range(10, last + 1, 10):
      row = {'step': step, 'tokens': 512 * step, 'flops': 1e9 * step, 'seconds': 0.5 * step}
      loss = 1 + 4 * (speed * step) ** -0.3 + 0.001 * seed
      rows = [row | {'train_loss': loss}]
      if evaluations:
        rows.append(row | {'valid_loss': loss, 'valid_bits_per_byte': loss / np.log(2)})
      file.writelines(json.dumps(row) + '\n' for row in rows)
    file.write(tail)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  write_run(folder / 'dense_seed0', tail='{"step": 410, "tok')  # cut short by a kill
  write_run(folder / 'dense_seed1', seed=1)
  write_run(folder / 'moe', speed=2.0, pattern='M E', num_periods=2)
  write_run(folder / 'slow', speed=0.5, d_model=64)
  write_run(folder / 'unevaluated', d_model=32, evaluations=False)
  write_run(folder / 'short', d_model=48, last=200)
  write_run(folder / 'other_vocabulary', vocab_size=300)
  (folder / 'notes.txt').write_text('not a run')
  for name, file in (('no_metrics', 'metrics.jsonl'), ('no_config', 'config.json')):
    write_run(folder / name)
    (folder / name / file).unlink()
  for name, text in (('bad_json', '{"model": '), ('list', '[]'), ('newer', '{"model": {"x": 1}}')):
    write_run(folder / name)
    (folder / name / 'config.json').write_text(text)
  write_run(folder / 'older')
  (folder / 'older' / 'config.json').write_text('{"model": {"d_model": 64}}')
  return folder


def run_script(folder, *arguments):
  return subprocess.run(
    [sys.executable, str(ROOT / 'experiments' / 'compare.py'), *arguments],
    cwd=folder,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_markdown_with_seeds_and_a_plot(runs, tmp_path):
  plot = tmp_path / 'new' / 'compare.png'
  result = run_script(runs, 'dense_seed0', 'dense_seed1', 'moe', 'slow', f'--plot={plot}')
  assert (result.returncode, result.stderr) == (0, '')
  lines = result.stdout.splitlines()
  cells = [[cell.strip() for cell in line[1:-1].split('|')] for line in lines[:5]]
  assert [row[0] for row in cells[2:]] == ['dense', 'moe', 'slow']
  assert [row[1] for row in cells[2:]] == ['2', '1', '1']
  steps = cells[0].index('Speed-up in steps')
  factors = [row[steps].split(' ')[0] for row in cells[2:]]
  # The mean of the baseline's seeds lies 0.0005 above the power law: 0.3 % of the steps.
  assert factors[::2] == ['1.00', '-'] and 1.99 <= float(factors[1]) <= 2.01
  assert any(line.startswith('- slow: never reached valid loss') for line in lines)
  assert matplotlib.image.imread(plot).shape[1] > 1000


def test_json_to_a_file_with_warnings_on_standard_error(runs, tmp_path):
  output = tmp_path / 'new' / 'compare.json'
  result = run_script(
    runs, 'a=dense*', 'other_vocabulary', 'short', '--format=json', f'--output={output}'
  )
  assert (result.returncode, result.stdout) == (0, '')
  report = json.loads(output.read_text())
  assert [entry['name'] for entry in report['entries']] == ['a', 'other_vocabulary', 'short']
  assert result.stderr.splitlines() == [f'warning: {text}' for text in report['warnings']]
  vocabulary, unfinished, tokens = report['warnings']
  assert unfinished.startswith('short is not finished: 200 of 400 steps')
  assert vocabulary.startswith('config.model.vocab_size is 300 in other_vocabulary and 257 in')
  assert tokens.endswith('a 204,800, other_vocabulary 204,800, short 102,400')
  assert [run['folder'] for run in report['entries'][0]['runs']] == ['dense_seed0', 'dense_seed1']


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'no RUN is given; name at least one'),
    (['dense_seed0', 'absent'], 'absent: there is no such folder; a RUN is a folder that'),
    (['dense_seed0', '--output=moe'], '--output=moe is there already; give another name'),
    (['dense_seed0', '--plot=x.jpg'], '--plot=x.jpg: the name must end in .png'),
    (['dense_seed0', 'moe='], 'moe=: it must be NAME=RUN, with something on both sides'),
  ],
)
def test_a_mistake_is_one_line(runs, arguments, message):
  result = run_script(runs, *arguments)
  assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
  assert result.stderr.startswith(f'compare.py: {message}')


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('no_metrics', r'no_metrics: has no metrics\.jsonl; a RUN is a folder that train\.py wrote$'),
    ('no_config', r'no_config: has no config\.json; a RUN is a folder that train\.py wrote$'),
    ('notes.txt', r'notes\.txt: there is no such folder'),
    ('bad_json', r'bad_json/config\.json: Expecting value'),
    ('list', r'list/config\.json: holds no config$'),
    ('newer', r'newer/config\.json: config\.model\.x does not exist; below ModelConfig'),
  ],
)
def test_what_is_no_run_is_named(runs, name, message):
  with pytest.raises(UserError, match=message):
    compare.read_run(str(runs / name))


def test_fields_that_an_older_config_lacks_take_their_defaults(runs):
  run = compare.read_run(str(runs / 'older'))
  assert run.config.model == config_lib.ModelConfig(d_model=64)
  assert len(run.rows) == 80


def test_a_line_cut_short_is_left_out(runs):
  assert len(compare.read_run(str(runs / 'dense_seed0')).rows) == 80


def test_runs_are_found_by_path_glob_and_name(runs, monkeypatch):
  monkeypatch.chdir(runs)
  (runs / 'rate=3').mkdir()
  found = list(compare.find_runs(['x=dense*', 'y=moe', 'rate=3', './moe', 'dense_seed?', 'n*']))
  assert found == [
    ('x', 'dense_seed0'),
    ('x', 'dense_seed1'),
    ('y', 'moe'),
    (None, 'rate=3'),
    # Those that have a name already are not taken again, and files are no runs.
    (None, 'newer'),
    (None, 'no_config'),
    (None, 'no_metrics'),
  ]
  # Baseline first, then all: each once.
  found = [folder for _, folder in compare.find_runs(['moe', '[dm]*'])]
  assert found == ['moe', 'dense_seed0', 'dense_seed1']
  # Two names for one run are two entries.
  assert len(list(compare.find_runs(['a=moe', 'b=moe', 'a=moe/']))) == 2


@pytest.mark.parametrize(
  ('argument', 'message'),
  [('z*', 'z.: fits no folder'), ('x=z*', 'z.: fits no folder'), ('=moe', 'it must be NAME=RUN')],
)
def test_arguments_that_name_nothing_are_refused(runs, monkeypatch, argument, message):
  monkeypatch.chdir(runs)
  with pytest.raises(UserError, match=message):
    list(compare.find_runs([argument]))
