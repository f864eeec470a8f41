"""What a step computes: one file per training objective."""
