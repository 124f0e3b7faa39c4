"""A disk that takes no more, for a moment, without a file system of its own."""

import contextlib
import resource


@contextlib.contextmanager
def beyond(size):
  """Writes past `size` bytes into any file fail: 'File too large', as 'No space left' would."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
