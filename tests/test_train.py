"""Complete runs: every config, exact resume, preemption, bad numbers."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import blip_jax
from blip_jax import (
  build,
  context,
  evaluate,
  main,
  train,
)
from blip_jax.cli import recipes
from blip_jax.data import datasets, scenes
from blip_jax.runtime import config as run_config
from blip_jax.runtime import saved_arrays, sharding, snapshot, stopping
from tests import QUICK_TO_COMPILE, helpers, short_runs, user_runs
from tests.user_runs import STEPS

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = [ROOT / "configs" / f"{name}.py" for name in recipes.names()]
# Those of other jobs are run by test_answer_images.py, test_caption_images.py,
# test_search.py, test_service_load.py, test_video.py and below.
OTHER_JOBS = (
  "answer_images",
  "bootstrap",
  "capfilt",
  "capfilt_paper",
  "caption_images",
  "caption_nocaps",
  "demo",
  "retrieval_flickr_zero_shot",
  "retrieval_msrvtt",
  "search",
  "serve",
  "videoqa_zero_shot",
)
# Shrunk they are as another recipe, but for a mesh or where negatives are from,
# which test_mesh.py is about; or the README's commands train them as well.
ALIKE = (
  "aokvqa",
  "caption_coco",
  "caption_folder",
  "dialog_custom",
  "gqa",
  "nlvr_custom",
  "okvqa",
  "pretrain_14m",
  "pretrain_custom",
  "pretrain_paper_large",
  "quickstart",
  "retrieval_coco_large",
  "retrieval_custom",
  "retrieval_flickr",
  "retrieval_flickr_large",
  "vizwiz",
  "vqa_custom",
)
TRAINING = [
  pytest.param(
    path, id=path.stem, marks=pytest.mark.slow if path.stem in ALIKE else ()
  )
  for path in CONFIGS
  if path.stem not in OTHER_JOBS
]


@pytest.fixture(autouse=True)
def quick_to_compile(monkeypatch):
  short_runs.make_quick(monkeypatch)


@pytest.mark.parametrize("path", TRAINING)
def test_the_command_of_every_recipe_trains_two_steps(
  path, tmp_path, monkeypatch
):
  """The one in its docstring, on the files that it names."""
  helpers.write_pairs(tmp_path)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  line = short_runs.shrunk_command(path.stem)
  config = line.config
  if config.task == "caption" and not config.evals.val.source:
    config.evals.val.source = "scenes:val?num=24"
  workdir = pathlib.Path(line.workdir)
  assert workdir.parent in (tmp_path, tmp_path / "runs")
  results = main.JOBS[config.job](config, line.workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line) for line in lines]
  assert [row["step"] for row in steps][:2] == [1, 2]
  assert all(np.isfinite(row["train/loss"]) for row in steps[:2])
  assert snapshot.find(workdir).name == "2"
  splits = {name.split("/")[0] for name in results}
  assert splits == run_config.splits(config).keys()
  if splits:
    assert json.loads((workdir / "results.json").read_text()) == results


def test_recipes_have_the_published_numbers():
  """Compared with the original's YAML and section 4.1 of the paper."""
  get = short_runs.load_config
  yaml, base, large = map(
    get, ("pretrain_14m", "pretrain_paper_base", "pretrain_paper_large")
  )
  for config in (yaml, base, large):
    assert config.model.image_size == 224
    assert config.pretrain.queue_size == 57600
    assert config.pretrain.alpha == 0.4
    assert config.pretrain.alpha_ramp_epochs == 2
    assert config.pretrain.ema_decay == 0.995
    assert config.optim.weight_decay == 0.05
    assert config.optim.min_lr == config.optim.warmup_lr == 1e-6
    assert config.optim.warmup_steps == 3000
    assert config.data.max_length == config.data.max_words == 30
    assert config.data.min_scale == 0.2
    assert config.num_steps == 20 * config.optim.steps_per_epoch
  assert (yaml.batch_size, base.batch_size, large.batch_size) == (
    600,
    2880,
    2400,
  )
  rates = [c.optim.decay_rate for c in (yaml, base, large)]
  assert rates == [0.9, 0.85, 0.85]
  assert [c.optim.lr for c in (yaml, base, large)] == [3e-4, 3e-4, 2e-4]
  assert large.model.variant == "large" and base.model.variant == "base"


