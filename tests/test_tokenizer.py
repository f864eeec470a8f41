"""The tokenizer against the ids of the original, from transformers 4.15."""

import concurrent.futures
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from blip_jax.data import tokenizer, transforms


@pytest.fixture(scope="module")
def tiny(golden_dir):
  return tokenizer.Tokenizer.load(golden_dir / "tokenizer" / "tiny")


@pytest.fixture(scope="module")
def captions(golden_facts):
  return golden_facts("tokenizer_tiny")["captions"]


@pytest.fixture(scope="module")
def bert(shared_dir):
  return tokenizer.Tokenizer.load(shared_dir / "vocab" / "bert-base-uncased")


@pytest.fixture(scope="module")
def bert_golden(golden_dir):
  path = golden_dir / "tokenizer" / "bert_tokenizer.json"
  return json.loads(path.read_text())


def special_ids(tok):
  return {
    "pad": tok.pad_id,
    "cls": tok.cls_id,
    "sep": tok.sep_id,
    "dec": tok.dec_id,
    "enc": tok.enc_id,
    "length": tok.vocab_size,
  }


def test_tiny_vocabulary_equals_the_original(
  tiny, captions, golden_dir, golden_facts
):
  golden = np.load(golden_dir / "data" / "tokenizer_tiny.npz")
  ids, mask = tiny.encode(captions, 30)
  np.testing.assert_array_equal(ids, golden["ids_30"])
  np.testing.assert_array_equal(mask, golden["mask_30"])
  assert ids.dtype == mask.dtype == np.int32
  special = golden_facts("tokenizer_tiny")["special_ids"]
  assert special_ids(tiny).items() <= special.items()


def test_bert_special_ids_equal_the_original(bert, bert_golden):
  assert special_ids(bert).items() <= bert_golden["meta"]["special"].items()
  assert (bert.dec_id, bert.enc_id, bert.vocab_size) == (30522, 30523, 30524)


@pytest.mark.parametrize("length", [30, 35, 40])
def test_bert_ids_equal_the_original(length, bert, bert_golden):
  rows = bert_golden["captions"]
  ids, mask = bert.encode([row["pre_caption"] for row in rows], length)
  for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
    expected = row[f"ids_{length}"], row[f"mask_{length}"]
    assert (row_ids.tolist(), row_mask.tolist()) == expected, row["caption"]


@pytest.mark.parametrize("text", ["pre_caption", "caption"])
def test_bert_long_texts_equal_the_original(text, bert, bert_golden):
  """Raw captions too: "[SEP]" in one is a special token, as in the original."""
  for row in bert_golden["captions"]:
    expected = row["ids" if text == "pre_caption" else "raw_ids"]
    ids, mask = bert.encode([row[text]], 512)
    assert ids[0, : mask.sum()].tolist() == expected, row["caption"]


def test_bert_batches_and_prompt_equal_the_original(bert, bert_golden):
  batch = bert_golden["batch_longest"]
  width = len(batch["ids"][0])
  ids, mask = bert.encode(batch["texts"], width)
  assert (ids.tolist(), mask.tolist()) == (batch["ids"], batch["mask"])
  prompt = bert_golden["prompt"]
  ids, mask = bert.encode([prompt["text"]], 30)
  assert ids[0, : mask.sum()].tolist() == prompt["ids"]


def test_bert_decoded_texts_equal_the_original(bert, bert_golden):
  for row in bert_golden["captions"]:
    assert row["ids_40"].count(bert.sep_id) == 1
    (text,) = bert.decode([row["ids_40"]])
    assert text == row["decoded"], row["caption"]
    (text,) = bert.decode([row["ids_dec_40"]])
    assert text == row["decoded"], row["caption"]


def test_captions_after_pre_caption_have_the_ids_of_the_original(
  bert, bert_golden
):
  for row in bert_golden["captions"]:
    text = transforms.pre_caption(row["caption"], 50)
    assert bert.encode([text], 40)[0][0].tolist() == row["ids_40"]


