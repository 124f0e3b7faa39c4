"""The one table of tolerances, with the reason for each. Tests take them from here only.

A comparison of `actual` with `expected` passes when |actual - expected| <= rtol * scale, where
scale is the largest magnitude in `expected`: gradients here are sums of thousands of terms of both
signs, so an element near zero carries the rounding of its largest neighbours, not of itself.
"""

import chex
import jax
import numpy as np

# The same float32 sums in another order: 1e-6 is 8 units in the last place (2**-23 = 1.2e-7), times
# about the square root of the number of terms (up to 4096 in a test).
FLOAT32_REORDERED = 1e-5
# bfloat16 keeps 8 bits: half a unit in the last place is 2**-9 = 2e-3; inputs and outputs round
# once each and intermediate cotangents once more.
BFLOAT16 = 2e-2
# A whole model in bfloat16 may move its logits so many times as far as in float32 with parameters
# rounded to bfloat16, which measures how sensitive the model is. Computing in bfloat16 also rounds
# each layer's activations, about three times: sqrt(1 + 3) = 2 times as far, give or take (measured:
# 1.2 to 2.5, over eight models and six seeds).
BFLOAT16_OVER_ROUNDED_PARAMETERS = 4
# Central differences in float64 with a step of 1e-6 relative: truncation 1e-12, rounding 1e-10;
# the float64 path is compared, so only the formula can differ.
FLOAT64_FINITE_DIFFERENCE = 1e-6

# float16 keeps 11 bits, eight times as fine; but the kernels for GPUs take products that they add
# up over channels in bfloat16, whatever half precision is asked for.
BY_DTYPE = {'float32': FLOAT32_REORDERED, 'bfloat16': BFLOAT16, 'float16': BFLOAT16}


def assert_close(actual, expected, *, rtol, what=''):
  """Asserts that two trees of arrays agree, relative to the largest magnitude in each leaf."""
  chex.assert_trees_all_equal_structs(actual, expected)
  chex.assert_trees_all_equal_shapes(actual, expected)

  def compare(path, a, e):
    a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
    scale = max(np.abs(e).max(initial=0.0), np.finfo(np.float32).tiny)
    error = np.abs(a - e).max(initial=0.0)
    assert np.isfinite(a).all(), f'{what}{path}: not finite'
    assert error <= rtol * scale, f'{what}{path}: error {error:.3g} > {rtol:.1g} * {scale:.3g}'

  jax.tree.map_with_path(lambda p, a, e: compare(jax.tree_util.keystr(p), a, e), actual, expected)
