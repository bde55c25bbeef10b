"""DPG-Bench: scores by hand, the published script's faults, tables, judges, the command."""

import json
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import Server
from PIL import Image
from processes import launch

from vqrae.common.files import read_json
from vqrae.common.images import image_to_tensor, tile
from vqrae.eval.dpg_bench import evaluate
from vqrae.eval.dpg_bench.evaluate import DPGConfig, find_images, split_grid
from vqrae.eval.dpg_bench.questions import DPGItem, DPGQuestion, read_questions, write_questions
from vqrae.eval.dpg_bench.scenes import scene_items, true_images
from vqrae.eval.dpg_bench.scores import first_word, image_score, summarize
from vqrae.eval.judges.judge import EndpointJudge, JudgeError, build_judge
from vqrae.eval.judges.scenes import SceneJudge
from vqrae.generation.generator import Generator

CAR = DPGItem(
    "car",
    "a red car left of a tree",
    (
        DPGQuestion(1, "Is there a car?", "entity - whole (car)"),
        DPGQuestion(2, "Is it red?", "attribute - color (car, red)", (1,)),
        DPGQuestion(3, "Is there a tree?", "entity - whole (tree)"),
        DPGQuestion(
            4, "Is it left of the tree?", "relation - spatial (car, tree, left of)", (1, 3)
        ),
    ),
)
SKY = DPGItem(
    "sky",
    "a blue sky",
    (
        DPGQuestion(1, "Is there a sky?", "entity - whole (sky)"),
        DPGQuestion(2, "Is it blue?", "global ()", (1,)),
    ),
)
YES, NO = "yes", "no"


def item(name: str, **parents: tuple[int, ...]) -> DPGItem:
    """Questions `_1`, `_2` … with their parents, in the order given."""
    questions = [DPGQuestion(int(key[1:]), "q", "a ()", given) for key, given in parents.items()]
    return DPGItem(name, "", tuple(questions))


class TestScores:
    @pytest.mark.parametrize(
        ("asked", "answers", "score"),
        [
            (CAR, [YES, YES, NO, YES], 0.5),  # the relation falls with the tree
            (CAR, [NO, YES, YES, YES], 0.25),
            (item("chain", _3=(2,), _2=(1,), _1=()), [YES, YES, NO], 0),
            (item("circle", _1=(2,), _2=(1,), _3=()), [YES, YES, YES], 1),
            (item("circle", _1=(2,), _2=(1,), _3=()), [YES, NO, YES], 1 / 3),
            (item("alone", _1=(7,)), [YES], 1),
        ],
    )
    def test_a_question_counts_with_everything_that_it_depends_on(
        self, asked: DPGItem, answers: list[str], score: float
    ) -> None:
        assert image_score(asked, answers) == pytest.approx(score)

    def test_golden(self) -> None:
        cars = [[YES, YES, YES, YES], [YES, YES, NO, YES], [NO, YES, YES, YES], [YES, NO, YES, YES]]
        answers = {"car": cars, "sky": [[YES, YES], [YES, NO], [NO, YES], [NO, NO]]}
        values = summarize([CAR, SKY], answers)
        car, sky = (1 + 0.5 + 0.25 + 0.75) / 4, (1 + 0.5 + 0 + 0) / 4
        assert values["dpg"] == pytest.approx(100 * (car + sky) / 2)
        # Categories take answers as given, of all images: entity 6 of 8 + 2 of 4.
        expected = {"attribute": 75, "entity": 100 * 8 / 12, "global": 50, "relation": 100}
        assert values["categories"] == pytest.approx(expected)
        detailed = {"attribute - color", "entity - whole", "global", "relation - spatial"}
        assert set(values["categories_detailed"]) == detailed
        assert (values["num_prompts"], values["num_scored"], values["unclear_answers"]) == (2, 2, 0)

    def test_answers_and_prompts_that_do_not_count(self) -> None:
        words = [
            first_word(text) for text in (" Yes.", "YES, it is", "yesterday", "", "it is, yes")
        ]
        assert words == ["yes", "yes", "yesterday", "", "it"]
        values = summarize([CAR, SKY], {"sky": [["Yes.", "blue"]]})
        assert (values["dpg"], values["unclear_answers"]) == (50, 1)
        assert (values["num_prompts"], values["num_scored"]) == (2, 1)
        with pytest.raises(ValueError, match="none of 2 prompts"):
            summarize([CAR, SKY], {})


