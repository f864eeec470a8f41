"""The command line: forms of flags, and mistakes in it."""

import os
import sys
import types

import pytest

from blip_jax.cli import command_line, recipes
from blip_jax.runtime import overrides
from blip_jax.runtime.command import UsageError


def parse(*words):
  return command_line.parse(words)


@pytest.mark.parametrize(
  "words",
  [
    ["--config", "quickstart"],
    ["--config=quickstart"],
    ["-config=quickstart"],
    ["--workdir", "w", "--config", "quickstart"],
    ["--config", recipes.path_of("quickstart")],
  ],
)
def test_recipes_are_named_in_any_form(words):
  line = parse(*words, "--config.num_steps=3")
  assert line.config.num_steps == 3 and line.config.task == "pretrain"
  assert line.config.is_locked
  name = "w" if "w" in words else "runs/quickstart"
  assert line.workdir == os.path.abspath(name)


def test_flags_are_given_in_any_form_and_order():
  line = parse(
    "--config.batch_size",
    "4",
    "-workdir=w",
    "--config.data.train=a.json",
    "--config.optim.lr=-1",
    "--config.data.train",
    "b=c.json",
    "--distributed=auto",
    "--config.batch_size=8",
    "--config=pretrain_custom",
    "--noconfig.data.augment",
    "--config.init.momentum_state",
    "--config.tokenizer=",
  )
  config = line.config
  assert config.batch_size == 8 and config.optim.lr == -1
  assert config.data.train == ("a.json", "b=c.json")
  assert config.data.augment is False and config.init.momentum_state is True
  assert config.tokenizer == ""
  assert line.distributed == "auto" and line.workdir == os.path.abspath("w")


@pytest.mark.parametrize(
  "flag, value",
  [
    ("seed=3", 3),
    ("optim.lr=1e-4", 1e-4),
    ("optim.lr=2", 2.0),
    ("data.augment=False", False),
    ("data.augment=1", True),
    ("model.variant=tiny", "tiny"),
    ("model.drop_path=0.25", 0.25),
    ("data.train=a.json", ("a.json",)),
    ("data.train=('a.json', 'b c.json')", ("a.json", "b c.json")),
    ("data.train=a, b.json", ("a, b.json",)),
    ("data.train=cc12m/{0..3}.tar", ("cc12m/{0..3}.tar",)),
    ("optim.betas=(0.9, 0.5)", (0.9, 0.5)),
  ],
)
def test_texts_become_values_of_the_type(flag, value):
  line = parse("--config=quickstart", f"--config.{flag}")
  key = flag.partition("=")[0]
  found = overrides.leaves(line.config)[key]
  assert found == value and type(found) is type(value)
  assert line.given == (key,)


@pytest.mark.parametrize(
  "flag, expected",
  [
    ("seed=abc", "an integer, found 'abc'"),
    ("seed=1.5", "an integer, found '1.5'"),
    ("seed=", "an integer, found ''"),
    ("optim.lr=fast", "a number, found 'fast'"),
    ("model.drop_path=x", "a number, found 'x'"),
    ("optim.lr=nan", "a number, found nan"),
    ("data.augment=yes", "true or false, found 'yes'"),
    ("optim.betas=x", "values such as (0.9, 0.98), found ('x',)"),
    ("data.train=(1, 2)", "values such as ('scenes:train?num=32000',)"),
  ],
)
def test_a_wrong_type_says_key_expected_and_found(flag, expected):
  with pytest.raises(UsageError) as error:
    parse("--config=quickstart", f"--config.{flag}")
  key = flag.partition("=")[0]
  message = str(error.value)
  assert message.startswith(f"--config.{key}: expected {expected}")


def test_the_job_of_the_recipe_itself_is_known():
  line = parse("--config=capfilt", "--config.job=merge")
  assert (line.own.job, line.config.job) == ("capfilt", "merge")


def test_an_argument_goes_to_get_config(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "from blip_jax.runtime.config import Config\n"
    "def get_config(size='small'):\n"
    "  return Config(dict(job='train', size=size))\n"
  )
  assert parse(f"--config={path}").config.size == "small"
  line = parse(f"--config={path}:large", "--config.job=evaluate")
  assert line.config.size == "large"
  assert line.workdir.endswith("runs/mine")


