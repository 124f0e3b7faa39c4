"""Says how well a trained model predicts text.

python experiments/evaluate.py --checkpoint=runs/quickstart --data=text.txt

Reads the newest checkpoint of a folder that train.py wrote, and needs no config. The last line on
standard output is a JSON object; progress goes to standard error.

Alone: loss, perplexity, bits_per_byte, tokens and bytes of --data, or of the run's own validation
sources; in windows of the length trained with, each read from an empty state, as training does.
"""

import functools
import json
import os
import pathlib
import tempfile

from absl import flags

from ssm_moe import command_line

with command_line.loading():
  from tqdm import tqdm

  from ssm_moe.data import DataError
  from ssm_moe.errors import UserError
  from ssm_moe.training import evaluation, trained
  from ssm_moe.training import workdir as workdir_lib

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A folder that train.py wrote.')
_DATA = flags.DEFINE_multi_string(
  'data',
  [],
  'A source as in config.data.valid: a text file, a folder, a token folder, stdlib; may be '
  "repeated. The run's validation sources, if not given.",
)
_TOKENIZER = flags.DEFINE_string('tokenizer', None, "Of the data; the run's, if not given.")
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', None, 'Of the data, in whole documents, but at least one document.'
)


def check_flags() -> None:
  """Looks at every flag before the work begins."""
  if not _CHECKPOINT.value:
    raise UserError('--checkpoint is not given')
  if not all(_DATA.value):
    raise UserError('--data= has no name')
  if _MAX_TOKENS.value is not None and _MAX_TOKENS.value < 1:
    raise UserError(f'--max_tokens={_MAX_TOKENS.value}: it must be at least 1')


def main() -> None:
  check_flags()
  workdir = pathlib.Path(_CHECKPOINT.value)
  trained_with = workdir_lib.read_config(workdir)
  experiment = evaluation.with_data(trained_with, _DATA.value, _TOKENIZER.value)
  with tempfile.TemporaryDirectory() as temporary:
    # Someone else's run may be evaluated where nothing can be written.
    cache = workdir / 'tokens' if os.access(workdir, os.W_OK) else temporary
    try:
      batches = evaluation.open_batches(experiment, cache_dir=cache, max_tokens=_MAX_TOKENS.value)
    except DataError as error:
      raise (evaluation.in_flags(error) if _DATA.value else error) from None
    params, step = trained.read_params(workdir, trained_with)
    result = {
      'checkpoint': str(workdir),
      'step': step,
      'data': list(experiment.data.valid),
      'sequence_length': experiment.train.sequence_length,
    }
    progress = functools.partial(
      tqdm, desc='Evaluating', unit='batch', total=batches.num_batches, disable=None
    )
    result |= evaluation.evaluate(experiment, params, batches, progress=progress)
  print(json.dumps(result, allow_nan=False))


if __name__ == '__main__':
  command_line.run(main)