def test_captioning_recipes_have_the_published_numbers():
  """The original's caption_coco.yaml and nocaps.yaml."""
  get = short_runs.load_config
  coco, large, nocaps = map(
    get, ("caption_coco", "caption_coco_large", "caption_nocaps")
  )
  # Only evaluated, a model has the size that it was trained with.
  assert coco.model.image_size == large.model.image_size == 384
  assert nocaps.model.image_size is None
  assert (coco.batch_size, large.batch_size) == (256, 128)
  assert (coco.optim.lr, large.optim.lr) == (1e-5, 2e-6)
  for config in (coco, large, nocaps):
    assert config.task == "caption"
    assert context.complete(config).caption.prompt == "a picture of "
    assert config.caption.label_smoothing == 0.1
    assert config.data.max_length == 40 and config.data.max_words == 30
    assert config.data.min_scale == 0.5
    assert config.optim.schedule == "cosine_epoch"
    assert config.optim.min_lr == 0 and config.optim.weight_decay == 0.05
    assert config.num_epochs == 5
    g = config.generation
    assert (g.num_beams, g.max_length, g.min_length) == (3, 20, 5)
  penalties = [c.generation.repetition_penalty for c in (coco, nocaps)]
  assert penalties == [1.0, 1.1]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  return short_runs.write_pretrained(tmp_path_factory.mktemp("pretrained"))


def test_a_run_starts_from_another_at_a_larger_image_size(tmp_path, pretrained):
  """The same task at another size: position embeddings are interpolated."""
  config = short_runs.shrunk_config("quickstart")
  config.evals.scenes_val.source = ""
  config.init.weights = str(pretrained)
  config.model.image_size = 48
  config.num_steps = config.optim.steps_per_epoch = 2
  config.optim.warmup_steps = 1
  train.train(config, str(tmp_path))
  before, after = (
    saved_arrays.load_to_host(snapshot.find(run), "params")["visual_encoder"]
    for run in (pretrained, tmp_path)
  )
  assert before["pos_embed"].shape[1] == 1 + 2 * 2
  assert after["pos_embed"].shape[1] == 1 + 6 * 6
  # Two steps of a low rate: what was learnt is still there.
  cls = [run["pos_embed"][0, 0] for run in (before, after)]
  np.testing.assert_allclose(*cls, atol=5e-3)


def test_captioner_from_pretraining_and_its_files(tmp_path, pretrained):
  """Fine-tuning starts from a pre-trained run, counts its steps in epochs,
  and a run without captions to compare with writes its own only."""
  get = short_runs.shrunk_config
  tuned, nocaps = tmp_path / "tuned", tmp_path / "nocaps"
  config = get("caption_folder")
  config.init.weights = str(pretrained)
  config.num_steps, config.optim.steps_per_epoch = 0, 0
  config.num_epochs = 0.5  # of 64 scenes, 16 at a time
  config.evals.val.source = "scenes:val?num=24"
  results = train.train(config, str(tuned))
  assert snapshot.find(tuned).name == "2"
  assert {"val/CIDEr", "val/Bleu_4", "val/caption_exact", "val/loss"} <= set(
    results
  )
  written = json.loads((tuned / "val_captions.json").read_text())
  assert len(written) == 24 and set(written[0]) == {"image_id", "caption"}
  assert (tuned / "samples.png").exists()
  # It was evaluated at the end alone, so the last is the best.
  kept, last = (
    saved_arrays.load_to_host(snapshot.find(folder), "params")
    for folder in (tuned / "best", tuned)
  )
  jax.tree.map(np.testing.assert_array_equal, kept, last)
  card = json.loads((snapshot.find(tuned) / "model/model.json").read_text())
  assert card["family"] == "caption" and card["prompt"] == "a picture of "
  assert card["generation"]["num_beams"] == 3

  config = short_runs.shrunk_command("caption_nocaps").config
  config.init.weights = str(tuned)
  config.evals.val.source = config.evals.test.source = "scenes:val?num=5"
  assert evaluate.evaluate(config, str(nocaps)) == {}
  first, second = (
    json.loads((nocaps / f"{name}_captions.json").read_text())
    for name in ("val", "test")
  )
  assert first == second and len(first) == 5