@pytest.mark.parametrize(
  "words, message",
  [
    (["--workdr=x"], r"--workdr: there is no such flag.*--workdir\?"),
    (["--batch_size=3"], r"Did you mean --config\.batch_size"),
    (["--lr=3"], r"Did you mean --config\.optim\.lr\?"),
    (["--config.lr=1"], r"Did you mean --config\.optim\.lr\?"),
    (["--noconfig.data.augmnt"], r"Did you mean --config\.data\.augment\?"),
    (["--config.seed=x"], r"config\.seed: expected an integer, found 'x'"),
    (["--config.seed"], r"Missing value for .*config\.seed"),
    (
      ["--config.seed", "--workdir=x"],
      r"Missing value for .*config\.seed",
    ),
    (["--workdir"], r"Missing value for flag --workdir"),
    (["train.json"], r"unexpected argument 'train\.json'"),
    (["--config.data.augment", "no"], r"unexpected argument 'no'"),
    (["--config.optim={}"], r"config\.optim is a section"),
  ],
)
def test_wrong_words_are_named(words, message):
  with pytest.raises(UsageError, match=message):
    parse("--config=quickstart", *words)


@pytest.mark.parametrize("words", [[], ["--config"], ["--config="], ["--x=1"]])
def test_without_a_config_the_recipes_are_listed(words):
  with pytest.raises(UsageError) as error:
    parse(*words)
  for name in recipes.names():
    assert f" {name}" in str(error.value)


