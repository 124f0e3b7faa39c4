"""The selective scan of Mamba: one recurrence, several implementations that must agree."""

from ssm_moe.ops.selective_scan.api import Implementation, selective_scan

__all__ = ['Implementation', 'selective_scan']
