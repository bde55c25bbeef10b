"""Examples for a card: made with the folder that is published, as its reader opens it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from vqrae.common.files import read_json
from vqrae.common.images import (
    image_grid,
    image_to_tensor,
    open_image,
    resize_and_crop,
    save_image,
    tensor_to_image,
)
from vqrae.data.image_files import list_images
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.mllm.inference import open_chat, open_generator
from vqrae.scripts.publishing.kinds import ENCODER, GENERATOR, LLAVA, OWN_TOWER, TOKENIZER, Kind
from vqrae.tokenizer.modeling import VQRAEModel

SHOWN = 6
SCALE = 128  # pixels that a small image is enlarged to, at least


@dataclass(kw_only=True)
class Example:
    """What is shown to a model, and what it answered."""

    images: str | None = None
    """Folder of images; None: embedded scenes."""
    prompts: list[str] = field(default_factory=list)
    """For generated images; none: captions of scenes, or the first classes."""
    questions: list[str] = field(default_factory=list)
    """None: those about the first scene."""
    answers: list[tuple[str, str]] = field(default_factory=list)

    def sources(self, size: int) -> list[Image.Image]:
        """Square images of that many pixels."""
        if self.images is None:
            scenes = SceneDataset("validation", image_size=size)
            return [Image.fromarray(scenes.pixels(i)) for i in range(SHOWN)]
        paths = list_images(Path(self.images))[:SHOWN]
        return [resize_and_crop(open_image(path), size) for path in paths]


def make_example(kind: Kind, folder: Path, example: Example, device: str | None) -> str:
    """Write `example.png` into a model folder, and return what it shows.

    The prompts and answers of `example` are then those that it shows.
    """
    if kind is TOKENIZER:
        return reconstruct(folder, example, device)
    if kind is ENCODER:
        return components(folder, example)
    if kind in (LLAVA, OWN_TOWER):
        return ask(folder, example, device)
    caption = generate(folder, example, device)
    if kind is not GENERATOR:
        answer(folder, example.sources(read_size(folder))[0], example, device)
    return caption


def write(folder: Path, rows: list[list[torch.Tensor]], labels: Sequence[str] = ()) -> None:
    """A grid of images (3, H, W), small ones enlarged."""
    scale = max(1, SCALE // rows[0][0].shape[-1])
    save_image(image_grid(rows, labels=labels, scale=scale), folder / "example.png")


@torch.inference_mode()
def reconstruct(folder: Path, example: Example, device: str | None) -> str:
    """Images above their reconstructions."""
    model = VQRAEModel.from_pretrained(folder).eval().to(device or "cpu")
    config = model.config
    sources = [image_to_tensor(image) for image in example.sources(config.image_size)]
    decoded = model.decode(model.encode(torch.stack(sources).to(model.device))).cpu()
    rows = [list(resized(sources, config.output_size)), list(decoded)]
    write(folder, rows, ["original", "reconstruction"])
    return "images, and what decoding their codes gives"


def resized(images: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    """Images (3, H, W) with sides of `size`."""
    return [image_to_tensor(resize_and_crop(tensor_to_image(each), size)) for each in images]


@torch.inference_mode()
def components(folder: Path, example: Example) -> str:
    """The first three principal components of the patch features, as colours."""
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    size = model.config.image_size
    sources = example.sources(size)
    features_BND = model(**processor(sources, return_tensors="pt")).last_hidden_state
    features = features_BND.flatten(0, 1)
    centred = features - features.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    projected = centred @ axes.T
    colours = (projected / (4 * projected.std(0)) + 0.5).clamp(0, 1)
    side = size // model.config.patch_size
    maps = colours.view(len(sources), side, side, 3).permute(0, 3, 1, 2)
    shown = torch.nn.functional.interpolate(maps, size=(size, size))
    write(folder, [[image_to_tensor(image) for image in sources], list(shown)])
    return "images, and the first three principal components of their patch features as colours"


def ask(folder: Path, example: Example, device: str | None) -> str:
    """The first image, and answers about it."""
    image = example.sources(read_size(folder))[0]
    write(folder, [[image_to_tensor(image)]])
    answer(folder, image, example, device)
    return "the image that the model is asked about"


def answer(folder: Path, image: Image.Image, example: Example, device: str | None) -> None:
    """Ask the questions of `example`, or those about its first scene."""
    if not example.questions and example.images is None:
        example.questions = [each.text for each in SceneDataset("validation").questions(0, 3)]
    questions = example.questions or ["What is in the image?"]
    chat = open_chat(folder, device=device)
    answers = chat.answer([(image, question) for question in questions])
    example.answers = list(zip(questions, answers, strict=True))


def read_size(folder: Path) -> int:
    """Pixels of a side of the images that an understanding model reads."""
    values = read_json(folder / "processor_config.json")["image_processor"]
    return int(values["crop_size"]["height"])


def generate(folder: Path, example: Example, device: str | None) -> str:
    """A row of images for each prompt."""
    generator = open_generator(folder, device=device)
    scenes = SceneDataset("validation")
    known = getattr(generator.encode_prompt, "classes", map(scenes.caption, range(4)))
    example.prompts = example.prompts or list(known)[:4]
    rows = [list(generator.images([each] * 4, seeds=range(4))) for each in example.prompts]
    write(folder, rows, example.prompts)
    return "images of these prompts, seeds 0 to 3, none left out"
