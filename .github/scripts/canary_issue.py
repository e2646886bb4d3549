"""Keep one issue open while a canary is red: open it, bring it up to date, close it when all are green again.

The environment has JOBS, what GitHub knows of the jobs as JSON, RUN, the address of the run, and what `gh` reads:
GH_TOKEN and GH_REPO. The issue is found by its label, which nobody but those who maintain the repository can give.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any, Final

LABEL: Final = "canary"
TITLE: Final = "The canary is red: a coming release breaks the cache's tests"
BODY: Final = """\
The cache's tests fail on what will be released next: **{red}**. See [the last red run]({run}).

The workflow `canary` rewrites this text after each red run, and closes the issue when all of its jobs are green again.
Write what you find in comments. CONTRIBUTING.md tells how to run the same by hand, and what to do for a new release.
"""


def gh(*arguments: str) -> str:
    """Run GitHub's command line and return what it prints."""
    return subprocess.run(["gh", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Compare the jobs with the open issue; a canceled one ran out of time, a skipped one tells nothing."""
    jobs: dict[str, Any] = json.loads(os.environ["JOBS"])
    run = os.environ["RUN"]
    red = sorted(name for name, job in jobs.items() if job["result"] not in {"success", "skipped"})
    green = all(job["result"] == "success" for job in jobs.values())
    listed = gh("issue", "list", "--label", LABEL, "--state", "open", "--json", "number")
    opened = sorted(int(one["number"]) for one in json.loads(listed))
    words = ("--title", TITLE, "--body", BODY.format(red=", ".join(red), run=run))
    if red and opened:
        gh("issue", "edit", str(opened[0]), *words)
    elif red:
        gh("label", "create", LABEL, "--force", "--description", "A coming release of torch or transformers")
        gh("issue", "create", *words, "--label", LABEL)
    elif green:
        for number in opened:
            gh("issue", "close", str(number), "--comment", f"Green again: {run}")


if __name__ == "__main__":
    main()
