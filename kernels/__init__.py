"""The packed layout of weights, and the linear operator that reads it.

This file imports nothing: with the root of the repository on the path (`python -m ...` in a clone) transformers finds
this folder while it looks for an optional package of the same name, and must be able to pass over it.
"""
