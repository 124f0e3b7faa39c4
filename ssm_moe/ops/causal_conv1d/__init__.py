"""Causal convolution: `causal_conv1d`."""

from ssm_moe.ops.causal_conv1d.api import Implementation, causal_conv1d

__all__ = ['Implementation', 'causal_conv1d']
