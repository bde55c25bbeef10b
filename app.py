"""A Hugging Face Space of `vqrae demo`: its variable MODEL names hub ids, with spaces between them.

What the Space installs, and how it is made: docs/demo.md.
"""

import os

from vqrae.demo.models import open_models
from vqrae.demo.page import build_page
from vqrae.demo.server import serve

serve(build_page(open_models(os.environ["MODEL"].split())), address=None)
