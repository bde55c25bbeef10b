"""Is everything right on this GPU, and how fast is it? Every hot path, with random weights.

    bash scripts/check_gpu.sh [only=TEXT] [minutes=M] [output=FILE]

Equality: each path runs in float32 with two layers of full width, here and in a process on the CPU
with the same seeds; the losses, or the codes, must agree. Speed: the path as its configuration
trains it, bf16 and all layers; FLOPs are counted by `torch.utils.flop_counter`, and the chip's bf16
rate is that of a large product measured here. A row that fails says so, and the others go on. A
compiled sampler runs as a CUDA graph.
"""

import dataclasses
import gc
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlavaForConditionalGeneration

from benchmarks.sampler import GREEDY, QWEN3_0_6B, random_generator
from vqrae.common.cli import parse
from vqrae.common.config import load_config, shipped_config
from vqrae.common.distributed import attention_implementation
from vqrae.common.errors import run_main
from vqrae.common.files import markdown_table, read_json, write_json
from vqrae.common.run import open as open_run
from vqrae.common.run import read_metrics
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.generation.config import GeneratorConfig
from vqrae.generation.data import GenerationCollator
from vqrae.generation.heads import SingleCodeHead
from vqrae.generation.modeling import VisualVocabulary, build_generator
from vqrae.generation.sampling import sample_codes
from vqrae.generation.train import fit_prompts, visual_loss
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
RECORDS = 8  # of a LLaVA step
RATE_SIZE = 8192  # of the matrices whose product gives the chip's rate
VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
VICUNA_7B |= {"num_attention_heads": 32, "vocab_size": 32_000}
Numbers = list[float]
Step = Callable[[], Any]


# ---- the hot paths: (device, exact) -> a step; exact ones are in float32 and have few layers


def tokenizer(name: str, stage: int, device: torch.device, exact: bool) -> Step:
    """The training loop of a stage; exact steps give losses and gradient norm of one image."""
    given = ["dry_run=100"]
    if exact:
        given += ["bf16=false", "tf32=false", "attention=sdpa", "micro_batch_size=1"]
        given += [f"model.encoder_config.num_hidden_layers={LAYERS}"]
    config = load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", name), given)
    config = rehearsal(config, stage)
    config = dataclasses.replace(config, log_steps=1, save_steps=1000, sample_steps=1000)
    torch.manual_seed(0)
    with torch.device("cpu" if exact else device):
        without_weights = dataclasses.replace(config.model, encoder=None)
        model = build_tokenizer(without_weights, attention_implementation(config.attention))
    folder = tempfile.mkdtemp()  # small; the loop logs as long as it is timed
    images = StageImages.micro_batches

    def one_batch(self: StageImages, start: int) -> Any:
        return itertools.repeat(next(images(self, start)))  # reading images is not what is timed

    with mock.patch.object(StageImages, "micro_batches", one_batch):
        steps = train_stage(config, stage, model, open_run(folder))
        next(steps)

    def step() -> Numbers:
        next(steps)
        row = read_metrics(folder)[-1] if exact else {}
        return [value for key, value in row.items() if key.endswith(("_loss", "_norm"))]

    return step


