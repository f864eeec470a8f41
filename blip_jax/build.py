"""Builds the parts of a run from a config, without opening data.

  config -> mesh -> tokenizer -> task -> optimiser -> abstract state

Training, evaluation, planning and benchmarks all use it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from blip_jax import context, task_table
from blip_jax.convert import companions, opening
from blip_jax.data import examples, scenes, transforms
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.models import card, families, placement
from blip_jax.models import config as model_config
from blip_jax.runtime import config as run_config
from blip_jax.runtime import optim, sharding, start, train_state
from blip_jax.runtime.config import Config
from blip_jax.tasks import base

# Keys with the length of a text in tokens.
_LENGTHS = (
  ("data", "max_length"),
  ("vqa", "max_answer_length"),
  ("dialog", "context_length"),
)


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run; see `build`.

  Attributes:
    config: of the run; see `build` about its numbers of steps.
    mesh: the devices.
    tokenizer: of the texts.
    task: model and loss.
  """

  config: Config
  mesh: jax.sharding.Mesh
  tokenizer: tokenizer_lib.Tokenizer
  task: base.Task

  @functools.cached_property
  def card(self) -> card.Card:
    """The model description in the checkpoints of this run."""
    config = self.config
    return card.Card(
      task_table.of(config).file.FAMILY,
      self.task.model.config,
      run_config.prompt(config),
      dict(config.generation) if "generation" in config else {},
    )

  @property
  def model_files(self) -> dict[str, str]:
    """Contents of the companion files of the parameters, by name."""
    return companions.model_files(self.card, self.tokenizer)

  def open_weights(self, name_or_path: str) -> start.Weights:
    """Weights for this model, of any checkpoint that `blip_jax.load` opens.

    Raises:
      ValueError: there is no such checkpoint, or it cannot be adapted.
    """
    return opening.open_weights(name_or_path, self.card)

  @functools.cached_property
  def optimiser(
    self,
  ) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW and its learning rate schedule.

    Raises:
      ValueError: the config has no number of steps, or an unknown schedule.
    """
    return optim.make(self.config.optim, self.config.num_steps)

  @property
  def init_fn(self) -> Callable[[Any], tuple[Any, Any]]:
    """`params | None -> (params, momentum)`.

    New parameters and the momentum state depend on `config.seed` alone.
    """
    seed, task = self.config.seed, self.task

    def init(params: Any | None) -> tuple[Any, Any]:
      key_params, key_momentum = jax.random.split(jax.random.key(seed))
      if params is None:
        params = task.init(key_params)
      return params, task.init_momentum(params, key_momentum)

    return init

  def abstract_state(
    self, tx: optax.GradientTransformation | None = None
  ) -> train_state.TrainState:
    """Shapes, dtypes and shardings of the state.

    Args:
      tx: optimiser; by default the one of `optimiser`.
    """
    tx = tx or self.optimiser[0]
    return train_state.abstract(self.init_fn, tx, self.mesh)

  def create_state(
    self,
    params: Any = None,
    tx: optax.GradientTransformation | None = None,
  ) -> train_state.TrainState:
    """The sharded state of step 0.

    Args:
      params: newly initialised by default.
      tx: optimiser; by default the one of `optimiser`.
    """
    tx = tx or self.optimiser[0]
    return train_state.create(self.init_fn, tx, self.mesh, params)

  def example(self, image: examples.ImageTransform) -> examples.Example:
    """The function from records to examples.

    Args:
      image: brings a decoded image to the model's size.
    """
    return task_table.of(self.config).file.example(
      self.config, self.tokenizer, image
    )

  @property
  def eval_example(self) -> examples.Example:
    """The function from records to examples, without augmentation."""
    return self.example(transforms.EvalImage(self.config.model.image_size))

  def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch."""
    example = self.eval_example
    blank = example.collate([example.blank()] * self.config.batch_size)
    blank["valid"] = np.ones(self.config.batch_size, bool)
    split = sharding.batch_sharding(self.mesh)
    return {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)
      for name, x in blank.items()
    }


