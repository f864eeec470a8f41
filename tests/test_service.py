"""The service: OpenAI's client gets what a direct call returns."""

import concurrent.futures
import dataclasses
import json
import socket
import sys

import numpy as np
import openai
import pytest

from blip_jax import defaults, serve
from blip_jax.inference import captioning, urls
from blip_jax.serve import api_error, inputs, programs, service
from tests import helpers, serving


@pytest.fixture(scope="module")
def hosts():
  return serving.make_hosts("caption", "vqa", "retrieval")


@pytest.fixture(scope="module")
def models(hosts):
  return {host.name: host.model for host in hosts}


@pytest.fixture(scope="module")
def server(hosts):
  with serving.started(hosts) as server:
    yield server


@pytest.fixture(scope="module")
def client(server):
  host, port = server.address
  url = f"http://{host}:{port}/v1"
  with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
    yield client


def test_captions_are_those_of_the_model(client, models):
  ask = client.chat.completions.create
  found = ask(
    model="caption",
    messages=serving.messages(serving.png()),
    n=2,
    logprobs=True,
  )
  (best,) = models["caption"].caption(serving.png(), num_return_sequences=2)
  for choice, one in zip(found.choices, (best, *best.others), strict=True):
    assert choice.message.content == one.text
    tokens = choice.logprobs.content
    assert tuple(token.token for token in tokens) == one.tokens
    np.testing.assert_allclose(
      [token.logprob for token in tokens], one.token_log_probs, atol=1e-4
    )
    ended = one.tokens[-1] == "[SEP]"
    assert choice.finish_reason == ("stop" if ended else "length")
  assert found.usage.completion_tokens == len(best.tokens) + len(
    best.others[0].tokens
  )
  assert found.usage.prompt_tokens == 3  # a picture of
  found = ask(
    model="caption",
    messages=serving.messages(serving.png(1), "a red"),
    max_tokens=4,
  )
  (best,) = models["caption"].caption(
    serving.png(1), prompt="a red", max_new_tokens=4
  )
  assert found.choices[0].message.content == best.text


def test_samples_have_the_seed_of_the_request(client, models):
  ask = client.chat.completions.create
  given = dict(model="caption", messages=serving.messages(serving.png()))
  found = ask(**given, temperature=0.7, top_p=0.8, seed=3, n=2)
  (best,) = models["caption"].caption(
    serving.png(),
    sample=True,
    temperature=0.7,
    top_p=0.8,
    seed=3,
    num_return_sequences=2,
  )
  texts = [choice.message.content for choice in found.choices]
  assert texts == [best.text, best.others[0].text]
  free = {
    ask(**given, temperature=1.5).choices[0].message.content for _ in "12345"
  }
  assert len(free) > 1  # without a seed, each has its own
  greedy = ask(**given, temperature=0)
  (best,) = models["caption"].caption(serving.png())
  assert greedy.choices[0].message.content == best.text


def test_questions_are_answered(client, models):
  found = client.chat.completions.create(
    model="vqa",
    messages=serving.messages(serving.png(), "What color is it?"),
    n=3,
    logprobs=True,
  )
  (best,) = models["vqa"].answer(serving.png(), "What color is it?")
  for choice, one in zip(found.choices, (best, *best.others), strict=True):
    assert choice.message.content == one.text
    (whole,) = choice.logprobs.content
    assert whole.token == one.text
    assert whole.logprob == pytest.approx(one.log_prob, abs=1e-4)


def test_embeddings_of_texts_and_images(client, models):
  image = serving.data_url(serving.png(1))
  given = ["a red star", image, "a blue ring"]
  model = models["retrieval"]
  texts = model.embed_texts(["a red star", "a blue ring"])
  expected = np.stack([texts[0], *model.embed_images(serving.png(1)), texts[1]])
  # The client asks for base64 by itself, and decodes it.
  for options in ({}, {"encoding_format": "float"}):
    found = client.embeddings.create(model="retrieval", input=given, **options)
    vectors = np.array([one.embedding for one in found.data])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
  part = {"type": "image_url", "image_url": {"url": image}}
  found = client.embeddings.create(model="retrieval", input=[part])
  np.testing.assert_allclose(found.data[0].embedding, expected[1], atol=1e-5)


def test_a_stream_has_the_same_text(client):
  ask = client.chat.completions.create
  given = dict(model="caption", messages=serving.messages(serving.png()))
  whole = ask(**given)
  *chunks, last = ask(
    **given, stream=True, stream_options={"include_usage": True}
  )
  text = "".join(chunk.choices[0].delta.content for chunk in chunks)
  assert text == whole.choices[0].message.content
  assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
  assert last.usage == whole.usage


def test_what_a_model_cannot_do_names_one_that_can(client):
  image = serving.png()
  with pytest.raises(openai.BadRequestError, match="_caption_capfilt_large"):
    client.chat.completions.create(
      model="retrieval", messages=serving.messages(image)
    )
  with pytest.raises(openai.BadRequestError, match="model_base_retrieval_coco"):
    client.embeddings.create(model="vqa", input="a star")
  with pytest.raises(openai.BadRequestError, match="Ask a question, or use a"):
    client.chat.completions.create(
      model="vqa", messages=serving.messages(image)
    )
  with pytest.raises(openai.BadRequestError, match="by beam search, and not"):
    client.chat.completions.create(
      model="vqa", messages=serving.messages(image, "what?"), temperature=1
    )
  with pytest.raises(openai.NotFoundError, match=r"\['caption', 'vqa'"):
    client.chat.completions.create(
      model="gpt", messages=serving.messages(image)
    )


