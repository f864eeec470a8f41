"""What is below a folder: each folder once, whatever links lead to it."""

import collections
import os
from collections.abc import Callable, Iterator

from blip_jax.runtime import files


def walk(
  root: str, fail: Callable[[str, OSError], None]
) -> Iterator[tuple[str, list[str]]]:
  """Yields folders, relative to `root`, and the names of the files in each.

  Hidden ones are skipped. Many links may lead to a folder, also in circles. It
  is listed once: where it is, or else, if that is not below `root`, by the
  first link to it.

  Args:
    root: the folder; it comes first, as "".
    fail: called with a folder that cannot be listed, and the error; may raise.
  """
  seen: set[str] = set()
  # Of each folder, the path relative to `root`, and where that leads.
  folders, links = [("", files.real_path(root))], collections.deque()
  while folders or links:
    folder, real = folders.pop() if folders else links.popleft()
    if real in seen:
      continue
    seen.add(real)
    try:
      entries = files.entries(os.path.join(root, folder) if folder else root)
    except OSError as error:
      fail(folder, error)
      continue
    names = []
    for name, is_folder, is_link in entries:
      path = os.path.join(folder, name)
      if name.startswith("."):
        continue
      if not is_folder:
        names.append(name)
      elif is_link:
        links.append((path, files.real_path(os.path.join(root, path))))
      else:
        folders.append((path, os.path.join(real, name)))
    yield folder, names


def glob(pattern: str) -> list[str]:
  """Paths that match a pattern with `*`, `?`, `[]` or `**`, sorted.

  For `**`, each folder is searched once, as in `walk`.
  """
  parts = pattern.split("/")
  if "**" not in parts:
    return files.glob(pattern)
  at = parts.index("**")
  head, tail = "/".join(parts[:at]), "/".join(parts[at + 1 :]) or "*"
  head = head or ("/" if at else "")
  found: set[str] = set()
  for base in files.glob(head) if files.has_magic(head) else [head]:
    if files.is_folder(base or "."):
      for folder, _ in walk(base or ".", lambda *_: None):
        path = files.escape(os.path.join(base, folder))
        found.update(glob(os.path.join(path, tail)))
  return sorted(found)
