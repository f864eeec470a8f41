"""A folder of goldens (inputs, weights and outputs of the original code), and
the record of what was compared with them.

Every array, fact and checkpoint of a case is used as an input, compared, or
reported as missing at the end: nothing is skipped silently.
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

# A file that the manifest does not list; here it is a case like the others.
BERT = "bert_tokenizer"
BERT_FILE = f"tokenizer/{BERT}.json"

# Facts about the original code, which nothing can be compared with.
_NOTES = re.compile(
  r"grad_f32_vs_f64|note_.*|.*\.same_in_float64|shared|"
  r"max_abs_diff_to_original|rows_equal_to_original\..*"
)


class Folder:
  """The goldens of one run of the original.

  Attributes:
    path: the folder.
    bert_vocabulary: a directory with the vocabulary of bert-base-uncased, which
      the folder does not contain; None skips the cases that need it.
    cases: name -> its entry in the manifest.
    opened: files and folders that a case has used.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    bert_vocabulary: str | os.PathLike | None = None,
  ):
    """Reads the manifests.

    Raises:
      ValueError: the folder has no manifest.json.
    """
    self.path = pathlib.Path(path)
    self.bert_vocabulary = bert_vocabulary
    file = self.path / "manifest.json"
    if not file.is_file():
      raise ValueError(
        f"{self.path} has no manifest.json, so it is not a folder of goldens"
      )
    manifest = json.loads(file.read_text())
    hf_file = self.path / "hf" / "hf_manifest.json"
    hf = manifest.get("hf")
    if hf is None and hf_file.is_file():
      hf = json.loads(hf_file.read_text())
    cases = [*manifest["cases"], *(hf or {"cases": []})["cases"]]
    if (self.path / BERT_FILE).is_file():
      cases.append({"name": BERT, "checkpoints": [BERT_FILE]})
    self.cases = {case["name"]: case for case in cases}
    self.opened: set[str] = set()

  @functools.cached_property
  def vocabulary(self) -> pathlib.Path:
    """The directory with the vocabulary of the tiny models."""
    (file,) = self.path.glob("tokenizer/*/vocab.txt")
    return file.parent

  @functools.cached_property
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    return tokenizer_lib.Tokenizer.load(self.vocabulary)

  def golden(self, name: str) -> "Golden":
    """Reads a case with its arrays.

    Raises:
      KeyError: the manifest has no such case.
      OSError: the file of its arrays cannot be read.
    """
    case = self.cases[name]
    if "file" not in case:
      return Golden(self, case, {})
    self.opened.add(case["file"])
    with np.load(self.path / case["file"]) as data:
      return Golden(self, case, dict(data))

  def unopened(self) -> list[str]:
    """Files with weights or arrays that no case has used."""
    files = [
      file.relative_to(self.path).as_posix()
      for pattern in ("ckpt/*", "data/*", "hf/*/golden.npz", "hf/*")
      for file in self.path.glob(pattern)
      if file.is_file() == (pattern != "hf/*")
    ]
    return sorted(set(files) - self.opened)


