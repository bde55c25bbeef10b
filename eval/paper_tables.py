"""Result tables of the VQRAE paper (arXiv 2511.23386) as it prints them; None where it prints a dash."""

from dataclasses import dataclass

Row = tuple[float | str | None, ...]
IMAGENET_VALIDATION = 50_000  # images


@dataclass(frozen=True)
class PaperTable:
    """A table: `columns` behind the label; `digits` of their numbers; `rows` start with the label."""

    title: str
    columns: tuple[str, ...]
    digits: tuple[int, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        assert len(self.columns) == len(self.digits)
        assert all(len(row) == len(self.columns) + 1 for row in self.rows)


RECONSTRUCTION = PaperTable(
    "Table 2: reconstruction, ImageNet validation at 256 px",
    ("ratio", "rFID", "PSNR", "SSIM"),
    (0, 2, 2, 3),
    (
        ("VQGAN", 16, 4.98, 20.00, 0.629),
        ("LlamaGen", 16, 2.19, 20.79, 0.675),
        ("VAR", 16, 1.00, 22.63, 0.755),
        ("Open-MAGVIT2", 16, 1.67, 22.70, 0.640),
        ("RAE", 16, 0.49, 19.23, 0.620),
        ("Show-o", 16, 3.50, 21.34, 0.590),
        ("TokenFlow", 16, 1.37, 21.41, 0.690),
        ("DualViTok", 16, 1.37, 22.53, 0.740),
        ("MUSE-VL", 16, 2.26, 20.14, 0.646),
        ("VQRAE SigLIP2", 16, 1.31, 22.23, 0.762),
        ("VQRAE InternViT", 14, 1.39, 22.88, 0.784),
    ),
)

UNDERSTANDING = PaperTable(
    "Table 3: understanding († LLaVA-1.5 setting; V = Vicuna)",
    ("encoder", "LLM", "res", "POPE", "GQA", "TQA", "MMB", "MME-P", "SEED", "MMMU", "AI2D"),
    (0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
    (
        ("Emu3-Chat", "MoVQGAN", "8B", 512, 85.2, 60.3, 64.7, 58.5, 1243.8, 68.2, 31.6, 70.0),
        ("LLaVA-1.5†", "CLIP-L", "V-7B", 336, 85.9, 62.0, 46.1, 64.3, 1510.7, 58.6, 35.4, 55.3),
        ("LLaVA-1.5†", "CLIP-L", "V-13B", 336, 85.9, 63.3, 61.3, 67.7, 1531.3, 68.1, 36.4, 61.1),
        ("InternVL2.5", "InternViT-300M", "InternLM2.5-7B", 448, 90.6, None, 79.1, 84.6, None, None, 56.0, 84.5),
        ("InternVL3", "InternViT-300M", "Qwen2.5-7B", 448, 91.1, None, 80.2, 83.4, 1748.4, 77.1, 62.7, 85.2),
        ("Qwen2.5-VL", "QwenViT", "Qwen2.5-7B", 448, 85.9, None, 84.9, 83.5, 1698.1, 77.0, 58.6, 83.9),
        ("VILA-U†", "SigLIP-so400m", "V-7B", 256, 81.6, None, None, None, 1311.6, None, None, None),
        ("UniTok†", "ViTamin-L", "V-7B", 256, 81.7, None, None, None, 1448.0, None, None, None),
        ("SemHiTok†", "SigLIP-L", "V-7B", 256, 84.2, 61.0, None, 60.3, 1400.6, None, None, None),
        ("QLIP†", "CLIP-L", "V-7B", 392, 86.1, 61.8, 55.2, None, 1498.3, None, None, None),
        ("TokenFlow-L†", "ViTamin-XL", "V-13B", 256, 85.0, 60.3, 54.1, 60.3, 1365.4, 62.6, 34.4, 56.6),
        ("TokenFlow-XL", "SigLIP-so400m", "V-13B", 384, 86.8, 62.7, 61.5, 68.9, 1545.9, 68.7, 38.7, 66.7),
        ("TokLIP†", "ViT-so400m", "Qwen2.5-7B", 384, 82.7, 59.3, None, None, 1410.2, 65.2, 42.1, None),
        ("Tar", "SigLIP2-so400m", "Qwen2.5-7B", 384, 87.8, 61.3, None, 74.4, 1571.0, 73.0, 39.0, None),
        ("VQRAE†", "SigLIP2", "V-7B", 256, 84.4, 62.4, 44.4, 65.3, 1445.7, 66.4, 31.3, 53.1),
        ("VQRAE†", "SigLIP2", "V-13B", 256, 85.1, 63.4, 46.5, 65.5, 1491.1, 66.8, 33.3, 57.0),
        ("VQRAE†", "SigLIP2", "V-7B", 512, 88.2, 63.6, 58.8, 67.6, 1494.2, 62.8, 33.9, 55.3),
        ("VQRAE†", "SigLIP2", "V-13B", 512, 88.2, 64.8, 61.7, 67.3, 1543.3, 69.9, 37.4, 59.8),
        ("VQRAE", "InternViT-300M", "Qwen2.5-7B", 448, 90.5, None, 80.6, 85.1, 1746.8, 77.0, 61.6, 84.8),
    ),
)

PIXART = "PixArt-\N{GREEK SMALL LETTER ALPHA}"
GENERATION = PaperTable(
    "Table 4: generation, GenEval and DPG-Bench",
    ("params", "Sgl", "Two", "Cnt", "Col", "Pos", "Attr", "GenEval", "Glob", "Ent", "Attrib", "Rel", "Oth", "DPG"),
    (0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2),
    (
        ("SDv1.5", "0.9B", 0.97, 0.38, 0.35, 0.76, 0.04, 0.06, 0.43, 74.63, 74.23, 75.39, 73.49, 67.81, 63.18),
        (PIXART, "0.6B", 0.98, 0.50, 0.44, 0.80, 0.08, 0.07, 0.48, 74.97, 79.32, 78.60, 82.57, 76.96, 71.11),
        ("SDv2.1", "0.9B", 0.98, 0.51, 0.44, 0.85, 0.07, 0.17, 0.50, None, None, None, None, None, None),
        ("SDXL", "2.6B", 0.98, 0.74, 0.39, 0.85, 0.15, 0.23, 0.55, 83.27, 82.43, 80.91, 86.76, 80.41, 74.65),
        ("DALLE3", None, 0.96, 0.87, 0.47, 0.83, 0.43, 0.45, 0.67, 90.97, 89.61, 88.39, 90.58, 89.83, 83.50),
        ("SD3-Medium", "2B", 0.99, 0.94, 0.72, 0.89, 0.33, 0.60, 0.74, 87.90, 91.01, 88.83, 80.70, 88.68, 84.08),
        ("SANA-1.5", "4.8B", 0.99, 0.93, 0.86, 0.84, 0.59, 0.65, 0.81, None, None, None, None, None, 84.70),
        ("Chameleon", "7B", None, None, None, None, None, None, 0.39, None, None, None, None, None, None),
        ("LlamaGen", "0.8B", 0.71, 0.34, 0.21, 0.58, 0.07, 0.04, 0.32, 81.76, 75.43, 76.17, 84.76, 58.40, 64.84),
        ("EMU3-Gen", "8B", 0.98, 0.71, 0.34, 0.81, 0.17, 0.21, 0.54, 85.21, 86.68, 86.84, 90.22, 83.15, 80.60),
        ("TokenFlow", "13B", 0.97, 0.66, 0.40, 0.84, 0.17, 0.26, 0.55, 78.72, 79.22, 81.29, 85.22, 71.20, 73.38),
        ("Janus", "1.3B", 0.97, 0.68, 0.30, 0.84, 0.46, 0.42, 0.61, 82.33, 87.38, 87.70, 85.46, 86.41, 79.68),
        ("SimpleAR", "1.5B", None, 0.90, None, None, 0.28, 0.45, 0.63, 87.97, None, None, 86.33, None, 81.97),
        ("Janus-Pro", "1B", 0.98, 0.82, 0.51, 0.89, 0.65, 0.56, 0.73, 87.58, 88.63, 88.17, 88.98, 88.30, 82.63),
        ("VQRAE", "0.6B", 0.96, 0.82, 0.64, 0.80, 0.73, 0.58, 0.76, 89.78, 93.14, 89.92, 90.34, 91.27, 86.67),
    ),
)
