r"""Compares runs: python experiments/compare.py runs/mamba runs/moe_mamba --plot=compare.png

A RUN is a folder that train.py wrote, or a glob of folders. The first is the baseline. Runs whose
configs differ in train.seed only are seeds of one entry. NAME=RUN calls an entry by a name, and
keeps it apart from the others even if its config is the same:

python experiments/compare.py dense='runs/mamba_seed*' moe='runs/moe_mamba_seed*' --format=json

Prints final losses with their spread over seeds, and for the baseline's final loss (in JSON for
every loss that it reached) how many times fewer steps, tokens, FLOPs and seconds each entry needed.
A loss that an entry has not reached gives no speed-up: '-' in Markdown, null in JSON. Seconds are
those of training steps, without compilation and evaluation; they mean something between runs on the
same idle machine only.
"""

import glob
import json
import os
import pathlib
import sys
from collections.abc import Iterator

from absl import flags

from ssm_moe import command_line
from ssm_moe.analysis import comparison, comparison_table, plots, runs
from ssm_moe.errors import UserError
from ssm_moe.training import metrics, workdir

_FORMAT = flags.DEFINE_enum('format', 'markdown', ['markdown', 'json'], 'Of what is printed.')
_LOSS = flags.DEFINE_enum(
  'loss', 'valid', ['valid', 'train'], 'Evaluations, or the moving average of the training loss.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'A new file to write to, instead of standard output.')
_PLOT = flags.DEFINE_string('plot', None, 'Draw losses against tokens and seconds: a new PNG file.')


def read_run(folder: str) -> runs.Run:
  """Reads the config and the metrics of a run.

  Raises:
    UserError: one of them is missing or cannot be understood.
  """
  path = pathlib.Path(folder)
  if not path.is_dir():
    raise UserError(f'{folder}: there is no such folder; a RUN is a folder that train.py wrote')
  for name in ('config.json', 'metrics.jsonl'):
    if not (path / name).is_file():
      raise UserError(f'{folder}: has no {name}; a RUN is a folder that train.py wrote')
  return runs.Run(
    folder=folder,
    config=workdir.read_config(path),
    rows=metrics.read_metrics(path / 'metrics.jsonl'),
  )


def find_runs(arguments: list[str]) -> Iterator[tuple[str | None, str]]:
  """Yields the name, if one is given, and the folder of each run, each pair once.

  A folder that has a name already is not taken once more without: `a=runs/a 'runs/*'`.
  """
  found = set()
  for argument in arguments:
    name, equals, pattern = argument.partition('=')
    # A path may have an equals sign, too.
    if not equals or '/' in name or os.path.exists(argument):
      name, pattern = None, argument
    if not (name and pattern) and name is not None:
      raise UserError(f'{argument}: it must be NAME=RUN, with something on both sides')
    folders = [pattern]
    if not os.path.exists(pattern) and glob.has_magic(pattern):
      folders = sorted(path for path in glob.glob(pattern) if os.path.isdir(path))
      if not folders:
        raise UserError(f'{pattern}: fits no folder')
    for folder in folders:
      place = os.path.realpath(folder)
      if (name, place) in found or (name is None and any(place == there for _, there in found)):
        continue
      found.add((name, place))
      yield name, folder


def main(arguments: list[str]) -> None:
  for flag in (_OUTPUT, _PLOT):
    if flag.value is not None:
      command_line.check_new_output(flag.name, flag.value)
  if _PLOT.value is not None and not _PLOT.value.endswith('.png'):
    raise UserError(f'--plot={_PLOT.value}: the name must end in .png')
  named = [(name, read_run(folder)) for name, folder in find_runs(arguments)]
  compared = comparison.compare(runs.group(named), _LOSS.value)
  report = compared.report
  for warning in report['warnings']:
    print(f'warning: {warning}', file=sys.stderr)
  if _FORMAT.value == 'json':
    text = json.dumps(report, indent=2, allow_nan=False)
  else:
    text = comparison_table.markdown(report)
  if _OUTPUT.value is None:
    print(text)
  else:
    pathlib.Path(_OUTPUT.value).write_text(text + '\n', encoding='utf-8')
  if _PLOT.value is not None:
    plots.plot_comparison(
      compared.bands, _PLOT.value, loss=_LOSS.value, target_loss=report['target_loss']
    )


if __name__ == '__main__':
  command_line.run(main, arguments='RUN')
