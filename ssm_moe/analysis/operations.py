"""How many operations a function does, by the unit that does them: counted in its jaxpr.

A loop counts as often as it runs, a Pallas kernel as often as its grid has programs. Operations are
elements: the product of two arrays of n elements is n of them, a sum over n elements too.
"""

import dataclasses
import math
from typing import Any

import jax

# Of the unit for transcendental functions, each as often as a TPU uses it.
_TRANSCENDENTAL = {
  'exp': 1,
  'exp2': 1,
  'log': 1,
  'log1p': 1,
  'expm1': 1,
  'tanh': 1,
  'rsqrt': 1,
  'sqrt': 1,
  'pow': 2,
  'logistic': 2,  # an exponential and a reciprocal
  'div': 1,  # a reciprocal
}
_VECTOR = frozenset(
  (
    *('add', 'sub', 'mul', 'neg', 'abs', 'sign', 'max', 'min', 'square', 'integer_pow', 'clamp'),
    *('eq', 'ne', 'lt', 'le', 'gt', 'ge', 'and', 'or', 'not', 'xor', 'select_n', 'add_any', 'div'),
    *('floor', 'ceil', 'round', 'is_finite', 'convert_element_type'),
  )
)
_REDUCTIONS = frozenset(
  ('reduce_sum', 'reduce_max', 'reduce_min', 'cumsum', 'reduce_and', 'reduce_or', 'argmax')
)


@dataclasses.dataclass(frozen=True)
class Operations:
  """Counts of a function.

  Attributes:
    vector: Elementwise arithmetic, comparisons, selections, conversions, and terms of sums.
    transcendental: Exponentials, logarithms, roots, reciprocals.
    matrix: Multiplications and additions of matrix products.
  """

  vector: int = 0
  transcendental: int = 0
  matrix: int = 0

  def __add__(self, other: 'Operations') -> 'Operations':
    return Operations(
      self.vector + other.vector,
      self.transcendental + other.transcendental,
      self.matrix + other.matrix,
    )

  def __mul__(self, times: int) -> 'Operations':
    return Operations(self.vector * times, self.transcendental * times, self.matrix * times)


def count(function, *arguments) -> Operations:
  """Counts what `function` does with `arguments`, which are arrays or their shapes."""
  return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: Any) -> Operations:
  return sum((_of_equation(equation) for equation in jaxpr.eqns), Operations())


def _of_equation(equation: Any) -> Operations:
  name, params = equation.primitive.name, equation.params
  if name == 'scan':
    return _of_jaxpr(params['jaxpr'].jaxpr) * params['length']
  if name == 'pallas_call':
    return _of_jaxpr(params['jaxpr']) * math.prod(params['grid_mapping'].grid)
  if name == 'cond':
    branches = [_of_jaxpr(branch.jaxpr) for branch in params['branches']]
    return max(branches, key=lambda one: one.vector)
  if name == 'while':
    raise ValueError('a loop whose number of passes depends on data cannot be counted')
  inner = [value for value in params.values() if hasattr(value, 'eqns') or hasattr(value, 'jaxpr')]
  if inner:
    # A call of another function: jit, custom derivatives, rematerialisation.
    return _of_jaxpr(getattr(inner[0], 'jaxpr', inner[0]))
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    return Operations(matrix=2 * out.size * math.prod(left.shape[axis] for axis in contracted))
  out = math.prod(getattr(equation.outvars[0].aval, 'shape', ())) if equation.outvars else 0
  if name in _REDUCTIONS:
    return Operations(vector=equation.invars[0].aval.size)
  return Operations(
    vector=out if name in _VECTOR else 0, transcendental=out * _TRANSCENDENTAL.get(name, 0)
  )
