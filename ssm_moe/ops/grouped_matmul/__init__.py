"""Rows sorted by expert, times that expert's matrix: `grouped_matmul`."""

from ssm_moe.ops.grouped_matmul.api import grouped_matmul
from ssm_moe.ops.grouped_matmul.order import RowOrder

__all__ = ['RowOrder', 'grouped_matmul']
