"""The cross entropy of rows of logits on a GPU, in Gluon. `triton_gpu` starts it.

A program takes one row after the other, from global memory into shared memory, by asynchronous
copies that each thread makes of what it will read itself. A first sweep over the row finds its
largest number and the sum of exponentials, each thread for its own columns until the end; a second
sweep writes the gradient. As soon as a part of the row has been read for the last time, the copy of
the next row's begins, so that memory is never idle.

The numbers of a row come in vectors: four consecutive columns for each thread.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)
# Below all numbers but -inf, from which it can be subtracted.
_LOWEST = gl.constexpr(-3.4028234663852886e38)


@gluon.constexpr_function
def _parts(columns, vector, vectors):
  """Number of parts of a row, each of so many vectors."""
  return -(-columns // (vector * vectors))


@gluon.constexpr_function
def _end(part, columns, vector, vectors):
  """The vector after the last of a part."""
  return min((part + 1) * vectors, -(-columns // vector))


@gluon.jit
def _exp2(x):
  return gl.inline_asm_elementwise(
    'ex2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=gl.float32, is_pure=True, pack=1
  )


@gluon.jit
def _copy_part(rows, row_ptr, g, there, column, quad, V: gl.constexpr, VECTOR: gl.constexpr,
               VECTORS: gl.constexpr):  # fmt: skip
  """Starts the copy of part g of a row, if it is there."""
  for j in gl.static_range(g * VECTORS, _end(g, V, VECTOR, VECTORS)):
    mask = there & (quad < V - j * VECTOR)
    async_copy.async_load(rows.index(j), row_ptr + j * VECTOR + column, mask=mask)


@gluon.jit
def _read_part(rows, g, column, V: gl.constexpr, VOCAB: gl.constexpr, VECTOR: gl.constexpr,
               VECTORS: gl.constexpr):  # fmt: skip
  """Reads the vectors of part g; what is no token is -inf."""
  values = ()
  for j in gl.static_range(g * VECTORS, _end(g, V, VECTOR, VECTORS)):
    x = rows.index(j).load(column.type.layout)
    if (j + 1) * VECTOR > VOCAB:
      x = gl.where(column < VOCAB - j * VECTOR, x, float('-inf'))
    values = values + (x,)
  return values


@gluon.jit
def cross_entropy_of_rows(
  logits_ptr, targets_ptr, weights_ptr, losses_ptr, d_logits_ptr,
  T: gl.constexpr, V: gl.constexpr, VOCAB: gl.constexpr, W: gl.constexpr, VECTORS: gl.constexpr,
  PROGRAMS: gl.constexpr,
):  # fmt: skip
  """Gives losses, and the gradient if it has a place.

  Args:
    logits_ptr: [T, V], float32; V a multiple of 4.
    targets_ptr, weights_ptr, losses_ptr: [T], int32 and float32.
    d_logits_ptr: [T, V].
  """
  THREADS: gl.constexpr = 32 * W
  VECTOR: gl.constexpr = 4 * THREADS
  PARTS: gl.constexpr = _parts(V, VECTOR, VECTORS)
  tile: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [W, 1], [1, 0])
  of_thread: gl.constexpr = gl.SliceLayout(1, tile)
  flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

  quad = 4 * gl.arange(0, THREADS, layout=of_thread)[:, None]
  column = quad + gl.arange(0, 4, layout=gl.SliceLayout(0, tile))[None, :]
  rows = gl.allocate_shared_memory(gl.float32, [(V + VECTOR - 1) // VECTOR, THREADS, 4], flat)

  first = gl.program_id(0)
  for g in gl.static_range(PARTS):
    _copy_part(rows, logits_ptr + first.to(gl.int64) * V, g, True, column, quad, V, VECTOR, VECTORS)
    async_copy.commit_group()
  target = gl.load(targets_ptr + first)
  weight = gl.load(weights_ptr + first)

  for row in range(first, T, PROGRAMS):
    place = row.to(gl.int64) * V
    is_token = (target >= 0) & (target < VOCAB)
    chosen = gl.load(logits_ptr + place + target, mask=is_token, other=float('nan'))
    # A row ahead, since the address of `chosen` waits for it.
    more = row + PROGRAMS < T
    next_target = gl.load(targets_ptr + row + PROGRAMS, mask=more, other=0)
    next_weight = gl.load(weights_ptr + row + PROGRAMS, mask=more, other=0.0)
    next_ptr = logits_ptr + place + PROGRAMS * V

    top = gl.full([THREADS], _LOWEST, gl.float32, layout=of_thread)
    total = gl.zeros([THREADS], gl.float32, layout=of_thread)
    for g in gl.static_range(PARTS):
      if d_logits_ptr is None:
        async_copy.wait_group(PARTS - 1)  # of this row's parts those after, of the next's before
      else:
        async_copy.wait_group(PARTS - 1 - g)
      values = _read_part(rows, g, column, V, VOCAB, VECTOR, VECTORS)
      if d_logits_ptr is None:
        _copy_part(rows, next_ptr, g, more, column, quad, V, VECTOR, VECTORS)
        async_copy.commit_group()
      largest = values[0]
      for i in gl.static_range(1, len(values)):
        largest = gl.maximum(largest, values[i])
      new_top = gl.maximum(top, gl.max(largest, 1))
      exps = _exp2((values[0] - new_top[:, None]) * _LOG2_E)
      for i in gl.static_range(1, len(values)):
        exps = exps + _exp2((values[i] - new_top[:, None]) * _LOG2_E)
      total = total * _exp2((top - new_top) * _LOG2_E) + gl.sum(exps, 1)
      top = new_top

    row_top = gl.max(top, 0)
    row_total = gl.sum(total * _exp2((top - row_top) * _LOG2_E), 0)
    loss = (row_top - chosen + gl.log2(row_total) * _LN_2) * weight
    gl.store(losses_ptr + row, loss)

    if d_logits_ptr is not None:
      factor = weight / row_total
      for g in gl.static_range(PARTS):
        values = _read_part(rows, g, column, V, VOCAB, VECTOR, VECTORS)
        _copy_part(rows, next_ptr, g, more, column, quad, V, VECTOR, VECTORS)
        async_copy.commit_group()
        for i in gl.static_range(len(values)):
          start = (g * VECTORS + i) * VECTOR
          probs = _exp2((values[i] - row_top) * _LOG2_E) * factor
          d = probs - gl.where(column == target - start, weight, 0.0)
          gl.store(
            d_logits_ptr + place + start + column,
            d.to(d_logits_ptr.dtype.element_ty),
            mask=quad < V - start,
          )
    target = next_target
    weight = next_weight
  async_copy.wait_group(0)