def test_vqa_recipes_have_the_published_numbers():
  """The original's vqa.yaml; presets start from the right weights."""
  get = short_runs.load_config
  config = get("vqa_v2")
  assert config.model.image_size == 480 and config.model.drop_path == 0.1
  assert (config.batch_size, config.num_epochs) == (256, 10)
  assert config.optim.lr == 2e-5 and config.optim.min_lr == 0
  assert config.optim.schedule == "cosine_epoch"
  assert config.optim.weight_decay == 0.05 and config.data.min_scale == 0.5
  assert config.data.max_words == 50 and config.data.max_length == 35
  assert config.vqa.inference == "rank" and config.vqa.k_test == 128
  assert config.vqa.rank_score == "blip" and config.vqa.label_smoothing == 0.1
  g = config.generation
  assert (g.num_beams, g.max_length, g.min_length) == (3, 10, 1)
  splits = [name.partition("_questions")[0] for name in config.data.train]
  assert splits == [
    "data/v2_OpenEnded_mscoco_train2014",
    "data/v2_OpenEnded_mscoco_val2014",
    "data/vg_qa.json",
  ]
  tuned, pretrained = "model_base_vqa_capfilt_large", "model_base_capfilt_large"
  weights = {
    name: get(name).init.weights
    for name in ("vqa_v2", "okvqa", "aokvqa", "gqa", "vizwiz", "vqa_custom")
  }
  assert weights == {
    "vqa_v2": pretrained,
    "okvqa": tuned,
    "aokvqa": tuned,
    "gqa": pretrained,
    "vizwiz": tuned,
    "vqa_custom": tuned,
  }


def test_nlvr_recipes_have_the_published_numbers():
  """The original's nlvr.yaml; only training exchanges images."""
  get = short_runs.load_config
  config = get("nlvr2")
  assert config.model.image_size == 384 and config.model.drop_path == 0.1
  assert (config.batch_size, config.num_epochs) == (256, 15)
  assert config.optim.lr == 3e-5 and config.optim.min_lr == 0
  assert config.optim.schedule == "cosine_epoch"
  assert config.optim.weight_decay == 0.05 and config.data.min_scale == 0.5
  assert config.data.max_words == 40 and config.evals.batch_size == 64
  assert config.nlvr.swap and not config.nlvr.legacy_eval_swap
  assert config.evals.best == ("val/accuracy",)
  weights = {get(name).init.weights for name in ("nlvr2", "nlvr_custom")}
  assert weights == {"model_base"}


def test_the_recipe_of_visdial_has_the_papers_numbers():
  """Section 5.5 and the table of hyperparameters; the rest is open."""
  config = short_runs.load_config("visdial")
  assert config.model.image_size == 384 and config.model.variant == "base"
  assert (config.batch_size, config.num_epochs) == (240, 20)
  assert config.optim.lr == 2e-5 and config.optim.min_lr == 0
  assert config.optim.schedule == "cosine_epoch"
  assert config.optim.weight_decay == 0.05
  assert config.evals.best == ("val/mrr",)
  assert (config.dialog.rounds, config.dialog.negatives) == (1, 3)
  assert config.data.max_length == 192
  assert short_runs.load_config("dialog_custom").model.variant is None


def test_retrieval_recipes_have_the_published_numbers():
  """The original's retrieval_coco.yaml and retrieval_flickr.yaml."""
  get = lambda name: short_runs.load_config(f"retrieval_{name}")
  names = ("coco", "coco_large", "flickr", "flickr_large")
  coco, coco_large, flickr, flickr_large = configs = [*map(get, names)]
  for config in configs:
    assert config.task == "retrieval"
    assert config.model.image_size == 384
    own = config.retrieval
    assert (own.queue_size, own.alpha, own.ema_decay) == (57600, 0.4, 0.995)
    assert own.alpha_ramp_epochs == 1
    assert config.num_epochs == 6 and config.optim.schedule == "cosine_epoch"
    assert config.optim.min_lr == 0 and config.optim.weight_decay == 0.05
    assert config.data.max_length == 35 and config.data.max_words == 30
    assert config.data.min_scale == 0.5
    assert config.evals.best == ("val/r_mean",)
    # Ranks of the original never see each other's batch in ITC.
    assert config.scope == "local"
  assert [c.batch_size for c in configs] == [256, 128, 256, 128]
  assert [c.optim.lr for c in configs] == [1e-5, 5e-6, 1e-5, 5e-6]
  assert [c.model.variant for c in configs] == ["base", "large"] * 2
  weights = ["model_base", "model_large"] * 2
  assert [c.init.weights for c in configs] == weights
  k_test = [c.evals.test.k_test for c in configs]
  assert k_test == [256, 256, 128, 128]
  assert {c.retrieval.negatives for c in (coco, coco_large)} == {"global"}
  assert {c.retrieval.negatives for c in (flickr, flickr_large)} == {"local"}
  for name in ("flickr_zero_shot", "msrvtt"):
    config = get(name)
    assert config.job == "evaluate" and config.evals.test.k_test == 128
    assert config.init.weights == "model_base_retrieval_coco"
  assert config.evals.test.num_frames == 8