def test_truncated_texts_end_in_sep(tiny, captions):
  ids, mask = tiny.encode([" ".join(captions)], 12)
  assert ids[0, 0] == tiny.cls_id and ids[0, -1] == tiny.sep_id
  assert mask.all()
  untruncated, _ = tiny.encode([" ".join(captions)], 400)
  np.testing.assert_array_equal(ids[0, :-1], untruncated[0, :11])


def test_decode_stops_at_sep(tiny):
  (ids,) = tiny.encode(["two dogs"], 6)[0]
  words = ids[1 : ids.tolist().index(tiny.sep_id)].tolist()
  assert len(words) == 3  # two dog ##s
  rows = [
    [tiny.dec_id, *words, tiny.sep_id, *words],
    [tiny.dec_id, *words, tiny.sep_id, tiny.pad_id, tiny.pad_id, tiny.pad_id],
    [tiny.enc_id, *words],
    [tiny.sep_id, *words],
  ]
  assert tiny.decode(rows) == ["two dogs", "two dogs", "two dogs", ""]
  assert tiny.decode(np.array(rows[:2])) == ["two dogs", "two dogs"]


def test_prompts_are_encoded_and_removed_from_decoded_texts(tiny):
  prompt = "a picture of "
  ids = tiny.prompt_ids(prompt)
  assert ids[0] == tiny.dec_id and tiny.sep_id not in ids
  (text_ids,), _ = tiny.encode([prompt + "two dogs"], 10)
  assert text_ids[1 : len(ids)].tolist() == ids[1:]
  rows = [[*ids, *text_ids[len(ids) :].tolist()]]
  assert tiny.decode(rows) == ["a picture of two dogs"]
  assert tiny.decode(rows, prompt) == ["two dogs"]
  assert tiny.prompt_ids("") == [tiny.dec_id]


def test_pieces_are_tokens_of_the_vocabulary(tiny):
  (ids,) = tiny.encode(["two dogs"], 6)[0]
  pieces = tiny.pieces(ids.tolist())
  assert pieces == ["[CLS]", "two", "dog", "##s", "[SEP]", "[PAD]"]
  assert tiny.pieces([tiny.enc_id, tiny.vocab_size]) == ["[ENC]", ""]


def test_an_empty_list_of_texts_can_be_encoded(tiny):
  ids, mask = tiny.encode([], 5)
  assert ids.shape == mask.shape == (0, 5)


def test_max_length_must_hold_cls_and_sep(tiny):
  with pytest.raises(ValueError, match="max_length: expected 2 or more"):
    tiny.encode(["a"], 1)


def test_threads_share_one_tokenizer(tiny, captions):
  """Threads use different lengths, as train and eval loaders do."""
  lengths = [5, 12, 30, 60] * 50
  expected = {n: tiny.encode(captions, n)[0] for n in set(lengths)}
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    encoded = list(pool.map(lambda n: tiny.encode(captions, n)[0], lengths))
  for n, ids in zip(lengths, encoded, strict=True):
    np.testing.assert_array_equal(ids, expected[n])


def test_pickled_tokenizer_needs_no_transformers(tiny, captions, tmp_path):
  """Worker processes start faster without this import."""
  path = tmp_path / "tokenizer.pickle"
  path.write_bytes(pickle.dumps((tiny, captions)))
  code = (
    "import pickle, sys\n"
    f"tok, texts = pickle.load(open({str(path)!r}, 'rb'))\n"
    "print(tok.encode(texts, 30)[0].tolist())\n"
    "assert 'transformers' not in sys.modules\n"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], check=True, capture_output=True, text=True
  )
  assert json.loads(out.stdout) == tiny.encode(captions, 30)[0].tolist()


