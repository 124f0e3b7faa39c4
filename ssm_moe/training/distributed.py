"""Several processes that train one model: how they find each other, agree and stop together.

Every process runs the same program on its own devices. Process 0 alone writes what a run reports,
and what only one process can know (a full disk, a damaged file, a signal) is told to all of them,
so that all do the same next: a process that leaves while the others wait for it would hang them.
With one process nothing here talks to anyone.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssm_moe.errors import UserError
from ssm_moe.training import last_line
from ssm_moe.training.signals import StopSignals

# How long a process that ends waits for the others to end, if it is not less than a heartbeat: so
# long does a failure of one alone, in the middle of training, take to end them all.
_SHUTDOWN_SECONDS = 30
# How long process 0 may start after the others.
_CONNECT_SECONDS = 300
_MESSAGE_BYTES = 4096
# What to do when one is lost.
GO_ON = (
  'the same command goes on from the last checkpoint, or begins again if there is none, with fewer '
  'processes too'
)
_TEXT_CHARACTERS = 600  # of an error; JSON may need six bytes for each

_T = TypeVar('_T')


class DistributedError(UserError):
  """Processes that are not told of each other, or that do not run the same."""


class LostProcessError(DistributedError):
  """The processes cannot tell each other anything more."""

  exit_status = 1


class Processes(NamedTuple):
  """Who the processes of a run are, as far as the flags say.

  Attributes:
    distributed: Whether there are several: True, False, or None to look at the environment.
    coordinator_address: HOST:PORT of process 0.
    num_processes: How many there are.
    process_id: Which of them this is, from 0.
  """

  distributed: bool | None = None
  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


def initialize(flags: Processes, environment: Mapping[str, str], *, heartbeat_seconds: int) -> None:
  """Joins the other processes, if there are any. To be called before JAX knows its devices.

  There are several if the flags name them, if `distributed` is True (JAX then asks the metadata
  server of a TPU slice, SLURM, Open MPI or Kubernetes), or if the environment says so by itself:
  a SLURM step of several tasks, or the list of hosts that Kubernetes gives a TPU slice. Only this
  last part is automatic, because it needs no network: a metadata server can only be asked.

  Args:
    flags: Who the processes are.
    environment: Variables of this process.
    heartbeat_seconds: A process that has been silent for so long counts as dead, and the others are
      ended; no step, compilation or save makes a process silent.

  Raises:
    DistributedError: the flags do not fit together, or the others cannot be reached.
  """
  named = check(flags)
  if heartbeat_seconds < 1:
    raise DistributedError(f'--heartbeat_seconds={heartbeat_seconds}: it must be at least 1')
  if not (named or flags.distributed or (flags.distributed is None and detect(environment))):
    return
  # JAX's own handler of SIGTERM would take the signal from those who save and clean up.
  jax.config.update('jax_enable_preemption_service', False)
  arguments = flags._asdict()
  del arguments['distributed']
  if named:
    arguments['cluster_detection_method'] = 'deactivate'
    if flags.process_id:
      _wait_for_first(flags.coordinator_address)
  try:
    jax.distributed.initialize(
      **arguments,
      heartbeat_timeout_seconds=heartbeat_seconds,
      shutdown_timeout_seconds=min(_SHUTDOWN_SECONDS, heartbeat_seconds),
    )
  except (ValueError, RuntimeError, OSError) as error:
    reason = str(error).partition('\n')[0]
    if not named:
      reason += '; give --coordinator_address, --num_processes and --process_id'
    raise DistributedError(f'the processes cannot be joined: {reason}') from error
  last_line.leave(
    f'{os.path.basename(sys.argv[0])}: process {jax.process_index()} of {jax.process_count()} was '
    f'killed, or ended because another is gone; {GO_ON}'
  )


def _wait_for_first(address: str, seconds: float = _CONNECT_SECONDS) -> None:
  """Waits until process 0 listens; JAX would abort instead of raising if it never does."""
  host, _, port = address.rpartition(':')
  until = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=10).close()
      return
    except socket.gaierror as error:
      raise DistributedError(f'--coordinator_address={address}: {error.strerror}') from None
    except (OSError, OverflowError) as error:
      if time.monotonic() > until or isinstance(error, OverflowError):
        raise DistributedError(
          f'--coordinator_address={address}: process 0 does not answer there ({error})'
        ) from None
    time.sleep(0.5)


def check(flags: Processes) -> bool:
  """Returns whether the flags name the processes.

  Raises:
    DistributedError: they do so in part only, or cannot be meant.
  """
  values = flags._asdict()
  del values['distributed']
  missing = [f'--{name}' for name, value in values.items() if value is None]
  if len(missing) == len(values):
    return False
  if missing:
    raise DistributedError(
      f'{" and ".join(missing)} must be given too: --coordinator_address, --num_processes and '
      '--process_id go together'
    )
  if flags.distributed is False:
    raise DistributedError('--nodistributed and --coordinator_address contradict each other')
  if not re.fullmatch(r'[^\s/]+:\d+', flags.coordinator_address):
    raise DistributedError(
      f'--coordinator_address={flags.coordinator_address}: it must be HOST:PORT of process 0'
    )
  if flags.num_processes < 1:
    raise DistributedError(f'--num_processes={flags.num_processes}: it must be at least 1')
  if not 0 <= flags.process_id < flags.num_processes:
    raise DistributedError(
      f'--process_id={flags.process_id}: it must be from 0 to {flags.num_processes - 1}'
    )
  return True


def detect(environment: Mapping[str, str]) -> bool:
  """Says whether the environment alone names several processes."""
  # The tasks of the step: an interactive shell of a job has that job's SLURM_NTASKS, but is alone.
  if environment.get('SLURM_STEP_NUM_TASKS', '1') != '1' and 'SLURM_PROCID' in environment:
    return True
  hosts = environment.get('TPU_PROCESS_ADDRESSES', environment.get('TPU_WORKER_HOSTNAMES', ''))
  return ',' in hosts or environment.get('MEGASCALE_NUM_SLICES', '1') not in ('', '1')


def is_first() -> bool:
  """Whether this is process 0, the one that writes."""
  return jax.process_index() == 0


def check_same(**values: Any) -> None:
  """Checks that all processes have the same values, which JSON must hold.

  Raises:
    DistributedError: a value differs, or JAX does not know of the processes that the devices have.
  """
  if jax.process_count() == 1:
    return
  if not jax.distributed.is_initialized():
    raise DistributedError(
      f'the devices belong to {jax.process_count()} processes; give --distributed to all of them'
    )
  for name, value in values.items():
    if len(set(_exchange(json.dumps(value, sort_keys=True)))) > 1:
      raise DistributedError(f'the processes differ in {name}; give all of them the same')


@contextlib.contextmanager
def agreed(*kinds: type[Exception]) -> Iterator[None]:
  """What the block raises in one process is raised in all of them.

  Every process must enter the block and come to its end.

  Args:
    *kinds: Exceptions that are told to the others, besides UserError; made of a message alone.
      Others leave the block at once.
  """
  if jax.process_count() == 1:
    yield
    return
  known = {kind.__name__: kind for kind in (*kinds, UserError)}
  error = told = None
  try:
    yield
  except (*kinds, UserError, OSError) as caught:
    error = caught
    kind = next((name for name, kind in known.items() if isinstance(caught, kind)), 'UserError')
    told = _told(kind, caught)
  _raise_first(_exchange(json.dumps(told)), error, known)


def on_first(work: Callable[[], _T]) -> _T:
  """Does `work` in process 0; every process returns its result or raises its UserError.

  Args:
    work: Its result must be what JSON holds, at most a few thousand bytes.
  """
  if jax.process_count() == 1:
    return work()
  result = error = None
  message = ''
  if is_first():
    try:
      result = work()
      message = json.dumps({'result': result})
    except (UserError, OSError) as caught:
      error = caught
      message = json.dumps(_told('UserError', caught))
  told = _exchange(message)[0]
  if 'result' in json.loads(told):
    return json.loads(told)['result']
  _raise_first([told], error, {'UserError': UserError})
  raise AssertionError('unreachable')


def _told(kind: str, error: Exception) -> dict[str, Any]:
  status = getattr(error, 'exit_status', 1)
  return {'kind': kind, 'text': str(error)[:_TEXT_CHARACTERS], 'status': status}


def _raise_first(messages: list[str], own: Exception | None, known: dict[str, type]) -> None:
  """Raises the error of the first process that has one: its own if it is this process'."""
  for process, message in enumerate(messages):
    told = json.loads(message)
    if told is None:
      continue
    if process == jax.process_index() and own is not None:
      raise own
    error = known[told['kind']](f'process {process}: {told["text"]}')
    error.exit_status = told['status']
    raise error from own


