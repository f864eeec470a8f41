"""A folder of goldens (inputs, weights and outputs of the original code), and
the record of what was compared with them.

Every array, fact and checkpoint of a case is taken as an input, compared, or in
the end reported as missing: nothing is passed over in silence.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from blip_jax.convert import opening, reader, weights
from blip_jax.data import tokenizer as tokenizer_lib
from tests.parity.verdicts import FAIL, MISSING, OK, Check, Error, difference

# A file beside the manifest, which for us is a case like all others.
BERT = "bert_tokenizer"
BERT_FILE = f"tokenizer/{BERT}.json"

# What tells of the original, and asks nothing of us.
_NOTES = re.compile(
  r"grad_f32_vs_f64|note_.*|.*\.same_in_float64|shared|"
  r"max_abs_diff_to_original|rows_equal_to_original\..*"
)


class Folder:
  """The goldens of one run of the original.

  Attributes:
    path: the folder.
    bert_vocabulary: a directory with BERT's own vocabulary, which is not here.
    cases: name -> its entry in the manifest.
    opened: files and folders that some case has used.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    bert_vocabulary: str | os.PathLike | None = None,
  ):
    """Reads the manifests.

    Raises:
      ValueError: there is none.
    """
    self.path = pathlib.Path(path)
    self.bert_vocabulary = bert_vocabulary
    file = self.path / "manifest.json"
    if not file.is_file():
      raise ValueError(
        f"{self.path} has no manifest.json: no folder of goldens"
      )
    manifest = json.loads(file.read_text())
    beside = self.path / "hf" / "hf_manifest.json"
    hf = manifest.get("hf")
    if hf is None and beside.is_file():
      hf = json.loads(beside.read_text())
    cases = [*manifest["cases"], *(hf or {"cases": []})["cases"]]
    if (self.path / BERT_FILE).is_file():
      cases.append({"name": BERT, "checkpoints": [BERT_FILE]})
    self.cases = {case["name"]: case for case in cases}
    self.opened: set[str] = set()

  @functools.cached_property
  def vocabulary(self) -> pathlib.Path:
    """The directory of the vocabulary that the models were made with."""
    (file,) = self.path.glob("tokenizer/*/vocab.txt")
    return file.parent

  @functools.cached_property
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    return tokenizer_lib.Tokenizer.load(self.vocabulary)

  def golden(self, name: str) -> "Golden":
    """A case with its arrays.

    Raises:
      KeyError: there is no such case.
      OSError: its arrays are not there.
    """
    case = self.cases[name]
    if "file" not in case:
      return Golden(self, case, {})
    self.opened.add(case["file"])
    with np.load(self.path / case["file"]) as data:
      return Golden(self, case, dict(data))

  def unopened(self) -> list[str]:
    """Weights and arrays here that no case has used."""
    files = [
      file.relative_to(self.path).as_posix()
      for pattern in ("ckpt/*", "data/*", "hf/*/golden.npz", "hf/*")
      for file in self.path.glob(pattern)
      if file.is_file() == (pattern != "hf/*")
    ]
    return sorted(set(files) - self.opened)


