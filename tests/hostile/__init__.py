"""Generators of hostile input, one module per kind, and the table of a kind."""

from collections.abc import Sequence


def report(kind: str, tried: int, failed: Sequence[str]) -> None:
  """Prints a row "kind: tried, held, failed", and fails if anything failed."""
  print(
    f"\n{kind}: {tried:,} tried, {tried - len(failed):,} held, "
    f"{len(failed):,} failed"
  )
  assert not failed, "\n".join(failed)
