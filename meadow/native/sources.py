"""SHA-256 of each C file, so that the code hash covers them and an app bundle, which has no C files, can identify its
libraries.

A test checks them and prints the right values.
"""

SOURCES = {
    "fused.c": "eef026278be30f0cd436f81ea47d91f74cd820905f5e4d2e08410edf89b8009e",
    "noise.c": "5418dbd503084e1789c09460de8c095b70a9200ed41f5937e43b289951a499d8",
    "pooling.c": "9572d289597e6caa7d3dd06e7bff0c6a1ab9a9e4a0e453dadb2160b057064ce1",
    "sums.c": "cc71f862db2842c86aeaf2b635f77f565e097c942334f7569be812fbbbacfa93",
}
