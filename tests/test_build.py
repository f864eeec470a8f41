"""The parts of a run, built from a config without opening its data."""

import jax
import jax.numpy as jnp
import pytest

from blip_jax import build, train
from blip_jax.data import inputs
from blip_jax.runtime import sharding
from blip_jax.tasks import caption, dialog, nlvr, pretrain, retrieval, vqa
from tests import helpers

TASKS = {"pretrain": pretrain, "caption": caption, "retrieval": retrieval}
ALL_TASKS = {**TASKS, "vqa": vqa, "nlvr": nlvr, "dialog": dialog}
MISSING = "no/such/captions.json"


def make_config(name):
  """A small run of a task, whose training data does not exist."""
  config = ALL_TASKS[name].defaults()
  config.data.train = (MISSING,)
  config.data.num_workers = 0
  config.tokenizer = "scenes"
  config.batch_size = 4
  config.num_steps = config.optim.steps_per_epoch = 2
  config.model.variant = "tiny"
  config.model.image_size = 16
  if name in ("pretrain", "retrieval"):
    config[name].queue_size = 8
  if name == "dialog":
    config.data.max_length = config.dialog.context_length = 16
  return config


def build_run(config):
  names = dict(zip(sharding.AXES, (1, 2, 1), strict=True))
  mesh = sharding.make_mesh(names, jax.devices()[:2])
  return build.build(config, mesh)


@pytest.mark.parametrize("name", TASKS)
def test_a_step_is_lowered_without_opening_data(name):
  config = make_config(name)
  build.validate(config)
  run = build_run(config)
  tx, learning_rate = run.optimiser
  assert learning_rate(0) > 0
  state, batch = run.abstract_state(), run.abstract_batch()
  step = train.make_train_step(run.task, tx, config.seed)
  with sharding.activate(run.mesh):
    lowered = step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.int32))
  # The next state has the shapes of the state before the step.
  next_state, metrics = lowered.out_info
  jax.tree.map(
    lambda after, before: (
      pytest.fail(f"{after} after {before}")
      if (after.shape, after.dtype) != (before.shape, before.dtype)
      else None
    ),
    next_state,
    state,
  )
  assert metrics["loss"].shape == ()
  # Nothing above has looked for the data.
  with pytest.raises(ValueError, match=MISSING):
    inputs.train_loader(config, run.example, "")


@pytest.mark.parametrize("name", TASKS)
def test_the_abstract_batch_is_the_loaders(name, tmp_path):
  config = make_config(name)
  run = build_run(config)
  config.data.train = ("scenes:train?num=8",)
  loader = inputs.train_loader(config, run.example, str(tmp_path))
  try:
    batch, _ = next(loader)
  finally:
    loader.close()
  batch = sharding.put_batch(batch, run.mesh)
  abstract = run.abstract_batch()
  describe = lambda x: (x.shape, x.dtype)
  assert {k: describe(x) for k, x in batch.items()} == {
    k: describe(x) for k, x in abstract.items()
  }
  for key, x in batch.items():
    assert x.sharding.is_equivalent_to(abstract[key].sharding, x.ndim), key


@pytest.mark.parametrize(
  "name, key",
  [
    *((name, "data.max_length") for name in ALL_TASKS),
    ("vqa", "vqa.max_answer_length"),
    ("dialog", "dialog.context_length"),
  ],
)
def test_texts_longer_than_the_positions_are_refused(name, key):
  config = make_config(name)
  build_run(config)
  config.update_from_flattened_dict({key: 65})
  with pytest.raises(ValueError, match=rf"config\.{key}: .*64 positions.*65"):
    build_run(config)


def test_the_card_describes_the_run():
  config = make_config("caption")
  run = build_run(config)
  assert run.card.family == "caption"
  assert run.card.prompt == "a picture of "
  assert run.card.generation == config.generation.to_dict()
  assert run.card.config.vit.image_size == (16, 16)
  assert run.card.config.med.vocab_size == helpers.scenes_tokenizer().vocab_size
  assert build_run(make_config("pretrain")).card.generation == {}


def test_state_depends_on_the_seed_alone():
  config = make_config("retrieval")
  first, second = (
    build_run(config).create_state().momentum.text_queue for _ in range(2)
  )
  helpers.assert_same(first, second)
  config.seed += 1
  other = build_run(config).create_state().momentum.text_queue
  assert (first != other).any()


@pytest.mark.parametrize(
  "batch_size, nearest", [(3, 8), (7, 8), (9, 8), (15, 8), (17, 16), (8, None)]
)
def test_a_batch_must_split_over_the_devices(batch_size, nearest):
  config = make_config("pretrain")
  config.batch_size = batch_size
  if nearest is None:
    assert build.make_mesh(config).devices.size == 8
    return
  with pytest.raises(ValueError, match=f"over 8 data .* nearest: {nearest}$"):
    build.make_mesh(config)
  # An evaluation pads its batches.
  config.job = "evaluate"
  build.make_mesh(config)


def test_micro_batches_must_split_over_the_devices():
  config = make_config("caption")
  config.batch_size, config.grad_accum_steps = 24, 2
  with pytest.raises(ValueError, match=r"times 2 micro-.* nearest: 16$"):
    build.make_mesh(config)
  config.batch_size = 16
  build.make_mesh(config)


@pytest.mark.parametrize("name", ["pretrain", "retrieval"])
def test_accumulation_is_refused_where_it_changes_the_loss(name):
  config = make_config(name)
  config.grad_accum_steps = 2
  with pytest.raises(ValueError, match=rf"grad_accum_steps: {name} compares"):
    build.validate(config)


def make_model(config):
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  return build.make_model(config, "pretrain", helpers.scenes_tokenizer(), mesh)


def test_the_model_of_a_config():
  """What is unset is the variant's; the rest is what the config says."""
  config = make_config("pretrain")
  config.model.update(variant="large", patch_size=16, image_size=32)
  config.model.update(vit_remat="full", text_remat="dots")
  model = make_model(config)
  vit, med = model.config.vit, model.config.med
  assert (vit.drop_path, vit.patch_size, vit.remat) == (0.1, 16, "full")
  assert vit.attention == "xla"
  assert (med.dropout, med.remat) == (0.1, "dots")
  assert vit.dtype == med.dtype == "bfloat16"
  config.model.update(drop_path=0.0, dropout=0.25, dtype="float32")
  config.model.attention = "cudnn"
  model = make_model(config)
  assert model.config.vit.drop_path == 0
  assert model.config.vit.attention == "xla"  # no GPU
  assert model.config.med.dropout == 0.25
  assert model.config.vit.dtype == model.config.med.dtype == "float32"
