"""Every command and Python block of the documentation is executed, at reduced
size; what the pages name is looked up.

Commands run in the order of the pages, README first, then as docs/README.md
lists them: later ones use what earlier ones left. Text that is repeated is
executed once.
"""

import ast
import configparser
import dataclasses
import importlib.util
import inspect
import json
import pathlib
import re
import shlex
import sys
import tarfile
import textwrap

import ml_collections
import pytest
from PIL import Image

from blip_jax.capfilt import rows
from blip_jax.cli import recipes
from blip_jax.data import datasets, scenes
from blip_jax.inference import answering, captioning, choosing, comparing
from blip_jax.inference import model as model_lib
from blip_jax.models import decoding
from tests import helpers

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
CI = (ROOT / ".ci" / "run").read_text().splitlines()
INDEX = ROOT / "docs" / "README.md"

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def pages():
  """All pages in the order in which their commands run."""
  listed = [INDEX.parent / link for link in _LINK.findall(INDEX.read_text())]
  in_docs = [page for page in listed if page.parent == INDEX.parent]
  others = sorted(set(INDEX.parent.glob("**/*.md")) - {INDEX, *in_docs})
  first, last = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
  ordered = [first, INDEX, *in_docs, *others, last]
  return {str(page.relative_to(ROOT)): page.read_text() for page in ordered}


PAGES = pages()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def snippets():
  """(language, text) of all commands and Python blocks, in order, each once."""
  found = []
  for page in PAGES.values():
    for language, text in _FENCE.findall(page):
      text = textwrap.dedent(text)
      if language == "bash":
        lines = text.replace("\\\n", " ").strip().splitlines()
        found += [("bash", " ".join(line.split())) for line in lines]
      elif language == "python":
        found.append(("python", text))
  return list(dict.fromkeys(found))


SNIPPETS = snippets()
COMMANDS = [text for language, text in SNIPPETS if language == "bash"]
PROGRAMS = [text for language, text in SNIPPETS if language == "python"]

QUICK_START = "pip install -e . && python -m blip_jax.main --config quickstart"


def first_cells(page, header):
  """Names in code in the first column of a table, by how its header begins."""
  table = page.split(f"\n{header}")[1].split("\n\n")[0]
  cells = [row.split("|")[1] for row in table.split("\n")[2:] if "|" in row]
  return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


# What stands for released models, which tests cannot download.
STAND_INS = {
  "model_base_caption_capfilt_large": "released",
  "model_base_retrieval_coco": "runs/quickstart",
  "model_base_vqa_capfilt_large": "answerer",
  "model_base_nlvr": "comparer",
}

# The file that the pages convert is a golden one here, whose sizes cannot be
# told from its weights.
GOLDEN_SIZES = (
  f"--model-config={GOLDEN}/configs/med_config.json",
  f"--tokenizer={GOLDEN}/tokenizer/tiny",
)

# Added to every training, so that it takes seconds.
SHORT = ("--config.num_steps=2", "--config.batch_size=8")

# Added to every pre-training, for the same, and to need no network. What is
# fine-tuned or evaluated brings its model along.
SHRINK = (
  "--config.model.image_size=16",
  "--config.tokenizer=scenes",
  "--config.pretrain.queue_size=16",
)

# What snippets with these words print: pattern -> how often.
PRINTED = {
  "num_beams=3, max_length=20": {r"\(log-probability -": 2},
  "num_return_sequences=5, seed=1": {r"\[\('": 5},
  "# any text": {r"\(\d\.\d\d\)$": 2, r"^(yes|no|red) \[": 2},
  "abstain_below=0.5": {r"^other: ": 4},
  "videos/0.mp4": {r"\(\d\.\d\d\)$": 2, r"^video: ": 2},
  "model.choose(": {r"^0\.\d\d\d (left|right|top|bottom)$": 4},
  "generated_text": {r"^\[\{'generated_text': ": 1, r"^\[\[\{'generated": 1},
  "tools.export": {r"^  ids +0\.0e\+00$": 1},
  "in_avals": {r"^exported: \w": 1},
  "found.prob": {r"^(True|False) 0\.\d\d$": 2},
  "score_vqa": {r"^overall +\d+\.\d\d +\d+\.\d\d$": 1},
  "match.rank_score": {r"match probability \[\[0\.[^a-z]*\]\] rank by": 1},
  "looked at": {r"^looked at \('": 1},
  "found.maps.shape": {r"^words \('a', 'red', .* maps \(8, \d, \d\)$": 1},
  "caption.png": {r"^caption \(": 1},
  "pairwise=True": {r"pairs \[": 1, r"hidden states \(2, \d+, \d+\) \(2,": 1},
  'method="match"': {r"cosine \[\[.*\]\] no match, match": 1},
  "--digest": {r"^params [0-9a-f]{64}$": 1},
  "tools.plan": {r"^  memory +fits: ": 1, r"^run: .* device-hours": 1},
  "tests.parity": {r"^\d+ ok, 0 FAIL, 0 missing$": 1},
}


