"""Every kernel is counted once, and has its class by its name or its place in the program."""

import gzip
import json

import pytest

from ssm_moe.analysis import benchmark_profile

_LAYER = 'jit(train_step)/jvp(LM)/while/body/closed_call/periods/layer_mamba_0/layer_mamba_0.mix'
_HLO = f"""
ENTRY %main (a: f32[8]) -> f32[8] {{
  %loop_add_fusion.2 = f32[8]{{0}} fusion(%a), kind=kLoop, metadata={{op_name="{_LAYER}/add"}}
  ROOT %custom-call.7 = f32[8] custom-call(%b), metadata={{op_name="{_LAYER}/out_proj/dot_general"}}
}}
"""


def _write(folder, events):
  path = folder / 'plugins' / 'profile' / 'now' / 'host.trace.json.gz'
  path.parent.mkdir(parents=True)
  with gzip.open(path, 'wt') as file:
    json.dump({'traceEvents': events}, file)


def _line(pid, process, tid, thread):
  return [
    {'ph': 'M', 'pid': pid, 'name': 'process_name', 'args': {'name': process}},
    {'ph': 'M', 'pid': pid, 'tid': tid, 'name': 'thread_name', 'args': {'name': thread}},
  ]


def _event(pid, tid, name, start, microseconds, **args):
  event = {'ph': 'X', 'pid': pid, 'tid': tid, 'name': name, 'ts': start, 'dur': microseconds}
  return event | {'args': args}


def test_a_gpu_has_its_kernels_in_streams(tmp_path):
  _write(
    tmp_path,
    [
      *_line(1, '/device:GPU:0', 10, 'Stream #10(Compute)'),
      *_line(1, '/device:GPU:0', 11, 'XLA Ops'),
      *_line(2, '/host:CPU', 20, 'python'),
      # A stream runs one after the other, whatever the clock says.
      _event(1, 10, 'loop_add_fusion_2', 0, 2000, tf_op='XlaModule:'),
      _event(1, 10, 'nvjet_tst_128x256', 1999.9, 6000, hlo_op='custom-call.7'),
      _event(1, 10, 'loop_add_fusion_2', 9000, 4000),
      # These sum up what is above, or are not on the device.
      _event(1, 11, 'custom-call.7', 2000, 6000, hlo_op='custom-call.7'),
      _event(2, 20, 'python', 0, 90_000, hlo_op='loop_add_fusion.2'),
    ],
  )
  kernels = benchmark_profile.read_kernels(tmp_path, steps=2, hlo=_HLO)
  assert [(k.name, k.kind, k.milliseconds, k.calls) for k in kernels] == [
    ('loop_add_fusion_2', 'conv', 3.0, 1.0),
    ('nvjet_tst_128x256', 'matmul', 3.0, 0.5),
  ]
  assert kernels[0].op_name == f'{_LAYER}/add'
  found = benchmark_profile.breakdown(kernels)
  assert (found['milliseconds'], found['by_class']) == (6.0, {'conv': 3.0, 'matmul': 3.0})
  head, *_, last = benchmark_profile.table(kernels, most=1).splitlines()
  assert head.split()[0] == '6.000' and 'loop_add_fusion_2' in last


def test_what_contains_others_counts_for_the_rest(tmp_path):
  _write(
    tmp_path,
    [
      *_line(2, '/host:CPU', 20, 'tf_XLAEigen'),
      _event(2, 20, 'while.1', 0, 10_000, hlo_op='while.1'),
      _event(2, 20, 'add.1', 1000, 4000, hlo_op='add.1'),
      _event(2, 20, 'add.1', 5000, 3000, hlo_op='add.1'),
      _event(2, 20, 'add.1', 10_000, 1000, hlo_op='add.1'),
    ],
  )
  kernels = benchmark_profile.read_kernels(tmp_path, steps=1)
  assert {k.name: k.milliseconds for k in kernels} == {'while.1': 3.0, 'add.1': 8.0}


@pytest.mark.parametrize(
  ('kind', 'name', 'place'),
  [
    ('cross entropy', 'sm90_xmma_gemm', 'jit(train_step)/jvp()/while/body/blm,mv->blv/dot_general'),
    ('cross entropy', 'fusion', 'jit(train_step)/transpose(jvp())/mul'),
    ('scan', 'backward', f'{_LAYER}/triton_kernel_call'),
    ('scan', 'fusion', f'{_LAYER}/while/body/add'),
    ('scan', 'carry', f'{_LAYER}/triton_kernel_call'),
    ('conv', 'conv_backward', f'{_LAYER}/triton_kernel_call'),
    ('cross entropy', 'cross_entropy_of_rows', ''),
    ('grouped matmul', 'gradient_kernel', f'{_LAYER}/out_proj/triton_kernel_call'),
    ('matmul', 'fusion', f'{_LAYER}/out_proj/blm,m...->bl.../dot_general'),
    ('gather, scatter, sort', 'fusion', f'{_LAYER}/out_proj/gather'),
    ('gather, scatter, sort', 'fusion', 'jit(train_step)/transpose(jvp(LM))/LM._embed/scatter-add'),
    (
      'stacks over layers',
      'fusion',
      'jit(train_step)/jvp(LM)/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice',
    ),
    ('norm', 'fusion', 'jit(train_step)/transpose(jvp(LM))/while/body/periods/norm_mamba_0/mul'),
    ('conv', 'fusion', f'{_LAYER}/jit(silu)/mul'),
    ('optimizer', 'fusion', 'jit(train_step)/sqrt'),
    ('optimizer', 'fusion', 'jit(train_step)/jit(clip)/min'),
    ('copy', 'MemcpyD2D', ''),
    ('other', 'fusion', f'{_LAYER}/out_proj/out_proj._kernel/convert_element_type'),
    ('other', 'fusion', ''),
  ],
)
def test_classes(kind, name, place):
  assert benchmark_profile.classify(name, place) == kind


def test_no_trace_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='there is no trace'):
    benchmark_profile.read_kernels(tmp_path, steps=1)
  _write(tmp_path, _line(2, '/host:CPU', 20, 'python'))
  with pytest.raises(ValueError, match='nothing in it ran on a device'):
    benchmark_profile.read_kernels(tmp_path, steps=1)
