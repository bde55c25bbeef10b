"""Publish a trained model on the hub."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from vqrae.common.files import atomic_path
from vqrae.scripts.publishing.examples import Example
from vqrae.scripts.publishing.folder import write_folder
from vqrae.scripts.publishing.origin import Origin


@dataclass(frozen=True, kw_only=True)
class Publish:
    """Publish a trained model: weights, processor, example, and a card of what was measured."""

    model: str
    """Run directory or model folder."""
    repo: str | None = None
    """OWNER/NAME on the hub."""
    dry_run: str | None = None
    """Write the folder here, which must not exist, and upload nothing."""
    license: str | None = None
    """Of the weights; needed unless only embedded data and no other model are in them."""
    tokenizer: str | None = None
    """Of a generator: the hub id of its published visual tokenizer, to name it instead of copying
    it; or the folder of one that has moved."""
    evaluations: tuple[str, ...] = ()
    """Folders with scores; `evaluation` in and next to the run is read anyway."""
    example: bool = True
    """Run the model for an example."""
    images: str | None = None
    """Folder of images for the example; by default embedded scenes."""
    prompt: tuple[str, ...] = ()
    """For the example; may be given several times."""
    question: tuple[str, ...] = ()
    """For the example; may be given several times."""
    private: bool = False
    """Make a new repository that only its owner sees."""
    device: str | None = None
    """cpu, cuda, …; by default CUDA if torch sees a GPU."""

    def __post_init__(self) -> None:
        if self.repo is None and self.dry_run is None:
            raise ValueError("got no repo, expected OWNER/NAME, or --dry-run FOLDER")
        if self.dry_run is not None and Path(self.dry_run).exists():
            raise ValueError(f"dry_run: {self.dry_run} exists: choose another folder")

    def run(self) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        origin = Origin.of(self.model)
        if self.dry_run is not None:
            with atomic_path(self.dry_run) as folder:
                self.write(origin, folder)
            print(f"{self.dry_run} is complete; see its README.md. Nothing was uploaded.")
            return
        # Next to the model, whose weights can then be linked.
        with tempfile.TemporaryDirectory(dir=origin.run, prefix=".publish-") as place:
            self.write(origin, Path(place))
            print(f"published at {self.upload(place)}")

    def write(self, origin: Origin, folder: Path) -> None:
        """Write the folder, and say what is not in its card."""
        shown = Example(
            images=self.images, prompts=list(self.prompt), questions=list(self.question)
        )
        others = write_folder(
            origin,
            folder,
            repo=self.repo or "OWNER/NAME",
            license=self.license,
            tokenizer=self.tokenizer,
            evaluations=self.evaluations,
            example=shown if self.example else None,
            device=self.device,
        )
        for path in others:
            print(f"{path} is not in the card: it does not name these weights")

    def upload(self, folder: str) -> str:
        """Upload a folder; the address of its page."""
        assert self.repo is not None, "checked by __post_init__"
        api = HfApi()
        try:
            page = api.create_repo(self.repo, private=self.private, exist_ok=True)
            api.upload_folder(
                repo_id=page.repo_id,
                folder_path=folder,
                commit_message="Publish weights and card",
            )
        except HfHubHTTPError as error:
            raise ValueError(
                f"the hub refused {self.repo}: {str(error).splitlines()[0]}; `hf auth login` gives "
                "this machine a token, which must be allowed to write"
            ) from error
        return str(page)
