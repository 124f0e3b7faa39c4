"""The parameters that a run left, for use without its optimizer."""

import pathlib

import jax

from ssm_moe import sharding
from ssm_moe.config import ExperimentConfig, MeshConfig, to_dict
from ssm_moe.errors import UserError
from ssm_moe.shapes import PyTree
from ssm_moe.training.checkpoint import Checkpointer
from ssm_moe.training.program import Program


def read_params(workdir: pathlib.Path, experiment: ExperimentConfig) -> tuple[PyTree, int]:
  """Returns the parameters of the newest checkpoint, on one device, and its step.

  Raises:
    UserError: there is none that is good.
  """
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  template = Program(experiment, mesh).template
  with Checkpointer(
    workdir / 'checkpoints', config=to_dict(experiment), keep_last=1
  ) as checkpointer:
    restored = checkpointer.restore({'params': template.params}, partial=True)
  if restored is None:
    raise UserError(f'{workdir}: has no checkpoint; train it first')
  return restored.state['params'], restored.step
