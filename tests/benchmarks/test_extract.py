"""The benchmark of extraction runs and checks itself."""

from vqrae.benchmarks import extract


def test_rows() -> None:
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    tokenizer = {"encoder_config": extract.ENCODER | small, "codebook_size": 64, "codebook_dim": 32}
    rates, disk = extract.run(tokenizer, images=3, batch_size=2, repeats=1)
    assert rates.unit == "images/s"
    assert rates.ours > 0
    assert 2048 < disk.ours < 2048 + 16  # the index, and the headers of two files
    assert disk.ratio > 3
