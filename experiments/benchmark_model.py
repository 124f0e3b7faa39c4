r"""Times whole training steps: python experiments/benchmark_model.py --models=mamba_rom,rom

A model is a row of experiments/configs/benchmark.py, or FILE.py or FILE.py:ROW; all rows if none is
named. Tokens are random and on the device, the state's memory is used again by each step, and the
next step is started before the last one is waited for, as in training. Before a time is printed,
loss and gradient norm of the first step are compared with those of the same model in float32.
"""

import dataclasses
import gzip
import json
import pathlib
import runpy
from typing import Any

import jax
import numpy as np
from absl import flags

from ssm_moe import command_line, sharding
from ssm_moe.analysis import benchmark_configs, benchmark_profile, benchmark_records
from ssm_moe.analysis import benchmark_steps as steps_lib
from ssm_moe.config import ExperimentConfig
from ssm_moe.errors import UserError
from ssm_moe.models import accounting
from ssm_moe.training.program import Program

_ROWS = pathlib.Path(__file__).parent / 'configs' / 'benchmark.py'
_MODELS = flags.DEFINE_list('models', None, 'Rows of configs/benchmark.py, or FILE.py[:ROW].')
_SET = flags.DEFINE_multi_string(
  'set', [], 'FIELD=VALUE in every config, such as train.loss_chunk=8192; may be repeated.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Put the records there, a JSON list; others that are there stay.'
)
_REPEATS = flags.DEFINE_integer('repeats', 12, 'Timed steps.', lower_bound=1)
_WARMUP = flags.DEFINE_integer('warmup', 3, 'Steps before them.', lower_bound=1)
_CHECK = flags.DEFINE_bool('check', True, 'Compare the first step with one in float32.')
_PEAK = flags.DEFINE_float(
  'peak_tflops',
  989.0,
  'That the MFU is of; the H100 and H200 have 989 in bfloat16 as published.',
  lower_bound=1e-3,
)
_PROFILE = flags.DEFINE_string(
  'profile', None, 'Folder for MODEL.json, the kernels of a step, and MODEL.hlo.gz, its program.'
)
# Of loss and gradient norm. Routing near a tie is decided otherwise in bfloat16.
_TOLERANCE = 0.05


class _WrongStepError(UserError):
  exit_status = 1


def first_step_error(experiment: ExperimentConfig, batch: dict[str, Any], metrics: Any) -> float:
  """Returns how far loss and gradient norm of the first step are from those in float32."""
  mamba = dataclasses.replace(experiment.model.mamba, scan_implementation='chunked')
  # What is not kept is computed again: else float32 would take twice the memory. Periods in a loop
  # have the same parameters, and compile in a fraction of the time.
  model = dataclasses.replace(
    experiment.model, dtype='float32', remat='period', scan_periods=True, mamba=mamba
  )
  exact = dataclasses.replace(experiment, model=model)
  with jax.default_matmul_precision('highest'):
    program = Program(exact, sharding.make_mesh(exact.mesh))
    state, batch = program.init_state(), program.put(batch)
    expected = program.compile_train_step(state, batch)(state, batch)[1]
  actual, expected = (np.float64([m.loss, m.gradient_norm]) for m in (metrics, expected))
  return float(np.max(np.abs(actual / expected - 1)))  # a NaN stays a NaN


def write_profile(name: str, lowered: jax.stages.Lowered, state: Any, batch: Any) -> None:
  options = benchmark_profile.COMPILER_OPTIONS if jax.default_backend() == 'gpu' else None
  compiled, folder = lowered.compile(compiler_options=options), pathlib.Path(_PROFILE.value)
  hlo = compiled.as_text()
  with gzip.open(folder / f'{name}.hlo.gz', 'wt') as file:
    file.write(hlo)
  kernels = benchmark_profile.trace(compiled, state, batch, hlo=hlo)
  (folder / f'{name}.json').write_text(json.dumps(benchmark_profile.breakdown(kernels), indent=1))
  print(f'{name}\n{benchmark_profile.table(kernels, most=40)}', flush=True)


def benchmark(name: str, experiment: ExperimentConfig) -> dict[str, Any]:
  """Checks, times, prints and returns the record of a model."""
  earlier_peak = steps_lib.device_peak_bytes()
  mesh = sharding.make_mesh(experiment.mesh)
  program = Program(experiment, mesh)
  numbers = steps_lib.synthetic_batch(experiment, seed=0)
  batch = program.put(numbers)
  lowered = program.lower_train_step(program.template, program.batch_template)
  compiled = lowered.compile()
  times, metrics, state = steps_lib.time_steps(
    compiled, program.init_state(), batch, warmup=_WARMUP.value, repeats=_REPEATS.value
  )
  device_peak = steps_lib.device_peak_bytes(before=earlier_peak)
  if not np.isfinite([step.loss for step in metrics]).all():
    raise _WrongStepError(f'{name}: the loss is not finite')
  label = name.replace('/', '_').replace(':', '_')
  if _PROFILE.value is not None:
    write_profile(label, lowered, state, batch)
  del state  # both states would not always fit
  error = None
  if _CHECK.value:
    error = first_step_error(experiment, numbers, metrics[0])
    if not error <= _TOLERANCE:
      raise _WrongStepError(f'{name}: the first step is {error:.3g} from float32, > {_TOLERANCE}')
  record = benchmark_records.make_record(
    times,
    name=label,
    shape=benchmark_configs.shape_of(experiment),
    dtype=experiment.model.dtype,
    implementation='ssm_moe',
    pass_='train_step',
    tokens=numbers['inputs'].size,
    relative_error=error,
    **steps_lib.program_bytes(compiled),
  )
  account = accounting.account(experiment.model, experiment.train.sequence_length)
  rate = account['flops_per_token_train'] * record.tokens_per_second
  loads = [aux.expert_load for aux in metrics[-1].aux.values()]
  more = {
    'first_loss': float(metrics[0].loss),
    'mfu': rate / (1e12 * _PEAK.value * mesh.size),
    'mfu_peak_tflops': _PEAK.value,
    'device_peak_bytes': device_peak,
    'active_params': account['active_params'],
    # In multiples of its share.
    'fullest_expert': max((float(np.max(load)) * load.shape[-1] for load in loads), default=None),
  }
  said = [f'{record.peak_bytes / 2**30:.1f} GiB', *(f'{key} {v}' for key, v in more.items())]
  print(f'\n{benchmark_records.table([record])}\n{", ".join(said)}', flush=True)
  return record.as_dict() | more


def main():
  rows = runpy.run_path(str(_ROWS))
  names = _MODELS.value or list(rows['ROWS'])
  experiments = {n: benchmark_configs.load('models', n, _SET.value, rows=_ROWS) for n in names}
  earlier = benchmark_records.read('output', _OUTPUT.value)
  if _PROFILE.value is not None:
    command_line.check_output('profile', pathlib.Path(_PROFILE.value) / 'any')
  records = {}
  for name, experiment in experiments.items():
    print(f'{name}: {benchmark_configs.shape_of(experiment)}; compiles, then runs', flush=True)
    records[name] = benchmark(name, experiment)
    dense = rows['DENSE'].get(name)
    if dense in records:
      ratio = records[name]['median_ms'] / records[dense]['median_ms']
      records[name]['over_dense'] = ratio
      print(f'{name} takes {ratio:.3f} times as long as {dense}', flush=True)
    # After each model: what was measured is kept if the run is cut short.
    benchmark_records.write(_OUTPUT.value, earlier, list(records.values()))


if __name__ == '__main__':
  command_line.run(main)
