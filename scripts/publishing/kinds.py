"""The kinds of models that are published: what a card says of each, and how it is opened."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of model. In texts, REPO stands for its hub id and PROMPT for one that it knows."""

    title: str
    sentence: str
    """What it is."""
    use: str
    """Python of three lines that opens and uses it."""
    library: str
    """Of the hub, `library_name`."""
    task: str
    """Of the hub, `pipeline_tag`."""
    tags: tuple[str, ...]
    commands: tuple[str, ...]
    """What else reads the folder."""
    evaluations: tuple[str, ...]
    """Commands that measure it."""
    base: str
    """Key of the run's settings that names the model it started from."""


TOKENIZER_USE = """\
from vqrae.tokenizer.modeling import VQRAEModel

model = VQRAEModel.from_pretrained("REPO").eval()
codes = model.encode(images)  # (B, 3, H, W) in [0, 1] -> integers
images = model.decode(codes)"""
CHAT_USE = """\
model = AutoModelForImageTextToText.from_pretrained("REPO")
processor = AutoProcessor.from_pretrained("REPO")
asked = [{"type": "image", "image": image}, {"type": "text", "text": "what is in the image ?"}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
chat = [{"role": "user", "content": asked}]
inputs = processor.apply_chat_template(chat, return_tensors="pt", **options)
answer = processor.batch_decode(model.generate(**inputs, max_new_tokens=64))[0]"""
GENERATOR_USE = """\
from vqrae.generation.generator import Generator

generator = Generator.from_pretrained("REPO")
images = generator.images(["PROMPT"], seeds=[0])  # (1, 3, H, W) in [0, 1]"""
UNIFIED_USE = """\
from vqrae.mllm.inference import open_chat, open_generator

images = open_generator("REPO").images(["PROMPT"], seeds=[0])  # (1, 3, H, W) in [0, 1]
answer = open_chat("REPO").answer([(image, "what is in the image ?")])[0]"""
ENCODER_USE = """\
from transformers import AutoImageProcessor, AutoModel

inputs = AutoImageProcessor.from_pretrained("REPO")(image, return_tensors="pt")
features = AutoModel.from_pretrained("REPO")(**inputs).last_hidden_state  # (1, N, D)"""
ASK = ("vqrae chat --model REPO --image image.png --question 'what is in the image ?'",)
DRAW = ("vqrae generate --model REPO --prompt 'PROMPT' --out out",)
EVAL_CHAT = ("bash scripts/eval_understanding.sh model=RUN",)
EVAL_IMAGES = ("bash scripts/eval_geneval.sh model=RUN", "bash scripts/eval_dpg.sh model=RUN")

TOKENIZER = Kind(
    title="visual tokenizer",
    sentence="A visual tokenizer: continuous features of images for understanding, codes for "
    "generation, and a decoder from codes to pixels.",
    use=TOKENIZER_USE,
    library="vqrae",
    task="image-feature-extraction",
    tags=("image-tokenizer", "vector-quantization"),
    commands=(
        "vqrae reconstruct --model REPO --images IMAGES --out out",
        "vqrae codebook --model REPO --images IMAGES --out out",
    ),
    evaluations=(
        "bash scripts/eval_reconstruction.sh model=RUN",
        "bash scripts/eval_features.sh model=RUN",
        "bash scripts/eval_zeroshot.sh model=RUN",
    ),
    base="model.encoder",
)
LLAVA = Kind(
    title="understanding model",
    sentence="LLaVA-1.5 on the continuous features of a visual tokenizer; plain transformers opens "
    "it.",
    use=f"from transformers import AutoModelForImageTextToText, AutoProcessor\n\n{CHAT_USE}",
    library="transformers",
    task="image-text-to-text",
    tags=("llava",),
    commands=ASK,
    evaluations=EVAL_CHAT,
    base="llm",
)
OWN_TOWER = replace(
    LLAVA,
    sentence="LLaVA-1.5 on features of a visual tokenizer that no encoder of transformers gives: "
    "its vision tower is a class of `vqrae`.",
    use=f"import vqrae.understanding.vision_tower\n{LLAVA.use}",
    library="vqrae",
)
GENERATOR = Kind(
    title="image generator",
    sentence="A language model that predicts the codes of images from text or a class, with the "
    "visual tokenizer that turns codes into pixels.",
    use=GENERATOR_USE,
    library="vqrae",
    task="text-to-image",
    tags=("autoregressive-image-generation",),
    commands=DRAW,
    evaluations=EVAL_IMAGES,
    base="model.llm",
)
UNIFIED = Kind(
    title="unified model",
    sentence="One language model that answers questions about images and generates them, with its "
    "visual tokenizer.",
    use=UNIFIED_USE,
    library="vqrae",
    task="any-to-any",
    tags=("autoregressive-image-generation",),
    commands=(*ASK, *DRAW),
    evaluations=(*EVAL_CHAT, *EVAL_IMAGES),
    base="llm",
)
ENCODER = Kind(
    title="vision encoder",
    sentence="A vision encoder trained on images and captions with SigLIP's sigmoid loss; plain "
    "transformers opens it. `siglip/` is the whole model, with its side of texts.",
    use=ENCODER_USE,
    library="transformers",
    task="image-feature-extraction",
    tags=("siglip",),
    commands=(),
    evaluations=("bash scripts/pretrain_encoder.sh output=RUN",),
    base="",
)


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The kind of a model by its `config.json`. Raises ValueError for any other model."""
    model_type = config.get("model_type")
    if model_type == "llava":
        tower = config["vision_config"].get("model_type")
        return OWN_TOWER if tower == "vqrae_features" else LLAVA
    if model_type == "qwen3" and "visual_vocabulary" not in config:
        model_type = "a language model without visual_vocabulary"
    kinds = {
        "vqrae": TOKENIZER,
        "qwen3": GENERATOR,
        "vqrae_multi_code": GENERATOR,
        "vqrae_mllm": UNIFIED,
        "siglip_vision_model": ENCODER,
    }
    if model_type not in kinds:
        raise ValueError(
            f"got {model_type!r}, expected a tokenizer, an understanding model, a generator, a "
            "unified model or an encoder of this package"
        )
    return kinds[model_type]
