"""The source model's bits do not depend on how many threads the caller happens to run."""

import torch

from helpers.runs import small
from meadow.arrays.named import arrays_sha256
from meadow.tasks.source import _source_state, source_state


def test_source_model_has_the_same_bits_under_any_thread_count() -> None:
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        _source_state.cache_clear()
        found.add(arrays_sha256(source_state(small("finetune", "task.model=cnn", "task.source_samples=600"))))
        assert torch.get_num_threads() == threads
    assert len(found) == 1
