"""Checkpoints opened as models, and as weights of a run."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import blip_jax
from blip_jax.convert import opening, weights, write
from blip_jax.models import card as card_lib
from blip_jax.models import families
from blip_jax.runtime import saved_arrays, sharding
from blip_jax.tasks.momentum import NO_IMAGE
from tests import helpers


def test_load_shards_parameters_over_the_mesh():
  """The outputs do not depend on the mesh."""
  sizes = {"data": 1, "fsdp": 4, "tensor": 2}
  mesh = sharding.make_mesh(sizes)
  split = blip_jax.load(
    helpers.golden_checkpoint("blip_decoder"), mesh=mesh, **helpers.OPEN_GOLDEN
  )
  kernel = split.params["text_decoder"]["layers"]["fc_in"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 128)
  one = blip_jax.load(
    helpers.golden_checkpoint("blip_decoder"), **helpers.OPEN_GOLDEN
  )
  image = helpers.image(helpers.arrays("blip_decoder")["image"])
  np.testing.assert_allclose(
    split.apply(image, method="encode_image"),
    one.apply(image, method="encode_image"),
    atol=1e-5,
  )
  assert one.card.prompt == "a picture of "
  assert one.card.generation["num_beams"] == 3
  assert one.tokenizer.vocab_size == 424


def test_load_gives_both_text_towers_the_shared_weights():
  model = blip_jax.load(
    helpers.golden_checkpoint("blip_pretrain"), **helpers.OPEN_GOLDEN
  )
  state = helpers.state_dict("blip_pretrain")
  np.testing.assert_array_equal(
    model.params["text_decoder"]["word_embeddings"],
    state["text_decoder.bert.embeddings.word_embeddings.weight"],
  )


def test_a_file_with_a_released_name_is_compared_with_the_release(tmp_path):
  shutil.copy(
    helpers.golden_checkpoint("blip_decoder"), tmp_path / "model_vqa.pth"
  )
  checkpoint = opening.open_checkpoint(
    tmp_path / "model_vqa.pth", **helpers.OPEN_GOLDEN
  )
  (warning,) = checkpoint.report.warnings
  assert warning.startswith(
    "model_vqa: expected a vqa model, ViT with 12 layers of width 768, images "
    "of 480 x 480 pixels; found a caption model, ViT with 2 layers of width "
    "48, images of 32 x 32 pixels."
  )
  checkpoint = helpers.open_golden("blip_decoder")
  assert not checkpoint.report.warnings


def test_a_loaded_model_has_the_dtype_that_it_computes_in():
  source = helpers.golden_checkpoint("blip_decoder")
  model = blip_jax.load(source, dtype="bfloat16", **helpers.OPEN_GOLDEN)
  assert model.card.config == model.module.config
  assert model.card.config.vit.dtype == "bfloat16"
  assert model.card.config.med.dtype == "bfloat16"
  for dtype in ("float16", "float64", "bf16", ""):
    with pytest.raises(
      ValueError, match=r"dtype: .*'float32', 'bfloat16', 'float8'\)"
    ):
      blip_jax.load(source, dtype=dtype, **helpers.OPEN_GOLDEN)


def test_usual_meshes_are_taken():
  source = helpers.golden_checkpoint("blip_decoder")
  for mesh in (2, jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])):
    model = blip_jax.load(source, mesh=mesh, **helpers.OPEN_GOLDEN)
    assert dict(model.mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    assert len(model.caption(np.zeros((3, 8, 8, 3), np.uint8))) == 3


def test_a_checkpoint_is_shown_briefly():
  assert len(repr(helpers.open_golden("blip_pretrain"))) < 200


def test_unknown_released_names_get_a_suggestion():
  with pytest.raises(ValueError, match=r"mean .*model_base_retrieval_coco"):
    blip_jax.load("model_base_retreival_coco")
  with pytest.raises(ValueError, match="task: expected one of"):
    blip_jax.load("model_base", task="captioning")


def test_a_run_starts_from_external_weights():
  """`config.init.weights` are adapted, and loaded onto the shards."""
  opened = helpers.open_golden("blip_pretrain")
  config = dataclasses.replace(
    opened.card.config,
    vit=dataclasses.replace(opened.card.config.vit, image_size=(48, 48)),
  )
  card = card_lib.Card("caption", config)
  opened = opening.open_weights(
    str(helpers.golden_checkpoint("blip_pretrain")), card
  )
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
  abstract = sharding.abstract_state(families.abstract("caption", config), mesh)
  expected = saved_arrays.by_path(abstract)
  assert not saved_arrays.differences(opened.stored, expected)
  loaded = opened.load(expected)
  path = "visual_encoder/blocks/fc_in/kernel"
  kernel = loaded[path]
  assert (
    kernel.sharding == expected["visual_encoder/blocks/fc_in/kernel"].sharding
  )
  np.testing.assert_array_equal(
    kernel[0],
    helpers.state_dict("blip_pretrain")[
      "visual_encoder.blocks.0.mlp.fc1.weight"
    ].T,
  )
  assert loaded["visual_encoder/pos_embed"].shape == (1, 37, 48)
  assert "4 x 4 to 6 x 6" in str(opened)


def test_retrieval_starts_with_the_momentum_state_of_pretraining():
  """At another image size, and with unknown image ids in the queue."""
  opened = helpers.open_golden("blip_pretrain")
  vit = dataclasses.replace(opened.card.config.vit, image_size=(48, 48))
  config = dataclasses.replace(opened.card.config, vit=vit)
  card = card_lib.Card("retrieval", config)
  state = opening.open_weights(
    str(helpers.golden_checkpoint("blip_pretrain")), card
  ).momentum
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
  shapes = sharding.abstract_state(saved_arrays.nested(state.stored), mesh)
  loaded = state.load(saved_arrays.by_path(shapes))
  external = helpers.state_dict("blip_pretrain")
  np.testing.assert_array_equal(
    loaded["image_queue"], external["image_queue"].T
  )
  assert (np.asarray(loaded["idx_queue"]) == NO_IMAGE).all()
  assert loaded["params_m/visual_encoder/pos_embed"].shape == (1, 37, 48)
  np.testing.assert_array_equal(
    loaded["params_m/text_proj/bias"], external["text_proj_m.bias"]
  )
  captioner = dataclasses.replace(card, family="caption")
  opened = opening.open_weights(
    str(helpers.golden_checkpoint("blip_pretrain")), captioner
  )
  assert opened.momentum is None


@pytest.mark.parametrize(
  "source, prompt", [("", ""), ("model_base.pth", "a picture of ")]
)
def test_a_run_captions_with_the_prompt_that_it_was_trained_with(
  source, prompt, tmp_path
):
  """It was none; released checkpoints caption with BLIP's."""
  opened = helpers.open_golden("blip_pretrain")
  card = dataclasses.replace(opened.card, source=source)
  opened = dataclasses.replace(opened, card=card)
  path = write.write(opened, tmp_path / "run", "orbax")
  captioner = opening.open_checkpoint(path, task="caption")
  assert captioner.card.prompt == prompt


