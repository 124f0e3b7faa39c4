"""A trace is of the steps that were asked for, or of those of them that are left."""

import gzip
import json

import pytest

from ssm_moe.errors import UserError
from ssm_moe.training import loop, profile
from tests.training import small_run


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return small_run.write_text(tmp_path_factory.mktemp('text'))


class TestParse:
  def test_half_open_and_counted_from_one(self):
    assert list(profile.parse_steps('10:15', 100)) == [10, 11, 12, 13, 14]
    assert list(profile.parse_steps('1:2', 1)) == [1]
    assert list(profile.parse_steps(None, 100)) == []

  @pytest.mark.parametrize(
    ('text', 'match'),
    [
      ('10', 'must be START:STOP, two numbers'),
      ('', 'two numbers'),
      ('a:b', 'two numbers'),
      ('1:2:3', 'two numbers'),
      ('-1:3', 'two numbers'),
      ('1.5:3', 'two numbers'),
      ('0:3', 'the first step is 1'),
      ('5:5', 'no step is in it'),
      ('7:5', 'no step is in it'),
      ('5:102', 'the run has 100 steps, so STOP may be at most 101'),
    ],
  )
  def test_what_is_no_range(self, text, match):
    with pytest.raises(UserError, match=f'^--profile_steps={text}: .*{match}') as error:
      profile.parse_steps(text, 100)
    assert '\n' not in str(error.value) and error.value.exit_status == 2


def _run(config, workdir, profile_steps=None):
  with small_run.devices(config):
    return loop.train_and_evaluate(config, workdir, profile_steps=profile_steps)


def _traced_steps(workdir):
  """The steps that are marked in the traces of a run."""
  steps = []
  for path in (workdir / 'profile').glob('plugins/profile/*/*.trace.json.gz'):
    for event in json.loads(gzip.decompress(path.read_bytes()))['traceEvents']:
      if event.get('name') == 'train' and 'step_num' in event.get('args', {}):
        steps.append(int(event['args']['step_num']))
  return sorted(steps)


class TestRun:
  @pytest.mark.slow
  def test_the_steps_asked_for_and_no_other_and_the_run_is_as_without(self, text, tmp_path, capfd):
    config = small_run.make_config(text)
    _run(config, tmp_path / 'plain')
    _run(config, tmp_path / 'run', profile_steps='4:7')
    assert _traced_steps(tmp_path / 'run') == [4, 5, 6]
    assert len(list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))) == 1
    assert f'profile  of steps 4 to 6 is in {tmp_path}/run/profile\n' in capfd.readouterr().err
    assert small_run.rows(tmp_path / 'run') == small_run.rows(tmp_path / 'plain')
    assert not (tmp_path / 'plain' / 'profile').exists()

  @pytest.mark.slow
  def test_on_resume_the_steps_that_are_left(self, text, tmp_path, capfd):
    config = small_run.make_config(text, num_steps=3)
    _run(config, tmp_path)
    longer = small_run.make_config(text)
    _run(longer, tmp_path, profile_steps='2:6')
    assert _traced_steps(tmp_path) == [4, 5]
    assert 'profile  of steps 4 to 5 is in' in capfd.readouterr().err
    _run(longer, tmp_path, profile_steps='2:6')
    assert _traced_steps(tmp_path) == [4, 5]
    assert 'profile  steps 2 to 5 are done already' in capfd.readouterr().err

  @pytest.mark.slow
  def test_a_run_that_ends_early_leaves_what_it_has_traced(
    self, text, tmp_path, monkeypatch, capfd
  ):
    original = loop.MetricsLogger.write

    def write(self, row, **loads):
      original(self, row, **loads)
      if row['step'] == 4:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(loop.MetricsLogger, 'write', write)
    with pytest.raises(OSError, match='No space'):
      _run(small_run.make_config(text), tmp_path, profile_steps='2:7')
    assert _traced_steps(tmp_path)[:3] == [2, 3, 4]
    assert 'profile  of steps 2 to ' in capfd.readouterr().err
    monkeypatch.undo()
    # Nothing is left open: the next run can trace.
    _run(small_run.make_config(text), tmp_path / 'next', profile_steps='1:2')
    assert _traced_steps(tmp_path / 'next') == [1]

  def test_a_mistake_touches_nothing(self, text, tmp_path):
    config = small_run.make_config(text)
    for steps, match in (('1:9', 'the run has 7 steps'), ('x', 'two numbers')):
      with pytest.raises(UserError, match=match):
        _run(config, tmp_path / 'run', profile_steps=steps)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'profile').write_text('mine')
    with pytest.raises(UserError, match='the trace cannot be written'):
      _run(config, tmp_path / 'run', profile_steps='1:2')
    assert (tmp_path / 'run' / 'profile').read_text() == 'mine'