def search(precision: Any, settle: bool, tf32: bool, device: torch.device, exact: bool) -> Step:
    """The search of 16,384 codes x 1,536; `settle` breaks near ties exactly."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(16_384, 1536, generator=generator).to(device)
    features = torch.randn(1024 if exact else 8192, 1536, generator=generator).to(device)

    def step() -> Numbers:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            codes = nearest_codes(features, table, precision=precision, exact=settle)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        return codes.tolist() if exact else []

    return step


def llava(llm: str, device: torch.device, exact: bool) -> Step:
    """Forward and backward pass of sft over a packed micro-batch of scenes."""
    dtype = torch.float32 if exact else torch.bfloat16
    attention = "sdpa" if exact else attention_implementation()
    name = shipped_config("vqrae.tokenizer", "siglip2_256")
    model_config = load_config(TokenizerTrainConfig, name, ["model.encoder="]).model
    with torch.device("meta"):
        visual = build_tokenizer(model_config, "sdpa").config
    small = load_config(TinyLLMConfig, shipped_config("vqrae.quickstart", "tiny_llm"))
    _, words = build_tiny_llm(small)
    processor = build_processor(visual, words)
    kinds = {"qwen3": {**QWEN3_0_6B, "vocab_size": 151_936}, "llama": VICUNA_7B}
    config = llava_config(visual, AutoConfig.for_model(llm, **kinds[llm]), processor.image_token_id)
    if exact:
        config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = LAYERS
    torch.manual_seed(0)
    with torch.device("cpu" if exact else device):
        options = {"attn_implementation": attention, "dtype": dtype}
        model = LlavaForConditionalGeneration._from_config(config, **options)
    model.to(device).train()
    freeze(model, "sft")
    collator = PackingCollator(processor, one_row=attention == "flash_attention_2")
    scenes = SceneDataset(item="conversation", image_size=visual.image_size)
    batch = collator([scenes[i] for i in range(2 if exact else RECORDS)])
    for key, value in batch.items():
        batch[key] = value.to(device) if torch.is_tensor(value) else value
    batch["pixel_values"] = batch["pixel_values"].to(dtype)

    def step() -> Numbers:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss.item()] if exact else []

    return step


def generator(device: torch.device, exact: bool) -> Step:
    """Forward and backward pass of the published generator over its longest sequences."""
    given = ["training.model.llm="]
    if exact:
        given += ["training.optimization.bf16=false", "training.model.attention=sdpa"]
        given += ["training.optimization.micro_batch_size=1"]
        given += [f"training.model.llm_config.num_hidden_layers={LAYERS}"]
    file = shipped_config("vqrae.generation", "qwen3_0_6b")
    config = load_config(GeneratorConfig, file, given).training
    count = 64 if exact else 1024
    offset = config.model.offset
    vocabulary = VisualVocabulary(offset=offset, codebook_size=16_384, num_codes=count)
    encode_prompt = fit_prompts(config.model, build_word_tokenizer(["a"]), vocabulary)
    torch.manual_seed(0)
    bf16 = config.optimization.bf16
    with torch.device("cpu" if exact else device):
        attention = attention_implementation(config.model.attention, half=bf16)
        model = build_generator(vocabulary, llm_config=config.model.llm_config, attention=attention)
    model.to(device).train()
    model.lm_head = SingleCodeHead(model.lm_head, vocabulary.code_rows)
    caption = "a " * encode_prompt.max_caption_tokens
    codes = torch.randint(16_384, (config.optimization.micro_batch_size, count))
    batch = GenerationCollator(encode_prompt)([{"codes": c, "caption": caption} for c in codes])
    batch = {name: value.to(device) for name, value in batch.items()}

    def step() -> Numbers:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = visual_loss(model, batch, vocabulary)
        loss.backward()
        return [loss.item()] if exact else []

    return step


def sampler(codes: int, batch: int, compiled: bool, device: torch.device, exact: bool) -> Step:
    """Greedy codes with guidance of a random Qwen3-0.6B."""
    num_codes, rows = (16, 2) if exact else (codes, batch)
    vocabulary = VisualVocabulary(offset=151_936, codebook_size=16_384, num_codes=num_codes)
    shape = {**QWEN3_0_6B, "num_hidden_layers": LAYERS} if exact else QWEN3_0_6B
    dtype = torch.float32 if exact else torch.bfloat16
    with torch.device("cpu" if exact else device):
        model = random_generator(vocabulary, shape, dtype)
    model.to(device)
    prompts = [[*range(1, 17), vocabulary.begin_of_image]] * rows
    prompt = [1, vocabulary.begin_of_image]
    compiled = compiled and device.type == "cuda"

    def step() -> Numbers:
        found = sample_codes(
            model, prompts, prompt, vocabulary, GREEDY, range(rows), compile=compiled
        )
        return found.flatten().tolist() if exact else []

    return step


# ---- the rows


@dataclass
class Check:
    """One hot path, and what came out; a field stays None where it was not reached."""

    name: str
    build: Callable[[torch.device, bool], Step]
    work: float = 1
    unit: str = "steps"
    """Of the work of one step."""
    compared: bool = True
    """Whether its numbers must be the CPU's."""
    deviation: float | None = None
    """The largest from the numbers of the CPU, relative to the largest of them."""
    seconds: float | None = None
    rate: float | None = None
    peak_gib: float | None = None
    tflop: float | None = None
    share: float | None = None
    """Of the chip's bf16 rate."""
    problem: str = ""


def all_rows() -> list[Check]:
    """The most telling first."""
    rows = []
    for name, stage in itertools.product(("siglip2_256", "siglip2_512", "internvit_448"), (1, 2)):
        config = load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", name))
        images = config.stage_config(stage).micro_batch_size
        build = partial(tokenizer, name, stage)
        rows.append(Check(f"tokenizer {name}, stage {stage}", build, images, "images"))
    searches = {
        "fp32, as in training": ("fp32", False, False),
        "fp32, TF32 allowed": ("fp32", False, True),
        "fp32, exact": ("fp32", True, False),
        "bf16, exact": ("bf16", True, False),
    }
    for name, how in searches.items():
        rows.append(Check(f"search {name}", partial(search, *how), 8192, "features"))
    for name, llm in (("0.6B", "qwen3"), ("7B", "llama")):
        rows.append(Check(f"LLaVA {name}, packed", partial(llava, llm), RECORDS, "records"))
    rows.append(Check("generator 0.6B, 1,024 codes", generator))
    # The last take long.
    for codes, compiled in ((64, False), (64, True), (1024, True), (1024, False)):
        for batch in (8, 1, 64):
            title = f"sampler {'compiled' if compiled else 'eager'}, {codes} codes, batch {batch}"
            build = partial(sampler, codes, batch, compiled)
            rows.append(Check(title, build, batch, "images", compared=(codes, batch) == (64, 8)))
    return rows


