"""Says what a trained model's routers decide: which experts, for every token and layer.

python experiments/audit_routing.py --checkpoint=runs/quickstart --input=text.txt --inject=all:0.1

Runs the newest checkpoint over whole documents, each from an empty state that is carried to its
end. What was found goes to standard error; the last line on standard output is a JSON object.
--output writes a row for each token and layer; a later call with --replay=routes.jsonl, on the same
checkpoint and input, gives the model those decisions in place of its own, and reports the largest
difference in any logit: 0 if the record is unchanged. --inject=LAYER:RATE sends a share of a
layer's tokens to random other experts, all other decisions staying as they were, and reports the
loss; LAYER is a number or name of the table, or all. --fallback_sweep=sweep.png tries thresholds
below which a token takes the shared expert, or for Routing Mamba the mean expert.
"""

import contextlib
import json
import math
import pathlib
import sys

from absl import flags

from ssm_moe import command_line

with command_line.loading():
  from tqdm import tqdm

  from ssm_moe.analysis import audit, fallback, provenance, routing, routing_record
  from ssm_moe.analysis.documents import Documents
  from ssm_moe.analysis.replay import Record
  from ssm_moe.data import text, tokenizer
  from ssm_moe.errors import UserError
  from ssm_moe.models import lm
  from ssm_moe.training import trained
  from ssm_moe.training import workdir as workdir_lib

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
      command_line.check_new_output(flag.name, flag.value)
  return [audit.parse_injection(asked) for asked in _INJECT.value]


def main() -> None:
  injections = check_flags()
  workdir = pathlib.Path(_CHECKPOINT.value)
  experiment = workdir_lib.read_config(workdir)
  lm.check_causal(experiment.model, 'the audit')
  if _SWEEP.value is not None:
    fallback.check(experiment.model)
  recorded, rows = routing_record.read(_REPLAY.value) if _REPLAY.value is not None else (None, None)
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
  windows = audit.make_windows(experiment, documents)
  header = provenance.header_of(experiment, params, step, encoder, windows)
  replay = None
  if recorded is not None:
    provenance.check_same(_REPLAY.value, recorded, header)
    record = Record(_REPLAY.value, rows, documents, tracer.layers)
    replay = audit.Replay(tracer, record)

  totals, own_pass = routing.Totals(tracer.layers), tracer.start()
  top_weights = fallback.TopWeights(experiment.model, tracer.layers)
  with contextlib.ExitStack() as stack:
    write = None
    if _OUTPUT.value is not None:
      write = stack.enter_context(routing_record.writer(_OUTPUT.value, header))
    spelled = routing_record.printable(encoder)
    for window in tqdm(windows, desc='Auditing', unit='window', disable=None):
      own = own_pass.run(window)
      totals.add(window, own)
      if _SWEEP.value is not None:
        top_weights.add(window.real, own)
      if write is not None:
        write(routing_record.rows(window, own, tracer.layers, spelled))
      for part in (*([replay] if replay else []), *injected):
        part.add(window, own)

  layers = audit.summaries(totals)
  print(audit.table(layers), file=sys.stderr)
  for part in (*([replay] if replay else []), *injected):
    print(part.sentence(totals), file=sys.stderr)
  num_bytes = documents.num_bytes
  result = {
    'checkpoint': str(workdir),
    'step': step,
    'documents': len(documents),
    'last_document_cut': documents.cut,
    'tokens': totals.tokens,
    'loss': totals.loss,
    'bits_per_byte': totals.nats / math.log(2) / num_bytes if num_bytes else None,
    'layers': layers,
    'replay': replay.result() if replay else None,
    'injections': [part.result(totals) for part in injected],
  }
  if _SWEEP.value is not None:
    thresholds = top_weights.thresholds()
    print(f'trying {len(thresholds)} fallback thresholds ...', file=sys.stderr, flush=True)
    base, tolerance = totals.loss, _TOLERANCE.value
    points = fallback.sweep(params, experiment.model, windows, thresholds, base_loss=base)
    result['fallback'] = fallback.report(points, base, tolerance, plot=_SWEEP.value)
    print(fallback.sentence(points, tolerance), file=sys.stderr)
  print(json.dumps(result, allow_nan=False))


if __name__ == '__main__':
  command_line.run(main)
