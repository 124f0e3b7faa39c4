"""Trains a model: python experiments/train.py --config=experiments/configs/quickstart.py

Progress goes to standard error; the last line on standard output is a JSON object with final_step,
train_loss, valid_loss, valid_bits_per_byte, tokens_per_second and workdir. The same command goes on
with a run that was stopped, and evaluates a finished one again.

Several processes train together if each of them runs this command: as it is under SLURM and in a
TPU slice of Kubernetes, with --distributed on the hosts of a TPU slice (docs/tpu.md), elsewhere
with --coordinator_address, --num_processes and --process_id. The workdir is on shared storage.
"""

import json
import os

from absl import flags
from ml_collections import config_flags

from ssm_moe import command_line, config

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where logs and checkpoints go; runs/<config name> if not given.'
)
_PROFILE_STEPS = flags.DEFINE_string(
  'profile_steps',
  None,
  'START:STOP traces the steps from START up to, not including, STOP into WORKDIR/profile, for '
  'TensorBoard; counted from 1 as in metrics.jsonl, so 10:15 are the five steps 10 to 14. '
  'Process 0 writes the trace; compilation is not in it.',
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  None,
  'Whether several processes train together. --distributed lets JAX find them: on a TPU slice, '
  'under SLURM or Open MPI. If not given, they are looked for where that needs no network: in a '
  'SLURM step of several tasks and in a TPU slice of Kubernetes.',
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  'coordinator_address', None, 'HOST:PORT of process 0, where nothing else says so.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'With it: how many there are.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'With it: which of them this is, from 0.')
# The loss of a process ends the others within a minute.
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
  'heartbeat_seconds', 45, 'How long one of several processes may be silent before all are ended.'
)


def main():
  experiment = config.from_flag(_CONFIG.value)
  # Not sooner: this takes seconds, in which Ctrl-C and a mistake are to be answered in one line.
  with command_line.loading():
    from ssm_moe.training import distributed, loop

  processes = distributed.Processes(
    _DISTRIBUTED.value, _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )
  distributed.initialize(processes, os.environ, heartbeat_seconds=_HEARTBEAT_SECONDS.value)
  name = command_line.run_name(config_flags.get_config_filename(flags.FLAGS['config']))
  summary = loop.train_and_evaluate(
    experiment, _WORKDIR.value or f'runs/{name}', profile_steps=_PROFILE_STEPS.value
  )
  if summary is not None and distributed.is_first():
    print(json.dumps(summary))


if __name__ == '__main__':
  command_line.run(main)
