"""The README's own lines, sent as curl would send them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import httpx

from tests.support import Server, photo

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def curl(server: Server, line: str) -> httpx.Response:
    """Send what ``curl -F name=value -F name=@file URL`` sends."""
    words = shlex.split(line)
    assert words[0] == "curl"
    data: dict[str, str] = {}
    files = []
    for flag, value in zip(words[1:-1:2], words[2:-1:2], strict=True):
        assert flag == "-F"
        name, _, content = value.partition("=")
        if content.startswith("@"):
            files.append((name, (content[1:], photo(content[1:]))))
        else:
            data[name] = content
    return server.client.post(words[-1].removeprefix("http://127.0.0.1:8000"), data=data, files=files)


def test_the_four_calls_answer_as_the_readme_says(server: Server) -> None:
    block = re.search(r"## Four calls\n\n```sh\n(.*?)```", README, re.S)
    shown = re.search(r"```json\n(.*?)```", README, re.S)
    assert block and shown
    lines = [line for line in block[1].splitlines() if line.startswith("curl")]
    assert len(lines) == 4
    answers = [curl(server, line) for line in lines]
    assert [answer.status_code for answer in answers] == [201, 201, 200, 200]
    assert answers[3].json()["match"] is True
    assert_shown(json.loads(shown[1]), answers[2].json())


def assert_shown(shown: Any, real: Any) -> None:
    """What the README shows is what came, numbers to a hundredth; it may leave fields out."""
    if isinstance(shown, dict):
        for name, value in shown.items():
            assert_shown(value, real[name])
    elif isinstance(shown, list):
        for one, other in zip(shown, real, strict=True):
            assert_shown(one, other)
    elif isinstance(shown, float):
        assert abs(shown - real) <= max(0.01, abs(shown) * 0.01)
    else:
        assert shown == real
