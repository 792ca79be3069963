"""A child process: some items of one part. What it finds it writes to a file at once, a JSON a line.

python -m gpu_check.child PART FIRST EVENTS TREE SETTING...
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from gpu_check.items import Gpu, Setting
from gpu_check.places import add_package

REHEARSED_SM = 90


def main(words: list[str]) -> None:
    part, first, events, tree, *rest = words
    add_package(Path(tree))
    setting = Setting.of_words(rest)
    with Path(events).open("a", encoding="utf-8") as out:

        def say(**event: Any) -> None:
            out.write(json.dumps(event) + "\n")
            out.flush()

        items = importlib.import_module(part).items(setting, open_gpu(setting))
        for index, item in list(enumerate(items))[int(first) :]:
            say(begin=index, name=item.name)
            for row in item.run():
                say(row=dataclasses.asdict(row))
            say(end=index)


def open_gpu(setting: Setting) -> Gpu:
    """The machine's GPU, or its stand-in."""
    if setting.rehearsal:
        from gpu_check.rehearsal import RehearsedGpu

        return RehearsedGpu(REHEARSED_SM)
    import torch

    from gpu_check.timing import TorchGpu

    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA GPU; --rehearse runs the check without one")
    return TorchGpu()


if __name__ == "__main__":
    main(sys.argv[1:])
