"""The tensors of one Mamba or Mamba-2 mixer, which every format names alike."""

from ssm_moe.config import ModelConfig
from ssm_moe.interop.family import mixer_of
from ssm_moe.interop.layout import Form, LayerTensor, Part

_X, _Z = 0, 1  # of the axis 'branch' of in_proj


def mixer_tensors(config: ModelConfig) -> list[LayerTensor]:
  """Returns the tensors of a mixer, of the kind that the stack is of."""
  name, mixer = mixer_of(config)
  make = _mamba if name == 'mamba' else _mamba2
  tensors = make()
  left_out = {'in_proj.bias', 'out_proj.bias'} if not mixer.bias else set()
  left_out |= {'conv1d.bias'} if not mixer.conv_bias else set()
  return [tensor for tensor in tensors if tensor.name not in left_out]


def _mamba() -> list[LayerTensor]:
  return [
    _vector('dt_proj.bias', Part(('dt_bias',))),
    LayerTensor('A_log', Form.TABLE, (Part(('A_log',)),)),
    _vector('D', Part(('D',))),
    _matrix('in_proj.weight', _branch('kernel', _X), _branch('kernel', _Z)),
    _vector('in_proj.bias', _branch('bias', _X), _branch('bias', _Z)),
    LayerTensor('conv1d.weight', Form.FILTER, (Part(('conv1d_kernel',)),)),
    _vector('conv1d.bias', Part(('conv1d_bias',))),
    _matrix('x_proj.weight', Part(('x_proj', 'kernel'))),
    _matrix('dt_proj.weight', Part(('dt_proj', 'kernel'))),
    _matrix('out_proj.weight', Part(('out_proj', 'kernel'))),
    _vector('out_proj.bias', Part(('out_proj', 'bias'))),
  ]


def _mamba2() -> list[LayerTensor]:
  def in_proj(leaf):
    # Rows are z, x, B of every group, C of every group, dt.
    below = (Part(('x_proj', leaf)), Part(('dt_proj', leaf)))
    return (_branch(leaf, _Z), _branch(leaf, _X), *below)

  def conv1d(leaf):
    return (Part(('conv1d', leaf)), Part(('BC_conv1d', leaf)))

  return [
    _vector('dt_bias', Part(('dt_bias',))),
    _vector('A_log', Part(('A_log',))),
    _vector('D', Part(('D',))),
    _matrix('in_proj.weight', *in_proj('kernel')),
    _vector('in_proj.bias', *in_proj('bias')),
    LayerTensor('conv1d.weight', Form.FILTER, conv1d('kernel')),
    _vector('conv1d.bias', *conv1d('bias')),
    _vector('norm.weight', Part(('norm', 'scale'))),
    _matrix('out_proj.weight', Part(('out_proj', 'kernel'))),
    _vector('out_proj.bias', Part(('out_proj', 'bias'))),
  ]


def _vector(name: str, *parts: Part) -> LayerTensor:
  return LayerTensor(name, Form.VECTOR, parts)


def _matrix(name: str, *parts: Part) -> LayerTensor:
  return LayerTensor(name, Form.MATRIX, parts)


def _branch(leaf: str, branch: int) -> Part:
  """x or z of in_proj: of its kernel [M, 2, D], or of its bias [2, D]."""
  return Part(('in_proj', leaf), (slice(None), branch) if leaf == 'kernel' else (branch,))
