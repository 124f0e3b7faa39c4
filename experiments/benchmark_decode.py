r"""Times generation: python experiments/benchmark_decode.py --models=mamba_130m,transformer

A model is a row of experiments/configs/benchmark.py, or FILE.py or FILE.py:ROW. For each batch size
and context it reads random prompts of that length, and then writes --num_tokens tokens by one loop
on the device, --repeats times. Prints milliseconds a token (of all rows together) by context, and
how many prompt tokens are read a second. Before, the logits of a step are compared with those of a
whole sequence, in float32.
"""

import json
import pathlib

from absl import flags

from ssm_moe import command_line

with command_line.loading():
  from ssm_moe.analysis import (
    benchmark_configs,
    benchmark_decode,
    benchmark_profile,
    benchmark_records,
  )
  from ssm_moe.errors import UserError

_ROWS = pathlib.Path(__file__).parent / 'configs' / 'benchmark.py'
_MODELS = flags.DEFINE_list(
  'models',
  ['mamba_130m', 'moe_mamba', 'rom', 'transformer'],
  'Rows of configs/benchmark.py, or FILE.py[:ROW].',
)
_BATCH_SIZES = flags.DEFINE_list('batch_sizes', ['1', '8', '64'], 'Rows that are written together.')
_CONTEXTS = flags.DEFINE_list('contexts', ['1024', '4096', '16384', '65536'], 'Tokens before.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed runs.', lower_bound=1)
_NUM_TOKENS = flags.DEFINE_integer('num_tokens', 128, 'Of a run, each row.', lower_bound=1)
_PREFILL_TOKENS = flags.DEFINE_integer(
  'prefill_tokens', 2**18, 'Prompt tokens that are read at once.', lower_bound=1
)
_UNROLL = flags.DEFINE_integer('unroll', 1, 'Tokens in a pass of the loop.', lower_bound=1)
_SET = flags.DEFINE_multi_string(
  'set', [], 'FIELD=VALUE in every config, such as model.dtype=float32; may be repeated.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Put the records there, a JSON list; others that are there stay.'
)
_PROFILE = flags.DEFINE_string(
  'profile', None, 'Folder for MODEL.json, the kernels of a run, and MODEL.hlo, its program.'
)
# Of the logits in float32, over all layers.
_TOLERANCE = 1e-3


class _WrongStepError(UserError):
  exit_status = 1


def numbers(flag: flags.FlagHolder) -> tuple[int, ...]:
  try:
    values = tuple(int(text) for text in flag.value)
  except ValueError:
    values = ()
  if not values or min(values) < 1:
    raise UserError(f'--{flag.name}={",".join(flag.value)}: it must be whole numbers above 0')
  return values


def write_profile(model: benchmark_decode.Model, settings: benchmark_decode.Settings) -> None:
  """Of the first batch size and context."""
  sizes, folder = (settings.batch_sizes[0], settings.contexts[0]), pathlib.Path(_PROFILE.value)
  (folder / f'{model.name}.hlo').write_text(model.program(*sizes, settings))
  kernels = model.profile(*sizes, settings)
  (folder / f'{model.name}.json').write_text(
    json.dumps(benchmark_profile.breakdown(kernels), indent=1)
  )
  calls = sum(kernel.calls for kernel in kernels) / settings.num_tokens
  print(f'{model.name}: {calls:.1f} kernels a token; of a run of {settings.num_tokens} tokens:')
  print(benchmark_profile.table(kernels, most=40), flush=True)


def main():
  settings = benchmark_decode.Settings(
    batch_sizes=numbers(_BATCH_SIZES),
    contexts=numbers(_CONTEXTS),
    repeats=_REPEATS.value,
    num_tokens=_NUM_TOKENS.value,
    prefill_tokens=_PREFILL_TOKENS.value,
    unroll=_UNROLL.value,
  )
  configs = {
    name: benchmark_configs.load('models', name, _SET.value, rows=_ROWS).model
    for name in _MODELS.value
  }
  earlier = benchmark_records.read('output', _OUTPUT.value)
  if _PROFILE.value is not None:
    command_line.check_output('profile', pathlib.Path(_PROFILE.value) / 'any')
  records = []
  for name, config in configs.items():
    label = name.replace('/', '_').replace(':', '_')
    model = benchmark_decode.Model(label, config)
    error = model.error()
    if not error <= _TOLERANCE:
      raise _WrongStepError(f'{name}: a step is {error:.3g} from the sequence, > {_TOLERANCE}')
    print(f'{name}: {benchmark_decode.shape_of(config)}; a step is {error:.1e} from a sequence')
    for found in model.measure(settings):
      if isinstance(found, str):
        print(found, flush=True)
        continue
      records.append(found | {'relative_error': error if found['pass'] == 'decode' else None})
      said = f'{found["pass"]:8}batch {found["batch_size"]}, context {found["context"]}: '
      said += f'{found["median_ms"]:.4g} ms ({found["min_ms"]:.4g} to {found["max_ms"]:.4g}), '
      print(f'{said}{found["tokens_per_second"]:,.0f} tokens/s', flush=True)
      # After each: what was measured is kept if the run is cut short.
      benchmark_records.write(_OUTPUT.value, earlier, records)
    if _PROFILE.value is not None:
      write_profile(model, settings)
  print(benchmark_decode.table(records))


if __name__ == '__main__':
  command_line.run(main)
