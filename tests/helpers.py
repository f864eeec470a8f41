"""What several test files need: golden arrays, toy runs, tiny models."""

import functools
import importlib.util
import io
import json
import pathlib
import tarfile
import types

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from PIL import Image

from blip_jax import defaults, train
from blip_jax.capfilt import job, label, ledger, rows
from blip_jax.convert import opening, reader, tensor_files, weights, write
from blip_jax.data import examples, rejects, scenes, tokenizer, transforms
from blip_jax.evaluators import base
from blip_jax.inference import model as model_lib
from blip_jax.models import card, config, families, generation
from blip_jax.runtime import checkpoint, sharding, snapshot, train_state
from blip_jax.runtime import config as run_config
from blip_jax.tasks import pretrain

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = pathlib.Path(__file__).parent / "golden"

# The tiny models of the goldens (tests/golden/manifest.json, `config`).
TOKENS = config.SpecialTokens(pad=0, cls=2, sep=3, dec=422, enc=423)
VIT = config.ViTConfig(
  image_size=(32, 32),
  patch_size=8,
  width=48,
  depth=2,
  num_heads=4,
  mlp_dim=192,
)
MED = config.MedConfig(
  vocab_size=424,
  width=64,
  depth=2,
  num_heads=4,
  mlp_dim=256,
  max_positions=64,
  dropout=0.0,
  tokens=TOKENS,
)
BLIP = config.BlipConfig(VIT, MED, embed_dim=32)


def arrays(case: str) -> dict[str, jax.Array | np.ndarray]:
  """float64 references stay numpy, for JAX would round them."""
  with np.load(GOLDEN / "data" / f"{case}.npz") as data:
    return {
      name: x if x.dtype == np.float64 else jnp.asarray(x)
      for name, x in data.items()
    }


def state_dict(name: str, prefix: str = "") -> dict[str, np.ndarray]:
  tensors = reader.read(GOLDEN / "ckpt" / f"{name}.pth")
  return {prefix + key: array for key, array in tensors.items()}


def unflatten(flat: dict[str, np.ndarray]) -> dict:
  flat = {path: jnp.asarray(x) for path, x in flat.items()}
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def flatten(params: dict) -> dict[str, np.ndarray]:
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return {path: np.asarray(x) for path, x in flat.items()}


def leaves(state: dict[str, np.ndarray], layout: str = "original") -> dict:
  return weights.from_external(state, layout, weights.Report())


def params(name: str, prefix: str = "") -> dict:
  """Our parameter tree of a golden checkpoint; tied weights appear twice."""
  return item(leaves(state_dict(name, prefix)), "params")


def momentum_params(name: str) -> dict:
  """The momentum twin's tree of a golden checkpoint."""
  return item(leaves(state_dict(name)), "momentum/params_m")


def item(leaves: dict, prefix: str) -> dict:
  prefix += "/"
  return unflatten(
    {
      path.removeprefix(prefix): leaf.read()
      for path, leaf in leaves.items()
      if path.startswith(prefix)
    }
  )


def image(array: jax.Array) -> jax.Array:
  """NCHW to NHWC."""
  return array.transpose(0, 2, 3, 1)


class StubTask:
  model = None
  predict_fns = types.MappingProxyType({})

  def init(self, rng):
    return {}

  def init_momentum(self, params, rng):
    return None

  def clamp(self, params):
    return params

  def loss(self, params, momentum, batch, *, rng, step, train=True):
    raise AssertionError("this test does not train")


TOY_CONFIG = {"model": {"variant": "tiny"}, "num_steps": 10}


class StubLoader:
  """Hands out its own dict, as an iterator may; the next batch changes it."""

  def __init__(self, position=0):
    self.state = {"next_index": position, "parts": [{"seen": 3}]}

  @property
  def position(self):
    return self.state["next_index"]

  def get_state(self):
    return self.state

  def set_state(self, state):
    assert state["parts"] == [{"seen": 3}]
    self.state = state


@flax.struct.dataclass
class ToyMomentum:
  params_m: dict
  text_queue: jax.Array
  queue_ptr: jax.Array


