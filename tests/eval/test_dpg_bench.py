"""DPG-Bench: golden scores by hand, the published script's faults one by one, judges, grids, resumption."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vqrae.common.config import ConfigError
from vqrae.common.files import read_json
from vqrae.common.images import tile
from vqrae.eval.dpg_bench import (
    Item,
    Question,
    evaluate,
    is_yes,
    official_scores,
    read_questions,
    summarize,
    write_questions,
)
from vqrae.eval.dpg_bench.grids import find_images, split_grid
from vqrae.eval.dpg_bench.judges import EndpointVQA, JudgeError, ask_what_is_known, build_judge
from vqrae.eval.dpg_bench.scenes import SceneVQA, scene_items, true_images
from vqrae.eval.dpg_bench.scores import image_score

CAR = Item(
    "car",
    "a red car left of a tree",
    (
        Question(1, "Is there a car?", "entity - whole (car)"),
        Question(2, "Is it red?", "attribute - color (car, red)", (1,)),
        Question(3, "Is there a tree?", "entity - whole (tree)"),
        Question(4, "Is it left of the tree?", "relation - spatial (car, tree, left of)", (1, 3)),
    ),
)
SKY = Item(
    "sky",
    "a blue sky",
    (
        Question(1, "Is there a sky?", "entity - whole (sky)"),
        Question(2, "Is it blue?", "global ()", (1,)),
    ),
)
YES, NO = "yes", "no"


class TestScores:
    def test_a_question_counts_with_everything_that_it_depends_on(self) -> None:
        assert image_score(CAR, [YES, YES, YES, YES]) == 1
        assert image_score(CAR, [YES, YES, NO, YES]) == 0.5  # the relation falls with the tree
        assert image_score(CAR, [NO, YES, YES, YES]) == 0.25

    def test_zeros_travel_along_a_chain_in_any_order(self) -> None:
        chain = Item(
            "x",
            "",
            (Question(3, "", "a ()", (2,)), Question(2, "", "a ()", (1,)), Question(1, "", "a ()")),
        )
        assert image_score(chain, [YES, YES, NO]) == 0
        # The published script walks the table in order: question 3 hears that 2 was answered with yes.
        other = Item("y", "", (Question(1, "", "a ()"),))
        answers = {"x": [[YES, YES, NO]]}
        assert summarize([other, chain], answers)["dpg"] == 0
        assert official_scores([other, chain], answers)["dpg"] == pytest.approx(100 / 3)

    def test_golden(self) -> None:
        answers = {
            "car": [
                [YES, YES, YES, YES],
                [YES, YES, NO, YES],
                [NO, YES, YES, YES],
                [YES, NO, YES, YES],
            ],
            "sky": [[YES, YES], [YES, NO], [NO, YES], [NO, NO]],
        }
        values = summarize([CAR, SKY], answers)
        car, sky = (1 + 0.5 + 0.25 + 0.75) / 4, (1 + 0.5 + 0 + 0) / 4
        assert values["dpg"] == pytest.approx(100 * (car + sky) / 2)
        # Categories take answers as given, of all images: entity 6 of 8 + 2 of 4.
        entity = 100 * (3 + 3 + 2) / 12
        assert values["categories"] == pytest.approx(
            {"attribute": 75, "entity": entity, "global": 50, "relation": 100}
        )
        assert set(values["categories_detailed"]) == {
            "attribute - color", "entity - whole", "global", "relation - spatial",
        }  # fmt: skip
        assert (values["num_prompts"], values["num_scored"], values["unclear_answers"]) == (2, 2, 0)

    def test_yes_is_the_first_word(self) -> None:
        assert [is_yes(text) for text in ("yes", " Yes.", "YES, it is", "yesterday", "no", "", "it is, yes")] == [
            True, True, True, False, False, False, False,
        ]  # fmt: skip
        values = summarize([SKY], {"sky": [["Yes.", "blue"]]})
        assert (values["dpg"], values["unclear_answers"]) == (50, 1)

    def test_unscored_prompts_are_counted_and_nothing_is_an_error(self) -> None:
        values = summarize([CAR, SKY], {"sky": [[YES, YES]]})
        assert (values["dpg"], values["num_prompts"], values["num_scored"]) == (100, 2, 1)
        with pytest.raises(ValueError, match="none of 2 prompts"):
            summarize([CAR, SKY], {})


class TestOfficialFaults:
    """See `vqrae.eval.dpg_bench.scores` for the list; 2, 5 and 6 leave the numbers of one process alone."""

    first = Item("first", "", (Question(1, "", "other ()"), Question(2, "", "other ()")))

    def test_categories_hear_the_last_image_only(self) -> None:
        answers = {"sky": [[YES, YES], [YES, NO]]}
        assert summarize([self.first, SKY], answers)["categories"] == {"entity": 100, "global": 50}
        assert official_scores([self.first, SKY], answers)["categories"] == {
            "entity": 100,
            "global": 0,
        }

    def test_the_first_row_is_skipped(self) -> None:
        answers = {"first": [[NO, YES]], "sky": [[YES, YES]]}
        assert summarize([self.first, SKY], answers)["dpg"] == 75
        values = official_scores([self.first, SKY], answers)
        assert values["dpg"] == 100
        assert values["categories"]["other"] == 100
        assert values["dropped"] == {}

    def test_a_prompt_that_depends_on_the_first_row_is_lost(self) -> None:
        answers = {"car": [[YES, YES, YES, YES]], "sky": [[YES, NO]]}
        values = official_scores([CAR, SKY], answers)
        assert (values["dpg"], values["num_scored"]) == (50, 1)
        assert list(values["dropped"]) == ["car"]
        assert "relation" not in values["categories"]

    def test_unless_another_parent_is_heard_first(self) -> None:
        """The script stops at the first parent that counts 0, before it looks for the one that is gone."""
        item = Item(
            "i",
            "",
            (Question(1, "", "a ()"), Question(2, "", "a ()"), Question(3, "", "a ()", (2, 1))),
        )
        assert official_scores([item], {"i": [[YES, NO, YES]]})["dpg"] == 0
        with pytest.raises(ValueError, match="none of 1 prompts"):
            official_scores([item], {"i": [[YES, YES, YES]]})

    def test_only_yes_to_the_letter_counts(self) -> None:
        values = official_scores([self.first, SKY], {"sky": [["Yes", YES]]})
        assert (values["dpg"], values["categories"]) == (0, {"entity": 0, "global": 100})


class TestTable:
    def test_round_trip(self, tmp_path: Path) -> None:
        write_questions(tmp_path / "q.csv", [CAR, SKY])
        assert read_questions(tmp_path / "q.csv", problems := []) == [CAR, SKY]
        assert problems == []
        assert (tmp_path / "q.csv").read_text().splitlines()[2] == (
            'car,a red car left of a tree,,2,1,attribute,color,"attribute - color (car, red)",Is it red?'
        )

    def test_a_missing_table_says_where_it_is(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"github.com/TencentQQGYLab/ELLA.*questions=scenes"
        ):
            read_questions(tmp_path / "dpg_bench.csv")

    @pytest.mark.parametrize(
        ("rows", "message", "numbers"),
        [
            ("a,p,1,0,t,q\nb,p,1,0,t,q\na,p,2,0,t,q\n", "row 3: item a again", [1, 2]),
            (
                "a,p,1,0,t,other\na,p,1,0,t,q\n",
                "row 2: question 1 of item a twice, the later one",
                [1],
            ),
            ("a,p,1,7,t,q\n", r"item a: question 1 depends on \[7\], which do not exist", [1]),
            ("a,p,1,2,t,q\na,p,2,1;,t,q\n", "row 2 is left out: invalid literal", [1]),
            ("a,p,1,1,t,q\n", "item a: question 1 depends on itself", [1]),
            ("a,p,1,0,t,q\na,p\n", "row 2 is left out", [1]),
        ],
    )
    def test_what_is_odd_about_a_table_is_told(
        self, rows: str, message: str, numbers: list[int], tmp_path: Path
    ) -> None:
        header = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
        (tmp_path / "q.csv").write_text(header + rows)
        problems: list[str] = []
        item = read_questions(tmp_path / "q.csv", problems)[0]
        assert [question.number for question in item.questions] == numbers
        assert item.questions[-1].text == "q"
        assert re.match(message, problems[0])
        assert image_score(item, [YES] * len(numbers)) == 1

    def test_a_table_from_a_spreadsheet(self, tmp_path: Path) -> None:
        header = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
        (tmp_path / "q.csv").write_text(
            header + ",,,,,\na,p,1.0,0.0,t,q\n,,,,,\n\na,p,2,1.0,t,q\n,,,,,\n"
        )
        [item] = read_questions(tmp_path / "q.csv", problems := [])
        assert [(q.number, q.parents) for q in item.questions] == [(1, ()), (2, (1,))]
        assert problems == []

    def test_tables_without_questions(self, tmp_path: Path) -> None:
        (tmp_path / "q.csv").write_text("item_id,text\n")
        with pytest.raises(ValueError, match="no columns proposition_id"):
            read_questions(tmp_path / "q.csv")
        header = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
        for rows, message in (
            ("", "has no rows"),
            ("a,p,one,0,t,q\n", "row 1 is left out: invalid literal"),
        ):
            (tmp_path / "q.csv").write_text(header + rows)
            with pytest.raises(ValueError, match=f"holds no questions: .*{message}"):
                read_questions(tmp_path / "q.csv")

    def test_questions_in_a_circle_count_together(self) -> None:
        circle = Item(
            "x",
            "",
            (Question(1, "", "a ()", (2,)), Question(2, "", "a ()", (1,)), Question(3, "", "a ()")),
        )
        assert image_score(circle, [YES, YES, YES]) == 1
        assert image_score(circle, [YES, NO, YES]) == pytest.approx(1 / 3)


class TestGrids:
    def test_cells_in_order(self, tmp_path: Path) -> None:
        colors = ["red", "green", "blue", "white"]
        tile([Image.new("RGB", (8, 8), color) for color in colors]).save(tmp_path / "a.b.png")
        crops = split_grid(tmp_path / "a.b.png", resolution=8)
        assert [crop.getpixel((4, 4)) for crop in crops] == [
            Image.new("RGB", (1, 1), color).getpixel((0, 0)) for color in colors
        ]
        assert list(find_images(tmp_path)) == ["a"]  # the name up to its first dot
        [whole] = split_grid(tmp_path / "a.b.png", 1)
        assert whole.size == (16, 16)
        with pytest.raises(ValueError, match="16 x 16 pixels, expected 20 x 20"):
            split_grid(tmp_path / "a.b.png", resolution=10)

    def test_folders(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="holds no images"):
            find_images(tmp_path)
        for name in ("a.png", "a.jpg", "results.txt"):
            Image.new("RGB", (2, 2)).save(tmp_path / name, format="PNG")
        with pytest.raises(ValueError, match="both belong to item a"):
            find_images(tmp_path)


# ---- judges


@pytest.mark.parametrize("sprites", ["shapes", "emoji"])
def test_true_scenes_answer_every_question_with_yes_and_others_do_not(sprites: str) -> None:
    items, judge = scene_items(sprites, 24), SceneVQA(sprites)
    images = true_images(sprites, 24)

    def answers(shift: int) -> dict[str, list[list[str]]]:
        asked = zip(items, images[shift:] + images[:shift], strict=True)
        return {
            item.id: [judge.answer([(image, q.text) for q in item.questions])]
            for item, image in asked
        }

    assert summarize(items, answers(0))["dpg"] == 100
    wrong = summarize(items, answers(5))
    assert wrong["dpg"] < 40
    assert {"attribute", "entity", "other", "relation"} == set(wrong["categories"])
    with pytest.raises(JudgeError, match="questions about scenes only"):
        judge.answer([(images[0], "Is the mood sombre?")])


class Server:
    """A chat server that answers what `reply` says, and remembers what it was sent."""

    def __init__(self, *replies: tuple[int, Any]) -> None:
        self.replies, self.received = list(replies), []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.received.append((self.path, self.headers.get("Authorization"), body))
                status, reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(reply).encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def said(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}]}


class TestEndpoint:
    @pytest.fixture(autouse=True)
    def no_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vqrae.eval.dpg_bench.judges.time.sleep", lambda seconds: None)

    def test_asks_and_tries_again(self) -> None:
        server = Server((503, {}), (200, {"no": "choices"}), (200, said("Yes.")))
        judge = EndpointVQA(server.url, "m", key="secret", workers=1)
        assert judge.answer([(Image.new("RGB", (4, 4), "red"), "Is it red?")]) == ["Yes."]
        assert len(server.received) == 3
        path, key, body = server.received[-1]
        assert (path, key, body["model"], body["temperature"]) == (
            "/v1/chat/completions",
            "Bearer secret",
            "m",
            0,
        )
        image, text = body["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        assert text["text"] == "Is it red? Answer with yes or no."

    def test_gives_up_with_the_reason(self) -> None:
        server = Server((401, {"error": "no key"}))
        with pytest.raises(JudgeError, match=r"401.*no key"):
            EndpointVQA(server.url, "m", workers=1).answer([(Image.new("RGB", (4, 4)), "?")])
        assert len(server.received) == 1  # asking again would not help
        with pytest.raises(JudgeError, match="gave no answer"):
            EndpointVQA("http://127.0.0.1:9/v1", "m", attempts=2).answer(
                [(Image.new("RGB", (4, 4)), "?")]
            )


def test_judges_that_lack_something() -> None:
    with pytest.raises(ValueError, match="judge_url= and judge_model="):
        build_judge("endpoint", model="m")
    with pytest.raises(ValueError, match="needs judge_model="):
        build_judge("vqa")


@pytest.mark.parametrize("kind", ["vilt", "blip"])
def test_models_of_transformers(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessor,
        BlipProcessor,
        ViltConfig,
        ViltForQuestionAnswering,
        ViltImageProcessor,
        ViltProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "red", "yes", "no"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text_tokenizer = BertTokenizerFast(tokenizer_object=tokenizer)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    if kind == "vilt":
        config = ViltConfig(
            **small, vocab_size=16, image_size=32, patch_size=16, id2label={0: "no", 1: "yes"}
        )
        ViltForQuestionAnswering(config).save_pretrained(tmp_path)
        ViltProcessor(
            ViltImageProcessor(size={"shortest_edge": 32}), text_tokenizer
        ).save_pretrained(tmp_path)
    else:
        text = {
            **small,
            "vocab_size": 16,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
        }
        text |= {"encoder_hidden_size": 16, "max_position_embeddings": 32}
        vision = {**small, "image_size": 32, "patch_size": 16}
        BlipForQuestionAnswering(
            BlipConfig(text_config=text, vision_config=vision)
        ).save_pretrained(tmp_path)
        BlipProcessor(
            BlipImageProcessor(size={"height": 32, "width": 32}), text_tokenizer
        ).save_pretrained(tmp_path)
    judge = build_judge("vqa", model=str(tmp_path), batch_size=2)
    answers = judge.answer(
        [
            (Image.new("RGB", (40, 30)), "is it red"),
            (Image.new("RGB", (32, 32)), "is it"),
            (Image.new("RGB", (9, 9)), "is"),
        ]
    )
    assert len(answers) == 3
    assert all(isinstance(answer, str) for answer in answers)
    if kind == "vilt":
        assert set(answers) <= {"no", "yes"}
    assert len(judge.identity) == 64
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: weights[name] for name in sorted(weights)[1:]},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="lacks weights of"):
        build_judge("vqa", model=str(tmp_path))


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
    monkeypatch.setattr(evaluate, "build_judge", lambda *arguments, **options: judge)
    return judge


def grids(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        Image.new("RGB", (16, 16)).save(folder / f"{name}.png")
    return folder


class TestCommand:
    def arguments(self, tmp_path: Path, *more: str) -> list[str]:
        write_questions(tmp_path / "q.csv", [CAR, SKY])
        given = [
            f"questions={tmp_path / 'q.csv'}",
            f"images={tmp_path / 'p'}",
            f"out={tmp_path / 'o'}",
            "judge=vqa",
        ]
        return [*given, "images_per_prompt=4", *more]

    def test_failures_are_counted_and_answers_are_kept(
        self, tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
    ) -> None:
        grids(tmp_path / "p", "sky")
        evaluate.main(self.arguments(tmp_path))
        values = read_json(tmp_path / "o" / "scores.json")
        assert (
            values["dpg"],
            values["num_prompts"],
            values["num_scored"],
            values["num_failed"],
        ) == (100, 2, 1, 1)
        assert values["failed"] == {"car": "no image"}
        assert values["benchmark"] == "DPG(recorder)"
        assert values["manifest"]["formulas"] == "corrected"
        assert values["self_test"]["passed"] is False  # says yes to everything
        assert "FAILED: 1 of 2" in capsys.readouterr().out
        asked = recorder.asked
        Image.new("RGB", (16, 16)).save(tmp_path / "p" / "car.png")
        evaluate.main(self.arguments(tmp_path, "official_compat=true"))
        assert recorder.asked == asked + 2 + 4 * 4  # the self-test and the new image
        values = read_json(tmp_path / "o" / "scores.json")
        assert (values["benchmark"], values["num_failed"], list(values["dropped"])) == (
            "DPG-official(recorder)",
            0,
            ["car"],
        )
        Image.new("RGB", (16, 16), "red").save(tmp_path / "p" / "sky.png")
        asked = recorder.asked
        evaluate.main(self.arguments(tmp_path))
        assert recorder.asked == asked + 2 + 4 * 2  # another image is asked about again

    def test_wrong_sizes_and_silent_judges_are_failures(
        self, tmp_path: Path, recorder: Recorder
    ) -> None:
        grids(tmp_path / "p", "car", "sky")
        Image.new("RGB", (16, 8)).save(tmp_path / "p" / "car.png")
        evaluate.main(self.arguments(tmp_path))
        assert "16 x 8 pixels" in read_json(tmp_path / "o" / "scores.json")["failed"]["car"]
        recorder.broken = True
        with pytest.raises(JudgeError):  # already before the self-test of a judge that never works
            evaluate.main(self.arguments(tmp_path, f"out={tmp_path / 'new'}"))

    def test_another_judge_is_refused(self, tmp_path: Path, recorder: Recorder) -> None:
        grids(tmp_path / "p", "car", "sky")
        evaluate.main(self.arguments(tmp_path))
        recorder.identity = "2"
        with pytest.raises(ValueError, match="set out= to a new folder"):
            evaluate.main(self.arguments(tmp_path))

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["model=m", "images=."],
            ["images=.", "questions=q.csv"],
            ["images=.", "images_per_prompt=5"],
        ],
    )
    def test_what_cannot_be_meant(self, arguments: list[str]) -> None:
        with pytest.raises(ConfigError):
            evaluate.main(["out=o", *arguments])

    def test_images_of_unknown_layout_are_asked_about(self, tmp_path: Path) -> None:
        grids(tmp_path / "p")
        for item, image in zip(scene_items("shapes", 3), true_images("shapes", 3), strict=True):
            image.save(tmp_path / "p" / f"{item.id}.png")
        arguments = [f"images={tmp_path / 'p'}", f"out={tmp_path / 'o'}", "num_prompts=3"]
        with pytest.raises(
            ConfigError, match=r"single images or grids\? Set images_per_prompt=1, or"
        ):
            evaluate.main(arguments)
        with pytest.raises(SystemExit):  # not quarters of them
            evaluate.main([*arguments, "resolution=64"])
        evaluate.main([*arguments, "images_per_prompt=1"])
        assert read_json(tmp_path / "o" / "scores.json")["dpg"] == 100

    def test_problems_of_the_table_are_in_the_scores(
        self, tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
    ) -> None:
        grids(tmp_path / "p", "car", "sky")
        arguments = self.arguments(tmp_path)
        with (tmp_path / "q.csv").open("a") as table:
            table.write("sky,a blue sky,,two,0,,,t,q\n")
        evaluate.main(arguments)
        values = read_json(tmp_path / "o" / "scores.json")
        assert (values["num_scored"], len(values["table_problems"])) == (2, 1)
        assert "1 problems with the table, such as row 7 is left out" in capsys.readouterr().out

    def test_scenes_from_drawing_to_score(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from vqrae.common.images import image_to_tensor
        from vqrae.generation.generator import Generator

        truth = {
            item.prompt: image
            for item, image in zip(scene_items("shapes", 6), true_images("shapes", 6), strict=True)
        }
        drawn = []

        class Perfect:
            def images(
                self, prompts: Sequence[str], *, seeds: Sequence[int], **options: Any
            ) -> torch.Tensor:
                drawn.extend(seeds)
                return torch.stack([image_to_tensor(truth[prompt]) for prompt in prompts])

        monkeypatch.setattr(Generator, "from_pretrained", lambda *arguments, **options: Perfect())
        for function in ("model_fingerprint", "recorded_tokenizer"):
            monkeypatch.setattr(f"vqrae.eval.generated.{function}", lambda name: "f" * 64)
        arguments = ["model=m", f"out={tmp_path}", "num_prompts=6", "sampling.guidance_scale=4"]
        evaluate.main(arguments)
        values = read_json(tmp_path / "scores.json")
        assert (values["dpg"], values["ceiling"], values["num_scored"]) == (100, {"truth": 100}, 6)
        assert values["manifest"]["images"]["generator"] == "f" * 64
        assert values["self_test"]["passed"]
        assert len(drawn) == 24 == len(set(drawn))
        assert len(read_questions(tmp_path / "questions.csv")) == 6
        evaluate.main(arguments)
        assert len(drawn) == 24
        assert "scene-detector(shapes)" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    """Shares of four and three, one of the first without its image."""
    (tmp_path / "p").mkdir()
    for i, image in enumerate(true_images("shapes", 7)):
        if i != 2:
            image.save(tmp_path / "p" / f"scene{i}.png")
    arguments = [f"images={tmp_path / 'p'}", "num_prompts=7", "images_per_prompt=1"]
    evaluate.main([*arguments, f"out={tmp_path / 'one'}"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        *launch,
        "-m",
        "vqrae.eval.dpg_bench.evaluate",
        *arguments,
        f"out={tmp_path / 'two'}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (read_json(tmp_path / name / "scores.json") for name in ("one", "two"))
    for values in (one, two):
        del values["manifest"]
    assert one == two
    assert (one["dpg"], one["failed"]) == (100, {"scene2": "no image"})


def test_self_test_of_a_judge_that_sees() -> None:
    assert ask_what_is_known(SceneVQA("shapes"))["passed"]
