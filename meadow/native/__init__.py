"""All compiled code behind one typed face: `fused` (training), `pooling`, `sums`, `noise`. Nothing else declares C.

Each module loads its library when it is first asked for (`build.compiled`). Where there is none, `sums` adds by NumPy to
the same bits; the others raise NotCompiled or answer None, and their callers have torch or NumPy.
"""
