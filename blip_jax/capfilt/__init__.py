"""CapFilt (section 3.3): a captioner and a filter clean a noisy collection."""
