"""BERT's WordPiece tokenizer with BLIP's two extra tokens, [DEC] and [ENC].

A text is [CLS] words [SEP]. On the device, its first token is replaced by
[DEC] (language modelling) or [ENC] (multimodal encoding). These two tokens are
added here at the end of a vocabulary that lacks them. A vocabulary may have
further added tokens, which are found in a text before it is split into words.

Dimensions: B texts, L text length.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int, Int32

from blip_jax.runtime import files as files_lib
from blip_jax.runtime import json_files

# Either of the first two contains the words; transformers 5 writes the second.
_WORDS_FILES = _VOCAB, _JSON = ("vocab.txt", "tokenizer.json")
_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
_MAP = "special_tokens_map.json"
FILES = (*_WORDS_FILES, _CONFIG, _ADDED, _MAP)
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
  _CONFIG: {
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


class Tokenizer:
  """Converts texts to token ids and back.

  A tokenizer is stateless, so threads can share it. It can be pickled, and
  processes that unpickle it do not import transformers.

  Attributes:
    vocab_size: number of tokens, the added ones included.
    pad_id: id of [PAD].
    cls_id: id of [CLS].
    sep_id: id of [SEP].
    dec_id: id of [DEC].
    enc_id: id of [ENC].
  """

  def __init__(self, backend: tokenizers.Tokenizer):
    """`backend` has all special tokens; use `load` instead."""
    self._backend = backend
    self.vocab_size = backend.get_vocab_size()
    self.pad_id = _special_id(backend, "[PAD]")
    self.cls_id = _special_id(backend, "[CLS]")
    self.sep_id = _special_id(backend, "[SEP]")
    self.dec_id = _special_id(backend, "[DEC]")
    self.enc_id = _special_id(backend, "[ENC]")

  @classmethod
  def load(cls, name_or_dir: str | os.PathLike) -> "Tokenizer":
    """Returns the tokenizer of a vocabulary.

    Args:
      name_or_dir: a directory with vocab.txt (one token per line) or
        tokenizer.json and, if texts should not be lower-cased or tokens were
        added, the other FILES of transformers; or the name of a repository on
        the Hugging Face hub, such as "bert-base-uncased".

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
    return cls(bert.backend_tokenizer)

  @property
  def special_ids(self) -> dict[str, int]:
    """Short name -> id of the tokens that a model itself inserts."""
    return {
      "pad": self.pad_id,
      "cls": self.cls_id,
      "sep": self.sep_id,
      "dec": self.dec_id,
      "enc": self.enc_id,
    }

  def encode(
    self, texts: Sequence[str], max_length: int
  ) -> tuple[Int32[np.ndarray, "B L"], Int32[np.ndarray, "B L"]]:
    """Returns ids and attention mask (1 on tokens, 0 on padding).

    Args:
      texts: B texts, without special tokens.
      max_length: L, special tokens included. Longer texts are truncated and
        shorter ones padded; the last token of a text is always [SEP].

    Raises:
      ValueError: `max_length` is below 2.
    """
    if max_length < 2:
      raise ValueError(
        f"max_length: expected 2 or more ([CLS] and [SEP]), found {max_length}"
      )
    ids = np.full((len(texts), max_length), self.pad_id, np.int32)
    mask = np.zeros_like(ids)
    # Truncated and padded here, because the backend's own settings for these
    # are shared by all threads.
    for i, encoding in enumerate(self._backend.encode_batch(list(texts))):
      row = encoding.ids
      if len(row) > max_length:
        row = [*row[: max_length - 1], self.sep_id]
      ids[i, : len(row)] = row
      mask[i, : len(row)] = 1
    return ids, mask

  def prompt_ids(self, prompt: str) -> list[int]:
    """Returns the first ids of a text with a prompt: [DEC], then the prompt."""
    words = self._backend.encode(prompt, add_special_tokens=False).ids
    return [self.dec_id, *words]

  def decode(
    self,
    ids: Iterable[Sequence[int]] | Int[np.ndarray, "B L"],
    prompt: str = "",
  ) -> list[str]:
    """Returns the text of each row of ids, up to its first [SEP].

    Special tokens are left out and word pieces are joined.

    Args:
      ids: B rows of token ids; their lengths may differ.
      prompt: prefix of all texts, which is removed. As in the original, its
        characters are cut off the text: if the next token were a piece of the
        prompt's last word, the text would lose its first letter.
    """
    prompt = self._decode_row(self.prompt_ids(prompt))
    start = len(prompt) + 1 if prompt else 0
    return [self._decode_row([int(i) for i in row])[start:] for row in ids]

  def _decode_row(self, row: list[int]) -> str:
    end = row.index(self.sep_id) if self.sep_id in row else len(row)
    text = self._backend.decode(row[:end], skip_special_tokens=True)
    # As in the original's transformers 4.15; later versions leave "dog ' s".
    return text.replace(" ' ", "'")

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """Returns the vocabulary's token of each id; "" for ids without one."""
    return [self._backend.id_to_token(int(id)) or "" for id in ids]

  def save(self, directory: str | os.PathLike) -> None:
    """Writes a vocabulary directory from which `load` makes this tokenizer.

    Raises:
      ValueError: as `files`; nothing is written then.
    """
    _write(directory, self.files())

  def files(self) -> dict[str, str]:
    """Returns the files of a vocabulary directory: name -> text.

    Raises:
      ValueError: `load` would make another tokenizer of them.
    """
    # Most need no list of added tokens: `load` adds the usual ones.
    for with_added in (False, True):
      texts = self._files(with_added)
      with files_lib.temporary_folder() as folder:
        _write(folder, texts)
        again = Tokenizer.load(folder)
      if again._backend.to_str() == self._backend.to_str():
        return texts
    raise ValueError(
      "this vocabulary cannot be saved: read again, it would give other ids. "
      "Expected words, added tokens, and the settings do_lower_case, "
      "strip_accents and tokenize_chinese_chars; it has others, such as "
      "special tokens that were renamed"
    )

  def digest(self) -> str:
    """A hash that is equal for equal vocabularies."""
    text = json.dumps(self._files(with_added=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def _files(self, with_added: bool) -> dict[str, str]:
    vocab = self._backend.get_vocab(with_added_tokens=False)
    tokens = sorted(vocab, key=lambda token: vocab[token])
    normalizer = self._backend.normalizer
    config: dict[str, Any] = {
      "do_lower_case": normalizer.lowercase,
      "strip_accents": normalizer.strip_accents,
      "tokenize_chinese_chars": normalizer.handle_chinese_chars,
      "tokenizer_class": "BertTokenizer",
    }
    if with_added:
      added = self._backend.get_added_tokens_decoder()
      config["added_tokens_decoder"] = {
        str(id): _token_as_json(added[id]) for id in sorted(added)
      }
    return {
      _VOCAB: "".join(f"{token}\n" for token in tokens),
      _CONFIG: json.dumps(config, indent=2) + "\n",
    }


def _write(directory: str | os.PathLike, texts: dict[str, str]) -> None:
  files_lib.make_folder(directory)
  for name, text in texts.items():
    files_lib.write_text(pathlib.Path(directory) / name, text)


def _token_as_json(token: tokenizers.AddedToken) -> dict[str, Any]:
  flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
  return {"content": token.content} | {f: getattr(token, f) for f in flags}


def _special_id(backend: tokenizers.Tokenizer, token: str) -> int:
  id = backend.token_to_id(token)
  assert id is not None, f"the tokenizer has no token {token}"
  return id


def has_vocabulary(directory: str | os.PathLike) -> bool:
  """Whether `Tokenizer.load` finds a vocabulary in a directory."""
  directory = pathlib.Path(directory)
  return any(files_lib.is_file(directory / name) for name in _WORDS_FILES)


def _directory(name_or_dir: str | os.PathLike) -> pathlib.Path:
  """Returns a directory with a vocabulary, downloaded if necessary."""
  directory = pathlib.Path(name_or_dir)
  if not files_lib.exists(directory):
    directory = _from_hub(str(name_or_dir))
  # Otherwise transformers would return a tokenizer without words.
  if not has_vocabulary(directory):
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
    if name == _VOCAB:
      json_files.read_text(path)
    else:
      json_files.read(path, _TYPES[name])


def _bert(directory: pathlib.Path, options: dict[str, Any]) -> Any:
  """The tokenizer of transformers.

  Raises:
    ValueError: it cannot be made of these files.
  """
  # The import takes a second, and workers that only encode do not need it.
  import transformers

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
  if not files_lib.is_file(path):
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
  config = _json(directory / _CONFIG)
  return {key: value for key, value in options.items() if key not in config}


def _check_ids(backend: tokenizers.Tokenizer, directory: pathlib.Path) -> None:
  """Raises `ValueError` if a token does not have the id that a file states."""
  lines = _lines(directory / _VOCAB)
  added = _json(directory / _ADDED)
  ids = dict.fromkeys(added, range(1 << 31))
  json_files.check(added, ids, directory / _ADDED)
  decoder = _decoder(directory / _CONFIG)
  stated = {
    _VOCAB: [(token, number) for number, token in enumerate(lines)],
    _ADDED: added.items(),
    _CONFIG: [(token, int(id)) for id, token in decoder.items()],
    _JSON: [],
  }
  if files_lib.is_file(directory / _JSON):
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
  if not files_lib.is_file(path):
    return []
  text = files_lib.read_text(path).replace("\r\n", "\n")
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
    return tokenizers.Tokenizer.from_str(files_lib.read_text(path))
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
