"""Turns a Hugging Face folder into a workdir, or a workdir into a Hugging Face folder.

python experiments/convert.py --from=models/mamba-130m-hf --to=runs/mamba-130m
python experiments/convert.py --from=runs/mamba-130m --upcycle=rom --to=runs/rom-130m

With --upcycle either becomes a workdir whose model has experts, and computes what it did.
--from is looked at to see which it is. A workdir that is made so holds config.json, the parameters
as the checkpoint of step 0, and tokenizer.json if there is one: train.py goes on from it, and what
reads a run reads it. Of a workdir, the newest checkpoint is taken. Folders hold safetensors, as of
transformers (mamba, mamba2) or of state-spaces; pickles are never read. The last line on standard
output is a JSON object.
"""

import json
import os
import pathlib
import sys
from typing import NamedTuple

from absl import flags

from ssm_moe import command_line

with command_line.loading():
  import jax

  from ssm_moe.config import DataConfig, ExperimentConfig
  from ssm_moe.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
  from ssm_moe.errors import UserError
  from ssm_moe.interop import huggingface, upcycle_flags
  from ssm_moe.shapes import PyTree
  from ssm_moe.training import first_checkpoint, trained
  from ssm_moe.training import workdir as workdir_lib

_FROM = flags.DEFINE_string('from', None, 'A Hugging Face folder, or the folder of a run.')
_TO = flags.DEFINE_string('to', None, 'The folder to write; must not exist.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, "A tokenizer.json in place of that of --from, or 'bytes'; 'none' takes none."
)
_FORMAT = flags.DEFINE_enum(
  'format', 'transformers', ['transformers', 'state_spaces'], 'Of the Hugging Face folder to write.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Of its tensors; bfloat16 rounds the parameters.'
)


class Source(NamedTuple):
  """What --from holds.

  Attributes:
    experiment: The config of a run; of a Hugging Face folder, its model and defaults.
    params: Of the model.
    tokenizer: To take along; None if there is none.
    origin: What it is, in a few words.
  """

  experiment: ExperimentConfig
  params: PyTree
  tokenizer: Tokenizer | None
  origin: str


def check_flags() -> tuple[pathlib.Path, pathlib.Path]:
  """Looks at every flag before the work begins; returns --from and --to."""
  for flag in (_FROM, _TO):
    if not flag.value:
      raise UserError(f'--{flag.name} is not given')
  folder = pathlib.Path(_FROM.value)
  if not (folder / huggingface.CONFIG).is_file():
    raise UserError(
      f'--from={folder}: has no {huggingface.CONFIG}; it must be a Hugging Face folder, or one '
      'that train.py or convert.py wrote'
    )
  for flag in (_FORMAT, _DTYPE):
    if flag.present and (huggingface.is_model(folder) or upcycle_flags.requested()):
      raise UserError(
        f'--{flag.name} is for a Hugging Face folder to write; --from={folder} becomes a workdir'
      )
  command_line.check_new_output(_TO.name, _TO.value)
  return folder, pathlib.Path(_TO.value)


def read_model(folder: pathlib.Path, target: pathlib.Path) -> Source:
  """Reads a Hugging Face folder, for a run in `target`."""
  model, params = huggingface.load(folder)
  tokenizer = _load_tokenizer(str(folder / huggingface.TOKENIZER), model.vocab_size)
  # Named even if it is not there: no other tokenizer, such as bytes, would be the model's.
  own = str(target / workdir_lib.TOKENIZER)
  name = tokenizer.name if isinstance(tokenizer, ByteTokenizer) else own
  experiment = ExperimentConfig(model=model, data=DataConfig(tokenizer=name))
  return Source(experiment, params, tokenizer, f'the Hugging Face folder {folder}')


def read_workdir(folder: pathlib.Path, experiment: ExperimentConfig) -> Source:
  """Reads the folder of a run."""
  tokenizer = _load_tokenizer(experiment.data.tokenizer, experiment.model.vocab_size)
  params, step = trained.read_params(folder, experiment)
  return Source(experiment, params, tokenizer, f'step {step} in {folder}')


def _load_tokenizer(own: str, vocab_size: int) -> Tokenizer | None:
  """Returns the tokenizer that the flag names, else that of --from, if it is there."""
  name = own if _TOKENIZER.value is None else _TOKENIZER.value
  absent = name == own != ByteTokenizer.name and not os.path.exists(own)
  if name == 'none' or absent:
    return None
  tokenizer = load_tokenizer(name)
  if tokenizer.vocab_size > vocab_size:
    raise UserError(
      f'tokenizer {name} has ids up to {tokenizer.vocab_size - 1}, and the model {vocab_size} '
      'tokens; give another by --tokenizer, or none'
    )
  return tokenizer


def main() -> None:
  folder, target = check_flags()
  upcycled, is_model = upcycle_flags.requested(), huggingface.is_model(folder)
  family = None if _FORMAT.value == 'transformers' else _FORMAT.value
  if is_model:
    source = read_model(folder, target)
  else:
    experiment = workdir_lib.read_config(folder)
    if not upcycled:
      huggingface.check_savable(experiment.model, family)
    source = read_workdir(folder, experiment)
  if upcycled:
    experiment, params, done = upcycle_flags.upcycled(source.experiment, source.params)
    origin = f'{source.origin}, {done}'
    source = source._replace(experiment=experiment, params=params, origin=origin)
  tokenizer = source.tokenizer
  contents = tokenizer and tokenizer.serialized
  if is_model or upcycled:
    first_checkpoint.write(
      target, source.experiment, source.params, origin=source.origin, tokenizer=contents
    )
  else:
    huggingface.save(
      target,
      source.experiment.model,
      source.params,
      family=family,
      dtype=_DTYPE.value,
      tokenizer=contents,
      end_of_text=tokenizer and tokenizer.end_of_text,
    )
  if source.tokenizer is None:
    print(f'{target} has no tokenizer; --tokenizer takes one along', file=sys.stderr)
  result = {
    'from': str(folder),
    'to': str(target),
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(source.params)),
    'tokenizer': source.tokenizer and source.tokenizer.name,
  }
  print(json.dumps(result))


if __name__ == '__main__':
  command_line.run(main)
