"""What does each part buy? Trains variants of the demo's GPT on the demo's dump, each over several
seeds, judges what they draw as lab/evaluate.py does, and writes one table, negatives included.

    make demo && python -m lab.ablate
Every run gets the time in which the reference takes --max_steps steps: a variant's own rate is
measured first, by dry runs in turn, and its number of steps follows from that. Finished runs are
kept, so the same command goes on where it stopped."""
import json
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from common.dumps import open_dump
from common.files import atomic_write, write_json
from common.modality import gap_noise
from common.options import check_range, fail, parse_options
from common.process import run_main
from lab.judge import Examiner
from lab.stages import run_stage
from lab.table import markdown_table, save_chart
from toy import read_world
from train_gpt import PRESETS


@dataclass
class Config:
    data: str = "data/toy"           # the toy world
    models: str = "out/toy"          # the demo's clip.pt, vqgan.pt and judge.pt
    dump: str = "data/toy_tokens"    # the demo's dump
    out: str = "out/ablations"       # a folder for each run, ablations.md and .json, noise.png
    only: str = ""                   # rows with one of these in their name: noise,centred
    seeds: int = 3                   # runs of each row
    max_steps: int = 160             # of the reference; every other row gets the same time
    vqgan_steps: int = 600           # of the rows that have a VQGAN of their own
    n: int = 4                       # images of each prompt
    jobs: int = 2                    # runs at a time, on one thread each


GAP = 1.2  # length of each text's own vector, beside no gap
VARIANTS = {  # name: options of train_gpt.py
    "reference": {},
    "classic (2022)": {name: PRESETS["paper"][name] for name in (
        "classic", "zero_init", "dropout", "token_corruption", "muon", "weight_decay",
        "batch_size")},
    "AdamW for Muon": {"muon": False},
    "without zero-initialised outputs": {"zero_init": False},
    "noise 0": {"noise": 0},
    "noise 1": {"noise": 1},
    "noise 2": {"noise": 2},
    "spread 0": {"spread": 0},
    "not centred": {"center": False},
    "no token corruption": {"token_corruption": 0},
    "embedding-reconstruction loss 0.1": {"clip_loss_weight": 0.1},
    "2 crops an image": {},
    "256 codes": {},
    "8 x 8 tokens": {},
}
RATES = {  # of rows with AdamW: the best of three, by seed 0's validation loss
    "classic (2022)": (5e-4, 15e-4, 45e-4),
    "AdamW for Muon": (1e-3, 3e-3, 9e-3),
}
VQGANS = {  # name: options of vqgan.py, for variants that have a VQGAN of their own
    "classic (2022)": {"mse": 0.0, "perceptual": 1.0},
    "2 crops an image": {"min_zoom": 0.8, "flip": True},
    "256 codes": {"codebook_size": 256},
    "8 x 8 tokens": {"ch_mult": (1, 2)},
}
DUMPS = {"2 crops an image": {"crops": 2}}  # name: options of prepare.py
SAMPLING = {  # name: options of sample.py, for images drawn from the reference's GPTs
    **{f"guidance {g} when sampling": {"guidance": float(g)} for g in (1, 2, 4, 6)},
    **{f"variety {v} when sampling": {"variety": v} for v in (0.0, 1.0)},
}
SAME_SPEED = {"noise", "spread", "center", "token_corruption"}  # other numbers, the same shapes
COLUMNS = {  # figure: (title, factor, digits)
    "val_loss": ("validation loss", 1, 3), "both": ("object and colour", 100, 1),
    "unseen": ("unseen pairs", 100, 1), "moved": (f"object and colour, gap {GAP}", 100, 1),
    "frechet": ("Fréchet distance", 1, 0)}


def choose_rows(only):
    """The names of the rows that hold one of these words, and the reference."""
    words, rows = [word for word in only.split(",") if word], [*VARIANTS, *SAMPLING]
    for word in words:
        if not any(word in name for name in rows):
            fail(f"--only={only}: no row has '{word}' in its name; the rows are {', '.join(rows)}")
    return [name for name in rows
            if name == "reference" or not words or any(word in name for word in words)]


def slug(name):
    return re.sub(r"\W+", "-", name).strip("-")


def make_inputs(name, cfg):
    """The options of train_gpt.py for a variant, whose own VQGAN and dump are made first."""
    vqgan, dump, own = f"{cfg.models}/vqgan.pt", cfg.dump, f"{slug(name)}-{cfg.vqgan_steps}"
    shared = {"data": f"{cfg.data}/train", "clip": f"{cfg.models}/clip.pt"}
    if name in VQGANS:
        vqgan, dump = f"{cfg.out}/vqgan-{own}/vqgan.pt", f"{cfg.out}/dump-{own}"
        run_stage("vqgan.py", shared | VQGANS[name] | {
            "out": f"{cfg.out}/vqgan-{own}", "max_steps": cfg.vqgan_steps}, threads=cfg.jobs)
        run_stage("prepare.py", shared | DUMPS.get(name, {}) | {"vqgan": vqgan, "out": dump},
                  threads=cfg.jobs)
    return {"data": dump, "vqgan": vqgan} | VARIANTS[name]


