"""GenEval 2: the published scripts' numbers, prompt files, judges that are unsure, the command."""

import json
import math
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import Server
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vqrae.common.files import read_json
from vqrae.common.images import image_to_tensor
from vqrae.eval.geneval2 import evaluate
from vqrae.eval.geneval2.evaluate import GenEval2Config, atom_scores, true_images
from vqrae.eval.geneval2.prompts import Atom, GenEval2Item, read_prompts, write_prompts
from vqrae.eval.geneval2.scores import summarize
from vqrae.eval.judges.judge import ChatJudge, EndpointJudge, JudgeError
from vqrae.eval.judges.scenes import SceneJudge
from vqrae.generation.generator import Generator
from vqrae.understanding.chat import user_message

CUPS = GenEval2Item(
    "00000",
    "two red cups",
    3,
    (
        Atom("How many cups are there?", "two", "count"),
        Atom("Are the cups red?", "Yes", "attribute"),
        Atom("Are there cups?", "Yes", "object"),
    ),
)
DOG = GenEval2Item("00001", "a dog", 1, (Atom("Is there a dog?", "Yes", "object"),))


def test_golden() -> None:
    """golden/geneval2.py made the numbers, with GenEval 2's own scripts."""
    file = Path(__file__).parent / "golden" / "geneval2.json"
    script = runpy.run_path(str(file.with_suffix(".py")))
    expected = json.loads(file.read_text())
    found = [script["ours"](*case) for case in script["benchmarks"](len(expected))]
    assert len(found) == 6
    for one, other in zip(found, expected, strict=True):
        assert not script["differs"](one, other)


class TestScores:
    def test_by_hand(self) -> None:
        values = summarize([CUPS, DOG], {"00000": [0.25, 1, 0.5], "00001": [0.5]})
        assert values["soft_tifa_am"] == pytest.approx(100 * (1.75 / 3 + 0.5) / 2)
        assert values["soft_tifa_gm"] == pytest.approx(50)
        assert values["skills"]["object"]["score"] == 50  # of two atoms
        assert [value["number"] for value in values["atom_counts"].values()] == [1, 1]
        assert summarize([CUPS], {"00000": [0, 1, 1]})["soft_tifa_gm"] == 0
        with pytest.raises(ValueError, match="none of 1 prompts"):
            summarize([DOG], {})

    def test_an_interval_knows_clusters_and_promises_no_certainty(self) -> None:
        many = [GenEval2Item(f"{i:05d}", f"{i}", 1, DOG.atoms * 4) for i in range(50)]
        together = {item.id: [float(i % 2)] * 4 for i, item in enumerate(many)}
        apart = {item.id: [0.0, 1.0, 0.0, 1.0] for item in many}
        apart |= {many[0].id: [0.0] * 4, many[1].id: [1.0] * 4}

        def width(scores: Any) -> float:
            low, high = summarize(many, scores)["skills"]["object"]["interval"]
            return high - low

        assert width(together) == pytest.approx(2 * 1.96 * 50 / math.sqrt(50), rel=0.05)
        assert width(apart) < width(together) / 3
        nothing = summarize(many[:5], {item.id: [0.0] * 4 for item in many})
        assert nothing["intervals"]["soft_tifa_gm"][1] == pytest.approx(43.4, abs=0.1)  # Wilson


