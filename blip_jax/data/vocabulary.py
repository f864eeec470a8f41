"""The files of a vocabulary: found, checked, and read by transformers."""

import os
import pathlib
import re
from typing import Any

import tokenizers

from blip_jax.runtime import copies, files, json_files

# Either of the first two contains the words; transformers 5 writes the second.
_WORDS_FILES = WORDS, _JSON = ("vocab.txt", "tokenizer.json")
CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
_MAP = "special_tokens_map.json"
FILES = (*_WORDS_FILES, CONFIG, _ADDED, _MAP)
# Types of their values, as `json_files` writes them; a token may have options.
_TOKEN = (str, {"content": str}, None)
_TOKENS = {
  "additional_special_tokens": ([_TOKEN], None),
  **{
    f"{name}_token": _TOKEN
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
  },
}
_TYPES = {
  CONFIG: {
    **_TOKENS,
    "do_lower_case": bool,
    "strip_accents": (bool, None),
    "tokenize_chinese_chars": bool,
    "added_tokens_decoder": dict,
    "model_max_length": (float, None),
  },
  _ADDED: {},
  _MAP: _TOKENS,
  _JSON: {"model": dict, "added_tokens": [dict]},
}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def read(name_or_dir: str | os.PathLike) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a vocabulary, with [DEC] and [ENC].

  Args:
    name_or_dir: see `Tokenizer.load`.

  Raises:
    ValueError: there is no such vocabulary, or it cannot be used: it is not
      BERT's kind, or its tokens would not get the ids that its files state.
  """
  directory = _directory(name_or_dir)
  _check_files(directory)
  options = _options_of_json(directory)
  bert = _bert(directory, options)
  vocab = bert.backend_tokenizer.get_vocab(with_added_tokens=False)
  missing = [token for token in _SPECIAL if token not in vocab]
  if missing:
    raise ValueError(
      f"{directory}: the vocabulary lacks {', '.join(missing)}; each must be "
      f"a line of vocab.txt ({len(vocab)} tokens were found there)"
    )
  # In separate calls, because checkpoints rely on the order of the two ids.
  bert.add_special_tokens({"bos_token": "[DEC]"})
  bert.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
  _check_ids(bert.backend_tokenizer, directory)
  _check_words(bert.backend_tokenizer, vocab, directory)
  return bert.backend_tokenizer


def exists_in(directory: str | os.PathLike) -> bool:
  """Whether `read` finds a vocabulary in a directory."""
  directory = pathlib.Path(directory)
  return any(files.is_file(directory / name) for name in _WORDS_FILES)


def _directory(name_or_dir: str | os.PathLike) -> pathlib.Path:
  """Returns a directory with a vocabulary, downloaded if necessary."""
  if files.is_remote(name_or_dir):
    directory = copies.local_folder(name_or_dir, FILES)
  else:
    directory = pathlib.Path(name_or_dir)
    if not files.exists(directory):
      directory = _from_hub(str(name_or_dir))
  # Otherwise transformers would return a tokenizer without words.
  if not exists_in(directory):
    raise ValueError(
      f"{directory}: there is no vocab.txt in it (nor a tokenizer.json). Set "
      "config.tokenizer to the directory that contains the vocabulary, not to "
      "the file or a parent directory"
    )
  return directory


def _check_files(directory: pathlib.Path) -> None:
  """Raises `ValueError` for a file that is not what its name says."""
  for name in FILES:
    path = directory / name
    if not json_files.is_there(path):
      continue
    if name == WORDS:
      json_files.read_text(path)
    else:
      json_files.read(path, _TYPES[name])


def _bert(directory: pathlib.Path, options: dict[str, Any]) -> Any:
  """The tokenizer of transformers.

  Raises:
    ValueError: it cannot be made of these files.
  """
  transformers = _transformers()
  try:
    # Not `BertTokenizer(vocab_file=...)`: transformers 5 ignores the argument
    # and makes every word [UNK].
    return transformers.BertTokenizer.from_pretrained(directory, **options)
  # Whatever a value makes of the arguments of its classes and functions.
  except Exception as error:
    paths = [directory / name for name in FILES]
    found = [str(path) for path in paths if json_files.is_there(path)]
    raise ValueError(
      f"{' + '.join(found)}: expected the files of a BERT tokenizer, found "
      f"values of which transformers makes none ({error!r:.200}); restore them"
    ) from error


def _transformers() -> Any:
  """The package. Its import says that there is no PyTorch, which is no news.

  It takes a second, and workers that only encode do not need it.
  """
  quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
  before = os.environ.get(quiet)
  os.environ[quiet] = "1"
  try:
    import transformers
  finally:
    del os.environ[quiet]
    if before is not None:
      os.environ[quiet] = before
  return transformers


def _from_hub(name: str) -> pathlib.Path:
  import huggingface_hub

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, allow_patterns=[*FILES])
    )
  # HFValidationError (an invalid name) is a ValueError, the others are
  # OSErrors.
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{name!r} is neither a local directory nor a vocabulary that can be "
      "downloaded from the Hugging Face hub. Without network, set "
      "config.tokenizer to a directory that contains its vocab.txt."
    ) from error


def _options_of_json(directory: pathlib.Path) -> dict[str, Any]:
  """What transformers ignores in a tokenizer.json, as its arguments.

  It takes only the tokens from this file. Settings in tokenizer_config.json
  come first.

  Raises:
    ValueError: it is not a tokenizer of BERT's kind.
  """
  path = directory / _JSON
  if not files.is_file(path):
    return {}
  stored = _backend_of(path)
  for part, expected in (
    ("model", tokenizers.models.WordPiece),
    ("normalizer", tokenizers.normalizers.BertNormalizer),
    ("pre_tokenizer", tokenizers.pre_tokenizers.BertPreTokenizer),
  ):
    found = getattr(stored, part)
    if not isinstance(found, expected):
      raise ValueError(
        f"{path}: expected the {part} {expected.__name__}, as BERT has, found "
        f"{type(found).__name__}; BLIP's vocabulary is BERT's"
      )
  options = {
    "do_lower_case": stored.normalizer.lowercase,
    "strip_accents": stored.normalizer.strip_accents,
    "tokenize_chinese_chars": stored.normalizer.handle_chinese_chars,
  }
  config = _json(directory / CONFIG)
  return {key: value for key, value in options.items() if key not in config}


def _check_ids(backend: tokenizers.Tokenizer, directory: pathlib.Path) -> None:
  """Raises `ValueError` if a token does not have the id that a file states."""
  lines = _lines(directory / WORDS)
  added = _json(directory / _ADDED)
  ids = dict.fromkeys(added, range(1 << 31))
  json_files.check(added, ids, directory / _ADDED)
  decoder = _decoder(directory / CONFIG)
  stated = {
    WORDS: [(token, number) for number, token in enumerate(lines)],
    _ADDED: added.items(),
    CONFIG: [(token, int(id)) for id, token in decoder.items()],
    _JSON: [],
  }
  if files.is_file(directory / _JSON):
    stored = _backend_of(directory / _JSON)
    stated[_JSON] = stored.get_vocab(with_added_tokens=True).items()
  for name, tokens in stated.items():
    for token, id in tokens:
      found = backend.token_to_id(token)
      if found != id:
        raise ValueError(
          f"{directory / name}: {token!r:.100} has the id {id}, but it would "
          f"get {found}: the ids of a vocabulary's words and then of its added "
          "tokens must be 0, 1, 2, ..., and each token may be there once, with "
          f"one id in all files of the folder ({', '.join(FILES)})"
        )


def _lines(path: pathlib.Path) -> list[str]:
  if not files.is_file(path):
    return []
  text = files.read_text(path).replace("\r\n", "\n")
  return text.removesuffix("\n").split("\n")


def _decoder(path: pathlib.Path) -> dict[str, str]:
  """The added tokens that a configuration states, by id."""
  decoder = _json(path).get("added_tokens_decoder", {})
  types = {id: {"content": str} for id in decoder}
  json_files.check(decoder, types, path, "added_tokens_decoder")
  for id, token in decoder.items():
    if not re.fullmatch("[0-9]{1,9}", id) or "content" not in token:
      raise ValueError(
        f"{path}: added_tokens_decoder: expected ids and tokens with their "
        f"content, found {id!r:.20}: {token!r:.100}; restore this file"
      )
  return {id: token["content"] for id, token in decoder.items()}


def _json(path: pathlib.Path) -> dict[str, Any]:
  if not json_files.is_there(path):
    return {}
  return json_files.read(path, _TYPES[path.name])


def _backend_of(path: pathlib.Path) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(files.read_text(path))
  # tokenizers raises no narrower class.
  except Exception as error:
    raise ValueError(f"{path}: not a tokenizer: {error!s:.200}") from error


def _check_words(
  backend: tokenizers.Tokenizer, vocab: dict[str, int], directory: pathlib.Path
) -> None:
  """Raises `ValueError` if words of the vocabulary are not recognised."""
  words = [token for token in vocab if token.isalpha()][:100]
  unknown = vocab["[UNK]"]
  if not any(backend.encode(word).ids[1] != unknown for word in words):
    raise ValueError(
      f"{directory}: none of the words in vocab.txt is recognised; expected a "
      "WordPiece vocabulary of BERT, lower-cased if do_lower_case is set in "
      "tokenizer_config.json"
    )
