"""Cases of complete models without momentum encoders, and those of Hugging
Face, whose models get [CLS] where training had [ENC].
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.evaluators import ranking
from blip_jax.evaluators.scores import recall
from blip_jax.inference import scoring
from blip_jax.models import predictions
from blip_jax.runtime import sharding
from blip_jax.tasks import align, losses
from blip_jax.tasks import answers as answers_lib
from blip_jax.tasks import caption as caption_lib
from blip_jax.tasks import nlvr as nlvr_lib
from blip_jax.tasks import vqa as vqa_lib
from tests.parity import generated, replay, ties, verdicts
from tests.parity.goldens import Golden

# The original's lengths, for texts without ids in the goldens.
CAPTION_LENGTH = 40
TEXT_LENGTH = 35
SMOOTHING = 0.1


def blip_base(golden: Golden) -> None:
  opened = replay.open_case(golden)
  image = golden.image("image")
  for i, text in enumerate(golden.fact("captions")):
    inputs = image[i : i + 1], *golden.tokens(f"caption{i}", [text])
    outputs = _features(opened.model, opened.params, *inputs)
    golden.compare(
      {f"{name}{i}": x for name, x in outputs.items()}, replay.MODULE
    )


@replay.jit_of_model
def _features(model, params, image, ids, mask):
  call = replay.bound(model, params)
  embeds = call("encode_image", image)
  return {
    "image_embeds": embeds,
    "text": call("encode_text", ids, mask),
    "multimodal": call("fuse", ids, mask, call("image_kv", embeds)),
  }


def blip_itm(golden: Golden) -> None:
  opened = replay.open_case(golden)
  text = golden.tokens("caption", golden.fact("captions"))
  for suffix in ("", "_one"):
    if f"image{suffix}" in golden:
      image = golden.image(f"image{suffix}")
      outputs = match(opened.model, opened.params, image, *text)
      actual = {f"{name}{suffix}": outputs[name] for name in ("itm", "itc")}
      golden.compare(actual, replay.MODEL)


@replay.jit_of_model
def match(model, params, image, ids, mask):
  """Both scores of the original's demo, and the features they come from."""
  call = replay.bound(model, params)
  image_embeds, image_feat = call("image_features", image)
  kv = call("image_kv", image_embeds)
  return {
    "itm": call("match", ids, mask, kv, legacy_cls=True),
    "itc": image_feat @ call("text_feat", ids, mask).T,
    "fused": call("fuse", ids, mask, kv, legacy_cls=True),
    "text": call("encode_text", ids, mask),
  }


