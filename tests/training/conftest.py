"""Whole training steps run under JAX's default promotion."""

import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion():
  """Optax multiplies float32 by int32 counts; our own parts are tested under strict promotion."""
  with jax.numpy_dtype_promotion('standard'):
    yield
