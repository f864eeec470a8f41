"""Models for people and programs that are elsewhere: a page, a service."""
