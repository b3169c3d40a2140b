"""The command line: quick without torch, one line for an error, exit codes that scripts can read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm import cli
from vlm.cli import COMMANDS, Command, main
from vlm.errors import ConfigError, VLMError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "timm", "open_clip", "numpy", "PIL", "rich", "jsonargparse", "fastapi")


def python(code: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def vlm(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return python("import sys\nfrom vlm.cli import main\nsys.exit(main())", *argv, **env)


@pytest.mark.parametrize(
    "code",
    [
        "import vlm",
        "import vlm.cli\nvlm.cli.main(['--help'])",
        "import vlm.cli\nvlm.cli.main(['--version'])",
        "import vlm.cli\nvlm.cli.main(['nonsense'])",
        "import vlm.cli\nvlm.cli.main(['weights', 'list'])",
        "import vlm\nvlm.Conversation",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    done = python(f"{code}\nimport sys\nprint('HEAVY', [m for m in {HEAVY} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: vlm COMMAND")
    for name, command in COMMANDS.items():
        assert f"  {name}" in printed
        assert command.summary in printed


def test_no_arguments_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "usage: vlm COMMAND" in printed.err


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("serv", "did you mean `vlm serve`?"), ("zzz", "`vlm --help` lists them"), ("\x1b[2J", "\\x1b[2J")],
)
def test_unknown_commands(typed: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed]) == 2
    printed = capsys.readouterr().err
    assert hint in printed
    assert printed.count("\n") == 1
    assert "\x1b" not in printed


def run(monkeypatch: pytest.MonkeyPatch, function: Callable[[list[str]], int], extra: str = "") -> int:
    """Call `function` as a command of the table, found by name like any other."""
    monkeypatch.setattr(sys.modules[__name__], "_probe", function, raising=False)
    monkeypatch.setitem(sys.modules, "probe_module", sys.modules[__name__])
    monkeypatch.setitem(COMMANDS, "probe", Command("probe_module:_probe", "a probe", extra))
    return main(["probe", "--flag", "x"])


def test_a_command_gets_the_rest_of_the_line_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def probe(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    assert run(monkeypatch, probe) == 7
    assert seen == [["--flag", "x"]]


@pytest.mark.parametrize("kind", [VLMError, ConfigError])
def test_an_error_is_one_line(
    kind: type[VLMError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def probe(argv: list[str]) -> int:
        raise kind("bad \x1b[31mfile\nname:\tfix it")

    assert run(monkeypatch, probe) == 1
    assert capsys.readouterr().err == "error: bad \\x1b[31mfile name: fix it\n"


def test_interrupts_and_bugs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    def bug(argv: list[str]) -> int:
        raise ZeroDivisionError

    assert run(monkeypatch, interrupted) == 130
    assert capsys.readouterr().err.strip() == "interrupted"
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run(monkeypatch, bug)


def test_a_package_of_an_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(argv: list[str]) -> int:
        import no_such_package.inside  # noqa: F401

        return 0

    def own(argv: list[str]) -> int:
        import vlm.no_such_module  # noqa: F401

        return 0

    assert run(monkeypatch, other, extra="serve") == 1
    assert "needs the package no_such_package: run pip install -e '.[serve]'" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        run(monkeypatch, own)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_no_traceback(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vlm", "--help"],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("argv", [["--help"], ["weights", "list"], ["train", "--keys"]], ids=" ".join)
def test_a_full_disk_is_one_line(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vlm", *argv], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: the disk is full\n")


def test_python_m_vlm() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlm", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"vlm-adapters {cli.__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = vlm(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.lower().startswith("usage: ")
    assert f"vlm {name}" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_an_unknown_option(name: str) -> None:
    done = vlm(name, "--no-such-option-anywhere")
    assert done.returncode in (1, 2), done.stdout
    assert "no-such-option-anywhere" in done.stderr or "required" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "banana"], "--device banana does not work here"),
        (["--device", "meta"], "try --device cpu"),
        (["--device", ""], "does not work here"),
    ],
)
def test_devices_that_do_not_work(options: list[str], words: str) -> None:
    from vlm.options import add_common, apply_common, make_parser

    parser = make_parser("probe", "A probe.")
    add_common(parser)
    with pytest.raises(ConfigError, match=words):
        apply_common(parser.parse_args(options))


@pytest.mark.parametrize(
    "argv", [["--threads", "0"], ["--threads", "x"], ["--dtype", "int4"], ["--dev", "cpu"]]
)
def test_bad_common_options_are_wrong_usage(argv: list[str]) -> None:
    from vlm.options import add_common, make_parser

    parser = make_parser("probe", "A probe.")
    add_common(parser)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(argv)
    assert caught.value.code == 2


def test_common_options_take_effect() -> None:
    code = (
        "from vlm.options import add_common, apply_common, make_parser\n"
        "parser = make_parser('probe', 'A probe.')\nadd_common(parser)\n"
        "args = parser.parse_args(['--offline', '--threads', '1'])\napply_common(args)\n"
        "import torch\nfrom huggingface_hub import constants\n"
        "print(args.device, torch.get_num_threads(), constants.HF_HUB_OFFLINE)"
    )
    done = python(code)
    assert done.stdout.split()[1:] == ["1", "True"], done.stderr
    assert done.stdout.split()[0] in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_offline_from_the_environment(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.options import add_common, make_parser

    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    parser = make_parser("probe", "A probe.")
    add_common(parser)
    assert parser.parse_args([]).offline is expected
