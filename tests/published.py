"""What published folders give in a process that knows nothing else.

    python tests/published.py REQUEST.json OUT.pt

REQUEST names the folders by kind, those of `plain` first: until they are done, nothing of `vqrae`
can be imported.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image


class Forbidden:
    """An importer that has no `vqrae`."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "vqrae":
            raise ModuleNotFoundError(f"{name} is forbidden here")


def inputs() -> dict[str, Any]:
    """What the code of cards is given."""
    pixels = torch.arange(3 * 64 * 64).view(64, 64, 3) * 7 % 256
    image = Image.fromarray(pixels.to(torch.uint8).numpy())
    return {
        "image": image,
        "images": (pixels.permute(2, 0, 1)[None] / 255),
    }


def use(folder: Path, card: Path | None = None) -> dict[str, Any]:
    """What the Python of a card leaves behind, with `folder` in place of the hub id."""
    text = ((card or folder) / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    given = inputs()
    names = dict(given)
    torch.manual_seed(0)
    with torch.inference_mode():
        exec(code.replace("OWNER/NAME", str(folder)), names)
    kept = ("codes", "images", "features", "answer")
    return {name: names[name] for name in kept if names.get(name) is not given.get(name)}


def logits(folder: Path) -> torch.Tensor:
    """Of a generator with one code a position, as plain transformers opens it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(torch.arange(1, 20)[None]).logits


def main(request: str, out: str) -> None:
    torch.set_num_threads(1)
    asked = json.loads(Path(request).read_text())
    sys.meta_path.insert(0, Forbidden())
    found: dict[str, Any] = {}
    for kind, folder in asked["plain"].items():
        found[f"plain {kind}"] = logits(Path(folder)) if kind == "generator" else use(Path(folder))
    assert not [name for name in sys.modules if name.partition(".")[0] == "vqrae"]
    del sys.meta_path[0]
    for kind, folder in asked["vqrae"].items():
        found[kind] = use(Path(folder))
    found["hub"] = on_the_hub(asked["hub"], asked["vqrae"]["generator"])
    torch.save(found, out)


def on_the_hub(model: str, card: str) -> dict[str, Any]:
    """What the Python of a generator's card gives once the model is uploaded."""
    from vqrae.scripts import cli

    words = ["publish", model, "me/generator", "--license", "apache-2.0", "--example", "false"]
    assert cli.main(words) == 0
    return use(Path("me/generator"), Path(card))


if __name__ == "__main__":
    main(*sys.argv[1:])
