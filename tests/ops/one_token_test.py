"""The scans of one token equal the references, which have the loops that they do without."""

import functools

import jax
import pytest

from ssm_moe.ops import selective_scan, ssd
from ssm_moe.ops.selective_scan import cases as selective_scan_cases
from ssm_moe.ops.ssd import cases as ssd_cases
from tests.tolerances import BY_DTYPE, assert_close

_OPS = {
  'selective_scan': (selective_scan.selective_scan, selective_scan_cases),
  'ssd': (ssd.ssd, ssd_cases),
}


@pytest.mark.parametrize('name', ['all_1', pytest.param('plain_1', marks=pytest.mark.extended)])
@pytest.mark.parametrize('op', _OPS)
def test_equals_the_reference(op, name):
  function, cases = _OPS[op]
  case = next(case for case in cases.CASES if case.name == name)
  arguments = cases.make_inputs(case, jax.random.key(1))
  softplus = arguments.pop('dt_softplus')

  def run(implementation, arguments):
    return function(**arguments, dt_softplus=softplus, implementation=implementation)

  actual, expected = (
    jax.jit(functools.partial(run, name))(arguments) for name in ('one_token', 'reference')
  )
  assert_close(actual, expected, rtol=BY_DTYPE[case.dtype])


@pytest.mark.parametrize('op', _OPS)
def test_more_tokens_are_refused(op):
  function, cases = _OPS[op]
  case = next(case for case in cases.CASES if case.name == 'all_7')
  arguments = cases.make_inputs(case, jax.random.key(1))
  with pytest.raises(NotImplementedError, match='it runs one token, and there are 7'):
    function(**arguments, implementation='one_token')
