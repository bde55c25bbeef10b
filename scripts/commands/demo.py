"""Show a page on which people try the models."""

from dataclasses import dataclass
from pathlib import Path

from vqrae.common.config import check_range
from vqrae.common.errors import require_package

QUICKSTART = ("runs/quickstart",)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Open a page in the browser: reconstruct images, ask about them, generate, edit codes.

    It works with what is there, and says which command makes what is missing.
    """

    model: tuple[str, ...] = QUICKSTART
    """Run directories, a folder of some such as the quickstart's, model folders or hub ids."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    port: int | None = None
    """By default the first free one from 7860 on."""
    share: bool = False
    """Make a public address too, through gradio's servers; else only this machine sees the page."""

    def __post_init__(self) -> None:
        check_range(self, "port", low=1)

    def run(self) -> None:
        require_package("gradio", "vqrae demo")
        if self.model == QUICKSTART and not Path(QUICKSTART[0]).is_dir():
            raise FileNotFoundError(
                f"there is no {QUICKSTART[0]}: bash scripts/quickstart.sh makes it; or give a run "
                "directory, a model folder or a hub id"
            )
        # From here on it takes seconds.
        from vqrae.common.run import quiet_libraries
        from vqrae.demo.models import open_models
        from vqrae.demo.page import build_page
        from vqrae.demo.server import serve

        quiet_libraries()
        page = build_page(open_models(self.model, device=self.device))
        serve(page, port=self.port, share=self.share)
