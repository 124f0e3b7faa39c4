"""Turns a Hugging Face folder into a workdir, or a workdir into a Hugging Face folder.

python experiments/convert.py --from=models/mamba-130m-hf --to=runs/mamba-130m

--from is looked at to see which it is. A workdir made so holds config.json, the parameters as the
checkpoint of step 0, and tokenizer.json if the folder has one; train.py goes on from it, and what
reads a run reads it. The last line on standard output is a JSON object.
"""

import json
import pathlib
from typing import NamedTuple

from absl import flags

from ssm_moe import command_line

with command_line.loading():
  import jax

  from ssm_moe.config import DataConfig, ExperimentConfig
  from ssm_moe.errors import UserError
  from ssm_moe.interop import huggingface
  from ssm_moe.shapes import PyTree
  from ssm_moe.training import first_checkpoint, trained
  from ssm_moe.training import workdir as workdir_lib

_FROM = flags.DEFINE_string(
  'from', None, 'A Hugging Face folder, or a folder that train.py or this script wrote.'
)
_TO = flags.DEFINE_string('to', None, 'The folder to write; must not exist.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, 'A tokenizer.json to take along; that of --from if not given.'
)


class Source(NamedTuple):
  """What --from holds.

  Attributes:
    experiment: The config of a run; of a Hugging Face folder, its model and defaults.
    params: Of the model.
    tokenizer: Contents of a tokenizer.json; None if there is none.
    is_workdir: Whether it is the folder of a run.
    origin: What it is, in a few words.
  """

  experiment: ExperimentConfig
  params: PyTree
  tokenizer: bytes | None
  is_workdir: bool
  origin: str


def check_flags() -> tuple[pathlib.Path, pathlib.Path]:
  """Looks at every flag before the work begins; returns --from and --to."""
  for flag in (_FROM, _TO):
    if not flag.value:
      raise UserError(f'--{flag.name} is not given')
  command_line.check_new_output(_TO.name, _TO.value)
  folder = pathlib.Path(_FROM.value)
  if not (folder / 'config.json').is_file():
    raise UserError(
      f'--from={folder}: has no config.json; it must be a Hugging Face folder or a run'
    )
  return folder, pathlib.Path(_TO.value)


def read(folder: pathlib.Path) -> Source:
  """Reads a Hugging Face folder or the folder of a run, whichever it is."""
  if huggingface.is_model(folder):
    model, params = huggingface.load(folder)
    experiment = ExperimentConfig(model=model)
    tokenizer = folder / first_checkpoint.TOKENIZER
    origin = f'the Hugging Face folder {folder}'
  else:
    experiment = workdir_lib.read_config(folder)
    params, step = trained.read_params(folder, experiment)
    tokenizer = pathlib.Path(experiment.data.tokenizer)
    origin = f'{folder} at step {step}'
  if _TOKENIZER.value is not None:
    tokenizer = pathlib.Path(_TOKENIZER.value)
  contents = None
  if experiment.data.tokenizer != DataConfig.tokenizer or tokenizer.is_file():
    contents = tokenizer.read_bytes()
  return Source(experiment, params, contents, not huggingface.is_model(folder), origin)


def main() -> None:
  folder, target = check_flags()
  source = read(folder)
  if source.is_workdir:
    huggingface.save(target, source.experiment.model, source.params, tokenizer=source.tokenizer)
  else:
    first_checkpoint.write(
      target, source.experiment, source.params, origin=source.origin, tokenizer=source.tokenizer
    )
  result = {
    'from': str(folder),
    'to': str(target),
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(source.params)),
  }
  print(json.dumps(result))


if __name__ == '__main__':
  command_line.run(main)
