"""Mamba-2's scan (state space duality): one recurrence, two implementations that must agree."""

from ssm_moe.ops.ssd.api import Implementation, ssd

__all__ = ['Implementation', 'ssd']