def test_random_tables_score_as_by_the_published_script() -> None:
    """golden/dpg_bench.py made the numbers; `vqrae.eval.dpg_bench.scores` lists the faults."""
    file = Path(__file__).parent / "golden" / "dpg_bench.json"
    script = runpy.run_path(str(file.with_suffix(".py")))
    expected = json.loads(file.read_text())
    assert [script["ours"](*table) for table in script["tables"](len(expected))] == expected
    assert sum(bool(table and table["dropped"]) for table in expected) > 20


HEADER = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"


class TestTable:
    def test_round_trip(self, tmp_path: Path) -> None:
        write_questions(tmp_path / "q.csv", [CAR, SKY])
        assert read_questions(tmp_path / "q.csv") == ([CAR, SKY], [])
        assert (tmp_path / "q.csv").read_text().splitlines()[2] == (
            "car,a red car left of a tree,,2,1,attribute,color,"
            '"attribute - color (car, red)",Is it red?'
        )

    @pytest.mark.parametrize(
        ("rows", "message", "numbers"),
        [
            ("a,p,1,0,t,other\na,p,1,0,t,q\n", "row 2: question 1 of item a twice, the later", [1]),
            ("a,p,1,7,t,q\n", r"item a: question 1 depends on \[7\], which do not exist", [1]),
            ("a,p,1,2,t,q\na,p,2,1;,t,q\n", "row 2 is left out: invalid literal", [1]),
            ("a,p,1,0,t,q\na,p\n", "row 2 is left out", [1]),
        ],
    )
    def test_oddities_are_told(
        self, rows: str, message: str, numbers: list[int], tmp_path: Path
    ) -> None:
        (tmp_path / "q.csv").write_text(HEADER + rows)
        items, problems = read_questions(tmp_path / "q.csv")
        assert [question.number for question in items[0].questions] == numbers
        assert items[0].questions[-1].text == "q"
        assert re.match(message, problems[0])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("item_id,text\n", "no columns proposition_id"),
            (HEADER, "holds no questions: it has no rows"),
            (HEADER + "a,p,one,0,t,q\n", "holds no questions: row 1 is left out: invalid literal"),
        ],
    )
    def test_tables_without_questions(self, text: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"github.com/TencentQQGYLab/ELLA"):
            read_questions(tmp_path / "q.csv")
        (tmp_path / "q.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_questions(tmp_path / "q.csv")


def test_grids(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        find_images(tmp_path)
    colors = ["red", "lime", "blue", "white"]
    file = tmp_path / "a.b.png"
    tile([Image.new("RGB", (8, 8), color) for color in colors]).save(file)
    pixels = [crop.getpixel((4, 4)) for crop in split_grid(file, 4, resolution=8)]
    assert pixels == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert list(find_images(tmp_path)) == ["a"]  # the name up to its first dot
    assert [image.size for image in split_grid(file, 1)] == [(16, 16)]
    with pytest.raises(ValueError, match="16 x 16 pixels, expected 20 x 20"):
        split_grid(file, 4, resolution=10)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="both belong to item a"):
        find_images(tmp_path)


# ---- judges


@pytest.mark.parametrize("sprites", ["shapes", "emoji"])
def test_true_scenes_answer_every_question_with_yes_and_others_do_not(sprites: str) -> None:
    items, judge, images = scene_items(sprites, 12), SceneJudge(sprites), true_images(sprites, 12)

    def score(shift: int) -> dict[str, Any]:
        answers = {}
        for asked, image in zip(items, images[shift:] + images[:shift], strict=True):
            answers[asked.id] = [judge.answer([(image, q.text) for q in asked.questions])]
        return summarize(items, answers)

    assert score(0)["dpg"] == 100
    wrong = score(5)
    assert wrong["dpg"] < 40
    assert {"attribute", "entity", "other", "relation"} == set(wrong["categories"])
    with pytest.raises(JudgeError, match="questions about scenes only"):
        judge.answer([(images[0], "Is the mood sombre?")])


def test_an_endpoint_is_asked_again_and_given_up_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vqrae.eval.judges.judge.time.sleep", lambda seconds: None)
    pairs = [(Image.new("RGB", (4, 4), "red"), "Is it red?")]
    said = {"choices": [{"message": {"content": "Yes."}}]}
    server = Server((503, {}), (200, {"no": "choices"}), (200, said))
    assert EndpointJudge(server.url, "m", key="secret", workers=1).answer(pairs) == ["Yes."]
    assert len(server.received) == 3
    path, key, body = server.received[-1]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == "Is it red? Answer with yes or no."
    server = Server((401, {"error": "no key"}))
    with pytest.raises(JudgeError, match=r"401.*no key"):
        EndpointJudge(server.url, "m", workers=1).answer(pairs)
    assert len(server.received) == 1  # another attempt would not help
    with pytest.raises(JudgeError, match="gave no answer"):
        EndpointJudge("http://127.0.0.1:9/v1", "m", attempts=2).answer(pairs)


def test_a_chat_model_is_told_to_say_yes_or_no(llava: Path) -> None:
    judge = build_judge("chat", model=str(llava))
    assert (judge.name, len(judge.identity)) == ("chat:model", 64)
    assert len(judge.answer([(Image.new("RGB", (9, 9)), "is it red ?")] * 2)) == 2
    with pytest.raises(ValueError, match="judge_url= and judge_model="):
        build_judge("endpoint", model="m")
    with pytest.raises(ValueError, match="needs judge_model="):
        build_judge("chat")


# ---- the command


class Recorder:
    """A judge that says yes, fails on request, and counts."""

    name, identity = "recorder", "1"

    def __init__(self) -> None:
        self.asked, self.broken = 0, False

    def answer(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[str]:
        if self.broken:
            raise JudgeError("out of order")
        self.asked += len(pairs)
        return ["yes"] * len(pairs)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    judge = Recorder()
    monkeypatch.setattr(DPGConfig, "load_judge", lambda self, device: judge)
    return judge


class TestCommand:
    def arguments(self, tmp_path: Path, *images: str) -> list[str]:
        """Writes a table, and black images of some items."""
        write_questions(tmp_path / "q.csv", [CAR, SKY])
        (tmp_path / "p").mkdir()
        for name in images:
            Image.new("RGB", (16, 16)).save(tmp_path / "p" / f"{name}.png")
        given = [f"questions={tmp_path / 'q.csv'}", f"images={tmp_path / 'p'}"]
        return [*given, f"output={tmp_path / 'o'}", "judge=chat", "images_per_prompt=4"]

    def test_failures_are_counted_and_answers_are_kept(
        self, tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments, scores = self.arguments(tmp_path, "sky"), tmp_path / "o" / "scores.json"
        with (tmp_path / "q.csv").open("a") as table:
            table.write("sky,a blue sky,,two,0,,,t,q\n")
        evaluate.main(arguments)
        values = read_json(scores)
        assert (values["dpg"], values["num_prompts"], values["num_scored"]) == (100, 2, 1)
        assert (values["failed"], values["num_failed"]) == ({"car": "no image"}, 1)
        assert (values["benchmark"], len(values["table_problems"])) == ("DPG(recorder)", 1)
        assert values["manifest"]["formulas"] == "corrected"
        out = capsys.readouterr().out
        assert "FAILED: 1 of 2" in out
        assert "1 problems with the table, such as row 7 is left out" in out
        asked = recorder.asked
        Image.new("RGB", (16, 16)).save(tmp_path / "p" / "car.png")
        evaluate.main([*arguments, "official_compat=true"])
        assert recorder.asked == asked + 4 * 4  # the new image
        values = read_json(scores)
        assert (values["benchmark"], list(values["dropped"])) == ("DPG-official(recorder)", ["car"])
        Image.new("RGB", (16, 16), "red").save(tmp_path / "p" / "sky.png")
        asked = recorder.asked
        evaluate.main(arguments)
        assert recorder.asked == asked + 4 * 2  # another image is asked about again
        recorder.identity = "2"
        with pytest.raises(ValueError, match="set output= to a new folder"):
            evaluate.main(arguments)

    def test_wrong_sizes_and_silent_judges_are_failures(
        self, tmp_path: Path, recorder: Recorder
    ) -> None:
        arguments = self.arguments(tmp_path, "sky")
        Image.new("RGB", (16, 8)).save(tmp_path / "p" / "car.png")
        evaluate.main(arguments)
        assert "16 x 8 pixels" in read_json(tmp_path / "o" / "scores.json")["failed"]["car"]
        recorder.broken = True
        with pytest.raises(SystemExit, match="none of 2 prompts could be judged"):
            evaluate.main([*arguments, f"output={tmp_path / 'new'}"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "either model="),
            (["model=m", "images=."], "either model="),
            (["images=.", "questions=q.csv"], "judge=scenes cannot answer"),
            (["images=.", "images_per_prompt=5"], "expected 1, 2, 3 or 4"),
            (["images=."], "single images or grids\\? Set images_per_prompt=1, or"),
        ],
    )
    def test_what_cannot_be_meant(self, arguments: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate.main(["output=o", *arguments])

    def test_scenes_from_generation_to_score(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = zip(scene_items("shapes", 6), true_images("shapes", 6), strict=True)
        truth = {asked.prompt: image_to_tensor(image) for asked, image in images}
        generated: list[int] = []

        class Perfect:
            def images(self, prompts: Any, *, seeds: Any, **options: Any) -> torch.Tensor:
                generated.extend(seeds)
                return torch.stack([truth[prompt] for prompt in prompts])

        monkeypatch.setattr(Generator, "from_pretrained", lambda *arguments, **options: Perfect())
        for function in ("model_fingerprint", "recorded_tokenizer"):
            monkeypatch.setattr(f"vqrae.eval.generated.{function}", lambda name: "f" * 64)
        arguments = ["model=m", f"output={tmp_path}", "num_prompts=6", "sampling.guidance_scale=4"]
        evaluate.main(arguments)
        values = read_json(tmp_path / "scores.json")
        assert (values["dpg"], values["ceiling"], values["num_scored"]) == (100, {"truth": 100}, 6)
        assert values["manifest"]["images"]["generator"] == "f" * 64
        assert len(generated) == 24 == len(set(generated))
        assert len(read_questions(tmp_path / "questions.csv")[0]) == 6
        evaluate.main(arguments)
        assert len(generated) == 24
        assert "scene-detector(shapes)" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    """Shares of four and three, one of the first without its image."""
    (tmp_path / "p").mkdir()
    for i, image in enumerate(true_images("shapes", 7)):
        if i != 2:
            image.save(tmp_path / "p" / f"scene{i}.png")
    arguments = [f"images={tmp_path / 'p'}", "num_prompts=7", "images_per_prompt=1"]
    evaluate.main([*arguments, f"output={tmp_path / 'one'}"])
    launch(evaluate.__name__, [*arguments, f"output={tmp_path / 'two'}"], processes=2)
    one, two = (read_json(tmp_path / name / "scores.json") for name in ("one", "two"))
    for values in (one, two):
        del values["manifest"]
    assert one == two
    assert (one["dpg"], one["failed"]) == (100, {"scene2": "no image"})
