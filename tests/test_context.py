"""A model brings its context, and a run is resumed only as itself."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from blip_jax import build, context, evaluate, train
from blip_jax.data import scenes
from blip_jax.runtime import config as run_config
from blip_jax.runtime import resume, snapshot
from tests import short_runs

STEPS = 3


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """A run of the quick start, two steps long, with images of 16 pixels."""
  folder = tmp_path_factory.mktemp("pretrained")
  with pytest.MonkeyPatch.context() as patch:
    short_runs.make_quick(patch)
    config = short_runs.shrunk_config("quickstart")
    config.evals.scenes_val.source = ""
    train.train(config, str(folder))
  return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Eight images with their captions, as a list and as files."""
  folder = tmp_path_factory.mktemp("data")
  rows = []
  for i, record in enumerate(map(scenes.Scenes("val").__getitem__, range(8))):
    Image.fromarray(np.asarray(record["image"])).save(folder / f"{i}.png")
    rows.append({"image": f"{i}.png", "caption": record["caption"]})
  (folder / "rows.json").write_text(json.dumps(rows))
  return folder


def captioning(pretrained, data, **changes):
  """The recipe for one's own images, with nothing said about the model."""
  config = short_runs.load_config("caption_folder")
  config.init.weights = str(pretrained)
  config.data.train = (str(data / "rows.json"),)
  config.data.image_root = str(data)
  config.evals.val.update(source=str(data / "rows.json"), samples=0)
  config.evals.val.image_root = str(data)
  config.batch_size, config.num_steps = 8, STEPS
  config.model.dtype = "float32"
  config.generation.update(max_length=8, num_beams=1)
  config.checkpoint.every_steps = 2
  config.optim.lr = 3e-3
  config.evals.best, config.evals.batch_size = ("val/Bleu_4",), 8
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def captioner(pretrained, data, tmp_path_factory):
  """A captioner that was fine-tuned from `pretrained`, and its results."""
  folder = tmp_path_factory.mktemp("captioner")
  with pytest.MonkeyPatch.context() as patch:
    short_runs.make_quick(patch)
    results = train.train(captioning(pretrained, data), str(folder))
  return folder, results


@pytest.fixture(autouse=True)
def quick_to_compile(monkeypatch):
  short_runs.make_quick(monkeypatch)


def test_a_model_brings_its_vocabulary_and_sizes(captioner, pretrained):
  folder, _ = captioner
  config = resume.config_of(folder)
  sizes = [config["model"][key] for key in ("variant", "image_size")]
  assert sizes == ["tiny", 16] and config["model"]["patch_size"] == 8
  assert config["tokenizer"] == str(snapshot.find(pretrained) / "model")
  card = json.loads((snapshot.find(folder) / "model/model.json").read_text())
  assert card["config"]["med"]["vocab_size"] == 369
  assert card["prompt"] == "a picture of "


def test_what_the_config_says_comes_before_the_model(pretrained, data):
  config = captioning(pretrained, data, **{"model.image_size": 24})
  config.tokenizer = "scenes"
  resolved = context.resolve(config, "nowhere")
  assert (resolved.model.image_size, resolved.tokenizer) == (24, "scenes")
  assert resolved.model.variant == "tiny"
  assert config.model.variant is None, "the caller's config does not change"


def test_without_a_model_the_sizes_are_those_of_blip():
  config = short_runs.load_config("caption_folder")
  config.init.weights = ""
  resolved = context.resolve(config, "nowhere")
  assert (resolved.model.variant, resolved.model.image_size) == ("base", 224)
  assert resolved.tokenizer == "bert-base-uncased"
  assert resolved.caption.prompt == "a picture of "


def test_an_empty_prompt_is_a_prompt(pretrained, data):
  config = captioning(pretrained, data, **{"caption.prompt": ""})
  assert context.resolve(config, "nowhere").caption.prompt == ""


