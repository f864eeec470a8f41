"""Maps that run ahead of their consumer."""

from blip_jax.runtime import ahead


def test_a_number_of_others_have_begun_while_one_is_awaited():
  events = []

  def start(item):
    events.append(f"start {item}")

    def wait():
      events.append(f"wait {item}")
      return 10 * item

    return wait

  results = ahead.started_ahead(start, range(4), 2)
  assert next(results) == 0
  assert events == ["start 0", "start 1", "start 2", "wait 0"]
  assert [*results] == [10, 20, 30]
  assert events[4:] == ["start 3", "wait 1", "wait 2", "wait 3"]
  assert [*ahead.started_ahead(start, [], 2)] == []
