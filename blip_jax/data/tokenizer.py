"""BERT's WordPiece tokenizer with BLIP's two extra tokens, [DEC] and [ENC].

A text is [CLS] words [SEP]. On the device, its first token is replaced by
[DEC] (language modelling) or [ENC] (multimodal encoding). These two tokens are
added here at the end of a vocabulary that lacks them. A vocabulary may have
further added tokens, which are found in a text before it is split into words.

Dimensions: B texts, L text length.
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int, Int32

from blip_jax.data import vocabulary
from blip_jax.runtime import files as files_lib

# Of bert-base-uncased, without [DEC] and [ENC].
_BERT_TOKENS = 30522


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
        added, the other `vocabulary.FILES`; or the name of a repository on
        the Hugging Face hub, such as "bert-base-uncased".

    Raises:
      ValueError: there is no such vocabulary, or it cannot be used: it is not
        BERT's kind, or its tokens would not get the ids that its files state.
    """
    return cls(vocabulary.read(name_or_dir))

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
      vocabulary.WORDS: "".join(f"{token}\n" for token in tokens),
      vocabulary.CONFIG: json.dumps(config, indent=2) + "\n",
    }


@functools.cache
def stand_in() -> Tokenizer:
  """A vocabulary with as many tokens as BERT's, for programs that read no
  text."""
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  words = map("".join, itertools.product("abcdefghijklmnopqrst", repeat=4))
  words = itertools.islice(words, _BERT_TOKENS - len(special))
  with files_lib.temporary_folder() as folder:
    text = "\n".join([*special, *words, ""])
    files_lib.write_text(folder / vocabulary.WORDS, text)
    return Tokenizer.load(folder)


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
