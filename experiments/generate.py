r"""Writes text with a trained model.

python experiments/generate.py --checkpoint=runs/quickstart --prompt='def scan(' --temperature=0.7
python experiments/generate.py --checkpoint=runs/quickstart --save_state=book.npz < book.txt
python experiments/generate.py --checkpoint=runs/quickstart --load_state=book.npz

A prompt begins a document; without --prompt it is all of standard input. What is written after it
goes to standard output as it comes. Of several prompts (--prompts_file: one a line, or .jsonl with
a field `prompt`) or samples, each is a line of JSON with prompt, sample, text, tokens and end
(end_of_text, stop or max_tokens), as soon as it and all before it are there. --save_state keeps
where the document is, in a file of the same size however long it was; --load_state goes on from
there, with a prompt or without. What a sample becomes depends on its prompt, its number and --seed.
"""

import json
import pathlib
import sys
import time

from absl import flags

from ssm_moe import command_line

with command_line.loading():
  from ssm_moe.data import tokenizer
  from ssm_moe.errors import UserError
  from ssm_moe.inference import prompts, samples, saved_state, writer
  from ssm_moe.inference.sampling import Sampling
  from ssm_moe.training import trained
  from ssm_moe.training import workdir as workdir_lib

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A folder that train.py wrote.')
_PROMPT = flags.DEFINE_string('prompt', None, 'What comes before; standard input if not given.')
_PROMPTS_FILE = flags.DEFINE_string('prompts_file', None, 'Many: a line each, or .jsonl.')
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'For each prompt.')
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, '0 takes the likeliest token.')
_TOP_K = flags.DEFINE_integer('top_k', None, 'Draw from so many tokens only, the likeliest.')
_TOP_P = flags.DEFINE_float('top_p', None, 'Draw from the likeliest with this much probability.')
_STOP = flags.DEFINE_multi_string('stop', [], 'End before this text; may be repeated.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the draws.')
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 256, 'That are written of each sample.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 64, 'Samples that are written together.')
_SAVE_STATE = flags.DEFINE_string('save_state', None, 'Keep where the document is: a new file.')
_LOAD_STATE = flags.DEFINE_string('load_state', None, 'Go on from what --save_state kept.')


def check_flags() -> Sampling:
  """Looks at every flag before the work begins; returns how tokens are drawn."""
  if not _CHECKPOINT.value:
    raise UserError('--checkpoint is not given')
  for flag, least in ((_NUM_SAMPLES, 1), (_BATCH_SIZE, 1), (_SEED, 0), (_MAX_TOKENS, 0)):
    if not least <= flag.value < 2**31:
      raise UserError(f'--{flag.name}={flag.value}: it must be {least} to {2**31 - 1}')
  if '' in _STOP.value:
    raise UserError('--stop= is empty; it must be the text to end before')
  if _PROMPT.value is not None and _PROMPTS_FILE.value is not None:
    raise UserError('--prompt and --prompts_file are both given; give one of them')
  if _SAVE_STATE.value is not None:
    if _NUM_SAMPLES.value > 1 or _PROMPTS_FILE.value is not None:
      raise UserError('--save_state keeps one document; give one prompt, and --num_samples=1')
    command_line.check_new_output('save_state', _SAVE_STATE.value)
  elif not _MAX_TOKENS.value:
    raise UserError('--max_tokens=0 writes nothing; give --save_state to keep what was read')
  try:
    return Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value)
  except UserError as error:
    raise UserError(f'--{error}') from None


def asked() -> list[str]:
  if _PROMPTS_FILE.value is not None:
    return prompts.read_file('prompts_file', _PROMPTS_FILE.value)
  if _PROMPT.value is not None or _LOAD_STATE.value is not None:
    return [_PROMPT.value or '']
  return [prompts.read_standard_input()]


def write_lines(model, encoder, request: samples.Request, texts: list[str]) -> int:
  """Writes each sample as a line, in order; returns the number of tokens."""
  waiting, following, written = {}, 0, 0
  for sample, _ in samples.write(model, encoder, request):
    if sample.end is None:
      continue
    waiting[sample.number], written = sample, written + sample.num_tokens
    while following in waiting:
      done = waiting.pop(following)
      prompt, number = divmod(following, _NUM_SAMPLES.value)
      line = {'prompt': texts[prompt], 'sample': number, 'text': done.text}
      print(json.dumps(line | {'tokens': done.num_tokens, 'end': done.end}), flush=True)
      following += 1
  return written


def write_text(model, encoder, request: samples.Request, identity: str | None) -> int:
  """Writes the one sample as it comes, and what is to be kept; returns the number of tokens."""
  written, keep = 0, bool(_SAVE_STATE.value)
  for sample, piece, document in samples.write_document(model, encoder, request, keep=keep):
    print(prompts.printable(piece), end='', flush=True)
    written = sample.num_tokens
    if document:
      saved_state.save(_SAVE_STATE.value, document, model.config, identity)
  print(end='\n' if request.max_tokens else '', flush=True)
  if keep:
    print(f'{document.num_tokens} tokens are kept in {_SAVE_STATE.value}', file=sys.stderr)
  return written


def main() -> None:
  sampling = check_flags()
  workdir = pathlib.Path(_CHECKPOINT.value)
  experiment = workdir_lib.read_config(workdir)
  encoder = tokenizer.load_tokenizer(experiment.data.tokenizer)
  if encoder.vocab_size > experiment.model.vocab_size:
    raise UserError(
      f'--checkpoint={workdir}: its vocabulary of {experiment.model.vocab_size} tokens is not that '
      f'of tokenizer {encoder.name}; a model of text is needed'
    )
  texts = asked()
  params, _ = trained.read_params(workdir, experiment)
  model = writer.prepare(params, experiment.model)
  document, identity = None, None
  if _SAVE_STATE.value is not None or _LOAD_STATE.value is not None:
    identity = saved_state.fingerprint(params, encoder.sha256)
  if _LOAD_STATE.value is not None:
    document = saved_state.load(_LOAD_STATE.value, model.config, identity)
  # Of a document that goes on, the last token has yet to be read.
  begin = encoder.end_of_text if document is None else document.token
  read = [[begin, *map(int, encoder.encode(text))] for text in texts]
  request = samples.Request(
    prompts=[prompt for prompt in read for _ in range(_NUM_SAMPLES.value)],
    sampling=sampling,
    seed=_SEED.value,
    max_tokens=_MAX_TOKENS.value,
    stop=_STOP.value,
    batch_size=_BATCH_SIZE.value,
    document=document,
  )

  start = time.perf_counter()
  sys.stdout.reconfigure(errors='replace')  # letters that the terminal's encoding lacks
  if len(request.prompts) > 1 or _PROMPTS_FILE.value is not None:
    written = write_lines(model, encoder, request, texts)
  else:
    written = write_text(model, encoder, request, identity)
  seconds = time.perf_counter() - start
  print(f'{written} tokens in {seconds:.1f} s, compilation included', file=sys.stderr)


if __name__ == '__main__':
  command_line.run(main)
