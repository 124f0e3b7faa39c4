"""A save that fails says so in one line; one that a kill cuts short loses itself only."""

import gc
import logging as python_logging
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from jax.sharding import SingleDeviceSharding

from ssm_moe.training import manifest as manifest_lib
from ssm_moe.training.checkpoint import SaveError
from tests.training import full_disk
from tests.training.small_state import make, save_steps, small_state, template_of


class TestFailure:
  def test_a_failure_in_the_background_surfaces_once(self, tmp_path, monkeypatch):
    def fail(*_, **__):
      raise OSError('no space left')

    with make(tmp_path) as checkpointer:
      save_steps(checkpointer, [1])
      for owner, name in [
        (ocp.PyTreeCheckpointHandler, 'finalize'),  # in the thread of Orbax
        (manifest_lib, 'list_files'),  # in the thread that publishes
      ]:
        for surface in (
          checkpointer.wait,
          lambda: checkpointer.save(3, small_state(), metadata={}),
        ):
          with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            checkpointer.save(2, small_state(), metadata={})
            with pytest.raises(SaveError, match=r'00000002: .*no space left') as error:
              surface()
            assert isinstance(error.value.__cause__, OSError)
          checkpointer.wait()
          assert checkpointer.steps() == [1]
      save_steps(checkpointer, [4])
      assert checkpointer.steps() == [1, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['00000001', '00000004']

  def test_a_full_disk_is_one_line_and_gets_its_room_back(self, tmp_path, rng, capfd, caplog):
    big = {'kernel': jax.random.normal(rng, (200, 200)), 'step': jnp.int32(2)}
    with make(tmp_path) as checkpointer:
      save_steps(checkpointer, [1])
      with full_disk.beyond(50_000), pytest.raises(SaveError) as error:
        checkpointer.save(2, big, metadata={})
        checkpointer.wait()
      assert str(error.value) == (
        f'{tmp_path / "00000002"}: the checkpoint cannot be saved: File too large'
      )
      assert error.value.exit_status == 1
      gc.collect()  # what Orbax has given up reports then
      # On a busy machine its threads may still be about to write when the save has failed.
      deadline = time.monotonic() + 10
      while (left := [path.name for path in tmp_path.iterdir()]) != ['00000001']:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
      checkpointer.save(2, big, metadata={})
      assert checkpointer.restore(template_of(big)).step == 2
    assert 'Traceback' not in capfd.readouterr().err
    assert not [record for record in caplog.records if record.levelno >= python_logging.ERROR]

  def test_arrays_that_orbax_has_lost_are_not_published(self, tmp_path):
    with make(tmp_path) as checkpointer:
      save_steps(checkpointer, [1])
      # Where Orbax does not find its own files by pattern, it writes no index of the arrays.
      checkpointer._directory = tmp_path / 'lr[3]'
      checkpointer.save(2, small_state(), metadata={})
      with pytest.raises(SaveError, match='Orbax did not write params/kernel'):
        checkpointer.wait()
      assert checkpointer.steps() == []

  def test_only_what_a_save_has_left_is_removed(self, tmp_path):
    for name in ('mine.unfinished', '00000003.unfinished', '00000004.removed', '00000005.mine'):
      (tmp_path / name).mkdir()
    with make(tmp_path) as checkpointer:
      save_steps(checkpointer, [6])
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ['00000005.mine', '00000006', 'mine.unfinished']

  # Runs in a child: saves step 1, and dies at a given point of the save of step 2.
  CHILD = textwrap.dedent("""
    import os, pathlib, shutil, signal, sys
    import jax, jax.numpy as jnp
    jax.config.update('jax_platforms', 'cpu')
    from ssm_moe.training import checkpoint, manifest

    directory, stage = sys.argv[1:]
    def state(step):
      return {'params': {'kernel': jnp.arange(2.0**20) + step}, 'step': jnp.int32(step)}
    checkpointer = checkpoint.Checkpointer(directory, config={}, keep_last=1)
    checkpointer.save(1, state(1), metadata={}, valid_loss=1.0)
    checkpointer.wait()
    print('saved 1', flush=True)

    def die(*_, **__):
      os.kill(os.getpid(), signal.SIGKILL)
    if stage == 'orbax':
      checkpointer.save(2, state(2), metadata={})
      die()
    if stage == 'hashing': manifest.list_files = die
    if stage == 'manifest': manifest.write = die
    if stage == 'publishing': pathlib.Path.rename = die
    if stage == 'removing': shutil.rmtree = die
    if stage != 'any':
      checkpointer.save(2, state(2), metadata={}, valid_loss=0.5)
      checkpointer.wait()
    for step in range(2, 1000):
      checkpointer.save(step, state(step), metadata={})
      if step > 2: print('saved', step - 1, flush=True)
  """)

  def template(self):
    state = {'params': {'kernel': jnp.zeros(2**20)}, 'step': jnp.int32(0)}
    return template_of(state, SingleDeviceSharding(jax.devices()[0]))

  @pytest.mark.parametrize('stage', ['orbax', 'hashing', 'manifest', 'publishing', 'removing'])
  def test_kill_in_a_save_leaves_the_former_one(self, tmp_path, stage):
    child = subprocess.run(
      [sys.executable, '-c', self.CHILD, str(tmp_path), stage], capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    survivor = 2 if stage == 'removing' else 1
    assert any(not path.name.isdigit() for path in tmp_path.iterdir())  # something was cut short
    with make(tmp_path, keep_last=1, config={}) as checkpointer:
      assert checkpointer.steps() == [survivor]
      restored = checkpointer.restore(self.template())
      assert (restored.step, restored.skipped) == (survivor, [])
      assert int(restored.state['step']) == survivor
      assert restored.state['params']['kernel'][0] == survivor
      checkpointer.save(2, restored.state, metadata={}, valid_loss=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['00000002']

  def test_kill_at_any_moment_loses_at_most_the_save_under_way(self, tmp_path):
    child = subprocess.Popen(
      [sys.executable, '-c', self.CHILD, str(tmp_path), 'any'], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == 'saved 1\n'
    time.sleep(random.Random().uniform(0.1, 1.0))
    child.kill()
    announced = [1, *(int(line.split()[1]) for line in child.stdout if line.endswith('\n'))]
    child.wait()
    with make(tmp_path, config={}) as checkpointer:
      restored = checkpointer.restore(self.template())
    assert announced[-1] <= restored.step <= announced[-1] + 2
    assert int(restored.state['step']) == restored.step
    assert restored.skipped == []
