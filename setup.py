"""Package metadata. `pip install -e .` is pure Python: no GPU, no compiler, no TensorFlow."""

import pathlib

import setuptools

_ROOT = pathlib.Path(__file__).parent
_VERSION = next(
  line.split("'")[1]
  for line in (_ROOT / 'ssm_moe' / '__init__.py').read_text().splitlines()
  if line.startswith('__version__')
)

_BASE = [
  'absl-py',
  'flax>=0.12',
  'grain>=0.2.15',
  'jax>=0.10',
  'jaxtyping>=0.3',
  'matplotlib',
  'ml_collections>=1.1',
  'numpy>=2',
  'optax>=0.2.6',
  'orbax-checkpoint>=0.12',
  'tensorboard>=2.19',
  'tqdm',
]
# Hugging Face's formats: weights, tokenizer.json files and Parquet shards.
_HF = ['pyarrow', 'safetensors', 'tokenizers']
# tensorflow-datasets reads array_record files without TensorFlow, but needs importlib_resources,
# which it does not declare.
_TFDS = ['array_record', 'importlib_resources', 'tensorflow-datasets']
# EleutherAI's lm-evaluation-harness; without its own extras it brings no PyTorch.
_EVAL = ['lm-eval>=0.4.13']
# setuptools: Python 3.12 and later come without it, and a wheel is built in place.
_TEST = [
  # Compiles kernels for GPUs, which needs no GPU.
  'jax-triton>=0.4; python_version >= "3.12" and platform_system == "Linux"',
  'beartype',
  'chex',
  'hypothesis',
  'jax[tpu]; platform_system == "Linux"',  # brings the TPU compiler, which needs no TPU
  'pytest',
  'pytest-xdist',
  'ruff',
  'setuptools',
  'wheel',
]
# What imported models are compared with. Apart, since PyPI's PyTorch brings CUDA along.
_TEST_TORCH = ['torch', 'transformers>=5']

setuptools.setup(
  name='ssm_moe',
  version=_VERSION,
  description='State-space models with mixture of experts, in JAX and Flax, for TPU and GPU.',
  long_description=(_ROOT / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['ssm_moe', 'ssm_moe.*']),
  package_data={'ssm_moe.ops.grouped_matmul': ['*.json']},
  install_requires=_BASE,
  extras_require={
    # The GPU kernels need jax 0.11 and Triton 3.7 or later, hence Python 3.12; without them the
    # portable implementations serve.
    'gpu': ['jax[cuda13]', 'jax-triton>=0.4; python_version >= "3.12"'],
    'tpu': ['jax[tpu]'],
    'hf': _HF,
    'tfds': _TFDS,
    'eval': _EVAL,
    'test': _TEST + _HF + _TFDS,
    'test_torch': _TEST_TORCH,
  },
)