def _exchange(message: str) -> list[str]:
  """Returns the messages of all processes, by their index."""
  data = message.encode()
  if len(data) > _MESSAGE_BYTES:
    raise ValueError(f'a message of {len(data)} bytes; {_MESSAGE_BYTES} fit')
  padded = np.frombuffer(data.ljust(_MESSAGE_BYTES, b'\0'), np.uint8)
  try:
    gathered = multihost_utils.process_allgather(padded)
  except (ValueError, RuntimeError) as error:  # JAX raises either when a connection breaks
    raise LostProcessError(
      f'{str(error).partition(chr(10))[0]}; if another process is gone, {GO_ON}'
    ) from error
  return [bytes(row).rstrip(b'\0').decode() for row in gathered]


def local_rows(layout: NamedSharding, batch_size: int, process: int | None = None) -> list[int]:
  """Returns which rows of a global batch the devices of a process hold, in order.

  A mesh follows the wires of a slice, so these need not be one contiguous share, and processes
  between which a row is split by another axis hold the same ones.

  Args:
    layout: Of arrays whose first axis is the batch.
    batch_size: Rows of the global batch.
    process: Its index; this one if None.
  """
  process = jax.process_index() if process is None else process
  slices = layout.devices_indices_map((batch_size,))
  held = [rows for device, (rows,) in slices.items() if device.process_index == process]
  return sorted({row for rows in held for row in range(*rows.indices(batch_size))})