def test_vqa_from_pretraining_and_its_files(tmp_path, pretrained):
  """Fine-tuning starts from a pre-trained run, whose decoder attends to images
  of the same width, and its answers are on the list."""
  config = short_runs.shrunk_config("vqa_custom")
  config.init.weights = str(pretrained)
  config.evals.val.source = "scenes:val?num=20"
  results = train.train(config, str(tmp_path / "tuned"))
  assert {"val/accuracy", "val/accuracy/colour", "val/loss"} <= set(results)
  written = json.loads((tmp_path / "tuned/val_answers.json").read_text())
  assert [row["question_id"] for row in written] == [*range(20)]
  assert {row["answer"] for row in written} <= {*scenes.ANSWERS}
  assert (tmp_path / "tuned/best").exists()
  card = snapshot.find(tmp_path / "tuned") / "model/model.json"
  assert json.loads(card.read_text())["family"] == "vqa"
  # A model for VQA is the start of another one, which only generates.
  config.job = "evaluate"
  config.init.weights = str(tmp_path / "tuned")
  config.vqa.inference = "generate"
  config.generation.num_beams = 1
  again = evaluate.evaluate(config, str(tmp_path / "again"))
  assert again["val/loss"] == pytest.approx(results["val/loss"], rel=1e-5)


def test_nlvr_from_pretraining_and_its_files(tmp_path, pretrained):
  """Fine-tuning starts with two copies of the pre-trained cross-attention, and
  what it wrote is evaluated again."""
  config = short_runs.shrunk_config("nlvr_custom")
  config.init.weights = str(pretrained)
  config.num_steps, config.optim.lr = 2, 1e-6
  config.evals.val.source = "scenes:val?num=20"
  results = train.train(config, str(tmp_path / "tuned"))
  assert {"val/accuracy", "val/consistency", "val/loss"} == set(results)
  written = (tmp_path / "tuned/val_predictions.csv").read_text().splitlines()
  assert [line.split(",")[0] for line in written] == [
    f"val-{n}" for n in range(20)
  ]
  assert (tmp_path / "tuned/best").exists()
  before, after = (
    saved_arrays.load_to_host(snapshot.find(run), "params")["text_encoder"]
    for run in (pretrained, tmp_path / "tuned")
  )
  key = before["layers"]["crossattention"]["key"]["kernel"]
  for image in ("image_0", "image_1"):
    tuned = after["layers"]["crossattention"][image]["key"]["kernel"]
    np.testing.assert_allclose(tuned, key, atol=1e-4)
  config.job = "evaluate"
  again = evaluate.evaluate(config, str(tmp_path / "tuned"))
  assert again == pytest.approx(results, rel=1e-5)


