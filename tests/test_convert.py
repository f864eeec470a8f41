"""Weights in and out: the command line, the rules, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from blip_jax.tools import convert_checkpoint

import blip_jax
from blip_jax.convert import (
  adapt,
  model_configs,
  opening,
  reader,
  tensor_files,
  weights,
  write,
)
from blip_jax.data import scenes
from blip_jax.models import card as card_lib
from blip_jax.models import families, vit
from blip_jax.runtime import sharding, snapshot
from blip_jax.tasks.momentum import NO_IMAGE
from tests import helpers

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = helpers.GOLDEN
TINY = GOLDEN / "tokenizer" / "tiny"
CONFIG = GOLDEN / "configs" / "med_config.json"
CHECKPOINTS = ("blip_base", "blip_decoder", "blip_nlvr_deep", "blip_pretrain")
LIKE = dict(model_config=CONFIG, tokenizer=TINY)


def golden(name):
  return GOLDEN / "ckpt" / f"{name}.pth"


def convert(*args):
  return convert_checkpoint.main([str(arg) for arg in args])


def config_of(name):
  deep = GOLDEN / "configs" / "med_config_nlvr_deep.json"
  return deep if name == "blip_nlvr_deep" else CONFIG


def assert_same_state(path, other):
  a, b = reader.read(path), reader.read(other)
  assert set(a) == set(b)
  for name in a:
    assert a.dtype(name) == b.dtype(name), name
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def resaved(tmp_path, change, name="blip_decoder"):
  """A golden checkpoint after `change` had its way with the state dict."""
  state = dict(reader.read(golden(name)))
  change(state)
  path = tmp_path / "changed.pth"
  tensor_files.save_torch(path, state)
  return path


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_round_trip_is_bit_equal(tmp_path, capsys, name):
  """The original's file, ours, and the original's again."""
  ours, back = tmp_path / "ours", tmp_path / "back"
  flags = "--model-config", config_of(name), "--tokenizer", TINY
  assert convert(golden(name), ours, *flags) == 0
  told = capsys.readouterr().out
  assert "missing: 0" in told and "unexpected: 0" in told
  # What lies beside the weights is enough from here on.
  assert convert(ours, back, "--layout", "original") == 0
  assert_same_state(golden(name), back / "model.pth")
  assert json.loads((back / "med_config.json").read_text())["vocab_size"] == 424
  assert (back / "vocab.txt").exists()
  assert not list(tmp_path.glob(".*"))


def test_round_trip_through_hugging_face(tmp_path):
  theirs, ours, back = (tmp_path / name for name in ("hf", "ours", "back"))
  flags = "--model-config", CONFIG, "--tokenizer", TINY
  assert convert(golden("blip_decoder"), theirs, "--layout", "hf", *flags) == 0
  assert convert(theirs, ours) == 0
  assert convert(ours, back, "--layout", "original") == 0
  assert_same_state(golden("blip_decoder"), back / "model.pth")
  config = json.loads((theirs / "config.json").read_text())
  assert config["architectures"] == ["BlipForConditionalGeneration"]
  assert config["text_config"]["num_attention_heads"] == 4
  size = json.loads((theirs / "preprocessor_config.json").read_text())["size"]
  assert size == {"height": 32, "width": 32}


def test_the_original_may_be_one_file(tmp_path):
  path = tmp_path / "model.pth"
  flags = "--model-config", CONFIG, "--tokenizer", TINY
  assert (
    convert(golden("blip_decoder"), path, "--layout", "original", *flags) == 0
  )
  assert_same_state(golden("blip_decoder"), path)


def test_pretraining_becomes_every_task(tmp_path):
  """What each task takes, and what it starts without."""
  fresh = {
    "nlvr": {"params/cls_head/fc_in", "params/cls_head/fc_out"},
    # 48 wide image tokens, but 64 wide questions.
    "vqa": {
      f"params/text_decoder/layer_{i}/crossattention/{name}"
      for i in range(2)
      for name in ("key", "value")
    },
  }
  for task in families.FAMILIES:
    checkpoint = opening.open_checkpoint(
      golden("blip_pretrain"), task=task, **LIKE
    )
    made = checkpoint.report.changed.get(adapt.FRESH.format("pretrain"), [])
    assert {path.rpartition("/")[0] for path in made} == fresh.get(task, set())
    assert checkpoint.card.family == task
    expected = families.abstract(task, checkpoint.card.config)
    assert {p: x.shape for p, x in checkpoint.stored.items()} == {
      p: x.shape for p, x in snapshot.by_path(expected).items()
    }


def test_nlvr_starts_with_one_cross_attention_twice():
  leaves = opening.open_checkpoint(
    golden("blip_pretrain"), task="nlvr", **LIKE
  ).leaves
  state = helpers.state_dict("blip_pretrain")
  theirs = "text_encoder.encoder.layer.1.crossattention"
  ours = "params/text_encoder/layer_1/crossattention"
  for image in ("image_0", "image_1"):
    np.testing.assert_array_equal(
      leaves[f"{ours}/{image}/query/kernel"].read(),
      state[f"{theirs}.self.query.weight"].T,
    )
    np.testing.assert_array_equal(
      leaves[f"{ours}/{image}/out/bias"].read(),
      state[f"{theirs}.output.dense.bias"],
    )


def test_retrieval_takes_the_queues_of_pretraining():
  leaves = opening.open_checkpoint(
    golden("blip_pretrain"), task="retrieval", **LIKE
  ).leaves
  state = helpers.state_dict("blip_pretrain")
  np.testing.assert_array_equal(
    leaves["momentum/image_queue"].read(), state["image_queue"].T
  )
  assert (leaves["momentum/idx_queue"].read() == -100).all()
  assert leaves["momentum/queue_ptr"].read() == 0
  params_only = opening.open_checkpoint(
    golden("blip_pretrain"), task="retrieval", keep_momentum=False, **LIKE
  )
  assert not params_only.item("momentum")


def test_another_image_size_interpolates_and_says_so():
  checkpoint = opening.open_checkpoint(
    golden("blip_pretrain"), image_size=48, **LIKE
  )
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


def test_half_precision_is_widened(tmp_path):
  def halve(state):
    for name in state:
      if state[name].dtype == np.float32:
        state[name] = state[name].astype(ml_dtypes.bfloat16)

  checkpoint = opening.open_checkpoint(resaved(tmp_path, halve), **LIKE)
  assert "bfloat16 to float32" in checkpoint.report.changed
  leaf = checkpoint.leaves["params/visual_encoder/ln_post/scale"]
  assert leaf.dtype == np.float32 and leaf.read().dtype == np.float32


def test_an_untied_lm_matrix_wins_loudly(tmp_path):
  """As released pre-training files may have it (spec by the original's code:
  the later of two tied names is what is loaded)."""
  matrix = "text_decoder.cls.predictions.decoder.weight"

  def untie(state):
    state[matrix] = state[matrix] + 1

  checkpoint = opening.open_checkpoint(resaved(tmp_path, untie), **LIKE)
  assert any(matrix in text for text in checkpoint.report.warnings)
  np.testing.assert_array_equal(
    checkpoint.leaves["params/text_decoder/word_embeddings"].read(),
    helpers.state_dict("blip_decoder")[matrix] + 1,
  )


def test_untied_text_towers_are_the_decoders_loudly(tmp_path):
  name = "encoder.layer.0.intermediate.dense.bias"

  def untie(state):
    state[f"text_decoder.bert.{name}"] = state[f"text_encoder.{name}"] + 1

  path = resaved(tmp_path, untie, "blip_pretrain")
  checkpoint = opening.open_checkpoint(path, **LIKE)
  assert adapt.DECODER_WINS in checkpoint.report.changed
  assert any(adapt.DECODER_WINS in w for w in checkpoint.report.warnings)
  encoders = helpers.state_dict("blip_pretrain")[f"text_encoder.{name}"]
  ours = "params/text_encoder/layer_0/fc_in/bias"
  np.testing.assert_array_equal(checkpoint.leaves[ours].read(), encoders + 1)
  # A retrieval model has the encoder's own.
  retrieval = opening.open_checkpoint(path, task="itm", **LIKE)
  np.testing.assert_array_equal(retrieval.leaves[ours].read(), encoders)


def lose(state):
  del state["visual_encoder.norm.bias"]


def add(state):
  state["text_decoder.bert.pooler.dense.weight"] = np.zeros(2, np.float32)


def bend(state):
  name = "text_decoder.bert.encoder.layer.1.output.dense.weight"
  state[name] = state[name][:-1]


def shorten_tied(state):
  name = "text_decoder.cls.predictions.decoder.bias"
  state[name] = state[name][:-1]


def rename_all(state):
  for name in list(state):
    state[f"module.{name}"] = state.pop(name)


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (lose, r"- params/visual_encoder/ln_post/bias"),
    (add, r"no BLIP model has: text_decoder\.bert\.pooler\.dense\.weight"),
    (bend, r"layer_1/fc_out/kernel: checkpoint float32\[256, 63\], config"),
    (shorten_tied, r"shapes differ"),
    (rename_all, r"none of its 94 names .* module\.visual_encoder"),
  ],
)
def test_every_name_is_accounted_for(tmp_path, capsys, change, told):
  path = resaved(tmp_path, change)
  flags = "--model-config", CONFIG, "--tokenizer", TINY
  with pytest.raises(ValueError, match=told):
    opening.open_checkpoint(path, **LIKE)
  assert convert(path, tmp_path / "out", *flags) == 1
  assert "convert_checkpoint: " in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_unknown_names_may_be_dropped_by_name(tmp_path):
  path = resaved(tmp_path, add)
  drop = [r"text_decoder\.bert\.pooler\..*"]
  checkpoint = opening.open_checkpoint(path, drop=drop, **LIKE)
  assert checkpoint.report.dropped[weights.ON_REQUEST] == [
    "text_decoder.bert.pooler.dense.weight"
  ]
  # A name that is needed is missed all the same.
  with pytest.raises(
    ValueError, match=r" - params/visual_encoder/ln_post/bias"
  ):
    opening.open_checkpoint(
      path, drop=[*drop, r".*encoder\.norm\.bias"], **LIKE
    )


def test_heads_must_be_told_where_shapes_do_not():
  with pytest.raises(ValueError, match=r"48 wide; how many heads.*--model-con"):
    opening.open_checkpoint(golden("blip_decoder"), tokenizer=TINY)


def test_a_config_of_another_model_is_refused(tmp_path):
  config = json.loads(CONFIG.read_text())
  shutil.copy(GOLDEN / "configs" / "vit.json", tmp_path)
  path = tmp_path / "med_config.json"
  path.write_text(json.dumps({**config, "num_hidden_layers": 3}))
  with pytest.raises(ValueError, match=r"depth of the text tower is 3, .* 2"):
    opening.open_checkpoint(
      golden("blip_decoder"), model_config=path, tokenizer=TINY
    )
  path.write_text("[")
  with pytest.raises(ValueError, match=r"med_config\.json: cannot be read"):
    opening.open_checkpoint(golden("blip_decoder"), model_config=path)
  path.write_text('{"some": "thing"}')
  with pytest.raises(ValueError, match=r"not a model config"):
    opening.open_checkpoint(golden("blip_decoder"), model_config=path)


def test_a_vocabulary_of_another_model_is_refused():
  with pytest.raises(ValueError, match=r"for a model of 424; .*--tokenizer"):
    opening.open_checkpoint(
      golden("blip_decoder"),
      model_config=CONFIG,
      tokenizer=scenes.vocab_dir(),
    )


def test_without_a_vocabulary_it_is_said():
  checkpoint = opening.open_checkpoint(
    golden("blip_decoder"), model_config=CONFIG
  )
  assert checkpoint.tokenizer is None
  assert any("no vocabulary" in text for text in checkpoint.report.warnings)


@pytest.mark.parametrize("task", ["pretrain", "itm", "vqa"])
def test_a_captioner_cannot_become(task):
  with pytest.raises(ValueError, match=r" - params/text_encoder/"):
    opening.open_checkpoint(golden("blip_decoder"), task=task, **LIKE)


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
  (tmp_path / "mine").write_text("precious")
  assert (
    convert(
      golden("blip_decoder"),
      tmp_path / "mine",
      "--model-config",
      CONFIG,
      "--tokenizer",
      TINY,
    )
    == 1
  )
  assert "is there already" in capsys.readouterr().err
  assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("layout", write.LAYOUTS)
def test_nothing_half_written_is_left(tmp_path, monkeypatch, layout):
  """The disk is full after the weights."""

  def full(*_):
    raise OSError(28, "No space left on device")

  checkpoint = opening.open_checkpoint(golden("blip_decoder"), **LIKE)
  monkeypatch.setattr(write.companions, "model_files", full)
  with pytest.raises(OSError, match="No space left"):
    write.write(checkpoint, tmp_path / "out", layout)
  assert not list(tmp_path.iterdir())


def test_hugging_face_has_no_such_class(tmp_path):
  checkpoint = opening.open_checkpoint(golden("blip_pretrain"), **LIKE)
  with pytest.raises(ValueError, match=r"no class for a pretrain .*--task"):
    write.write(checkpoint, tmp_path / "out", "hf")
  vqa = opening.open_checkpoint(golden("blip_pretrain"), task="vqa", **LIKE)
  with pytest.raises(ValueError, match=r"cannot hold"):
    write.write(vqa, tmp_path / "out", "hf")
  assert not list(tmp_path.iterdir())


def test_traps_of_hugging_face_are_set_right():
  """Text heads 8, image epsilon 1e-5: defaults that no shape betrays."""
  hints = model_configs.read_hints(
    {"vision_config": {"hidden_size": 768}, "text_config": {"vocab_size": 9}}
  )
  assert hints.med["num_heads"] == 12
  heads, epsilon = hints.warnings
  assert "num_attention_heads is 8" in heads and "12" in heads
  assert "layer_norm_eps is 1e-05" in epsilon and "1e-06" in epsilon
  with pytest.raises(ValueError, match="hidden_act: expected 'gelu'"):
    model_configs.read_hints(
      {"vision_config": {"hidden_act": "relu"}, "text_config": {}}
    )


def test_load_puts_each_part_on_its_device():
  """A mesh, and outputs that do not depend on it."""
  sizes = {"data": 1, "fsdp": 4, "tensor": 2}
  mesh = sharding.make_mesh(sizes)
  split = blip_jax.load(golden("blip_decoder"), mesh=mesh, **LIKE)
  kernel = split.params["text_decoder"]["layer_0"]["fc_in"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (16, 128)
  one = blip_jax.load(golden("blip_decoder"), **LIKE)
  image = helpers.image(helpers.arrays("blip_decoder")["image"])
  np.testing.assert_allclose(
    split.apply(image, method="encode_image"),
    one.apply(image, method="encode_image"),
    atol=1e-5,
  )
  assert one.card.prompt == "a picture of "
  assert one.card.generation["num_beams"] == 3
  assert one.tokenizer.vocab_size == 424


def test_load_of_pretraining_is_whole():
  """What is stored once is there for both towers."""
  model = blip_jax.load(golden("blip_pretrain"), **LIKE)
  state = helpers.state_dict("blip_pretrain")
  np.testing.assert_array_equal(
    model.params["text_decoder"]["word_embeddings"],
    state["text_decoder.bert.embeddings.word_embeddings.weight"],
  )


def test_a_file_with_a_released_name_is_compared_with_the_release(tmp_path):
  shutil.copy(golden("blip_decoder"), tmp_path / "model_vqa.pth")
  checkpoint = opening.open_checkpoint(tmp_path / "model_vqa.pth", **LIKE)
  (warning,) = checkpoint.report.warnings
  assert warning.startswith(
    "model_vqa: expected a vqa model, ViT with 12 layers of width 768, images "
    "of 480 x 480 pixels; found a caption model, ViT with 2 layers of width "
    "48, images of 32 x 32 pixels."
  )
  checkpoint = opening.open_checkpoint(golden("blip_decoder"), **LIKE)
  assert not checkpoint.report.warnings


def test_unknown_names_get_a_suggestion():
  with pytest.raises(ValueError, match=r"mean .*model_base_retrieval_coco"):
    blip_jax.load("model_base_retreival_coco")
  with pytest.raises(ValueError, match="task: expected one of"):
    blip_jax.load("model_base", task="captioning")


def test_a_run_starts_from_any_weights():
  """`config.init.weights`: onto the shards, and never more than is there."""
  opened = opening.open_checkpoint(golden("blip_pretrain"), **LIKE)
  config = dataclasses.replace(
    opened.card.config,
    vit=dataclasses.replace(opened.card.config.vit, image_size=(48, 48)),
  )
  card = card_lib.Card("caption", config)
  found = opening.open_weights(str(golden("blip_pretrain")), card)
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
  abstract = sharding.abstract_state(families.abstract("caption", config), mesh)
  wanted = snapshot.by_path(abstract)
  assert not snapshot.differences(found.stored, wanted)
  loaded = found.load(wanted)
  path = "visual_encoder/block_0/fc_in/kernel"
  kernel = loaded[path]
  assert (
    kernel.sharding == wanted["visual_encoder/block_0/fc_in/kernel"].sharding
  )
  np.testing.assert_array_equal(
    kernel,
    helpers.state_dict("blip_pretrain")[
      "visual_encoder.blocks.0.mlp.fc1.weight"
    ].T,
  )
  assert loaded["visual_encoder/pos_embed"].shape == (1, 37, 48)
  assert "4 x 4 to 6 x 6" in str(found)


def test_retrieval_starts_with_the_twin_and_queues_of_pretraining():
  """At another size of pictures; nobody knows whose the features are."""
  opened = opening.open_checkpoint(golden("blip_pretrain"), **LIKE)
  vit = dataclasses.replace(opened.card.config.vit, image_size=(48, 48))
  config = dataclasses.replace(opened.card.config, vit=vit)
  card = card_lib.Card("retrieval", config)
  twin = opening.open_weights(str(golden("blip_pretrain")), card).momentum
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
  shapes = sharding.abstract_state(snapshot.nested(twin.stored), mesh)
  found = twin.load(snapshot.by_path(shapes))
  theirs = helpers.state_dict("blip_pretrain")
  np.testing.assert_array_equal(found["image_queue"], theirs["image_queue"].T)
  assert (np.asarray(found["idx_queue"]) == NO_IMAGE).all()
  assert found["params_m/visual_encoder/pos_embed"].shape == (1, 37, 48)
  np.testing.assert_array_equal(
    found["params_m/text_proj/bias"], theirs["text_proj_m.bias"]
  )
  captioner = dataclasses.replace(card, family="caption")
  opened = opening.open_weights(str(golden("blip_pretrain")), captioner)
  assert opened.momentum is None


def test_a_leaf_reads_only_its_shard(monkeypatch):
  """No process copies more of an array than its devices hold."""
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


def test_a_run_is_loaded_straight_onto_the_mesh(tmp_path, monkeypatch):
  """Not by way of the host's memory; unless it becomes something else."""
  assert (
    convert(
      golden("blip_pretrain"),
      tmp_path / "run",
      "--model-config",
      CONFIG,
      "--tokenizer",
      TINY,
    )
    == 0
  )
  expected = blip_jax.load(golden("blip_pretrain"), **LIKE)

  def refuse(*args):
    raise AssertionError("read to the host")

  monkeypatch.setattr(snapshot.Arrays, "load", refuse)
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
  model = blip_jax.load(tmp_path / "run", mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
  with pytest.raises(AssertionError, match="to the host"):
    blip_jax.load(tmp_path / "run", task="caption")
