"""Sums over the lanes of a warp by the tensor cores, for the gradients of B and C.

Each of their elements is a sum over all channels, and a warp has 16 channels in its lanes: by
shuffles or through shared memory these sums took longer than all the rest of the backward pass.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def sum_over_lanes(values, factor, later_factor, lane, EXACT: gl.constexpr):
  """Adds each of 8 variables, times a factor, up over 8 lanes, by the tensor cores.

  A matrix unit multiplies [16, K] by [K, 8]: the second matrix is what 32 lanes hold in two
  registers, four lanes to a column; the first is chosen so that row r of the product is the sum of
  variable r. Products are rounded to bfloat16 for it; if EXACT they are taken in two parts of 11
  bits, so that nothing but the last bits of float32 is lost.

  Args:
    values: 8 variables.
    factor, later_factor: Of the first four, and of the others.
    lane: Number of the thread in its warp.

  Returns:
    Of variable lane // 4, the sum over 8 lanes, from 8 (lane % 4).
  """
  zero = gl.zeros_like(values[0])
  total = (zero, zero, zero, zero)
  row = lane // 4
  if EXACT:
    for s in gl.static_range(0, 8, 2):
      first = values[s] * (factor if s < 4 else later_factor)
      second = values[s + 1] * (factor if s < 4 else later_factor)
      chosen = (
        gl.where(row == s, 1.0, 0.0).to(gl.int32, bitcast=True),
        gl.where(row == s + 1, 1.0, 0.0).to(gl.int32, bitcast=True),
      )
      total = _add_product_of_float32(chosen, first - _cut(first), second - _cut(second), total)
      total = _add_product_of_float32(chosen, _cut(first), _cut(second), total)
  else:
    for s in gl.static_range(0, 8, 4):
      # 1.0 in the lower or in the upper half of a register.
      chosen = (
        gl.where(row == s, 0x3F80, gl.where(row == s + 1, 0x3F800000, 0)),
        gl.where(row == s + 2, 0x3F80, gl.where(row == s + 3, 0x3F800000, 0)),
      )
      twice = _pair(factor, factor) if s == 0 else _pair(later_factor, later_factor)
      first = _multiply_pairs(_pair(values[s], values[s + 1]), twice)
      second = _multiply_pairs(_pair(values[s + 2], values[s + 3]), twice)
      total = _add_product_of_pairs(chosen, first, second, total)
  return total[0] + total[1]


@gluon.jit
def _cut(x):
  """The bits of x that a matrix unit reads of a float32."""
  return (x.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)


@gluon.jit
def _pair(low, high):
  """Two numbers as bfloat16 in one register."""
  return gl.inline_asm_elementwise(
    'cvt.rn.bf16x2.f32 $0, $1, $2;', '=r,f,f', [high, low], dtype=gl.int32, is_pure=True, pack=1
  )


@gluon.jit
def _multiply_pairs(a, b):
  return gl.inline_asm_elementwise(
    'mul.rn.bf16x2 $0, $1, $2;', '=r,r,r', [a, b], dtype=gl.int32, is_pure=True, pack=1
  )


@gluon.jit
def _add_product_of_pairs(chosen, first, second, total):
  """[16, 16] times [16, 8]; the lower eight rows stay zero."""
  return gl.inline_asm_elementwise(
    """{
      .reg .b32 zero;
      mov.b32 zero, 0;
      mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {$0, $1, $2, $3}, {$4, zero, $5, zero}, {$6, $7}, {$8, $9, $10, $11};
    }""",
    '=f,=f,=f,=f,r,r,r,r,f,f,f,f',
    [chosen[0], chosen[1], first, second, total[0], total[1], total[2], total[3]],
    dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
    is_pure=True,
    pack=1,
  )


@gluon.jit
def _add_product_of_float32(chosen, first, second, total):
  """[16, 8] times [8, 8]; the lower eight rows stay zero."""
  first = first.to(gl.int32, bitcast=True)
  second = second.to(gl.int32, bitcast=True)
  return gl.inline_asm_elementwise(
    """{
      .reg .b32 zero;
      mov.b32 zero, 0;
      mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
        {$0, $1, $2, $3}, {$4, zero, $5, zero}, {$6, $7}, {$8, $9, $10, $11};
    }""",
    '=f,=f,=f,=f,r,r,r,r,f,f,f,f',
    [chosen[0], chosen[1], first, second, total[0], total[1], total[2], total[3]],
    dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
    is_pure=True,
    pack=1,
  )


@gluon.jit
def sum_over_neighbours(x, NT: gl.constexpr):
  """Adds up what the lanes 4 n to 4 n + 3 have of the same states, where NT share a channel."""
  if NT <= 2:
    x = x + gl.inline_asm_elementwise(
      'shfl.sync.bfly.b32 $0, $1, 1, 31, -1;', '=f,f', [x], dtype=gl.float32, is_pure=False, pack=1
    )
  if NT == 1:
    x = x + gl.inline_asm_elementwise(
      'shfl.sync.bfly.b32 $0, $1, 2, 31, -1;', '=f,f', [x], dtype=gl.float32, is_pure=False, pack=1
    )
  return x
