from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from raycomp.report import ProgressPrinter
from raycomp.report.progress import event_line
from raycomp.results.progress import ProgressEvent

EVENT = ProgressEvent("fused", 1, 2, 10, 100, 0.5, {}, 0.25, 2, 3.0)


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def _plain() -> tuple[ProgressPrinter, Clock, io.StringIO]:
    file, clock = io.StringIO(), Clock()
    return ProgressPrinter(Console(file=file, width=60), every_s=15, clock=clock), clock, file


def test_a_line_has_all_that_is_known_and_is_one_line() -> None:
    printer, _, file = _plain()
    with printer:
        printer.event(replace(EVENT, metrics={"accuracy": 0.9}))
    assert file.getvalue() == (
        "stage fused  epoch 1/2  step 10/100  loss 0.5  accuracy 0.9  sparsity 25.0 %  2 workers  3.00 s\n"
    )


def test_a_log_gets_a_line_only_when_it_is_news() -> None:
    printer, clock, file = _plain()
    events = [
        (0.0, EVENT, True),
        (1.0, replace(EVENT, step=11), False),
        (15.0, replace(EVENT, step=12), True),
        (16.0, replace(EVENT, step=13), False),
        (17.0, replace(EVENT, step=50, metrics={"accuracy": 0.9}), True),
        (18.0, replace(EVENT, step=51, epoch=2), True),
        (19.0, replace(EVENT, step=100, epoch=2), True),
        (20.0, replace(EVENT, stage="next", epoch=2), True),
    ]
    with printer:
        for now, event, is_printed in events:
            clock.now = now
            before = len(file.getvalue())
            printer.event(event)
            assert (len(file.getvalue()) > before) == is_printed, event


def test_messages_are_not_read_as_markup() -> None:
    printer, _, file = _plain()
    with printer:
        printer.message("stage [bold]: s3://bucket/[x] " + "y" * 80)
    assert file.getvalue() == "stage [bold]: s3://bucket/[x] " + "y" * 80 + "\n"


def test_a_terminal_shows_a_live_bar_and_keeps_messages_and_ends() -> None:
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None)
    with ProgressPrinter(console) as printer:
        printer.message("run 1 on local Ray")
        printer.event(EVENT)
        printer.event(replace(EVENT, step=100, epoch=2, metrics={"accuracy": 0.9}))
    shown = file.getvalue()
    assert "run 1 on local Ray" in shown
    assert "epoch 2/2  step 100/100  loss 0.5  accuracy 0.9" in shown
    assert "\x1b[?25h" in shown, "the cursor comes back"
    assert console._live_stack == []


def test_the_live_display_ends_with_an_error() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    try:
        with ProgressPrinter(console) as printer:
            printer.event(EVENT)
            raise ValueError("training broke")
    except ValueError:
        assert console._live_stack == []


def test_the_time_left_is_told_at_the_pace_of_the_stage() -> None:
    printer, clock, file = _plain()
    with printer:
        printer.event(replace(EVENT, elapsed_s=40.0))
        clock.now = 30.0
        printer.event(replace(EVENT, step=40, elapsed_s=70.0, learning_rate=0.01, workers=1))
        printer.event(replace(EVENT, stage="next", step=60, elapsed_s=80.0))
    first, second, third = file.getvalue().splitlines()
    assert "left" not in first and "left" not in third
    assert second.endswith("lr 0.01  sparsity 25.0 %  1 worker  70.0 s  60.0 s left")


def test_a_stage_that_only_calibrates_counts_no_steps() -> None:
    line = event_line(replace(EVENT, stage="ptq", epochs=1, step=0, steps=0, loss=None, metrics={"accuracy": 0.9}))
    assert line == "stage ptq  without training  accuracy 0.9  sparsity 25.0 %  2 workers  3.00 s"


def test_after_a_worker_is_replaced_the_time_left_is_told_at_the_new_pace() -> None:
    """With half a minute of waiting counted as training, it was told as ten times what it was."""
    printer, clock, file = _plain()
    with printer:
        for now, step, elapsed_s in ((0.0, 3, 27.0), (20.0, 16, 30.0), (40.0, 6, 45.0), (60.0, 26, 65.0)):
            clock.now = now
            printer.event(replace(EVENT, step=step, elapsed_s=elapsed_s))
        printer.message("worker 0 failed: new workers go on from the last checkpoint")
        for now, step, elapsed_s in ((80.0, 30, 100.0), (100.0, 50, 110.0)):
            clock.now = now
            printer.event(replace(EVENT, step=step, elapsed_s=elapsed_s))
    left = [line.split("workers  ")[-1].partition("  ")[2] for line in file.getvalue().splitlines()]
    # 20 steps in 20 s, 74 to go; then 20 in 10 s, 50 to go.
    assert [each for each in left if each][1:] == ["74.0 s left", "25.0 s left"]


def test_a_log_has_no_ten_lines_a_second_however_short_the_epochs() -> None:
    printer, clock, file = _plain()
    with printer:
        for step in range(1, 100):
            clock.now = step / 20
            printer.event(replace(EVENT, epoch=step, epochs=100, step=step, metrics={"accuracy": 0.9}))
        printer.event(replace(EVENT, epoch=100, step=100))
    assert len(file.getvalue().splitlines()) == 1 + 4 + 1
