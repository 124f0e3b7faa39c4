"""Says how well a trained model predicts text, and how it does in tasks.

python experiments/evaluate.py --checkpoint=runs/quickstart --data=text.txt

Reads the newest checkpoint of a folder that train.py wrote; the last line on standard output is a
JSON object. Alone: loss, perplexity, bits_per_byte, tokens and bytes of --data, or of the run's own
validation sources; in windows of the length trained with, each read from nothing, as in training.
--context_lengths=256,1024,4096 --plot=context.png compares lengths of the context, on the documents
that are long enough, and --carry_state carries the state from each window of them to the next.
--harness=lambada_openai,hellaswag runs tasks of lm-evaluation-harness (extra [eval]), and own ones
of --include_path=FOLDER.
"""

import functools
import importlib.util
import json
import logging
import os
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags

from ssm_moe import command_line

with command_line.loading():
  from tqdm import tqdm

  from ssm_moe.analysis import context_length, plots
  from ssm_moe.config import ExperimentConfig
  from ssm_moe.data import DataError, tokenizer
  from ssm_moe.errors import UserError
  from ssm_moe.training import durable, evaluation, trained
  from ssm_moe.training import workdir as workdir_lib

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A folder that train.py wrote.')
_TOKENIZER = flags.DEFINE_string('tokenizer', None, "bytes, or a file; the run's if not given.")
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', None, 'Windows of training in memory at one time; as in training if not given.', 1
)
_DATA = flags.DEFINE_multi_string(
  'data', [], "A source, as in config.data.valid; may be repeated. The run's if not given."
)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', None, 'Of the data, in whole documents.', 1)
_LENGTHS = flags.DEFINE_list('context_lengths', None, 'Numbers of tokens that increase.')
_CARRY = flags.DEFINE_bool('carry_state', None, 'With --context_lengths: over windows.')
_PLOT = flags.DEFINE_string('plot', None, 'With --context_lengths: a PNG file.')
_HARNESS = flags.DEFINE_list('harness', None, 'Tasks, groups, or patterns of them.')
_INCLUDE_PATH = flags.DEFINE_string('include_path', None, 'A folder of own tasks, in YAML.')
_NUM_FEWSHOT = flags.DEFINE_integer('num_fewshot', None, 'As each task says if not given.', 0)
_LIMIT = flags.DEFINE_float(
  'limit', None, 'Documents of a task; below 1, the share of them.', 1e-6, 1e9
)
_MAX_LENGTH = flags.DEFINE_integer('max_length', None, 'Tokens read at once; any if not given.', 1)
_OUTPUT = flags.DEFINE_string('output', None, 'With --harness: all that it reports, as JSON.')

# What each is for, and what it takes.
_GROUPS = {
  'text': (_DATA, _MAX_TOKENS, _LENGTHS),
  '--context_lengths': (_CARRY, _PLOT),
  '--harness': (_INCLUDE_PATH, _NUM_FEWSHOT, _LIMIT, _MAX_LENGTH, _OUTPUT),
}


def check_flags() -> tuple[int, ...]:
  """Looks at every flag before the work begins; returns the context lengths."""
  if not _CHECKPOINT.value:
    raise UserError('--checkpoint is not given')
  harness, lengths = _HARNESS.value is not None, _LENGTHS.value is not None
  for (name, group), asked in zip(_GROUPS.items(), (not harness, lengths, harness)):
    for flag in () if asked else [flag for flag in group if flag.present]:
      raise UserError(f'--{flag.name} belongs to {name}, which is not asked for')
  for flag in (_DATA, _HARNESS):
    if flag.present and not all(flag.value or ['']):
      raise UserError(f'--{flag.name} has an empty name')
  if harness and importlib.util.find_spec('lm_eval') is None:
    raise UserError("--harness needs the package lm-eval: pip install 'ssm_moe[eval]'")
  if _PLOT.value is not None and not _PLOT.value.endswith('.png'):
    raise UserError(f'--plot={_PLOT.value}: the name must end in .png')
  for flag in (_PLOT, _OUTPUT):
    if flag.value is not None:
      command_line.check_new_output(flag.name, flag.value)
  return context_length.parse_lengths(_LENGTHS.value) if lengths else ()


def of_text(workdir, run: ExperimentConfig, lengths: tuple[int, ...]) -> dict[str, Any]:
  """Returns what the model makes of text, with windows of these lengths or as trained."""
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
    length = run.train.sequence_length
    about = {'step': step, 'data': experiment.data.valid, 'sequence_length': length}
    bar = functools.partial(tqdm, unit='batch', disable=None)
    if not lengths:
      progress = functools.partial(bar, desc='Evaluating', total=data.num_batches)
      return about | evaluation.evaluate(experiment, params, data, progress=progress)
    result = context_length.compare(
      params,
      experiment.model,
      documents,
      lengths,
      carry_state=bool(_CARRY.value),
      batch_tokens=evaluation.batch_tokens(experiment),
      progress=bar,
    )
  if _PLOT.value is not None:
    shown = result['context_lengths']
    plots.plot_context_lengths(shown, _PLOT.value, trained=length, carried=bool(_CARRY.value))
  return about | result


def of_tasks(workdir, run: ExperimentConfig) -> dict[str, Any]:
  """Returns what the harness says."""
  # One of the harness's libraries greets.
  logging.getLogger('datasets').setLevel(logging.WARNING)
  from ssm_moe.interop import harness

  experiment = evaluation.with_data(run, (), _TOKENIZER.value, _BATCH_SIZE.value)
  encoder = tokenizer.load_tokenizer(experiment.data.tokenizer)
  harness.check_model(run.model, encoder)
  tasks, names = harness.find_tasks(_HARNESS.value, _INCLUDE_PATH.value)
  params, step = trained.read_params(workdir, run)
  memory = {'batch_tokens': evaluation.batch_tokens(experiment), 'max_length': _MAX_LENGTH.value}
  model = harness.HarnessModel(params, run.model, encoder, **memory)
  found = harness.run(model, tasks, names, num_fewshot=_NUM_FEWSHOT.value, limit=_LIMIT.value)
  scores = harness.scores(found)
  print(harness.table(scores), file=sys.stderr)
  if _OUTPUT.value is not None:
    durable.write(pathlib.Path(_OUTPUT.value), harness.as_json(found))
  return {'step': step, 'tasks': names, 'limit': _LIMIT.value, 'harness': scores}


def main() -> None:
  lengths = check_flags()
  workdir = pathlib.Path(_CHECKPOINT.value)
  run = workdir_lib.read_config(workdir)
  result = of_text(workdir, run, lengths) if _HARNESS.value is None else of_tasks(workdir, run)
  print(json.dumps({'checkpoint': str(workdir)} | result, allow_nan=False))


if __name__ == '__main__':
  command_line.run(main)
