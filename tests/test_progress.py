"""Progress bars."""

from retrainscope.progress import progress_bar


def test_bar_passes_the_items_on(capsys):
    """A bar that is asked for passes every item on, writes to the error stream, and clears its line at the end."""
    assert list(progress_bar([1, 2, 3], what="layers", progress=True)) == [1, 2, 3]
    written = capsys.readouterr()
    assert "layers" in written.err
    assert written.err.endswith("\r")
    assert written.out == ""


def test_bar_is_silent_when_told(capsys):
    """A bar that is switched off passes every item on and writes nothing."""
    assert list(progress_bar([1, 2, 3], what="layers", progress=False)) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_bar_is_silent_off_a_terminal(capsys):
    """By default nothing is written where the error stream is no terminal."""
    assert list(progress_bar([1, 2, 3], what="layers", progress=None)) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_bar_is_shown_on_a_terminal(capsys, monkeypatch):
    """By default the bar is shown where the error stream is a terminal."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress_bar([1, 2, 3], what="layers", progress=None)) == [1, 2, 3]
    assert "layers" in capsys.readouterr().err


def test_bar_without_items_is_moved_by_hand(capsys):
    """Without items a bar counts what it is told, up to the total."""
    with progress_bar(what="batches", progress=True, total=5) as bar:
        bar.update(3)
        assert "3/5" in str(bar)
    assert "batches" in capsys.readouterr().err
