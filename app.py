"""A Hugging Face Space of `vqrae demo` (docs/demo.md): MODEL names hub ids, spaces between them."""

import os

from vqrae.demo.models import open_models
from vqrae.demo.page import build_page
from vqrae.demo.server import serve

serve(build_page(open_models(os.environ["MODEL"].split())), address=None)