class TestPrompts:
    def test_round_trip(self, tmp_path: Path) -> None:
        write_prompts(tmp_path / "p.jsonl", [CUPS, DOG])
        assert read_prompts(tmp_path / "p.jsonl") == [CUPS, DOG]
        assert CUPS.atoms[0].ways == ("two", "Two", " two", " Two", "2", " 2")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"skills": ["object", "count"]}, "line 2 is not a prompt of GenEval 2: zip"),
            ({"skills": ["taste"]}, "got the skill 'taste', expected one of object, attribute"),
            ({"vqa_list": [["Is it red?", "No"]]}, "'No' to 'Is it red?', expected Yes"),
            ({"vqa_list": [["How many?", "12"]]}, "'12' to 'How many?', expected a number word"),
            ({"vqa_list": [], "skills": []}, "got no questions"),
            ({"prompt": "two red cups"}, "line 2: the prompt of line 1 again"),
            ({"atom_count": None}, "line 2 is not a prompt"),
        ],
    )
    def test_what_is_not_a_prompt(
        self, change: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        file = tmp_path / "p.jsonl"
        with pytest.raises(FileNotFoundError, match=r"facebookresearch/GenEval2 \(CC BY-NC"):
            read_prompts(file)
        write_prompts(file, [CUPS, DOG])
        first, second = file.read_text().splitlines()
        file.write_text(f"{first}\n{json.dumps(json.loads(second) | change)}\n")
        with pytest.raises(ValueError, match=re.escape(message)):
            read_prompts(file)


# ---- judges


@pytest.mark.parametrize("sprites", ["shapes", "emoji"])
def test_true_scenes_hold_every_atom_and_others_do_not(sprites: str) -> None:
    config = GenEval2Config(images=__file__, output="o", sprites=sprites, num_prompts=5)
    judge, images = SceneJudge(sprites), list(true_images(config).values())

    def score(shift: int) -> dict[str, Any]:
        shown = zip(config.items, images[shift:] + images[:shift], strict=True)
        return summarize(config.items, {item.id: atom_scores(judge, item, i) for item, i in shown})

    assert score(0)["soft_tifa_gm"] == 100
    assert score(2)["soft_tifa_gm"] < 30
    assert {"object", "attribute", "count"} <= score(0)["skills"].keys()
    counts = {item.prompt: item.atom_count for item in config.items}
    assert len(counts) == 5
    assert min(counts.values()) == 2  # one thing and its colour


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model of GenEval 2's class of judge, with letters for words."""
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<pad>"]
    words = ["ĠYes", "Yes", "yes", "two", "Two"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *special])}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    letters_first = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    letters_first.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters_first, pad_token="<pad>", extra_special_tokens=special[:4]
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = {**sizes, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16}
    text |= {"vocab_size": len(vocabulary), "max_position_embeddings": 512}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    text["rope_parameters"] |= {"rope_theta": 1e4, "mrope_interleaved": True}
    vision = {**sizes, "depth": 2, "num_heads": 2, "patch_size": 8, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        pad_token_id=ids["<pad>"],
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # that it is sure of something
    patches = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 256}}
    patches["size"]["longest_edge"] = 4096
    template = (
        "{% for part in messages[0].content %}{% if part.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}>"
    )
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**patches),
        tokenizer,
        Qwen3VLVideoProcessor(patch_size=8, merge_size=2),
        chat_template=template,
    )
    folder = tmp_path_factory.mktemp("qwen3_vl") / "model"
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


def test_a_qwen3_vl_says_how_sure_it_is(qwen3_vl: Path) -> None:
    judge = ChatJudge(str(qwen3_vl), batch_size=3)
    colors = ("red", "blue", "white")
    images = [Image.new("RGB", (32 + 16 * i, 48), color) for i, color in enumerate(colors)]
    asked = [(image, "is it ?" * (i + 1), DOG.atoms[0].ways) for i, image in enumerate(images)]
    asked += [(images[0], "How many ?", CUPS.atoms[0].ways)]
    together = judge.probabilities(asked)
    judge.batch_size = 1
    assert together == pytest.approx(judge.probabilities(asked), abs=1e-6)
    assert len({round(value, 6) for value in together}) == 4
    # The plain forward pass of one unpadded row, and the four tokens Yes, yes, " Yes" and " ".
    chat = judge.chat
    inputs = chat.inputs([[user_message("is it ? Answer in one word.", images[0])]])
    with torch.inference_mode():
        chances = chat.model(**inputs).logits[0, -1].softmax(-1)
    ids = chat.text_tokenizer.convert_tokens_to_ids(["Yes", "yes", "ĠYes", "Ġ"])
    [again] = judge.probabilities([(images[0], "is it ?", DOG.atoms[0].ways)])
    assert again == pytest.approx(float(chances[ids].sum()), abs=1e-6)


def test_a_judge_that_cannot_say_a_word(llava: Path) -> None:
    judge = ChatJudge(str(llava))
    image = Image.new("RGB", (9, 9))
    [chance] = judge.probabilities([(image, "is it red ?", ["yes", "Yes"])])
    assert 0 < chance < 1
    with pytest.raises(JudgeError, match="cannot say 'seven'"):
        judge.probabilities([(image, "how many ?", ["seven", " Seven"])])


def test_an_endpoint_tells_its_likeliest_first_tokens() -> None:
    likeliest = [("Yes", 0.5), ("No", 0.25), (" yes", 0.125)]
    top = [{"token": token, "logprob": math.log(chance)} for token, chance in likeliest]
    said = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
    server = Server((200, said))
    asked = [(Image.new("RGB", (4, 4)), "Is it red?", DOG.atoms[0].ways)]
    assert EndpointJudge(server.url, "m").probabilities(asked) == pytest.approx([0.625])
    body = server.received[0][2]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert body["messages"][0]["content"][1]["text"] == "Is it red? Answer in one word."
    silent = Server((200, {"choices": [{"message": {"content": "Yes"}}]}))
    with pytest.raises(JudgeError, match="gave no answer: KeyError"):
        EndpointJudge(silent.url, "m", attempts=1).probabilities(asked)


