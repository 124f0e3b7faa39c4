"""The axis letters of this project, and the array types that use them.

  B batch                 E experts             Mamba-2:
  L length                K top_k               H heads
  T tokens (B L flat)     C expert capacity     P head dim
  M d_model               G router groups       G groups of heads
  D channels (d_inner)    F d_ff                Q chunk
  N d_state               V vocab
  R dt_rank                                     Attention: H, P as above
  W conv width                                  J key-value heads
                                                S cached tokens; rows of a plan

A capital inside quotes is an axis (`Float[Array, 'B L D']`); a capital outside quotes is one of the
SSM's A, B, C, D. Einsum strings are lower case. Nothing else defines letters.

The types are checked in tests only: `pytest --jaxtyping-packages=ssm_moe,beartype.beartype`.
"""

from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree, UInt

__all__ = ['Array', 'ArrayLike', 'Bool', 'Float', 'Int', 'Key', 'PyTree', 'UInt']
