"""Objectives, one a file; the file's name is what a plan calls it."""
