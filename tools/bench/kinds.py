"""What can be measured: a row of the results for each kind and size."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from blip_jax.models import float8, flops

from . import contest, measure, plain, programs
from .programs import Setup

COMPARISONS = ("hf", "plain")
# What can be measured in float8, and is then compared with bfloat16.
IN_FLOAT8 = ("encode", "caption", "filter", "rerank", "answer", "rank")
# Names of the columns of peers.
HF, HF_FUSED, PLAIN = "transformers", "transformers with SDPA", "plain"


@dataclasses.dataclass(frozen=True)
class Options:
  """What the user asks for; see the command line.

  Attributes:
    compare: some of COMPARISONS.
    batch_sizes: to try; none: those of the kind.
    repeats: calls of each program.
    dtype: as `blip_jax.load` takes it; empty: the fastest that devices of all
      ages have, bfloat16, and on a CPU float32.
  """

  compare: Sequence[str] = ()
  batch_sizes: Sequence[int] = ()
  repeats: int = 5
  dtype: str = ""


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of rows.

  Attributes:
    what: it measures, for the table.
    measure: (setup, batch sizes, options) -> the fields of a row.
    image_size: side of the images in pixels.
    on_cpu: batch sizes to try there.
    on_accelerator: batch sizes to try there.
    tiny_image_size: side of the images of the size tiny.
  """

  what: str
  measure: Callable[[Setup, list[int], Options], dict[str, Any]]
  image_size: int = 384
  on_cpu: Sequence[int] = (1, 4)
  on_accelerator: Sequence[int] = (64, 256)
  tiny_image_size: int = 64


def measure_row(kind: str, size: str, options: Options) -> dict[str, Any]:
  """A row of the results; what goes wrong is its `error`.

  Args:
    kind: a name of KINDS.
    size: a name of `model_config.VARIANTS`.
    options: see `Options`.
  """
  entry = KINDS[kind]
  on_cpu = jax.default_backend() == "cpu"
  tiny = size == "tiny"
  setup = Setup(
    size,
    entry.tiny_image_size if tiny else entry.image_size,
    options.dtype or ("float32" if on_cpu else "bfloat16"),
  )
  row = {"kind": kind, "what": entry.what, **dataclasses.asdict(setup)}
  row["device"] = measure.device_kind()
  batch_sizes = entry.on_cpu if on_cpu else entry.on_accelerator
  try:
    if setup.dtype == float8.NAME:
      float8.check_device(jax.devices()[0])
    row["peaks"] = measure.peaks(setup.dtype)
    row["datasheet"] = measure.datasheet(row["device"], setup.dtype)
    row |= entry.measure(
      setup, sorted(options.batch_sizes or batch_sizes), options
    )
    _add_utilisation(row)
  except Exception as error:
    row["error"] = contest.describe(error)
  return row | {"versions": measure.versions()}


def _add_utilisation(row: dict[str, Any]) -> None:
  """Model FLOPs utilisation: on the reference count, of both peaks."""
  native = row["native"]
  if "gflop" not in row:
    return
  tflops = native["per_second"] * row["gflop"] / 1e3
  native["tflops"] = tflops
  native["mfu"] = tflops / row["peaks"]["tflops"]
  if row["datasheet"]:
    native["mfu_of_datasheet"] = tflops / row["datasheet"]["tflops"]


def _of_models(
  name: str,
  gflop: Callable[[Setup], int],
  peers: Sequence[str],
  setup: Setup,
  batch_sizes: list[int],
  options: Options,
) -> dict[str, Any]:
  """The row of a function of `programs`, with functions of the same name as
  peers."""
  native = getattr(programs, name)
  makes, compared = _peers(name, peers, options.compare), None
  if setup.dtype == float8.NAME:
    makes[contest.UNROUNDED] = functools.partial(_unrounded, native)
  if name == "pretrain":
    compared = {
      "native": programs.pretrain_losses,
      PLAIN: plain.pretrain_losses,
    }
  program, numbers, results = contest.run(
    native, makes, setup, batch_sizes, options.repeats, compared
  )
  of_item = gflop(setup)
  of_call = of_item * program.items
  return {
    "unit": "pairs" if name == "rerank" else "images",
    "gflop": of_item / 1e9,
    "native": numbers
    | measure.memory(program)
    | {"intensity": measure.intensity(program, of_call)},
    "peers": results,
  }


def _peers(
  name: str, there: Sequence[str], compare: Sequence[str]
) -> dict[str, contest.Make | str]:
  makes: dict[str, contest.Make | str] = {}
  if "hf" in compare:
    for column, fused in ((HF, False), (HF_FUSED, True)):
      makes[column] = "has no such program"
      if "hf" in there:
        makes[column] = functools.partial(_hugging_face, name, fused)
  if "plain" in compare:
    makes[PLAIN] = "the same program"
    if "plain" in there:
      makes[PLAIN] = getattr(plain, name)
  return makes


