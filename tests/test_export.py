"""Exported programs: the same outputs from the file alone."""

import contextlib
import dataclasses
import importlib.metadata
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from blip_jax.tools import convert_checkpoint, export

import blip_jax
from blip_jax.export import artifacts, formats, int8, outside, programs
from blip_jax.models import placement
from tests import helpers

NAMES = ("blip_decoder", "blip_vqa", "blip_retrieval", "blip_nlvr")

# What jax2onnx does there is `test_a_jax_that_jax2onnx_cannot_read_is_named`.
reads_jax = pytest.mark.skipif(
  jax.__version_info__ >= (0, 11),
  reason="jax2onnx 0.13.0 cannot read programs of jax 0.11 and newer",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  return {name: helpers.write_golden(name, folder / name) for name in NAMES}


def pixels_of(image, side):
  """As the sidecar says: resized, and nothing more."""
  return np.asarray(
    image.resize((side, side), PIL.Image.Resampling.BICUBIC), np.uint8
  )


@pytest.mark.parametrize(
  "format",
  [
    "stablehlo",
    pytest.param("onnx", marks=reads_jax),
    pytest.param("openvino", marks=reads_jax),
  ],
)
def test_captions_of_an_exported_model(
  models, tmp_path, capsys, caplog, format
):
  """Beam search included, from an image to the words of the vocabulary."""
  out = tmp_path / "out"
  words = [models["blip_decoder"], str(out), "--format", format]
  words += ["--programs", "caption", "--num-beams", "2", "--max-length", "9"]
  assert export.main(words) == 0
  printed = capsys.readouterr().out
  assert "caption: largest differences" in printed and str(out) in printed
  assert "Traceback" not in caplog.text  # of what jax2onnx does without
  said = json.loads((out / "caption.json").read_text())
  assert said["differences"]["ids"] == 0
  assert said["differences"]["scores"] < 1e-5
  assert said["generation"]["num_beams"] == 2
  (shape,) = (each["shape"] for each in said["inputs"].values())
  assert shape == ["batch" if format == "stablehlo" else 1, 32, 32, 3]

  image = PIL.Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  )
  batches = pixels_of(image, shape[1])[None, None]
  np.savez(tmp_path / "inputs.npz", batches)
  ending = "xml" if format == "openvino" else format
  outside.main(format, str(out / f"caption.{ending}"), str(tmp_path))
  with np.load(tmp_path / "outputs.npz") as found:
    ids = found["arr_0"][0, 0, 0].tolist()
  vocabulary = (out / "vocab.txt").read_text().splitlines()
  model = blip_jax.load(models["blip_decoder"])
  (caption,) = model.caption(image, num_beams=2, max_length=9)
  tokens = [vocabulary[id] for id in ids if id < len(vocabulary)]
  assert all(token in tokens for token in caption.tokens)


@pytest.mark.parametrize(
  "format, name, expected",
  [
    ("stablehlo", "blip_vqa", {"encode", "answer"}),
    ("stablehlo", "blip_retrieval", {"encode", "match"}),
    *(
      pytest.param(format, *case, marks=[pytest.mark.slow, reads_jax])
      for format in ("onnx", "openvino")
      for case in (
        ("blip_vqa", {"encode", "answer"}),
        ("blip_retrieval", {"encode", "match"}),
      )
    ),
  ],
)
def test_programs_of_the_other_families(
  models, tmp_path, format, name, expected
):
  out = tmp_path / "out"
  assert export.main([models[name], str(out), "--format", format]) == 0
  ending = "xml" if format == "openvino" else format
  assert {path.stem for path in out.glob(f"*.{ending}")} == expected
  for name in expected:
    said = json.loads((out / f"{name}.json").read_text())
    assert max(said["differences"].values()) < 1e-4
    assert said["preprocessing"] and said["versions"]["jax"]


def test_matches_are_those_of_the_model(models, tmp_path):
  """The programs compare themselves with functions of their own."""
  model = blip_jax.load(models["blip_retrieval"])
  (program,) = programs.programs_of(model, ["match"])
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  text = "two red circles"
  tokens = model.matcher.tokens(text)
  length = program.inputs["input_ids"][0][0]
  pad = lambda x: np.pad(x, ((0, 0), (0, length - x.shape[1])))
  prob, cosine, *_ = jax.jit(program.function)(
    image[None], pad(tokens.input_ids), pad(tokens.attention_mask)
  )
  match = model.match(image, text)
  assert float(prob[0]) == pytest.approx(float(match.itm_prob[0, 0]), abs=1e-5)
  assert float(cosine[0]) == pytest.approx(
    float(match.itc_cosine[0, 0]), abs=1e-5
  )


