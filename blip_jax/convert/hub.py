"""Finds a checkpoint's files: on disk, on the Hugging Face hub, or by URL.

A download that is cut goes on where it stopped, now or in a later run, and a
file gets its name only when it is whole: what lies in the cache is complete.
"""

import hashlib
import http.client
import logging
import os
import pathlib
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request

import filelock
import tqdm

from blip_jax.convert import registry

log = logging.getLogger(__name__)

# Seconds before each further try, once a line fails without any progress.
_WAITS = (1, 2, 4)
_TIMEOUT = 30  # seconds in which nothing arrives
_CHUNK = 1 << 18  # bytes

# Answers after which a server may well give the file a little later.
_TRANSIENT = (408, 429, 500, 502, 503, 504)

_HUB_FILES = (
  "config.json",
  "generation_config.json",
  "preprocessor_config.json",
  "vocab.txt",
  "tokenizer*.json",
  "special_tokens_map.json",
)
# Many repositories have both, which are gigabytes of the same numbers.
_HUB_WEIGHTS = (
  ("model.safetensors*", "model-*.safetensors"),
  ("pytorch_model.bin*", "pytorch_model-*.bin"),
)

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WEIGHT_FILE = re.compile(r".*\.(pth?|bin|ckpt|safetensors)")


class _LineError(Exception):
  """What was asked for did not arrive (whole); another try may help."""


def fetch(name_or_path: str | os.PathLike) -> pathlib.Path:
  """Finds a checkpoint, and downloads it if it is not here.

  Args:
    name_or_path: in the order in which it is tried:
      a file or folder, which is returned as it is;
      a name in `registry.RELEASED` or an http(s) URL, which is downloaded to
      `cache_dir()` once;
      a repository on the Hugging Face hub ("Owner/name"), of which the configs,
      the vocabulary and one format of the weights go to the hub's own cache.

  Returns:
    A file, or for a repository a folder.

  Raises:
    ValueError: there is no such checkpoint, or it cannot be downloaded; says
      what to do without network.
  """
  name = os.fspath(name_or_path)
  if os.path.exists(name):
    return pathlib.Path(name)
  released = registry.find(name)
  source = released.source if released else name
  if source.startswith(("http://", "https://")):
    return _from_url(source, released)
  if _HUB_NAME.fullmatch(source) and not _WEIGHT_FILE.fullmatch(source):
    return _from_hub(source)
  raise ValueError(
    f"{name!r} is neither a file or folder here, nor the name of a released "
    "checkpoint (blip_jax/convert/registry.py lists them), nor an http(s) URL, "
    "nor a repository on the Hugging Face hub (Owner/name)"
    + _suggestion(source)
  )


def cache_dir() -> pathlib.Path:
  """Where downloaded files are kept.

  `$BLIP_JAX_CACHE`, else `$XDG_CACHE_HOME/blip_jax`, else `~/.cache/blip_jax`.
  """
  if folder := os.environ.get("BLIP_JAX_CACHE"):
    return pathlib.Path(folder).expanduser()
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(root) / "blip_jax"


def _suggestion(name: str) -> str:
  names = [] if registry.find(name) else registry.nearest(name)
  return f". Did you mean {' or '.join(names)}?" if names else ""


def _from_hub(name: str) -> pathlib.Path:
  # It takes a second to import, and files on disk can do without.
  import huggingface_hub
  from huggingface_hub import errors

  try:
    for weights in _HUB_WEIGHTS:
      folder = huggingface_hub.snapshot_download(
        name, allow_patterns=[*_HUB_FILES, *weights]
      )
      folder = pathlib.Path(folder)
      if [file for pattern in weights for file in folder.glob(pattern)]:
        return folder
  except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
    raise ValueError(
      f"{name!r} is neither a file or folder here nor a repository that the "
      f"Hugging Face hub shows ({_reason(error)})" + _suggestion(name)
    ) from error
  # Nothing else is common to the errors of the hub and of its HTTP client.
  except Exception as error:
    cache = pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE)
    cache /= f"models--{name.replace('/', '--')}"
    raise ValueError(
      f"{name!r} is no file or folder here, and cannot be fetched from the "
      f"Hugging Face hub ({_reason(error)}). Without network: run `hf download "
      f"{name} --local-dir FOLDER` on another machine, copy FOLDER here and "
      f"pass its path; or copy that machine's {cache.name} to {cache}"
      + _suggestion(name)
    ) from error
  patterns = ", ".join(pattern for row in _HUB_WEIGHTS for pattern in row)
  raise ValueError(
    f"{name}: no weights in this repository: expected one of {patterns}, found "
    f"only {sorted(file.name for file in folder.glob('*'))}"
  )


def _from_url(url: str, released: registry.Released | None) -> pathlib.Path:
  target = cache_dir() / _file_name(url, released)
  if target.exists():
    return target
  _make_writable(target.parent)
  with filelock.FileLock(f"{target}.lock"):
    # Another process may have had the lock for as long as the download took.
    if not target.exists():
      _download(url, released, target)
  return target


def _file_name(url: str, released: registry.Released | None) -> str:
  """A name that no server can choose to lie elsewhere or replace another's."""
  path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
  name = re.sub(r"[^\w.-]", "_", path.rsplit("/", 1)[-1], flags=re.ASCII)[-100:]
  if released:
    return name
  return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"


