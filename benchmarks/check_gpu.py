"""Is everything right on this GPU, and how fast is it? Every hot path once, with random weights and without a network.

    bash scripts/check_gpu.sh [only=TEXT] [minutes=M] [output=FILE]

Equality: each path runs in float32 with two layers of full width, here and in a process on the CPU that has the same seeds; the
losses, or the codes, must agree. Speed: the path as its configuration trains it, bf16 and all layers; FLOPs are counted by
`torch.utils.flop_counter`, and the chip's bf16 rate is that of a large product measured here. A row that fails, for want of
memory or time or otherwise, says so, and the others go on. A compiled sampler runs as a CUDA graph.
"""

import contextlib
import dataclasses
import gc
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from benchmarks.sampler import GREEDY, QWEN3_0_6B, random_generator
from vqrae.common.cli import parse
from vqrae.common.config import load_config, shipped_config
from vqrae.common.distributed import attention_implementation
from vqrae.common.errors import run_main
from vqrae.common.files import read_json, write_json
from vqrae.common.memory import GIB
from vqrae.common.run import Run, read_metrics
from vqrae.common.run import open as open_run
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.eval.tables import markdown_table
from vqrae.generation.config import GeneratorConfig
from vqrae.generation.data import GenerationCollator
from vqrae.generation.dry_run import LongestSamples
from vqrae.generation.modeling import VisualHead, VisualVocabulary
from vqrae.generation.sampling import sample_codes
from vqrae.generation.train import build_model, build_text_tokenizer, fit_prompts, visual_loss
from vqrae.planning.empty_models import llm_config, tokenizer_config
from vqrae.quickstart.train_llm import TinyLLMConfig, build_tiny_llm
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.tokenizer.data import StageImages
from vqrae.tokenizer.dry_run import rehearsal
from vqrae.tokenizer.quantizers.search import nearest_codes
from vqrae.tokenizer.train import train_stage
from vqrae.understanding.build import build_processor, llava_config
from vqrae.understanding.packing import PackingCollator
from vqrae.understanding.train import freeze

LAYERS = 2  # of the models whose numbers are compared
TOLERANCE = 2e-3  # of losses in float32 on two devices, whose sums come in another order
LLAVA_RECORDS = 8
RATE_SIZE = 8192  # of the matrices whose product gives the chip's rate
TOKENIZERS = ("siglip2_256", "siglip2_512", "internvit_448")
Numbers = list[float]


@dataclass(frozen=True)
class Case:
    """One hot path.

    Attributes:
        name: of the row.
        numbers: what must be the same on every device; None: nothing.
        prepare: builds the path at full size on a device and gives what is timed.
        work: of one call, and its unit.
    """

    name: str
    numbers: Callable[[torch.device], Numbers] | None
    prepare: Callable[[torch.device], Callable[[], Any]]
    work: tuple[float, str] = (1, "steps")


@dataclass
class Row:
    """What came out; a field stays None where it was not reached."""

    name: str
    deviation: float | None = None
    """The largest from the numbers of the CPU, relative to the largest of them."""
    seconds: float | None = None
    rate: float | None = None
    unit: str = ""
    peak_gib: float | None = None
    tflop: float | None = None
    share: float | None = None
    """Of the chip's bf16 rate; the sampler has none, for it is thousands of small passes."""
    problem: str = ""


# ---- the hot paths


def tokenizer_steps(
    name: str, number: int, run: Run, *overrides: str, born_on: str = "cpu"
) -> Iterator[int]:
    """The loop of a stage of a published tokenizer, set up; `next` takes a step.

    Args:
        born_on: the device that draws the random weights.
    """
    given = ["dry_run=100", "log_steps=1", *overrides]
    config = load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", name), given)
    config = dataclasses.replace(rehearsal(config, number), save_steps=1000, sample_steps=1000)
    torch.manual_seed(0)
    with torch.device(born_on):
        model = build_tokenizer(
            dataclasses.replace(config.model, encoder=None),
            attention_implementation(config.attention),
        )
    steps = train_stage(config, number, model, run)
    next(steps)
    return steps


