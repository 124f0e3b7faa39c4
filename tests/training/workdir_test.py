"""A folder is one process's at a time, and what is in it of others is not touched."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from ssm_moe.config import ExperimentConfig, TrainConfig
from ssm_moe.errors import UserError
from ssm_moe.training import workdir as workdir_lib
from tests.training import full_disk, small_run

CONFIG = ExperimentConfig(train=TrainConfig(num_steps=50, checkpoint_every=20))


def _refused(workdir, match):
  """Asserts that the folder is refused in one line and stays as it is."""
  before = small_run.snapshot(workdir)
  with pytest.raises(UserError, match=match) as error, workdir_lib.held(workdir):
    pass
  assert '\n' not in str(error.value) and str(workdir) in str(error.value)
  assert error.value.exit_status == 2
  assert small_run.snapshot(workdir) == before


class TestHeld:
  def test_what_stays_empty_is_removed(self, tmp_path):
    workdir = tmp_path / 'runs' / 'one'
    for _ in range(2):
      with pytest.raises(KeyError), workdir_lib.held(workdir):
        assert (workdir / 'lock').read_text() == f'{os.getpid()}\n'
        raise KeyError
      assert list(tmp_path.iterdir()) == []

  def test_what_is_written_stays(self, tmp_path):
    workdir = tmp_path / 'runs' / 'one'
    for _ in range(2):
      with workdir_lib.held(workdir):
        (workdir / 'mine').touch()
      assert [path.name for path in workdir.iterdir()] == ['mine']

  def test_another_holder_is_named_and_not_disturbed(self, tmp_path):
    with workdir_lib.held(tmp_path):
      _refused(tmp_path, rf'another process \({os.getpid()}\) is training in')
    with workdir_lib.held(tmp_path):
      pass

  def test_a_kill_frees_it(self, tmp_path):
    program = (
      'import pathlib, sys\n'
      'from ssm_moe.training import workdir\n'
      'with workdir.held(pathlib.Path(sys.argv[1])):\n'
      '  print("held", flush=True)\n'
      '  sys.stdin.read()\n'
    )
    child = subprocess.Popen(
      [sys.executable, '-c', program, str(tmp_path)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    try:
      assert child.stdout.readline() == 'held\n'
      _refused(tmp_path, rf'another process \({child.pid}\)')
    finally:
      child.send_signal(signal.SIGKILL)
      child.communicate()
    assert (tmp_path / 'lock').exists()
    with workdir_lib.held(tmp_path):
      assert (tmp_path / 'lock').read_text() == f'{os.getpid()}\n'

  def test_a_lock_removed_by_its_last_holder_is_not_taken_for_the_lock(self, tmp_path, monkeypatch):
    # Another process ends between the opening of the file and the locking of it.
    lock = workdir_lib.fcntl.flock

    def remove_and_lock(descriptor, kind):
      monkeypatch.undo()
      (tmp_path / 'lock').unlink()
      lock(descriptor, kind)

    monkeypatch.setattr(workdir_lib.fcntl, 'flock', remove_and_lock)
    with workdir_lib.held(tmp_path):
      _refused(tmp_path, 'another process')

  @pytest.mark.parametrize('name', ['checkpoints', 'tensorboard'])
  def test_a_file_in_place_of_a_folder(self, tmp_path, name):
    (tmp_path / name).write_text('mine')
    _refused(tmp_path, f'{name}: not a folder')

  @pytest.mark.parametrize('name', ['config.json', 'metrics.jsonl'])
  def test_a_folder_in_place_of_a_file(self, tmp_path, name):
    (tmp_path / name).mkdir()
    _refused(tmp_path, f'{name}: not a file')

  def test_a_lock_that_is_not_ours(self, tmp_path):
    (tmp_path / 'lock').write_text('the key is under the mat')
    _refused(tmp_path, 'lock is there and of no run')

  def test_a_path_through_a_file(self, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'cannot be written \(Not a directory\)'):
      workdir_lib.held(tmp_path / 'file' / 'x').__enter__()

  def test_a_full_disk(self, tmp_path):
    with full_disk.beyond(0):
      _refused(tmp_path, r'cannot be written \(File too large\)')


@pytest.mark.parametrize('name', ['config.json', 'metrics.jsonl', 'loss.png', 'expert_load.png'])
def test_a_file_of_another_program_is_not_written_over(tmp_path, name):
  (tmp_path / name).write_text('{"step": 1}\n')
  with pytest.raises(UserError, match=f'{name} is there and of no run') as error:
    workdir_lib.check_own(tmp_path)
  assert '\n' not in str(error.value)


def test_a_folder_that_is_free_or_of_a_run_may_be_used(tmp_path):
  workdir_lib.check_own(tmp_path)
  (tmp_path / 'notes.txt').touch()
  workdir_lib.check_own(tmp_path)
  workdir_lib.write_config(tmp_path, CONFIG)
  (tmp_path / 'loss.png').touch()
  workdir_lib.check_own(tmp_path)


class TestSetAside:
  def write(self, workdir, last_step, config=CONFIG):
    workdir_lib.write_config(workdir, config)
    rows = [json.dumps({'step': step}) + '\n' for step in range(1, last_step + 1)]
    (workdir / 'metrics.jsonl').write_text(''.join(rows))

  @pytest.mark.parametrize('last_step', [0, 19])
  def test_a_run_without_its_first_checkpoint_is_not_kept(self, tmp_path, last_step):
    self.write(tmp_path, last_step)
    before = small_run.snapshot(tmp_path)
    assert workdir_lib.set_aside(tmp_path) == []
    assert small_run.snapshot(tmp_path) == before

  def test_a_run_that_must_have_had_a_checkpoint_is_kept_each_time(self, tmp_path):
    short = dataclasses.replace(CONFIG, train=TrainConfig(num_steps=5, checkpoint_every=20))
    for last_step, config, suffix in ((20, CONFIG, '.old'), (5, short, '.old2')):
      self.write(tmp_path, last_step, config)
      written = small_run.snapshot(tmp_path)
      (line,) = workdir_lib.set_aside(tmp_path)
      assert f'up to step {last_step}' in line and f'metrics.jsonl{suffix}' in line
      after = small_run.snapshot(tmp_path)
      for path in tmp_path.iterdir():
        name = path.relative_to(tmp_path)
        if path.name.endswith(suffix):
          before = written[name.with_name(path.name.removesuffix(suffix))]
        else:
          before = written[name]
        assert after[name] == before
      assert {'config.json' + suffix, 'metrics.jsonl' + suffix} <= {p.name for p in after}
      assert not {'config.json', 'metrics.jsonl'} & {p.name for p in after}