class ToyRun:
  """What `train.py` gives a checkpoint, on a toy model."""

  def __init__(
    self, sizes=(2, 2, 2), width=8, heads=("itm_head",), seed=0, queue=6
  ):
    names = dict(zip(sharding.AXES, sizes, strict=True))
    self.mesh = sharding.make_mesh(names, jax.devices()[: np.prod(sizes)])
    self.tx = optax.adamw(1e-3)

    def init_fn(params=None):
      if params is None:
        key = jax.random.key(seed)
        params = {"temp": jnp.float32(0.07)}
        for head in ("text_proj", *heads):
          key = jax.random.fold_in(key, 1)
          params[head] = {
            "kernel": jax.random.normal(key, (width, 4)),
            "bias": jnp.ones(4),
          }
      return params, ToyMomentum(params, jnp.ones((queue, 4)), jnp.int32(5))

    self.init_fn = init_fn
    self.abstract = train_state.abstract(init_fn, self.tx, self.mesh)

  def make(self, params=None):
    return train_state.create(self.init_fn, self.tx, self.mesh, params)

  def start(self, workdir, loader=None, **init):
    """Starts in a workdir as `config.init` says."""
    unset = {"restore": "", "weights": "", "momentum_state": False}
    unset |= {"allow_missing": (), "allow_unexpected": ()}
    store = checkpoint.Checkpoints(workdir, every_steps=1)
    try:
      return checkpoint.initialise(
        types.SimpleNamespace(**{**unset, **init}),
        lambda path: snapshot.Arrays(snapshot.find(path)),
        store,
        self.abstract,
        self.make,
        loader or StubLoader(),
      )
    finally:
      store.close()

  def save(self, workdir, step, state=None, position=0):
    state = self.make() if state is None else state
    state = state.replace(step=jnp.int32(step))
    store = checkpoint.Checkpoints(workdir, every_steps=1)
    store.save(step, state, StubLoader(position), TOY_CONFIG)
    store.close()
    return state


def assert_same(left, right):
  """Equal structures, types and bits."""
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for one, two in zip(
    jax.tree.leaves(left), jax.tree.leaves(right), strict=True
  ):
    assert one.dtype == two.dtype
    assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


@functools.lru_cache
def scenes_tokenizer():
  return tokenizer.Tokenizer.load(scenes.vocab_dir())


def make_model(family="caption", mesh=None, **fields):
  sizes = config.variant(
    "tiny",
    image_size=16,
    vocab_size=scenes_tokenizer().vocab_size,
    tokens=config.SpecialTokens(**scenes_tokenizer().special_ids),
    vit=dict(depth=1),
    med=dict(depth=1),
  )
  params = families.init(family, sizes, jax.random.key(0))
  # Sharper, so that texts of pictures differ.
  params = jax.tree.map(lambda x: 5 * x if x.ndim == 2 else x, params)
  generation = dict(num_beams=3, max_length=12, min_length=5)
  return model_lib.Model(
    card.Card(family, sizes, "a picture of ", generation),
    families.build(family, sizes),
    params,
    fields.get("tokenizer", scenes_tokenizer()),
    mesh or sharding.one_device(),
  )


DEEP_IMAGE = "deeper/COCO_val2014_000000000017.png"


def write_captioner(target):
  """A converted checkpoint, as a user would have one."""
  opened = opening.open_checkpoint(
    GOLDEN / "ckpt" / "blip_decoder.pth",
    model_config=GOLDEN / "configs" / "med_config.json",
    tokenizer=GOLDEN / "tokenizer" / "tiny",
  )
  return str(write.write(opened, target, "orbax"))


def write_images(folder):
  """Seven files, of which one is no picture and one lies deeper."""
  (folder / "deeper").mkdir(parents=True)
  rng = np.random.default_rng(0)
  names = [f"{i}.png" for i in range(5)] + [DEEP_IMAGE]
  for name in names:
    pixels = rng.integers(0, 256, (24, 40, 3), np.uint8)
    Image.fromarray(pixels).save(folder / name)
  (folder / "2b.jpg").write_bytes(b"not a picture")
  return folder


def write_video(path, frames, codec="libx264rgb"):
  """A lossless video of uint8 frames [F, H, W, 3]."""
  import av

  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=10)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "rgb24"
    stream.options = {"crf": "0"}
    for frame in frames:
      frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


NOISY_SCENES = scenes.Scenes("train", size=16, num=400, noise=0.4)


def png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "png")
  return file.getvalue()


def write_tar(path, members):
  """A tar of (name, bytes) members."""
  with tarfile.open(path, "w") as tar:
    for name, content in members:
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return path


