"""The parameters that a run left, for use without its optimizer."""

import dataclasses
import functools
import pathlib

import jax
import optax

from ssm_moe import sharding
from ssm_moe.config import ExperimentConfig, MeshConfig, OptimizerConfig, to_dict
from ssm_moe.errors import UserError
from ssm_moe.models import lora
from ssm_moe.shapes import PyTree
from ssm_moe.training import step as step_lib
from ssm_moe.training.checkpoint import Checkpointer


def read_params(workdir: pathlib.Path, experiment: ExperimentConfig) -> tuple[PyTree, int]:
  """Returns the parameters of a run's model, on one device, and the step that they are of.

  They are those of the newest checkpoint; of the best, if the run may stop early. Adapters are
  merged into what they adapt.

  Raises:
    UserError: there is no checkpoint that is good.
  """
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  return restore_params(workdir, experiment, mesh)


def restore_params(
  workdir: pathlib.Path, experiment: ExperimentConfig, mesh: jax.sharding.Mesh
) -> tuple[PyTree, int]:
  """Does the same on any mesh."""
  # Whatever that run trained.
  plain = dataclasses.replace(experiment, optimizer=OptimizerConfig())
  boxed = jax.eval_shape(
    functools.partial(step_lib.init_train_state, plain, optax.identity()), jax.random.key(0)
  )
  shardings = step_lib.state_shardings(mesh, boxed)
  template = step_lib.laid_out(boxed, shardings)
  wanted = {'params': template.params}
  if template.adapters is not None:
    wanted['adapters'] = template.adapters
  with Checkpointer(
    workdir / 'checkpoints', config=to_dict(experiment), keep_last=1
  ) as checkpointer:
    best = experiment.train.early_stopping_patience is not None
    # The checkpoint of step 0 may be from elsewhere, and of a run that is to have adapters.
    first = {'params': template.params}
    restored = checkpointer.restore(wanted, first=first, partial=True, best=best)
  if restored is None:
    raise UserError(f'{workdir}: has no checkpoint; train it first')
  merge = jax.jit(
    functools.partial(lora.merged, config=experiment.lora), out_shardings=shardings.params
  )
  params, adapters = restored.state['params'], restored.state.get('adapters')
  return params if adapters is None else merge(params, adapters), restored.step
