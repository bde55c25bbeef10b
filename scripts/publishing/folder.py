"""A model folder that is complete by itself: everything it needs, and a card of what is known."""

import os
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import SiglipImageProcessor

from vqrae.common.files import read_json, write_json, write_text
from vqrae.generation.own_tokenizer import own_tokenizer
from vqrae.scripts.publishing.examples import Example, make_example
from vqrae.scripts.publishing.kinds import ENCODER, Kind, kind_of
from vqrae.scripts.publishing.origin import Origin
from vqrae.scripts.publishing.scores import Evaluation, find_evaluations, retrieval

DEFAULT_PROMPT = "a photo of a red circle"
TOKENIZER_FOLDER = "visual_tokenizer"
LEFT_OUT = shutil.ignore_patterns(".*", "*.bin", "*.pt", "*.pth", "*.pkl")  # pickles run code


def write_folder(
    origin: Origin,
    folder: Path,
    *,
    repo: str,
    license: str | None,
    tokenizer: str | None = None,
    evaluations: Sequence[str] = (),
    example: Example | None,
    device: str | None = None,
) -> list[Path]:
    """Write the complete folder of a model.

    Args:
        repo: hub id that the card's examples open.
        license: of the weights; None where only embedded data and no other model are in them.
        tokenizer: hub id of the published visual tokenizer, which is then named, not copied; or
            the folder of one that has moved.
        evaluations: folders of scores in addition to `evaluation` in and next to the run.
        example: what is shown to the model for the card; None: nothing.

    Returns:
        Where the card holds no scores: the files of scores, which do not name these weights.

    Raises:
        ValueError: for another kind of model, or without a license that is needed.
    """
    kind = kind_of(read_json(origin.folder / "config.json"))
    base_model = origin.base_model(kind.base)
    license = license or own_license(origin, base_model)
    copy_model(origin, kind, folder, tokenizer)
    shown = make_example(kind, folder, example, device) if example else None
    manifest = origin.manifest()
    folders = [origin.run / "evaluation", origin.run.parent / "evaluation"]
    folders += [Path(name) for name in evaluations]
    found, others = find_evaluations(folders, manifest["weights"])
    found += retrieval(origin.run, manifest["weights"]) if kind is ENCODER else []
    images = copy_images(found, folder)
    write_json(folder / "manifest.json", manifest)
    if origin.settings:
        text = yaml.safe_dump(origin.settings, sort_keys=False, width=120)
        write_text(folder / "training_config.yaml", text)
    data = origin.data()
    measured = [{**vars(each), "image": images.get(each.title)} for each in found]
    card = ModelCard.from_template(
        card_data(kind, origin, repo, license, base_model, found),
        template_str=(resources.files(__package__) / "card.md.jinja").read_text(encoding="utf-8"),
        name=repo.rpartition("/")[2],
        repo=repo,
        kind=kind,
        prompt=quotable(example.prompts if example else []),
        example=shown,
        answers=example.answers if example else [],
        evaluations=measured,
        manifest=manifest,
        settings=bool(origin.settings),
        base_model=base_model,
        tokenizer=named_tokenizer(folder),
        data=data,
        emoji=any("emoji" in source for source in data),
    )
    write_text(folder / "README.md", str(card).rstrip() + "\n")
    return [] if found else others


def quotable(prompts: Sequence[str]) -> str:
    """The first prompt that Python and a shell read as it is."""
    return next((each for each in prompts if not set(each) & set("\"'\\\n")), DEFAULT_PROMPT)


def own_license(origin: Origin, base_model: str | None) -> str:
    """That of this package, for weights that hold nothing else."""
    if base_model or not origin.is_embedded():
        source = base_model or "; ".join(origin.data()) or "data that no run directory records"
        raise ValueError(
            f"the license of these weights depends on {source}: name it with --license, such as "
            "apache-2.0, cc-by-nc-4.0 or other"
        )
    return "apache-2.0"


def copy_model(origin: Origin, kind: Kind, folder: Path, tokenizer: str | None) -> None:
    """The files of a model, with its visual tokenizer or that one's hub id."""
    copy_tree(origin.folder, folder)
    values = without_names(read_json(folder / "config.json"))
    if "vqrae_tokenizer" in values:
        found = own_tokenizer(str(origin.folder), values, tokenizer)
        recorded = tokenizer or values["vqrae_tokenizer"]
        is_here = Path(recorded).is_dir() or (origin.folder.resolve() / recorded).is_dir()
        if is_here:
            copy_tree(found, folder / TOKENIZER_FOLDER)
        values["vqrae_tokenizer"] = TOKENIZER_FOLDER if is_here else recorded
    write_json(folder / "config.json", values)
    if kind is ENCODER:
        if not (folder / "preprocessor_config.json").is_file():
            size = {"height": values["image_size"], "width": values["image_size"]}
            half = [0.5] * 3  # what `vqrae.quickstart.pretrain_encoder` normalises by
            SiglipImageProcessor(size=size, image_mean=half, image_std=half).save_pretrained(folder)
        if (origin.run / "siglip").is_dir():
            copy_tree(origin.run / "siglip", folder / "siglip")


def without_names(values: Any) -> Any:
    """A configuration without the folders that its parts were loaded from."""
    if isinstance(values, dict):
        kept = {key: value for key, value in values.items() if key != "_name_or_path"}
        return {key: without_names(value) for key, value in kept.items()}
    return values


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder without pickles and hidden files; weights are linked where that is possible."""

    def copy(path: str, new: str) -> None:
        if path.endswith(".safetensors"):
            try:
                os.link(path, new)
                return
            except OSError:  # another file system
                pass
        shutil.copyfile(path, new)

    shutil.copytree(source, target, copy_function=copy, ignore=LEFT_OUT, dirs_exist_ok=True)


def copy_images(evaluations: Sequence[Evaluation], folder: Path) -> dict[str, str]:
    """Copy the images of evaluations; their names by title."""
    names = {}
    for evaluation in evaluations:
        if evaluation.image is not None:
            names[evaluation.title] = f"{evaluation.title.lower().replace(' ', '_')}.png"
            shutil.copyfile(evaluation.image, folder / names[evaluation.title])
    return names


def named_tokenizer(folder: Path) -> str | None:
    """How a card calls the visual tokenizer of a model."""
    values = read_json(folder / "config.json")
    fingerprint = values.get("vqrae_tokenizer_fingerprint")
    place = values.get("vqrae_tokenizer")
    where = f"`{place}`, " if place else ""
    return f"{where}weights `{fingerprint}`" if fingerprint else None


def card_data(
    kind: Kind,
    origin: Origin,
    repo: str,
    license: str,
    base_model: str | None,
    evaluations: Sequence[Evaluation],
) -> ModelCardData:
    """The card's front matter."""
    results = []
    for evaluation in evaluations:
        for name, value in evaluation.figures.items():
            about: dict[str, Any] = {"dataset_name": evaluation.data, "metric_name": name}
            about |= {"dataset_type": evaluation.title.lower().replace(" ", "-")}
            about |= {"metric_type": name.replace(" ", "_"), "metric_value": round(value, 6)}
            results.append(EvalResult(task_type=evaluation.task, **about))
    optional: dict[str, Any] = {}
    if results:
        optional = {"eval_results": results, "model_name": repo.rpartition("/")[2]}
    return ModelCardData(
        license=license,
        library_name=kind.library,
        pipeline_tag=kind.task,
        tags=["vqrae", *kind.tags],
        datasets=origin.hub_datasets() or None,
        base_model=base_model,
        **optional,
    )