def tokenizer_numbers(name: str, number: int, device: torch.device) -> Numbers:
    """Losses and gradient norm of one image in one step."""
    exact = [
        "bf16=false",
        "tf32=false",
        "attention=sdpa",
        f"model.encoder_config.num_hidden_layers={LAYERS}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        next(tokenizer_steps(name, number, open_run(folder), "micro_batch_size=1", *exact))
        (row,) = read_metrics(folder)
    return [value for key, value in row.items() if key.endswith(("_loss", "_norm"))]


def tokenizer_speed(name: str, number: int, device: torch.device) -> Callable[[], Any]:
    read_images = StageImages.micro_batches

    def repeat_one(images: StageImages, start: int) -> Iterator[Tensor]:
        # Reading images is not what is timed.
        yield from itertools.repeat(next(read_images(images, start)))

    folder = tempfile.mkdtemp()  # small; the loop logs as long as it is timed
    with mock.patch.object(StageImages, "micro_batches", repeat_one):
        steps = tokenizer_steps(name, number, open_run(folder), born_on=device.type)
    return lambda: next(steps)


def search(
    rows: int, precision: Any, exact: bool, tf32: bool, device: torch.device
) -> Callable[[], Tensor]:
    """The search of 16,384 codes x 1,536, with TF32 allowed around it or not."""
    generator = torch.Generator().manual_seed(0)
    table, features = (
        torch.randn(count, 1536, generator=generator).to(device) for count in (16_384, rows)
    )

    def run() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return nearest_codes(features, table, precision=precision, exact=exact)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def search_numbers(precision: Any, exact: bool, tf32: bool, device: torch.device) -> Numbers:
    return search(1024, precision, exact, tf32, device)().tolist()


def llava_step(
    llm: str, device: torch.device, *, layers: int | None = None
) -> Callable[[], Tensor]:
    """Forward and backward pass of sft over a packed micro-batch of scenes; `layers` of both networks in float32, or all in
    bf16."""
    dtype, attention = (
        (torch.bfloat16, attention_implementation()) if layers is None else (torch.float32, "sdpa")
    )
    eyes, text_config = tokenizer_config("runs/siglip2_256"), llm_config(llm)
    _, words = build_tiny_llm(
        load_config(TinyLLMConfig, shipped_config("vqrae.quickstart", "tiny_llm"))
    )
    processor = build_processor(eyes, words)
    config = llava_config(eyes, text_config, processor.image_token_id)
    if layers is not None:
        config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device("cpu" if layers else device):
        model = LlavaForConditionalGeneration._from_config(
            config, attn_implementation=attention, dtype=dtype
        )
    model.to(device).train()
    freeze(model, "sft")
    collator = PackingCollator(processor, one_row=attention == "flash_attention_2")
    scenes = SceneDataset(item="conversation", image_size=eyes.image_size)
    batch = collator([scenes[i] for i in range(LLAVA_RECORDS if layers is None else 2)])
    batch = {
        name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()
    }
    batch["pixel_values"] = batch["pixel_values"].to(dtype)

    def run() -> Tensor:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    return run


def llava_numbers(llm: str, device: torch.device) -> Numbers:
    return [llava_step(llm, device, layers=LAYERS)().item()]


def generator_step(
    device: torch.device, *overrides: str, codes: int = 1024, born_on: str = ""
) -> Callable[[], Tensor]:
    """Forward and backward pass over a micro-batch of the longest sequences of the published generator."""
    path = shipped_config("vqrae.generation", "qwen3_0_6b")
    given = [
        "training.dry_run=1",
        "training.model.llm=",
        *(f"training.{text}" for text in overrides),
    ]
    config = load_config(GeneratorConfig, path, given).training
    vocabulary = VisualVocabulary(offset=config.model.offset, codebook_size=16_384, num_codes=codes)
    encode_prompt = fit_prompts(
        config.model, build_text_tokenizer(config.model, [], list), vocabulary
    )
    bf16 = config.optimization.bf16
    torch.manual_seed(0)
    with torch.device(born_on or device):
        model = build_model(config.model, vocabulary, encode_prompt, bf16=bf16)
    model.to(device).train()
    model.lm_head = VisualHead(model.lm_head, vocabulary.code_rows)
    samples = LongestSamples(encode_prompt, vocabulary)
    batch = GenerationCollator(encode_prompt, vocabulary)(
        [samples[i] for i in range(config.optimization.micro_batch_size)]
    )
    batch = {name: value.to(device) for name, value in batch.items()}

    def run() -> Tensor:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = visual_loss(model, batch, vocabulary)
        loss.backward()
        return loss

    return run


def generator_numbers(device: torch.device) -> Numbers:
    exact = [
        "optimization.bf16=false",
        "model.attention=sdpa",
        f"model.llm_config.num_hidden_layers={LAYERS}",
    ]
    return [
        generator_step(
            device, "optimization.micro_batch_size=1", *exact, codes=64, born_on="cpu"
        )().item()
    ]


def sampler(
    codes: int,
    batch: int,
    compiled: bool,
    device: torch.device,
    *,
    layers: int = 28,
    dtype: torch.dtype = torch.bfloat16,
) -> Callable[[], Tensor]:
    """Greedy codes with guidance of a random Qwen3-0.6B."""
    vocabulary = VisualVocabulary(offset=151_936, codebook_size=16_384, num_codes=codes)
    with torch.device(device if layers == 28 else "cpu"):
        model = random_generator(vocabulary, {**QWEN3_0_6B, "num_hidden_layers": layers}, dtype)
    model.to(device)
    prompts = [[*range(1, 17), vocabulary.begin_of_image]] * batch
    unconditional = [1, vocabulary.begin_of_image]
    return lambda: sample_codes(
        model, prompts, unconditional, vocabulary, GREEDY, range(batch), compile=compiled
    )


def sampler_numbers(compiled: bool, device: torch.device) -> Numbers:
    compiled = compiled and device.type == "cuda"
    return sampler(16, 2, compiled, device, layers=LAYERS, dtype=torch.float32)().flatten().tolist()


def cases() -> list[Case]:
    """All rows, the most telling first."""
    found: list[Case] = []
    for name in TOKENIZERS:
        for number in (1, 2):
            config = load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", name))
            both = partial(tokenizer_numbers, name, number), partial(tokenizer_speed, name, number)
            images = config.stage_config(number).micro_batch_size
            found.append(Case(f"tokenizer {name}, stage {number}", *both, (images, "images")))
    for title, precision, exact, tf32 in (
        ("fp32, as in training", "fp32", False, False),
        ("fp32, TF32 allowed", "fp32", False, True),
        ("fp32, exact", "fp32", True, False),
        ("bf16, exact", "bf16", True, False),
    ):
        both = (
            partial(search_numbers, precision, exact, tf32),
            partial(search, 8192, precision, exact, tf32),
        )
        found.append(Case(f"search {title}", *both, (8192, "features")))
    for title, llm in (("0.6B", "Qwen/Qwen3-0.6B"), ("7B", "lmsys/vicuna-7b-v1.5")):
        found.append(
            Case(
                f"LLaVA {title}, packed",
                partial(llava_numbers, llm),
                partial(llava_step, llm),
                (LLAVA_RECORDS, "records"),
            )
        )
    found.append(Case("generator 0.6B, 1,024 codes", generator_numbers, generator_step))
    for codes, compiled in (
        (64, False),
        (64, True),
        (1024, True),
        (1024, False),
    ):  # the last take long
        for batch in (8, 1, 64):
            title = f"sampler {'compiled' if compiled else 'eager'}, {codes} codes, batch {batch}"
            numbers = partial(sampler_numbers, compiled) if (codes, batch) == (64, 8) else None
            found.append(
                Case(title, numbers, partial(sampler, codes, batch, compiled), (batch, "images"))
            )
    return found


# ---- measuring


@contextlib.contextmanager
def noted(row: Row) -> Iterator[None]:
    """A block that may fail: the row says how, and memory is free again."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        row.problem = "out of memory"
    except Exception as error:  # noqa: BLE001 - whatever it is, the other rows are worth having
        row.problem = f"{type(error).__name__}: {error}".partition("\n")[0][:160]
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def time_of(run: Callable[[], Any], *, seconds: float = 3.0) -> float:
    """Seconds of one call, after one that warms up; a mean over calls that together take about `seconds`."""

    def measure(calls: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    measure(1)
    first = measure(1)
    return (
        first if first > seconds / 2 else measure(max(1, min(20, int(seconds / max(first, 1e-3)))))
    )


def deviation(found: Numbers, expected: Numbers) -> float:
    """The largest difference, relative to the largest number that was expected."""
    pairs = zip(found, expected, strict=True)
    largest = max(abs(number) for number in expected)
    return max(abs(a - b) / max(largest, 1e-12) for a, b in pairs)


def compare_numbers(
    case: Case, row: Row, expected: dict[str, Numbers], device: torch.device
) -> None:
    """Fill in the deviation from the CPU's numbers."""
    if case.numbers is None:
        return
    with noted(row):
        numbers = case.numbers(device)
        tolerance = (
            0 if all(isinstance(number, int) for number in numbers) else TOLERANCE
        )  # codes are equal or not
        found = deviation(numbers, expected[case.name])
        row.deviation = found if math.isfinite(found) else None
        if not found <= tolerance:
            row.problem = "not equal to the CPU"


def measure_speed(case: Case, row: Row, bf16_rate: float, device: torch.device) -> None:
    """Fill in time, memory and share of the chip's rate (FLOP/s)."""
    if row.problem:
        return
    with noted(row):
        run = case.prepare(device)
        torch.cuda.reset_peak_memory_stats()
        row.seconds = time_of(run)
        row.peak_gib = torch.cuda.max_memory_allocated() / GIB
        row.rate, row.unit = case.work[0] / row.seconds, f"{case.work[1]}/s"
        if "sampler" not in case.name:
            with FlopCounterMode(display=False) as counter:
                run()
            row.tflop = counter.get_total_flops() / 1e12
            row.share = row.tflop * 1e12 / row.seconds / bf16_rate


def bf16_rate(device: torch.device) -> float:
    """FLOP/s of a product of two bf16 matrices."""
    left = torch.randn(RATE_SIZE, RATE_SIZE, device=device, dtype=torch.bfloat16)
    return 2 * RATE_SIZE**3 / time_of(lambda: left @ left, seconds=1.0)


def check(
    chosen: Sequence[Case], expected: dict[str, Numbers], *, minutes: float, device: torch.device
) -> dict[str, Any]:
    """The report on all cases; rows that the time does not reach say so."""
    end, rate = time.monotonic() + 60 * minutes, bf16_rate(device)
    rows = []
    for case in chosen:
        row = Row(case.name)
        rows.append(row)
        if time.monotonic() > end:
            row.problem = "out of time"
            continue
        compare_numbers(case, row, expected, device)
        measure_speed(case, row, rate, device)
        print(f"{row.name}: {row.problem or 'done'}", file=sys.stderr, flush=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "bf16_tflops": rate / 1e12,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    forms = {
        "deviation": ".1e",
        "seconds": ".4g",
        "rate": ",.4g",
        "peak_gib": ".1f",
        "tflop": ".2f",
        "share": ".0%",
    }
    rows = []
    for row in report["rows"]:
        cells = [
            "" if row[name] is None else format(row[name], form) for name, form in forms.items()
        ]
        rows.append([row["name"], *cells, row["unit"], row["problem"]])
    header = ["path", "deviation", "s", "rate", "GiB", "TFLOP", "of bf16", "unit of rate", ""]
    return "\n".join(
        [
            f"{report['gpu']}: {report['bf16_tflops']:.0f} TFLOP/s in bf16",
            "",
            *markdown_table(header, rows),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is checked."""

    only: str = ""
    """Text that names of rows must hold; empty: all rows."""
    minutes: float = 5.0
    """Rows that begin later are left out."""
    output: str = "runs/check_gpu.json"
    reference: str | None = None
    """Write the numbers of this machine's CPU here and stop; the check itself starts such a process."""


def main(argv: list[str] | None = None) -> int:
    """Check the GPU, print the table and write the JSON; 1 when a row has a problem."""
    options = parse(Options, argv)
    chosen = [case for case in cases() if options.only in case.name]
    if options.reference:
        numbers = {
            case.name: case.numbers(torch.device("cpu"))
            for case in chosen
            if case.numbers is not None
        }
        write_json(Path(options.reference), numbers)
        return 0
    if not torch.cuda.is_available():
        raise ValueError(
            "got no GPU, expected one that PyTorch sees: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "numbers.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.check_gpu",
            f"only={options.only}",
            f"reference={file}",
        ]
        subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        expected = read_json(file)
    report = check(chosen, expected, minutes=options.minutes, device=torch.device("cuda"))
    write_json(Path(options.output), report)
    print(f"{text(report)}\n\nwritten to {options.output}")
    return int(any(row["problem"] for row in report["rows"]))


if __name__ == "__main__":
    run_main(main)
