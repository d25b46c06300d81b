"""Readable pure-torch specifications, one file per op. Every implementation is held against these."""
