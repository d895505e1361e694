"""Example-level DP-SGD: `step` says what is done and guaranteed, `mechanism` by which constants, and `book`, `hooks` and
`loop` how single examples' gradients are seen, of which `choose` takes one."""
