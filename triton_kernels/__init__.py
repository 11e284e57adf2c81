"""Triton kernels and their launchers, one module per family; installed as handtuned.triton_kernels.

A launcher takes what the op's schema lists, already validated, and returns what the schema returns: no nn, no autograd,
no dispatch. `common` is shared by the families; `tuning` holds the tables of tile sizes, which `tune_tiles` measures
where asked to.
"""
