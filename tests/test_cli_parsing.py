from __future__ import annotations

from dataclasses import dataclass

import pytest

from sfumato.cli.parsing import parse, size_of


@dataclass(frozen=True)
class Inner:
    """Nested settings."""

    depth: int = 2
    """How deep."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What the flags are for."""

    steps: int = 4
    """How many."""
    loud: bool = False
    inner: Inner | None = Inner()


@pytest.fixture(params=["utf-8", "ascii"])
def encoding(request, monkeypatch):
    """The parser draws its boxes by what the output can show."""

    class Output:
        encoding = request.param

        def write(self, text): ...

        def flush(self): ...

    monkeypatch.setattr("sys.stdout", Output())


def test_flags_and_defaults():
    assert parse(Flags, "go", ["--steps", "7", "--loud"]) == Flags(steps=7, loud=True)
    start = Flags(steps=9, inner=Inner(5))
    assert parse(Flags, "go", ["--loud"], default=start) == Flags(steps=9, loud=True, inner=Inner(5))
    assert parse(Flags, "go", ["--inner.depth", "3"], default=start).inner == Inner(3)


@pytest.mark.usefixtures("encoding")
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--stpes", "3"], "Unrecognized options: --stpes, 3; did you mean --steps?; see: sfumato go --help"),
        (["--steps", "x"], "Error parsing --steps: "),
        (["--steps"], "Missing value for argument '--steps'"),
        (["stray"], "Unrecognized options: stray; see: sfumato go --help"),
    ],
)
def test_errors_are_one_line(args, said):
    with pytest.raises(ValueError, match=r".") as error:
        parse(Flags, "go", args)
    text = str(error.value)
    assert text.startswith(said)
    assert "\n" not in text
    assert not set(text) & set("│╭╰─")


def test_help_prints_and_stops(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Flags, "go", ["--help"])
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "usage: sfumato go" in said
    assert "How many." in said


@pytest.mark.parametrize(
    ("text", "size"), [("64", (64, 64)), ("96x64", (64, 96)), ("96X64", (64, 96)), (None, None)]
)
def test_sizes(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "64x", "x64", "6 4", "-64", "64x64x64", "64.5"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is neither a side nor WIDTHxHEIGHT; write 64, or 96x64"):
        size_of(text)