def test_a_leaf_copies_only_its_shards(monkeypatch):
  """Each device gets a copy of its shard, nothing more."""
  copied = []
  array = np.arange(64, dtype=np.float32).reshape(8, 8)
  copy = opening._copy
  monkeypatch.setattr(
    opening, "_copy", lambda x: copied.append(x.size) or copy(x)
  )
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  put = opening.put(weights.Leaf.from_array(array), where)
  np.testing.assert_array_equal(put, array)
  assert copied == [8] * 8


def test_a_native_checkpoint_is_loaded_directly_onto_the_mesh(
  tmp_path, monkeypatch
):
  """Without a copy in host memory, unless it is adapted."""
  source = helpers.golden_checkpoint("blip_pretrain")
  checkpoint = opening.open_checkpoint(source, **helpers.OPEN_GOLDEN)
  write.write(checkpoint, tmp_path / "run", "orbax")
  expected = blip_jax.load(
    helpers.golden_checkpoint("blip_pretrain"), **helpers.OPEN_GOLDEN
  )

  def refuse(*args):
    raise AssertionError("read to the host")

  monkeypatch.setattr(saved_arrays.Arrays, "load", refuse)
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
  model = blip_jax.load(tmp_path / "run", mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
  with pytest.raises(AssertionError, match="to the host"):
    blip_jax.load(tmp_path / "run", task="caption")


@pytest.mark.parametrize("size", ["32", 32.0, (32, 48), [32], None, 33, True])
def test_the_side_of_an_image_is_a_number_of_patches(size):
  """Type checks of the tests would refuse most of these before `load` does."""
  with pytest.raises(ValueError, match=r"image_size: expected the side") as err:
    opening._side(size, 8)
  assert str(err.value).endswith(f"found {size!r}")
  assert opening._side(np.int64(48), 8) == 48
