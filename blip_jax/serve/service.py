"""Job `serve`: models as a service with the endpoints of OpenAI's API."""

import dataclasses
import logging
import os
from typing import Any

from blip_jax.inference.model import Model
from blip_jax.runtime import config as run_config
from blip_jax.runtime import devices, files
from blip_jax.runtime.config import Config
from blip_jax.serve import demo, ports, programs

log = logging.getLogger(__name__)

# Of the token that clients show.
TOKEN = "BLIP_JAX_SERVE_TOKEN"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(config: Config, workdir: str) -> dict[str, float]:
  """Serves until SIGTERM or Ctrl-C, and then finishes what it has taken.

  Args:
    config: from `defaults.serve`.
    workdir: unused.

  Returns:
    Nothing: no metrics.

  Raises:
    ImportError: the extra [serve] is not installed.
    ValueError: the port is in use, or as `application`.
  """
  _, connections = _import_server()
  run_config.at_least(1, config, "connections", "head_s")
  ports.check(config.host, config.port)
  app = application(config)
  port = config.port or ports.free(config.host)
  url = f"http://{ports.address(config.host, port)}/v1"
  server = connections.Server(
    app,
    config.host,
    port,
    config.connections,
    float(config.head_s),
    float(config.body_s + config.deadline_s),
    lambda: print(f"The service is at {url} ; Ctrl-C ends it", flush=True),
  )
  server.run()
  return {}


def application(config: Config) -> Any:
  """The service as an ASGI application, for other servers than ours.

  Loads the models, and compiles their programs.

  Raises:
    ImportError: the extra [serve] is not installed.
    ValueError: a model cannot be loaded, or the token file is empty.
  """
  app_lib, _ = _import_server()
  run_config.at_least(0, config, "batch_size", "wait_ms")
  run_config.at_least(1, config, "queue", "deadline_s", "body_s", "max_mb")
  run_config.at_least(
    1, config, "max_megapixels", "max_inputs", "max_n", "max_tokens"
  )
  if config.max_inputs > config.queue:
    # No time would ever come at which that request is taken.
    raise ValueError(
      f"config.queue: expected at least config.max_inputs, {config.max_inputs}"
      f", for each of them is a row; found {config.queue}"
    )
  token = read_token(config.token_file)
  if not token and config.host not in _LOOPBACK:
    log.warning(
      "config.host=%s: whoever reaches it is served; set %s, or "
      "config.token_file, to ask for a token",
      *(config.host, TOKEN),
    )
  hosts = make_hosts(config, demo.load_models(config))
  for host in hosts:
    programs.warm_up(host)
  bounds = app_lib.Bounds(
    queue=config.queue,
    patience=config.wait_ms / 1000,
    deadline=float(config.deadline_s),
    max_body=config.max_mb << 20,
    body_seconds=float(config.body_s),
  )
  return app_lib.build(hosts, bounds, token)


def _import_server() -> tuple[Any, Any]:
  try:
    from blip_jax.serve import app, connections
  except ImportError as error:
    raise ImportError(
      "the service needs Starlette, uvicorn, pydantic and prometheus_client: "
      "pip install 'blip_jax[serve]' (from a checkout, pip install -e "
      f"'.[serve]'); {error}"
    ) from error
  return app, connections


def read_token(path: str) -> str:
  """The token that clients have to show; "" if there is none.

  Args:
    path: of a file; "": the environment may have it.

  Raises:
    ValueError: the file is empty.
  """
  if not path:
    return os.environ.get(TOKEN, "").strip()
  token = files.read_bytes(path).decode(errors="replace").strip()
  if not token:
    raise ValueError(f"config.token_file: {path} is empty; expected a token")
  return token


def make_hosts(config: Config, models: dict[str, Model]) -> list[programs.Host]:
  """Models under the names by which clients ask for them.

  Raises:
    ValueError: two have the same name.
  """
  hosts = []
  for path, model in models.items():
    name = public_name(path)
    if name in (host.name for host in hosts):
      raise ValueError(
        f"config.model: two models have the name {name!r}; rename a folder"
      )
    most = devices.images_per_batch(model.mesh.devices)
    limits = programs.Limits(
      batch_size=config.batch_size or most,
      max_n=config.max_n,
      max_tokens=config.max_tokens,
      max_inputs=config.max_inputs,
      max_pixels=config.max_megapixels * 1_000_000,
      urls=config.urls,
    )
    # Errors quote it, and clients must not learn where files are.
    card = dataclasses.replace(model.card, source=name)
    model = dataclasses.replace(model, card=card)
    hosts.append(programs.Host(name, model, limits))
  return hosts


def public_name(path: str) -> str:
  """The last part of a path; the name of a released checkpoint as it is."""
  if "://" in path or files.exists(path):
    return os.path.basename(path.rstrip("/"))
  return path
