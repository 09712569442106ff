"""The rows of `benchmarks.large`, small and in this process."""

import pytest

from benchmarks import large


@pytest.mark.parametrize("what", [*large.BARE, *large.MASKS, *large.STEPS])
def test_rows_of_memory(what):
    row = large.measured(what, "", layers=2, width=64, repeats=1)
    assert row["bytes"] == 2 * 64 * 64 * 2 and row["seconds"] > 0


def test_collectives_and_what_they_send():
    row = large.compiled("masks, global 90%", "Auto", devices=8, layers=1)
    assert row["leaves"] == 2 + 9
    assert set(row["collectives"]) == {"all-reduce"}
    assert 0 < row["bytes"] < 1e5 < row["held"]


def test_tables():
    memory = [
        {"part": "memory", "what": what, "bytes": 2, "peak": 1}
        | {"tunables": tunables, "seconds": seconds}
        for what, tunables, seconds in (
            ("one read", "", 1.0),
            ("one read", large.HUGE, 0.5),
            ("one copy", "", 4.0),
            ("one copy", large.HUGE, 2.0),
        )
    ]
    row = large.compiled("masks, 2:4", "Explicit", devices=8, layers=1)
    made = large.tables({"records": [*memory, {"part": "mesh"} | row]})
    assert made["large/memory"].rows[1][:4] == ("one copy", "4.00", "2.00", "4.0")
    assert made["large/mesh"].rows[0][3] == "none"
