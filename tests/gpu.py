"""Tests that run on a GPU: JAX_PLATFORMS=cuda pytest -m gpu."""

import jax
import pytest

# For all tests of a module: pytestmark = gpu.MARKS
MARKS = [
  pytest.mark.gpu,
  pytest.mark.skipif(
    not (jax.config.jax_platforms or '').startswith(('cuda', 'gpu')),
    reason='runs on a GPU only: JAX_PLATFORMS=cuda pytest -m gpu',
  ),
]