@reads_jax
def test_rounded_weights_are_smaller_and_their_cost_is_stated(
  models, tmp_path, capsys
):
  sizes = {}
  for weights in ("float32", "int8"):
    out = tmp_path / weights
    words = [models["blip_retrieval"], str(out), "--format", "onnx"]
    words += ["--programs", "encode", "--weights", weights]
    assert export.main(words) == 0
    sizes[weights] = (out / "encode.onnx").stat().st_size
  said = json.loads((out / "encode.json").read_text())
  assert said["weights"] == "int8"
  assert 1e-4 < said["differences"]["image_tokens"] < 0.1
  cost = f"image_tokens       {said['differences']['image_tokens']:.1e}"
  assert cost in capsys.readouterr().out
  assert sizes["int8"] < 0.5 * sizes["float32"]


def test_rounding_keeps_the_better_of_rows_and_columns():
  """Half a step at most, where the steps are those of rows or of columns."""
  onnx, onnxruntime = map(pytest.importorskip, ("onnx", "onnxruntime"))
  x = np.random.default_rng(0).normal(size=(3, 40, 30)).astype(np.float32)
  x[:, 5] *= 100  # rows share no scale with this one
  graph = onnx.helper.make_graph(
    [onnx.helper.make_node("Identity", ["x"], ["y"])],
    "g",
    [],
    [onnx.helper.make_tensor_value_info("y", 1, x.shape)],
    [onnx.numpy_helper.from_array(x, "x")],
  )
  opset = onnx.helper.make_opsetid("", 21)
  model = onnx.helper.make_model(graph, opset_imports=[opset])
  int8.quantise(model)
  session = onnxruntime.InferenceSession(model.SerializeToString())
  (y,) = session.run(None, {})
  step = np.abs(x).max(axis=2, keepdims=True) / 127
  assert (np.abs(y - x) <= 0.501 * step).all() and (y != x).any()


@reads_jax
def test_an_operation_that_a_format_lacks_is_named(models, tmp_path):
  model = blip_jax.load(models["blip_decoder"])
  (program,) = programs.programs_of(model, ["encode"])
  rounded = dataclasses.replace(
    program, function=lambda x: (jnp.linalg.eigh(x[0, ..., 0] / 255.0)[0],)
  )
  with pytest.raises(ValueError, match="encode: not in ONNX: eigh "):
    artifacts.write(model, [rounded], tmp_path / "out", "onnx", 1)
  assert not [*tmp_path.iterdir()]


def test_the_layout_of_hugging_face(models, tmp_path):
  """The same folder as from `convert_checkpoint`."""
  folders = tmp_path / "one", tmp_path / "other"
  words = [models["blip_retrieval"], str(folders[0]), "--task", "itm"]
  assert export.main([*words, "--format", "hf"]) == 0
  words[1] = str(folders[1])
  assert convert_checkpoint.main([*words, "--layout", "hf"]) == 0
  one, other = (
    {path.name: path.read_bytes() for path in folder.iterdir()}
    for folder in folders
  )
  assert one == other and "config.json" in one


def test_an_exported_program_suits_any_device(models, monkeypatch):
  """The loop over images is for the CPU that a model was loaded onto."""
  monkeypatch.setattr(placement, "_CACHED_BYTES", 0)
  model = blip_jax.load(models["blip_decoder"])
  assert model.module.config.vit.images_at_once == 1
  (program,) = programs.programs_of(model, ["encode"])
  jaxpr = jax.make_jaxpr(program.function)(*program.specs(4))
  assert str(jaxpr).count("scan[") == 1  # over the layers


