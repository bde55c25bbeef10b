"""The quickstart's report, from the files that its steps really write."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqrae.common.files import read_json, write_json
from vqrae.common.images import save_image
from vqrae.data.code_shards import CodeManifest, CodeWriter
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import benchmark_prompts
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.geneval import evaluate as geneval
from vqrae.eval.geneval.folders import sample_path, write_prompts
from vqrae.eval.geneval.scenes import ceilings, satisfying_images
from vqrae.eval.reconstruction.evaluate import evaluate_reconstruction
from vqrae.quickstart.evidence import (
    STEPS,
    figure_rows,
    read_evidence,
    report_values,
)
from vqrae.quickstart.report import ReportConfig, main, write_report
from vqrae.quickstart.scene_questions import evaluate_questions
from vqrae.quickstart.systems import SYSTEMS
from vqrae.tokenizer.modeling import VQRAEModel

FAMILIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def write_training(run: Path) -> None:
    """Manifests and metrics of all training runs."""
    packages = {"python": "3.12.1", "torch": "2.14.1"}
    manifest = {"git_commit": "0123abc", "packages": packages, "seed": 0, "fingerprints": {}}
    for folder in {curve.folder for curve in SYSTEMS["vqrae"].curves} | {"tokenizer"}:
        write_json(run / folder / "manifest.json", {**manifest, "started": "2026-01-02T03:04:05"})
        keys = [curve.key for curve in SYSTEMS["vqrae"].curves if curve.folder == folder]
        rows = [{"step": i + 1, **dict.fromkeys(keys, 2.0 / (i + 2) + 0.05)} for i in range(40)]
        (run / folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_codes(run: Path) -> None:
    sizes = {"codebook_size": 64, "grid_size": 8, "num_images": 20, "shard_size": 10}
    manifest = CodeManifest(tokenizer_fingerprint="f", source="scenes", **sizes)
    writer = CodeWriter(run / "codes", manifest)
    rng = np.random.default_rng(0)
    for shard in range(manifest.num_shards):
        codes = (rng.exponential(12, size=(10, 64)).astype(np.int64) % 64).astype(np.uint16)
        writer.write(shard, codes, [["a photo of a circle"]] * 10)


def write_evaluations(run: Path, model: VQRAEModel) -> None:
    """What the three evaluations write; the generator's images are scenes, some of them wrong."""
    folder = run / "evaluation"
    metrics, *_ = evaluate_reconstruction(model, SceneDataset("validation", 4))
    write_json(folder / "reconstruction.json", metrics)
    answers = evaluate_questions(
        lambda pairs: ["star" if "thing" in text else "purple" for _, text in pairs], num_images=8
    )
    write_json(folder / "questions.json", answers)
    shapes = load_sprites("shapes")
    prompts = benchmark_prompts(shapes.names, 2)
    write_prompts(folder / "images", prompts)
    images = satisfying_images(prompts, shapes, image_size=64, per_prompt=2)
    for i, (image, _) in enumerate(images):
        shown = image if i % 4 else Image.new("RGB", (64, 64), "gray")
        save_image(shown, sample_path(folder / "images", i // 2, i % 2))
    geneval.main([f"images={folder / 'images'}", f"output={folder / 'generation.json'}"])
    ceiling = ceilings(prompts, model, sprites="shapes", images_per_prompt=2)
    scores = read_json(folder / "generation.json")
    write_json(folder / "generation.json", {**scores, "ceiling": ceiling})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A finished quickstart of the default length."""
    run = tmp_path_factory.mktemp("quickstart")
    write_json(run / "plan.json", {"minutes": 12.0, "sprites": "shapes", "steps": {"encoder": 300}})
    for i, name in enumerate(STEPS):
        write_json(run / "steps" / f"{name}.json", {"seconds": 10.0 * (i + 1), "done": True})
    model = VQRAEModel.from_pretrained(tokenizer_folder)
    model.save_pretrained(run / "tokenizer" / "model")
    write_training(run)
    write_codes(run)
    write_evaluations(run, model)
    main([f"directory={run}", "num_scenes=3"])
    return run


class Page(HTMLParser):
    """Collects sources, visible text and the nesting of tags."""

    VOID = ("meta", "img", "br", "link", "path", "use", "rect", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        links = ("src", "href", "xlink:href")
        self.sources += [value or "" for key, value in attributes if key in links]
        self.ids += [value or "" for key, value in attributes if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_json_holds_what_is_promised(run: Path) -> None:
    report = read_json(run / "report.json")
    assert report["tokenizer"].keys() >= {"psnr", "ssim", "codebook_usage"}
    assert report["understanding"].keys() >= {"accuracy", "blind_accuracy"}
    assert "examples" not in report["understanding"]
    ceiling = report["generation"]["ceiling"]
    for scores in (report["generation"], ceiling["truth"], ceiling["reconstruction"]):
        assert scores.keys() >= {"overall", *FAMILIES}
    assert report["seconds"] == {name: 10.0 * (i + 1) for i, name in enumerate(STEPS)}
    assert report["manifests"]["tokenizer/stage2"]["git_commit"] == "0123abc"


def test_page_is_self_contained(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    assert page.open == []
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert len(page.ids) == len(set(page.ids))
    anchors = {source[1:] for source in page.sources if source.startswith("#")}
    assert anchors <= set(page.ids)
    assert "Not measured yet" not in page.text
    assert "NaN" not in page.text


def test_page_marks_right_and_wrong(run: Path) -> None:
    text = (run / "report.html").read_text()
    lines = (run / "evaluation" / "generation.jsonl").read_text().splitlines()
    right = [json.loads(line)["correct"] for line in lines]
    # Two prompts a family: all are shown.
    assert text.count('<span class="yes"') == sum(right)
    assert text.count('<span class="no"') == len(right) - sum(right) > 0
    examples = read_json(run / "evaluation" / "questions.json")["examples"]
    equal = [each["answer"] == each["expected"] for each in examples]
    assert text.count('<b class="right">✓') == sum(equal) > 0
    assert text.count('<b class="wrong">✗') == len(equal) - sum(equal) > 0


def test_summary_is_an_image(run: Path) -> None:
    with Image.open(run / "report.png") as image:
        assert min(image.size) > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 1000


def test_every_part_may_be_missing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "plan.json", {"minutes": 2.0, "steps": {}})
    write_json(tmp_path / "steps" / "encoder.json", {"seconds": 3.0, "done": False})
    main([f"directory={tmp_path}"])
    assert "report:" in capsys.readouterr().out
    report = read_json(tmp_path / "report.json")
    assert report["seconds"] == {}
    assert not {"tokenizer", "understanding", "generation"} & set(report)
    page = Page((tmp_path / "report.html").read_text())
    assert page.text.count("Not measured yet") == 5
    assert (tmp_path / "report.png").stat().st_size > 0


def test_figures_are_judged_by_the_budget(run: Path) -> None:
    values = report_values(read_evidence(run))
    values["tokenizer"] = {**values["tokenizer"], "psnr": 26.0}
    assert [figure_rows(values, budget)[0].met for budget in (None, 0, 1)] == [None, True, False]
    assert figure_rows({}, 0)[0].met is None


@pytest.mark.parametrize("folder", ["nowhere", ""])
def test_other_folders_are_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ValueError, match="set directory="):
        write_report(ReportConfig(directory=str(tmp_path / folder)))
