"""Puts what the command line reads beside the package (recipes, catalogue, evidence, vectors) into the wheel."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHARED = ("catalogue", "recipes", "evidence", "tests/vectors")


class Share(BuildHookInterface):
    """In a wheel these folders lie in limbeck/_share, where `limbeck.catalogue.home` looks without a checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the folders, except to an editable install, where copies would go stale."""
        if version != "editable":
            root = Path(self.root)
            build_data["force_include"].update(
                {str(root / f): f"limbeck/_share/{f}" for f in SHARED if (root / f).is_dir()}
            )