def measure_speeds(options, cfg):
    """{variant: its steps a second / the reference's}, if not known from an earlier call."""
    path = Path(cfg.out, "speed.json")
    speeds = json.loads(path.read_text()) if path.exists() else {}
    speeds |= {name: 1.0 for name in options
               if name not in VQGANS and SAME_SPEED.issuperset(VARIANTS[name])}
    unknown = [name for name in options if name not in speeds]
    rates = {name: [] for name in ["reference", *unknown]}
    for _ in range(3 if unknown else 0):  # in turn: a slow moment of the machine hits all alike
        for name in rates:
            output = run_stage("train_gpt.py", options[name] | {
                "out": f"{cfg.out}/dry", "dry_run": True}, threads=1)
            rates[name].append(float(re.search(r"([\d.e+]+) steps/s", output)[1]))
    for name in unknown:
        speeds[name] = statistics.median(rates[name]) / statistics.median(rates["reference"])
    write_json(path, speeds)
    return speeds


def train(name, seed, options, speed, cfg):
    """Train a variant, if it is not finished -> (its checkpoint, its steps, validation loss)."""
    steps = max(1, round(cfg.max_steps * speed / 10)) * 10
    # named by its steps: a run of fewer would go on
    out = Path(cfg.out, f"{slug(name)}-{seed}-{steps}")
    run_stage("train_gpt.py", options | {"out": out, "seed": seed, "max_steps": steps,
                                         "eval_every": steps}, threads=1)
    losses = re.findall(r'"val_loss": ([\d.]+)', (out / "gpt.jsonl").read_text())
    print(f"{name}, seed {seed}: validation loss {losses[-1]}", flush=True)
    return out / "gpt.pt", steps, float(losses[-1])


def choose_rate(name, options, speed, cfg):
    """The options of a row, with the one of its learning rates that suits it best."""
    tries = [options | {"learning_rate": rate} for rate in RATES[name]]
    losses = [train(f"{name} rate {o['learning_rate']:g}", 0, o, speed, cfg)[2] for o in tries]
    best = tries[losses.index(min(losses))]
    print(f"{name}: of the learning rates {RATES[name]} the best is {best['learning_rate']:g}")
    return best


def judge_run(name, seed, trained, examiner):
    """One row with one seed."""
    path, steps, val_loss = trained[seed, name if name in VARIANTS else "reference"]
    changes = SAMPLING.get(name, {})
    figures = examiner(path, changes) | {"moved": examiner(path, changes, GAP)["both"]}
    print(f"{name}, seed {seed}: right {figures['both']:.1%}, Frechet distance "
          f"{figures['frechet']:.0f}", flush=True)
    return {"name": name, "seed": seed, "steps": steps, "val_loss": val_loss} | figures


def to_markdown(runs, rows):
    """The table: mean and standard deviation over the seeds."""
    titles = ["variant", "steps in the same time", *(title for title, _, _ in COLUMNS.values())]
    table = []
    for name in rows:
        of_name = [run for run in runs if run["name"] == name]
        cells = [name, str(of_name[-1]["steps"])]
        for key, (_, factor, digits) in COLUMNS.items():
            values = [run[key] * factor for run in of_name]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        table.append(cells)
    return "\n".join(markdown_table(titles, table)) + "\n"


def save_noise_chart(path, runs, rows, seeds, noise):
    """Match against the noise in training, the reference's being `noise`, without and with a gap.
    """
    levels = {name: float(name.split()[1]) for name in rows if name.startswith("noise")}
    lines = {"as is": [], f"gap {GAP}": []}
    for name, x in sorted((levels | {"reference": noise}).items(), key=lambda item: item[1]):
        for key, line in zip(("both", "moved"), lines.values()):
            values = [run[key] for run in runs if run["name"] == name]
            line.append((x, statistics.mean(values), min(values), max(values)))
    save_chart(path, f"match against noise, {seeds} seeds, bars from lowest to highest",
               "length of the noise added in training", lines)


def main():
    cfg = parse_options(Config)
    check_range(cfg, 1, 2 ** 62, "seeds", "max_steps", "vqgan_steps", "n", "jobs")
    rows, seeds = choose_rows(cfg.only), range(cfg.seeds)
    read_world(cfg.data, "heldout")
    meta = open_dump(cfg.dump)[0]
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    examiner = Examiner(cfg.data, cfg.models, cfg.n)

    options = {name: make_inputs(name, cfg) for name in rows if name in VARIANTS}
    speeds = measure_speeds(options, cfg)
    with ThreadPoolExecutor(cfg.jobs) as pool:
        names = [name for name in options if name in RATES]
        options |= dict(zip(names, pool.map(
            lambda name: choose_rate(name, options[name], speeds[name], cfg), names)))
        jobs = [(seed, name) for seed in seeds for name in options]
        trained = dict(zip(jobs, pool.map(
            lambda job: train(job[1], job[0], options[job[1]], speeds[job[1]], cfg), jobs)))
        jobs = [(seed, name) for seed in seeds for name in rows]
        runs = list(pool.map(lambda job: judge_run(job[1], job[0], trained, examiner), jobs))

    markdown = to_markdown(runs, rows)
    print(markdown, end="", flush=True)
    with atomic_write(Path(cfg.out, "ablations.md")) as f:
        f.write_text(markdown, encoding="utf-8")
    images = cfg.n * len(examiner.prompts)
    write_json(Path(cfg.out, "ablations.json"), {"runs": runs, "speed": speeds, "images": images})
    save_noise_chart(Path(cfg.out, "noise.png"), runs, rows, cfg.seeds,
                     gap_noise(meta.get("gap_cosine")))


if __name__ == "__main__":
    run_main(main)
