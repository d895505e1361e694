"""SHA-256 of each C file, so that the code hash covers them and an app bundle, which has no C files, can identify its
libraries.

A test checks them and prints the right values.
"""

SOURCES = {
    "fused.c": "2c1607a56583c9904092ac9d9553b363d85625f7d137b2587050882348830b77",
    "noise.c": "5418dbd503084e1789c09460de8c095b70a9200ed41f5937e43b289951a499d8",
    "pooling.c": "a384a54a584cfd839e5813a5b07d65383406824ea795661ad91fb561c8178ca1",
    "sums.c": "c10499292bac80b16e081c72b37c6d260bb318cfda22a9dcf7c33f90e585a1a7",
}
