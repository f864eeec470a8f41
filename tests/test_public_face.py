"""What `import blip_jax` offers, and what it costs."""

import ast
import inspect
import pydoc
import subprocess
import sys

import pytest

import blip_jax
from blip_jax.inference import (
  answering,
  captioning,
  choosing,
  comparing,
  explanation,
  images,
  loading,
  matching,
  pipelines,
)
from blip_jax.inference import model as model_lib

PUBLIC = {
  "Answer": answering.Answer,
  "Caption": captioning.Caption,
  "Choice": choosing.Choice,
  "Comparison": comparing.Comparison,
  "Dialog": choosing.Dialog,
  "Explanation": explanation.Explanation,
  "HiddenStates": matching.HiddenStates,
  "Image": images.Image,
  "ImageReader": images.ImageReader,
  "Match": matching.Match,
  "Model": model_lib.Model,
  "load": loading.load,
  "pipeline": pipelines.pipeline,
}


def run(code):
  """What a fresh interpreter prints."""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_public_names_are_those_of_their_modules():
  assert set(blip_jax.__all__) == {*PUBLIC, "__version__"}
  for name, value in PUBLIC.items():
    assert getattr(blip_jax, name) is value


def test_from_imports_work_in_a_fresh_process():
  names = ", ".join(PUBLIC)
  code = f"from blip_jax import {names}; print(Model.__name__, load.__name__)"
  assert run(code) == "Model load\n"


def test_the_import_loads_neither_jax_nor_transformers():
  """Nor anything else that is heavy, so that it takes a moment."""
  code = (
    "import time\n"
    "start = time.process_time()\n"
    "import blip_jax, sys\n"
    "seconds = time.process_time() - start\n"
    "heavy = {'jax', 'flax', 'numpy', 'torch', 'transformers', 'PIL'}\n"
    "print(sorted(heavy & sys.modules.keys()), seconds < 0.2)\n"
    "print(set(blip_jax.__all__) <= set(dir(blip_jax)))\n"
    "print(sorted(heavy & sys.modules.keys()))\n"
  )
  assert run(code) == "[] True\nTrue\n[]\n"


def test_help_of_the_package_lists_what_it_offers():
  text = pydoc.render_doc(blip_jax, renderer=pydoc.plaintext)
  for name in PUBLIC:
    assert name in text
  assert "class Model" in text and "load(" in text
  assert "caption(self" in text


def test_public_classes_and_methods_are_documented():
  for name in sorted(PUBLIC.keys() - {"Image", "load", "pipeline"}):
    public = getattr(blip_jax, name)
    assert "Attributes:" in inspect.getdoc(public)
    # Of a dataclass, the generated one is its signature.
    assert not inspect.getdoc(public).startswith(f"{name}(")
    for method, function in inspect.getmembers(public, inspect.isfunction):
      if not method.startswith("_"):
        text = inspect.getdoc(function)
        assert text, method
  for function in (
    loading.load,
    pipelines.pipeline,
    model_lib.Model.caption,
    model_lib.Model.captioner,
    model_lib.Model.match,
    model_lib.Model.embed_images,
    model_lib.Model.embed_texts,
    model_lib.Model.features,
  ):
    text = inspect.getdoc(function)
    assert "Raises:" in text
    for parameter in inspect.signature(function).parameters:
      assert parameter == "self" or f"{parameter}:" in text, parameter


def test_type_checkers_see_every_public_name():
  """They read the imports that are not executed, and `__all__`."""
  tree = ast.parse(inspect.getsource(blip_jax))
  (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
  imports = {
    alias.name: node.module
    for node in guarded.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
  }
  assert imports == blip_jax._MODULES
  assert imports.keys() == PUBLIC.keys()


def test_unknown_names_are_attribute_errors():
  with pytest.raises(AttributeError, match="has no attribute 'Modell'"):
    _ = blip_jax.Modell


def test_jobs_import_neither_tensorflow_nor_torch():
  """Each would cost a start seconds, and its memory."""
  code = (
    "import sys, blip_jax.main\n"
    "print(sorted({'tensorflow', 'torch'} & sys.modules.keys()))\n"
  )
  assert run(code) == "[]\n"