@pytest.fixture(scope="module")
def user_dir(tmp_path_factory):
  """A folder with the files that a reader of the pages has."""
  folder = tmp_path_factory.mktemp("user")
  (folder / "tests").symlink_to(ROOT / "tests")
  (folder / "model_base_caption_capfilt_large.pth").symlink_to(
    GOLDEN / "ckpt" / "blip_decoder.pth"
  )
  helpers.write_captioner(folder / "released")
  helpers.write_golden("blip_vqa", folder / "answerer")
  helpers.write_golden("blip_nlvr", folder / "comparer")
  images, shards = folder / "images", folder / "shards"
  described = folder / "described"
  for path in (images, shards, described):
    path.mkdir()
  rows = []
  for i, record in enumerate(map(scenes.Scenes("val").__getitem__, range(16))):
    Image.fromarray(record["image"]).save(images / f"{i}.png")
    row = {"image": f"{i}.png", "image_id": i, "caption": record["caption"]}
    rows.append(row)
    (described / f"{i}.png").symlink_to(images / f"{i}.png")
    for path in (shards, described):
      (path / f"{i}.txt").write_text(record["caption"])
  for name in ("train.json", "val.json"):
    (folder / name).write_text(json.dumps(rows))
  helpers.write_questions(folder, 16)
  helpers.write_statements(folder, 16)
  helpers.write_videos(folder)
  helpers.write_dialogs(folder, 16)
  splits = ["train", "restval", "val", "test"]
  karpathy = [
    {
      "filename": row["image"],
      "imgid": row["image_id"],
      "sentences": [{"raw": row["caption"]}],
      "split": splits[row["image_id"] % 4],
    }
    for row in rows
  ]
  (folder / "dataset_coco.json").write_text(json.dumps({"images": karpathy}))
  with tarfile.open(shards / "0.tar", "w") as tar:
    for i in range(16):
      tar.add(images / f"{i}.png", f"{i}.png")
      tar.add(shards / f"{i}.txt", f"{i}.txt")
  return folder


def runs_in_ci(command):
  """Whether CI runs a command to the letter, or runs the tests with it."""
  return command in CI or command.startswith("python -m pytest")


