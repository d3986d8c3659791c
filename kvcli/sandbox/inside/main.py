"""Entry point of a sandboxed process: reads its job from standard input, shuts itself in, does the job."""

from __future__ import annotations

import json
import os

from kvcli.sandbox.inside import candidate, checker, confine


def main() -> None:
    with open(0, "rb", closefd=False) as f:
        job = json.loads(f.read())
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    descriptors = [*job["link"], *([job["verdict"]] if "verdict" in job else [])]
    confine.enter(job["confine"], descriptors)
    {"candidate": candidate.serve, "checker": checker.check}[job["role"]](job)


main()