def test_saved_tokenizer_is_the_same(tiny, captions, tmp_path):
  tiny.save(tmp_path / "new" / "vocab")
  again = tokenizer.Tokenizer.load(tmp_path / "new" / "vocab")
  assert special_ids(again) == special_ids(tiny)
  ids, mask = tiny.encode(captions, 30)
  again_ids, again_mask = again.encode(captions, 30)
  np.testing.assert_array_equal(again_ids, ids)
  np.testing.assert_array_equal(again_mask, mask)
  assert again.decode(ids) == tiny.decode(ids)


def write_vocab(directory, tokens, config=None):
  (directory / "vocab.txt").write_text("\n".join(tokens) + "\n")
  if config is not None:
    text = json.dumps(config)
    (directory / "tokenizer_config.json").write_text(text)
  return directory


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_case_survives_saving(tmp_path):
  tokens = [*SPECIAL, "A", "a", "Dog", "dog"]
  config = {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}
  cased = tokenizer.Tokenizer.load(write_vocab(tmp_path, tokens, config))
  cased.save(tmp_path / "saved")
  again = tokenizer.Tokenizer.load(tmp_path / "saved")
  for tok in (cased, again):
    assert tok.encode(["A Dog"], 4)[0].tolist() == [[2, 5, 7, 3]]


def test_vocab_txt_alone_is_enough(tmp_path):
  tok = tokenizer.Tokenizer.load(write_vocab(tmp_path, [*SPECIAL, "dog"]))
  assert (tok.dec_id, tok.enc_id, tok.vocab_size) == (6, 7, 8)
  assert tok.encode(["Dog cat"], 4)[0].tolist() == [[2, 5, 1, 3]]


def test_directory_without_vocabulary_is_refused(tmp_path):
  """transformers itself would return a tokenizer of five tokens."""
  with pytest.raises(
    ValueError, match=r"no vocab\.txt in it .*Set config\.tokenizer"
  ):
    tokenizer.Tokenizer.load(tmp_path)


def test_vocabulary_as_transformers_5_writes_it(tmp_path, golden_dir):
  """A tokenizer.json and no vocab.txt, with [DEC] and [ENC] already in it."""
  import transformers

  tiny = golden_dir / "tokenizer" / "tiny"
  external = transformers.BertTokenizer.from_pretrained(tiny)
  external.add_special_tokens({"bos_token": "[DEC]"})
  external.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
  external.save_pretrained(tmp_path)
  (tmp_path / "vocab.txt").unlink(missing_ok=True)
  loaded, expected = (tokenizer.Tokenizer.load(d) for d in (tmp_path, tiny))
  assert loaded.special_ids == expected.special_ids
  assert loaded.vocab_size == expected.vocab_size
  texts = ["A dog's red ball", "zyzzyva"]
  np.testing.assert_array_equal(
    loaded.encode(texts, 12)[0], expected.encode(texts, 12)[0]
  )


def test_the_file_instead_of_its_directory_is_refused(tmp_path):
  write_vocab(tmp_path, [*SPECIAL, "dog"])
  with pytest.raises(
    ValueError, match=r"no vocab\.txt in it .*Set config\.tokenizer"
  ):
    tokenizer.Tokenizer.load(tmp_path / "vocab.txt")


@pytest.mark.parametrize("name", ["/no/such/directory", "no-such-user/name"])
def test_the_error_for_an_unreachable_name_says_what_to_set(name, monkeypatch):
  """A closed port replaces the hub, so that no network is needed."""
  import huggingface_hub

  def closed(*args, **kwargs):
    return download(*args, **kwargs, endpoint="http://127.0.0.1:9")

  download = huggingface_hub.snapshot_download
  monkeypatch.setattr(huggingface_hub, "snapshot_download", closed)
  with pytest.raises(ValueError, match=r"set config\.tokenizer to a directory"):
    tokenizer.Tokenizer.load(name)


def test_missing_special_tokens_are_named(tmp_path):
  tokens = ["[PAD]", "[UNK]", "[CLS]", "dog"]
  with pytest.raises(ValueError, match=r"lacks \[SEP\], \[MASK\];.*4 tokens"):
    tokenizer.Tokenizer.load(write_vocab(tmp_path, tokens))


