"""Several processes do what one does: the same rows, the same losses, one report, one end."""

import contextlib
import dataclasses
import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ssm_moe import sharding
from ssm_moe.config import MeshConfig, from_config_dict
from ssm_moe.errors import UserError
from ssm_moe.training import distributed, loop
from ssm_moe.training.signals import StopSignals
from tests import tolerances, tpu
from tests.training import small_run

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 20
NAMED = distributed.Processes(None, 'host:1234', 2, 1)


class TestFlags:
  def test_named_processes(self):
    assert distributed.check(NAMED)
    assert not distributed.check(distributed.Processes())
    assert not distributed.check(distributed.Processes(distributed=True))

  @pytest.mark.parametrize(
    ('change', 'match'),
    [
      ({'process_id': None}, '^--process_id must be given too'),
      (
        {'coordinator_address': None, 'num_processes': None},
        '^--coordinator_address and --num_processes must be given too',
      ),
      ({'coordinator_address': 'host'}, '=host: it must be HOST:PORT'),
      ({'coordinator_address': 'http://host:1'}, 'it must be HOST:PORT'),
      ({'num_processes': 0}, 'at least 1'),
      ({'process_id': 2}, '=2: it must be from 0 to 1'),
      ({'process_id': -1}, '=-1: it must be from 0 to 1'),
      ({'distributed': False}, 'contradict'),
    ],
  )
  def test_what_cannot_be_meant(self, change, match):
    with pytest.raises(UserError, match=match) as error:
      distributed.check(NAMED._replace(**change))
    assert '\n' not in str(error.value) and error.value.exit_status == 2

  def test_a_heartbeat_that_cannot_be(self):
    with pytest.raises(UserError, match=r'^--heartbeat_seconds=0: it must be at least 1'):
      distributed.initialize(NAMED, {}, heartbeat_seconds=0)

  @pytest.mark.parametrize(
    ('environment', 'several'),
    [
      ({}, False),
      # srun with four tasks; a shell in a job of four tasks, alone in its step; no step at all.
      ({'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '3'}, True),
      ({'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'}, False),
      ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, False),
      ({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '0'}, True),
      ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, False),
      ({'TPU_PROCESS_ADDRESSES': 'local', 'TPU_WORKER_HOSTNAMES': 'a,b'}, False),
      ({'MEGASCALE_NUM_SLICES': '2', 'TPU_WORKER_HOSTNAMES': 'a'}, True),
    ],
  )
  def test_environments(self, environment, several):
    assert distributed.detect(environment) is several

  def test_where_nobody_listens_nobody_is_waited_for_without_end(self):
    for address, match in (
      (_free_address(), r'process 0 does not answer there \(.*refused'),
      ('localhost:99999', 'process 0 does not answer there'),
      ('no-such-host.invalid:1', 'no-such-host.invalid:1: '),
    ):
      with pytest.raises(UserError, match=match) as error:
        distributed._wait_for_first(address, seconds=0.0)
      assert '\n' not in str(error.value) and error.value.exit_status == 2

  def test_one_process_stays_alone(self):
    distributed.initialize(distributed.Processes(), {}, heartbeat_seconds=45)
    distributed.initialize(
      distributed.Processes(distributed=False),
      {'TPU_WORKER_HOSTNAMES': 'a,b'},
      heartbeat_seconds=45,
    )
    assert not jax.distributed.is_initialized()


class TestAlone:
  def test_nothing_is_between_the_caller_and_its_errors(self):
    assert distributed.on_first(lambda: {1: object}) == {1: object}  # no detour over JSON
    for error in (UserError('x'), OSError(28, 'full'), KeyError('bug')):
      for block in (distributed.agreed(), contextlib.nullcontext()):
        with pytest.raises(type(error)) as caught, block:
          raise error
        assert caught.value is error
    distributed.check_same(anything='x')
    assert distributed.is_first()

  def test_a_signal_is_the_answer_at_once_and_for_good(self):
    signals = StopSignals()
    vote = distributed.StopVote(signals)
    assert vote.poll() is None
    signals.requested = 'SIGTERM'
    assert vote.poll() == 'SIGTERM'
    signals.requested = None
    assert vote.poll() == 'SIGTERM'


