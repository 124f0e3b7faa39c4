"""State-space models with mixture of experts, in JAX and Flax linen."""

__version__ = '0.1.0'
