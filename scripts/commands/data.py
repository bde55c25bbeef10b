"""What to know of data before training on it."""

import functools
import sys
from dataclasses import asdict, dataclass

from transformers import LlavaProcessor
from transformers.utils import logging

from vqrae.common.cli import progress_line
from vqrae.common.config import check_range, load_config, shipped_config
from vqrae.common.files import printable, write_json
from vqrae.data.checks import check_source, require_target, write_clean
from vqrae.data.sources import texts_in
from vqrae.data.stream import parse_mixture
from vqrae.data.word_tokenizer import describe_unknown, is_word_tokenizer
from vqrae.understanding.build import load_processor
from vqrae.understanding.conversation import describe_batch, examine_length
from vqrae.understanding.train import Stage, TrainConfig, build_collator, learn_words, open_data


@dataclass(frozen=True, kw_only=True)
class CheckData:
    """Read a source before training on it: sizes, broken and missing images, captions, duplicates.

    Exit code 1: problems. With config, which names a LLaVA run, also conversations that are too
    long for it, and words for which it has no ids. With write_clean, the usable entries of a
    FILE.json or FILE.jsonl are written, and the exit code is 0.
    """

    source: str
    """scenes, emoji, a folder, FILE.jsonl, FILE.tar, hf:NAME, FILE.json, codes, a mixture."""
    image_folder: str | None = None
    """Where the images of a FILE.json are, if not next to it."""
    limit: int | None = None
    """Samples to read, evenly spread; by default all."""
    workers: int = 0
    """Processes that decode."""
    json: str | None = None
    """FILE for the whole report."""
    write_clean: str | None = None
    """FILE for the usable entries."""
    config: str | None = None
    """A name in understanding/configs, or FILE.yaml; key=value (tokenizer=RUN) changes it."""
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_range(self, "limit", low=1)
        check_range(self, "workers", low=0)
        if self.overrides and self.config is None:
            raise ValueError(
                f"got {self.overrides[0]}, which changes a configuration: give --config"
            )

    def run(self) -> int:
        folder = {"image_folder": self.image_folder}
        if self.write_clean:
            require_target(self.source, self.write_clean, **folder)
        examine = None
        if self.config:
            config = read_config(self.config, self.overrides)
            processor = processor_of(config)
            length = config.max_length
            examine = functools.partial(examine_length, processor=processor, max_length=length)
        reports = []
        for source in [name for name, _ in parse_mixture(self.source)] or [self.source]:
            report = check_source(
                source,
                limit=self.limit,
                workers=self.workers,
                progress=progress_line("check-data"),
                examine=examine,
                **folder,
            )
            print(report.text())
            reports.append(report)
            if self.config and (words := describe_unknown(processor.tokenizer, texts_in(source))):
                learned = is_word_tokenizer(processor.tokenizer)
                print(printable(f"note: {words}{'; training gives them ids' if learned else ''}"))
        if self.json:
            write_json(self.json, [asdict(report) for report in reports])
        if self.write_clean:
            unfit = reports[0].unfit
            written, total = write_clean(
                self.source, self.write_clean, unfit=unfit, examine=examine, **folder
            )
            print(f"{self.write_clean}: {written} of {total} entries")
            return 0
        return int(any(report.problems for report in reports))


@dataclass(frozen=True, kw_only=True)
class InspectBatch:
    """Print the first samples of a LLaVA run as one batch, trained tokens in colour."""

    config: str
    """A name in understanding/configs, or FILE.yaml; key=value (tokenizer=RUN) changes it."""
    overrides: tuple[str, ...] = ()
    stage: Stage = "sft"
    samples: int = 4
    """Taken from the beginning."""
    no_color: bool = False
    """Trained tokens in [[ ]]; so it is unless the output is a terminal."""

    def __post_init__(self) -> None:
        check_range(self, "samples", low=1)

    def run(self) -> None:
        logging.disable_progress_bar()
        config = read_config(self.config, self.overrides)
        processor = processor_of(config)
        learn_words(config, processor.tokenizer)
        dataset = open_data(config, self.stage, processor.image_processor.crop_size["height"])
        samples = [dataset[i] for i in range(min(self.samples, len(dataset)))]
        batch = build_collator(config, self.stage, processor)(samples)
        color = sys.stdout.isatty() and not self.no_color
        print(describe_batch(batch, processor, color=color))


def read_config(name: str, overrides: tuple[str, ...]) -> TrainConfig:
    return load_config(TrainConfig, shipped_config("vqrae.understanding", name), overrides)


def processor_of(config: TrainConfig) -> LlavaProcessor:
    """What that run would encode text and images with; no weights are loaded."""
    return load_processor(config.tokenizer, config.llm, **config.reading)