def test_models_health_and_metrics(client, server):
  names = [model.id for model in client.models.list()]
  assert names == ["caption", "vqa", "retrieval"]
  assert client.models.retrieve("vqa").owned_by == "blip_jax"
  status, body = serving.get(server.address, "/health")
  assert status == 200 and json.loads(body)["status"] == "ok"
  serving.get(server.address, "/no/such/place")
  serving.post(
    server.address, "/v1/chat/completions", serving.chat(serving.png())
  )
  _, body = serving.get(server.address, "/metrics")
  lines = body.decode().splitlines()
  assert any(
    line.startswith('blip_requests_total{endpoint="/v1/chat/completions",')
    for line in lines
  )
  assert 'blip_batch_rows_count{program="caption"}' in body.decode()
  assert "blip_rows 0.0" in lines
  assert "process_resident_memory_bytes" in body.decode()
  assert "/no/such/place" not in body.decode()


def test_names_with_a_slash(hosts):
  """Those of Hugging Face."""
  name = "Salesforce/blip-image-captioning-base"
  host = programs.Host(name, hosts[0].model, serving.LIMITS)
  with serving.started([host]) as server:
    url = "http://{}:{}/v1".format(*server.address)
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
      assert client.models.retrieve(name).id == name
      found = client.chat.completions.create(
        model=name, messages=serving.messages(serving.png())
      )
    assert found.model == name


def test_a_queue_that_is_shorter_than_a_request_is_refused():
  config = defaults.serve()
  config.queue = 63
  with pytest.raises(ValueError, match=r"config\.queue: .*64.*; found 63"):
    service.application(config)


def test_nothing_is_compiled_for_a_request(server, hosts):
  """Programs are shared by prompts, lengths and numbers of beams."""
  bodies = [
    serving.chat(serving.png(number), text, max_tokens=most, n=n)
    for number, (text, most, n) in enumerate(
      [("", 5, 1), ("a", 9, 2), ("a red star near", 1, 3), ("the", 10**9, 1)]
    )
  ]
  send = lambda body: serving.post(server.address, "/v1/chat/completions", body)
  program = programs.Captions(hosts[0])
  for size in programs.sizes(program.most):
    black = np.zeros((16, 16, 3), np.uint8)
    program([(black, 0)] * size)
  before = captioning.generate_captions._cache_size()
  assert [send(body)[0] for body in bodies] == [200] * 4
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert [status for status, *_ in pool.map(send, 2 * bodies)] == [200] * 8
  assert captioning.generate_captions._cache_size() == before


def test_urls_are_fetched_if_that_was_asked_for(hosts, monkeypatch):
  limits = dataclasses.replace(serving.LIMITS, urls=True)
  host = programs.Host("caption", hosts[0].model, limits)
  with pytest.raises(api_error.ApiError, match=r"is not fetched: refused$"):
    inputs.image("http://127.0.0.1/a.png", host, "image")
  with pytest.raises(api_error.ApiError, match=r"data:image/.* or http\(s\)"):
    inputs.image("file:///etc/passwd", host, "image")
  monkeypatch.setattr(urls, "fetch", lambda url: serving.png(1))
  found = inputs.image("https://example.org/a.png", host, "image")
  np.testing.assert_array_equal(found, host.pixels(serving.png(1)))


def test_a_token_is_asked_for(hosts):
  with serving.started(hosts[:1], token="s3cret") as server:
    for shown in (
      "",
      "Bearer wrong",
      "Bearer \xff",
      "s3cret",
      "Bearer s3cret2",
    ):
      for path in ("/v1/models", "/metrics", "/nowhere"):
        status, body = serving.get(server.address, path, Authorization=shown)
        assert status == 401 and b"s3cret" not in body
    shown = {"Authorization": "Bearer s3cret"}
    assert serving.get(server.address, "/v1/models", **shown)[0] == 200
    assert serving.get(server.address, "/health")[0] == 200


def test_the_token_is_in_a_file_or_in_the_environment(tmp_path, monkeypatch):
  monkeypatch.delenv(service.TOKEN, raising=False)
  assert service.read_token("") == ""
  monkeypatch.setenv(service.TOKEN, "one")
  assert service.read_token("") == "one"
  (tmp_path / "token").write_text("two\n")
  assert service.read_token(str(tmp_path / "token")) == "two"
  (tmp_path / "token").write_text("\n")
  with pytest.raises(ValueError, match=r"token_file: .* is empty"):
    service.read_token(str(tmp_path / "token"))


def test_clients_learn_no_path(tmp_path):
  path = tmp_path / "secret" / "run"
  path.mkdir(parents=True)
  model = helpers.make_model("nlvr")
  model = dataclasses.replace(
    model, card=dataclasses.replace(model.card, source=str(path))
  )
  config = defaults.serve()
  (host,) = service.make_hosts(config, {str(path): model})
  assert host.name == "run" and "secret" not in host.model.lacks("caption")
  with pytest.raises(ValueError, match="two models have the name 'run'"):
    service.make_hosts(config, {str(path): model, "gs://bucket/run/": model})
  assert service.public_name("Salesforce/blip-vqa-base").count("/") == 1


def test_without_the_extra_it_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  monkeypatch.delitem(sys.modules, "blip_jax.serve.connections")
  monkeypatch.delattr(serve, "connections")
  with pytest.raises(ImportError, match=r"the service needs .*'\.\[serve\]'"):
    service.serve(defaults.serve(), "unused")


def test_a_port_that_is_in_use_is_named_at_once():
  config = defaults.serve()
  with socket.create_server(("127.0.0.1", 0)) as other:
    config.port = other.getsockname()[1]
    with pytest.raises(ValueError, match=r"config\.port: cannot listen on"):
      service.serve(config, "unused")
