"""The clock's phases add up to the whole, whatever is named when."""

from meadow.runtime.clock import PHASES, Clock


def test_each_moment_belongs_to_the_phase_named_last() -> None:
    """Named at 3, 10, 11 and 11.5 seconds, read at 20: "open" has what was before and what came after the last."""
    moments = iter([3.0, 10.0, 11.0, 11.5, 20.0])
    clock = Clock(lambda: next(moments))
    for phase in ("train", "write", "open"):
        clock.now(phase)
    assert clock.read() == dict.fromkeys(PHASES, 0.0) | {"open": 7.0 + 8.5, "train": 1.0, "write": 0.5}


def test_what_others_measured_is_taken_from_a_phase_and_the_whole_stays() -> None:
    moments = iter([0.0, 6.0, 10.0])
    clock = Clock(lambda: next(moments))
    clock.start("broadcast", since=-2.0)
    clock.now("reduce")
    clock.part("broadcast", {"train": 5.0, "open": 0.5})
    times = clock.read()
    assert times == dict.fromkeys(PHASES, 0.0) | {"broadcast": 2.5, "train": 5.0, "open": 0.5, "reduce": 4.0}
    assert sum(times.values()) == 10.0 - -2.0
