"""Does --noise=auto fit the gap? Trains the demo's GPT with several amounts of noise, judges each
at several gaps, and writes a table in which the noise nearest to the rule's is marked.

    make demo && python -m lab.noises
A gap moves each text, and each of the generic phrases by which the rule measures, by a random
vector of its own. Finished runs are kept."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import atomic_write
from common.modality import gap_noise, measure_gap
from common.options import check_range, fail, parse_options
from common.process import run_main
from lab.judge import Examiner
from lab.painter import with_gap
from lab.stages import run_stage
from lab.table import markdown_table, over_seeds


@dataclass
class Config:
    data: str = "data/toy"           # the toy world
    models: str = "out/toy"          # the demo's clip.pt, vqgan.pt and judge.pt
    dump: str = "data/toy_tokens"    # the demo's dump
    out: str = "out/noises"          # a folder for each run, and noises.md
    noises: tuple[float, ...] = (0.36, 0.72, 1.44, 2.88)  # of train_gpt.py
    gaps: tuple[float, ...] = (0.0, 0.8, 1.2, 1.6, 2.4)   # lengths that texts are moved by
    seeds: int = 3                   # of the GPT, for each noise
    max_steps: int = 450             # of each run
    n: int = 4                       # images of each prompt
    jobs: int = 2                    # runs at a time, on one thread each


def train(noise, seed, cfg):
    """Train a GPT, if it is not finished -> its file."""
    out = Path(cfg.out, f"noise-{noise:g}-{seed}-{cfg.max_steps}")
    run_stage("train_gpt.py", {
        "data": cfg.dump, "vqgan": f"{cfg.models}/vqgan.pt", "out": out, "seed": seed,
        "noise": noise, "max_steps": cfg.max_steps, "eval_every": cfg.max_steps}, threads=1)
    print(f"trained with noise {noise:g}, seed {seed}", flush=True)
    return out / "gpt.pt"


def rule(examiner, gap):
    """(Cosine of an image to the nearest phrase, the noise that follows) where texts are moved."""
    images = examiner.image_embeds
    cosine = measure_gap(with_gap(examiner.clip, gap), images, images.mean(0))[1]
    return cosine, gap_noise(cosine)


def to_markdown(figures, rules, cfg):
    """A row for each gap."""
    noises = list(dict.fromkeys(cfg.noises))
    rows = []
    for gap, (cosine, suggested) in rules.items():
        nearest = min(noises, key=lambda x: max(x, suggested) / max(1e-9, min(x, suggested)))
        cells = [f"{gap:g}", f"{cosine:.3f}", f"{suggested:g}"]
        for noise in noises:
            runs = [figures[noise, seed, gap] for seed in range(cfg.seeds)]
            both, unseen = (over_seeds([run[key] for run in runs], 100, 1)
                            for key in ("both", "unseen"))
            mark = "**" * (noise == nearest)
            cells.append(f"{mark}{both}{mark}, {unseen}")
        rows.append(cells)
    lines = markdown_table(["gap", "cosine", "rule", *(f"noise {x:g}" for x in noises)], rows)
    return "\n".join([*lines, "", (
        f"Right object and colour, and of the unseen pairs, in %: mean (lowest–highest) of "
        f"{cfg.seeds} seeds of the GPT, {cfg.n} images of each prompt. Bold: the noise nearest to "
        f"the rule's. Cosine: of an image to the nearest phrase."), ""])


def main():
    cfg = parse_options(Config)
    check_range(cfg, 1, 2 ** 62, "seeds", "max_steps", "n", "jobs")
    if not cfg.noises or not cfg.gaps:
        fail("--noises and --gaps take one number or more, like 0.5,1,2")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    examiner = Examiner(cfg.data, cfg.models, cfg.n)
    rules = {gap: rule(examiner, gap) for gap in cfg.gaps}
    runs = list(dict.fromkeys((x, seed) for x in cfg.noises for seed in range(cfg.seeds)))
    with ThreadPoolExecutor(cfg.jobs) as pool:
        files = dict(zip(runs, pool.map(lambda run: train(*run, cfg), runs)))
        jobs = [(*run, gap) for run in runs for gap in rules]
        found = pool.map(lambda job: examiner(files[job[:2]], {}, job[2]), jobs)
        figures = dict(zip(jobs, found))
    markdown = to_markdown(figures, rules, cfg)
    print(markdown, end="", flush=True)
    with atomic_write(Path(cfg.out, "noises.md")) as f:
        f.write_text(markdown, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
