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
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
COLORS = {
    "body_background_fill": "var(--paper)",
    "body_text_color": "var(--ink)",
    "body_text_color_subdued": "var(--soft)",
    "block_background_fill": "var(--card)",
    "block_info_text_color": "var(--soft)",
    "block_label_text_color": "var(--soft)",
    "block_title_text_color": "var(--soft)",
    "border_color_primary": "var(--line)",
    "button_primary_background_fill": "var(--accent)",
    "button_primary_background_fill_hover": "var(--ink)",
    "button_primary_text_color": "var(--paper)",
    "button_secondary_background_fill": "var(--wash)",
    "button_secondary_background_fill_hover": "var(--line)",
    "button_secondary_text_color": "var(--ink)",
    "input_background_fill": "var(--card)",
    "slider_color": "var(--accent)",
}
"""Of gradio's theme, from look.css."""


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
    look = (resources.files("vqrae.eval") / "look.css").read_text(encoding="utf-8")
    own = (resources.files("vqrae.demo") / "page.css").read_text(encoding="utf-8")
    theme = gr.themes.Base(font=FONTS, font_mono=("ui-monospace", "Menlo", "monospace"))
    on_dark = {f"{name}_dark": color for name, color in COLORS.items()}
    _, local, public = page.queue(max_size=QUEUE).launch(
        server_name=address,
        server_port=port,
        share=share,
        theme=theme.set(color_accent="var(--accent)", **COLORS, **on_dark),
        # In the head: gradio rewrites `css`, and loses what is for dark screens.
        head=f"<style>{look}</style>",
        css=own,
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
        try:
            page.block_thread()
        finally:  # threads of an open server would keep the process alive after SIGTERM
            page.close()
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
