"""Matrix products by expert, at the sizes that are timed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssm_moe.analysis import benchmark_peers as peers
from ssm_moe.analysis.benchmark import OpBenchmark, by_implementation
from ssm_moe.analysis.benchmark_limits import Work, passes
from ssm_moe.layers import dispatch
from ssm_moe.ops.grouped_matmul import api as grouped
from ssm_moe.ops.grouped_matmul import triton_gpu
from ssm_moe.shapes import Array, Float, Int, Key

# Of layer 03 of `quickstart.py:moe_mamba` after its 350 steps, as audit_routing.py reports it on a
# module of the standard library: the fullest expert has 1.5 times its share.
TRAINED_LOAD = (0.185, 0.117, 0.118, 0.170, 0.077, 0.119, 0.084, 0.130)

# Rows, columns of a row, columns of a product, groups.
GROUPED_SIZES = (
  (16384, 1024, 2048, 8),
  (65536, 1024, 4096, 8),
  (65536, 1024, 4096, 32),
  (65536, 768, 3072, 64),
)


def grouped_matmuls() -> list[OpBenchmark]:
  """On a GPU; beside the dense product of all rows with one matrix, and `lax.ragged_dot`."""
  return [_grouped_matmul(*sizes) for sizes in GROUPED_SIZES]


def _grouped_matmul(num_rows: int, columns: int, features: int, num_groups: int) -> OpBenchmark:
  def make_arguments(key):
    return grouped_inputs(key, num_rows, columns, features, num_groups)

  def run(inputs, group_sizes, implementation):
    return grouped.grouped_matmul(
      inputs['rows'], inputs['weights'], group_sizes, implementation=implementation
    )

  def ragged_dot(inputs, group_sizes):
    return jax.lax.ragged_dot(inputs['rows'], inputs['weights'], group_sizes)

  def dense(inputs, _):
    return inputs['rows'] @ inputs['weights']

  def one_matrix(inputs):
    return {'rows': inputs['rows'], 'weights': inputs['weights'][0]}

  flops = 2 * num_rows * columns * features
  num_bytes = 2 * (num_rows * (columns + features) + num_groups * columns * features)
  # Gradients of rows and weights; rows, weights and the cotangent are read.
  twice = 2 * (num_rows * (2 * columns + features) + 2 * num_groups * columns * features)
  left_out = {'reference': 'it takes as many times the work as there are groups'}
  return OpBenchmark(
    name='grouped_matmul',
    shape=f'S {num_rows}, M {columns}, F {features}, E {num_groups}',
    dtype='bfloat16',
    implementations={
      'dense': dense,
      **by_implementation(grouped, run, left_out),
      'lax.ragged_dot': ragged_dot,
    },
    left_out=left_out,
    oracle=group_by_group,
    oracle_name='all rows times one matrix after the other in float32, masked',
    make_arguments=make_arguments,
    yardsticks={'dense': one_matrix},
    peers=(peers.GROUPED_MATMUL,),
    tokens=num_rows,
    work=passes(Work(num_bytes=num_bytes, flops=flops), Work(num_bytes=twice, flops=2 * flops)),
  )


def grouped_inputs(
  key: Key[Array, ''], num_rows: int, columns: int, features: int, num_groups: int
) -> tuple[dict[str, Array], Int[Array, 'E']]:
  """Returns random rows and weights in bfloat16, and the sizes of uneven groups."""
  keys = jax.random.split(key, 3)
  weights = jax.random.normal(keys[1], (num_groups, columns, features)) / columns**0.5
  # The fullest of 8 groups then has about 1.5 times its share, as a trained router's.
  share = jax.nn.softmax(0.35 * jax.random.normal(keys[2], (num_groups,)))
  ends = jnp.round(jnp.cumsum(share) * num_rows).astype(jnp.int32).at[-1].set(num_rows)
  inputs = {
    'rows': jax.random.normal(keys[0], (num_rows, columns), jnp.bfloat16),
    'weights': weights.astype(jnp.bfloat16),
  }
  return inputs, jnp.diff(ends, prepend=0).astype(jnp.int32)


def group_by_group(inputs: dict[str, Array], group_sizes: Int[Array, 'E']) -> Float[Array, 'S F']:
  """Multiplies all rows with one matrix after the other, and keeps what is of its group."""
  rows, weights = inputs['rows'], inputs['weights']
  ends = jnp.cumsum(group_sizes)
  group_of_row = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side='right')

  # The gradient would else keep the rows once for each group.
  @jax.checkpoint
  def one_group(y, group):
    index, matrix = group
    ours = jnp.where((group_of_row == index)[:, None], rows, 0)
    return y + ours @ matrix, None

  y = jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype)
  return jax.lax.scan(one_group, y, (jnp.arange(len(weights)), weights))[0]


def feed_forwards() -> list[OpBenchmark]:
  """A Switch layer, from the routes to the combined output, beside one dense expert; on a CPU."""
  tokens, d_model, d_ff, num_experts = 4096, 512, 1536, len(TRAINED_LOAD)

  def make_arguments(key):
    keys = jax.random.split(key, 5)
    inputs = {
      'x': jax.random.normal(keys[0], (tokens, d_model)),
      'weights': jax.random.uniform(keys[1], (tokens, 1)),
      'wi': jax.random.normal(keys[2], (num_experts, d_model, d_ff)) / d_model**0.5,
      'wo': jax.random.normal(keys[3], (num_experts, d_ff, d_model)) / d_ff**0.5,
    }
    ends = np.round(np.cumsum(TRAINED_LOAD) * tokens)
    routes = np.searchsorted(ends, np.arange(tokens), side='right').clip(max=num_experts - 1)
    return inputs, jax.random.permutation(keys[4], jnp.asarray(routes, jnp.int32))[:, None]

  def planned(make_plan):
    def run(inputs, expert_index):
      plan = make_plan(expert_index, num_experts)
      matrices = (inputs['wi'], inputs['wo'])
      return plan.apply(inputs['x'], matrices, inputs['weights'], between=jax.nn.relu)

    return run

  def dense(inputs, _):
    return jax.nn.relu(inputs['x'] @ inputs['wi']) @ inputs['wo']

  def one_expert(inputs):
    return {'x': inputs['x'], 'wi': inputs['wi'][0], 'wo': inputs['wo'][0]}

  return [
    OpBenchmark(
      name='feed_forward',
      shape=f'T {tokens}, M {d_model}, F {d_ff}, E {num_experts}',
      dtype='float32',
      implementations={
        'dense, 1 expert': dense,
        'dropless, 8 experts': planned(dispatch.dropless_plan),
      },
      oracle=planned(dispatch.dense_plan),
      make_arguments=make_arguments,
      yardsticks={'dense, 1 expert': one_expert},
      tokens=tokens,
    )
  ]


# Tokens, d_model, d_ff, experts: of the step `moe_mamba` of benchmark_model.
_EXPERT_LAYER = (65536, 512, 1536, 32)


def expert_layers() -> list[OpBenchmark]:
  """A Switch layer's products on a GPU: what the kernels do of ReLU and weights, and what XLA."""
  tokens, d_model, d_ff, num_experts = _EXPERT_LAYER

  def make_arguments(key):
    keys = jax.random.split(key, 4)
    inputs, sizes = grouped_inputs(keys[0], tokens, d_model, d_ff, num_experts)
    wo = jax.random.normal(keys[1], (num_experts, d_ff, d_model)) / d_ff**0.5
    routes = jnp.repeat(jnp.arange(num_experts), sizes, total_repeat_length=tokens)
    plan = dispatch.dropless_plan(jax.random.permutation(keys[2], routes)[:, None], num_experts)
    inputs |= {'wo': wo.astype(jnp.bfloat16), 'combine': jax.random.uniform(keys[3], (tokens, 1))}
    return inputs, plan

  def by_kernel(inputs, plan, *, relu, weighted):
    put = functools.partial(
      triton_gpu.grouped_matmul,
      put=plan.order,
      combine_weights=inputs['combine'] if weighted else None,
    )
    hidden = triton_gpu.grouped_matmul(
      inputs['rows'], inputs['weights'], plan.group_sizes, take=plan.order, relu=relu
    )
    hidden = hidden if relu else jax.nn.relu(hidden)
    chosen = put(hidden, inputs['wo'], plan.group_sizes)
    return dispatch.sum_choices(chosen, None if weighted else inputs['combine'])

  def one_after_the_other(inputs, plan):
    hidden = jax.nn.relu(
      group_by_group({**inputs, 'rows': plan.order.take(inputs['rows'])}, plan.group_sizes)
    )
    y = group_by_group({'rows': hidden, 'weights': inputs['wo']}, plan.group_sizes)
    return dispatch.sum_choices(plan.order.put(y), inputs['combine'])

  flops = 4 * tokens * d_model * d_ff
  return [
    OpBenchmark(
      name='expert_layer',
      shape=f'T {tokens}, M {d_model}, F {d_ff}, E {num_experts}',
      dtype='bfloat16',
      implementations={
        'by XLA': functools.partial(by_kernel, relu=False, weighted=False),
        'relu in the kernel': functools.partial(by_kernel, relu=True, weighted=False),
        'weights in the kernel': functools.partial(by_kernel, relu=False, weighted=True),
        'both in the kernel': functools.partial(by_kernel, relu=True, weighted=True),
      },
      oracle=one_after_the_other,
      oracle_name='all rows times one matrix after the other in float32, masked',
      make_arguments=make_arguments,
      tokens=tokens,
      work=passes(
        Work(num_bytes=6 * tokens * d_model, flops=flops),
        Work(num_bytes=10 * tokens * d_model, flops=2 * flops),
      ),
    )
  ]
