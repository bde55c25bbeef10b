"""Where a model comes from, as its run directory records it, without paths of this machine."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqrae.common.checkpoints import resolve_model
from vqrae.common.config import read_yaml
from vqrae.common.files import read_json, weights_fingerprint
from vqrae.common.run import trained_steps

# An absolute path that is not part of a URL or of a relative path, and its last part.
_PATH = re.compile(r"(?<![\w.:/~])~?/(?:[^\s,;:'\"\]\[/]+/)*([^\s,;:'\"\]\[/]+)/?")
_HUB_DATA = re.compile(r"hf:([\w.-]+/[\w.-]+)")
_EMBEDDED = re.compile(r"(.*: codes of )?(scenes|emoji)\b(?!/)")


@dataclass(frozen=True)
class Origin:
    """What a run directory says of its model."""

    folder: Path
    """Of the model."""
    run: Path
    """Of its training; the same folder where there was none."""

    @classmethod
    def of(cls, name: str | Path) -> "Origin":
        """Of a run directory or model folder. Raises ValueError for a hub id."""
        folder = Path(resolve_model(name))
        if not folder.is_dir():
            raise ValueError(f"{name} is a hub id, expected a run directory or a model folder here")
        is_run = folder.name == "model" and folder.parent.is_dir()
        return cls(folder, folder.parent if is_run else folder)

    @property
    def trainings(self) -> list[Path]:
        """The folder of each training that led to the model, LLaVA's stages one after the other."""
        places = [self.run, self.run / "pretrain", self.run / "sft"]
        return [place for place in places if (place / "manifest.json").is_file()]

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration of the last training."""
        files = [place / "config.yaml" for place in self.trainings]
        known = [file for file in files if file.is_file()]
        return without_paths(read_yaml(known[-1])) if known else {}

    def manifest(self) -> dict[str, Any]:
        """What made the model: fingerprint, steps, and the manifest of each training."""
        launches = {place.name: read_json(place / "manifest.json") for place in self.trainings}
        return without_paths(
            {
                "weights": weights_fingerprint(self.folder),
                "steps": trained_steps(self.folder) or None,
                "trainings": launches,
            }
        )

    def data(self) -> list[str]:
        """What it was trained on."""
        found: list[str] = []
        for place in self.trainings:
            recorded = read_json(place / "manifest.json")["fingerprints"].get("data", "")
            found += recorded.split("; ") if recorded else []
        settings = self.settings
        if not found and "sprites" in settings:
            found = [f"scenes:{settings['sprites']}"]
        if not found and isinstance(settings.get("data"), dict):
            found = [settings["data"]["train"]]
        return [without_paths(source) for source in dict.fromkeys(found)]

    def is_embedded(self) -> bool:
        """Whether all of its data are made by this package, as far as is known."""
        sources = self.data()
        return bool(sources) and all(_EMBEDDED.match(source) for source in sources)

    def base_model(self, key: str) -> str | None:
        """Hub id of the model that training started from; `key` names it in the settings."""
        value: Any = self.settings
        for part in key.split(".") if key else ():
            value = value.get(part) if isinstance(value, dict) else None
        try:
            resolved = resolve_model(value) if isinstance(value, str) and key else ""
        except FileNotFoundError:
            return None
        return resolved if resolved and not Path(resolved).is_dir() else None

    def hub_datasets(self) -> list[str]:
        """Ids of the data sets of the hub among its data."""
        return sorted(set(_HUB_DATA.findall(" ".join([*self.data(), str(self.settings)]))))


def without_paths(value: Any) -> Any:
    """A value of JSON in whose texts an absolute path is only its last part."""
    if isinstance(value, str):
        return _PATH.sub(r"\1", value)
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    return [without_paths(item) for item in value] if isinstance(value, list) else value
