"""Typed interface to all compiled code: `fused` (training), `pooling`, `sums`, `noise`.

Each module loads its library at first use (`build.compiled`). Without a library, `sums` gives the same bits by NumPy,
and `available` or NotCompiled tells callers of the other modules to use torch or NumPy.
"""
