"""SHA-256 of each C file. So the code hash covers them too, and code in an app bundle, which holds none, knows its own.

A test compares it with the files and says what to write here.
"""

SOURCES = {
    "fused.c": "14fd11df9321e17e97f5da1c11baf16c95b3851673c14e18b5a27604f3f164c4",
    "noise.c": "8d9292b3784752d37ae772dc571f989f5e36b7bb495f426160ae8918373542b2",
    "pooling.c": "63b2efb546ac36c6f5609a356af70c7945bf1b82468608b679588d9993e8e5f1",
    "sums.c": "dce6b321bf3635349d8fbee4f3727ccef42213c477420ca371d4e2cffdca0a89",
}
