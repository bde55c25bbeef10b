"""Show a page on which people try the models."""

from dataclasses import dataclass

from vqrae.common.config import check_range
from vqrae.common.errors import require_package
from vqrae.common.run import quiet_libraries


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Open a page in the browser: reconstruct images, ask about them, generate, edit codes.

    It works with what is there, and says which command makes what is missing.
    """

    model: tuple[str, ...] = ("runs/quickstart",)
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
        from vqrae.demo.models import open_models
        from vqrae.demo.page import build_page
        from vqrae.demo.server import serve

        quiet_libraries()
        page = build_page(open_models(self.model, device=self.device))
        serve(page, port=self.port, share=self.share)