def retrieval_eval(golden: Golden) -> None:
  """Short lists by ITC, their ITM scores, and recall."""
  opened, mesh = replay.open_case(golden), sharding.one_device()
  texts = scoring.Texts(*golden.tokens("caption", golden.fact("captions")))
  scorer = scoring.Scorer(align.predict_fns(opened.model), mesh)
  image = jnp.asarray(golden.image("image"))
  embeds, image_feat = scorer.image_features(opened.params, image)
  text_feat = scorer.text_feat(opened.params, *map(jnp.asarray, texts))
  sim = np.asarray(image_feat @ text_feat.T)
  lists = ranking.ShortLists.nearest(sim, golden.config["k_test"])
  candidates = [np.flatnonzero(row) for row in lists.pairs]
  scores = sim.copy()
  logits = scorer.itm_logits(opened.params, embeds, texts, candidates)
  for row, columns, logit in zip(scores, candidates, logits, strict=True):
    row[columns] += logit[:, 1]
  i2t, t2i = lists.ranked(scores)
  golden.compare(
    {"score_i2t": i2t, "score_t2i": t2i},
    replay.MODEL,
    scale=lambda x: np.abs(x[x > ranking.NOT_LISTED]).max(),
  )
  image_of = {
    text: int(image)
    for image, texts_of in golden.fact("img2txt").items()
    for text in texts_of
  }
  _compare_recall(golden, "metrics", i2t, t2i, image_of)
  if "rand_i2t" in golden:
    i2t, t2i = golden.input("rand_i2t"), golden.input("rand_t2i")
    image_of = {text: text // 2 for text in range(len(t2i))}
    _compare_recall(golden, "rand_metrics", i2t, t2i, image_of)


def _compare_recall(golden, name, i2t, t2i, image_of) -> None:
  """Accepts what any order of equal scores gives, and nothing else."""
  expected = golden.fact(name)
  text_to_image = np.array([image_of[text] for text in range(len(t2i))])
  own = text_to_image == np.arange(len(i2t))[:, None]
  percents = {
    direction: [expected[f"{direction}_r{k}"] for k in recall.KS]
    for direction in ("txt", "img")
  }
  actual = recall.recall(
    ties.ranked(i2t, own, percents["txt"]),
    ties.ranked(t2i, own.T, percents["img"]),
    text_to_image,
  )
  errors = {
    key: verdicts.difference(actual.get(key, np.nan), expected.get(key, np.nan))
    for key in actual.keys() | expected.keys()
  }
  golden.add_check(f"fact {name}", errors, replay.FLOAT64)


def blip_decoder(golden: Golden) -> None:
  opened = replay.open_case(golden)
  prompt, texts = golden.config["prompt"], golden.fact("captions")
  tokenizer = opened.checkpoint.tokenizer
  golden.compare_fact("prompt_length", len(tokenizer.prompt_ids(prompt)))
  ids, mask = golden.tokens("caption", texts)
  image = golden.image("image")
  batch = {"image": image, "input_ids": ids, "attention_mask": mask}
  head = "text_decoder/lm_head"
  task = caption_lib.Caption(opened.model, golden.fact("prompt_length"))
  seen = replay.compare_loss(
    golden, opened, task, batch, "visual_encoder", head
  )
  predicted, embeds = seen[head][0], seen["visual_encoder"][0]
  golden.compare(
    {"logits": predicted.logits(), "image_embeds": embeds}, replay.MODEL
  )
  started = ids.copy()
  started[:, 0] = opened.model.config.med.tokens.dec
  golden.compare({"decoder_input_ids": started}, replay.EXACT)
  if "labels" in golden:
    lm = predicted, golden.input("labels"), task.label_smoothing
    golden.compare(
      {"loss": replay.lm_loss(*lm).smoothed}, replay.MODEL, "loss of labels"
    )
  if "loss.prompt2" in golden:
    other = golden.fact("gen.prompt2.prompt")
    length = len(tokenizer.prompt_ids(other))
    golden.compare_fact("gen.prompt2.prompt_length", length)
    texts = [other + text.removeprefix(prompt) for text in texts]
    loss = caption_loss(opened, image, texts, length)
    golden.compare({"loss.prompt2": loss}, replay.MODEL)
  if "gen_image" in golden:
    facts = golden.matches(r"(gen\..+)\.beam3\.sequences")
    prompts = {m[1]: golden.fact(f"{m[1]}.prompt") for m in facts}
    if "gen.noprompt" in prompts:
      length = len(tokenizer.prompt_ids(prompts["gen.noprompt"]))
      golden.compare_fact("gen.noprompt.prompt_length", length)
    states = functools.partial(encode_image, opened.model, opened.params)
    texts_of = generated.compare_generated(
      golden, opened, states, golden.image("gen_image"), {"": prompt, **prompts}
    )
    sep = opened.model.config.med.tokens.sep
    # Only of the names that the fact lists.
    names = [name for name, _ in golden.fact("eos_positions", [])]
    ends = [[x, _first(texts_of[f"gen.{x}"] == sep)] for x in names]
    golden.compare_fact("eos_positions", ends)


def _first(mask: np.ndarray) -> list[int]:
  """Index of the first True in each row; -1 if there is none."""
  return np.where(mask.any(1), mask.argmax(1), -1).tolist()


@replay.jit_of_model
def encode_image(model, params, image):
  return replay.bound(model, params)("encode_image", image)


def caption_loss(opened: replay.Opened, image, texts, prompt_length: int):
  length = min(CAPTION_LENGTH, opened.model.config.med.max_positions)
  ids, mask = opened.checkpoint.tokenizer.encode(texts, length)
  batch = {"image": image, "input_ids": ids, "attention_mask": mask}
  task = caption_lib.Caption(opened.model, prompt_length)
  return replay.jit(replay.loss_fn(task))(opened.params, batch)[0]


def blip_vqa(golden: Golden) -> None:
  opened = replay.open_case(golden)
  question = golden.tokens("question", golden.fact("questions"))
  answer = golden.tokens("answer", golden.fact("answers"))
  head = "text_decoder/lm_head"
  weight = golden.input("weights")
  batch = {
    "image": golden.image("image"),
    **answers(question, answer, golden.fact("n"), weight),
  }
  task = vqa_lib.Vqa(opened.model)
  seen = replay.compare_loss(golden, opened, task, batch, head)
  (predicted,) = seen[head]
  expected = golden.shape("answer_logits")
  shape = batch["answer_mask"].shape
  logits = np.asarray(predicted.logits()).reshape(*shape, -1)
  # Those of padding are no answers'.
  logits = logits[batch["answer_mask"][..., 0] == 1].reshape(expected)
  golden.compare({"answer_logits": logits}, replay.MODEL)
  # The original ignores the mask of the questions here.
  if "generate.sequences" in golden:
    states = lambda image: read(opened.model, opened.params, image, *question)
    generated.compare_generated(
      golden, opened, states, golden.image("image"), {"": ""}
    )
  states = read(opened.model, opened.params, golden.image("image"), *question)
  for prefix, name in (("rank", "answer_list"), ("ties", "ties.answer_list")):
    _compare_ranked(golden, opened, states, question[1], prefix, name)


def _compare_ranked(golden, opened, states, mask, prefix, name) -> None:
  """Compares `<prefix><k>.*`, or `<prefix>.*` for all answers of a list."""
  texts = golden.fact(name)
  tokens = "ties" if prefix == "ties" else name
  ids, lengths = _candidates(golden, opened, tokens, texts)
  for match in golden.matches(rf"({prefix}(\d*))\.answer_ids"):
    k = int(match[2] or len(texts))
    ranked = _ranked(
      (opened.model, k), opened.params, states, mask, ids, lengths
    )
    scores = np.asarray(ranked.scores("blip", SMOOTHING))
    best = np.take_along_axis(
      np.asarray(ranked.index), scores.argmax(1)[:, None], axis=1
    )
    golden.compare({f"{match[1]}.answer_ids": best[:, 0]}, replay.EXACT)
    golden.compare(
      {f"{match[1]}.topk_ids": np.asarray(ranked.index)}, replay.EXACT
    )
    golden.compare(
      {
        f"{match[1]}.topk_probs": ranked.first_prob,
        f"{match[1]}.neg_loss": scores,
        f"{match[1]}.first_token_logits": _first_logits(
          opened.model, opened.params, states, mask
        ),
      },
      replay.MODEL,
    )


def _candidates(golden, opened, name, texts):
  """Ids of a list of answers; in the goldens, they start with [DEC]."""
  names = f"{name}.input_ids", f"{name}.attention_mask"
  ids, mask = map(golden.input, names)
  own, own_mask = golden.folder.tokenizer.encode(texts, ids.shape[1])
  own[:, 0] = opened.model.config.med.tokens.dec
  golden.compare(dict(zip(names, (own, own_mask), strict=True)), replay.EXACT)
  return ids, mask.sum(axis=1)


@replay.jit_of_model
def _ranked(model_and_k, params, states, mask, ids, lengths):
  model, k = model_and_k
  return answers_lib.rank(model, params, states, mask, ids, lengths, k)


@replay.jit_of_model
def _first_logits(model, params, states, mask):
  call = replay.bound(model, params)
  ids = jnp.full((len(states), 1), model.config.med.tokens.dec)
  kv = call("decoder_kv", states)
  predicted = call("decode", ids, jnp.ones_like(ids), kv, encoder_mask=mask)
  return predicted.logits()[:, 0]


@replay.jit_of_model
def read(model, params, image, ids, mask):
  """Hidden states of questions with cross-attention to their images."""
  call = replay.bound(model, params)
  kv = call("image_kv", call("encode_image", image))
  return call("fuse", ids, mask, kv)


def answers(question, answer, numbers, weight) -> dict[str, np.ndarray]:
  """A batch of questions with `numbers[i]` answers to question i."""
  places = np.arange(max(numbers)) < np.array(numbers)[:, None]

  def placed(x: np.ndarray) -> np.ndarray:
    padded = np.zeros((*places.shape, *x.shape[1:]), x.dtype)
    padded[places] = x
    return padded

  return {
    "question_ids": question[0],
    "question_mask": question[1],
    "answer_ids": placed(answer[0]),
    "answer_mask": placed(answer[1]),
    "answer_weight": placed(weight),
  }


def blip_nlvr(golden: Golden) -> None:
  opened = replay.open_case(golden)
  ids, mask = golden.tokens("text", golden.fact("texts"))
  first, second = np.split(golden.image("image"), 2)
  batch = {
    "image_0": first,
    "image_1": second,
    "input_ids": ids,
    "attention_mask": mask,
    "label": golden.input("targets"),
  }
  task = nlvr_lib.Nlvr(opened.model)
  paths = {"prediction": "cls_head", "layer0_crossattn": "crossattention"}
  seen = replay.compare_loss(
    golden, opened, task, batch, *paths.values(), unstack=True
  )
  golden.compare(
    {name: seen[path][0] for name, path in paths.items()}, replay.MODEL
  )


def hf_caption(golden: Golden) -> None:
  opened = replay.Opened.of(golden.open(*golden.checkpoints))
  names = "input_ids", "attention_mask"
  inputs = golden.image("pixel_values"), *map(golden.input, names)
  embeds, predicted = _hf_decode(opened.model, opened.params, *inputs)
  outputs = {"image_embeds": embeds, "logits": predicted.logits()}
  golden.compare(outputs, replay.MODEL)
  golden.compare({"loss": _hf_loss(golden, predicted)}, replay.MODEL)
  if "gen_pixel_values" in golden:
    _hf_generated(golden, opened)


def _hf_generated(golden: Golden, opened: replay.Opened) -> None:
  """Texts with and without a prompt; [CLS] and [SEP] of its ids are dropped."""
  image = golden.image("gen_pixel_values")
  states = encode_image(opened.model, opened.params, image)
  dec = opened.model.config.med.tokens.dec
  prompt = [dec, *golden.input("prompt_ids")[1:-1].tolist()]
  for match in golden.matches(r"gen\.(noprompt_)?.+"):
    start = [dec] if match[1] else prompt
    _compare_hf_texts(golden, opened, match[0], states, start)


def _compare_hf_texts(
  golden: Golden,
  opened: replay.Opened,
  name: str,
  states: jax.Array,
  start: list[int],
) -> None:
  settings = generated.settings_of(golden, name, generated.HF_DEFAULTS)
  outputs = generated.generate(opened, states, start, settings)
  expected = golden.input(name)
  # Hugging Face pads beams with [SEP], this package with [PAD].
  ends = opened.model.config.med.tokens.sep == expected
  after_end = np.cumsum(ends, axis=1) - ends > 0
  actual = generated.match_width(outputs.ids[:, 0], expected)
  actual = np.where(after_end & ends, expected, actual)
  golden.compare({name: actual}, replay.EXACT)


@replay.jit_of_model
def _hf_decode(model, params, image, ids, mask):
  call = replay.bound(model, params)
  embeds = call("encode_image", image)
  kv = call("decoder_kv", embeds)
  return embeds, call("decode", ids, mask, kv)


def _hf_loss(golden: Golden, predicted: predictions.Predictions) -> jax.Array:
  file = golden.folder.path / golden.checkpoints[0] / "config.json"
  smoothing = json.loads(file.read_text())["text_config"]["label_smoothing"]
  labels = jnp.asarray(golden.input("labels"))
  return losses.lm_loss(predicted, labels, smoothing).smoothed


def hf_retrieval(golden: Golden) -> None:
  opened = replay.Opened.of(golden.open(*golden.checkpoints))
  names = "input_ids", "attention_mask"
  inputs = golden.image("pixel_values"), *map(golden.input, names)
  outputs = match(opened.model, opened.params, *inputs)
  golden_names = {
    "itm_score": "itm",
    "itc_score": "itc",
    "question_embeds": "fused",
    "text_embeds": "text",
  }
  golden.compare(
    {name: outputs[x] for name, x in golden_names.items()}, replay.MODEL
  )


def hf_vqa(golden: Golden) -> None:
  opened = replay.Opened.of(golden.open(*golden.checkpoints))
  names = "input_ids", "attention_mask"
  names = *names, *(f"decoder_{name}" for name in names)
  inputs = golden.image("pixel_values"), *map(golden.input, names)
  outputs, answer = _hf_answer(opened.model, opened.params, *inputs)
  outputs["answer_logits"] = answer.logits()
  golden.compare(outputs, replay.MODEL)
  golden.compare({"loss": _hf_loss(golden, answer)}, replay.MODEL)
  # Generated answers attend to the padding of questions, too.
  dec = opened.model.config.med.tokens.dec
  for match in golden.matches(r"gen\..+"):
    states = outputs["question_embeds"]
    _compare_hf_texts(golden, opened, match[0], states, [dec])


@replay.jit_of_model
def _hf_answer(model, params, image, ids, mask, answer_ids, answer_mask):
  call = replay.bound(model, params)
  embeds = call("encode_image", image)
  kv = call("image_kv", embeds)
  question = call("fuse", ids, mask, kv, legacy_cls=True)
  # No `encoder_mask`: transformers 5 does not pass it on to its layers.
  kv = call("decoder_kv", question)
  outputs = {"image_embeds": embeds, "question_embeds": question}
  return outputs, call("decode", answer_ids, answer_mask, kv)
