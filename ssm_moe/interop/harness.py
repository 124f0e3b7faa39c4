"""EleutherAI's lm-evaluation-harness on a model of this library (extra `[eval]`).

https://github.com/EleutherAI/lm-evaluation-harness. The harness makes requests of its tasks'
documents and scores the answers; this answers them. Its conventions are kept: no token stands
before a context that is not empty, a context that is too long loses its beginning, and text is
split between context and continuation as `likelihood.encode_pair` says.

Importing this imports the harness, which needs no PyTorch.
"""

import contextlib
import difflib
import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval import evaluator, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from ssm_moe.config import ModelConfig
from ssm_moe.data.tokenizer import Tokenizer
from ssm_moe.errors import UserError
from ssm_moe.interop import decoding, likelihood
from ssm_moe.models import lm
from ssm_moe.shapes import PyTree

# What a task may ask of sampling, but must not change.
_FIXED = {'top_k': (None, 0), 'top_p': (None, 1), 'num_beams': (None, 1)}
_MAX_NEW_TOKENS = 256  # as other models of the harness, if a task does not say


class HarnessModel(LM):
  """A model as the harness wants it.

  Args:
    params: Without flax boxes, on one device.
    config: Of the model.
    tokenizer: Of the model.
    batch_tokens: About so many are in memory at one time.
    max_length: Tokens that the model may read at one time; any number if None.
  """

  def __init__(
    self,
    params: PyTree,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    batch_tokens: int,
    max_length: int | None = None,
  ):
    super().__init__()
    self._params, self._config, self._tokenizer = params, config, tokenizer
    self._batch_tokens, self._max_length = batch_tokens, max_length

  def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
    """Returns, of each (context, continuation), the log-likelihood and whether it is greedy."""
    pairs = [
      likelihood.shorten(likelihood.encode_pair(self._tokenizer, *request.args), self._max_length)
      for request in requests
    ]
    answers = [(found.log_likelihood, found.greedy) for found in self._score(pairs)]
    for request, answer in zip(requests, answers):
      self.cache_hook.add_partial('loglikelihood', request.args, answer)
    return answers

  def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
    """Returns the log-likelihood of each text, from end-of-text on."""
    pairs, owners = [], []
    for owner, request in enumerate(requests):
      of_text = likelihood.rolling_pairs(self._tokenizer, *request.args, self._max_length)
      pairs += of_text
      owners += [owner] * len(of_text)
    sums = np.zeros(len(requests))
    np.add.at(sums, owners, [found.log_likelihood for found in self._score(pairs)])
    for request, answer in zip(requests, sums.tolist()):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, answer)
    return sums.tolist()

  def generate_until(self, requests: Sequence[Instance]) -> list[str]:
    """Returns the text that continues each context, up to the first of its stop strings."""
    asked = [_Generation(request, self._tokenizer) for request in requests]
    prompts = [
      likelihood.encode_prompt(self._tokenizer, one.context, self._room(one)) for one in asked
    ]
    answers = [''] * len(asked)
    found = decoding.continuations(
      self._params,
      self._config,
      prompts,
      is_done=lambda index, tokens: asked[index].is_done(tokens),
      temperatures=[one.temperature for one in asked],
      batch_tokens=self._batch_tokens,
    )
    for index, tokens in self._shown(found, len(asked), 'Generating'):
      answers[index] = asked[index].text(tokens)
    for request, answer in zip(requests, answers):
      self.cache_hook.add_partial('generate_until', request.args, answer)
    return answers

  def _room(self, one: '_Generation') -> int | None:
    """Returns how many tokens a prompt may have."""
    if self._max_length is None:
      return None
    if one.max_tokens >= self._max_length:
      raise UserError(
        f'--max_length={self._max_length}: a task generates {one.max_tokens} tokens; it must be '
        'more than that'
      )
    return self._max_length - one.max_tokens

  def _score(self, pairs: Sequence[likelihood.Pair]) -> list[likelihood.Likelihood]:
    found = likelihood.likelihoods(
      self._params, self._config, pairs, batch_tokens=self._batch_tokens
    )
    by_index = dict(self._shown(found, len(pairs), 'Scoring'))
    return [by_index[index] for index in range(len(pairs))]

  def _shown(self, found, total: int, what: str):
    return tqdm(found, desc=what, total=total, unit='request', disable=None)


class _Generation:
  """What one request asks to be generated."""

  def __init__(self, request: Instance, tokenizer: Tokenizer):
    self.context, settings = request.args
    self._tokenizer = tokenizer
    until = settings.get('until') or []
    self._until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    length = next((settings[k] for k in ('max_gen_toks', 'max_new_tokens') if k in settings), None)
    self.max_tokens = _MAX_NEW_TOKENS if length is None else int(length)
    samples = settings.get('do_sample', bool(settings.get('temperature')))
    self.temperature = float(settings.get('temperature') or 1.0) if samples else 0.0
    for name, allowed in _FIXED.items():
      if samples and settings.get(name) not in allowed:
        raise UserError(
          f'--harness: task {request.task_name} samples with {name}={settings[name]}; only '
          'temperature is supported'
        )

  def is_done(self, tokens: list[int]) -> bool:
    return (
      len(tokens) >= self.max_tokens
      or self._tokenizer.end_of_text in tokens
      or any(stop in self._tokenizer.decode(tokens) for stop in self._until)
    )

  def text(self, tokens: list[int]) -> str:
    tokens = tokens[: self.max_tokens]
    if self._tokenizer.end_of_text in tokens:
      tokens = tokens[: tokens.index(self._tokenizer.end_of_text)]
    text = self._tokenizer.decode(tokens)
    for stop in self._until:
      text = text.split(stop)[0]
    return text


