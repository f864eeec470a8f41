"""BERT's WordPiece with BLIP's two extra tokens.

A text is [CLS] words [SEP]; what stands first is replaced on the device by
[DEC] (language modelling) or [ENC] (multimodal encoding), the two tokens that
are added here behind the vocabulary.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from jaxtyping import Int, Int32

_VOCAB_FILES = ("vocab.txt", "tokenizer_config.json")
# Either has the words; transformers 5 writes the second.
_WORDS_FILES = ("vocab.txt", "tokenizer.json")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Tokenizer:
  """Texts to token ids and back.

  Encoding changes nothing in here, so threads may share one; it can be
  pickled, and its processes do not import transformers.

  Attributes:
    vocab_size: with [DEC] and [ENC], which are the last two ids.
  """

  def __init__(self, backend: tokenizers.Tokenizer):
    self._backend = backend
    self.vocab_size = backend.get_vocab_size()
    self.pad_id = backend.token_to_id("[PAD]")
    self.cls_id = backend.token_to_id("[CLS]")
    self.sep_id = backend.token_to_id("[SEP]")
    self.dec_id = backend.token_to_id("[DEC]")
    self.enc_id = backend.token_to_id("[ENC]")

  @classmethod
  def load(cls, name_or_dir: str | os.PathLike) -> "Tokenizer":
    """Return the tokenizer of a vocabulary.

    Args:
      name_or_dir: a directory with vocab.txt (one token per line) and, if the
        text is not to be lower-cased, a tokenizer_config.json; or the name of
        a repository on the Hugging Face hub, such as "bert-base-uncased".

    Raises:
      ValueError: if there is no such vocabulary, or it cannot be used.
    """
    directory = _directory(name_or_dir)
    # It takes a second to import, and workers that only encode can do without.
    import transformers

    # Not `BertTokenizerFast(vocab_file=...)`: transformers 5 ignores the
    # argument and makes every word [UNK].
    bert = transformers.BertTokenizerFast.from_pretrained(directory)
    vocab = bert.backend_tokenizer.get_vocab(with_added_tokens=False)
    missing = [token for token in _SPECIAL if token not in vocab]
    if missing:
      raise ValueError(
        f"{directory}: the vocabulary lacks {', '.join(missing)}; each must be "
        f"a line of vocab.txt ({len(vocab)} tokens were found there)"
      )
    # One call each: the order of the two ids is part of every checkpoint.
    bert.add_special_tokens({"bos_token": "[DEC]"})
    bert.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    _check_words(bert.backend_tokenizer, vocab, directory)
    return cls(bert.backend_tokenizer)

  @property
  def special_ids(self) -> dict[str, int]:
    """The ids that a model itself writes, by their short names."""
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
    """Return ids and mask (1 on tokens), cut or padded to `max_length`.

    The last token of a text is always [SEP].
    """
    if max_length < 2:
      raise ValueError(
        f"max_length: expected 2 or more ([CLS] and [SEP]), found {max_length}"
      )
    ids = np.full((len(texts), max_length), self.pad_id, np.int32)
    mask = np.zeros_like(ids)
    # Cut and padded here: the backend's own settings for that are shared by
    # all threads.
    for i, encoding in enumerate(self._backend.encode_batch(list(texts))):
      row = encoding.ids
      if len(row) > max_length:
        row = [*row[: max_length - 1], self.sep_id]
      ids[i, : len(row)] = row
      mask[i, : len(row)] = 1
    return ids, mask

  def prompt_ids(self, prompt: str) -> list[int]:
    """Return what a text behind a prompt starts with: [DEC] and its words."""
    words = self._backend.encode(prompt, add_special_tokens=False).ids
    return [self.dec_id, *words]

  def decode(
    self,
    ids: Iterable[Sequence[int]] | Int[np.ndarray, "B L"],
    prompt: str = "",
  ) -> list[str]:
    """Return the texts of rows of ids, each up to its first [SEP].

    Special tokens are left out and word pieces joined.

    Args:
      prompt: that all of them start with, and that is left out. As in the
        original it is cut off the text: were the next token a piece of its
        last word, that would lose a letter.
    """
    prompt = self._decode_row(self.prompt_ids(prompt))
    start = len(prompt) + 1 if prompt else 0
    return [self._decode_row([int(i) for i in row])[start:] for row in ids]

  def _decode_row(self, row: list[int]) -> str:
    end = row.index(self.sep_id) if self.sep_id in row else len(row)
    text = self._backend.decode(row[:end], skip_special_tokens=True)
    # As the transformers of the original did; newer ones leave "dog ' s".
    return text.replace(" ' ", "'")

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """Return the token of each id, as the vocabulary has it."""
    return [self._backend.id_to_token(int(id)) for id in ids]

  def save(self, directory: str | os.PathLike) -> None:
    """Write a vocabulary directory from which `load` makes this tokenizer."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in self.files().items():
      (directory / name).write_text(text, encoding="utf-8")

  def files(self) -> dict[str, str]:
    """The files of a vocabulary directory, name -> text."""
    vocab = self._backend.get_vocab(with_added_tokens=False)
    lines = "".join(f"{token}\n" for token in sorted(vocab, key=vocab.get))
    normalizer = self._backend.normalizer
    config = {
      "do_lower_case": normalizer.lowercase,
      "strip_accents": normalizer.strip_accents,
      "tokenize_chinese_chars": normalizer.handle_chinese_chars,
      "tokenizer_class": "BertTokenizer",
    }
    vocab_file, config_file = _VOCAB_FILES
    return {
      vocab_file: lines,
      config_file: json.dumps(config, indent=2) + "\n",
    }


def has_vocabulary(directory: str | os.PathLike) -> bool:
  """Whether `Tokenizer.load` finds a vocabulary in a directory."""
  directory = pathlib.Path(directory)
  return any((directory / name).is_file() for name in _WORDS_FILES)


def _directory(name_or_dir: str | os.PathLike) -> pathlib.Path:
  """Return a directory with a vocabulary, fetched from the hub if need be."""
  directory = pathlib.Path(name_or_dir)
  if not directory.exists():
    directory = _from_hub(str(name_or_dir))
  # transformers would return a tokenizer without any words.
  if not has_vocabulary(directory):
    raise ValueError(
      f"{directory}: no vocab.txt in it (nor a tokenizer.json); pass "
      "(config.tokenizer) the directory that holds the vocabulary, not the "
      "file or its parent"
    )
  return directory


def _from_hub(name: str) -> pathlib.Path:
  import huggingface_hub

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, allow_patterns=_VOCAB_FILES)
    )
  # HFValidationError (no possible name) is a ValueError, the others OSErrors.
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{name!r} is neither a directory here nor a vocabulary that can be "
      "fetched from the Hugging Face hub. Without network, pass "
      "(config.tokenizer) a directory that holds its vocab.txt."
    ) from error


def _check_words(
  backend: tokenizers.Tokenizer, vocab: dict[str, int], directory: pathlib.Path
) -> None:
  """Raise `ValueError` if words of the vocabulary are not recognised."""
  words = [token for token in vocab if token.isalpha()][:100]
  unknown = vocab["[UNK]"]
  if not any(backend.encode(word).ids[1] != unknown for word in words):
    raise ValueError(
      f"{directory}: none of the words in vocab.txt is recognised; is it a "
      "WordPiece vocabulary of BERT, lower-cased if do_lower_case is set?"
    )
