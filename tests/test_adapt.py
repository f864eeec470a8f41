"""Rules that turn the parameters of one model family into another's."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from blip_jax.convert import adapt, opening, weights
from blip_jax.models import families, vit
from blip_jax.runtime import saved_arrays
from tests import helpers


def test_pretraining_becomes_every_family():
  """Which parameters each family takes, and which it initialises."""
  fresh = {
    "nlvr": {"params/cls_head/fc_in", "params/cls_head/fc_out"},
    # Image tokens have width 48, question states 64.
    "vqa": {
      f"params/text_decoder/layers/crossattention/{name}"
      for name in ("key", "value")
    },
  }
  for task in families.FAMILIES:
    checkpoint = helpers.open_golden("blip_pretrain", task=task)
    initialised = checkpoint.report.changed.get(
      adapt.FRESH.format("pretrain"), []
    )
    assert {path.rpartition("/")[0] for path in initialised} == fresh.get(
      task, set()
    )
    (*warnings,) = checkpoint.report.warnings
    assert len(warnings) == (task in fresh)
    for warning in warnings:
      assert "at random, from seed 0: no pretrain checkpoint has it" in warning
      assert f"Train the {task} model before you use it" in warning
      assert warning.startswith(initialised[0])
    assert checkpoint.card.family == task
    expected = families.abstract(task, checkpoint.card.config)
    assert {p: x.shape for p, x in checkpoint.stored.items()} == {
      p: x.shape for p, x in saved_arrays.by_path(expected).items()
    }


def test_nlvr_copies_the_cross_attention_for_both_images():
  leaves = helpers.open_golden("blip_pretrain", task="nlvr").leaves
  state = helpers.state_dict("blip_pretrain")
  external = "text_encoder.encoder.layer.1.crossattention"
  native = "params/text_encoder/layers/crossattention"
  for image in ("image_0", "image_1"):
    np.testing.assert_array_equal(
      leaves[f"{native}/{image}/query/kernel"].read()[1],
      state[f"{external}.self.query.weight"].T,
    )
    np.testing.assert_array_equal(
      leaves[f"{native}/{image}/out/bias"].read()[1],
      state[f"{external}.output.dense.bias"],
    )


def test_retrieval_takes_the_queues_of_pretraining():
  leaves = helpers.open_golden("blip_pretrain", task="retrieval").leaves
  state = helpers.state_dict("blip_pretrain")
  np.testing.assert_array_equal(
    leaves["momentum/image_queue"].read(), state["image_queue"].T
  )
  assert (leaves["momentum/idx_queue"].read() == -100).all()
  assert leaves["momentum/queue_ptr"].read() == 0
  params_only = helpers.open_golden(
    "blip_pretrain", task="retrieval", keep_momentum=False
  )
  assert not params_only.item("momentum")


def test_the_queues_of_retrieval_start_at_their_first_row():
  """Wherever pre-training stopped; in the golden checkpoint that is row 0."""
  pretrained = helpers.open_golden("blip_pretrain")
  stopped = {"momentum/queue_ptr": weights.Leaf.from_array(np.int32(4))}
  leaves = adapt.to_family(
    {**pretrained.leaves, **stopped},
    "pretrain",
    "retrieval",
    pretrained.card.config,
    weights.Report(),
  )
  assert leaves["momentum/queue_ptr"].read() == 0


def test_position_embeddings_are_interpolated_and_reported():
  checkpoint = helpers.open_golden("blip_pretrain", image_size=48)
  (rule,) = [r for r in checkpoint.report.changed if "4 x 4 to 6 x 6" in r]
  assert checkpoint.report.changed[rule] == [
    "params/visual_encoder/pos_embed",
    "momentum/params_m/visual_encoder/pos_embed",
  ]
  state = helpers.state_dict("blip_pretrain")
  for name, path in zip(
    ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed"),
    checkpoint.report.changed[rule],
    strict=True,
  ):
    expected = vit.resize_pos_embed(jnp.asarray(state[name]), (4, 4), (6, 6))
    np.testing.assert_array_equal(checkpoint.leaves[path].read(), expected)


def test_position_embeddings_of_the_same_grid_stay():
  checkpoint = helpers.open_golden("blip_pretrain", image_size=32)
  assert not [rule for rule in checkpoint.report.changed if "4 x 4" in rule]
  np.testing.assert_array_equal(
    checkpoint.leaves["params/visual_encoder/pos_embed"].read(),
    helpers.state_dict("blip_pretrain")["visual_encoder.pos_embed"],
  )


def test_half_precision_becomes_float32(tmp_path):
  def halve(state):
    for name in state:
      if state[name].dtype == np.float32:
        state[name] = state[name].astype(ml_dtypes.bfloat16)

  checkpoint = opening.open_checkpoint(
    helpers.save_changed(tmp_path, halve), **helpers.OPEN_GOLDEN
  )
  assert "bfloat16 to float32" in checkpoint.report.changed
  leaf = checkpoint.leaves["params/visual_encoder/ln_post/scale"]
  assert leaf.dtype == np.float32 and leaf.read().dtype == np.float32


def test_untied_text_towers_take_the_decoder_with_a_warning(tmp_path):
  name = "encoder.layer.0.intermediate.dense.bias"

  def untie(state):
    state[f"text_decoder.bert.{name}"] = state[f"text_encoder.{name}"] + 1

  path = helpers.save_changed(tmp_path, untie, "blip_pretrain")
  checkpoint = opening.open_checkpoint(path, **helpers.OPEN_GOLDEN)
  assert adapt.DECODER_WINS in checkpoint.report.changed
  assert any(adapt.DECODER_WINS in w for w in checkpoint.report.warnings)
  encoder_bias = helpers.state_dict("blip_pretrain")[f"text_encoder.{name}"]
  native_path = "params/text_encoder/layers/fc_in/bias"
  np.testing.assert_array_equal(
    checkpoint.leaves[native_path].read()[0], encoder_bias + 1
  )
  # An ITM model keeps the encoder's.
  retrieval = opening.open_checkpoint(path, task="itm", **helpers.OPEN_GOLDEN)
  np.testing.assert_array_equal(
    retrieval.leaves[native_path].read()[0], encoder_bias
  )


@pytest.mark.parametrize("task", ["pretrain", "itm", "vqa"])
def test_a_captioner_cannot_become_a_model_with_a_text_encoder(task):
  words = f"used as a model of the family '{task}': it has no .*text_encoder"
  with pytest.raises(ValueError, match=words):
    helpers.open_golden("blip_decoder", task=task)


def retrieval_leaves():
  checkpoint = helpers.open_golden("blip_pretrain", task="retrieval")
  return dict(checkpoint.leaves), checkpoint.card.config


def test_a_complete_model_is_accepted():
  for name in ("blip_pretrain", "blip_retrieval", "blip_decoder", "blip_vqa"):
    checkpoint = helpers.open_golden(name)
    adapt.check(
      checkpoint.leaves, checkpoint.card.family, checkpoint.card.config
    )
  leaves, config = retrieval_leaves()
  adapt.check(leaves, "retrieval", config)


@pytest.mark.parametrize(
  "path, shape, message",
  [
    (
      "momentum/text_queue",
      (11, 32),
      "float32[11, 32], config float32[12, 32]",
    ),
    ("momentum/idx_queue", (11,), "config int32[12]"),
    ("momentum/queue_ptr", (1,), "config int32[]"),
    ("momentum/idx_queue", None, " - momentum/idx_queue"),
    ("momentum/image_queue", None, " - momentum/image_queue"),
    ("momentum/params_m/text_proj/bias", None, " - momentum/params_m/text_p"),
    ("momentum/params_m/temp", (), " + momentum/params_m/temp"),
    ("params/temp", None, " - params/temp"),
    ("params/itm_head/bias", (3,), "config float32[2]"),
  ],
)
def test_what_does_not_fit_is_listed(path, shape, message):
  leaves, config = retrieval_leaves()
  if shape is None:
    del leaves[path]
  else:
    kind = np.int32 if "idx" in path or "ptr" in path else np.float32
    leaves[path] = weights.Leaf.from_array(np.zeros(shape, kind))
  with pytest.raises(ValueError) as error:
    adapt.check(leaves, "retrieval", config)
  assert message in str(error.value)


def test_pre_training_has_no_ids_in_its_queue():
  checkpoint = helpers.open_golden("blip_pretrain")
  ids = {"momentum/idx_queue": weights.Leaf.from_array(np.zeros(12, np.int32))}
  with pytest.raises(ValueError, match=r" \+ momentum/idx_queue"):
    adapt.check(
      {**checkpoint.leaves, **ids}, "pretrain", checkpoint.card.config
    )


@pytest.mark.parametrize(
  "parts, family",
  [
    ("cls_head text_encoder visual_encoder", "nlvr"),
    ("text_decoder itm_head text_encoder", "pretrain"),
    ("text_decoder text_encoder", "vqa"),
    ("text_decoder visual_encoder", "caption"),
    ("itm_head text_encoder text_proj", "itm"),
    ("itm_head text_encoder", "dialog"),
    ("itm_head text_encoder temp", "retrieval"),
    ("itm_head text_encoder momentum", "retrieval"),
    ("text_encoder visual_encoder", "feature"),
  ],
)
def test_a_family_follows_from_its_parts(parts, family):
  paths = [
    "momentum/queue_ptr" if part == "momentum" else f"params/{part}/x"
    for part in parts.split()
  ]
  assert adapt.family_of(paths) == family


def test_parts_of_no_family_are_refused():
  with pytest.raises(
    ValueError, match=r"consists of \['visual_encoder'\] only"
  ):
    adapt.family_of(["params/visual_encoder/x"])


def test_fresh_parameters_are_drawn_as_a_new_model_starts():
  """The same ones every time; the report counts what the checkpoint had."""
  first, second = (
    helpers.open_golden("blip_pretrain", task="nlvr") for _ in range(2)
  )
  path = "params/cls_head/fc_in/kernel"
  head, width = first.leaves[path].read(), first.card.config.med.width
  np.testing.assert_array_equal(second.leaves[path].read(), head)
  np.testing.assert_allclose(head.std(), (3 * width) ** -0.5, rtol=0.05)
  fresh = first.report.changed[adapt.FRESH.format("pretrain")]
  assert first.report.matched == len(first.leaves) - len(fresh)


def test_the_temperature_of_a_scorer_starts_without_a_warning():
  """It serves training only, so that nothing of the model is untrained."""
  checkpoint = helpers.open_golden("blip_itm", task="retrieval")
  assert checkpoint.leaves["params/temp"].read() == np.float32(0.07)
  assert not checkpoint.report.warnings
