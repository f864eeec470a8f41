"""Cases without weights: schedules, tokenizers, image transforms."""

import collections
import json
import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from blip_jax.data import randaugment, tokenizer, transforms
from blip_jax.models import config as model_config
from blip_jax.runtime import optim
from blip_jax.tasks import base
from tests import helpers
from tests.parity import replay, verdicts
from tests.parity.goldens import Golden


def lr_schedules(golden: Golden) -> None:
  """The settings are in the manifest's descriptions of the arrays."""
  formulas = {
    "cosine__f64": lambda x, max_epoch, init_lr, min_lr: optim.cosine_lr(
      x, lr=init_lr, min_lr=min_lr, epochs=max_epoch
    ),
    "warmup__f64": lambda x, max_step, init_lr, max_lr: optim.warmup_lr(
      x, lr=max_lr, warmup_lr=init_lr, warmup_steps=max_step
    ),
    "step__f64": lambda x, init_lr, min_lr, decay_rate: optim.step_lr(
      x, lr=init_lr, min_lr=min_lr, decay_rate=decay_rate
    ),
  }
  for name, formula in formulas.items():
    words = golden.meaning(name)
    if points := re.search(r"(?:epoch=|step in )([\d.,]*\d)", words):
      pairs = re.findall(r"(\w+_\w+)=([\d.e-]+)", words)
      # Epochs and steps are integers, rates are not.
      settings = {
        key: int(value) if key in ("max_epoch", "max_step") else float(value)
        for key, value in pairs
      }
      actual = [formula(x, **settings) for x in _points(points[1])]
      golden.compare({name: np.array(actual)}, replay.FLOAT64)


def _points(text: str) -> Sequence[int]:
  """Parses "0..6", "0,5,..65" and "0,1,100"."""
  if match := re.fullmatch(r"(\d+)(?:,(\d+),)?\.\.(\d+)", text):
    first, last = int(match[1]), int(match[3])
    return range(first, last + 1, int(match[2] or first + 1) - first)
  return [int(x) for x in text.split(",")]


def tokenizer_tiny(golden: Golden) -> None:
  tiny = golden.folder.tokenizer
  for match in golden.matches(r"ids_(\d+)"):
    ids, mask = tiny.encode(golden.fact("captions"), int(match[1]))
    golden.compare({match[0]: ids, f"mask_{match[1]}": mask}, replay.EXACT)
  _compare_special_ids(golden, "special_ids", tiny)


def _compare_special_ids(
  golden: Golden, fact: str, texts: tokenizer.Tokenizer
) -> None:
  # The tokenizer has no names for [UNK] and [MASK].
  others = {key: golden.fact(fact)[key] for key in ("unk", "mask")}
  actual = {**others, **texts.special_ids, "length": texts.vocab_size}
  golden.compare_fact(fact, actual)


def bert_tokenizer(golden: Golden) -> None:
  if golden.folder.bert_vocabulary is None:
    return
  bert = tokenizer.Tokenizer.load(golden.folder.bert_vocabulary)
  (file,) = golden.checkpoints
  saved = json.loads((golden.folder.path / file).read_text())
  rows = saved["captions"]
  columns = {key: [row[key] for row in rows] for key in rows[0]}
  others = {key: saved[key] for key in ("prompt", "batch_longest")}
  special = {"special": saved["meta"]["special"]}
  golden.take_facts(file, {**columns, **others, **special})

  _compare_special_ids(golden, "special", bert)
  raw, texts = golden.fact("caption"), golden.fact("pre_caption")
  for name, function in {
    "pre_caption": lambda text: transforms.pre_caption(text, 50),
    "pre_caption_30": lambda text: transforms.pre_caption(text, 30),
    "pre_question": transforms.pre_question,
  }.items():
    golden.compare_fact(name, list(map(function, raw)))
  words = bert.files()["vocab.txt"].splitlines()
  all_ids = _full_ids(bert, texts)
  golden.compare_fact("ids", all_ids)
  golden.compare_fact("raw_ids", _full_ids(bert, raw))
  golden.compare_fact(
    "tokens", [[words[i] for i in ids[1:-1]] for ids in all_ids]
  )
  for key in columns:
    if match := re.fullmatch(r"(ids|mask|ids_enc|ids_dec)_(\d+)", key):
      ids, mask = bert.encode(texts, int(match[2]))
      if match[1] in ("ids_enc", "ids_dec"):
        ids[:, 0] = {"e": bert.enc_id, "d": bert.dec_id}[match[1][4]]
      actual = mask if match[1] == "mask" else ids
      golden.compare_fact(key, actual.tolist())
      if match[1] == "ids_dec":
        golden.compare_fact("decoded", bert.decode(ids))
  batch, prompt = golden.fact("batch_longest"), golden.fact("prompt")
  ids, mask = bert.encode(batch["texts"], len(batch["ids"][0]))
  actual = {**batch, "ids": ids.tolist(), "mask": mask.tolist()}
  golden.compare_fact("batch_longest", actual)
  (ids,) = _full_ids(bert, [prompt["text"]])
  actual = {**prompt, "ids": ids, "prompt_length": len(ids) - 1}
  golden.compare_fact("prompt", actual)