def cases():
  """Snippets as parameters of a test."""
  for language, text in SNIPPETS:
    if language == "python":
      yield pytest.param(text, id=f"program {PROGRAMS.index(text)}")
    elif not runs_in_ci(text):
      # Devices and processes have tests of their own: test_mesh.py and
      # test_distributed.py.
      slow = "runs/mesh" in text or "runs/hosts" in text
      yield pytest.param(text, id=text, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("text", [*cases()])
def test_commands_and_programs(text, user_dir, commands):
  words = program_words(text) if text in PROGRAMS else command_words(text)
  done = commands.run(words, user_dir)
  assert done.returncode == 0, done.stderr[-3000:]
  for part, patterns in PRINTED.items():
    for pattern, count in patterns.items() if part in text else ():
      found = re.findall(pattern, done.stdout, re.MULTILINE)
      assert len(found) == count, (pattern, done.stdout)
  if text == QUICK_START:
    left = {path.name for path in (user_dir / "runs/quickstart").iterdir()}
    promised = first_cells(PAGES["docs/training.md"], "| file |")
    promised = {name.removesuffix("/") for name in promised}
    # Bad examples and a metric to choose by are not part of the quick start.
    assert left >= promised - {"best", "bad_samples.jsonl"}
    assert "results.json" in promised


def program_words(text):
  for name, stand_in in STAND_INS.items():
    text = text.replace(f'load("{name}")', f'load("{stand_in}")')
    text = text.replace(f'model="{name}"', f'model="{stand_in}"')
  return [sys.executable, "-c", text]


def command_words(text):
  """A command as tests run it: stand-ins for models, and little work."""
  words = shlex.split(text.removeprefix("pip install -e . && "))
  assert words[0] == "python", "a command that tests cannot run"
  words[0] = sys.executable
  for name, stand_in in STAND_INS.items():
    words = [word.replace(f"={name}", f"={stand_in}") for word in words]
  if "model_base_caption_capfilt_large.pth" in words:
    words += GOLDEN_SIZES
  if "blip_jax.main" not in words:
    return words
  config = get_config(words[words.index("--config") + 1])
  if config.job == "train" and "--config.job=evaluate" not in words:
    words += SHORT + (SHRINK if config.task == "pretrain" else ())
  if "--config.job=merge" in words:
    # The models are barely trained, and would keep nothing.
    words.append("--config.merge.threshold=0.0")
  return words


def get_config(name):
  spec = importlib.util.spec_from_file_location("recipe", recipes.path_of(name))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def test_what_is_printed_is_checked_somewhere():
  for part in PRINTED:
    assert any(part in text for text in (*COMMANDS, *PROGRAMS)), part


def test_install_and_test_commands_are_those_of_ci():
  """pip lines cannot run inside a test; CI runs them to the letter."""
  with_pip = [command for command in COMMANDS if "pip " in command]
  assert with_pip == [QUICK_START, CI[-1]]
  assert COMMANDS[:2] == with_pip


def test_pytest_commands_name_markers():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  markers = re.findall(
    r"^(\w+):", setup["tool:pytest"]["markers"], re.MULTILINE
  )
  text = "".join(PAGES.values())
  named = set(re.findall(r"python -m pytest -m (\w+)", text))
  assert named and named <= set(markers)


def test_no_command_hides_in_another_kind_of_block():
  for name, page in PAGES.items():
    for language, text in _FENCE.findall(page):
      assert language in ("", "bash", "python", "bibtex"), name
      if not language:
        assert not re.search(r"^\s*(python|pip|blip-jax) ", text, re.MULTILINE)
    assert page.count("```") == 2 * len(_FENCE.findall(page)), name


def test_every_page_is_in_the_index():
  links = set(_LINK.findall(INDEX.read_text()))
  for page in INDEX.parent.glob("**/*.md"):
    if page != INDEX:
      assert str(page.relative_to(INDEX.parent)) in links


def test_the_readme_is_short():
  assert len(PAGES["README.md"].splitlines()) <= 250


def slug(heading):
  """The anchor that GitHub gives a heading."""
  text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
  return text.replace(" ", "-")


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md"])
def test_links_and_anchors_resolve(name):
  text = _FENCE.sub("", (ROOT / name).read_text())
  for link in _LINK.findall(text):
    if link.startswith(("http://", "https://")):
      continue
    path, _, anchor = link.partition("#")
    target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
    assert target.exists(), f"{name}: {link}"
    assert target.is_relative_to(ROOT), f"{name}: {link}"
    if anchor:
      page = _FENCE.sub("", target.read_text())
      headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
      assert anchor in map(slug, headings), f"{name}: {link}"


def test_every_config_is_in_the_table():
  listed = first_cells(PAGES["README.md"], "| config |")
  assert sorted(listed) == recipes.names()


def test_every_source_is_in_the_table():
  table = PAGES["docs/data.md"].split("\n| source |")[1].split("\n\n")[0]
  kinds = r"\.(?:jsonl?|[ct]sv|parquet|tar|txt)\b|\b(?:tfds|scenes):|folder"
  understood = set(re.findall(kinds, datasets.UNDERSTOOD))
  assert set(re.findall(kinds, table)) == understood


def test_options_of_sources_are_documented():
  options = set(re.findall(r"[?&](\w+)=", datasets.UNDERSTOOD))
  assert options >= {"image", "caption", "delimiter", "noise", "num"}
  page = PAGES["docs/data.md"]
  assert {option for option in options if f"{option}=" not in page} == set()


def test_every_module_is_in_the_tour():
  tour = PAGES["docs/tour.md"].split("## Outside the package")[0]
  listed = re.findall(r"^\| `([\w/]+\.py)` \|", tour, re.MULTILINE)
  package = ROOT / "blip_jax"
  modules = [str(path.relative_to(package)) for path in package.rglob("*.py")]
  assert sorted(listed) == sorted(modules)


def test_every_bound_of_a_difference_exists():
  table = PAGES["docs/differences.md"].split("\n| original |")[1]
  rows = table.split("\n\n")[0].split("\n")[2:]
  for row in rows:
    bounds = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", row.split("|")[-2])
    assert bounds, row
    for file, test in bounds:
      text = (ROOT / "tests" / file).read_text()
      definition = f"\ndef {test}(" if test else "\ndef test_"
      assert definition in text, (file, test)


def test_columns_of_capfilt_are_documented():
  listed = first_cells(PAGES["docs/capfilt.md"], "| column |")
  assert listed == list(rows.COLUMNS)


def test_fields_and_options_of_captions_are_documented():
  page = PAGES["docs/captioning.md"]
  fields = {field.name for field in dataclasses.fields(captioning.Caption)}
  assert set(first_cells(page, "| field of `Caption` |")) == fields
  options = set(inspect.signature(model_lib.Model.caption).parameters)
  options |= {field.name for field in dataclasses.fields(decoding.Decoding)}
  options = options - {"self", "images", "options"} | {"max_new_tokens"}
  listed = first_cells(page, "| option of `caption` |")
  assert sorted(listed) == sorted(options)


def test_fields_and_options_of_answers_are_documented():
  page = PAGES["docs/vqa.md"]
  fields = {field.name for field in dataclasses.fields(answering.Answer)}
  assert set(first_cells(page, "| field of `Answer` |")) == fields
  options = set(inspect.signature(model_lib.Model.answer).parameters)
  listed = set(first_cells(page, "| option of `answer` |"))
  assert listed >= options - {"self", "images", "questions", "options"}


def test_fields_and_options_of_comparisons_are_documented():
  page = PAGES["docs/nlvr.md"]
  fields = {field.name for field in dataclasses.fields(comparing.Comparison)}
  assert set(first_cells(page, "| field of `Comparison` |")) == fields
  options = set(inspect.signature(model_lib.Model.compare).parameters)
  listed = set(first_cells(page, "| option of `compare` |"))
  assert listed == options - {"self", "image_pairs", "statements"}


def test_fields_and_options_of_choices_are_documented():
  page = PAGES["docs/visual_dialog.md"]
  for value in (choosing.Dialog, choosing.Choice):
    fields = {field.name for field in dataclasses.fields(value)}
    cells = first_cells(page, f"| field of `{value.__name__}` |")
    assert set(cells) == fields
  options = set(inspect.signature(model_lib.Model.choose).parameters)
  listed = set(first_cells(page, "| option of `choose` |"))
  assert listed == options - {"self", "dialogs"}


def test_extras_that_are_named_exist():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  extras = set(setup["options.extras_require"])
  text = "".join(PAGES.values()) + CHANGELOG
  named = ",".join(re.findall(r"-e '\.\[([\w,]+)\]'", text)).split(",")
  assert set(named) <= extras
  section = PAGES["README.md"].split("## Installation")[1].split("\n## ")[0]
  assert extras <= set(re.findall(r"`([\w-]+)`", section))


def has_key(config, key):
  """Whether a config has a key, such as `data.train`, `evals.NAME.source`,
  `mesh.data|fsdp` or `model.*`."""
  part, _, rest = key.partition(".")
  if part == "*":
    return True
  if part == "NAME":
    return any(has_key(config, f"{name}.{rest}") for name in config)
  if "|" in part:
    return all(has_key(config, f"{name}.{rest}") for name in part.split("|"))
  if not isinstance(config, ml_collections.ConfigDict) or part not in config:
    return False
  return not rest or has_key(config[part], rest)


@pytest.fixture(scope="module")
def configs():
  return {name: get_config(name) for name in recipes.names()}


def keys_in(text):
  """Config keys of flags and of text in backticks."""
  return re.findall(r"(?:`|--)config\.(?!py\b)([\w.|*]*[\w*])", text)


def test_keys_that_are_named_exist(configs):
  for name, page in PAGES.items():
    for key in keys_in(page):
      assert any(has_key(c, key) for c in configs.values()), (name, key)


def test_keys_that_are_stable_exist(configs):
  text = PAGES["docs/training.md"].split("Stable keys:")[1].split("\n\n")[0]
  keys = keys_in(text.split("Keys that")[0])
  assert len(keys) == 9
  for key in keys:
    for name in ("pretrain_custom", "caption_folder", "retrieval_custom"):
      assert has_key(configs[name], key), key


def test_renamed_keys_exist(configs):
  rows = CHANGELOG.split("\n| old | new |\n")[1].split("\n\n")[0].split("\n")
  for old, new in (row.split("|")[1:3] for row in rows[1:] if row):
    for key in keys_in(new):
      assert any(has_key(c, key) for c in configs.values()), key
    for key in keys_in(old):
      assert not any(has_key(c, key) for c in configs.values()), key


def test_flags_of_commands_exist(configs):
  for command in COMMANDS:
    if "blip_jax.main" in command:
      name = re.search(r"--config (\w+)", command)[1]
      for key in keys_in(command):
        assert has_key(configs[name], key), command


def recipes_in(text):
  """What stands behind --config: names and paths of recipes."""
  examples = {"NAME", "./mine.py"}
  return set(re.findall(r"--config[ =]([\w./]+)", text)) - examples


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md"])
def test_recipes_that_are_named_exist(name):
  for path in recipes_in((ROOT / name).read_text()):
    assert (ROOT / recipes.path_of(path)).exists(), path


@pytest.mark.parametrize("name", recipes.names())
def test_docstrings_of_recipes(name, configs):
  """Their commands name the recipe itself, and keys that it has."""
  code = pathlib.Path(recipes.path_of(name)).read_text()
  doc = ast.get_docstring(ast.parse(code))
  commands = re.findall(r"^  python -m blip_jax.main .*$", doc, re.MULTILINE)
  assert commands
  for command in commands:
    for path in recipes_in(command):
      assert (ROOT / recipes.path_of(path)).exists()
      assert pathlib.Path(path).stem == name
    for key in keys_in(command):
      assert has_key(configs[name], key), command
  for key in keys_in(doc):
    assert any(has_key(config, key) for config in configs.values()), key
