"""The scaling benchmark: its arithmetic by hand, and a run in two processes."""

import json
from pathlib import Path

import pytest
from scaling_model import Link, all_reduce_seconds, extrapolated, fitted_link, median_ratio, step_seconds, texts


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_an_all_reduce_is_its_rounds(ranks: int) -> None:
    link, size, buckets = Link("", 1e9, 1e-5), 4e6, 3
    total, piece = 0.0, size / buckets
    for _ in range(buckets):
        sent, others = piece, ranks
        while others > 1:  # halving: exchange half of what is left with a partner; doubling sends it all back
            sent /= 2
            others //= 2
            total += 2 * (link.latency + sent / link.bandwidth)
    assert all_reduce_seconds(ranks, size, link, buckets) == pytest.approx(total)


def test_a_fitted_link_is_the_one_that_made_the_times() -> None:
    link = Link("there", 2e9, 4e-5)
    sizes = [4.0, 1e4, 1e6, 1e8]
    found = fitted_link("here", sizes, [all_reduce_seconds(2, size, link) for size in sizes])
    assert (found.bandwidth, found.latency) == pytest.approx((2e9, 4e-5))
    assert fitted_link("here", [1e6, 1e7], [1e-3, 1.2e-2]).latency == 0  # steeper than bytes alone


def test_what_overlaps_is_hidden() -> None:
    assert step_seconds(3.0, 5.0) == 8
    assert step_seconds(3.0, 5.0, hidden=2.0) == 6  # 1 alone, then the longer of 2 and 5
    assert step_seconds(3.0, 1.0, hidden=2.0) == 3
    # One byte per second over two ranks, so 6 bytes take 6 s; 2 of 3 s of a plain step are backward.
    compute = {"plain": 3.0, "loop": 4.0, "closure": 12.0}
    table = extrapolated(compute, "plain", {"loop": True, "closure": False}, [1, 2], Link("", 1, 0), 6, 1)
    assert table["loop"] == [pytest.approx([4 / 3] * 2), pytest.approx([10 / 9, 8 / 7])]
    assert table["closure"] == [pytest.approx([4, 4]), pytest.approx([18 / 9, 18 / 7])]
    assert texts(table)[1] == ["closure", "4.00 (4.00)", "2.00 (2.57)"]


def test_ratios_are_of_neighbours() -> None:
    cell = {"a": {"wall": [1.0, 10.0, 100.0]}, "b": {"wall": [3.0, 20.0, 200.0]}}
    assert median_ratio(cell, "wall", "b", "a") == 2


def test_two_processes_are_measured_and_put_into_a_page(tmp_path: Path) -> None:
    import scaling

    out, page = tmp_path / "scaling.json", tmp_path / "page.md"
    quick = ["--ranks", "2", "--models", "tiny", "--repeats", "1", "--floor", "0.001", "--out", str(out)]
    scaling.main(quick)
    results = json.loads(out.read_text())
    cell = results["ranks"]["2"]["cells"]["tiny"]
    weights = cell["weights"]
    assert weights == 4 * (4 * 8 + 8 + 8 * 10 + 10)
    # Not one collective more than plain DDP, whose gradients are reduced once.
    for way in (scaling.PLAIN, scaling.LOOP, scaling.PASSES, scaling.CLOSURE, scaling.SHARDED):
        assert cell["ways"][way]["collectives"] == {"allreduce": [1, weights]}
    plain, loop = (cell["ways"][way]["collectives"] for way in (scaling.FSDP, scaling.FSDP_LOOP))
    assert {kind: plain[kind] for kind in plain} == {kind: loop[kind] for kind in plain}
    for timed in cell["ways"].values():
        assert 0 < timed["wall"][0] < 10
        assert 0 < timed["cpu"][0] < 10
    results["ranks"] = {"1": results["ranks"]["2"], **results["ranks"]}  # what is worked out needs both
    out.write_text(json.dumps(results))
    page.write_text(f"before\n{scaling.MARKS[0]}\nold\n{scaling.MARKS[1]}\nafter\n")
    for _ in range(2):
        scaling.main([*quick, "--page", str(page)])
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        assert text.count("| plain DDP |") == 2
        assert text.count("N = 512") == 3
