"""Whole runs of the toy world over several seeds, each judged in full, and a table of what they
have in common: the figures of docs/results.md.

    python -m lab.seeds
Every seed has a world, a CLIP, a VQGAN and a GPT of its own. Finished stages are kept, so the same
command goes on where it stopped."""
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from common.files import atomic_write
from common.options import check_range, parse_options
from common.process import run_main
from lab.stages import run_stage


@dataclass
class Config:
    data: str = "data/seeds"  # a world and a dump for each seed
    out: str = "out/seeds"    # a folder of networks and figures for each seed, and seeds.md
    seeds: int = 3            # 0, 1, 2 ...
    optimise: int = 48        # prompts to optimise against CLIP, as in lab.evaluate


COLUMNS = {  # figure of match.json: (title, factor, digits)
    "both": ("object and colour", 100, 1), "unseen": ("unseen pairs", 100, 1),
    "background": ("background", 100, 1), "sharp": ("looks sharp", 100, 1),
    "frechet": ("Fréchet distance", 1, 0), "frechet_floor": ("its floor", 1, 0),
    "cmmd": ("CMMD", 1, 2), "cmmd_floor": ("its floor", 1, 2), "diversity": ("diversity", 1, 1),
    "nearest": ("nearest training image", 1, 3)}


def run_seed(seed, cfg):
    """All stages and the evaluation of one seed -> what its match.json says."""
    world, dump, out = f"{cfg.data}/{seed}", f"{cfg.data}/{seed}_tokens", f"{cfg.out}/{seed}"
    shared = {"out": out, "seed": seed}
    images = {"data": f"{world}/train", "clip": f"{out}/clip.pt"}
    run_stage("toy.py", shared | {"data": world}, capture=False)
    run_stage("vqgan.py", shared | images, capture=False)
    run_stage("prepare.py", images | {"vqgan": f"{out}/vqgan.pt", "out": dump}, capture=False)
    run_stage("train_gpt.py", shared | {"data": dump, "vqgan": f"{out}/vqgan.pt"}, capture=False)
    run_stage("lab.evaluate", {"gpt": f"{out}/gpt.pt", "data": world, "out": out,
                               "optimise": cfg.optimise}, capture=False)
    return json.loads(Path(out, "match.json").read_text())


def over_seeds(values, factor, digits):
    """Figures of several seeds -> "mean (lowest–highest)"."""
    values = [factor * v for v in values]
    mean, low, high = (f"{x:.{digits}f}"
                       for x in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def to_markdown(results):
    """A row for each kind of image, and what each `finding` that is a ratio comes to."""
    titles = [title for title, _, _ in COLUMNS.values()]
    lines = ["| images | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for name in results[0]["table"]:
        cells = []
        for column, (_, factor, digits) in COLUMNS.items():
            figures = [result["table"][name].get(column) for result in results]
            values = [f["share"] if "share" in f else f["mean"] for f in figures if f]
            cells.append(over_seeds(values, factor, digits) if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for name, finding in results[0]["findings"].items():
        if "ratio" in finding:
            ratios = [result["findings"][name]["ratio"] for result in results]
            lines.append(f"{name}: {over_seeds(ratios, 1, 3)}.")
    return "\n".join([*lines, f"Mean of {len(results)} seeds (lowest–highest)."])


def main():
    cfg = parse_options(Config)
    check_range(cfg, 1, 2 ** 62, "seeds")
    markdown = to_markdown([run_seed(seed, cfg) for seed in range(cfg.seeds)])
    print(markdown, flush=True)
    with atomic_write(Path(cfg.out, "seeds.md")) as f:
        f.write_text(markdown + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