def yielding(config, *given, workdir="nowhere", recipe_variant=None):
  """What `main` makes of a recipe, of which flags changed the keys `given`."""
  recipe_variant = recipe_variant or config.model.variant
  return context.yield_to_model(config, workdir, given, recipe_variant)


def test_recipes_of_the_paper_yield_to_a_model_of_another_variant(pretrained):
  config = short_runs.load_config("caption_coco")
  assert (config.model.variant, config.model.image_size) == ("base", 384)
  config.init.weights = str(pretrained)
  config = yielding(config)
  sizes = context.resolve(config, "nowhere").model
  assert (sizes.variant, sizes.image_size) == ("tiny", 16)


def test_naming_the_variant_of_the_model_changes_nothing(pretrained):
  config = short_runs.load_config("caption_coco")
  config.init.weights, config.model.variant = str(pretrained), "tiny"
  config = yielding(config, "model.variant", recipe_variant="base")
  sizes = context.resolve(config, "nowhere").model
  assert (sizes.variant, sizes.image_size) == ("tiny", 16)


def test_flags_do_not_yield_to_a_model(pretrained):
  config = short_runs.load_config("caption_coco")
  config.init.weights = str(pretrained)
  config = yielding(config, "model.image_size")
  sizes = context.resolve(config, "nowhere").model
  assert (sizes.variant, sizes.image_size) == ("tiny", 384)


def test_recipes_keep_their_size_for_a_model_of_their_variant(pretrained):
  config = short_runs.load_config("pretrain_custom")
  config.init.weights = str(pretrained)
  kept = yielding(config)
  assert (kept.model.variant, kept.model.image_size) == ("tiny", 64)
  config.job = "evaluate"
  evaluated = yielding(config)
  assert context.resolve(evaluated, "nowhere").model.image_size == 16


def test_a_run_that_is_evaluated_keeps_the_settings_of_its_task(pretrained):
  config = short_runs.load_config("pretrain_custom")
  trained = resume.config_of(pretrained)["pretrain"]
  assert config.pretrain.queue_size != trained["queue_size"]
  train_again = yielding(config, workdir=pretrained)
  assert train_again.pretrain == config.pretrain
  config.job = "evaluate"
  evaluated = yielding(config, "pretrain.alpha", workdir=pretrained).pretrain
  assert evaluated.queue_size == trained["queue_size"]
  assert evaluated.loss_weights == tuple(trained["loss_weights"])
  assert evaluated.alpha == config.pretrain.alpha


def test_the_job_evaluate_scores_what_the_run_trained(
  captioner, pretrained, data, caplog
):
  folder, results = captioner
  config = captioning(pretrained, data, job="evaluate")
  with caplog.at_level(logging.INFO):
    again = evaluate.evaluate(config, str(folder))
  assert again == pytest.approx(results, rel=1e-5)
  assert f"{folder}/checkpoints/{STEPS}" in caplog.text
  assert "Digest of its parameters: " in caplog.text
  assert "is evaluated. config.init" not in caplog.text


def recipe_to_evaluate():
  """The recipe of `captioner`, which says nothing about the run."""
  config = short_runs.load_config("caption_folder")
  config.job, config.evals.batch_size = "evaluate", 8
  return config


def test_a_run_brings_the_settings_and_sources_of_its_splits(captioner, caplog):
  folder, results = captioner
  config = recipe_to_evaluate()
  assert config.generation.num_beams == 3 and config.evals.val.samples > 0
  assert config.model.dtype == "bfloat16"
  config.model.dtype = "float32"
  with caplog.at_level(logging.INFO):
    config = yielding(config, "model.dtype", workdir=folder)
  assert config.generation.num_beams == 1 and config.evals.val.samples == 0
  assert "generation.max_length=8" in caplog.text
  again = evaluate.evaluate(config, str(folder))
  assert again == pytest.approx(results, rel=1e-5)


