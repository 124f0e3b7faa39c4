"""Compiles Triton kernels for an H100 or H200 on a machine without a GPU, ptxas included."""

import importlib.util
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.extend
import pytest

from ssm_moe.ops import implementation

needs_triton = pytest.mark.skipif(
  importlib.util.find_spec('jax_triton') is None or sys.version_info < (3, 12),
  reason='jax-triton 0.4 needs Python 3.12',
)


class Kernel(NamedTuple):
  """What ptxas says of a kernel.

  Attributes:
    name: Of the function.
    registers: Of a thread.
    spilled_bytes: Stored to local memory for want of registers, a thread.
    shared_bytes: Of a block.
    ptx: Text.
    cubin: Binary.
  """

  name: str
  registers: int
  spilled_bytes: int
  shared_bytes: int
  ptx: str
  cubin: bytes


def compile_kernels(function, *arguments) -> list[Kernel]:
  """Compiles every kernel that `function` starts on these arguments (arrays or their shapes)."""
  with implementation.compiling_for('gpu'), implementation.on_devices(1):
    jaxpr = jax.make_jaxpr(function)(*arguments)
  return [_compile(eqn) for eqn in _kernel_calls(jaxpr.jaxpr)]


def _kernel_calls(jaxpr):
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'triton_kernel_call':
      yield eqn
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from _kernel_calls(inner)


def _compile(eqn) -> Kernel:
  """As jax-triton compiles it when it lowers a call, up to the driver."""
  import triton
  from jax_triton import triton_lib
  from triton._C.libtriton import ir

  params = eqn.params
  out_avals = [v.aval for v in eqn.outvars]
  leaves = jax.tree_util.tree_flatten_with_path(
    params['in_tree'].unflatten([v.aval for v in eqn.invars]),
    is_leaf=lambda x: isinstance(
      x, triton_lib._StaticArg | triton_lib._OutputPlaceholder | triton_lib.TensorDescriptor
    ),
  )[0]
  structure = jax.tree_util.tree_structure(
    params['in_tree'].unflatten([v.aval for v in eqn.invars]),
    is_leaf=lambda x: isinstance(
      x, triton_lib._StaticArg | triton_lib._OutputPlaceholder | triton_lib.TensorDescriptor
    ),
  )
  values = []
  for _, leaf in leaves:
    if isinstance(leaf, triton_lib._OutputPlaceholder):
      leaf = out_avals[leaf.ordinal]
    elif isinstance(leaf, triton_lib._StaticArg):
      leaf = leaf.value
    values.append(leaf)
  target = triton.backends.compiler.GPUTarget('cuda', 90, 32)
  backend = triton.compiler.make_backend(target)
  fn = triton_lib.TritonFunction(params['fn'])
  spec = triton_lib.KernelSpecialization.build(
    fn.non_constexpr_param_names,
    values,
    [triton_lib.get_type_id(value) for value in values],
    structure,
    [tuple(k.idx for k in path) for path, _ in leaves],
    dict(params['metaparams']),
    backend,
  )
  options = backend.parse_options(dict(params['backend_options']))
  context = ir.context()
  ir.load_dialects(context)
  backend.load_dialects(context)
  is_gluon = isinstance(fn.fn, triton_lib.gl_runtime.GluonJITFunction)
  source_class = triton_lib.gl_runtime.GluonASTSource if is_gluon else triton_lib.tc.ASTSource
  module = source_class(fn.fn, spec.signature, spec.constants, spec.attrs).make_ir(
    target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
  )
  result = triton_lib.compile_ttir_inplace(module, backend, options, target)
  return _assemble(result.name, result.binary, result.shared_mem_bytes)


def _assemble(name: str, ptx: str, shared_bytes: int) -> Kernel:
  from triton.backends.nvidia.compiler import get_ptxas

  with (
    tempfile.NamedTemporaryFile('w', suffix='.ptx') as source,
    tempfile.NamedTemporaryFile(suffix='.cubin') as binary,
  ):
    source.write(ptx)
    source.flush()
    command = [get_ptxas(90).path, '-lineinfo', '-v', '--gpu-name=sm_90a', source.name, '-o']
    said = subprocess.run([*command, binary.name], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    cubin = binary.read()
  spilled = re.search(r'(\d+) bytes spill stores', said.stderr)
  return Kernel(
    name=name,
    registers=int(re.search(r'Used (\d+) registers', said.stderr)[1]),
    spilled_bytes=int(spilled[1]) if spilled else 0,
    shared_bytes=shared_bytes,
    ptx=ptx,
    cubin=cubin,
  )
