"""Which deepseek-trt this is: its version, and its commit where it runs from a checkout."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

PACKAGE = "deepseek-trt"


def tool_name() -> str:
    """E.g. "deepseek-trt 0.2.0, commit 0123456789ab"; git itself is not run, so changed files go unsaid."""
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    commit = commit_of(Path(__file__).resolve().parents[2])
    return f"{PACKAGE} {version}" + (f", commit {commit[:12]}" if commit else "")


def commit_of(root: Path) -> str | None:
    """The commit that is checked out in `root`; None where that is no checkout, or cannot be read."""
    git = root / ".git"
    try:
        if git.is_file():  # a worktree names its folder
            git = root / git.read_text(encoding="utf-8").partition("gitdir:")[2].strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return head
        common = git / "commondir"
        shared = git / common.read_text(encoding="utf-8").strip() if common.is_file() else git
        return _commit_of_branch(head.partition(":")[2].strip(), git, shared)
    except (OSError, UnicodeDecodeError):
        return None


def _commit_of_branch(branch: str, *folders: Path) -> str | None:
    for folder in folders:
        if (folder / branch).is_file():
            return (folder / branch).read_text(encoding="utf-8").strip()
    packed = (folders[-1] / "packed-refs").read_text(encoding="utf-8").splitlines()
    return next((line.split()[0] for line in packed if line.endswith(f" {branch}")), None)
