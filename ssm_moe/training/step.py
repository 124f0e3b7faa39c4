"""One training step and one evaluation step: pure functions of state and batch."""

from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from ssm_moe import sharding
from ssm_moe.config import ExperimentConfig
from ssm_moe.models import lm, lora
from ssm_moe.models.block import PeriodAux, PeriodState, keep_rows
from ssm_moe.shapes import Array, Float, Int
from ssm_moe.training import trainable
from ssm_moe.training.losses import cross_entropy_sum

# Random streams of a run beside the model's initial parameters.
_ADAPTERS, _DROPOUT = 1, 2

# inputs, targets, segment_ids: Int[B, L]; loss_mask: Float[B, L]; continues: Bool[B].
Batch = dict[str, Array]


@no_type_check  # JAX rebuilds it with shapes and layouts in place of arrays
class TrainState(struct.PyTreeNode):
  """All that a run goes on from.

  Attributes:
    step: Steps done.
    params: Of the model, float32.
    opt_state: Of the optimizer, for what is trained.
    model_state: What the last window of each row left behind, if it is carried over; else None.
    adapters: That are trained in place of `params`, if there are; else None.
  """

  step: Int[Array, '']
  params: Any
  opt_state: Any
  model_state: PeriodState | None
  adapters: Any = None


class StepMetrics(struct.PyTreeNode):
  """What a training step reports.

  Attributes:
    loss: Mean nats over the scored tokens, without auxiliary losses.
    auxiliary_loss: Routing losses times their coefficients.
    gradient_norm: Of what is trained, before clipping.
    aux: Routing losses and statistics by layer; means over the accumulation steps.
  """

  loss: Float[Array, '']
  auxiliary_loss: Float[Array, '']
  gradient_norm: Float[Array, '']
  aux: PeriodAux


class EvalSums(struct.PyTreeNode):
  """Sums over evaluation batches.

  Attributes:
    nats: Over the scored tokens.
    scored: How many.
    tokens: How many are not padding.
    expert_load: By layer, the mean load of a batch times its tokens.
  """

  nats: Float[Array, '']
  scored: Float[Array, '']
  tokens: Float[Array, '']
  expert_load: dict[str, Float[Array, 'layers E']]


def init_train_state(
  config: ExperimentConfig, optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
  """Returns the state before the first step; arrays carry their logical axes (flax boxes)."""
  params = lm.boxed_params(config.model, key)
  adapters = None
  if config.lora.rank:
    adapters = lora.init(jax.random.fold_in(key, _ADAPTERS), params, config.lora)
  carried = config.data.carry_state
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(trainable.learnt(params, adapters, config)),
    model_state=lm.initial_state(config.model, config.train.batch_size) if carried else None,
    adapters=adapters,
  )


