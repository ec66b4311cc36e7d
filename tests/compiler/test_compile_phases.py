"""Whatever goes wrong inside a phase is named after it, with its cause."""

import pytest

from llmc.compiler.phases import Timer, failing_as
from llmc.errors import CompileError, UnsupportedError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("shapes differ\nand the whole module"), "shapes differ"),
        (KeyError("lv3"), "KeyError: 'lv3'"),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (AttributeError("no attribute 'ty'"), "AttributeError: no attribute 'ty'"),
        (AssertionError(), "AssertionError"),
        (RuntimeError(), "RuntimeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_any_error_names_the_phase_and_keeps_its_cause(error, message):
    with pytest.raises(CompileError) as found, failing_as("fuse_norm"):
        raise error
    assert found.value.message == f"phase fuse_norm failed: {message}"
    assert found.value.exit_code == 5
    assert "--dump-ir" in found.value.hint
    assert found.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        UnsupportedError("no such operator"),
        OSError(28, "No space left on device"),
        ModuleNotFoundError("no torch", name="torch"),
        KeyboardInterrupt(),
        SystemExit(143),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_say_more_than_a_phase_pass(error):
    with pytest.raises(type(error)) as found, failing_as("passes"):
        raise error
    assert found.value is error


def test_the_inner_phase_is_the_one_that_is_named():
    events = []
    timer = Timer(events.append)
    with pytest.raises(CompileError, match=r"^phase inner failed: KeyError: 1"):  # noqa: SIM117
        with timer.phase("outer"), failing_as("inner"):
            raise KeyError(1)
    assert [(e.name, e.status) for e in events] == [("outer", "start")]
    assert timer.phases == []


def test_progress_is_reported_in_steps_worth_an_event():
    events = []
    timer = Timer(events.append)
    with timer.phase("weights") as progress:
        for done in range(1, 1001):
            progress(done / 1000)
    assert [e.status for e in events[:1] + events[-1:]] == ["start", "done"]
    fractions = [e.fraction for e in events if e.status == "progress"]
    assert fractions == sorted(fractions)
    assert 40 <= len(fractions) <= 50
    assert [name for name, _ in timer.phases] == ["weights"]
