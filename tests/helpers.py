"""What several test files need: golden arrays, toy runs, tiny models."""

import dataclasses
import functools
import json
import os
import pathlib
import types

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from PIL import Image

from blip_jax.convert import opening, reader, tensor_files, weights, write
from blip_jax.data import scenes, tokenizer, transforms
from blip_jax.inference import model as model_lib
from blip_jax.models import card, config, families
from blip_jax.runtime import (
  checkpoint,
  saved_arrays,
  sharding,
  snapshot,
  start,
  train_state,
)
from blip_jax.tasks import losses

GOLDEN = pathlib.Path(__file__).parent / "golden"


def decode(image, max_pixels):
  """An image as RGB, uint8 [H, W, 3]; see `transforms.decoded`."""
  with transforms.decoded(image, max_pixels) as pixels:
    return pixels


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


# With image tokens as wide as texts.
ONE_WIDTH = dataclasses.replace(
  BLIP, vit=dataclasses.replace(VIT, width=64, mlp_dim=256)
)


def arrays(case: str) -> dict[str, jax.Array | np.ndarray]:
  """float64 references stay numpy, for JAX would round them."""
  with np.load(GOLDEN / "data" / f"{case}.npz") as data:
    # `jnp.asarray` would compile a program for each shape.
    return {
      name: x if x.dtype == np.float64 else jax.device_put(x)
      for name, x in data.items()
    }


def state_dict(name: str, prefix: str = "") -> dict[str, np.ndarray]:
  tensors = reader.read(GOLDEN / "ckpt" / f"{name}.pth")
  return {prefix + key: array for key, array in tensors.items()}


def unflatten(flat: dict[str, np.ndarray]) -> dict:
  return flax.traverse_util.unflatten_dict(jax.device_put(flat), sep="/")


def flatten(params: dict) -> dict[str, np.ndarray]:
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return {path: np.asarray(x) for path, x in flat.items()}


def leaves(state: dict[str, np.ndarray], layout: str = "original") -> dict:
  return weights.from_external(state, layout, weights.Report())


def params(name: str, prefix: str = "") -> dict:
  """Our parameter tree of a golden checkpoint; tied weights appear twice."""
  return item(leaves(state_dict(name, prefix)), "params")


def momentum_params(name: str) -> dict:
  """The parameters of a golden checkpoint's momentum encoders."""
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
  return jax.device_put(np.asarray(array).transpose(0, 2, 3, 1))


# Initial parameters of (family, sizes, key), by one program.
init = jax.jit(families.init, static_argnums=(0, 1))


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
    states = state["processes"]
    assert all(each["parts"] == [{"seen": 3}] for each in states)
    self.states = states
    self.state = states[jax.process_index() % len(states)]


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
    config = types.SimpleNamespace(
      job="train", init=types.SimpleNamespace(**{**unset, **init})
    )
    return start.initialise(
      start.origin(config, workdir),
      config.init,
      lambda path: saved_arrays.Arrays(snapshot.find(path)),
      self.abstract,
      self.make,
      loader or StubLoader(),
    )

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


def norm(tree):
  """The norm of all numbers of a tree, without programs for its shapes."""
  return np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(tree)])


@functools.lru_cache
def scenes_tokenizer():
  return tokenizer.Tokenizer.load(scenes.vocab_dir())


def sharper(params, factor):
  """Parameters with larger matrices, so that what a model says differs."""

  def scale(path, x):
    names = [key.key for key in path]
    is_matrix = names[-1] == "kernel" and "patch_embed" not in names
    is_table = names[-1] in ("word_embeddings", "position_embeddings")
    return factor * np.asarray(x) if is_matrix or is_table else x

  return jax.device_put(jax.tree_util.tree_map_with_path(scale, params))


def make_model(family="caption", mesh=None, **fields):
  sizes = config.variant(
    "tiny",
    image_size=16,
    vocab_size=scenes_tokenizer().vocab_size,
    tokens=config.SpecialTokens(**scenes_tokenizer().special_ids),
    vit=dict(depth=1),
    med=dict(depth=fields.get("text_depth", 1)),
    dtype=fields.get("dtype", "float32"),
  )
  params = families.init(family, sizes, jax.random.key(0))
  params = sharper(params, 5)
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
  return write_golden("blip_decoder", target)


def write_golden(name, target):
  """A converted checkpoint, as a user would have one."""
  return str(write.write(open_golden(name), target, "orbax"))


def write_images(folder):
  """Seven files, of which one is not an image and one is in a subfolder."""
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


def write_gallery(folder):
  """Nine images and a broken one."""
  folder.mkdir()
  rows = scenes.Scenes("val")
  for number in range(9):
    Image.fromarray(rows[number]["image"]).save(folder / f"{number}.png")
  (folder / "broken.png").write_text("nothing")
  return folder