def test_what_differs_is_not_written(models, tmp_path, monkeypatch):
  model = blip_jax.load(models["blip_decoder"])
  chosen = programs.programs_of(model, ["encode"])

  def wrong(path, format, inputs):
    (pixels,) = inputs
    return [np.stack([jax.jit(chosen[0].function)(x)[0] for x in pixels]) + 1]

  monkeypatch.setattr(artifacts, "_run_elsewhere", wrong)
  with pytest.raises(ValueError, match=r"encode: outputs differ.*image_tokens"):
    artifacts.write(model, chosen, tmp_path / "out", "stablehlo", 1)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  "words, expected",
  [
    (["blip_nlvr", "--format", "stablehlo"], "no such program"),
    (
      ["blip_decoder", "--format", "stablehlo", "--programs", "match"],
      "'match'",
    ),
    (
      ["blip_decoder", "--format", "stablehlo", "--batch-size", "2"],
      "any size",
    ),
    (["blip_decoder", "--format", "hf", "--batch-size", "2"], "--batch-size"),
    (
      ["blip_retrieval", "--format", "stablehlo", "--num-beams", "3"],
      "['encode', 'match'] generate nothing",
    ),
    (["blip_decoder", "--format", "stablehlo", "--num-beams", "0"], "num_beam"),
    (
      ["blip_decoder", "--format", "stablehlo", "--weights", "int8"],
      "expected one of ['float32'], of --format stablehlo",
    ),
    (
      ["blip_decoder", "--format", "hf", "--num-beams", "3"],
      "not its programs",
    ),
  ],
)
def test_mistakes(models, tmp_path, capsys, words, expected):
  name, *flags = words
  assert export.main([models[name], str(tmp_path / "out"), *flags]) == 1
  assert expected in capsys.readouterr().err
  assert not [*tmp_path.iterdir()]


@reads_jax
@pytest.mark.parametrize("rows", ["0", "-3", "1000000000"])
def test_batches_that_cannot_be_compared(tmp_path, capsys, rows):
  words = ["absent", str(tmp_path / "out"), "--format", "onnx"]
  assert export.main([*words, "--batch-size", rows]) == 1
  expected = f"--batch-size: expected 1 to 4096, found {rows}"
  assert expected in capsys.readouterr().err


def test_a_model_without_a_vocabulary_is_refused(models):
  model = blip_jax.load(models["blip_decoder"])
  mute = dataclasses.replace(model, tokenizer=None)
  with pytest.raises(ValueError, match="no vocabulary, so it cannot caption"):
    programs.programs_of(mute, ["caption"])
  (program,) = programs.programs_of(mute, ["encode", "encode"])
  assert program.name == "encode"


def test_an_existing_folder_is_left_as_it_is(tmp_path, capsys):
  """Which is found out before a model is loaded."""
  words = ["absent", str(tmp_path), "--format", "stablehlo"]
  assert export.main([*words, "--programs", "encode"]) == 1
  assert "exists already" in capsys.readouterr().err


def test_what_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "flatbuffers", None)
  words = ["absent", str(tmp_path / "out"), "--format", "stablehlo"]
  assert export.main(words) == 1
  assert "pip install -e '.[stablehlo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
  "jax_version, version, can",
  [
    ((0, 10, 2), "0.13.0", True),
    ((0, 11, 2), "0.13.0", False),
    ((0, 11, 2), "0.17.1", True),
    ((0, 12, 0), "0.17.1", False),
  ],
)
def test_which_jax2onnx_reads_which_jax(monkeypatch, jax_version, version, can):
  monkeypatch.setattr(jax, "__version_info__", jax_version)
  monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
  refused = pytest.raises(ValueError, match=f"jax2onnx {version} cannot read")
  with contextlib.nullcontext() if can else refused:
    formats.check_jax2onnx("onnx")


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_jax_that_jax2onnx_cannot_read_is_named(
  tmp_path, capsys, monkeypatch, format
):
  """Before any work: there is no such model. On a new JAX it is real."""
  if jax.__version_info__ < (0, 11):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jax, "__version__", "0.12.0")
  words = ["absent", str(tmp_path / "out"), "--format", format]
  assert export.main(words) == 1
  assert capsys.readouterr().err.strip() == (
    f"error: --format {format}: jax2onnx 0.13.0 cannot read programs of jax "
    f"{jax.__version__}; expected jax 0.10, which pip install -e "
    f"'.[{format}]' brings"
  )


def test_openvino_reports_nothing(tmp_path):
  """Importing it alone would, and would leave a number for this user."""
  code = (
    "from blip_jax.export import formats; formats.openvino()\n"
    "import sys; assert 'openvino' in sys.modules\n"
    "assert sys.modules['openvino_telemetry'] is None"
  )
  environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
  subprocess.run([sys.executable, "-c", code], env=environment, check=True)
  assert not [*tmp_path.glob("intel/*")]