def make_train_step(
  config: ExperimentConfig, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
  """Returns the function of one optimizer step, not yet jitted.

  With accumulation the batch is cut in parts, row i going to part i modulo their number, so that
  every device has rows of each part. Token losses are weighted as in one large batch; routing, its
  losses and its capacity are counted in each part on its own.
  """
  model = lm.LM(config.model, dropout=config.train.dropout)
  parts = config.train.accumulation_steps

  def loss_of_part(learnt, params, part, model_state, scored, key):
    params = trainable.with_learnt(params, learnt, config)
    output = model.apply(
      {'params': params},
      part['inputs'],
      segment_ids=part['segment_ids'],
      state=model_state,
      rngs={'dropout': key} if config.train.dropout else None,
    )
    nats = cross_entropy_sum(
      output.hidden,
      lm.head_matrix(params, config.model),
      part['targets'],
      part['loss_mask'],
      chunk=config.train.loss_chunk,
    )
    auxiliary = lm.auxiliary_loss(output.aux, config.model) / parts
    loss = nats / scored
    return loss + auxiliary, (loss, auxiliary, output)

  gradient_of_part = jax.value_and_grad(loss_of_part, has_aux=True)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    scored = jnp.maximum(jnp.sum(batch['loss_mask']), 1)
    model_state = state.model_state
    if model_state is not None:
      model_state = keep_rows(model_state, batch['continues'])
    learnt = trainable.learnt(state.params, state.adapters, config)
    # Of the step alone: a run that was stopped drops what one that never was drops.
    key = jax.random.fold_in(jax.random.key(config.train.seed), _DROPOUT)
    key = jax.random.fold_in(key, state.step)

    def one_part(carry, part_and_state):
      index, part, part_state = part_and_state
      (_, (loss, auxiliary, output)), gradients = gradient_of_part(
        learnt, state.params, part, part_state, scored, jax.random.fold_in(key, index)
      )
      sums = (gradients, loss, auxiliary)
      carry = sums if carry is None else jax.tree.map(jnp.add, carry, sums)
      new_state = None if part_state is None else output.state
      return carry, (output.aux, new_state)

    if parts == 1:
      sums, (aux, model_state) = one_part(None, (0, batch, model_state))
    else:
      cut = (jnp.arange(parts), _cut(batch, parts, axis=0), _cut(model_state, parts, axis=1))
      zeros = (jax.tree.map(jnp.zeros_like, learnt), jnp.zeros(()), jnp.zeros(()))
      sums, (aux, model_state) = jax.lax.scan(one_part, zeros, cut)
      aux = jax.tree.map(lambda leaf: leaf.mean(axis=0), aux)
      model_state = _join(model_state, axis=1)

    gradients, loss, auxiliary = sums
    updates, opt_state = optimizer.update(gradients, state.opt_state, learnt)
    learnt = optax.apply_updates(learnt, updates)
    params, adapters = trainable.replaced(state.params, state.adapters, learnt)
    state = TrainState(
      step=state.step + 1,
      params=trainable.with_moved_biases(params, aux, config),
      opt_state=opt_state,
      # The next window starts from the value, not from the graph: the backpropagation is truncated.
      model_state=model_state,
      adapters=adapters,
    )
    return state, StepMetrics(loss, auxiliary, optax.tree.norm(gradients), aux)

  return train_step


def make_eval_step(config: ExperimentConfig) -> Callable[[Any, Batch], EvalSums]:
  """Returns the function of one evaluation batch, not yet jitted. Segment 0 is padding.

  Raises:
    ConfigError: experts choose tokens, so that it would not be an autoregressive evaluation.
  """
  lm.check_causal(config.model, 'evaluation')
  model = lm.LM(config.model)

  def eval_step(params, batch: Batch) -> EvalSums:
    mask = batch['segment_ids'] > 0
    output = model.apply(
      {'params': params}, batch['inputs'], segment_ids=batch['segment_ids'], mask=mask
    )
    nats = cross_entropy_sum(
      output.hidden,
      lm.head_matrix(params, config.model),
      batch['targets'],
      batch['loss_mask'],
      chunk=config.train.loss_chunk,
    )
    tokens = jnp.sum(mask).astype(jnp.float32)
    load = {name: aux.expert_load * tokens for name, aux in output.aux.items()}
    return EvalSums(nats, jnp.sum(batch['loss_mask']), tokens, load)

  return eval_step


def state_shardings(mesh: jax.sharding.Mesh, boxed: TrainState) -> TrainState:
  """Returns the layout of each leaf of a state whose arrays carry their logical axes."""
  shardings = sharding.tree_shardings(mesh, boxed.replace(model_state=None))
  rows = sharding.carried_state_sharding(mesh)
  return shardings.replace(model_state=jax.tree.map(lambda _: rows, boxed.model_state))


def laid_out(boxed: TrainState, shardings: TrainState) -> TrainState:
  """Returns a state of shapes with their layouts, without boxes."""
  return jax.tree.map(
    lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
    nn.unbox(boxed),
    shardings,
  )


def _cut(tree: Any, parts: int, axis: int) -> Any:
  """Puts a leading axis of parts on every leaf: row i goes to part i modulo their number."""

  def cut(leaf):
    shape = (*leaf.shape[:axis], leaf.shape[axis] // parts, parts, *leaf.shape[axis + 1 :])
    return jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)

  return jax.tree.map(cut, tree)


def _join(tree: Any, axis: int) -> Any:
  """Undoes `_cut`."""

  def join(leaf):
    moved = jnp.moveaxis(leaf, 0, axis + 1)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])

  return jax.tree.map(join, tree)