def test_dialogs_from_pretraining_and_their_files(tmp_path, pretrained):
  """Fine-tuning starts with the pre-trained ITM head; what it wrote is
  evaluated again, loads, and chooses answers."""
  config = short_runs.shrunk_config("dialog_custom")
  config.init.weights = str(pretrained)
  config.num_steps, config.optim.lr = 2, 1e-6
  config.evals.val.source = "scenes:val?num=6"
  results = train.train(config, str(tmp_path / "tuned"))
  names = ("mrr", "r1", "r5", "r10", "mean_rank", "ndcg")
  assert {f"val/{name}" for name in names} == set(results)
  written = json.loads((tmp_path / "tuned/val_ranks.json").read_text())
  assert [row["image_id"] for row in written] == [n // 4 for n in range(24)]
  assert (tmp_path / "tuned/best").exists()
  before, after = (
    saved_arrays.load_to_host(snapshot.find(run), "params")
    for run in (pretrained, tmp_path / "tuned")
  )
  assert after.keys() == {"visual_encoder", "text_encoder", "itm_head"}
  np.testing.assert_allclose(
    after["itm_head"]["kernel"], before["itm_head"]["kernel"], atol=1e-4
  )
  config.job = "evaluate"
  again = evaluate.evaluate(config, str(tmp_path / "tuned"))
  assert again == pytest.approx(results, rel=1e-5)
  mesh = jax.sharding.Mesh(jax.devices()[:1], "data")
  model = blip_jax.load(tmp_path / "tuned", mesh=mesh)
  record = datasets.open_dialogs(config.evals.val.source)[0]
  first = record["dialog"][0]
  (choice,) = model.choose(
    blip_jax.Dialog(
      record["image"],
      first.question,
      first.candidates,
      caption=record["context"],
    )
  )
  ranked = [choice, *choice.others]
  assert [written[0]["ranks"][each.index] for each in ranked] == [*range(1, 11)]


def test_retrieval_from_pretraining_and_its_files(tmp_path, pretrained):
  """Fine-tuning starts from a pre-trained run and ranks by ITM; what it keeps
  as the best is evaluated alone, and starts another run."""
  get = short_runs.shrunk_config
  tuned, alone = tmp_path / "tuned", tmp_path / "alone"
  config = get("retrieval_custom")
  config.init.weights = str(pretrained)
  config.retrieval.itc_targets = "diagonal"
  config.evals.val.source = "scenes:val?num=24"
  config.evals.val.k_test = 5
  results = train.train(config, str(tuned))
  names = {f"{d}_{m}" for d in ("txt", "img") for m in ("r1", "r_mean")}
  names |= {f"itc_{name}" for name in names} | {"r_mean", "itc_r_mean"}
  assert {f"val/{name}" for name in (*names, "itm_acc")} <= results.keys()
  assert (tuned / "samples.png").exists()
  card = json.loads((snapshot.find(tuned) / "model/model.json").read_text())
  assert card["family"] == "retrieval"

  config = short_runs.shrunk_command("retrieval_flickr_zero_shot").config
  config.init.weights = str(tuned / "best")
  config.evals.test.source = "scenes:val?num=24"
  config.evals.test.k_test = 5
  again = evaluate.evaluate(config, str(alone))
  assert again["test/r_mean"] == pytest.approx(results["val/r_mean"])


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
  run(workdir)
  return workdir


def test_resume_is_bit_exact(uninterrupted, run, digest):
  """Stopped by SIGTERM at any step, continued by a new process: same bits.

  With dropout, augmentation, a wrapping queue and momentum encoders.
  """
  workdir = uninterrupted.parent / "stopped"
  env = {**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE}
  process = subprocess.Popen(
    user_runs.command(workdir),
    env=env,
    cwd=workdir.parent,
    stderr=subprocess.PIPE,
    text=True,
  )
  metrics = workdir / "metrics.jsonl"
  while not (metrics.exists() and metrics.read_text()):
    assert process.poll() is None, process.stderr.read()[-3000:]
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 75
  assert "is done and saved; the same command" in process.stderr.read()
  stopped_at = int(snapshot.find(workdir).name)
  assert 1 < stopped_at < STEPS
  # Of another state the digests are others.
  lines = digest(workdir).splitlines(), digest(uninterrupted).splitlines()
  assert not set(lines[0]) & set(lines[1])
  run(workdir)
  assert snapshot.find(workdir).name == str(STEPS)
  expected = digest(uninterrupted)
  assert digest(workdir) == expected
  names = [line.split()[0] for line in expected.splitlines()]
  assert names == ["params", "momentum", "opt_state", "data"]
  rows = [json.loads(line) for line in metrics.read_text().splitlines()]
  steps = [row["step"] for row in rows if "train/loss" in row]
  assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_another_seed_is_another_run(uninterrupted, run, digest):
  """The digests of the test above can differ."""
  workdir = uninterrupted.parent / "other_seed"
  run(workdir, "--config.seed=7")
  ours, others = digest(uninterrupted), digest(workdir)
  for line, other in zip(
    ours.splitlines()[:3], others.splitlines()[:3], strict=True
  ):
    assert line != other


def test_a_damaged_step_costs_only_what_came_after_the_one_before(
  uninterrupted, run, digest
):
  """A flipped bit of the optimiser's state is found while the step compiles."""
  workdir = uninterrupted.parent / "damaged"
  shutil.copytree(uninterrupted, workdir)
  last = workdir / "checkpoints" / str(STEPS)
  (path,) = (last / "opt_state" / "d").iterdir()
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  evaluated = run(workdir, "--config.job=evaluate", check=False)
  assert "is damaged" not in evaluated.stderr  # it needs no such state
  done = run(workdir)
  assert f"{last} is damaged: opt_state/d/{path.name}: expected" in done.stderr
  assert "The newest sound step is used instead" in done.stderr
  names = sorted(path.name for path in last.parent.iterdir())
  assert names == ["20", "24", "24.damaged"]
  assert digest(workdir) == digest(uninterrupted)
  rows = (workdir / "metrics.jsonl").read_text().splitlines()
  steps = [row["step"] for row in map(json.loads, rows) if "train/loss" in row]
  assert steps == list(range(1, STEPS + 1))


def test_a_finished_run_only_evaluates(uninterrupted, run, digest):
  """The same command again trains nothing and answers the same."""
  before = digest(uninterrupted)
  done = run(
    uninterrupted, "--config.evals.scenes_val.source=scenes:val?num=16"
  )
  assert digest(uninterrupted) == before
  assert "scenes_val/txt_r1" in done.stdout
  results = json.loads((uninterrupted / "results.json").read_text())
  assert {
    "scenes_val/txt_r1",
    "scenes_val/img_r1",
    "scenes_val/itm_acc",
  } <= set(results)
  again = run(
    uninterrupted,
    "--config.job=evaluate",
    "--config.evals.scenes_val.source=scenes:val?num=16",
  )
  results_again = json.loads((uninterrupted / "results.json").read_text())
  assert "scenes_val/txt_r1" in again.stdout
  for name in ("scenes_val/txt_r1", "scenes_val/itm_acc"):
    assert results_again[name] == pytest.approx(results[name])


def test_contact_sheet_and_captions(tmp_path, capsys):
  config = short_runs.shrunk_config("quickstart")
  config.evals.scenes_val.samples = 6
  results = train.train(config, str(tmp_path))
  assert "scenes_val/caption_exact" in results
  assert capsys.readouterr().out.count("generated:") == 5
  with Image.open(tmp_path / "samples.png") as sheet:
    assert sheet.width > 600


def test_non_finite_loss_stops_before_the_update(tmp_path, monkeypatch):
  """The step and its rows are named, and the state stays as it was before."""
  config = short_runs.shrunk_config("quickstart")
  config.checkpoint.every_steps = 1
  make = train.make_train_step

  def poisoned(*args):
    step = make(*args)

    def run_step(state, batch, steps_done):
      if steps_done == 1:
        state = state.replace(
          params={**state.params, "temp": state.params["temp"] * np.nan}
        )
      return step(state, batch, steps_done)

    return run_step

  monkeypatch.setattr(train, "make_train_step", poisoned)
  with pytest.raises(FloatingPointError, match=r"step 2: .*loss"):
    train.train(config, str(tmp_path))
  assert snapshot.find(tmp_path).name == "1"
  message = json.loads((tmp_path / "nonfinite_2.json").read_text())
  assert len(message["ids"]) == 16
  assert all(name.startswith("scenes/train:") for name in message["ids"])


def test_no_update_is_applied_after_a_bad_one():
  """The device stops by itself: the host looks one step later."""

  class Exploding(helpers.StubTask):
    def loss(self, params, momentum, batch, *, rng, step, train=True):
      loss = jnp.where(step == 1, jnp.nan, params["w"] ** 2)
      return loss, (None, {"loss": loss})

  tx = optax.sgd(0.1)
  params = {"w": jnp.float32(1.0)}
  state = train.State(
    step=jnp.int32(0),
    params=params,
    opt_state=tx.init(params),
    momentum=None,
  )
  step = train.make_train_step(Exploding(), tx, seed=0)
  for steps_done in range(4):
    state, _ = step(state, {}, steps_done)
  assert state.step == 1
  np.testing.assert_allclose(state.params["w"], 0.8)


def test_one_bad_batch_stops_all_later_updates():
  """Good batches after a single bad one leave the state as it is, bit for
  bit: the host learns of the bad one later, and must find the state from
  before it."""

  class Scaled(helpers.StubTask):
    def loss(self, params, momentum, batch, *, rng, step, train=True):
      loss = batch["scale"] * params["w"] ** 2
      return loss, (momentum + 1, {"loss": loss})

  tx = optax.adam(0.1)
  params = {"w": jnp.float32(1.0)}
  state = train.State(
    step=jnp.int32(0),
    params=params,
    opt_state=tx.init(params),
    momentum=jnp.float32(0.0),
  )
  step = train.make_train_step(Scaled(), tx, seed=0)
  states = []
  for steps_done, scale in enumerate((1.0, 1.0, np.nan, 1.0, 1.0)):
    state, metrics = step(state, {"scale": jnp.float32(scale)}, steps_done)
    assert np.isfinite(metrics["loss"]) == np.isfinite(scale)
    states.append(jax.device_get(state))
  assert [int(state.step) for state in states] == [1, 2, 2, 2, 2]
  assert states[0].params["w"] != states[1].params["w"]
  for later in states[2:]:
    helpers.assert_same(later, states[1])


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("mesh.tensor", 3, r"config\.mesh\.tensor .* number of devices, 2"),
    ("mesh.data", 7, r"Nearest that fit: data=2, fsdp=1, tensor=1"),
    ("scope", "golbal", r"config\.scope: expected one of .*golbal"),
    ("batch_size", 15, r"config\.batch_size: 15 examples .* nearest: 14"),
    ("num_steps", 0, r"config\.num_steps: expected at least 1"),
    ("data.train", ("images.docx",), r"images\.docx"),
    ("data.train", ("",), r"config\.data\.train: no source"),
    ("task", "retrievel", r"config\.task: .*retrieval.*'retrievel'"),
    ("evals.best", ("vall/CIDEr",), r"config\.evals\.best: .*scenes_val.*vall"),
    ("model.variant", "huge", r"config\.model\.variant: .*base.*huge"),
    ("model.image_size", 33, r"config\.model\.image_size: .* multiple"),
    ("model.vit_remat", "all", r"remat must be one of"),
    ("optim.schedule", "linear", r"config\.optim\.schedule must be one of"),
    ("tokenizer", "nowhere/at/all", r"config\.tokenizer"),
    ("init.weights", "nowhere", r"config\.init\.weights: 'nowhere' is neither"),
  ],
)
def test_mistakes_are_refused_at_start(tmp_path, key, value, message):
  config = short_runs.shrunk_config("quickstart")
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    train.train(config, str(tmp_path))
  assert not (tmp_path / "checkpoints" / "1").exists()