def test_how_a_run_reads_captions_comes_back(pretrained, data):
  saved = captioning(pretrained, data, **{"data.max_words": 5}).to_dict()
  taken = context._of_run(recipe_to_evaluate(), saved, ())
  assert taken["data.max_words"] == 5
  assert not taken.keys() & {"batch_size", "data.train", "optim.lr"}


def test_flags_come_before_what_a_run_was_evaluated_on(captioner):
  folder, _ = captioner
  key = "evals.val.source"
  left_out = yielding(recipe_to_evaluate(), key, workdir=folder).evals.val
  assert (left_out.source, left_out.image_root) == ("", "")
  config = recipe_to_evaluate()
  config.evals.val.source = "other.json"
  other = yielding(config, key, workdir=folder).evals.val
  assert (other.source, other.image_root) == ("other.json", "")
  config = recipe_to_evaluate()
  moved = yielding(config, "evals.val.image_root", workdir=folder).evals.val
  assert moved.source.endswith("rows.json") and moved.image_root == ""


def test_another_source_of_a_recipe_is_evaluated_as_the_recipe_says(captioner):
  folder, _ = captioner
  config = recipe_to_evaluate()
  config.evals.val.source = "coco.json"
  split = yielding(config, workdir=folder).evals.val
  assert (split.source, split.image_root) == ("coco.json", "")
  assert split.samples == config.evals.val.samples


def test_a_run_of_another_task_is_not_evaluated(captioner):
  folder, _ = captioner
  config = short_runs.load_config("pretrain_custom")
  config.job = "evaluate"
  with pytest.raises(ValueError, match=r"'caption', .* 'pretrain'") as error:
    evaluate.evaluate(yielding(config, workdir=folder), str(folder))
  assert f"--config.init.weights={folder} and another" in str(error.value)


def test_another_checkpoint_of_a_run_can_be_evaluated(
  captioner, pretrained, data
):
  folder, _ = captioner
  before = (folder / "results.json").read_bytes()
  losses = {}
  for asked, step in (("best", "best"), ("2", "2"), ("latest", "3")):
    config = captioning(pretrained, data, job="evaluate")
    config.evals.checkpoint = asked
    losses[step] = evaluate.evaluate(config, str(folder))["val/loss_lm"]
    if asked != "latest":
      assert (folder / "results.json").read_bytes() == before
      results = folder / "evaluated" / asked / "results.json"
      saved = json.loads(results.read_text())
      assert saved["val/loss_lm"] == losses[step]
  assert losses["2"] != losses["3"]
  kept = snapshot.find(folder / "best").name
  assert losses["best"] == pytest.approx(losses[kept])


@pytest.mark.parametrize("asked", ["best", "7"])
def test_a_checkpoint_that_is_missing_is_named(asked, pretrained, data):
  config = captioning(pretrained, data, job="evaluate")
  config.evals.checkpoint = asked
  with pytest.raises(ValueError, match=f"config.evals.checkpoint={asked}"):
    evaluate.evaluate(config, str(pretrained))


def test_weights_that_a_finished_run_leaves_alone_are_named(
  captioner, pretrained, data, caplog
):
  folder, _ = captioner
  config = captioning(pretrained, data, job="evaluate")
  config.init.weights = "other"
  with caplog.at_level(logging.INFO):
    evaluate.evaluate(config, str(folder))
  assert "config.init.weights=other is not; to evaluate it" in caplog.text
  assert f"which started from {pretrained}" in caplog.text


def test_nothing_to_evaluate_is_an_error(tmp_path, data, pretrained):
  config = captioning(pretrained, data, job="evaluate")
  config.init.weights = ""
  with pytest.raises(ValueError, match="holds no checkpoint"):
    evaluate.evaluate(config, str(tmp_path))