class Golden:
  """One case, and the results of its comparisons.

  Attributes:
    folder: the goldens that it belongs to.
    name, description, config, optimizer: from the manifest.
    checks: the results so far.
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
    # In Hugging Face cases the folder is the checkpoint.
    self.checkpoints = case.get("checkpoints") or [
      case[key] for key in ("folder",) if key in case
    ]
    self.checks: list[Check] = []
    self._arrays = arrays
    listed = {entry["name"]: entry for entry in case.get("arrays", [])}
    self._meanings = {name: entry["meaning"] for name, entry in listed.items()}
    # Hugging Face cases list the values directly.
    self._facts = {
      name: fact["value"]
      if isinstance(fact, dict) and "value" in fact
      else fact
      for name, fact in case.get("facts", {}).items()
    }
    # Not used so far, in the order of the report.
    self._unused = dict.fromkeys(
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
    """Matches of a pattern with the full names of arrays."""
    compiled = re.compile(pattern)
    return filter(None, map(compiled.fullmatch, self._arrays))

  def shape(self, name: str) -> tuple[int, ...]:
    return self._arrays[name].shape

  def meaning(self, name: str) -> str:
    """The manifest's description of an array; "" if it has none."""
    return self._meanings.get(name, "")

  def input(self, name: str) -> np.ndarray:
    """An array, marked as used; int64 becomes int32, as in JAX.

    Raises:
      KeyError: the case has no such array.
    """
    self._unused.pop(name, None)
    array = self._arrays[name]
    return array.astype(np.int32) if array.dtype == np.int64 else array

  def image(self, name: str) -> np.ndarray:
    """Images, from NCHW to NHWC."""
    return self.input(name).transpose(0, 2, 3, 1)

  def fact(self, name: str, default: Any = None) -> Any:
    """A value of the manifest that goes with the arrays, marked as used.

    Raises:
      KeyError: the case has no such fact, and there is no default.
    """
    self._unused.pop(f"fact {name}", None)
    if default is not None:
      return self._facts.get(name, default)
    return self._facts[name]

  def take_facts(self, file: str, facts: Mapping[str, Any]) -> None:
    """Adds the content of a file in the folder to the facts of the case."""
    del self._unused[file]
    self._facts |= facts
    self._unused |= dict.fromkeys(f"fact {name}" for name in facts)

  def tensors(self, checkpoint: str) -> reader.Tensors:
    """The tensors of a checkpoint in the folder, as they were saved."""
    self._unused.pop(checkpoint, None)
    self.folder.opened.add(checkpoint)
    return reader.read(self.folder.path / checkpoint)

  def leaves(self, checkpoint: str, prefix: str = "") -> weights.Leaves:
    """Converts a part of a model; `prefix` is put before its names."""
    tensors = self.tensors(checkpoint)
    named = {prefix + name: tensors[name] for name in tensors}
    return weights.from_external(named, "original", weights.Report())

  def open(
    self, checkpoint: str, model_config: str | None = None, **kwargs
  ) -> opening.Checkpoint:
    """Opens a checkpoint of the folder as a user would, but without dropout.

    Args:
      checkpoint: a file or folder in the folder of goldens.
      model_config: a file in the folder; default: the config of the case.
      **kwargs: passed to `opening.open_checkpoint`.
    """
    self._unused.pop(checkpoint, None)
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
    """Ids and mask [B, L] of texts.

    Where the case has them, the tokenizer's are compared with them. Otherwise
    the tokenizer's are returned, padded to `max_length`.

    Raises:
      KeyError: the case has no ids, and `max_length` is None.
    """
    names = [f"{name}.{x}".lstrip(".") for x in ("input_ids", "attention_mask")]
    if names[0] in self:
      ids, mask = map(self.input, names)
      actual = self.folder.tokenizer.encode(texts, ids.shape[1])
      self.compare(dict(zip(names, actual, strict=True)), 0, names[0])
      return ids, mask
    if max_length is None:
      raise KeyError(f"{names[0]}: the case has no ids and no max_length")
    return self.folder.tokenizer.encode(texts, max_length)

  def compare(
    self,
    actual: Mapping[str, Any],
    tolerance: float,
    quantity: str | None = None,
    scale: Callable[[np.ndarray], Any] | float | None = None,
  ) -> None:
    """Compares arrays with the goldens of the same names, where there are any.

    Args:
      actual: name -> array.
      tolerance: upper limit of the largest difference, in units of the scale.
      quantity: name of one line for all arrays; default: a line for each.
      scale: a number, or a function of the golden array; default: the largest
        magnitude in it.
    """
    errors = {
      name: difference(x, self.input(name), scale)
      for name, x in actual.items()
      if name in self
    }
    if quantity is not None:
      self.add_check(quantity, errors, tolerance)
    else:
      for name, error in errors.items():
        self.add_check(name, {name: error}, tolerance)

  def compare_fingerprints(
    self,
    prefix: str,
    names: Iterable[str | None],
    actual: Mapping[str, np.ndarray],
    tolerance: float,
    scale: Callable[[np.ndarray], float],
    label: str = "",
  ) -> None:
    """Compares norms and fingerprints of arrays that the goldens do not store.

    Args:
      prefix: the goldens are `<prefix>_norm` and `<prefix>_probe`.
      names: of the arrays, in the order of the goldens; None skips one.
      actual: name -> array.
      tolerance: upper limit of the difference, in units of the scale.
      scale: a function of an array of `actual`.
      label: is appended to the name of the quantity.
    """
    for kind, function in (("norm", np.linalg.norm), ("probe", probe)):
      array = f"{prefix}_{kind}"
      if array not in self:
        continue
      errors = {}
      for name, value in zip(names, self.input(array), strict=True):
        if name and name not in actual:
          errors[name] = Error(np.inf, np.inf, "this package has no such array")
        elif name:
          x = np.asarray(actual[name], np.float64).ravel()
          # The goldens are float32, so a large value has a large rounding.
          unit = max(scale(x), abs(float(value)))
          absolute = abs(float(function(x)) - float(value))
          errors[name] = Error(absolute, absolute / unit)
      self.add_check(array + label, errors, tolerance)

  def compare_fact(self, name: str, actual: Any) -> None:
    """Compares a fact for equality; sets are compared without order."""
    if name not in self._facts:
      return
    expected = self.fact(name)
    if isinstance(expected, list) and isinstance(actual, (set, frozenset)):
      expected = set(map(_hashable, expected))
      mismatches = sorted(map(str, expected ^ set(actual)))
    elif isinstance(expected, list):
      pairs = zip(expected, actual, strict=True)
      mismatches = [f"{y}, expected {x}" for x, y in pairs if x != y]
    else:
      same = expected == actual
      mismatches = [] if same else [f"{actual}, expected {expected}"]
    count, note = len(mismatches), weights.first_few(mismatches)
    self.add_check(f"fact {name}", {"": Error(count, count, note)}, 0)

  def add_check(
    self, quantity: str, errors: Mapping[str, Error], tolerance: float
  ) -> None:
    """Adds a line for the largest relative error, if there are errors."""
    if not errors:
      return
    # `argmax` returns the first NaN, if there is one.
    worst = np.argmax([error.relative for error in errors.values()])
    name, error = list(errors.items())[worst]
    # NaN must fail, and `NaN <= tolerance` is False.
    verdict = OK if error.relative <= tolerance else FAIL
    which = "" if name == quantity or not error.absolute else name
    note = ": ".join(filter(None, (which, error.note)))
    numbers = float(error.absolute), float(error.relative), float(tolerance)
    self.checks.append(Check(self.name, quantity, verdict, *numbers, note))

  def fail(self, why: str) -> None:
    self.checks.append(Check(self.name, "case", FAIL, note=why))

  def missing(self) -> list[Check]:
    """What was neither used as an input nor compared."""
    return [
      Check(self.name, name, MISSING, note=self.meaning(name))
      for name in self._unused
    ]


def probe(x: np.ndarray) -> float:
  """The fingerprint of an array in the goldens: a transpose changes it."""
  x = np.asarray(x, np.float64).ravel()
  return float(x @ np.cos(0.37 * np.arange(x.size) + 0.1))


def _hashable(value: Any) -> Any:
  return frozenset(value) if isinstance(value, list) else value