def test_heads_that_do_not_split():
  config = short_runs.shrunk_config("quickstart")
  config.model.variant = "large"
  with pytest.raises(ValueError, match=r"config\.mesh\.tensor: 16 attention"):
    devices = np.array(jax.devices()[:3]).reshape(1, 1, 3)
    build.build(config, jax.sharding.Mesh(devices, sharding.AXES))


@pytest.mark.parametrize(
  "step, every, due",
  [(1, 0, False), (4, 0, False), (4, 2, True), (3, 2, False), (1, 1, True)],
)
def test_what_is_done_every_few_steps(step, every, due):
  assert train._due(step, every) == due


def test_the_best_is_not_selected_by_a_split_that_is_absent():
  metrics = ("val/a", "test/b")
  assert train._best_metrics(metrics, {"val": [], "test": []}) == metrics
  assert train._best_metrics(metrics, {"val": []}) == ()
  assert train._best_metrics((), {}) == ()


def test_a_run_stops_after_the_signal_of_a_scheduler():
  signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
  before = [signal.getsignal(one) for one in signals]
  for number in signals:
    with train.StopSignal() as stop:
      assert not stop.requested(1)
      os.kill(os.getpid(), number)
      assert stop.requested(2) and stop.requested(3)
      # Once the step is saved, an evaluation does not begin.
      with pytest.raises(stopping.Stopped), stop.at_once():
        raise AssertionError
  after = [signal.getsignal(one) for one in signals]
  assert after == before


def test_an_evaluation_is_left_at_once():
  with train.StopSignal() as stop:
    with pytest.raises(stopping.Stopped, match="SIGTERM"), stop.at_once():
      os.kill(os.getpid(), signal.SIGTERM)
      raise AssertionError
    assert stop.requested(1)
