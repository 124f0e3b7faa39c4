"""Causal convolution: `causal_conv1d`."""

from ssm_moe.ops.causal_conv1d.api import causal_conv1d

__all__ = ['causal_conv1d']
