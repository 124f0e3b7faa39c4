"""-log softmax of the target of each token, and its gradient: `softmax_cross_entropy`."""

from ssm_moe.ops.softmax_cross_entropy.api import Implementation, softmax_cross_entropy

__all__ = ['Implementation', 'softmax_cross_entropy']
