"""Events survive a writer that was killed, and never hold a value that JSON does not have."""

from pathlib import Path

from ctune.events import EventWriter, Metrics, Stopped, read_events


def test_numbering_goes_on_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for reason in ("first", "second"):
        writer = EventWriter(path)
        writer.write(Stopped(reason=reason))
        writer.close()
        with path.open("a") as file:
            file.write('{"seq": 1, "event": "stop')
    EventWriter(path).close()
    told = [event for event, _ in read_events(path)]
    assert [(e.seq, e.reason) for e in told if isinstance(e, Stopped)] == [
        (0, "first"),
        (1, "second"),
    ]
    assert path.read_text().endswith("}\n")


def test_a_writer_goes_on_behind_another_process(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    launcher, rank = EventWriter(path), EventWriter(path)
    for reason in ("first", "second"):
        rank.write(Stopped(reason=reason))
    rank.close()
    with path.open("a") as file:
        file.write('{"seq": 2, "event": "stop')
    launcher.catch_up()
    launcher.write(Stopped(reason="last"))
    launcher.close()
    told = [event for event, _ in read_events(path)]
    assert [(e.seq, e.reason) for e in told if isinstance(e, Stopped)] == [
        (0, "first"),
        (1, "second"),
        (2, "last"),
    ]


def test_a_line_without_its_end_waits_for_the_next_look(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    writer.write(Stopped(reason="whole"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-1])
    found = list(read_events(path))
    assert len(found) == 1
    path.write_bytes(whole + whole)
    assert [offset for _, offset in read_events(path, found[0][1])] == [2 * len(whole)]
    writer.close()


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    writer.write(Metrics(stage="s", step=1, values={"loss": float("nan"), "lr": 0.5}))
    writer.close()
    (event,) = [event for event, _ in read_events(path)]
    assert isinstance(event, Metrics)
    assert event.values == {"loss": None, "lr": 0.5}