# ---- the command


class Halves:
    """A judge that is half sure, fails on request, and counts."""

    name, identity = "halves", "1"

    def __init__(self) -> None:
        self.asked, self.broken = 0, False

    def answer(self, pairs: Any) -> list[str]:
        return ["yes"] * len(pairs)

    def probabilities(self, expected: Sequence[Any]) -> list[float]:
        if self.broken:
            raise JudgeError("out of order")
        self.asked += len(expected)
        return [0.5] * len(expected)


def test_given_images_missing_ones_and_a_judge_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = Halves()
    monkeypatch.setattr(GenEval2Config, "load_judge", lambda self, device: judge)
    prompts, listed, output = tmp_path / "p.jsonl", tmp_path / "images.json", tmp_path / "o"
    write_prompts(prompts, [CUPS, DOG])
    Image.new("RGB", (16, 8)).save(tmp_path / "cups.png")
    listed.write_text(json.dumps({CUPS.prompt: "cups.png"}))
    command = [f"prompts={prompts}", f"images={listed}", f"output={output}", "judge=chat"]
    judge.broken = True
    with pytest.raises(SystemExit, match="none of 2 prompts could be judged"):
        evaluate.main(command)
    judge.broken = False
    evaluate.main(command)
    values = read_json(output / "scores.json")
    assert (values["soft_tifa_gm"], values["failed"]) == (50, {"00001": "no image"})
    assert values["benchmark"] == "GenEval2(halves)"
    assert "FAILED: 1 of 2 prompts are not in the score" in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(tmp_path / "dog.png")
    listed.write_text(json.dumps({CUPS.prompt: "cups.png", DOG.prompt: "dog.png"}))
    evaluate.main(command)
    assert judge.asked == 3 + 1
    assert read_json(output / "scores.json")["num_scored"] == 2
    evaluate.main(command)
    assert judge.asked == 4
    Image.new("RGB", (8, 8), "red").save(tmp_path / "dog.png")
    with pytest.raises(ValueError, match=r"scores.json was made with other settings \(images"):
        evaluate.main(command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=m", "prompts=p.jsonl"], "judge=scenes cannot answer"),
        (["images=."], "is not a file, expected JSON"),
        (["model=m", "judge=mplug"], "judge"),
    ],
)
def test_what_cannot_be_meant(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.main(["output=o", *arguments])


def test_scenes_from_generation_to_score(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make_tokenizer: Any,
) -> None:
    config = GenEval2Config(images=__file__, output="o", num_prompts=3)
    pairs = zip(config.items, true_images(config).values(), strict=True)
    truth = {item.prompt: image_to_tensor(image) for item, image in pairs}
    generated: list[int] = []

    class Perfect:
        tokenizer = make_tokenizer()

        def images(self, prompts: Any, *, seeds: Any, **options: Any) -> torch.Tensor:
            generated.extend(seeds)
            return torch.stack([truth[prompt] for prompt in prompts])

    monkeypatch.setattr(Generator, "from_pretrained", lambda *arguments, **options: Perfect())
    for function in ("model_fingerprint", "recorded_tokenizer"):
        monkeypatch.setattr(f"vqrae.eval.generated.{function}", lambda name: "f" * 64)
    command = ["model=m", f"output={tmp_path}", "num_prompts=3", "sampling.guidance_scale=4"]
    evaluate.main(command)
    values = read_json(tmp_path / "scores.json")
    assert values["soft_tifa_gm"] == values["ceiling"]["truth"]["soft_tifa_gm"] == 100
    assert values["ceiling"]["reconstruction"]["soft_tifa_gm"] < 50  # by random weights
    assert values["manifest"]["images"]["generator"] == "f" * 64
    evaluate.main(command)
    assert generated == [0, 10_000, 20_000]
    assert "| Soft-TIFA GM | 100.0 |" in (tmp_path / "scores.md").read_text()
    assert "scene-detector(shapes)" in capsys.readouterr().out
    # GenEval 2's own scripts read both files.
    prompts = read_prompts(tmp_path / "prompts.jsonl")
    files = read_json(tmp_path / "images.json")
    assert [Path(files[item.prompt]).is_file() for item in prompts] == [True] * 3
    assert Image.open(tmp_path / "examples.png").height > 3 * 64