def test_vocabulary_that_recognises_no_word_is_refused(tmp_path):
  """Lower-casing a vocabulary of capitals would make every word [UNK]."""
  tokens = [*SPECIAL, "DOG", "CAT"]
  with pytest.raises(ValueError, match="none of the words"):
    tokenizer.Tokenizer.load(write_vocab(tmp_path, tokens))


ADDED = {"zorkon": 9, "red circle": 10, "<loc>": 11}


def added_tokens_json(directory, bert):
  write_vocab(directory, WORDS)
  (directory / "added_tokens.json").write_text(json.dumps(ADDED))


def tokenizer_config_json(directory, bert):
  entries = {
    str(id): dict(
      content=token,
      lstrip=token == "<loc>",
      rstrip=False,
      normalized=token != "<loc>",
      single_word=token == "zorkon",
      special=token == "<loc>",
    )
    for token, id in ADDED.items()
  }
  write_vocab(directory, WORDS, {"added_tokens_decoder": entries})


def special_tokens_map_json(directory, bert):
  write_vocab(directory, WORDS)
  special = {"additional_special_tokens": [*ADDED]}
  (directory / "special_tokens_map.json").write_text(json.dumps(special))


def added_by_transformers(directory, bert):
  bert.add_tokens([*ADDED])
  bert.save_pretrained(directory)


def tokenizer_json_alone(directory, bert):
  added_by_transformers(directory, bert)
  for path in directory.iterdir():
    if path.name != "tokenizer.json":
      path.unlink()


def added_behind_enc(directory, bert):
  bert.add_special_tokens({"bos_token": "[DEC]"})
  bert.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
  added_by_transformers(directory, bert)


def added_words_of_the_vocabulary(directory, bert):
  import tokenizers

  bert.add_tokens(
    [*ADDED, "dog", tokenizers.AddedToken("do", single_word=True)]
  )
  bert.save_pretrained(directory)


WORDS = [*SPECIAL, "a", "red", "dog", "##s"]


@pytest.mark.parametrize(
  "write",
  [
    added_tokens_json,
    tokenizer_config_json,
    special_tokens_map_json,
    added_by_transformers,
    tokenizer_json_alone,
    added_behind_enc,
    added_words_of_the_vocabulary,
  ],
)
def test_added_tokens_survive_saving(tmp_path, write):
  import transformers

  (tmp_path / "plain").mkdir()
  bert = transformers.BertTokenizer.from_pretrained(
    write_vocab(tmp_path / "plain", WORDS)
  )
  (tmp_path / "extended").mkdir()
  write(tmp_path / "extended", bert)
  extended = tokenizer.Tokenizer.load(tmp_path / "extended")
  extended.save(tmp_path / "saved")
  saved = tokenizer.Tokenizer.load(tmp_path / "saved")
  first = 11 if write is added_behind_enc else 9
  texts = ["a zorkon", "Red Circle", "dogs <loc> red", "redzorkon do"]
  for tok in (extended, saved):
    assert tok.pieces([*range(first, first + 3)]) == [*ADDED]
    assert first in tok.encode(texts[:1], 5)[0]
    assert tok.special_ids == extended.special_ids
  assert extended.special_ids["dec"] == (
    9 if first == 11 else tok.vocab_size - 2
  )
  for one, two in zip(
    extended.encode(texts, 9), saved.encode(texts, 9), strict=True
  ):
    np.testing.assert_array_equal(one, two)
  ids = extended.encode(texts, 9)[0]
  assert extended.decode(ids) == saved.decode(ids)


