"""How well a model does on held-out splits: one evaluator per question."""