def scene_members(start, count):
  """Webdataset members of noisy scenes."""
  for n in range(start, start + count):
    record = NOISY_SCENES[n]
    yield f"{n:04d}.png", png(record["image"])
    yield f"{n:04d}.txt", record["caption"].encode()


def write_scene_shards(folder):
  """Three shards of five images: one is broken, two have no usable text."""
  folder.mkdir()
  for shard in range(3):
    members = dict(scene_members(5 * shard, 5))
    if shard == 1:
      members["0006.png"] = b"\x89PNG no more"
      del members["0008.txt"]
      members["0009.txt"] = b"..."
    write_tar(folder / f"{shard:05d}.tar", members.items())
  return folder


def load_tiny(name, task, mesh, **_):
  """Replaces `inference.model.load`: random weights, which the name decides."""
  return _tiny(name, task, mesh)


@functools.cache  # so that all tests share the compiled programs
def _tiny(name, task, mesh):
  model = make_model(task, mesh)
  if name == "other":
    params = jax.tree.map(lambda x: 1.01 * x, model.params)
    model = model_lib.Model(
      model.card, model.module, params, model.tokenizer, mesh
    )
  return model


def capfilt_config(source, out, **changes):
  """A CapFilt job with short captions of tiny models."""
  settings = defaults.capfilt().lock()
  settings.update(
    source=(str(source),), out=str(out), per_device_batch_size=1, num_threads=2
  )
  settings.update(captioner="one", filter="one")
  settings.generation.update(max_length=8, min_length=4)
  settings.update(changes)
  return settings


# Texts of an image: source, itm_prob, text.
IMAGE_TEXTS = (
  ("web", 0.9, "A red circle."),
  ("web", 0.2, "click to enlarge"),
  ("synthetic", 0.8, "a red circle"),
  ("synthetic", 0.6, "a red circle left of a blue star"),
)


def write_capfilt_job(folder, settings, texts):
  """A finished job without models: `texts` are their labels.

  Args:
    texts: name of a work unit -> for each image, its (source, itm_prob, text).
  """
  job_settings = {
    key: settings[key] for key in ("image_root", "web_texts", "work_unit_rows")
  }
  book = ledger.Ledger(folder)
  book.begin(job_settings | {"source": list(settings.source)}, force=False)
  constants = {"captioner": "c", "filter": "f", "seed": 0}
  for work_unit in job.find_work_units(book.settings):
    source, damage = work_unit.open()
    counts, text_rows = rows.Counts(damage), []
    for row, image_texts in enumerate(texts[work_unit.name]):
      image = _labelled(row, source[row], image_texts)
      image_rows = [*rows.of_image(image, 0.5, constants)]
      counts.add(image, image_rows)
      text_rows += image_rows
    report = {"work_unit": work_unit.name, "input": work_unit.fingerprint()}
    book.finish(
      work_unit, rows.to_parquet(text_rows), report | counts.as_json()
    )
  return book


def _labelled(row, record, texts):
  path = record["image"] if isinstance(record["image"], str) else ""
  image_id = str(record["image_id"]) if "image_id" in record else None
  texts = tuple(
    label.Text(text, source, "", prob, 0.1, -3.0)
    for source, prob, text in texts
  )
  return label.LabelledImage(row, record["id"], path, image_id, texts=texts)


def write_listed_capfilt_job(folder):
  """A finished job over a list of five images, in three work units.

  Returns its config; `merge.out` is clean.json in the same folder.
  """
  root = folder / "images"
  root.mkdir()
  lines = []
  for n in range(5):
    Image.fromarray(NOISY_SCENES[n]["image"]).save(root / f"{n}.png")
    lines.append({"image": f"{n}.png", "caption": "x", "image_id": n})
  (folder / "web.json").write_text(json.dumps(lines))
  settings = defaults.capfilt().lock()
  settings.update(source=(str(folder / "web.json"),), image_root=str(root))
  settings.update(work_unit_rows=2, out=str(folder / "out"))
  settings.merge.out = str(folder / "clean.json")
  texts = {
    "web.json-00000": [IMAGE_TEXTS, IMAGE_TEXTS[1:2]],
    "web.json-00001": [IMAGE_TEXTS[:1], IMAGE_TEXTS[2:]],
    "web.json-00002": [IMAGE_TEXTS[3:]],
  }
  write_capfilt_job(settings.out, settings, texts)
  return settings


