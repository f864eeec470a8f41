"""Models for people and programs that are elsewhere: the demo page."""