class StopVote:
  """Whether to stop: the same answer in every process at the same call.

  A signal reaches the process that it is sent to at some moment; the others hear of it by a sum
  over all devices. The answer to a call is that of the votes given at the call before, so that
  nobody waits for the work in flight. With one process it is simply whether there was a signal.

  Args:
    signals: Of this process.
  """

  def __init__(self, signals: StopSignals):
    self._signals = signals
    self._answer: str | None = None
    self._votes: jax.Array | None = None
    if jax.process_count() > 1:
      mesh = jax.make_mesh((jax.device_count(),), ('all',), axis_types=(AxisType.Auto,))
      self._layout = NamedSharding(mesh, PartitionSpec('all'))
      self._count = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def poll(self) -> str | None:
    """Returns the name of the signal to stop for, or None; once it is one, it stays so.

    Every process must call this equally often.
    """
    if self._answer is not None:
      return self._answer
    if jax.process_count() == 1:
      self._answer = self._signals.requested
      return self._answer
    requested = self._signals.requested
    vote = np.full(jax.local_device_count(), signal.Signals[requested] if requested else 0)
    votes = jax.make_array_from_process_local_data(self._layout, vote.astype(np.int32))
    before, self._votes = self._votes, self._count(votes)
    if before is not None and int(before):
      self._answer = signal.Signals(int(before)).name
    return self._answer
