r"""Says what a trained model's routers decide: which experts, for every token and layer.

python experiments/audit_routing.py --checkpoint=runs/quickstart --input=text.txt \
  --output=routes.jsonl --inject=all:0.1

Runs the newest checkpoint over whole documents, each from an empty state that is carried to its
end. A table of the layers goes to standard error; the last line on standard output is a JSON
object. --output writes a row for each token and layer; a later call with --replay=routes.jsonl, on
the same checkpoint and input, gives the model those decisions in place of its own, and reports the
largest difference in any logit, which is 0 where the record is whole. --inject=LAYER:RATE sends a
share of a layer's tokens to random other experts, while all other decisions stay as they were, and
reports the loss; LAYER is a number or name of the table, or all. --fallback_sweep=sweep.png tries
thresholds below which a token takes the shared expert, or for Routing Mamba the mean expert.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from ssm_moe import command_line, config
from ssm_moe.analysis import audit, fallback, plots, routing, routing_record
from ssm_moe.analysis.documents import Documents, Windows
from ssm_moe.data import text, tokenizer
from ssm_moe.errors import UserError
from ssm_moe.models import lm
from ssm_moe.shapes import PyTree
from ssm_moe.training import trained
from ssm_moe.training import workdir as workdir_lib
from ssm_moe.training.metrics import routing_statistics

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A folder that train.py wrote.')
_INPUT = flags.DEFINE_string(
  'input', None, f'A file ({", ".join(text.SUFFIXES)}), a folder or a glob.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'Write every decision there: .jsonl or .parquet.')
_REPLAY = flags.DEFINE_string('replay', None, 'A record whose decisions are given back.')
_INJECT = flags.DEFINE_multi_string('inject', [], 'LAYER:RATE or all:RATE; may be repeated.')
_SWEEP = flags.DEFINE_string('fallback_sweep', None, 'Try thresholds; draw them: a PNG file.')
_TOLERANCE = flags.DEFINE_float(
  'fallback_tolerance', 0.01, 'Rise of the loss, in nats a token, that a threshold may cost.'
)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', None, 'Of the input; all if not given.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the injected routes.')

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
  encoder: tokenizer.Tokenizer,
  windows: Windows,
) -> dict[str, Any]:
  """Returns what a record is made of."""
  settings = json.dumps(config.to_dict(experiment.model), sort_keys=True)
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
  return {
    'config': hashlib.sha256(settings.encode()).hexdigest(),
    'parameters': digest.hexdigest(),
    'tokenizer': encoder.sha256,
    'input': windows.documents.sha256,
    'window': [windows.lanes, experiment.train.sequence_length],
    'step': step,
  }


def check_flags() -> list[audit.Injection]:
  """Looks at every flag before the work begins; returns what is to be injected."""
  for flag in (_CHECKPOINT, _INPUT):
    if not flag.value:
      raise UserError(f'--{flag.name} is not given')
  if _MAX_TOKENS.value is not None and _MAX_TOKENS.value < 1:
    raise UserError(f'--max_tokens={_MAX_TOKENS.value}: it must be at least 1')
  if _SEED.value < 0:
    raise UserError(f'--seed={_SEED.value}: it must not be negative')
  if not _TOLERANCE.value >= 0:
    raise UserError(f'--fallback_tolerance={_TOLERANCE.value}: it must not be negative')
  for flag in (_OUTPUT, _REPLAY):
    if flag.value is not None:
      routing_record.check_name(flag.name, flag.value)
  if _SWEEP.value is not None and not _SWEEP.value.endswith('.png'):
    raise UserError(f'--fallback_sweep={_SWEEP.value}: the name must end in .png')
  for flag in (_OUTPUT, _SWEEP):
    if flag.value is not None:
      if os.path.lexists(flag.value):
        raise UserError(f'--{flag.name}={flag.value} is there already; give another name')
      command_line.check_output(flag.name, flag.value)
  return [audit.parse_injection(asked) for asked in _INJECT.value]


def read_record(
  path: str, header: dict[str, Any], documents: Documents, layers: list[routing.Layer]
) -> routing_record.Record:
  """Reads the record to be replayed.

  Raises:
    UserError: it is damaged, or of another model or input.
  """
  there, rows = routing_record.read(path)
  for key, difference in _IDENTITY.items():
    if there.get(key) != header[key]:
      raise UserError(f'--replay={path} was not made of this checkpoint and input: {difference}')
  return routing_record.Record(path, rows, documents, layers)


def main() -> None:
  injections = check_flags()
  workdir = pathlib.Path(_CHECKPOINT.value)
  experiment = workdir_lib.read_config(workdir)
  lm.check_causal(experiment.model, 'the audit')
  if _SWEEP.value is not None:
    fallback.check(experiment.model)
  if _REPLAY.value is not None:
    routing_record.read(_REPLAY.value)
  encoder = tokenizer.load_tokenizer(experiment.data.tokenizer)
  if encoder.vocab_size > experiment.model.vocab_size:
    raise UserError(
      f'--checkpoint={workdir}: its vocabulary of {experiment.model.vocab_size} tokens is not that '
      f'of tokenizer {encoder.name}; a model of text is needed'
    )
  files = text.find_files(_INPUT.value)
  params, step = trained.read_params(workdir, experiment)
  tracer = routing.Tracer(params, experiment.model)
  if not tracer.layers:
    raise UserError(f'--checkpoint={workdir}: the model has no routed layer')
  injected = [audit.Injected(tracer, injection, seed=_SEED.value) for injection in injections]
  documents = Documents(
    text.read_documents(files, experiment.data.text_field), encoder, max_tokens=_MAX_TOKENS.value
  )
  windows = _windows(experiment, documents)
  header = header_of(experiment, params, step, encoder, windows)
  replay = None
  if _REPLAY.value is not None:
    replay = audit.Replay(tracer, read_record(_REPLAY.value, header, documents, tracer.layers))

  totals, own_pass = routing.Totals(tracer.layers), tracer.start()
  top_weights = fallback.TopWeights(experiment.model, tracer.layers)

  def run(write=None) -> None:
    for window in tqdm(windows, desc='Auditing', unit='window', disable=None):
      own = own_pass.run(window)
      totals.add(window, own)
      if write is not None:
        write(routing_record.rows(window, own, tracer.layers, spelled))
      if _SWEEP.value is not None:
        top_weights.add(window.real, own)
      for part in (*([replay] if replay else []), *injected):
        part.add(window, own)

  spelled = routing_record.printable(encoder)
  if _OUTPUT.value is None:
    run()
  else:
    with routing_record.writer(_OUTPUT.value, header) as write:
      run(write)

  layers = _summaries(totals)
  print(_table(layers), file=sys.stderr)
  result = {
    'checkpoint': str(workdir),
    'step': step,
    'documents': len(documents),
    'last_document_cut': documents.cut,
    'tokens': totals.tokens,
    'loss': totals.loss,
    'bits_per_byte': _bits_per_byte(totals.nats, documents.num_bytes),
    'layers': layers,
    'replay': replay.result() if replay else None,
    'injections': [part.result(totals) for part in injected],
  }
  if _SWEEP.value is not None:
    thresholds = top_weights.thresholds()
    result['fallback'] = _sweep(params, experiment.model, windows, thresholds, totals.loss)
  print(json.dumps(result, allow_nan=False))


def _windows(experiment: config.ExperimentConfig, documents: Documents) -> Windows:
  groups = experiment.model.moe.router_groups if 'E' in experiment.model.layers else 1
  lanes, length = experiment.train.batch_size, experiment.train.sequence_length
  # Router groups divide the tokens of a whole batch.
  return Windows(
    documents, lanes=min(lanes, len(documents)) if groups == 1 else lanes, length=length
  )


def _bits_per_byte(nats: float, num_bytes: int) -> float | None:
  return nats / math.log(2) / num_bytes if num_bytes else None


def _summaries(totals: routing.Totals) -> list[dict[str, Any]]:
  statistics = routing_statistics(totals.loads())
  return [
    summary | {key: values[i] for key, values in statistics.items()}
    for i, summary in enumerate(totals.summary())
  ]


def _table(layers: list[dict[str, Any]]) -> str:
  width = max(len(layer['name']) for layer in layers)
  lines = [
    f'{"layer":{width}}  experts  balance  most loaded   dead  dropped  fallback  top weight',
  ]
  for layer in layers:
    experts = len(layer['expert_load'])
    most = f'{max(layer["expert_load"]) * experts:.2f}/{experts}'
    lines.append(
      f'{layer["name"]:{width}}  {experts:7d}  {layer["expert_load_entropy"]:7.1%}  {most:>11}  '
      f'{layer["dead_experts"]:5d}  {layer["dropped_fraction"]:7.2%}  '
      f'{layer["fallback_fraction"]:8.2%}  {layer["top_weight"]:10.3f}'
    )
  return '\n'.join(lines)


def _sweep(params, model, windows, thresholds, base_loss) -> dict[str, Any]:
  print(f'trying {len(thresholds)} fallback thresholds ...', file=sys.stderr, flush=True)
  points = fallback.sweep(params, model, windows, thresholds, base_loss=base_loss)
  chosen = fallback.choose(points, _TOLERANCE.value)
  plots.plot_fallback(
    [(point.fallback_fraction, point.loss_rise, point.threshold) for point in points],
    _SWEEP.value,
    tolerance=_TOLERANCE.value,
    chosen=None if chosen is None else chosen.threshold,
  )
  return {
    'plot': _SWEEP.value,
    'base_loss': base_loss,
    'tolerance': _TOLERANCE.value,
    'points': [dataclasses.asdict(point) for point in points],
    # 0: no threshold that was tried is cheap enough.
    'chosen_threshold': 0.0 if chosen is None else chosen.threshold,
  }


if __name__ == '__main__':
  command_line.run(main)
