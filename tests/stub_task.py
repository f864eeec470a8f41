"""A task with nothing to learn, for tests to fill in what they look at."""

import types


class StubTask:
  model = None
  predict_fns = types.MappingProxyType({})

  def init(self, rng):
    return {}

  def init_momentum(self, params, rng):
    return None

  def project(self, params):
    return params

  def loss(self, params, momentum, batch, *, rng, step, train=True):
    raise AssertionError("this test does not train")