FILES = {
  "raises.py": ("def get_config():\n  x = 1\n  return x / 0\n", "line 3: Zero"),
  "syntax.py": ("def get_config(:\n", "line 1: SyntaxError"),
  "imports.py": ("import nowhere\n", "line 1: ModuleNotFoundError"),
  "empty.py": ("", "has no function get_config"),
  "none.py": ("def get_config():\n  pass\n", "returned None"),
  "value.py": ("def get_config():\n  raise ValueError('no')\n", "line 2: Val"),
  "exits.py": ("def get_config(a, b):\n  pass\n", "TypeError"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_makes_no_config_says_where_it_fails(tmp_path, name):
  text, message = FILES[name]
  (tmp_path / name).write_text(text)
  with pytest.raises(UsageError, match=message) as error:
    parse(f"--config={tmp_path}/{name}")
  assert name in str(error.value)


@pytest.mark.parametrize("path", ["./nowhere.py", "configs/nowhere.py", "a/b"])
def test_a_missing_file_is_named(path):
  with pytest.raises(UsageError, match=f"there is no file {path}"):
    parse(f"--config={path}")


# All keys that take paths, of every kind of job.
PATHS = {
  "pretrain_custom": (
    "data.train",
    "data.image_root",
    "data.rotate",
    "evals.val.source",
    "evals.val.image_root",
    "init.restore",
    "init.weights",
    "tokenizer",
  ),
  "caption_folder": ("evals.test.references", "evals.test.source"),
  "caption_images": ("images", "image_root", "out", "model", "tokenizer"),
  "search": ("images", "image_root", "out", "index", "queries", "model"),
  "capfilt": (
    "source",
    "image_root",
    "out",
    "captioner",
    "filter",
    "tokenizer",
    "merge.out",
    "merge.jobs",
    "merge.human",
  ),
  "bootstrap": ("web", "clean", "pretrain.evals.test.source"),
}


@pytest.mark.parametrize(
  "recipe, key", [(name, key) for name in PATHS for key in PATHS[name]]
)
@pytest.mark.parametrize(
  "path", ["ftp://b/x.json", "S3://b/x", "hdfs://b/x", "file:///b", "gs:///x"]
)
def test_paths_with_a_scheme_are_refused(
  tmp_path, monkeypatch, recipe, key, path
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="not supported") as error:
    parse(f"--config={recipe}", f"--config.{key}={path}")
  assert str(error.value).startswith(f"config.{key}: {path}")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", ["", "?caption=title", "?data_dir=gs://b"])
@pytest.mark.parametrize("name", ["gs://b/x", "file:///x", "s3:/b"])
def test_a_prepared_tfds_builder_is_a_local_folder(name, options):
  spec = f"tfds:{name}:train{options}"
  with pytest.raises(ValueError, match="not supported") as error:
    parse("--config=quickstart", f"--config.data.train={spec}")
  assert str(error.value).startswith(f"config.data.train: {name}")


def test_one_path_of_many_is_found():
  words = ("--config.data.train=a.json", "--config.data.train=ftp://b/x.json")
  with pytest.raises(ValueError, match=r"config\.data\.train: ftp://b"):
    parse("--config=pretrain_custom", *words)


@pytest.mark.parametrize("workdir", ["hdfs://b/run", "file:/b/run", " gs://b"])
def test_a_workdir_with_a_scheme_is_refused(workdir):
  with pytest.raises(ValueError, match=r"--workdir: .*not supported"):
    parse("--config=quickstart", "--workdir", workdir)


@pytest.mark.parametrize(
  "recipe, key", [(name, key) for name in PATHS for key in PATHS[name]]
)
@pytest.mark.parametrize("path", ["gs://b/x.json", "s3:/b/x", "az://b/x"])
def test_paths_in_an_object_store_need_an_extra(monkeypatch, recipe, key, path):
  monkeypatch.setitem(sys.modules, "obstore", None)
  with pytest.raises(ImportError, match=r"blip_jax\[cloud\]") as error:
    parse(f"--config={recipe}", f"--config.{key}={path}")
  assert str(error.value).startswith(f"config.{key}: {path[:2]}://")


def test_a_workdir_in_an_object_store(monkeypatch):
  monkeypatch.setitem(sys.modules, "obstore", None)
  with pytest.raises(ImportError, match=r"--workdir: gs://.*blip_jax\[cloud\]"):
    parse("--config=quickstart", "--workdir", "gs://b/run")
  modules = {"obstore": types.ModuleType("obstore")}
  modules["obstore.store"] = types.ModuleType("obstore.store")
  for name, module in modules.items():
    monkeypatch.setitem(sys.modules, name, module)
  line = parse("--config=quickstart", "--workdir", "gs:/b/run/")
  assert line.workdir == "gs://b/run"


@pytest.mark.parametrize(
  "recipe, flag",
  [
    ("quickstart", "data.train=scenes:train?num=3"),
    ("quickstart", "data.train=tfds:coco?data_dir=gs://bucket/tfds"),
    ("quickstart", "init.weights=https://a.org/model.pth"),
    ("caption_images", "model=https://a.org/model.pth"),
    ("caption_images", "images=a:b.jpg"),
    ("caption_images", "prompt=a photo: "),
    ("search", "queries=what is this: a dog"),
    ("search", "queries=a circle: http://x"),
    ("search", "queries=http://x is written on a sign"),
    ("caption_images", "prompt=see http://x"),
    ("caption_images", "prompt=http://x"),
    ("capfilt", "prompt=gs://b says"),
    ("caption_folder", "caption.prompt=file:/// is"),
    ("capfilt", "filter=http://a.org/model.pth"),
  ],
)
def test_other_words_with_colons_are_allowed(recipe, flag):
  parse(f"--config={recipe}", f"--config.{flag}")


@pytest.mark.parametrize("key", ["images", "out"])
def test_the_web_is_no_file_system(key):
  with pytest.raises(ValueError, match=f"config.{key}: https://"):
    parse("--config=caption_images", f"--config.{key}=https://a.org/x")


@pytest.mark.parametrize(
  "recipe, key",
  [
    ("pretrain_custom", "data.image_root"),
    ("retrieval_custom", "evals.val.image_root"),
    ("capfilt", "image_root"),
  ],
)
def test_a_folder_of_images_that_does_not_exist_is_refused(
  recipe, key, tmp_path
):
  missing = tmp_path / "imgs"
  words = [f"--config={recipe}", f"--config.{key}={missing}"]
  with pytest.raises(ValueError, match=rf"config\.{key}: expected the folder"):
    command_line.parse(words)
  missing.mkdir()
  assert command_line.parse(words).given == (key,)