def _make_writable(folder: pathlib.Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
    writable = os.access(folder, os.W_OK)
  except OSError:
    writable = False
  if not writable:
    raise ValueError(
      f"{folder} cannot be written, and downloads are kept there; set "
      "BLIP_JAX_CACHE to a folder that can"
    )


def _download(
  url: str, released: registry.Released | None, target: pathlib.Path
) -> None:
  part = target.with_name(f"{target.name}.part")
  log.info("Downloading %s to %s", url, target)
  most, waits = _size(part), iter(_WAITS)
  while True:
    try:
      _transfer(url, part)
      break
    except _LineError as error:
      if _size(part) > most:
        most, waits = _size(part), iter(_WAITS)
      wait = next(waits, None)
      if wait is None:
        raise ValueError(
          f"{url} cannot be downloaded: {error}. Without network: download it "
          f"on another machine and put it at {target}, or pass the path of the "
          f"copy." + _kept(part)
        ) from error
      log.warning("%s: %s. Trying again in %s s.", url, error, wait)
      time.sleep(wait)
  with open(part, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  if released and not released.has_digest(digest):
    part.unlink()
    expected = "...".join(filter(None, released.sha256))
    raise ValueError(
      f"{url}: expected SHA-256 {expected}, found {digest}. The download was "
      "removed; try again, or, if you trust the file, get it yourself and pass "
      "its path"
    )
  log.info("%s: %d bytes, SHA-256 %s", target, _size(part), digest)
  os.replace(part, target)
  _tag_file(part).unlink()


def _kept(part: pathlib.Path) -> str:
  if not _size(part) or not _size(_tag_file(part)):
    return ""
  return (
    f" What has arrived ({_size(part)} bytes) is kept in {part} and continued "
    "next time."
  )


def _transfer(url: str, part: pathlib.Path) -> None:
  """Appends to `part` what it lacks, or writes it anew if the file changed."""
  tag = _tag_file(part)
  etag = tag.read_text() if tag.exists() else ""
  done = _size(part) if etag else 0
  with _ask(url, done, etag) or _ask(url, 0, "") as response:
    _receive(response, part)


def _ask(url: str, done: int, etag: str) -> http.client.HTTPResponse | None:
  """Asks for all bytes from `done`; None if the answer does not fit there.

  A file that is no longer the one of `etag` is answered as a whole.
  """
  headers = {"Range": f"bytes={done}-", "If-Range": etag} if done else {}
  request = urllib.request.Request(url, headers=headers)
  try:
    response = urllib.request.urlopen(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:
    with error:
      if error.code == 416 and done:
        return None
      answer = f"the server answered {error.code} {error.reason}"
      if error.code in _TRANSIENT:
        raise _LineError(answer) from error
      raise ValueError(
        f"{url}: {answer}; check the address, or pass the path of a copy"
      ) from error
  except (OSError, http.client.HTTPException) as error:
    raise _LineError(f"no connection ({_reason(error)})") from error
  if response.status == 200:
    return response
  # Not every server knows If-Range: it may send the rest of another file.
  start = response.headers.get("Content-Range", "")
  if (
    response.status == 206
    and _etag(response) == etag
    and start.startswith(f"bytes {done}-")
  ):
    return response
  response.close()
  if done:
    return None
  raise _LineError(f"the server answered {response.status}, expected 200")


def _receive(response: http.client.HTTPResponse, part: pathlib.Path) -> None:
  done = _size(part) if response.status == 206 else 0
  total = None if response.length is None else done + response.length
  chunk = _read(response)
  # Before anything is written: what is here must survive a login page.
  _refuse_web_page(response, chunk)
  if total is not None:
    _check_space(part, total)
  with open(part, "ab" if done else "wb") as file:
    # Second to the truncation, or a new tag could stand beside old bytes.
    _tag_file(part).write_text(_etag(response))
    with tqdm.tqdm(
      desc=part.stem,
      total=total,
      initial=done,
      unit="B",
      unit_scale=True,
      disable=None,  # shown on a terminal only
    ) as bar:
      while chunk:
        file.write(chunk)
        bar.update(len(chunk))
        chunk = _read(response)
  if total is not None and _size(part) != total:
    raise _LineError(f"cut after {_size(part)} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
  try:
    return response.read(_CHUNK)
  except (OSError, http.client.HTTPException) as error:
    raise _LineError(f"connection lost ({_reason(error)})") from error


def _refuse_web_page(response: http.client.HTTPResponse, head: bytes) -> None:
  tags = (b"<!doctype", b"<html", b"<?xml")
  if response.headers.get_content_type() == "text/html" or (
    head[:1024].lstrip().lower().startswith(tags)
  ):
    raise ValueError(
      f"{response.url}: expected a file of weights, found a web page. Open the "
      "address in a browser: the network may want a log-in, or the file may be "
      "offered behind another link"
    )


def _check_space(part: pathlib.Path, total: int) -> None:
  lacking = total - _size(part)
  free = shutil.disk_usage(part.parent).free
  if lacking > free:
    raise ValueError(
      f"{part.parent} has {free / 1e9:.1f} GB free, and {part.stem} needs "
      f"{lacking / 1e9:.1f} GB there; set BLIP_JAX_CACHE to a folder on a "
      "larger disk"
    )


def _etag(response: http.client.HTTPResponse) -> str:
  """What tells this file from a later one; "" if nothing does.

  A weak tag may stay the same when bytes change, so it does not.
  """
  etag = response.headers.get("ETag", "W/")
  if not etag.startswith("W/"):
    return etag
  return response.headers.get("Last-Modified", "")


def _tag_file(part: pathlib.Path) -> pathlib.Path:
  return part.with_name(f"{part.name}.etag")


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
  reason = getattr(error, "reason", None) or error
  return (str(reason).strip() or type(error).__name__).splitlines()[0]