def _full_ids(bert: tokenizer.Tokenizer, texts: list[str]) -> list[list[int]]:
  ids, mask = bert.encode(texts, 512)
  return [row[:n].tolist() for row, n in zip(ids, mask.sum(1), strict=True)]


def image_preprocess(golden: Golden) -> None:
  read = lambda file: helpers.decode(
    golden.folder.path / "images" / file, max_pixels=10**8
  )
  statistics = {"mean": model_config.IMAGE_MEAN, "std": model_config.IMAGE_STD}
  errors = {
    key: verdicts.difference(actual, golden.config[key])
    for key, actual in statistics.items()
  }
  golden.add_check("mean and std", errors, replay.EXACT)
  resized, pixels, crops = {}, {}, {}
  for file in golden.fact("files"):
    for size in golden.config["sizes"]:
      key = f"{file.rpartition('.')[0]}.S{size}"
      image = transforms.EvalImage(size)(read(file))
      resized[f"{key}.uint8"] = image
      pixels[key] = base.normalise(jnp.asarray(image)[None])[0].transpose(
        2, 0, 1
      )
  pattern = (
    r"train crop of (\S+): resized_crop\(top=(\d+),left=(\d+),height=(\d+),"
    r"width=(\d+)\) to (\d+)x\d+ bicubic, hflip=(True|False)"
  )
  for match in golden.matches(r"crop\d+"):
    if words := re.search(pattern, golden.meaning(match[0])):
      file, *numbers, flip = words.groups()
      numbers = map(int, numbers)
      crop = transforms.resized_crop(read(file), *numbers, flip == "True")
      crops[match[0]] = crop
  golden.compare(resized, replay.EXACT, "*.uint8")
  golden.compare(pixels, replay.ROUNDING, "*")
  golden.compare(crops, replay.EXACT, "crop*")


def randaugment_ops(golden: Golden) -> None:
  ops, image = randaugment.OPS, golden.input("image")
  flat, flats, pipelines = golden.input("flat"), {}, {}
  outputs = collections.defaultdict(dict)
  errors = {}
  for entry in golden.fact("ops"):
    op = ops[entry["op"]]
    outputs[entry["op"]][entry["key"]] = op.apply(image, *entry["args"])
    strength, expected = op.strength(entry["level"]), np.abs(entry["args"])
    errors[entry["key"]] = verdicts.difference(strength, expected)
  for name, actual in outputs.items():
    golden.compare(actual, replay.EXACT, name)
  golden.add_check("strengths", errors, replay.EXACT)
  for match in golden.matches(r"flat\.(\w+)"):
    if level := re.search(r"level (\d+)", golden.meaning(match[0])):
      op = ops[match[1]]
      flats[match[0]] = op.apply(flat, *op.strength(int(level[1])))
  golden.compare(flats, replay.EXACT, "flat.*")
  for i, case in enumerate(golden.fact("pipeline")):
    out = image
    for name, *strength in case["applied"]:
      out = ops[name].apply(out, *strength)
    pipelines[f"pipeline{i}"] = out
  golden.compare(pipelines, replay.EXACT, "pipeline*")
