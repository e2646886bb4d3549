"""The package's page on an index: README.md with absolute links, and the project's addresses, where CI knows them.

A page on an index has no files beside it. Links and pictures lead to the files of the release's tag, in the repository
that GitHub names in `GITHUB_REPOSITORY`. A build elsewhere keeps README.md as it is and lists no repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!\w+:|#)([^)]+)\)")
PAPER = "https://arxiv.org/abs/2309.17453"


def absolute(readme: str, repository: str, tag: str) -> str:
    """Return the text with links to files, pictures and workflows of a repository in place of relative ones."""

    def lead(link: re.Match[str]) -> str:
        mark, words, path = link.groups()
        file = f"{'raw' if mark else 'blob'}/{tag}/{path}"
        return f"{mark}{words}({repository}/{path.removeprefix('../../') if path.startswith('../../') else file})"

    badge = re.compile(r"\[(!\[[^\]]*\]\([^)]+\))\]\((?!\w+:|#)([^)]+)\)")  # a picture inside a link
    readme = re.sub(r'(<img src=")(?!\w+:)', rf"\g<1>{repository}/raw/{tag}/", readme)
    readme = badge.sub(lambda found: f"[{LINK.sub(lead, found[1])}]({LINK.sub(lead, f'[]({found[2]})')[3:-1]})", readme)
    return LINK.sub(lead, readme)


class PackagePage(MetadataHookInterface):
    """Fill the fields `readme` and `urls`, which pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the two fields in place."""
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        urls = {"Paper": PAPER}
        if "GITHUB_REPOSITORY" in os.environ:
            repository = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
            tag = f"v{metadata['version']}"
            readme = absolute(readme, repository, tag)
            urls |= {
                "Source": repository,
                "Issues": f"{repository}/issues",
                "Documentation": f"{repository}/blob/{tag}/docs/start.md",
                "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
        metadata["urls"] = urls