def check(row: Check, expected: dict[str, Numbers], bf16_rate: float, device: torch.device) -> None:
    """Compare a path with the CPU, then time it; what fails is noted in the row."""
    try:
        if row.compared:
            row.deviation = compare(row.build(device, True)(), expected[row.name])
        step = row.build(device, False)
        torch.cuda.reset_peak_memory_stats()
        row.seconds = time_of(step)
        row.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        row.rate = row.work / row.seconds
        if "sampler" not in row.name:  # thousands of small passes
            with FlopCounterMode(display=False) as counter:
                step()
            row.tflop = counter.get_total_flops() / 1e12
            row.share = row.tflop * 1e12 / row.seconds / bf16_rate
    except torch.cuda.OutOfMemoryError:
        row.problem = "out of memory"
    except Exception as error:  # noqa: BLE001 - whatever it is, the other rows are worth having
        row.problem = f"{type(error).__name__}: {error}".partition("\n")[0][:160]


def compare(found: Numbers, expected: Numbers) -> float:
    """The largest difference, relative to the largest expected number; ArithmeticError if too
    large.
    """
    largest = max(1e-12, *map(abs, expected))
    pairs = zip(found, expected, strict=True)
    deviation = max(abs(a - b) / largest for a, b in pairs)
    tolerance = 0 if all(isinstance(number, int) for number in found) else TOLERANCE
    if not (math.isfinite(deviation) and deviation <= tolerance):
        raise ArithmeticError(f"not equal to the CPU, deviation {deviation:.1e}")
    return deviation


def time_of(step: Step, *, seconds: float = 3.0) -> float:
    """Mean seconds of calls that together take about `seconds`, after two that warm up."""

    def measure(calls: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    measure(1)
    first = measure(1)
    calls = int(seconds / max(first, 1e-3))
    return measure(min(20, calls)) if calls > 1 else first


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    forms = {"deviation": ".1e", "seconds": ".4g", "rate": ",.4g", "peak_gib": ".1f"}
    forms |= {"tflop": ".2f", "share": ".0%"}
    rows = []
    for row in report["rows"]:
        cells = ["" if row[key] is None else format(row[key], form) for key, form in forms.items()]
        rows.append([row["name"], *cells, f"{row['unit']}/s", row["problem"]])
    header = ["path", "deviation", "s", "rate", "GiB", "TFLOP", "of bf16", "unit of rate", ""]
    chip = f"{report['gpu']}: {report['bf16_tflops']:.0f} TFLOP/s in bf16"
    return "\n".join([chip, "", *markdown_table(header, rows)])


@dataclass(frozen=True, kw_only=True)
class CheckGPUConfig:
    """Compare every hot path with the CPU, and time it."""

    only: str = ""
    """Text that names of rows must hold; empty: all rows."""
    minutes: float = 5.0
    """Rows that begin later are left out."""
    output: str = "runs/check_gpu.json"
    reference: str | None = None
    """File for the numbers of the CPU: write them and stop, as the check's own process does."""


def cpu_numbers(only: str) -> dict[str, Numbers]:
    """The numbers of all rows, from a process that sees no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "numbers.json"
        command = [sys.executable, "-m", "benchmarks.check_gpu"]
        command += [f"only={only}", f"reference={file}"]
        subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        return read_json(file)


def run(rows: Sequence[Check], expected: dict[str, Numbers], *, minutes: float) -> dict[str, Any]:
    """The report on all rows; those that the time does not reach say so."""
    device = torch.device("cuda")
    end = time.monotonic() + 60 * minutes
    left = torch.randn(RATE_SIZE, RATE_SIZE, device=device, dtype=torch.bfloat16)
    rate = 2 * RATE_SIZE**3 / time_of(lambda: left @ left, seconds=1.0)  # FLOP/s
    for row in rows:
        if time.monotonic() > end:
            row.problem = "out of time"
            continue
        check(row, expected, rate, device)
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{row.name}: {row.problem or 'done'}", file=sys.stderr, flush=True)
    found = [dataclasses.asdict(row) for row in rows]
    for row_values in found:
        del row_values["build"]
    return {"gpu": torch.cuda.get_device_name(), "bf16_tflops": rate / 1e12, "rows": found}


def main(argv: list[str] | None = None) -> int:
    """Check the GPU, print the table and write the JSON; 1 when a row has a problem."""
    config = parse(CheckGPUConfig, argv, program="bash scripts/check_gpu.sh")
    rows = [row for row in all_rows() if config.only in row.name]
    if config.reference:
        compared = [row for row in rows if row.compared]
        numbers = {row.name: row.build(torch.device("cpu"), True)() for row in compared}
        write_json(Path(config.reference), numbers)
        return 0
    if not torch.cuda.is_available():
        why = "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        raise ValueError(f"got no GPU, expected one that PyTorch sees: {why}")
    report = run(rows, cpu_numbers(config.only), minutes=config.minutes)
    write_json(Path(config.output), report)
    print(f"{text(report)}\n\nwritten to {config.output}")
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    run_main(main)