def _unrounded(
  native: contest.Make, setup: Setup, batch_size: int
) -> measure.Program:
  return native(dataclasses.replace(setup, dtype=contest.UNROUNDED), batch_size)


def _hugging_face(
  name: str, fused: bool, setup: Setup, batch_size: int
) -> measure.Program:
  # Imported here because it needs torch and transformers.
  for package in ("torch", "transformers"):
    importlib.import_module(package)
  from . import hugging_face

  return getattr(hugging_face, name)(setup, batch_size, fused)


def _samples(
  setup: Setup, batch_sizes: list[int], options: Options
) -> dict[str, Any]:
  """Ten samples of an image, in turns with one; it must be among the ten."""
  (batch_size, *_), number = batch_sizes, programs.NUM_SAMPLES
  with measure.compiling() as stages:
    ten = programs.sample(setup, batch_size, number)
    found = ten.run()
  one = programs.sample(setup, batch_size, 1)
  seconds = measure.in_turns({"ten": ten, "one": one}, options.repeats)
  numbers = measure.summary(ten, seconds["ten"])
  single = measure.summary(one, seconds["one"])
  is_among = (found == one.run()).all(axis=-1).any(axis=-1)
  differ = float(1 - is_among.mean())
  # Products of other shapes are rounded otherwise, and a sample may change.
  if differ > (0 if setup.dtype == "float32" else 0.5):
    single["note"] = f"{differ:.0%} of the images have another first sample"
  else:
    single["cost"] = numbers["ms"] / single["ms"]
  gflop = flops.captioning(setup.config, programs.LENGTH, number)
  return {
    "unit": "images",
    "gflop": gflop / 1e9,
    "native": numbers
    | {f"{name}_seconds": each for name, each in stages.items()}
    | measure.memory(ten)
    | {"intensity": measure.intensity(ten, gflop * batch_size)},
    "peers": {"one sample": single},
  }


def _job(name: str, *args: Any) -> dict[str, Any]:
  # Imported here because it needs grain.
  from . import jobs

  return getattr(jobs, name)(*args)


def _models(name: str, gflop: Callable, peers: Sequence[str]) -> Callable:
  return functools.partial(_of_models, name, gflop, peers)


KINDS = {
  "pretrain": Kind(
    "pre-training step",
    _models(
      "pretrain",
      lambda s: flops.pretraining(
        s.config, programs.CAPTION_LENGTH, programs.QUEUE_SIZE
      ),
      ["plain"],
    ),
    image_size=224,
    on_cpu=(4,),
    on_accelerator=(128,),
  ),
  "encode": Kind(
    "encoding",
    _models("encode", lambda s: flops.image(s.config.vit), ["hf"]),
  ),
  "caption": Kind(
    f"captioning, beam {programs.NUM_BEAMS}, {programs.LENGTH} tokens",
    _models(
      "caption",
      lambda s: flops.captioning(s.config, programs.LENGTH, programs.NUM_BEAMS),
      ["hf", "plain"],
    ),
  ),
  "samples": Kind(
    f"{programs.NUM_SAMPLES} samples of {programs.LENGTH} tokens",
    _samples,
    on_cpu=(1,),
    on_accelerator=(64,),
  ),
  "filter": Kind(
    f"filter, {programs.TEXTS_PER_IMAGE} texts an image",
    _models(
      "filter",
      lambda s: flops.filtering(
        s.config, programs.TEXT_LENGTH, programs.TEXTS_PER_IMAGE
      ),
      ["hf", "plain"],
    ),
  ),
  "rerank": Kind(
    f"re-ranking, {programs.CANDIDATES} texts an image",
    _models(
      "rerank",
      lambda s: flops.ranking(
        s.config, programs.TEXT_LENGTH, programs.CANDIDATES
      ),
      ["plain"],
    ),
    on_cpu=(1,),
    on_accelerator=(8,),
  ),
  "answer": Kind(
    f"answering, beam {programs.NUM_BEAMS}, {programs.ANSWER_LENGTH} tokens",
    _models(
      "answer",
      lambda s: flops.answering(
        s.config,
        programs.QUESTION_LENGTH,
        programs.ANSWER_LENGTH,
        programs.NUM_BEAMS,
      ),
      ["hf"],
    ),
    image_size=480,
  ),
  "rank": Kind(
    f"answering from a list of {programs.NUM_ANSWERS:,}",
    _models(
      "rank",
      # The mean length of answers, to the nearest number.
      lambda s: flops.answering(
        s.config,
        programs.QUESTION_LENGTH,
        round(programs.answer_list()[1].mean()),
        programs.SHORT_LIST,
      ),
      ["plain"],
    ),
    image_size=480,
  ),
  "loader": Kind(
    "reading: decoding and resizing",
    functools.partial(_job, "loader"),
    on_cpu=(8,),
    on_accelerator=(64,),
  ),
  "capfilt": Kind(
    "CapFilt job",
    functools.partial(_job, "capfilt"),
    on_cpu=(4,),
    on_accelerator=(64,),
  ),
}
