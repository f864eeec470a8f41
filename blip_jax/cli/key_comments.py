"""What the comments in the files of a config say about its keys.

A config is made by plain functions: nested calls of `dict`, assignments to
keys, and calls of functions that return or change a config. Their source text
is followed here as far as that goes, so that a comment belongs to the complete
name of a key: next to its value, or on the lines directly above it.
"""

import ast
import functools
import importlib.util
import io
import tokenize
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from blip_jax.runtime import files

Key = tuple[str, ...]
# A part of a key that only the run knows, as in `config.evals[name]`.
_ANY = "*"


class Notes(NamedTuple):
  """Comments on a config, or on one of its sections.

  Attributes:
    by_key: shared by all sections of a config, in the order of the text.
    section: key of the section; empty for all of the config.
  """

  by_key: dict[Key, list[str]]
  section: Key = ()

  def at(self, *names: str) -> "Notes":
    return Notes(self.by_key, (*self.section, *names))

  def add(self, comment: str) -> None:
    if comment:
      self.by_key.setdefault(self.section, []).append(comment)

  def include(self, other: "Notes") -> None:
    """Copies the comments on the keys of a section that becomes this one."""
    start = len(other.section)
    for key, comments in [*other.by_key.items()]:
      if len(key) > start and key[:start] == other.section:
        for comment in comments:
          self.at(*key[start:]).add(comment)

  def of(self, key: str) -> str:
    """What is said about a dotted key; "" if nothing is."""
    parts = tuple(key.split("."))
    said = [
      comment
      for known, comments in self.by_key.items()
      if len(known) == len(parts)
      and all(k in (part, _ANY) for k, part in zip(known, parts, strict=True))
      for comment in comments
    ]
    return _joined(dict.fromkeys(said))


def of_file(path: str) -> Notes:
  """The comments on the config of a file with a function `get_config`."""
  text = _Text(path)
  if "get_config" not in text.functions:
    return Notes({})
  return _follow(text, "get_config", {}) or Notes({})


def _joined(comments: Iterable[str]) -> str:
  """Sentences after each other, and phrases with a semicolon."""
  text = ""
  for comment in filter(None, comments):
    if text:
      text += " " if text.endswith(".") else "; "
    text += comment
  return text


class _Text:
  """The text of a Python file: its functions, imports and comments."""

  def __init__(self, path: str):
    source = files.read_text(path)
    tree = ast.parse(source)
    self.functions = {
      node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)
    }
    self._imports = dict(_imports(tree.body))
    self.above: dict[int, str] = {}  # comments on lines of their own
    self.behind: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
      if token.type == tokenize.COMMENT:
        alone = not token.line[: token.start[1]].strip()
        comments = self.above if alone else self.behind
        comments[token.start[0]] = " ".join(token.string.lstrip("#").split())

  def called(self, function: ast.expr) -> "tuple[_Text, str] | None":
    """Where a function is defined, and its name there; None if unknown."""
    if isinstance(function, ast.Name) and function.id in self.functions:
      return self, function.id
    *modules, name = ast.unparse(function).split(".")
    if not modules:
      module, _, name = self._imports.get(name, "").rpartition(".")
    else:
      module = self._imports.get(".".join(modules), "")
    path = _source(module)
    return (_text(path), name) if path else None


_text = functools.cache(_Text)


def _imports(body: Iterable[ast.stmt]) -> Iterator[tuple[str, str]]:
  """Yields the names that imports define, and what they stand for."""
  for node in body:
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.asname or alias.name, alias.name
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        yield alias.asname or alias.name, f"{node.module}.{alias.name}"


@functools.cache
def _source(module: str) -> str:
  """The file of a module; "" if it has none."""
  try:
    spec = importlib.util.find_spec(module) if module else None
  except (ImportError, ValueError):
    spec = None
  origin = (spec and spec.origin) or ""
  return origin if origin.endswith(".py") else ""


def _follow(text: _Text, name: str, given: dict[str, Notes]) -> Notes | None:
  """Follows a function; returns the notes of the config that it returns.

  Args:
    text: of the file of the function.
    name: of the function.
    given: the configs among its arguments, by parameter.
  """
  return _Reader(text, given).run(text.functions[name].body)


class _Reader:
  """Follows the statements of one function."""

  def __init__(self, text: _Text, variables: dict[str, Notes]):
    self._text = text
    self._variables = variables
    self._taken: set[int] = set()  # lines whose comments have found their key

  def run(self, body: Iterable[ast.stmt]) -> Notes | None:
    for statement in body:
      match statement:
        case ast.Assign(targets=targets, value=value):
          self._assign(targets, value)
        case ast.Expr(value=ast.Call() as call):
          self._value(call)
        case ast.For(body=inner) | ast.If(body=inner) | ast.With(body=inner):
          self.run(inner)
        case ast.Return(value=value) if value is not None:
          return self._value(value)
    return None

  def _assign(self, targets: list[ast.expr], value: ast.expr) -> None:
    comment = self._comment(targets[0], value)
    notes = self._value(value)
    for target in targets:
      if isinstance(target, ast.Name):
        if notes is not None:
          self._variables[target.id] = notes
      elif (key := self._value(target)) is not None:
        key.add(comment)
        if notes is not None:
          key.include(notes)

  def _comment(self, start: ast.expr | ast.keyword, value: ast.expr) -> str:
    """What is said above and behind the definition of a key."""
    # The comments behind the lines of a section are about its keys.
    section = isinstance(value, ast.Call) and value.keywords
    first, last = start.lineno, value.end_lineno or start.lineno
    comments = [self._take(self._text.behind, first if section else last)]
    while first - 1 in self._text.above:
      first -= 1
      comments.insert(0, self._take(self._text.above, first))
    *above, behind = comments
    return _joined((" ".join(above).strip(), behind))

  def _take(self, comments: dict[int, str], line: int) -> str:
    if line in self._taken:
      return ""
    self._taken.add(line)
    return comments.get(line, "")

  def _value(self, node: ast.expr) -> Notes | None:
    """The notes of a config, section or key; None for any other value."""
    match node:
      case ast.Name(id=name):
        return self._variables.get(name)
      case ast.Attribute(value=base, attr=name):
        notes = self._value(base)
        return notes and notes.at(name)
      case ast.Subscript(value=base, slice=index):
        notes = self._value(base)
        is_name = isinstance(index, ast.Constant)
        return notes and notes.at(str(index.value) if is_name else _ANY)
      case ast.Call():
        return self._call(node)
    return None

  def _call(self, call: ast.Call) -> Notes | None:
    name = ast.unparse(call.func).rpartition(".")[2]
    if name in ("dict", "Config", "ConfigDict"):
      return self._section(call)
    found = self._text.called(call.func)
    if found is None:
      return None
    text, name = found
    if name not in text.functions:
      return None
    names = [argument.arg for argument in text.functions[name].args.args]
    arguments = [*zip(names, call.args, strict=False)]
    arguments += [(k.arg, k.value) for k in call.keywords if k.arg]
    given = {name: self._value(value) for name, value in arguments}
    return _follow(text, name, {k: v for k, v in given.items() if v})

  def _section(self, call: ast.Call) -> Notes:
    section = Notes({})
    for argument in call.args:
      if notes := self._value(argument):
        section.include(notes)
    for keyword in call.keywords:
      if keyword.arg is None:  # ** and another section
        inner, key = self._value(keyword.value), section
      else:
        key = section.at(keyword.arg)
        key.add(self._comment(keyword, keyword.value))
        inner = self._value(keyword.value)
      if inner is not None:
        key.include(inner)
    return section