# Dtypes of PyTorch and shapes, for files of tensors.
TORCH_DTYPES = (
  np.float64,
  np.float32,
  np.float16,
  ml_dtypes.bfloat16,
  np.int64,
  np.int32,
  np.uint8,
  np.bool_,
)
ARRAY_SHAPES = ((), (0,), (0, 3), (7,), (2, 3, 4))


def random_array(shape, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  return np.asarray(rng.normal(size=shape) * 50).astype(dtype)


def arrays_of_all_dtypes():
  """Named arrays of every dtype and shape, two of them not contiguous."""
  arrays = {
    f"{np.dtype(dtype)}{shape}": random_array(shape, dtype)
    for dtype in TORCH_DTYPES
    for shape in ARRAY_SHAPES
  }
  transposed, sliced = random_array((3, 4)).T, random_array((9,))[2::3]
  return arrays | {"transposed": transposed, "sliced": sliced}


GOLDEN_CONFIG = GOLDEN / "configs" / "med_config.json"
GOLDEN_TOKENIZER = GOLDEN / "tokenizer" / "tiny"
# Arguments with which the golden checkpoints are opened.
OPEN_GOLDEN = dict(model_config=GOLDEN_CONFIG, tokenizer=GOLDEN_TOKENIZER)


def golden_checkpoint(name):
  return GOLDEN / "ckpt" / f"{name}.pth"


def open_golden(name, **options):
  return opening.open_checkpoint(
    golden_checkpoint(name), **OPEN_GOLDEN, **options
  )


def save_changed(tmp_path, change, name="blip_decoder"):
  """Saves a golden checkpoint after `change` has edited its state dict."""
  state = dict(reader.read(golden_checkpoint(name)))
  change(state)
  path = tmp_path / "changed.pth"
  tensor_files.save_torch(path, state)
  return path


COLOURS = ("red", "green", "blue", "yellow", "black", "pink", "cyan")


class ColourImages(list):
  """Records of images of one colour each, whose caption is the colour."""

  def __init__(self, number=7, bad=(), captions=1):
    for i in range(number):
      pixels = np.full((8, 8, 3), scenes.COLOURS[COLOURS[i]], np.uint8)
      caption = [COLOURS[i], f"a {COLOURS[i]} square"][:captions]
      self.append(
        {
          "image": b"" if i in bad else pixels,
          "caption": caption,
          "id": f"images:{i}",
        }
      )


def colour_split(source, batch_size=4):
  """A split for evaluators, on a mesh of eight devices."""
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
  example = examples.PairExample(
    scenes_tokenizer(), transforms.EvalImage(8), max_words=5, max_length=6
  )
  bad = rejects.BadSamples(max_fraction=0.5)
  return base.Split(source, example, batch_size, mesh, bad)


def _palette():
  return jnp.array([scenes.COLOURS[c] for c in COLOURS], jnp.float32)


def _colour_ids():
  ids, _ = scenes_tokenizer().encode(list(COLOURS), 3)
  return jnp.asarray(ids[:, 1])


def colour_of_image(image):
  """One-hot of the colour of an image."""
  distance = jnp.abs(image[:, :1, 0].astype(jnp.float32) - _palette()[None])
  return jax.nn.one_hot(distance.sum(-1).argmin(-1), len(COLOURS))


def colour_of_text(ids, mask):
  """One-hot of the colour that a text names, where the mask lets one see it."""
  named = (ids[:, :, None] == _colour_ids()[None, None]) & (mask[..., None] > 0)
  return named.any(1).astype(jnp.float32)


def _match_colours(params, ids, mask, image_kv, legacy_cls=False):
  images = jnp.repeat(image_kv, len(ids) // len(image_kv), 0)
  score = (images * colour_of_text(ids, mask)).sum(-1)
  return jnp.stack([0.5 * jnp.ones(len(ids)), score], axis=-1)


def _caption_colours(params, image, prompt, settings, num_positions):
  ids = _colour_ids()[colour_of_image(image).argmax(-1)]
  texts = jnp.zeros((len(ids), 1, num_positions), jnp.int32)
  texts = texts.at[:, 0, : len(prompt)].set(prompt[None])
  texts = texts.at[:, 0, len(prompt)].set(ids)
  return generation.Generated(texts, jnp.zeros(texts.shape), jnp.zeros(1))


class ColourTask(StubTask):
  """Gives the right answer about every image of `ColourImages`."""

  # The part of a model that evaluators read.
  model = types.SimpleNamespace(
    config=config.variant(
      "tiny",
      image_size=8,
      vocab_size=scenes_tokenizer().vocab_size,
      tokens=config.SpecialTokens(**scenes_tokenizer().special_ids),
    )
  )

  predict_fns = types.MappingProxyType(
    {
      "image_features": lambda params, image: (
        colour_of_image(image),
        colour_of_image(image),
      ),
      "text_feat": lambda params, ids, mask: colour_of_text(ids, mask),
      "image_kv": lambda params, image_embeds: image_embeds,
      "match": _match_colours,
      "caption": _caption_colours,
    }
  )

  def __init__(self, **predict_fns):
    """Replaces some of the functions."""
    self.predict_fns = {**type(self).predict_fns, **predict_fns}

  def loss(self, params, momentum, batch, *, rng, step, train=True):
    assert not train
    loss = batch["image"].astype(jnp.float32).mean()
    return loss, (momentum, {"loss": loss, "temp": loss})


def evaluate(evaluator, params=None):
  """The metrics of an evaluator, for a state at step 5."""
  state = train_state.TrainState(
    step=np.int32(5), params=params or {}, opt_state=None, momentum=None
  )
  return dict(evaluator.run(state))


def write_gallery(folder):
  """Nine images and a broken one."""
  folder.mkdir()
  rows = scenes.Scenes("val")
  for number in range(9):
    Image.fromarray(rows[number]["image"]).save(folder / f"{number}.png")
  (folder / "broken.png").write_text("nothing")
  return folder


def load_config(name):
  """Returns the config of a recipe."""
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config().lock()


def shrunk_config(name):
  """Returns a recipe on Scenes, at a size where two steps take seconds."""
  config = load_config(name)
  config.batch_size = 16
  config.num_steps = 2
  config.log_every_steps = 1
  config.tokenizer = "scenes"
  config.model.image_size = 16
  if config.model.variant == "base" or config.task != "caption":
    # Recipes in bfloat16 and with recomputation take twice as long to compile
    # on a CPU, so only the large captioner keeps them.
    config.model.dtype, config.model.vit_remat = "float32", "none"
  config.model.variant = "tiny"
  # The largest mesh axis that two devices allow.
  config.mesh.fsdp = min(config.mesh.fsdp, 2)
  if config.task == "pretrain":
    # Programs with the same constants are compiled only once.
    config.pretrain.update(pretrain.defaults().pretrain)
    config.data.max_length = 18
  if config.task in ("pretrain", "retrieval"):
    config[config.task].queue_size = 24
  config.optim.lr, config.optim.min_lr, config.optim.warmup_lr = 1e-3, 1e-5, 0.0
  config.optim.decay_rate, config.optim.betas = 0.9, (0.9, 0.98)
  if config.task == "retrieval":
    config.evals.test.source = ""
  config.init.weights = ""
  config.data.train = ("scenes:train?num=64",)
  if config.data.rotate:
    config.data.rotate = ""
  config.data.num_workers = 0
  config.optim.warmup_steps = 1
  config.optim.steps_per_epoch = 1
  config.evals.every_steps = 0
  config.evals.batch_size = 16
  for split in run_config.splits(config).values():
    split.source = "scenes:val?num=24"
  return config


def make_quick(monkeypatch):
  """Two devices and two layers; `test_mesh.py` is about eight devices."""
  make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:2])
  monkeypatch.setattr(sharding, "make_mesh", make_mesh)
  tiny = config.VARIANTS["tiny"]
  shallow = {
    "vit": {**tiny["vit"], "depth": 1},
    "med": {**tiny["med"], "depth": 1},
  }
  monkeypatch.setitem(config.VARIANTS, "tiny", {**tiny, **shallow})


def write_pretrained(workdir):
  """Returns a workdir after two steps of the quick start."""
  config = shrunk_config("quickstart")
  config.evals.scenes_val.source = ""
  with pytest.MonkeyPatch.context() as monkeypatch:
    make_quick(monkeypatch)
    train.train(config, str(workdir))
  return workdir


def pair_batch(rows=4, **more):
  """A random batch of image-text pairs for the goldens' tiny models."""
  keys = jax.random.split(jax.random.key(1), 2)
  ids = jax.random.randint(keys[1], (rows, 6), 4, 400)
  return {
    "image": jax.random.normal(keys[0], (rows, 32, 32, 3)),
    "input_ids": ids,
    "attention_mask": jnp.ones_like(ids),
    **more,
  }