class Golden:
  """One case, and what has been done with it.

  Attributes:
    folder: where it is from.
    name, description, config, optimizer: of the manifest.
    checks: what was found so far.
  """

  def __init__(
    self,
    folder: Folder,
    case: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
  ):
    self.folder = folder
    self.name = case["name"]
    self.description = case.get("description", "")
    self.config = case.get("config", {})
    self.optimizer = case.get("optimizer", {})
    # Of Hugging Face's, the folder is the checkpoint.
    self.checkpoints = case.get("checkpoints") or [
      case[key] for key in ("folder",) if key in case
    ]
    self.checks: list[Check] = []
    self._arrays = arrays
    listed = {entry["name"]: entry for entry in case.get("arrays", [])}
    self._meanings = {name: entry["meaning"] for name, entry in listed.items()}
    # Hugging Face's cases have the bare values.
    self._facts = {
      name: fact["value"]
      if isinstance(fact, dict) and "value" in fact
      else fact
      for name, fact in case.get("facts", {}).items()
    }
    # In order, for the report.
    self._left = dict.fromkeys(
      [
        *self.checkpoints,
        *listed,
        *arrays,
        *(f"fact {n}" for n in self._facts if not _NOTES.fullmatch(n)),
      ]
    )

  def __contains__(self, name: str) -> bool:
    return name in self._arrays

  def matches(self, pattern: str) -> Iterator[re.Match]:
    """Names of arrays that a pattern describes from end to end."""
    compiled = re.compile(pattern)
    return filter(None, map(compiled.fullmatch, self._arrays))

  def shape(self, name: str) -> tuple[int, ...]:
    return self._arrays[name].shape

  def meaning(self, name: str) -> str:
    """What the manifest says of an array; "" if nothing."""
    return self._meanings.get(name, "")

  def input(self, name: str) -> np.ndarray:
    """An array that the original was given, and ours will be; integers as JAX
    has them.

    Raises:
      KeyError: the case has none.
    """
    self._left.pop(name, None)
    array = self._arrays[name]
    return array.astype(np.int32) if array.dtype == np.int64 else array

  def image(self, name: str) -> np.ndarray:
    """Pictures as ours takes them: NCHW to NHWC."""
    return self.input(name).transpose(0, 2, 3, 1)

  def fact(self, name: str, default: Any = None) -> Any:
    """A value that goes with the arrays.

    Raises:
      KeyError: the case has none, and no default was given.
    """
    self._left.pop(f"fact {name}", None)
    if default is not None:
      return self._facts.get(name, default)
    return self._facts[name]

  def take_facts(self, file: str, facts: Mapping[str, Any]) -> None:
    """Adds what a file of the folder says to the facts of the case."""
    del self._left[file]
    self._facts |= facts
    self._left |= dict.fromkeys(f"fact {name}" for name in facts)

  def tensors(self, checkpoint: str) -> reader.Tensors:
    """Weights of the folder as they were saved."""
    self._left.pop(checkpoint, None)
    self.folder.opened.add(checkpoint)
    return reader.read(self.folder.path / checkpoint)

  def leaves(self, checkpoint: str, prefix: str = "") -> weights.Leaves:
    """A part of a model, converted; `prefix` is what its names lack."""
    tensors = self.tensors(checkpoint)
    named = {prefix + name: tensors[name] for name in tensors}
    return weights.from_external(named, "original", weights.Report())

  def open(
    self, checkpoint: str, model_config: str | None = None, **kwargs
  ) -> opening.Checkpoint:
    """Opens weights of the folder as a user would, but without dropout.

    Args:
      checkpoint: a file or folder in it.
      model_config: a file in it; default: what the case says.
      **kwargs: of `opening.open_checkpoint`.
    """
    self._left.pop(checkpoint, None)
    self.folder.opened.add(checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
      file = None
      if model_config is not None:
        file = self.folder.path / model_config
      elif "vit" in self.config:
        file = pathlib.Path(temporary) / "config.json"
        file.write_text(json.dumps(self.config))
      opened = opening.open_checkpoint(
        self.folder.path / checkpoint,
        model_config=file,
        tokenizer=self.folder.vocabulary,
        **kwargs,
      )
    config = opened.card.config
    config = dataclasses.replace(
      config,
      vit=dataclasses.replace(config.vit, drop_path=0.0),
      med=dataclasses.replace(config.med, dropout=0.0),
    )
    card = dataclasses.replace(opened.card, config=config)
    return dataclasses.replace(opened, card=card)

  def tokens(
    self, name: str, texts: Sequence[str], max_length: int | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of texts: theirs, which ours are compared with, and where
    they were not kept ours, `max_length` long."""
    names = [f"{name}.{x}".lstrip(".") for x in ("input_ids", "attention_mask")]
    if names[0] in self:
      ids, mask = map(self.input, names)
      ours = self.folder.tokenizer.encode(texts, ids.shape[1])
      self.compare(dict(zip(names, ours, strict=True)), 0, names[0])
      return ids, mask
    if max_length is None:
      raise KeyError(f"{names[0]}, and nothing says how long texts are")
    return self.folder.tokenizer.encode(texts, max_length)

  def compare(
    self,
    ours: Mapping[str, Any],
    tolerance: float,
    quantity: str | None = None,
    scale: Callable[[np.ndarray], Any] | float | None = None,
  ) -> None:
    """Compares arrays with the case's own of these names, where it has them.

    Args:
      ours: name -> array.
      tolerance: of the largest difference, relative to the scale.
      quantity: makes one line of all of them, by the worst.
      scale: of an array, from its values or itself; default: the largest
        magnitude in it.
    """
    errors = {
      name: difference(x, self.input(name), scale)
      for name, x in ours.items()
      if name in self
    }
    if quantity is not None:
      self.judge(quantity, errors, tolerance)
    else:
      for name, error in errors.items():
        self.judge(name, {name: error}, tolerance)

  def compare_fingerprints(
    self,
    prefix: str,
    names: Iterable[str | None],
    ours: Mapping[str, np.ndarray],
    tolerance: float,
    scale: Callable[[np.ndarray], float],
    label: str = "",
  ) -> None:
    """Compares norms and fingerprints of arrays that were too many to keep.

    Args:
      prefix: of the two arrays that hold them.
      names: of theirs that `ours` should have; None leaves one out.
      ours: name -> array.
      tolerance: relative to the scale.
      scale: of an array of ours.
      label: is added to the quantity.
    """
    for kind, function in (("norm", np.linalg.norm), ("probe", probe)):
      array = f"{prefix}_{kind}"
      if array not in self:
        continue
      errors = {}
      for name, value in zip(names, self.input(array), strict=True):
        if name and name not in ours:
          errors[name] = Error(np.inf, np.inf, "we have none")
        elif name:
          x = np.asarray(ours[name], np.float64).ravel()
          # They are kept in float32, so no closer than their own size tells.
          unit = max(scale(x), abs(float(value)))
          absolute = abs(float(function(x)) - float(value))
          errors[name] = Error(absolute, absolute / unit)
      self.judge(array + label, errors, tolerance)

  def compare_fact(self, name: str, ours: Any) -> None:
    """Insists on a fact, word by word; of names, the order does not matter."""
    if name not in self._facts:
      return
    theirs = self.fact(name)
    if isinstance(theirs, list) and isinstance(ours, (set, frozenset)):
      theirs = set(map(_hashable, theirs))
      wrong = sorted(map(str, theirs ^ set(ours)))
    elif isinstance(theirs, list):
      pairs = zip(theirs, ours, strict=True)
      wrong = [f"{x} for {y}" for x, y in pairs if x != y]
    else:
      wrong = [] if theirs == ours else [f"{ours} for {theirs}"]
    error = Error(len(wrong), len(wrong), weights.first_few(wrong))
    self.judge(f"fact {name}", {"": error}, 0)

  def judge(
    self, quantity: str, errors: Mapping[str, Error], tolerance: float
  ) -> None:
    """Adds a line for the worst of some errors; none if there are none."""
    if not errors:
      return
    # Which takes NaN for the largest.
    worst = np.argmax([error.relative for error in errors.values()])
    name, error = list(errors.items())[worst]
    # Not `>`: NaN is no agreement.
    verdict = OK if error.relative <= tolerance else FAIL
    which = "" if name == quantity or not error.absolute else name
    note = ": ".join(filter(None, (which, error.note)))
    numbers = float(error.absolute), float(error.relative), float(tolerance)
    self.checks.append(Check(self.name, quantity, verdict, *numbers, note))

  def fail(self, why: str) -> None:
    self.checks.append(Check(self.name, "case", FAIL, note=why))

  def missing(self) -> list[Check]:
    """What nobody has looked at."""
    return [
      Check(self.name, name, MISSING, note=self.meaning(name))
      for name in self._left
    ]


def probe(x: np.ndarray) -> float:
  """The fingerprint of an array in the goldens: a transpose changes it."""
  x = np.asarray(x, np.float64).ravel()
  return float(x @ np.cos(0.37 * np.arange(x.size) + 0.1))


def _hashable(value: Any) -> Any:
  return frozenset(value) if isinstance(value, list) else value