class _Tasks(TaskManager):
  """The harness's tasks, and those of a folder; what cannot be loaded is one line."""

  def load(self, task_list):
    names = ','.join(map(str, task_list))
    try:
      loaded = super().load(task_list)
    except Exception as error:  # of YAML, of templates, of data sets, of the network
      lines = str(error).splitlines() or ['']
      raise UserError(
        f'--harness={names}: cannot be loaded ({type(error).__name__}: {lines[0]})'
      ) from error
    for name, task in loaded['tasks'].items():
      for attribute, what in (
        ('UNSAFE_CODE', 'runs code that a model wrote'),
        ('MULTIMODAL', 'is not of text'),
      ):
        if getattr(task, attribute, False):
          raise UserError(f'--harness={name}: the task {what}, which is not supported')
    return loaded


def check_model(config: ModelConfig, tokenizer: Tokenizer) -> None:
  """Raises a UserError unless the model reads and writes text, token by token, in these tokens."""
  lm.check_causal(config, '--harness')
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(
      f'--harness: the vocabulary of {config.vocab_size} tokens is not that of tokenizer '
      f'{tokenizer.name}, of {tokenizer.vocab_size}; a model of text is needed'
    )


def find_tasks(names: Sequence[str], include_path: str | None = None) -> tuple[_Tasks, list[str]]:
  """Returns the tasks, groups and tags that names or patterns stand for.

  Args:
    names: Of the harness, or of the folder; patterns as of a shell.
    include_path: A folder with own task files, in YAML.

  Raises:
    UserError: there is no such task or folder.
  """
  if include_path is not None and not pathlib.Path(include_path).is_dir():
    raise UserError(f'--include_path={include_path}: there is no such folder')
  logging.getLogger('lm_eval').setLevel(logging.WARNING)
  # The harness has thousands of task files: seconds, which own tasks need not wait for.
  for include_defaults in (False, True) if include_path else (True,):
    tasks = _Tasks(include_path=include_path, include_defaults=include_defaults)
    missing = [name for name in names if not tasks.match_tasks([name])]
    if not missing:
      return tasks, tasks.match_tasks(list(names))
  close = difflib.get_close_matches(missing[0], tasks.all_tasks, n=5, cutoff=0.5)
  hint = f'; there are, for example: {", ".join(close)}' if close else ''
  raise UserError(f'--harness={missing[0]}: there is no such task{hint}')


def run(
  model: HarnessModel,
  tasks: _Tasks,
  names: Sequence[str],
  *,
  num_fewshot: int | None = None,
  limit: float | int | None = None,
) -> dict[str, Any]:
  """Runs tasks.

  Args:
    model: To be asked.
    tasks: As `find_tasks` returns them.
    names: Of some of them.
    num_fewshot: Examples in front of each document; what each task says if None.
    limit: Documents of each task, or below 1 the share of them; all if None.

  Returns:
    What the harness does, `results` by task among it.

  Raises:
    UserError: a task cannot be loaded.
  """
  # What it prints is no result.
  with contextlib.redirect_stdout(sys.stderr), _one_process():
    return evaluator.simple_evaluate(
      model=model,
      tasks=list(names),
      task_manager=tasks,
      num_fewshot=num_fewshot,
      limit=limit,
      log_samples=False,
    )


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
  """Has the harness start no processes for standard errors: JAX has threads, no fork is safe."""
  name = 'DISABLE_MULTIPROC'
  before = os.environ.get(name)
  os.environ[name] = '1'
  try:
    yield
  finally:
    os.environ.pop(name)
    if before is not None:
      os.environ[name] = before


def scores(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
  """Returns the metrics of each task and group, and their standard errors; None is no number."""
  return {
    task: {
      name: float(value) if math.isfinite(value) else None
      for name, value in metrics.items()
      if isinstance(value, int | float)
    }
    for task, metrics in found['results'].items()
  }


def table(scores: dict[str, dict[str, float | None]]) -> str:
  """Returns a line for each metric of each task, and its standard error."""
  rows = [('task', 'metric', 'value', '')]
  for task, metrics in scores.items():
    for name, value in metrics.items():
      metric, _, which = name.partition(',')
      if which and not metric.endswith('_stderr'):
        error = metrics.get(f'{metric}_stderr,{which}')
        label = metric if which == 'none' else f'{metric} ({which})'
        shown = '-' if value is None else f'{value:.4f}'
        rows.append((task, label, shown, '' if error is None else f'± {error:.4f}'))
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join(
    '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
  )


def as_json(found: dict[str, Any]) -> bytes:
  """Returns all that `run` found, settings of the tasks and versions among it."""
  found = found | {'results': scores(found)}
  return json.dumps(found, indent=2, default=utils.handle_non_serializable).encode() + b'\n'
