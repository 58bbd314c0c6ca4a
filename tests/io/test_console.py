"""A message that cannot be printed is lost, and nothing else; no message shows a token."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth.io import console

ROOT = Path(__file__).parent.parent.parent
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
TALKING = """
import logging, sys, threading, warnings
import dreambooth.io.console as console
{before}
console.protect()
logging.basicConfig(stream=sys.stderr)
from tqdm import tqdm

for number in tqdm(range(3), mininterval=0):
    console.say("line " + "x" * 100_000)
    console.warn("warning")
    console.notes(["note"])
    logging.warning("logged")
    warnings.warn("warned " + str(number))
console.error("error")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
print("end", file=sys.stderr)
{after}
"""


def process(streams: str, *, before: str = "", after: str = "", **kwargs) -> subprocess.CompletedProcess:
    """Run TALKING with the redirections `streams` of a shell."""
    code = TALKING.format(before=before, after=after)
    words = [sys.executable, "-c", code]
    shell = ["bash", "-c", f'exec "$@" {streams}', "bash", *words]
    return subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=60, **kwargs)


@pytest.mark.parametrize(
    ("streams", "end", "status"),
    [
        (">/dev/full 2>&1", "", 0),
        (">&-", "raise ValueError", 1),
        ("2>&-", "raise ValueError", 1),
        ("<&- >&- 2>&-", "", 0),
        ("1</dev/null 2</dev/null", "sys.exit(75)", 75),
        ("> >(head -c 1) 2>&1", "", 0),
        ("> >(exit) 2> >(exit)", "sys.exit(2)", 2),
    ],
)
def test_streams_that_take_nothing_change_neither_the_work_nor_the_status(streams, end, status, tmp_path):
    done = f'open("{tmp_path}/done", "w").write("done")\n'
    assert process(streams, after=done + end).returncode == status
    assert (tmp_path / "done").read_text() == "done"


def test_closed_streams_are_no_numbers_for_files_and_child_processes_have_them_too(tmp_path):
    opened = f'file = open("{tmp_path}/new", "w")\nassert file.fileno() > 2\n'
    child = "import subprocess\n" + (
        'code = "import os; [os.fstat(n) for n in range(3)]"\n'
        'assert subprocess.run([sys.executable, "-c", code]).returncode == 0\n'
    )
    assert process("<&- >&- 2>&-", after=opened + child).returncode == 0
    assert (tmp_path / "new").read_bytes() == b""


def test_a_full_pipe_that_does_not_block_is_waited_for_and_then_costs_the_message():
    """First nobody reads. Then a reader comes, late, and gets whole lines."""
    code = """
import sys
from dreambooth.io import console
console._PATIENCE = float(sys.argv[1])
console.protect()
console.say("x" * 300_000)
console.say("end")
"""
    for patience, is_read in (("0.01", False), ("30", True)):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        child = subprocess.Popen([sys.executable, "-c", code, patience], cwd=ROOT, stdout=writer)
        os.close(writer)
        if is_read:
            with open(reader, "rb") as file:
                assert file.read() == b"x" * 300_000 + b"\nend\n"
        assert child.wait(60) == 0
        if not is_read:
            os.close(reader)


def test_a_lost_terminal_costs_the_messages():
    main, terminal = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", TALKING.format(before="sys.stdin.read()", after="sys.exit(7)")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    os.close(main)
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(60) == 7


def test_what_is_printed_is_what_it_was_for_a_stream_that_takes_it(tmp_path):
    """Alone and with a progress bar, in another encoding and with several lines."""
    code = "from dreambooth.io import console; console.protect(); import tqdm\n"
    said = (
        'console.say("Größe: 5 µm\\n  a\\tb\\x1b[0m \\udcff"); print("plain"); console.error("end", "note: ")'
    )
    for bar in ("", "for _ in tqdm.tqdm([1]): "):
        for encoding in ("utf-8", "ascii"):
            result = subprocess.run(
                [sys.executable, "-c", code + bar + said],
                cwd=ROOT,
                capture_output=True,
                env=os.environ | {"PYTHONIOENCODING": encoding},
            )
            text = "Größe: 5 µm\n  a\\tb\\x1b[0m \\udcff\nplain\n"
            assert result.stdout == text.encode(encoding, "backslashreplace")
            assert result.stderr.endswith(b"note: end\n") or bar


def test_without_a_progress_bar_no_module_of_bars_is_imported():
    code = "from dreambooth.io import console; import sys; console.say('a'); assert 'tqdm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    "text",
    [
        f"refused: {TOKEN}.",
        f"Bearer {TOKEN}",
        f"https://user:{TOKEN}@hub/x",
        f"{{'token': '{TOKEN}'}}",
        f"--hub_tokn={TOKEN}",
        "hf_abcdefghijklmnopqrstuvwxyzabcdefgh",
        "x hf_12345678 y",
    ],
)
def test_a_text_with_a_token_s_form_is_shown_without_it(text, capsys):
    console.say(text)
    console.warn(text)
    console.notes([text])
    console.error(text)
    shown = "".join(capsys.readouterr())
    assert shown.count("<token>") == 4
    assert "hf_" not in shown


@pytest.mark.parametrize(
    "text", ["hf_hub_download", "hf_checkpoints/a.png", "hf_raise_for_status", "hf_x", "hf_"]
)
def test_other_names_are_shown(text):
    assert console.without_tokens(text) == text


def test_a_hidden_secret_of_any_form_is_shown_nowhere(monkeypatch):
    monkeypatch.setattr(console, "_secrets", set())
    console.hide("s3cret/+==")
    console.hide(None)
    console.hide("")
    assert (
        console.without_tokens("a s3cret/+== b S3CRET/+==, s3cret%2F%2B%3D%3D")
        == "a <token> b <token>, <token>"
    )
    assert console.without_tokens("s3cret") == "s3cret"


def test_no_traceback_warning_or_log_of_a_library_shows_a_token():
    code = f"""
import logging, os, sys, threading, warnings
from dreambooth.io import console
console.protect()
logging.warning("sent %s", "{TOKEN}")
warnings.warn("{TOKEN} and my-own-secret")
print("{TOKEN}", file=sys.stderr)
threading.Thread(target=lambda: {{}}["{TOKEN}"]).start()
raise ValueError("my-own-secret")
"""
    environment = os.environ | {"HF_TOKEN": "my-own-secret"}
    file = ROOT / "tests"  # tracebacks show no line of a program of -c
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=file.parent, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 1
    assert TOKEN not in result.stderr
    assert "my-own-secret" not in result.stderr
    assert result.stderr.count("<token>") >= 5
    assert "ValueError: <token>" in result.stderr


def test_threads_that_print_at_once_lose_nothing():
    code = """
import threading
from dreambooth.io import console
console.protect()
threads = [threading.Thread(target=lambda: [console.say("line") for _ in range(100)]) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.count("line") == result.stdout.count("\n") == 800
