"""Instructions are counted as often as the loops around them run."""

import re

import jax
import jax.numpy as jnp
import pytest

from ssm_moe.analysis import hlo


def _text(function, *shapes):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(function).lower(*arguments).compile().as_text()


def _times(program, opcode):
  return [event.times for event in program.events if event.instruction.opcode == opcode]


def _nested(x, w):
  def outer(x, _):
    return jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=5)[0] @ w, None

  return jax.lax.scan(outer, x, length=3)[0] @ w


def test_loops_in_loops_multiply():
  program = hlo.Program(_text(_nested, (64, 64), (64, 64)))
  assert sorted(_times(program, 'dot')) == [1, 3, 15]
  assert program.unknown_loops == 0


def test_without_the_compilers_word_the_loop_itself_tells():
  annotated = _text(_nested, (64, 64), (64, 64))
  bare = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', '', annotated)
  assert bare != annotated
  program = hlo.Program(bare)
  assert sorted(_times(program, 'dot')) == [1, 3, 15]
  assert program.unknown_loops == 0


def test_a_loop_whose_length_depends_on_the_data_counts_once_and_is_reported():
  def function(x, w):
    return jax.lax.fori_loop(0, x[0, 0].astype(jnp.int32), lambda _, x: x @ w, x)

  program = hlo.Program(_text(function, (64, 64), (64, 64)))
  assert _times(program, 'dot') == [1]
  assert program.unknown_loops == 1


# A loop as the TPU compiler writes it: the condition is a fusion, the bound and the step come with
# the loop's state, and the start is a copy of what the caller passes on.
_LOOP = """HloModule loop, num_partitions=4

%compared (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction={direction}
}}

%condition (state: (s32[], f32[8,8], s32[])) -> pred[] {{
  %state = (s32[], f32[8,8]{{1,0:T(8,128)}}, s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %n = s32[] get-tuple-element(%state), index=2
  ROOT %is_less = pred[] fusion(%i, %n), kind=kLoop, calls=%compared
}}

%body (state.1: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {{
  %state.1 = (s32[], f32[8,8]{{1,0:T(8,128)}}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %x = f32[8,8]{{1,0:T(8,128)}} get-tuple-element(%state.1), index=1
  %n.1 = s32[] get-tuple-element(%state.1), index=2
  %step = s32[] constant({step})
  %next = s32[] add(%i.1, %step)
  %y = f32[8,8]{{1,0:T(8,128)}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %result = (s32[], f32[8,8], /*index=2*/s32[]) tuple(%next, %y, %n.1)
}}

ENTRY %main (x.1: f32[8,8]) -> f32[8,8] {{
  %x.1 = f32[8,8]{{1,0:T(8,128)}} parameter(0)
  %start = s32[] constant({start})
  %start.1 = s32[] copy(%start)
  %limit = s32[] constant({limit})
  %initial = (s32[], f32[8,8], s32[]) tuple(%start.1, %x.1, %limit)
  %loop = (s32[], f32[8,8], s32[]) while(%initial), condition=%condition, body=%body
  ROOT %z = f32[8,8] get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize(
  ('start', 'limit', 'step', 'direction', 'times'),
  [
    (0, 8, 1, 'LT', 8),
    (3, 10, 2, 'LT', 4),  # 3, 5, 7, 9
    (3, 9, 2, 'LE', 4),
    (7, 0, -1, 'GT', 7),
    (7, 0, -1, 'GE', 8),
    (5, 5, 1, 'LT', 0),
  ],
)
def test_start_bound_and_step_are_read(start, limit, step, direction, times):
  text = _LOOP.format(start=start, limit=limit, step=step, direction=direction)
  program = hlo.Program(text)
  assert _times(program, 'dot') == [times]
  assert program.num_partitions == 4


@pytest.mark.parametrize(
  ('line', 'changed'),
  [
    ('tuple(%next, %y, %n.1)', 'tuple(%next, %y, %next)'),  # the bound moves
    ('add(%i.1, %step)', 'add(%n.1, %step)'),  # the counter comes from elsewhere
    ('add(%i.1, %step)', 'multiply(%i.1, %step)'),
  ],
)
def test_what_is_not_a_counter_and_a_bound_is_unknown(line, changed):
  text = _LOOP.format(start=0, limit=8, step=1, direction='LT')
  assert line in text
  program = hlo.Program(text.replace(line, changed))
  assert (_times(program, 'dot'), program.unknown_loops) == ([1], 1)


def test_arrays_know_their_bytes_and_their_memory():
  (instruction,) = hlo.Program(
    'ENTRY %main (x: f32[2]) -> f32[2] {\n'
    '  ROOT %c = (bf16[4,2]{1,0:T(8,128)(2,1)S(1)}, pred[3]{0}, f32[]) custom-call(%x)\n'
    '}\n'
  ).events
  assert [(a.num_bytes, a.in_hbm) for a in instruction.instruction.arrays] == [
    (16, False),
    (3, True),
    (4, True),
  ]
