"""What a record of routes was made of: model, tokenizer, input and windows."""

import hashlib
import json
from typing import Any

import jax
import numpy as np

from ssm_moe import config
from ssm_moe.analysis.documents import Windows
from ssm_moe.data.tokenizer import Tokenizer
from ssm_moe.errors import UserError
from ssm_moe.shapes import PyTree

# What a record must share with what it is given back to, and what to say if it does not.
_IDENTITY = {
  'config': 'the config of the model is another',
  'parameters': 'the checkpoint is another',
  'tokenizer': 'the tokenizer is another',
  'input': 'the input, or --max_tokens, is another',
  'window': 'the windows are of another size',
}


def header_of(
  experiment: config.ExperimentConfig,
  params: PyTree,
  step: int,
  tokenizer: Tokenizer,
  windows: Windows,
) -> dict[str, Any]:
  """Returns the header of a record, by digests."""
  settings = json.dumps(config.to_dict(experiment.model), sort_keys=True)
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
  return {
    'config': hashlib.sha256(settings.encode()).hexdigest(),
    'parameters': digest.hexdigest(),
    'tokenizer': tokenizer.sha256,
    'input': windows.documents.sha256,
    'window': [windows.lanes, windows.length],
    'step': step,
  }


def check_same(path: str, recorded: dict[str, Any], here: dict[str, Any]) -> None:
  """Raises UserError if the record at `path`, of header `recorded`, was made of something else."""
  for key, difference in _IDENTITY.items():
    if recorded.get(key) != here[key]:
      raise UserError(f'--replay={path} was not made of this checkpoint and input: {difference}')