@pytest.mark.parametrize('name', [pytest.param('v5e:4x4', marks=tpu.MARKS), 'here'])
@pytest.mark.parametrize('axes', [{}, {'fsdp': 8}, {'tensor': 8}, {'expert': 4}])
def test_the_rows_of_a_process_are_those_of_its_devices(name, axes):
  devices = list(tpu.devices(name)) if name != 'here' else jax.devices()
  layout = sharding.batch_sharding(sharding.make_mesh(MeshConfig(**axes), devices))
  processes = {device.process_index for device in devices}
  rows = {process: distributed.local_rows(layout, 32, process) for process in processes}
  assert set().union(*rows.values()) == set(range(32))
  for device, (held,) in layout.devices_indices_map((32,)).items():
    assert set(range(*held.indices(32))) <= set(rows[device.process_index])
  # A row is read twice only where `tensor` splits it between two processes.
  assert sum(map(len, rows.values())) == (64 if (name, axes) == ('v5e:4x4', {'tensor': 8}) else 32)


# What two processes of two devices each do together; each prints what it saw as JSON.
TOGETHER = """
import json, sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ssm_moe.errors import UserError
from ssm_moe.training import distributed

address, process = sys.argv[1], int(sys.argv[2])
distributed.initialize(distributed.Processes(None, address, 2, process), {}, heartbeat_seconds=45)
seen = {}

# Rows that are not contiguous: the devices of the two processes alternate.
devices = np.array(jax.devices()).reshape(2, 2).T.reshape(-1)
layout = NamedSharding(Mesh(devices, ('x',), axis_types=(AxisType.Auto,)), PartitionSpec('x'))
rows = distributed.local_rows(layout, 8)
array = jax.make_array_from_process_local_data(layout, 10 * np.array(rows))
seen['rows'] = rows
seen['in_place'] = all(
  (np.asarray(shard.data) == 10 * np.arange(8)[shard.index]).all()
  for shard in array.addressable_shards
)

class Damaged(Exception):
  pass

def attempt(name, work):
  try:
    seen[name] = work()
  except (UserError, OSError, Damaged) as error:
    seen[name] = [type(error).__name__, str(error), getattr(error, 'exit_status', None)]

def fail(of, error):
  with distributed.agreed(Damaged):
    if process in of:
      raise error
  return 'went on'

def full():
  raise OSError(28, 'disk full')

attempt('nobody', lambda: fail([], None))
attempt('one', lambda: fail([1], UserError('no such file')))
attempt('both', lambda: fail([0, 1], UserError(f'of {process}')))
attempt('damage', lambda: fail([1], Damaged('cut short')))
attempt('long', lambda: fail([1], UserError('\\u00e9' * 5000)))
attempt('first', lambda: distributed.on_first(lambda: {'process': process}))
attempt('first_fails', lambda: distributed.on_first(full))
attempt('same', lambda: distributed.check_same(seed=1))
attempt('differ', lambda: distributed.check_same(seed=process))

class Signals:
  requested = None

vote = distributed.StopVote(Signals)
seen['votes'] = []
for step in range(4):
  if step == 1 and process == 1:
    Signals.requested = 'SIGTERM'
  seen['votes'].append(vote.poll())
print(json.dumps(seen))
"""


def _environment(devices):
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(ROOT / '.jax_cache')
  return os.environ | {
    'PYTHONPATH': str(ROOT),
    'PYTHONDONTWRITEBYTECODE': '1',
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
    'JAX_COMPILATION_CACHE_DIR': cache,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
    'TPU_SKIP_MDS_QUERY': '1',
  }


