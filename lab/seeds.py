"""Whole runs of the toy world over several seeds, each judged in full, and a table of what they
have in common: the figures of docs/results.md.

    python -m lab.seeds
Every seed has a world, a CLIP, a VQGAN and a GPT of its own. Finished stages are kept, so the same
command goes on where it stopped."""
import json
from dataclasses import dataclass
from pathlib import Path

from common.files import atomic_write
from common.options import check_range, fail, parse_options
from common.process import run_main
from lab.stages import run_stage
from lab.table import markdown_table, over_seeds


@dataclass
class Config:
    data: str = "data/seeds"  # a world and a dump for each seed
    out: str = "out/seeds"    # a folder of networks and figures for each seed, and seeds.md
    seeds: int = 3            # 0, 1, 2 ...
    optimise: int = 48        # prompts to optimise against CLIP, for seed 0 alone: it takes longest


COLUMNS = {  # figure of match.json: (title, factor, digits)
    "both": ("object and colour, %", 100, 1), "unseen": ("unseen pairs, %", 100, 1),
    "background": ("background, %", 100, 1),
    "frechet": ("Fréchet distance", 1, 0), "frechet_floor": ("Fréchet floor", 1, 0),
    "cmmd": ("CMMD", 1, 2), "cmmd_floor": ("CMMD floor", 1, 2), "diversity": ("diversity", 1, 1),
    "nearest": ("nearest training image", 1, 3)}


def stages_of(seed, cfg):
    """All stages of a seed and its evaluation: [(script, options)]."""
    world, dump, out = f"{cfg.data}/{seed}", f"{cfg.data}/{seed}_tokens", f"{cfg.out}/{seed}"
    shared, vqgan = {"out": out, "seed": seed}, {"vqgan": f"{out}/vqgan.pt"}
    images = {"data": f"{world}/train", "clip": f"{out}/clip.pt"}
    judged = {"data": world, "gpt": f"{out}/gpt.pt", "optimise": cfg.optimise * (seed == 0)}
    return [("toy.py", shared | {"data": world}),
            ("vqgan.py", shared | images),
            ("prepare.py", images | vqgan | {"out": dump}),
            ("train_gpt.py", shared | vqgan | {"data": dump}),
            ("lab.evaluate", shared | judged)]


def run_seed(seed, cfg):
    """What the evaluation of this seed says, its match.json; kept if it is of the same options and
    newer than the GPT."""
    *stages, evaluation = stages_of(seed, cfg)
    for script, options in stages:
        run_stage(script, options, capture=False)
    path, gpt = Path(cfg.out, f"{seed}/match.json"), Path(cfg.out, f"{seed}/gpt.pt")
    if path.is_file() and path.stat().st_mtime > gpt.stat().st_mtime:
        result = json.loads(path.read_text())
        if result["config"]["optimise"] == evaluation[1]["optimise"]:
            return result
    run_stage(*evaluation, capture=False)
    return json.loads(path.read_text())


def to_markdown(results):
    """A row for each kind of image, and what captions bought."""
    rows = []
    for name in results[0]["table"]:
        cells = [name]
        for column, (_, factor, digits) in COLUMNS.items():
            figures = [result["table"].get(name, {}).get(column) for result in results]
            values = [f["share"] if "share" in f else f["mean"] for f in figures if f]
            cells.append(over_seeds(values, factor, digits) if values else "")
        rows.append(cells)
    lines = markdown_table(["images", *(title for title, _, _ in COLUMNS.values())], rows)
    lines += ["", f"Mean (lowest–highest) of seeds 0 to {len(results) - 1}; optimisation is seed "
              "0's.", ""]
    for name, finding in results[0]["findings"].items():
        if "ratio" in finding:
            ratios = [result["findings"][name]["ratio"] for result in results]
            lines.append(f"* Right object and colour, {name}: {over_seeds(ratios, 1, 3)}.")
    return "\n".join(lines)


def main():
    cfg = parse_options(Config)
    check_range(cfg, 1, 2 ** 62, "seeds")
    if cfg.optimise == 1:
        fail("--optimise=1 is too few to compare; it takes 0 or from 2 prompts on")
    markdown = to_markdown([run_seed(seed, cfg) for seed in range(cfg.seeds)])
    print(markdown, flush=True)
    with atomic_write(Path(cfg.out, "seeds.md")) as f:
        f.write_text(markdown + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
