"""The folder of a run before its first step: its config, and parameters from elsewhere.

  WORKDIR/config.json
  WORKDIR/tokenizer.json           if there is one; `data.tokenizer` names it
  WORKDIR/checkpoints/00000000/    the parameters alone

What reads the folder of a run reads this one. A run in it begins with these parameters, with any
optimizer and data: their state is made when it begins.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from ssm_moe.config import ExperimentConfig, to_dict
from ssm_moe.errors import UserError
from ssm_moe.models import lm
from ssm_moe.new_folder import new_folder
from ssm_moe.shapes import PyTree
from ssm_moe.training import durable
from ssm_moe.training import workdir as workdir_lib
from ssm_moe.training.checkpoint import Checkpointer


def write(
  workdir: pathlib.Path,
  experiment: ExperimentConfig,
  params: PyTree,
  *,
  origin: str,
  tokenizer: bytes | None = None,
) -> None:
  """Writes `workdir`, which appears whole or not at all.

  Args:
    workdir: Must not exist.
    experiment: Its model is that of `params`.
    params: Of the model, float32, without flax boxes; on the host or on devices.
    origin: Where they come from, such as 'runs/dense, upcycled', for whoever trains on.
    tokenizer: Contents of a tokenizer.json that the folder is to keep; `data.tokenizer` stays as it
      is if None.

  Raises:
    UserError: `workdir` exists or cannot be written.
    SaveError: the disk is full, or the like.
    ValueError: `params` are not of this model.
  """
  check_params(experiment, params)
  if tokenizer is not None:
    data = dataclasses.replace(experiment.data, tokenizer=str(workdir / workdir_lib.TOKENIZER))
    experiment = dataclasses.replace(experiment, data=data)
  with new_folder(workdir) as folder:
    try:
      if tokenizer is not None:
        durable.write(folder / workdir_lib.TOKENIZER, tokenizer)
      workdir_lib.write_config(folder, experiment)
      with Checkpointer(
        folder / 'checkpoints', config=to_dict(experiment), keep_last=1
      ) as checkpointer:
        checkpointer.save(0, {'params': params}, metadata={'origin': origin})
    except UserError as error:
      # The folder has another name until it is whole.
      where = str(error).replace(folder.name, workdir.name)
      raise type(error)(where) from error.__cause__


def check_params(experiment: ExperimentConfig, params: PyTree) -> None:
  """Checks names, shapes and types.

  Raises:
    ValueError: they are not those of the model.
  """
  expected = nn.unbox(jax.eval_shape(lambda: lm.boxed_params(experiment.model, jax.random.key(0))))
  there, here = _described(params), _described(expected)
  for name in there | here:
    if there.get(name) != here.get(name):
      raise ValueError(
        f'params: {name} is {there.get(name, "absent")}; the model has {here.get(name, "none")}'
      )


def _described(params: PyTree) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): (leaf.shape, np.dtype(leaf.dtype).name)
    for path, leaf in jax.tree.leaves_with_path(params)
  }