def validate(config: Config) -> None:
  """Checks a config before anything is read or allocated.

  Raises:
    ValueError: names the key, the allowed values, and the value found.
  """
  task = task_table.of(config)
  run_config.validate(config)
  task.file.check(config)


def load_tokenizer(config: Config) -> tokenizer_lib.Tokenizer:
  """Loads `config.tokenizer`: a directory, a hub id, or "scenes"."""
  name = config.tokenizer
  path = scenes.vocab_dir() if name == "scenes" else name
  return tokenizer_lib.Tokenizer.load(path)


def make_mesh(
  config: Config, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
  """Arranges devices as `config.mesh` says.

  Args:
    config: of a task.
    devices: all by default.

  Raises:
    ValueError: the mesh does not fit the devices, or the batch the mesh.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  num_shards = sharding.num_data_shards(mesh)
  size, accum_steps = config.batch_size, config.grad_accum_steps
  multiple = num_shards * accum_steps
  if config.job == "train" and size % multiple:
    times = (
      f" times {accum_steps} micro-batches (config.grad_accum_steps)"
      if accum_steps > 1
      else ""
    )
    raise ValueError(
      f"config.batch_size: {size} examples do not split over {num_shards} data "
      f"shards (config.mesh.data * config.mesh.fsdp){times}; nearest: "
      f"{max(size // multiple, 1) * multiple}"
    )
  return mesh


def build(
  config: Config,
  mesh: jax.sharding.Mesh | None = None,
  tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> Run:
  """Builds the parts of a run.

  Args:
    config: config of a task; see `context.resolve`. Its numbers of steps are
      needed by the optimiser only; if they depend on the data, see
      `config.with_steps`.
    mesh: by default that of `config.mesh`.
    tokenizer: by default that of `config.tokenizer`.

  Raises:
    ValueError: there is no such task or model variant, the model does not
      split over the mesh, or texts are longer than the text tower allows.
  """
  config = context.complete(config)
  mesh = make_mesh(config) if mesh is None else mesh
  tokenizer = load_tokenizer(config) if tokenizer is None else tokenizer
  entry = task_table.of(config)
  model = make_model(config, entry.file.FAMILY, tokenizer, mesh)
  _check_heads(config, model.config, mesh.shape["tensor"])
  _check_lengths(config, model.config.med.max_positions)
  prompt = run_config.prompt(config)
  task = entry.file.make(
    config,
    model,
    prompt_length=len(tokenizer.prompt_ids(prompt)),
    num_shards=sharding.num_data_shards(mesh),
  )
  return Run(config, mesh, tokenizer, task)


def make_model(
  config: Config,
  family: str,
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
) -> Any:
  """Returns the module of a family with the sizes of `config.model`.

  Raises:
    ValueError: there is no such variant, or a size does not fit another.
  """
  c = config.model
  overrides = {"patch_size": c.patch_size, "drop_path": c.drop_path}
  sizes = model_config.variant(
    c.variant,
    image_size=c.image_size,
    vocab_size=tokenizer.vocab_size,
    tokens=model_config.SpecialTokens(**tokenizer.special_ids),
    dtype=c.dtype,
    vit={
      "remat": c.vit_remat,
      **{key: value for key, value in overrides.items() if value is not None},
    },
    med={"dropout": c.dropout, "remat": c.text_remat},
  )
  vit = placement.place(sizes.vit, [*mesh.devices.flat], c.attention)
  return families.build(family, dataclasses.replace(sizes, vit=vit))


def _check_heads(
  config: Config, sizes: model_config.BlipConfig, num_tensor: int
) -> None:
  for tower in (sizes.vit, sizes.med):
    if tower.num_heads % num_tensor:
      raise ValueError(
        f"config.mesh.tensor: {tower.num_heads} attention heads of variant "
        f"{config.model.variant!r} do not split over {num_tensor} devices"
      )


def _check_lengths(config: Config, positions: int) -> None:
  lengths = {
    f"{section}.{name}": config[section][name]
    for section, name in _LENGTHS
    if section in config and name in config[section]
  }
  for key, length in lengths.items():
    if length > positions:
      raise ValueError(
        f"config.{key}: the text tower has {positions} positions, found "
        f"{length}; set --config.{key}={positions} or less"
      )
