"""The wire contract: `buf breaking` sees a break, and none has happened since the last release."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUF = Path(sys.executable).with_name("buf")


def buf(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BUF), *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_a_field_that_changes_its_number_is_seen_as_a_break(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    for part in ("protos", "gen/third_party"):
        shutil.copytree(ROOT / part, workspace / part)
    shutil.copy(ROOT / "buf.yaml", workspace)
    image = str(tmp_path / "release.binpb")
    assert buf("build", "protos", "-o", image, cwd=workspace).returncode == 0
    assert buf("breaking", "protos", "--against", image, cwd=workspace).returncode == 0

    envelope = workspace / "protos/care/events/v1/envelope.proto"
    text = envelope.read_text()
    assert " = 1;" in text
    envelope.write_text(text.replace(" = 1;", " = 1001;", 1))

    broken = buf("breaking", "protos", "--against", image, cwd=workspace)
    assert broken.returncode == 100
    assert "events/v1/envelope.proto" in broken.stdout


def test_nothing_broke_since_the_last_release() -> None:
    baseline = ROOT / "protos/baseline.binpb"
    if not baseline.exists():
        pytest.skip("nothing has been released yet")
    outcome = buf("breaking", "protos", "--against", str(baseline))
    assert outcome.returncode == 0, outcome.stdout


def test_the_protos_keep_the_house_style() -> None:
    outcome = buf("lint")
    assert outcome.returncode == 0, outcome.stdout
