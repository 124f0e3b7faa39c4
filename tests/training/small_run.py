"""Runs that are small enough for tests, and what is left of them on disk."""

import contextlib
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from ssm_moe import sharding
from ssm_moe.config import (
  DataConfig,
  ExperimentConfig,
  MambaConfig,
  ModelConfig,
  RoMConfig,
  SampleConfig,
  TrainConfig,
  to_dict,
)
from ssm_moe.training import loop
from ssm_moe.training.checkpoint import Checkpointer
from ssm_moe.training.metrics import read_metrics

STEPS, ROWS, LENGTH = 7, 8, 16
# By clock: the only keys in which a run may differ from the run that was never stopped.
_TIMES = {'seconds', 'tokens_per_second', 'row_seconds'}


def write_text(folder):
  """Writes documents that are longer and shorter than a window; returns the path."""
  path = folder / 'text.jsonl'
  random = np.random.default_rng(0)
  documents = [''.join(random.choice(list('abc de.\n'), n)) for n in random.integers(5, 90, 60)]
  path.write_text(''.join(json.dumps({'text': document}) + '\n' for document in documents))
  return str(path)


def make_config(text, kind='mamba', **train):
  """mamba: one device, shuffled windows; rom: eight devices, the state carried over windows."""
  routed = MambaConfig(d_state=4, rom=RoMConfig(kind='shared', num_experts=4))
  model = {'d_model': 8, 'num_periods': 2, 'mamba': MambaConfig(d_state=4)}
  if kind == 'rom':
    model |= {'mamba': routed}
  defaults = {
    'num_steps': STEPS,
    'batch_size': ROWS,
    'sequence_length': LENGTH,
    'log_every': 2,
    'eval_every': 3,
    'checkpoint_every': 3,
    'keep_checkpoints': 3,
    'eval_tokens': 300,
  }
  return ExperimentConfig(
    model=ModelConfig(**model),
    data=DataConfig(train=(text,), valid=(text,), carry_state=kind == 'rom'),
    train=TrainConfig(**(defaults | train)),
    sample=SampleConfig(prompt='ab', num_tokens=3 if kind == 'mamba' else 0),
  )


Program = loop.Program
_cached_program = functools.cache(Program)


def _shared_program(config, mesh):
  """Runs share what they compile, which is nearly all of their time, whatever their text is.

  The tests of the script have a process each.
  """
  data = DataConfig(carry_state=config.data.carry_state)
  return _cached_program(dataclasses.replace(config, data=data, sample=SampleConfig()), mesh)


@contextlib.contextmanager
def devices(config):
  """One device for a model without routing, else all."""
  used = jax.devices()[: 8 if config.model.mamba.rom.kind == 'shared' else 1]
  make_mesh = sharding.make_mesh
  with jax.numpy_dtype_promotion('standard'), pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'Program', _shared_program)
    patch.setattr(loop.sharding, 'make_mesh', lambda mesh: make_mesh(mesh, used))
    yield


def run(config, workdir):
  with devices(config):
    return loop.train_and_evaluate(config, workdir)


def steps(workdir):
  """Steps of the folders below WORKDIR/checkpoints, which must all be whole checkpoints."""
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def arrays(config, workdir):
  """All arrays of the newest checkpoint, and what else it holds."""
  with (
    devices(config),
    Checkpointer(workdir / 'checkpoints', config=to_dict(config), keep_last=2) as checkpointer,
  ):
    program = loop.Program(config, loop.sharding.make_mesh(config.mesh))
    restored = checkpointer.restore(program.template)
  assert restored.skipped == []
  metadata = {k: v for k, v in restored.metadata.items() if k not in _TIMES}
  return jax.device_get(restored.state), metadata


def rows(workdir):
  """Rows of metrics without what the clock decides."""
  found = read_metrics(workdir / 'metrics.jsonl')
  return [{k: v for k, v in row.items() if k not in _TIMES} for row in found]


def snapshot(folder):
  """Every path below a folder, and what is in it."""
  return {
    path.relative_to(folder): path.read_bytes() if path.is_file() else None
    for path in sorted(folder.rglob('*'))
  }