def pair_batch(rows=4, **more):
  """A random batch of image-text pairs for the goldens' tiny models."""
  rng = np.random.default_rng(1)
  pairs = {
    "image": rng.standard_normal((rows, 32, 32, 3), dtype=np.float32),
    "input_ids": rng.integers(4, 400, (rows, 6), dtype=np.int32),
    "attention_mask": np.ones((rows, 6), np.int32),
    **more,
  }
  return jax.device_put(pairs)


# Names that are no UTF-8 text (latin-1, Shift-JIS), not one line, or as long
# as a file system allows, each without its ending of four bytes.
HARD_NAMES = tuple(
  map(os.fsdecode, (b"caf\xe9", b"\x94L", b"a\nb\x1b", b"n" * 251, rb"a\xe9"))
)


def write_hard_names(folder):
  """PNG files with `HARD_NAMES`, and a text file next to each."""
  folder.mkdir()
  for n, name in enumerate(HARD_NAMES):
    pixels = np.full((8, 8, 3), 40 * n, np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"a grey square {n}")
  return folder


def write_pairs(folder):
  """What the commands of recipes name: lists, and folders with captions."""
  rows = scenes.Scenes("val")
  for name in ("images", "FOLDER", "ANOTHER_FOLDER"):
    (folder / name).mkdir()
  pairs = []
  for number in range(16):
    record = rows[number]
    for name in ("images", "FOLDER", "ANOTHER_FOLDER"):
      image = folder / name / f"{number}.png"
      Image.fromarray(record["image"]).save(image)
      image.with_suffix(".txt").write_text(record["caption"])
    pairs.append({"image": f"{number}.png", "caption": record["caption"]})
  for name in ("train.json", "val.json"):
    (folder / name).write_text(json.dumps(pairs))
  write_questions(folder, 16)
  write_statements(folder, 16)
  write_dialogs(folder, 16)


def write_questions(folder, num_images):
  """Questions about `images/0.png` and so on, and a list of answers."""
  asked = scenes.Scenes("val", with_captions=False, with_questions=True)
  lines = ["image,question,answer,question_id"]
  annotations = []
  for number in range(num_images):
    record = asked[number]
    (answer,) = record["answers"]
    lines.append(f"{number}.png,{record['question']},{answer},{number}")
    answers = [{"answer": answer, "answer_id": n} for n in range(10)]
    annotations.append({"question_id": number, "answers": answers})
  for name in ("train.csv", "val.csv", "questions.csv"):
    (folder / name).write_text("\n".join(lines) + "\n")
  (folder / "annotations.json").write_text(json.dumps(annotations))
  (folder / "answers.txt").write_text("\n".join(scenes.ANSWERS) + "\n")


@functools.partial(jax.jit, static_argnames="label_smoothing")
def lm_loss_per_text(logits, labels, label_smoothing):
  """Label-smoothed cross-entropy, summed over the tokens of each text."""
  labels = labels[:, 1:]
  nll, uniform = losses.token_losses(logits[:, :-1], labels)
  smoothed = (1 - label_smoothing) * nll + label_smoothing * uniform
  return (smoothed * (labels != losses.IGNORE)).sum(axis=-1)


def write_videos(folder):
  """Two videos of scenes, and questions about them."""
  (folder / "videos").mkdir()
  rows = scenes.Scenes("val")
  for number in range(2):
    frames = [rows[20 * number + n]["image"] for n in range(17)]
    write_video(folder / f"videos/{number}.mp4", np.stack(frames))
  lines = ["video,question,answer", "0.mp4,what is red?,circle"]
  lines += ["1.mp4,how many circles are there?,two", "0.mp4,is it red?,yes"]
  (folder / "videos.csv").write_text("\n".join(lines) + "\n")


def write_statements(folder, num_images):
  """Statements about pairs of `images/0.png` and so on."""
  lines = ["image_0,image_1,sentence,label"]
  for number in range(num_images):
    pair = f"{number}.png,{(number + 1) % num_images}.png"
    lines.append(f"{pair},there is a red shape in each image,{number % 2 == 0}")
  for name in ("statements.csv", "val_statements.csv"):
    (folder / name).write_text("\n".join(lines) + "\n")


def write_dialogs(folder, num_images):
  """Dialogs about `images/0.png` and so on."""
  lines = [
    {
      "image": f"{number}.png",
      "image_id": number,
      "caption": "a picture of a red shape",
      "dialog": [
        {"question": "is it a heart?", "answer": "no"},
        {
          "question": "where is it?",
          "answer": ("left", "right")[number % 2],
          "answer_options": ["left", "right", "top", "bottom"],
        },
      ],
    }
    for number in range(num_images)
  ]
  text = "".join(f"{json.dumps(line)}\n" for line in lines)
  for name in ("dialogs.jsonl", "val_dialogs.jsonl"):
    (folder / name).write_text(text)