@pytest.mark.parametrize(
  "changes, line",
  [
    ({"batch_size": 4}, "config.batch_size: 8 then, 4 now"),
    ({"num_steps": 4}, "config.num_steps: 3 then, 4 now"),
    ({"optim.lr": 1e-3}, "config.optim.lr: 0.003 then, 0.001 now"),
    ({"seed": 1}, "config.seed: 42 then, 1 now"),
    ({"model.image_size": 24}, "config.model.image_size: 16 then, 24 now"),
    ({"data.augment": False}, "config.data.augment: True then, False now"),
  ],
)
def test_a_run_is_resumed_only_as_itself(
  changes, line, captioner, pretrained, data
):
  folder, _ = captioner
  before = (folder / "results.json").read_bytes()
  config = captioning(pretrained, data, **changes)
  with pytest.raises(ValueError, match=line) as error:
    train.train(config, str(folder))
  restore = f"--config.init.restore={folder} --config.init.weights="
  assert str(error.value).endswith(restore)
  assert (folder / "results.json").read_bytes() == before


def test_other_training_data_are_refused(captioner, pretrained, data, tmp_path):
  folder, _ = captioner
  rows = json.loads((data / "rows.json").read_text())
  few = tmp_path / "rows.json"
  few.write_text(json.dumps(rows[:7]))
  config = captioning(pretrained, data)
  config.data.train = (str(few),)
  with pytest.raises(ValueError, match=r"config\.data\.train") as error:
    train.train(config, str(folder))
  assert "rows of the training data: 8 then, 7 now" in str(error.value)


def test_epochs_are_named_if_they_change_the_number_of_steps(
  captioner, pretrained, data
):
  folder, _ = captioner
  config = captioning(pretrained, data, num_epochs=7.0)
  resume.check(
    folder, _with_steps(config).to_dict(), model_files={}, num_rows=8
  )
  config.num_steps = 0
  with pytest.raises(ValueError, match=r"num_epochs: 5.0 then, 7.0 now"):
    resume.check(
      folder, _with_steps(config).to_dict(), model_files={}, num_rows=8
    )


def _with_steps(config):
  return run_config.with_steps(context.resolve(config, "nowhere"), 8.0)


def test_what_may_change_is_said(captioner, pretrained, data, caplog):
  folder, results = captioner
  config = captioning(pretrained, data, log_every_steps=1)
  config.mesh.data = 1
  config.mesh.fsdp = 2
  with caplog.at_level(logging.INFO):
    assert train.train(config, str(folder)) == pytest.approx(results, rel=1e-4)
  assert "config.mesh.fsdp: 1 then, 2 now" in caplog.text
  assert "config.log_every_steps: 10 then, 1 now" in caplog.text
  # The run's own vocabulary now, and that of `pretrained` then.
  assert "config.tokenizer" not in caplog.text


def test_a_state_can_be_continued_with_other_settings_elsewhere(
  captioner, pretrained, data, tmp_path, caplog
):
  folder, _ = captioner
  config = captioning(pretrained, data, num_steps=STEPS + 1)
  config.init.weights, config.init.restore = "", str(folder)
  with caplog.at_level(logging.INFO):
    train.train(config, str(tmp_path))
  assert snapshot.find(tmp_path).name == str(STEPS + 1)
  assert "config.num_steps: 3 then, 4 now" in caplog.text


def test_another_vocabulary_of_the_same_size_is_refused(
  captioner, pretrained, data
):
  folder, _ = captioner
  config = context.resolve(captioning(pretrained, data), "nowhere")
  files = dict(build.build(config).model_files)
  saved = _with_steps(config).to_dict()
  resume.check(folder, saved, files, num_rows=8)
  files["vocab.txt"] = files["vocab.txt"].replace("red\n", "rot\n")
  with pytest.raises(ValueError, match=r"vocabulary: vocab\.txt differs"):
    resume.check(folder, saved, files, num_rows=8)


def test_the_same_command_resumes_a_run_from_scratch(pretrained):
  config = short_runs.shrunk_config("quickstart")
  config.evals.scenes_val.source = ""
  assert config.model.patch_size is None
  assert train.train(config, str(pretrained)) == {}
  assert snapshot.find(pretrained).name == "2"
