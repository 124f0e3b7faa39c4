"""Runs to compare: which are seeds of one entry, and which have losses of different things."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from ssm_moe.analysis.speedup import Row
from ssm_moe.config import ExperimentConfig, to_dict
from ssm_moe.errors import UserError

Loss = Literal['valid', 'train']

# Fields that runs of one entry may differ in; all but the seed leave the losses as they are.
_FREE_FIELDS = {
  'data.cache_dir',
  'data.prefetch',
  'sample.num_tokens',
  'sample.prompt',
  'sample.temperature',
  'train.checkpoint_every',
  'train.keep_checkpoints',
  'train.seed',
}
# Fields that must be equal for losses to be of the same thing. A validation window starts from an
# empty state, so that loss depends on its length; that of training on what documents are cut into.
_DATA_FIELDS = ('data.tokenizer', 'data.text_field', 'model.vocab_size', 'train.sequence_length')
_DATA_FIELDS_OF: dict[Loss, tuple[str, ...]] = {
  'valid': ('data.train', 'data.weights', 'data.valid', 'train.eval_tokens'),
  'train': ('data.train', 'data.weights'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A folder that `experiments/train.py` wrote.

  Attributes:
    rows: Of its metrics.jsonl.
  """

  folder: str
  config: ExperimentConfig
  rows: Sequence[Row]


class Entry(NamedTuple):
  """Runs that differ in their seed only."""

  name: str
  runs: tuple[Run, ...]


def group(runs: Sequence[tuple[str | None, Run]]) -> list[Entry]:
  """Puts runs together: those given one name, and those without whose configs are equal.

  Args:
    runs: Each with the name of its entry, or None.

  Returns:
    The entries in the order of their first runs.

  Raises:
    UserError: runs of one name differ in more than their seed.
  """
  groups: dict[Any, list[Run]] = {}
  for name, run in runs:
    key = ('name', name) if name else ('fields', repr(_fixed_fields(run)))
    groups.setdefault(key, []).append(run)
  for (_, name), members in groups.items():
    for run in members[1:]:
      fields = differences(members[0], run)
      if fields:
        raise UserError(
          f'{name}: {members[0].folder} and {run.folder} differ in config.{fields[0]}; runs of one '
          'entry may differ in config.train.seed only'
        )
  names = [
    key[1] if key[0] == 'name' else _name([run.folder for run in members])
    for key, members in groups.items()
  ]
  return [
    Entry(name if names.count(name) == 1 else members[0].folder, tuple(members))
    for name, members in zip(names, groups.values())
  ]


def differences(one: Run, other: Run) -> list[str]:
  """Returns the dotted names of the fields that make two runs different entries."""
  ours, theirs = _fixed_fields(one), _fixed_fields(other)
  return [name for name in ours if ours[name] != theirs[name]]


def warnings(entry: Entry, baseline: Entry, loss: Loss) -> list[str]:
  """Returns what makes an entry hard to compare, a line each."""
  lines = []
  ours, theirs = (_flat(to_dict(e.runs[0].config)) for e in (entry, baseline))
  for field in _DATA_FIELDS + _DATA_FIELDS_OF[loss]:
    if ours[field] != theirs[field]:
      lines.append(
        f'config.{field} is {ours[field]!r} in {entry.name} and {theirs[field]!r} in the baseline, '
        f'{baseline.name}: their losses are of different things'
      )
  seeds = [run.config.train.seed for run in entry.runs]
  if len(set(seeds)) < len(seeds):
    lines.append(f'{entry.name} has runs of the same seed: {seeds}')
  ends = {run.folder: max(row['step'] for row in run.rows) for run in entry.runs}
  for run in entry.runs:
    if ends[run.folder] < run.config.train.num_steps:
      lines.append(
        f'{run.folder} is not finished: {ends[run.folder]} of {run.config.train.num_steps} steps, '
        'so its last loss is not what the schedule ends at'
      )
  if len(set(ends.values())) > 1:
    lines.append(
      f'{entry.name} has runs of different lengths, compared up to the shortest: '
      + ', '.join(f'{folder} {end} steps' for folder, end in ends.items())
    )
  return lines


def _fixed_fields(run: Run) -> dict[str, Any]:
  fields = _flat(to_dict(run.config))
  return {name: value for name, value in fields.items() if name not in _FREE_FIELDS}


def _flat(values: dict[str, Any], path: str = '') -> dict[str, Any]:
  flat = {}
  for name, value in values.items():
    below = _flat(value, f'{path}{name}.') if isinstance(value, dict) else {path + name: value}
    flat.update(below)
  return flat


def _name(folders: Sequence[str]) -> str:
  """Returns what the folders' names have in common, without the word seed and a number."""
  paths = [os.path.abspath(folder) for folder in folders]
  bases = [os.path.basename(path) for path in paths]
  if len(bases) == 1:
    return bases[0]
  shared = re.sub(r'([-_.]*seed|[-_.]s)?[-_.=]*\d*$', '', _common_start(bases))
  return shared or os.path.basename(os.path.commonpath(paths)) or folders[0]


def _common_start(words: Sequence[str]) -> str:
  first, last = min(words), max(words)
  differ = (i for i, (a, b) in enumerate(zip(first, last)) if a != b)
  return first[: next(differ, min(len(first), len(last)))]
