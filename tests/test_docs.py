"""What the README shows is run, shrunk; what it claims is looked up."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from blip_jax import recipes
from blip_jax.convert import opening, write
from blip_jax.data import datasets, scenes
from tests import QUICK_TO_COMPILE

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [
  block.replace("\\\n", " ").strip()
  for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
]
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]

# The file that the README converts is a golden one here, whose sizes need
# to be told.
GOLDEN = ROOT / "tests" / "golden"
TOLD = (
  f"--model-config={GOLDEN}/configs/med_config.json",
  f"--tokenizer={GOLDEN}/tokenizer/tiny",
)

# Stand for released models, which nothing here can fetch.
STAND_INS = {
  "model_base_caption_capfilt_large": "released",
  "model_base_retrieval_coco": "runs/quickstart",
}

# Added to every training run, so that it takes seconds.
SHRINK = (
  "--config.num_steps=2",
  "--config.batch_size=8",
  "--config.model.image_size=16",
  "--config.optim.warmup_steps=1",
  "--config.tokenizer=scenes",
)


@pytest.fixture(scope="module")
def user_dir(tmp_path_factory):
  """A checkout, and the files that a user of the README has."""
  folder = tmp_path_factory.mktemp("user")
  for name in ("configs", "tools", "tests"):
    (folder / name).symlink_to(ROOT / name)
  (folder / "model_base_caption_capfilt_large.pth").symlink_to(
    GOLDEN / "ckpt" / "blip_decoder.pth"
  )
  opened = opening.open_checkpoint(
    GOLDEN / "ckpt" / "blip_decoder.pth",
    model_config=GOLDEN / "configs" / "med_config.json",
    tokenizer=GOLDEN / "tokenizer" / "tiny",
  )
  write.write(opened, folder / "released", "orbax")
  pictures, shards = folder / "pictures", folder / "shards"
  described = folder / "described"
  for path in (pictures, shards, described):
    path.mkdir()
  rows = []
  for i, record in enumerate(map(scenes.Scenes("val").__getitem__, range(16))):
    Image.fromarray(record["image"]).save(pictures / f"{i}.png")
    row = {"image": f"{i}.png", "image_id": i, "caption": record["caption"]}
    rows.append(row)
    (described / f"{i}.png").symlink_to(pictures / f"{i}.png")
    for path in (shards, described):
      (path / f"{i}.txt").write_text(record["caption"])
  for name in ("train.json", "val.json"):
    (folder / name).write_text(json.dumps(rows))
  with tarfile.open(shards / "0.tar", "w") as tar:
    for i in range(16):
      tar.add(pictures / f"{i}.png", f"{i}.png")
      tar.add(shards / f"{i}.txt", f"{i}.txt")
  return folder


def test_install_and_test_commands_are_those_of_ci():
  """pip lines cannot run inside a test; CI runs them to the letter."""
  ci = (ROOT / ".ci" / "run").read_text().splitlines()
  assert COMMANDS[0] == (
    "pip install -e . && python -m blip_jax.main --config configs/quickstart.py"
  )
  assert COMMANDS[1] == ci[-1]


def is_slow(command):
  """What test_mesh.py and test_distributed.py are about."""
  return "runs/mesh" in command or "runs/hosts" in command


@pytest.mark.parametrize(
  "command",
  [
    pytest.param(c, marks=pytest.mark.slow if is_slow(c) else ())
    for c in COMMANDS
    if "pytest" not in c
  ],
  ids=str,
)
def test_commands(command, user_dir):
  """In the README's order: later ones look at what earlier ones made."""
  words = shlex.split(command.split("&&")[-1])
  assert words[0] == "python"
  words[0] = sys.executable
  for name, stand_in in STAND_INS.items():
    words = [word.replace(f"={name}", f"={stand_in}") for word in words]
  trains = not re.search(r"(caption_images|search|capfilt)\.py", command)
  if "blip_jax.main" in words and trains:
    words += SHRINK
    task = re.search("pretrain|quickstart|caption|retrieval", command)[0]
    task = "pretrain" if task == "quickstart" else task
    if task != "caption":
      words.append(f"--config.{task}.queue_size=16")
  if "--config.job=merge" in words:
    words.append("--config.merge.threshold=0.0")  # of what knows nothing yet
  if "model_base_caption_capfilt_large.pth" in words:
    words += TOLD
  done = subprocess.run(
    words,
    cwd=user_dir,
    env={**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  if "quickstart.py" in command:
    workdir = (
      words[words.index("--workdir") + 1]
      if "--workdir" in words
      else ("runs/quickstart")
    )
    left = {path.name for path in (user_dir / workdir).iterdir()}
    promised = re.findall(r"^\| `(\w+\.?\w*)/?`", README, re.MULTILINE)
    assert {"results.json", "samples.png", "checkpoints"} <= left
    assert "results.json" in promised
  if "--digest" in command:
    assert re.search(r"^params [0-9a-f]{64}$", done.stdout, re.MULTILINE)


def test_python(user_dir):
  """After the commands, for it looks at a run of theirs."""
  blocks = README
  for name, stand_in in STAND_INS.items():
    blocks = blocks.replace(f'load("{name}")', f'load("{stand_in}")')
  captions, matches, weights = re.findall(
    r"```python\n(.*?)```", blocks, re.DOTALL
  )
  told = run_python(captions, user_dir)
  assert len(re.findall(r"\(log-probability -", told)) == 2
  assert len(told.splitlines()) == 2 + 5
  told = run_python(matches, user_dir)
  assert re.search(r"^belong together \[\[0\.\d+ ", told)
  assert "]] rank by [[" in told
  told = run_python(weights, user_dir)
  assert re.search(r"cosine \[\[.*\]\] no match, match", told)


def run_python(block, user_dir):
  done = subprocess.run(
    [sys.executable, "-c", block],
    cwd=user_dir,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def test_every_config_is_in_the_table():
  table = README.split("| config | what |")[1].split("\n\n")[0]
  listed = set(re.findall(r"`(\w+\.py)`", table))
  assert listed == {f"{name}.py" for name in recipes.names()}


def test_every_source_is_in_the_table():
  table = README.split("## Data")[1].split("\n\n")[2]
  kinds = r"\.(?:jsonl?|[ct]sv|parquet|tar|txt)\b|\b(?:tfds|scenes):|folder"
  understood = set(re.findall(kinds, datasets.UNDERSTOOD))
  assert set(re.findall(kinds, table)) == understood


def test_every_room_of_the_tour_exists():
  tour = README.split("## A guided tour")[1].split("```")[1]
  for name in re.findall(r"^  (\w+/\w+\.py|\w+\.py|\w+/)", tour, re.MULTILINE):
    assert (ROOT / "blip_jax" / name).exists(), name


def test_every_bound_of_a_difference_exists():
  table = README.split("## Differences")[1].split("\n\n")[1]
  for file, test in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", table):
    text = (ROOT / "tests" / file).read_text()
    assert f"def {test}" in text, (file, test)


def test_keys_that_stay_exist():
  from blip_jax.tasks import pretrain

  keys = README.split("Keys that stay:")[1].split("All of them")[0]
  for key in re.findall(r"`config\.([\w.|*]+)`", keys):
    value = pretrain.defaults()
    for part in key.replace(".*", "").split("."):
      for choice in part.split("|"):
        assert choice in value, key
      value = value[part.split("|")[0]]
