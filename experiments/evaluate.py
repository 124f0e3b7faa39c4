"""Says how well a trained model predicts text.

python experiments/evaluate.py --checkpoint=runs/quickstart --data=text.txt

Reads the newest checkpoint of a folder that train.py wrote, and needs no config. The last line on
standard output is a JSON object; progress goes to standard error.

Alone: loss, perplexity, bits_per_byte, tokens and bytes of --data, or of the run's own validation
sources; in windows of the length trained with, each read from an empty state, as training does.
--context_lengths=256,1024,4096 --plot=context.png compares lengths of the context, on the documents
that are long enough, and --carry_state carries the state from each window of them to the next.
"""

import functools
import json
import os
import pathlib
import tempfile
from typing import Any

from absl import flags

from ssm_moe import command_line

with command_line.loading():
  from tqdm import tqdm

  from ssm_moe.analysis import context_length, plots
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
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size',
  None,
  'Windows of the length trained with that are in memory at one time; those of a training step, '
  'if not given.',
)
_LENGTHS = flags.DEFINE_list('context_lengths', [], 'Numbers of tokens that increase.')
_CARRY = flags.DEFINE_bool('carry_state', False, 'Of --context_lengths: over windows.')
_PLOT = flags.DEFINE_string('plot', None, 'Draw --context_lengths: a PNG file.')


def check_flags() -> tuple[int, ...]:
  """Looks at every flag before the work begins; returns the context lengths."""
  if not _CHECKPOINT.value:
    raise UserError('--checkpoint is not given')
  if not all(_DATA.value):
    raise UserError('--data= has no name')
  for flag in (_MAX_TOKENS, _BATCH_SIZE):
    if flag.value is not None and flag.value < 1:
      raise UserError(f'--{flag.name}={flag.value}: it must be at least 1')
  lengths = ()
  if flags.FLAGS['context_lengths'].present:
    lengths = context_length.parse_lengths(_LENGTHS.value)
  for flag in (_CARRY, _PLOT):
    if flag.value and not lengths:
      raise UserError(f'--{flag.name} belongs to --context_lengths, which is not given')
  if _PLOT.value is not None:
    if not _PLOT.value.endswith('.png'):
      raise UserError(f'--plot={_PLOT.value}: the name must end in .png')
    command_line.check_new_output('plot', _PLOT.value)
  return lengths


def by_context(experiment, params, documents, lengths) -> dict[str, Any]:
  """Returns, and draws, what --context_lengths asks for."""
  train = experiment.train
  rows = train.batch_size // train.accumulation_steps
  reports = []
  for length in lengths:
    progress = functools.partial(tqdm, desc=f'Context {length}', unit='batch', disable=None)
    measured = context_length.measure(
      params,
      experiment.model,
      documents,
      length,
      carry_state=_CARRY.value,
      batch_tokens=rows * train.sequence_length,
      progress=progress,
    )
    reports.append(context_length.report(measured, documents.bytes_per_token))
  if _PLOT.value is not None:
    trained_length = train.sequence_length
    plots.plot_context_lengths(reports, _PLOT.value, trained=trained_length, carried=_CARRY.value)
  return {
    'carry_state': _CARRY.value,
    'documents': len(documents.tokens),
    'documents_skipped': documents.skipped,
    'tokens': documents.num_tokens,
    'bytes': documents.num_bytes,
    'context_lengths': reports,
  }


def main() -> None:
  lengths = check_flags()
  workdir = pathlib.Path(_CHECKPOINT.value)
  run = workdir_lib.read_config(workdir)
  experiment = evaluation.with_data(run, _DATA.value, _TOKENIZER.value, _BATCH_SIZE.value)
  max_tokens = _MAX_TOKENS.value
  with tempfile.TemporaryDirectory() as temporary:
    # Someone else's run may be evaluated where nothing can be written.
    cache = workdir / 'tokens' if os.access(workdir, os.W_OK) else temporary
    try:
      data = evaluation.open_batches(experiment, cache_dir=cache, max_tokens=max_tokens)
    except DataError as error:
      raise (evaluation.in_flags(error) if _DATA.value else error) from None
    if lengths:
      documents = context_length.LongDocuments(data.sources, lengths[-1], max_tokens=max_tokens)
    params, step = trained.read_params(workdir, run)
    result = {
      'checkpoint': str(workdir),
      'step': step,
      'data': list(experiment.data.valid),
      'sequence_length': run.train.sequence_length,
    }
    if lengths:
      result |= by_context(experiment, params, documents, lengths)
    else:
      progress = functools.partial(
        tqdm, desc='Evaluating', unit='batch', total=data.num_batches, disable=None
      )
      result |= evaluation.evaluate(experiment, params, data, progress=progress)
  print(json.dumps(result, allow_nan=False))


if __name__ == '__main__':
  command_line.run(main)