def _free_address():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return f'localhost:{free.getsockname()[1]}'


@contextlib.contextmanager
def _start(folder, command, count=2, devices=2):
  """Starts processes of so many devices each; `command` gives the arguments of each."""
  address = _free_address()
  processes = [
    subprocess.Popen(
      [sys.executable, *command(address, str(process))],
      cwd=folder,
      env=_environment(devices),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(count)
  ]
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def _finish(processes, timeout=120):
  """Returns exit status, lines of standard output, and standard error of each.

  Gloo writes lines of its own on standard output when it connects, from several threads at once.
  """
  ends = []
  for process in processes:
    output, errors = process.communicate(timeout=timeout)
    ends.append((process.returncode, output.splitlines(), errors))
  return ends


def _is_silent(lines):
  """Whether there is neither a summary nor a sample, which begins with its prompt."""
  return not any(part in line for line in lines for part in ('{', 'def '))


@pytest.mark.slow
def test_what_happens_in_one_process_is_known_to_both(tmp_path):
  (tmp_path / 'together.py').write_text(TOGETHER)
  with _start(tmp_path, lambda *arguments: ['together.py', *arguments]) as pair:
    ends = _finish(pair)
  assert [status for status, *_ in ends] == [0, 0], ends
  first, second = (json.loads(lines[-1]) for _, lines, _ in ends)
  assert (first['rows'], second['rows']) == ([0, 1, 4, 5], [2, 3, 6, 7])
  assert first['in_place'] and second['in_place']
  for seen in (first, second):
    assert seen['nobody'] == 'went on'
    assert seen['first'] == {'process': 0}
    assert seen['same'] is None
    assert seen['differ'] == [
      'DistributedError',
      'the processes differ in seed; give all of them the same',
      2,
    ]
    # The vote of the second call is the answer to the third.
    assert seen['votes'] == [None, None, 'SIGTERM', 'SIGTERM']
  assert (first['one'], second['one']) == (
    ['UserError', 'process 1: no such file', 2],
    ['UserError', 'no such file', 2],
  )
  assert first['both'] == ['UserError', 'of 0', 2]
  assert second['both'] == ['UserError', 'process 0: of 0', 2]
  assert (first['damage'][:2], second['damage'][:2]) == (
    ['Damaged', 'process 1: cut short'],
    ['Damaged', 'cut short'],
  )
  assert first['long'][1].startswith('process 1: ' + 'é' * 500)
  assert first['first_fails'][:2] == ['OSError', '[Errno 28] disk full']
  assert second['first_fails'] == ['UserError', 'process 0: [Errno 28] disk full', 1]


# Process 1 goes silent, as a host does that loses its network; process 0 waits for it in a
# collective that never notices.
SILENT = """
import os, signal, sys
from ssm_moe.training import distributed

address, process = sys.argv[1], int(sys.argv[2])
distributed.initialize(distributed.Processes(None, address, 2, process), {}, heartbeat_seconds=4)
distributed.check_same(seed=1)
print('together', flush=True)
if process == 1:
  os.kill(os.getpid(), signal.SIGSTOP)
distributed.check_same(seed=1)
"""


@pytest.mark.slow
def test_a_process_that_falls_silent_ends_the_other(tmp_path):
  (tmp_path / 'silent.py').write_text(SILENT)
  with _start(tmp_path, lambda *arguments: ['silent.py', *arguments]) as (first, _):
    while first.stdout.readline() not in ('together\n', ''):
      pass
    start = time.monotonic()
    _, errors = first.communicate(timeout=60)
    # So many heartbeats, and what the machine does besides.
    assert time.monotonic() - start < 30
  assert first.returncode == -signal.SIGABRT, errors
  (line,) = (line for line in errors.splitlines() if line.startswith('silent.py: '))
  assert line.startswith('silent.py: process 0 of 2 was killed, or ended because another is gone; ')


CONFIG = """
from ssm_moe import config as config_lib

def get_config(pattern='M'):
  config = config_lib.defaults()
  config.model.update(vocab_size=264, d_model=8, num_periods=2, pattern=pattern)
  config.model.mamba.d_state = 4
  config.model.moe.update(num_experts=4, d_ff=16, router_groups=4)
  config.data.update(train=({text!r},), valid=({text!r},), carry_state=True)
  config.optimizer.update(schedule='constant', warmup_fraction=0.0)
  config.train.update(
    num_steps={steps}, batch_size=8, sequence_length=16, log_every=1, eval_every=10,
    checkpoint_every=5, eval_tokens=500,
  )
  config.sample.num_tokens = 4
  return config
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('processes')
  (folder / 'small.py').write_text(CONFIG.format(text=small_run.write_text(folder), steps=STEPS))
  return folder


def _train(folder, workdir, *arguments, pattern='M', count=2, devices=2):
  def command(address, process):
    return [
      str(ROOT / 'experiments' / 'train.py'),
      f'--config=small.py:{pattern}',
      f'--workdir={workdir}',
      f'--coordinator_address={address}',
      f'--num_processes={count}',
      f'--process_id={process}',
      *arguments,
    ]

  return _start(folder, command, count, devices)


def _on_one_process(folder, workdir, pattern='M', devices=4, **axes):
  """The same run on devices of this process; returns its config and summary."""
  values = runpy.run_path(str(folder / 'small.py'))['get_config'](pattern)
  values.mesh.update(**axes)
  config = from_config_dict(values)
  make_mesh = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.sharding, 'make_mesh', lambda mesh: make_mesh(mesh, jax.devices()[:devices]))
    return config, loop.train_and_evaluate(config, workdir)


def _wait_for_row(workdir, step, process):
  """Waits until the row of a step is written, or the process has ended."""
  path = workdir / 'metrics.jsonl'
  until = time.monotonic() + 120
  while time.monotonic() < until and process.poll() is None:
    lines = path.read_bytes().split(b'\n')[:-1] if path.exists() else []
    if lines and json.loads(lines[-1])['step'] >= step:
      return
    time.sleep(0.01)


def _assert_same_losses(workdir, expected_workdir):
  rows, expected_rows = small_run.rows(workdir), small_run.rows(expected_workdir)
  assert [row.keys() for row in rows] == [row.keys() for row in expected_rows]
  for key in ('train_loss', 'valid_loss'):
    losses, expected_losses = (
      np.array([row[key] for row in some if key in row]) for some in (rows, expected_rows)
    )
    tolerances.assert_close(losses, expected_losses, rtol=tolerances.FLOAT32_REORDERED)


@pytest.mark.slow
def test_four_processes_and_then_two_train_as_one(folder):
  # Over fsdp each process has its share of the rows of a batch and of most arrays.
  workdir, mesh = folder / 'several', '--config.mesh.fsdp=4'
  # A signal to one process alone: all stop after the same step, and it is saved.
  with _train(folder, 'several', mesh, count=4, devices=1) as four:
    _wait_for_row(workdir, 6, four[0])
    four[3].send_signal(signal.SIGTERM)
    (first, output, errors), *others = _finish(four)
  assert (first, *(status for status, *_ in others)) == (0, 0, 0, 0), errors
  newest = max(small_run.steps(workdir))
  assert errors.splitlines()[-1].startswith(f'SIGTERM: step {newest} is saved in several; ')
  assert 6 <= newest == small_run.rows(workdir)[-1]['step'] < STEPS
  # Process 0 alone reports.
  assert _is_silent(output)
  assert all(_is_silent(lines) and told == '' for _, lines, told in others)

  with _train(folder, 'several', mesh, f'--profile_steps={STEPS - 1}:{STEPS + 1}') as pair:
    (first, output, errors), (second, *other) = _finish(pair)
  assert (first, second) == (0, 0), errors + other[1]
  assert _is_silent(other[0]) and other[1] == '' and not _is_silent(output[:-1])
  assert '4 x cpu, 2 processes' in errors and f'{newest} done of {STEPS}' in errors
  assert f'profile  of steps {STEPS - 1} to {STEPS} is in several/profile' in errors
  assert len(list((workdir / 'profile').rglob('*.xplane.pb'))) == 1
  summary = json.loads(output[-1])
  assert not list(workdir.glob('shared-*')) and not (workdir / 'lock').exists()

  config, expected = _on_one_process(folder, folder / 'one', fsdp=4)
  assert summary.keys() == expected.keys() and summary['final_step'] == STEPS
  _assert_same_losses(workdir, folder / 'one')

  # What several processes saved, one restores, on a mesh of its own.
  config = dataclasses.replace(config, mesh=MeshConfig())
  (state, metadata), (expected_state, expected_metadata) = (
    small_run.arrays(config, folder / name) for name in ('several', 'one')
  )
  assert metadata.keys() == expected_metadata.keys() and metadata['step'] == STEPS
  assert state.step == expected_state.step
  # Twenty steps of Adam on gradients that differ by a rounding.
  rtol = STEPS * tolerances.FLOAT32_REORDERED
  tolerances.assert_close(state.params, expected_state.params, rtol=rtol)


@pytest.mark.extended
@pytest.mark.parametrize('killed', [0, 2])
def test_when_one_of_four_is_killed_two_go_on(folder, killed):
  name, mesh = f'killed_{killed}', '--config.mesh.fsdp=4'
  with _train(folder, name, mesh, count=4, devices=1) as four:
    _wait_for_row(folder / name, 7, four[0])
    four[killed].kill()
    start = time.monotonic()
    ends = _finish(four)
    assert time.monotonic() - start < 60
  for process, (status, output, errors) in enumerate(ends):
    assert (status == -signal.SIGKILL) if process == killed else status, errors
    (line,) = (line for line in errors.splitlines() if line.startswith('train.py: '))
    assert 'the same command goes on from the last checkpoint' in line and _is_silent(output)
  kept = [int(path.name) for path in (folder / name / 'checkpoints').iterdir() if not path.suffix]
  assert 5 <= max(kept) < STEPS

  with _train(folder, name, mesh) as pair:
    ends = _finish(pair)
  assert [status for status, *_ in ends] == [0, 0], ends
  assert f'{max(kept)} done of {STEPS}' in ends[0][2]
  _on_one_process(folder, folder / f'never_{name}', fsdp=4)
  _assert_same_losses(folder / name, folder / f'never_{name}')


@pytest.mark.extended
@pytest.mark.parametrize(
  ('pattern', 'axes'),
  [('M E', {'expert': 4, 'fsdp': 2}), ('M', {'tensor': 8}), ('M', {'tensor': 2, 'fsdp': 4})],
)
def test_axes_between_four_processes(folder, pattern, axes):
  name = '_'.join(f'{axis}_{size}' for axis, size in axes.items())
  mesh = [f'--config.mesh.{axis}={size}' for axis, size in axes.items()]
  with _train(folder, name, *mesh, pattern=pattern, count=4, devices=2) as four:
    ends = _finish(four, timeout=200)
  assert [status for status, *_ in ends] == [0] * 4, ends
  _on_one_process(folder, folder / f'{name}_one', pattern, devices=8, **axes)
  _assert_same_losses(folder / name, folder / f'{name}_one')


@pytest.mark.slow
def test_a_mistake_is_one_line_of_each_process(folder):
  before = small_run.snapshot(folder)
  with _train(folder, 'mistake', "--config.data.valid=('absent.txt',)") as pair:
    ends = _finish(pair)
  for status, output, errors in ends:
    assert status == 2 and _is_silent(output)
    (line,) = errors.splitlines()
    assert 'absent.txt: no such file' in line
  assert small_run.snapshot(folder) == before