@pytest.mark.parametrize(
  "tokens, added, message",
  [
    ([*WORDS, "dog", "cat"], {}, r"vocab\.txt: 'dog' has the id 7, .* get 9"),
    (WORDS, {"zorkon": 12}, r"added_tokens\.json: 'zorkon' has the id 12"),
    (WORDS, {"zorkon": 7}, r"added_tokens\.json: 'zorkon' has the id 7"),
  ],
)
def test_ids_that_cannot_be_kept_are_refused(tmp_path, tokens, added, message):
  write_vocab(tmp_path, tokens)
  (tmp_path / "added_tokens.json").write_text(json.dumps(added))
  with pytest.raises(ValueError, match=message):
    tokenizer.Tokenizer.load(tmp_path)


def external_json(directory, tokens, change, config=None):
  """A tokenizer.json without vocab.txt, after `change` has edited it."""
  import transformers

  write_vocab(directory, tokens, {"do_lower_case": False})
  bert = transformers.BertTokenizer.from_pretrained(directory)
  for path in directory.iterdir():
    path.unlink()
  backend = json.loads(bert.backend_tokenizer.to_str())
  change(backend)
  (directory / "tokenizer.json").write_text(json.dumps(backend))
  if config is not None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
  return directory


CASED = [*SPECIAL, "A", "a", "Dog", "dog", "é", "e"]


@pytest.mark.parametrize(
  "config, expected",
  [
    (None, [[2, 5, 7, 9, 3]]),
    ({}, [[2, 5, 7, 9, 3]]),
    ({"do_lower_case": True}, [[2, 6, 8, 10, 3]]),
  ],
)
def test_a_tokenizer_json_says_whether_texts_are_lower_cased(
  tmp_path, config, expected
):
  """Unless tokenizer_config.json says otherwise, as in transformers."""
  external_json(tmp_path, CASED, lambda backend: None, config)
  cased = tokenizer.Tokenizer.load(tmp_path)
  cased.save(tmp_path / "saved")
  again = tokenizer.Tokenizer.load(tmp_path / "saved")
  for tok in (cased, again):
    assert tok.encode(["A Dog é"], 5)[0].tolist() == expected


@pytest.mark.parametrize(
  "key, value",
  [
    ("normalizer", {"type": "Lowercase"}),
    ("pre_tokenizer", {"type": "WhitespaceSplit"}),
  ],
)
def test_a_tokenizer_json_that_is_not_berts_is_refused(tmp_path, key, value):
  external_json(tmp_path, CASED, lambda backend: backend.update({key: value}))
  with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{key}.*Bert"):
    tokenizer.Tokenizer.load(tmp_path)


def test_a_tokenizer_that_would_change_by_saving_is_not_saved(tmp_path):
  config = {"unk_token": "[MASK]", "mask_token": "[UNK]"}
  write_vocab(tmp_path, WORDS, config)
  odd = tokenizer.Tokenizer.load(tmp_path)
  with pytest.raises(ValueError, match="cannot be saved"):
    odd.save(tmp_path / "saved")
  assert not (tmp_path / "saved").exists()


def test_all_files_of_a_vocabulary_are_fetched_from_the_hub(monkeypatch):
  import fnmatch

  import huggingface_hub

  asked = []

  def download(name, allow_patterns):
    asked.extend(allow_patterns)
    raise OSError("no network")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  with pytest.raises(ValueError):
    tokenizer.Tokenizer.load("no-such-user/name")
  for name in (
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
  ):
    assert any(fnmatch.fnmatch(name, pattern) for pattern in asked), name


def test_nothing_is_said_of_a_pytorch_that_nobody_needs(tmp_path):
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
  (tmp_path / "vocab.txt").write_text("\n".join(words))
  program = (
    "import sys; sys.modules['torch'] = None\n"
    "from blip_jax.data import tokenizer\n"
    "assert tokenizer.Tokenizer.load(sys.argv[1]).vocab_size\n"
    "from transformers.utils import logging\n"
    "logging.get_logger('transformers').warning_advice('as before')\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path)],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "PyTorch" not in done.stderr
  assert "as before" in done.stderr, "the user's own settings come back"
