"""The server of the page: a local address, bounded requests, no files."""

from importlib import resources

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vqrae.demo.visitors import MAX_BYTES

MAX_BODY = 2 * MAX_BYTES
"""Bytes of a request: images are sent as base64, which is a third longer."""
QUEUE = 16  # visitors who wait; further ones are told to come back
VISITORS = 100  # whose state is kept


def serve(
    page: gr.Blocks,
    *,
    address: str | None = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    wait: bool = True,
) -> str:
    """Serve the page, and return its address, by default when the user ends it.

    Args:
        address: None: that of GRADIO_SERVER_NAME, which a Space sets.
        port: None: the first free one from 7860 on.
        share: also a public address, through gradio's servers, for a week.
        wait: until Ctrl-C.
    """
    files = (resources.files("vqrae.eval") / "look.css", resources.files("vqrae.demo") / "page.css")
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
    colors = {"body_background_fill": "var(--paper)", "body_text_color": "var(--ink)"}
    colors |= {"block_background_fill": "var(--card)", "border_color_primary": "var(--line)"}
    colors |= {"body_text_color_subdued": "var(--soft)", "input_background_fill": "var(--card)"}
    colors |= {"button_primary_background_fill": "var(--accent)", "color_accent": "var(--accent)"}
    colors |= {"slider_color": "var(--accent)", "block_label_text_color": "var(--soft)"}
    colors |= {"button_secondary_background_fill": "var(--wash)"}
    colors |= {"button_primary_background_fill_hover": "var(--ink)"}
    colors |= {"button_secondary_background_fill_hover": "var(--line)"}
    dark = {f"{name}_dark": value for name, value in colors.items()}
    accepted = gr.themes.Base(font=fonts, font_mono=("ui-monospace", "Menlo", "monospace"))
    known = {name: value for name, value in (colors | dark).items() if hasattr(accepted, name)}
    _, local, public = page.queue(max_size=QUEUE).launch(
        server_name=address,
        server_port=port,
        share=share,
        theme=accepted.set(**known),
        css="\n".join(file.read_text(encoding="utf-8") for file in files),
        app_kwargs={"middleware": [Middleware(Bounded)]},
        state_session_capacity=VISITORS,
        footer_links=[],
        ssr_mode=False,
        show_error=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    reached = public if share and public else local
    if wait:
        print(f"the demo is at {reached} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return reached


class Bounded:
    """Refuses long requests, those of unknown length, and files: the page sends none as such."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    @staticmethod
    def refusal(scope: Scope) -> PlainTextResponse | None:
        """What to answer instead of the page."""
        headers = dict(scope["headers"])
        length = int(headers.get(b"content-length", 0))
        if length > MAX_BODY:
            text = f"got {length} bytes, expected at most {MAX_BODY}"
            return PlainTextResponse(text, status_code=413)
        if b"transfer-encoding" in headers:
            return PlainTextResponse("got no content-length, expected one", status_code=411)
        if scope["path"].rstrip("/").endswith("/upload"):
            return PlainTextResponse("files go through the page", status_code=404)
        return None
